"""What the benchmark of decode steps over ranks makes of its ranks' measurements, and that its model can be cut as it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from benchmarks.ep_decode import Case, summary
from runtime.layout import layouts
from runtime.tiny import tiny_config
from twin.spec.hf import model_from_hf_config
from twin.spec.plan import Plan, PoolPlan

CASE = Case(ranks=2, batch=4, context=64, hidden=256, layers=3, experts=16, top_k=4, steps=3, rows="bf16")


def test_the_slowest_rank_counts_and_tokens_must_agree() -> None:
    def rank(scale: float, token: int) -> dict[str, object]:
        return {"plain": {"step_s": [3.0, 5.0 * scale, 4.0], "tokens": [1], "first": [1]},
                "graph": {"step_s": [1.0, 2.0 * scale, 1.5 / scale], "tokens": [token], "first": [1]}}

    out = summary(CASE, [rank(1.0, 1), rank(2.0, 1)])
    assert (out["plain"]["step_s"], out["graph"]["step_s"]) == (4.0, 1.5)
    assert out["plain"]["step_s_p90"] == 10.0
    assert out["same_tokens"]
    assert not summary(CASE, [rank(1.0, 1), rank(1.0, 2)])["same_tokens"]


def test_every_way_and_sums_are_told() -> None:
    case = replace(CASE, tp=2, tbo=True)
    assert case.dp == 1 and case.ways(own_gpus=False) == ["plain", "graph", "graph_tbo"]
    assert replace(CASE, tbo=False).ways(own_gpus=True) == ["plain", "graph", "nccl"]

    def rank(right: bool, symm_s: float) -> dict[str, object]:
        way = {"step_s": [1.0], "tokens": [1, 2], "first": [4, 5]}
        return {"plain": way, "graph": way, "graph_tbo": {**way, "tokens": [1, 3]},
                "sums": {"right": right, "bytes": 64, "symm_s": symm_s}}

    out = summary(case, [rank(True, 1.0), rank(True, 3.0)])
    told = out["graph_tbo"]
    assert told["same_tokens_share"] == 0.5 and told["same_first_tokens_share"] == 1.0 and out["same_tokens"]
    assert out["sums"] == {"right": True, "bytes": 64, "symm_s": 3.0}
    assert not summary(case, [rank(True, 1.0), rank(False, 1.0)])["sums"]["right"]


def test_its_model_is_shaped_like_deepseek_and_divides() -> None:
    config = tiny_config("deepseek_v3", hidden=2048, layers=8, experts=64, top_k=8, vocab=4096, context=2048)
    model = model_from_hf_config(config, "deepseek-shaped")
    assert model.attention.kind == "mla" and model.moe is not None and model.moe.shared_intermediate and model.moe.groups > 1
    for dp, tp in ((8, 1), (4, 2), (1, 8)):
        assert len(layouts(Plan(pools=(PoolPlan(role="mixed", dp=dp, tp=tp, ep=8),)), model)) == 8
