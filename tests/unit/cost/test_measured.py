"""Seconds from a profile: asked for where it covers an operator, believed where it makes sense, the roofline elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from cost_cases import cost_model, gqa_model, pool_of

from twin.cost.batch import StepBatch
from twin.cost.evidence import Evidence
from twin.cost.measured import _divisible
from twin.cost.model import CostModel
from twin.cost.profile import GpuPeaks, Profile, ProfileStore, Source, Table
from twin.policy.latent_cuts import Shape, chosen_over_measured
from twin.spec.load import load_cluster, load_gpu, load_model
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan

GPU = load_gpu("h200-sxm")
M = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0)
MODEL = load_model("qwen3-30b-a3b").model_copy(update={"layers": 2, "layer_attention": ("full",) * 2, "layer_ffn": ("moe",) * 2})


def profile(gemm_floor_s: float = 5e-6, moe_floor_s: float = 60e-6, engine: str = "eptwin") -> Profile:
    """Times that no roofline would say, so that a test can tell who answered."""
    gemms = [(5120.0, 2048.0), (2048.0, 4096.0), (float(MODEL.vocab), 2048.0)]
    products = tuple(tuple(gemm_floor_s + n * k * 2 / 2.5e12 + 2 * m * n * k / 4e14 for m in M) for n, k in gemms)
    moe = tuple(moe_floor_s + 1.2e9 * min(1.0, m / 16) / 3e12 + m * 3e-8 for m in M)
    decode = tuple(4e-6 + b * c * 1024 * 2 / 3e12 for b in (1.0, 64.0) for c in (128.0, 8192.0))
    words = {"dtype": "bf16"}
    return Profile(
        gpu="h200", engine=engine, engine_version="1", peaks=GpuPeaks.of(GPU, load_cluster("h200").network),
        sources=(Source(name="test"),), tables=(
            Table(operator="gemm", attrs=words, shape=("n", "k"), sheets=tuple(gemms), axes={"m": M}, seconds=products,
                  spread=0.02),
            Table(operator="moe", attrs={**words, "layout": "fused", "distribution": "power_law_1.01", "gated": "yes"},
                  shape=("hidden", "intermediate", "top_k", "experts", "moe_tp", "moe_ep"),
                  sheets=((2048.0, 768.0, 8.0, 128.0, 1.0, 1.0),), axes={"tokens": M}, seconds=(moe,), spread=0.02),
            Table(operator="attention_decode", attrs={**words, "kv_dtype": "bf16"},
                  shape=("heads", "kv_heads", "head_dim", "window"), sheets=((32.0, 4.0, 128.0, float(1 << 20)),),
                  axes={"batch": (1.0, 64.0), "context": (128.0, 8192.0)}, seconds=(decode,), spread=0.02)))


def measured(model: ModelSpec = MODEL, engine: str = "eptwin", **floors: float) -> CostModel:
    pool = PoolPlan(role="mixed")
    store = Evidence(ProfileStore((profile(engine=engine, **floors),)))
    return CostModel(model, load_cluster("h200-1x1"), Plan(pools=(pool,), engine=engine), pool, profile=store)


def test_grid_points_come_back_and_say_so() -> None:
    step = measured().step(StepBatch.decode([64], [64 * 8192]))
    gemm = sum(5e-6 + n * k * 2 / 2.5e12 + 2 * 64 * n * k / 4e14 for n, k in ((5120, 2048), (2048, 4096)))
    assert step.parts_s["attention/projections"] == pytest.approx(2 * gemm, rel=0.03)
    assert step.parts_s["attention/kv_read"] == pytest.approx(2 * (4e-6 + 64 * 8192 * 2048 / 3e12), rel=0.03)
    assert {step.sources[k] for k in ("attention/projections", "attention/kv_read")} <= {"measured", "interpolated"}
    assert step.sources["norm"] == "roofline"  # no table of it
    assert step.total_s == pytest.approx(sum(step.parts_s.values()), rel=1e-12)


def test_quick_and_slow_paths_agree_with_a_profile() -> None:
    cost = measured()
    for batch in (StepBatch.decode([37], [37 * 900]), StepBatch.prefill([1500], [300], [2]), StepBatch.decode([1], [10])):
        assert cost.step_s(batch) == pytest.approx(cost.step(batch).total_s, rel=1e-9)
    seqs = np.array([1, 5, 60, 200])
    alone = [cost.step_s(StepBatch.decode([s], [s * 700])) for s in seqs]
    assert cost.decode_s(seqs, seqs * 700) == pytest.approx(alone, rel=1e-9)


def test_experts_come_from_the_table_when_it_makes_sense() -> None:
    batch = StepBatch.decode([16], [16 * 1000])
    kept, slow = measured(), measured(moe_floor_s=5e-3)
    assert kept.step(batch).parts_s["moe/experts"] == pytest.approx(2 * (60e-6 + 1.2e9 / 3e12 + 16 * 3e-8), rel=0.2)
    assert kept.step(batch).sources["moe/experts"] in ("measured", "interpolated")
    assert slow.step(batch).sources["moe/experts"] == "roofline"  # ten times what the bytes say: nobody tuned that kernel
    assert "moe/permute" not in kept.step(batch).parts_s  # the table holds it


def test_a_host_bound_product_counts_only_where_it_rises() -> None:
    """Another engine's: ours is timed in graphs, and a product that takes long has no host in its way."""
    plain = cost_model(MODEL, "h200-1x1", pool_of(), engine="sglang")
    honest, slow = (measured(engine="sglang", gemm_floor_s=floor) for floor in (5e-6, 80e-6))
    small, large = StepBatch.decode([16], [160]), StepBatch.prefill([4096], 0)
    key = "attention/projections"
    assert slow.step(small).parts_s[key] == pytest.approx(plain.step(small).parts_s[key], rel=0.2)
    assert slow.step(small).sources[key] == "mixed"
    assert slow.step(large).parts_s[key] > 1.2 * honest.step(large).parts_s[key]
    ours = measured(gemm_floor_s=80e-6).step(small)
    assert ours.parts_s[key] > 4 * 80e-6 and ours.sources[key] in ("measured", "interpolated")


def test_absorbed_products_come_from_our_own_table_of_both() -> None:
    """20 and 30 us a layer; another engine's rows, and half of ours, leave the roofline."""
    sides = [Table(operator="mla_bmm", attrs={"dtype": "bf16", "side": side}, shape=("heads",), sheets=((16.0,), (128.0,)),
                   axes={"tokens": M}, seconds=((seconds,) * len(M),) * 2, spread=0.02) for side, seconds in (("pre", 20e-6),
                                                                                                              ("post", 30e-6))]
    model, pool, batch = load_model("deepseek-v2-lite"), PoolPlan(role="mixed"), StepBatch.decode([32], [32 * 1000])

    def absorbed(tables: list[Table], owner: str = "eptwin") -> tuple[float, str]:
        other = profile(engine=owner).model_copy(update={"tables": tuple(tables), "engine_version": "2"})
        evidence = Evidence(ProfileStore((profile(), other)))
        cost = CostModel(model, load_cluster("h200-1x1"), Plan(pools=(pool,)), pool, profile=evidence)
        step = cost.step(batch)
        assert cost.step_s(batch) == pytest.approx(step.total_s, rel=1e-9)
        return step.parts_s["attention/absorb"], step.sources["attention/absorb"]

    seconds, source = absorbed(sides)
    assert seconds == pytest.approx(27 * 50e-6, rel=0.02) and source in ("measured", "interpolated")
    for other in (absorbed(sides[:1]), absorbed(sides, "sglang")):
        assert other[0] < 27 * 20e-6 and other[1] == "roofline"


def test_nothing_of_a_gpu_answers_for_a_cpu() -> None:
    store = Evidence(ProfileStore((profile(),)))
    cluster = load_cluster("cpu-2rank")
    pool = pool_of(dp=2, ep=2)
    cost = CostModel(gqa_model(), cluster, Plan(pools=(pool,)), pool, profile=store)
    assert cost.site.profile is None
    cpu = profile().model_copy(update={"gpu": "cpu"})
    asked = Evidence(ProfileStore((profile(), cpu))).interpolator(cluster.groups[0].gpu, cluster.network, Plan(pools=(pool,)))
    assert asked is not None
    assert [p.gpu for p in asked.store] == ["cpu"]


def test_one_evidence_keeps_one_interpolator() -> None:
    store = Evidence(ProfileStore((profile(),)))
    cluster, plan = load_cluster("h200"), Plan(pools=(pool_of(),))
    gpu = cluster.groups[0].gpu
    assert store.interpolator(gpu, cluster.network, plan) is store.interpolator(gpu, cluster.network, plan)


def test_trends_beyond_measured_batches_are_held_to_two_halves_one_after_the_other() -> None:
    batch = np.arange(20.0)[:, None] / 4 * np.log(2.0) + np.zeros((1, 3))
    steep = 1.6 * batch  # three times as long for twice the batch
    held = _divisible(steep)
    assert held[-1, 0] - held[3, 0] <= 4 * np.log(2.2) and (_divisible(batch) == batch).all()
    assert (np.diff(held, axis=0) >= 0).all()


def test_our_latent_attention_takes_as_long_as_its_rounds() -> None:
    """132 programs at a time: batches of the table fill their rounds and stay as measured; what exceeds a round costs a short
    one, far from the whole round that it would cost uncut; what does not fill a round was measured as it is cut."""
    seqs, context = np.array([1.0, 32.0, 96.0, 128.0, 160.0, 256.0, 264.0, 400.0, 512.0]), np.full(9, 4096.0)
    longer = chosen_over_measured(Shape(64, 132), seqs, context)
    assert longer[[0, 1, 2, 3, 5, 6, 8]] == pytest.approx(np.ones(7), abs=0.04)
    assert 1.0 < longer[4] < 1.2 < 2 / 1.25 and 0.95 < longer[7] < 1.1 < 4 / 3.125
    assert chosen_over_measured(Shape(128, 132), np.array([40.0]), np.array([8000.0]))[0] == 1.0
