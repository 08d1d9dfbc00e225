"""Our engine's small kernels: counted as the runtime launches them, read from its own profile and nobody else's."""

from __future__ import annotations

from collections import Counter

import pytest
from cost_cases import gqa_model

from twin.cost.batch import StepBatch
from twin.cost.engines import ENGINES
from twin.cost.evidence import Evidence
from twin.cost.interpolate import Interpolator
from twin.cost.model import CostModel
from twin.cost.operators import Slice
from twin.cost.profile import ProfileStore
from twin.cost.small import groups_of
from twin.spec.load import load_cluster, load_model
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan, Precision

BF16 = Precision(weights="bf16", experts="bf16", kv="bf16", dispatch="bf16")
FP8 = Precision(weights="fp8", experts="fp8", kv="bf16", dispatch="bf16")


def launches(model: ModelSpec, precision: Precision, redundant: int = 0) -> Counter[str]:
    found: Counter[str] = Counter()
    for group in groups_of(Slice(model, precision, 1), PoolPlan(role="mixed", redundant_experts=redundant)):
        for kernel in group.kernels:
            found[kernel.operator] += kernel.times
    return found


def test_kernels_are_counted_as_a_profiler_saw_them() -> None:
    """Launches of one decode step of a rank, of which few are fused (as the profiler shows, less what joining saved): three
    quantisations a layer, of what attention's later products and the gated FFNs read, 184 norms (one at the end is not
    counted here), 58 routers, 61 activations."""
    r1 = launches(load_model("deepseek-r1"), FP8)
    assert r1["quant"] == 3 * 61 and r1["norm"] == 184 - 1 and r1["gate"] == r1["router"] == 58 and r1["silu"] == 61
    assert r1["latent"] == 61
    assert r1["gemm"] == 58  # routers, as profiles had them before
    assert launches(load_model("deepseek-r1"), BF16)["gemm"] == 58 + 2 * 61  # and down projections one by one
    qwen = launches(load_model("qwen3-30b-a3b"), BF16)
    assert qwen == {"norm": 97 - 1, "rope": 48, "router": 48, "gate": 48, "gemm": 48}  # a router, or what profiles had before
    assert launches(load_model("qwen3-30b-a3b"), BF16, 16) == qwen + Counter(replica_split=2 * 48)  # with either router


def cost(engine: str, model: ModelSpec, evidence: Evidence | None) -> CostModel:
    pool = PoolPlan(role="mixed")
    return CostModel(model, load_cluster("h200-1x1"), Plan(pools=(pool,), precision=BF16, engine=engine), pool, profile=evidence)


def test_only_our_engine_asks_for_them() -> None:
    evidence, model, batch = Evidence.load(), load_model("qwen3-30b-a3b"), StepBatch.prefill([16384], seqs=[4])
    ours = cost("eptwin", model, evidence).step(batch)
    assert {ours.sources[key] for key in ("norm", "attention/kv_write", "moe/gate")} <= {"measured", "interpolated"}
    asked = Interpolator(evidence.store, "h200", "eptwin")
    rotary = asked.curve("rope", {"heads": 32, "kv_heads": 4, "head_dim": 128}, {"dtype": "bf16"})
    assert rotary is not None
    assert ours.parts_s["attention/kv_write"] == pytest.approx(48 * rotary.estimate(16384).seconds, rel=0.01)
    theirs = cost("vllm", model, evidence).step(batch)
    assert {theirs.sources[key] for key in ("norm", "attention/kv_write", "moe/gate")} == {"roofline"}


@pytest.mark.parametrize("known", [True, False])
def test_a_split_over_replicas_takes_its_time(known: bool) -> None:
    """Two kernels a layer, measured by our engine's profile; said to be assumed where a profile lacks them."""
    evidence, model, batch = Evidence.load(), load_model("deepseek-r1"), StepBatch.decode([48], [48 * 1500])
    if not known:
        rest = [[table for table in p.tables if table.operator != "replica_split"] for p in evidence.store]
        evidence = Evidence(ProfileStore(tuple(
            p.model_copy(update={"tables": tuple(tables)}) for p, tables in zip(evidence.store, rest, strict=True))))
    without, with_them = (
        CostModel(model, load_cluster("h200-8x8"), Plan(pools=(pool,), precision=FP8, engine="eptwin"), pool, profile=evidence)
        .step(batch) for pool in (PoolPlan(role="mixed", dp=32, ep=32, redundant_experts=n) for n in (0, 32)))
    more_s = with_them.parts_s["moe/gate"] - without.parts_s["moe/gate"]
    assert 58 * 7e-6 < more_s < 58 * 12e-6
    assert (with_them.sources["moe/gate"] == without.sources["moe/gate"] == "measured") == known


def test_quick_and_slow_paths_agree_with_them() -> None:
    model = cost("eptwin", gqa_model(hidden=2048), Evidence.load())
    for batch in (StepBatch.decode([37], [37 * 900]), StepBatch.prefill([1500], [300], [2])):
        assert model.step_s(batch) == pytest.approx(model.step(batch).total_s, rel=1e-9)


def test_few_rows_are_fused_where_one_gpu_holds_the_model() -> None:
    """Decode steps of up to 16 rows; not of more, not with prompts, not of a rank among others."""
    evidence, model = Evidence.load(), load_model("qwen3-30b-a3b")
    ours = cost("eptwin", model, evidence)
    one, many, prompt = StepBatch.decode([1], [1024]), StepBatch.decode([32], [32 * 1024]), StepBatch.prefill([8], seqs=[1])
    parts = ours.step(one).parts_s
    device_s = sum(seconds for key, seconds in parts.items() if not key.startswith(("engine/", "host/")))
    usual = ENGINES["eptwin"].decode_slowdown
    assert parts["engine/slowdown"] == pytest.approx((dict(ENGINES["eptwin"].few_rows)[1] * usual - 1) * device_s)
    assert ours.step_s(one) == pytest.approx(ours.step(one).total_s, rel=1e-9)
    assert slower(ours, many) == pytest.approx(usual)
    assert slower(ours, prompt) == pytest.approx(ENGINES["eptwin"].prefill_slowdown)
    pool = PoolPlan(role="mixed", dp=2, ep=2)
    two = CostModel(model, load_cluster("h200-1x8"), Plan(pools=(pool,), precision=BF16, engine="eptwin"), pool, profile=evidence)
    assert slower(two, StepBatch.decode([1], [1024])) == pytest.approx(usual)


def slower(model: CostModel, batch: StepBatch) -> float:
    """Device seconds over the sum of operators."""
    parts = {key: seconds for key, seconds in model.step(batch).parts_s.items() if not key.startswith("host/")}
    return sum(parts.values()) / (sum(parts.values()) - parts["engine/slowdown"])


def test_a_whole_step_varies_beyond_its_operators() -> None:
    found = cost("eptwin", load_model("qwen3-30b-a3b"), Evidence.load()).step(StepBatch.decode([64], [64 * 1024]))
    assert (found.high_s - found.low_s) / 2 >= ENGINES["eptwin"].sum_spread * found.total_s


def test_shared_experts_rows_join_the_routed_in_a_kernel_of_ours() -> None:
    model, batch = load_model("deepseek-r1"), StepBatch.prefill([4096], seqs=[1])
    ours, theirs = (cost(engine, model, None).step(batch).parts_s for engine in ("eptwin", "sglang"))
    moved = 58 * 3 * 4096 * 7168 * 2
    assert moved / 4.8e12 < ours["moe/sum"] < 2.5 * moved / 4.8e12 and "moe/sum" not in theirs
    assert "moe/sum" not in cost("eptwin", load_model("qwen3-30b-a3b"), None).step(batch).parts_s
