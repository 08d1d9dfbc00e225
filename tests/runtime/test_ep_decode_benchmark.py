"""What the benchmark of decode steps over ranks makes of its ranks' measurements, and that its model can be cut as it says."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.ep_decode import Case, conclude, summary, time_steps
from benchmarks.stages import Stages, wait_for
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
    assert case.dp == 1 and case.ways(own_gpus=True) == ["plain", "graph", "graph_tbo", "nccl"]
    assert case.ways(own_gpus=False) == ["eager", "graph", "graph_tbo"], "a step alone says what a graph's first one must give"
    assert replace(case, chosen=("graph", "plain")).ways(own_gpus=False) == ["plain", "graph"]
    assert replace(case, chosen=("graph",)).ways(own_gpus=True) == ["eager", "graph"]
    with pytest.raises(ValueError, match="no way nccl"):
        replace(case, chosen=("nccl",)).ways(own_gpus=False)
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


def test_a_first_step_alone_is_enough_to_check_a_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case, heard = replace(CASE, chosen=("graph",)), list[str]()
    runner = SimpleNamespace(run=lambda segments, size: SimpleNamespace(tokens=torch.tensor([7, 8])))
    eager = time_steps(runner, [None, None], case, heard.append, steps=0)  # type: ignore[arg-type, list-item]
    assert eager == {"first": [7, 8]} and heard[0] == "first step"

    def rank(token: int) -> dict[str, object]:
        return {"provenance": {}, "card": "none", "own_gpus": False, "eager": eager,
                "graph": {"step_s": [1.0, 2.0], "tokens": [1, 2], "first": [7, token]}}

    out = summary(case, [rank(8), rank(9)])
    assert not out["same_tokens"] and out["graph"]["same_first_tokens_share"] == 0.75
    assert "chosen" not in out and "same_tokens_share" not in out["graph"]
    file = tmp_path / "out.json"
    assert conclude(case, [rank(8), rank(8)], [], True, file)
    assert not conclude(case, [], ["60 s are over:"], True, file) and "60 s" in capsys.readouterr().err
    assert not conclude(case, [rank(8), {**rank(8), "graph_tbo": {}}], ["60 s are over:"], True, file)
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["cut_off"] == ["60 s are over:"] and written["case"]["same_tokens"]


def come(rank: int, folder: str, began: float, budget_s: float, way: str) -> None:
    """A rank that ends, fails, or goes on for good in a call of this name."""
    stages = Stages(folder, rank, began, budget_s)
    stages.end_in_time()
    stages.look = lambda: "at meetings [3, 4]"
    stages(f"at the {way}")
    if way == "hangs":
        stay_away()
    stages.ended()
    sys.exit(way == "fails")


def stay_away() -> None:
    time.sleep(120)


@pytest.mark.parametrize(("ways", "budget_s"), [(("ends", "hangs"), 20.0), (("fails", "hangs"), 60.0), (("ends", "ends"), 60.0)])
def test_a_run_that_is_cut_off_says_where_every_rank_is(ways: tuple[str, ...], budget_s: float, tmp_path: Path) -> None:
    began, spawn = time.monotonic(), get_context("spawn")
    children = [spawn.Process(target=come, args=(r, str(tmp_path), began, budget_s, way)) for r, way in enumerate(ways)]
    for child in children:
        child.start()
    told = wait_for(children, str(tmp_path), began, budget_s)
    assert not any(child.is_alive() for child in children)
    if ways == ("ends", "ends"):
        assert told == []
    elif "fails" in ways:
        assert told[0].startswith("rank 0 of 2 failed") and told[1].startswith("rank 0: ended")
    else:
        assert told[0].startswith("20 s are over") and told[1].startswith("rank 0: ended")
        assert "rank 1: at the hangs" in told[2] and "stay_away < " in told[2] and "come" in told[2]
        assert ", at meetings [3, 4], in " in told[2]
