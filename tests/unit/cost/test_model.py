"""CostModel as a whole: parts make the total, the quick paths agree with the slow one, physics has no surprises."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cost_cases import cost_model, gqa_model, mla_model, pool_of

from twin.cost.batch import StepBatch
from twin.cost.model import CostModel
from twin.spec.cluster import ClusterSpec
from twin.spec.errors import SpecError
from twin.spec.load import load_cluster, load_model, presets
from twin.spec.plan import Precision
from twin.spec.scenario import Routing

FP8 = Precision(weights="fp8_block", experts="fp8_block", kv="bf16", dispatch="fp8")
R1 = load_model("deepseek-r1")
POOLS: list[tuple[str, str, dict[str, Any]]] = [
    ("deepseek-r1", "h100-2x8", {"dp": 16, "ep": 16, "role": "decode", "tbo": True}),
    ("deepseek-r1", "h200-4x8", {"dp": 8, "tp": 4, "ep": 32, "role": "prefill"}),
    ("deepseek-r1", "h200-1x8", {"dp": 8, "ep": 8, "mtp_draft_tokens": 2}),
    ("deepseek-v3.2", "b200-1x8", {"tp": 8, "ep": 8}),
    ("qwen3-235b-a22b", "h200-1x8", {"dp": 4, "tp": 2, "ep": 4}),
    ("qwen3.5-35b-a3b", "h200-1x8", {"dp": 2, "tp": 2, "ep": 1}),
    ("gpt-oss-120b", "h100-1x8", {"dp": 2, "ep": 2, "cuda_graphs": False}),
    ("llama-3.1-70b", "h100-1x8", {"tp": 8}),
    ("kimi-k2", "gb200-nvl72", {"dp": 64, "ep": 64, "redundant_experts": 0}),
]


def any_model(case: tuple[str, str, dict[str, Any]], engine: str = "sglang", **more: Any) -> CostModel:
    name, cluster, fields = case
    return cost_model(load_model(name), cluster, pool_of(**fields), engine=engine, precision=FP8, **more)


def batches(dp: int) -> list[StepBatch]:
    rng = np.random.default_rng(dp)
    seqs, prompts = rng.integers(1, 300, dp), rng.integers(0, 3, dp)
    mixed = StepBatch(seqs, seqs * 900, prompts * 700, prompts * 700 * 800.0, prompts)
    return [StepBatch.decode(seqs, seqs * rng.integers(100, 4000, dp)), StepBatch.prefill(rng.integers(1, 4096, dp), 500), mixed,
            StepBatch.decode([1] * dp, [100] * dp)]


@pytest.mark.parametrize("case", POOLS, ids=[f"{c[0]}-{i}" for i, c in enumerate(POOLS)])
@pytest.mark.parametrize("engine", ["sglang", "trtllm"])
def test_parts_make_the_total_and_quick_paths_agree(case: tuple[str, str, dict[str, Any]], engine: str) -> None:
    cost = any_model(case, engine)
    for batch in batches(cost.pool.dp):
        step = cost.step(batch)
        assert step.total_s == pytest.approx(sum(step.parts_s.values()), rel=1e-12)
        assert cost.step_s(batch) == pytest.approx(step.total_s, rel=1e-9)
        assert set(step.sources) == set(step.parts_s)
        assert 0 < step.low_s < step.total_s < step.high_s
        signed = ("overlap/", "engine/slowdown")  # an engine may be faster than the sum of its operators
        assert all(seconds > 0 for key, seconds in step.parts_s.items() if not key.startswith(signed))
        assert all(seconds <= 0 for key, seconds in step.parts_s.items() if key.startswith("overlap/")), step.parts_s


@pytest.mark.parametrize("case", POOLS[:5], ids=[c[0] for c in POOLS[:5]])
def test_decode_s_is_step_s_for_many_steps(case: tuple[str, str, dict[str, Any]]) -> None:
    cost = any_model(case)
    dp, seqs = cost.pool.dp, np.array([1, 3, 64, 200])
    alone = [cost.step_s(StepBatch.decode(np.full(dp, s), np.full(dp, s * 1000))) for s in seqs]
    assert cost.decode_s(seqs, seqs * 1000) == pytest.approx(alone, rel=1e-9)
    each = np.random.default_rng(1).integers(1, 200, (3, dp))
    assert cost.decode_s(each, each * 50) == pytest.approx([cost.step_s(StepBatch.decode(r, r * 50)) for r in each], rel=1e-9)


def test_one_rank_and_ep_one_send_nothing() -> None:
    for pool in (pool_of(), pool_of(tp=8, ep=1)):
        parts = cost_model(R1, "h200-1x8", pool, precision=FP8).step(StepBatch.decode([8], [8000])).parts_s
        assert not [key for key in parts if "dispatch" in key or "combine" in key]
    parts = cost_model(R1, "h200-1x8", pool_of(dp=8, ep=8), precision=FP8).step(StepBatch.decode([8] * 8, [8000] * 8)).parts_s
    assert parts["moe/dispatch/nvlink"] > 0
    shared = cost_model(R1, "h200-1x8", pool_of(dp=2, tp=4, ep=1), precision=FP8).step(StepBatch.decode([8] * 2, [8000] * 2))
    assert shared.parts_s["moe/all_gather/nvlink"] > 0  # DP attention over TP experts gathers instead


FASTER = ["nvlink_bytes_per_s", "nic_bytes_per_s", "pcie_bytes_per_s", "hbm_bytes_per_s", "bf16_flop_per_s", "fp8_flop_per_s"]


@pytest.mark.parametrize("field", FASTER)
@pytest.mark.parametrize("case", POOLS[:5], ids=[c[0] for c in POOLS[:5]])
def test_doubling_a_rate_never_slows_a_step(case: tuple[str, str, dict[str, Any]], field: str) -> None:
    base = load_cluster(case[1])
    if field in type(base.network).model_fields:
        quick = base.model_copy(update={"network": base.network.model_copy(update={field: 2 * getattr(base.network, field)})})
    else:
        group = base.groups[0]
        gpu = group.gpu.model_copy(update={field: 2 * getattr(group.gpu, field)})
        quick = base.model_copy(update={"groups": (group.model_copy(update={"gpu": gpu}),)})
    slow, fast = (cost_model(load_model(case[0]), spec, pool_of(**case[2]), engine="sglang", precision=FP8)
                  for spec in (base, quick))
    for batch in batches(slow.pool.dp):
        assert fast.step_s(batch) <= slow.step_s(batch) * (1 + 1e-9)


@pytest.mark.parametrize(("cluster", "comm"), [("h200-1x8", "symm"), ("h200-1x8", "deepep_low_latency"), ("h200-1x8", "ag_rs")])
def test_permuting_ranks_changes_nothing(cluster: str, comm: str) -> None:
    cost = cost_model(R1, cluster, pool_of(dp=8, ep=8, comm=comm), precision=FP8)
    rng = np.random.default_rng(3)
    for batch in batches(8):
        order = rng.permutation(8)
        moved = StepBatch(*(getattr(batch, f.name)[order] for f in dataclasses.fields(batch)))
        assert cost.step_s(moved) == pytest.approx(cost.step_s(batch), rel=1e-12)


def test_more_work_never_takes_less_time() -> None:
    for case in POOLS:
        cost = any_model(case)
        if cost.pool.tbo:
            continue  # a batch that crosses the threshold is split, and may gain
        seqs = np.arange(1, 257)
        times = cost.decode_s(seqs, seqs * 1000)
        assert (np.diff(times) >= -1e-12).all()
        longer = cost.decode_s(np.full(20, 32), 32 * np.arange(1, 21) * 1000)
        assert (np.diff(longer) >= 0).all()


def test_the_slowest_rank_sets_the_pace() -> None:
    cost = cost_model(R1, "h200-1x8", pool_of(dp=8, ep=8), precision=FP8)
    even = StepBatch.decode([64] * 8, [64 * 2000] * 8)
    lopsided = StepBatch.decode([64] * 8, [64 * 1000] * 7 + [64 * 9000])  # as much context in all, most on one rank
    assert cost.step_s(lopsided) > cost.step_s(even)
    one = cost.step(StepBatch.decode([64] * 8, [64 * 9000] * 8)).parts_s["attention/kv_read"]
    assert cost.step(lopsided).parts_s["attention/kv_read"] == pytest.approx(one)


def test_two_batch_overlap_gains_when_large_and_loses_when_small() -> None:
    """SGLang on 72 H100: +25% at 256 sequences a GPU, +15% at 128; below about 64 it does not pay."""
    pools = [pool_of(role="decode", dp=72, ep=72, redundant_experts=32, max_num_seqs=256, tbo=tbo, tbo_min_tokens=2,
                     placement="eplb_global") for tbo in (False, True)]
    off, on = (cost_model(R1, "h100-9x8", pool, engine="sglang", precision=FP8) for pool in pools)
    gain = off.decode_s([8, 256], [8 * 2000, 256 * 2000]) / on.decode_s([8, 256], [8 * 2000, 256 * 2000])
    assert gain[0] < 1.0
    assert 1.1 < gain[1] < 1.5
    waiting = cost_model(R1, "h100-9x8", pool_of(role="decode", dp=72, ep=72, redundant_experts=32, tbo=True,
                                                 tbo_min_tokens=64, placement="eplb_global"), engine="sglang", precision=FP8)
    assert waiting.decode_s([8], [16000])[0] == pytest.approx(off.decode_s([8], [16000])[0])


def test_skew_costs_and_redundancy_pays() -> None:
    batch = StepBatch.decode([128] * 32, [128 * 2000] * 32)
    skewed = Routing(kind="zipf", alpha=0.6)

    def seconds(routing: Routing, **pool: Any) -> float:
        made = cost_model(R1, "h200-4x8", pool_of(dp=32, ep=32, **pool), precision=FP8, routing=routing)
        return made.step(batch).parts_s["moe/experts"]

    even, plain = seconds(Routing()), seconds(skewed)
    helped = seconds(skewed, redundant_experts=32, placement="eplb_global")
    assert even < helped < plain


def test_drafts_widen_the_step_and_shorten_the_answer() -> None:
    plain, drafting = (cost_model(R1, "h200-1x8", pool_of(dp=8, ep=8, mtp_draft_tokens=n, mtp_acceptance=0.8), precision=FP8)
                       for n in (0, 2))
    batch = StepBatch.decode([16] * 8, [16 * 3000] * 8)
    assert drafting.tokens_per_step == pytest.approx(1 + 0.8 + 0.64)
    assert plain.tokens_per_step == 1.0
    assert plain.step_s(batch) < drafting.step_s(batch) < 2.44 * plain.step_s(batch)
    assert drafting.step(batch).parts_s["mtp/draft"] > 0


def test_graphs_pad_and_eager_launches_show() -> None:
    cost = cost_model(load_model("qwen3-30b-a3b"), "h200-1x1", pool_of(), engine="vllm")
    assert cost.decode_s([17], [17000])[0] - cost.decode_s([24], [17000])[0] == pytest.approx(-7 * 4e-6, abs=1e-9)  # host only
    eager = cost_model(load_model("qwen3-30b-a3b"), "h200-1x1", pool_of(cuda_graphs=False), engine="vllm")
    parts = eager.step(StepBatch.decode([1], [1000])).parts_s
    assert parts["host/launch"] > 0.2e-3
    assert "host/launch" not in cost.step(StepBatch.decode([1], [1000])).parts_s


def test_every_cluster_preset_serves_a_small_model() -> None:
    for name in presets("clusters"):
        cluster: ClusterSpec = load_cluster(name)
        ranks = min(cluster.gpus, 8)
        made = cost_model(mla_model(), cluster, pool_of(dp=ranks, ep=ranks))
        assert 0 < made.step_s(StepBatch.decode([4] * ranks, [400] * ranks)) < 1.0
        assert made.memory().kv_blocks > 0


def test_wrong_shapes_and_places_are_said() -> None:
    cost = cost_model(gqa_model(), "cpu-2rank", pool_of(dp=2, ep=2))
    with pytest.raises(SpecError, match="batch of 3 ranks"):
        cost.step(StepBatch.decode([1] * 3, [1] * 3))
    with pytest.raises(SpecError, match="does not fit"):
        cost_model(gqa_model(), "cpu-2rank", pool_of(dp=4, ep=4))
    with pytest.raises(SpecError, match="no node group"):
        cost_model(gqa_model(), "cpu-2rank", pool_of(node_group="elsewhere"))


def test_same_bytes_under_another_hash_seed() -> None:
    code = ("from cost_cases import *; import numpy as np; from twin.cost.batch import StepBatch\n"
            "c = cost_model(mla_model(), 'h100-2x8', pool_of(dp=16, ep=16, redundant_experts=16, placement='eplb_global'),"
            " routing=Routing(kind='zipf', alpha=0.7)); s = c.step(StepBatch.decode([9]*16, [900]*16)); print(repr(s))")
    here = str(Path(__file__).parent)
    outs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=here,
                           env={"PYTHONHASHSEED": seed, "PYTHONPATH": "../../..", "OMP_NUM_THREADS": "1"}).stdout
            for seed in ("1", "77")}
    assert len(outs) == 1


def test_cost_imports_neither_torch_nor_simpy() -> None:
    code = "import sys, twin.cost.model; print(sorted({'torch', 'simpy', 'plotly'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert out.stdout.strip() == "[]"
