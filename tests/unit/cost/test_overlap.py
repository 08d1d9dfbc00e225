"""Two-batch overlap: what the stages beside an exchange do not cover shows, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cost_cases import cost_model, pool_of

from twin.cost.batch import StepBatch
from twin.cost.build import exchanges
from twin.cost.engines import engine_of, wide_engine_of
from twin.cost.model import CostModel
from twin.cost.overlap import Half, Order, overlapped_s, shown_s
from twin.cost.protocols import PROTOCOLS
from twin.spec.load import load_cluster, load_model
from twin.spec.plan import Precision

_ONE = np.ones(1)
HALF = Half(compute=10 * _ONE, experts=2 * _ONE, early=3 * _ONE, late=4 * _ONE, dispatch=1 * _ONE, combine=1 * _ONE,
            dispatch_local=0 * _ONE, combine_local=0 * _ONE, wait=0 * _ONE)
LOW_LATENCY = PROTOCOLS["deepep_low_latency"]


@pytest.mark.parametrize("order", ["staggered", "alternating"])
def test_exchanges_shorter_than_the_stages_beside_them_are_free(order: Order) -> None:
    assert overlapped_s(HALF, LOW_LATENCY, 1.0, order) == pytest.approx(20.0)
    packed = replace(HALF, dispatch_local=0.25 * _ONE, combine_local=0.5 * _ONE, wait=0.1 * _ONE)
    assert overlapped_s(packed, LOW_LATENCY, 1.0, order) == pytest.approx(20.0 + 2 * 0.85)


def test_stages_hide_only_what_runs_beside_them() -> None:
    slow = replace(HALF, dispatch=5 * _ONE, combine=7 * _ONE)
    dispatch, combine = shown_s(slow, LOW_LATENCY, 1.0, "staggered")
    assert (dispatch[0], combine[0]) == (pytest.approx(2 * (5 - 3)), pytest.approx(2 * (7 - 4)))
    dispatch, combine = shown_s(slow, LOW_LATENCY, 1.0, "alternating")  # once behind 7 of attention, once behind 2 of experts
    assert (dispatch[0], combine[0]) == (pytest.approx(3.0), pytest.approx(5.0))


def test_one_exchange_of_four_hides_where_all_wait_for_what_was_issued_before() -> None:
    dispatch, combine = shown_s(HALF, LOW_LATENCY, 1.0, "waiting")
    assert (dispatch[0], combine[0]) == (pytest.approx(2.0), pytest.approx(1.0))


@pytest.mark.parametrize("order", ["staggered", "alternating"])
def test_overlap_is_never_shorter_than_either_stream(order: Order) -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        parts = rng.uniform(0, 4, size=5)
        half = replace(HALF, compute=_ONE * parts[:3].sum(), experts=_ONE * parts[0], early=_ONE * parts[1], late=_ONE * parts[2],
                       dispatch=_ONE * parts[3], combine=_ONE * parts[4])
        assert overlapped_s(half, LOW_LATENCY, 1.0, order)[0] >= 2 * max(parts[:3].sum(), parts[3:].sum()) - 1e-9


def _wide(tbo: bool, role: str = "decode") -> CostModel:
    pool = pool_of(role=role, dp=32, ep=32, tbo=tbo, tbo_min_tokens=0, max_batch_tokens=1 << 16, max_num_seqs=256)
    fp8 = Precision(weights="fp8_block", experts="fp8_block", kv="bf16", dispatch="fp8")
    return cost_model(load_model("deepseek-r1"), "h100-4x8", pool, engine="sglang", precision=fp8)


def test_overlap_pays_in_large_decode_batches_and_loses_in_small_ones() -> None:
    both = {tbo: _wide(tbo) for tbo in (True, False)}
    gain = {seqs: both[False].step_s(StepBatch.decode([seqs], [seqs * 2000.0]))
            / both[True].step_s(StepBatch.decode([seqs], [seqs * 2000.0])) - 1 for seqs in (16, 256)}
    assert gain[256] > 0.1 and gain[16] < 0


def test_steps_with_overlap_sum_up_and_the_quick_way_agrees() -> None:
    cost, batch = _wide(True), StepBatch.decode([128.0], [128 * 3000.0])
    step = cost.step(batch)
    assert sum(step.parts_s.values()) == pytest.approx(step.total_s) == pytest.approx(cost.step_s(batch))
    dispatch_s, combine_s = cost.shown_exchanges_s(batch)
    moved = sum(seconds for key, seconds in step.parts_s.items() if key.startswith(("moe/dispatch", "moe/combine")))
    assert 0 < dispatch_s + combine_s < moved


def test_attention_loses_the_communication_kernels_sms_once() -> None:
    batch = StepBatch.prefill([16384.0], 0, 4)
    alone, beside = (_wide(tbo, "prefill").step(batch).parts_s["attention/prefill"] for tbo in (False, True))
    engine = wide_engine_of("sglang", load_cluster("h100").groups[0].gpu)
    assert beside / alone < 132 / 108 * engine.tbo_compute_slowdown * 1.02


def test_kernels_lose_what_each_family_was_measured_to_lose_beside_exchanges() -> None:
    """Halves of 16k tokens are passes of 8k: the same kernels, alone and beside exchanges."""
    alone = _wide(False, "prefill").step(StepBatch.prefill([8192.0], 0, 2)).parts_s
    beside = _wide(True, "prefill").step(StepBatch.prefill([16384.0], 0, 4)).parts_s
    slows = PROTOCOLS["deepep_normal"].slows
    assert slows is not None and slows.experts < 132 / 108 < slows.attention
    for key, factor in (("moe/experts", slows.experts), ("norm", slows.others)):
        assert beside[key] / alone[key] / 2 == pytest.approx(factor, rel=0.02)


def test_an_exchange_takes_longer_in_an_engine_than_in_its_own_test() -> None:
    cost = _wide(False, "prefill")
    tokens = np.array([8192.0])
    tested = exchanges(replace(cost.site, protocol=cost.site.protocol.tested))
    for (_, served), alone in zip(cost.exchanges, tested, strict=True):
        assert alone is not None
        assert served.seconds(tokens)[1] > 1.1 * alone.seconds(tokens)[1] > 0


def test_deepep_pools_keep_their_engine_but_for_fitted_products() -> None:
    gpu = load_cluster("h100").groups[0].gpu
    wide, plain, fitted = wide_engine_of("sglang", gpu), engine_of("sglang"), engine_of("sglang", gpu)
    assert wide.products_scale == fitted.products_scale and wide.attention_scale == plain.attention_scale
    assert wide.late_s < plain.late_s
