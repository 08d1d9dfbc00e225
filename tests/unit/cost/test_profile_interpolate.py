"""Interpolation that keeps to physics: bounded by the roofline, rising with work, honest about distance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.cost.profile_samples import LAUNCH_S, NK, PEAKS, M, gemm, profile, table, truth_s
from twin.cost.grid import Grid, monotone
from twin.cost.holdout import across, hold_out, with_spread, with_spread_against
from twin.cost.interpolate import FREE_AXES, Interpolator
from twin.cost.profile import GpuPeaks, Profile, ProfileStore
from twin.cost.thin import thin

BF16 = {"dtype": "bf16"}
DECODE = {"batch": (1.0, 4.0, 16.0, 64.0, 256.0), "context": (64.0, 512.0, 4096.0, 32768.0)}
HEADS = ("heads", "kv_heads", "head_dim", "window")


def ask(*profiles: Profile, gpu: str = "h200", engine: str = "vllm", version: str | None = "1.0",
        peaks: GpuPeaks | None = None) -> Interpolator:
    return Interpolator(ProfileStore(profiles), gpu, engine, version, peaks)


def decode(**more: object):
    sheets = tuple((float(h), 8.0, 128.0, 2.0**20) for h in (16, 32, 64))
    return table("attention_decode", DECODE, {"dtype": "bf16", "kv_dtype": "bf16"}, shape=HEADS, sheets=sheets, **more)


def test_measured_points_come_back_and_points_between_follow_the_knee() -> None:
    curve = ask(profile(gemm())).curve("gemm", {"n": 4096, "k": 4096}, BF16)
    assert curve is not None
    m = np.geomspace(1, 8192, 200)
    expected = truth_s("gemm", {"m": m, "n": 4096, "k": 4096}, BF16)
    assert np.abs(curve.many(m) / expected - 1).max() < 0.02
    grid = np.array(M)
    np.testing.assert_allclose(curve.many(grid), truth_s("gemm", {"m": grid, "n": 4096, "k": 4096}, BF16), rtol=1e-9)


def test_a_sparse_grid_still_follows_the_knee() -> None:
    sparse = table("gemm", {"m": (1.0, 64.0, 8192.0), "n": NK, "k": NK}, BF16)
    curve = ask(profile(sparse)).curve("gemm", {"n": 4096, "k": 4096}, BF16)
    assert curve is not None
    m = np.geomspace(1, 8192, 100)
    expected = truth_s("gemm", {"m": m, "n": 4096, "k": 4096}, BF16)
    assert np.abs(curve.many(m) / expected - 1).max() < 0.10
    straight = np.exp(np.interp(np.log(m), np.log([1, 64, 8192]), np.log(curve.many(np.array([1.0, 64, 8192])))))
    assert np.abs(straight / expected - 1).max() > 0.5  # what a line in log-log would have made of it


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 0.5), st.sampled_from([1024, 1500, 8192, 20000]))
def test_never_below_the_roofline_and_never_falling(seed: int, noise: float, n: int) -> None:
    curve = ask(profile(gemm(noise=noise, seed=seed, slower=0.8))).curve("gemm", {"n": n, "k": 3000}, BF16)
    assert curve is not None
    m = np.geomspace(1, 1e6, 300)
    seconds = curve.many(m)
    assert (np.diff(seconds) >= -1e-18).all()
    assert (seconds >= PEAKS.roofline_s("gemm", {"m": m, "n": n, "k": 3000}, BF16) * (1 - 1e-9)).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 0.4))
def test_rises_along_both_axes(seed: int, noise: float) -> None:
    curve = ask(profile(decode(noise=noise, seed=seed))).curve(
        "attention_decode", {"heads": 48, "kv_heads": 8, "head_dim": 128}, {"kv_dtype": "bf16"})
    assert curve is not None
    batch, context = np.meshgrid(np.geomspace(1, 2000, 40), np.geomspace(1, 1e6, 40), indexing="ij")
    seconds = curve.many(batch, context)
    assert (np.diff(seconds, axis=0) >= -1e-15).all()
    assert (np.diff(seconds, axis=1) >= -1e-15).all()


def test_scalar_array_and_estimate_agree() -> None:
    asker = ask(profile(gemm(noise=0.05), decode(noise=0.05)))
    one = asker.curve("gemm", {"n": 4096, "k": 4096}, BF16)
    two = asker.curve("attention_decode", {"heads": 32, "kv_heads": 8, "head_dim": 128}, {"kv_dtype": "bf16"})
    assert one is not None and two is not None
    for x in (0.5, 1, 7, 100, 8192, 1e5):
        assert one(x) == pytest.approx(float(one.many(np.array(x))), rel=1e-12)
        assert one(x) == pytest.approx(one.estimate(x).seconds, rel=1e-12)
        assert two(x, 3 * x) == pytest.approx(float(two.many(np.array(x), np.array(3 * x))), rel=1e-12)
    assert asker.curve("gemm", {"n": 4096, "k": 4096}, BF16) is one


def test_the_interval_widens_with_distance_and_says_extrapolated() -> None:
    asker = ask(profile(with_spread(gemm(noise=0.05), PEAKS)))
    def relative(m: float, n: float = 4096) -> float:
        e = asker.seconds("gemm", {"m": m, "n": n, "k": 4096}, BF16)
        assert e is not None and e.low_s < e.seconds < e.high_s
        return e.high_s / e.seconds
    assert relative(64) < relative(90) < relative(16384) < relative(2**20)
    assert relative(90) < relative(90, n=200_000)
    on, between, beyond = (asker.seconds("gemm", {"m": m, "n": 4096, "k": 4096}, BF16) for m in (64, 90, 50_000))
    assert on is not None and between is not None and beyond is not None
    assert (on.source, between.source, beyond.source) == ("measured", "interpolated", "interpolated")
    assert (on.extrapolated, between.extrapolated, beyond.extrapolated) == (False, False, True)
    assert beyond.seconds == pytest.approx(float(truth_s("gemm", {"m": 50_000, "n": 4096, "k": 4096}, BF16)), rel=0.15)


def test_a_shape_between_two_measured_ones() -> None:
    e = ask(profile(decode())).seconds("attention_decode", {"batch": 40, "context": 3000, "heads": 40, "kv_heads": 8,
                                                            "head_dim": 128}, {"kv_dtype": "bf16"})
    expected = truth_s("attention_decode", {"batch": 40, "context": 3000, "heads": 40, "kv_heads": 8, "head_dim": 128},
                       {"kv_dtype": "bf16"})
    assert e is not None and e.source == "interpolated"
    assert e.seconds == pytest.approx(float(expected), rel=0.05)


def test_a_chunk_with_past_costs_what_its_pairs_and_its_kv_cost() -> None:
    axes = {"batch": (1.0, 8.0), "new_tokens": (16.0, 128.0, 1024.0, 8192.0)}
    sheets = ((32.0, 8.0, 128.0, 2.0**20),)
    asker = ask(profile(table("attention_prefill", axes, {"dtype": "bf16", "kv_dtype": "bf16"}, shape=HEADS, sheets=sheets)))
    call = {"batch": 1, "heads": 32, "kv_heads": 8, "head_dim": 128}
    for new, past in ((2048, 6000), (512, 30_000)):
        e = asker.seconds("attention_prefill", {**call, "new_tokens": new, "past_tokens": past}, {"kv_dtype": "bf16"})
        assert e is not None
        expected = truth_s("attention_prefill", {**call, "new_tokens": new, "past_tokens": past}, {"kv_dtype": "bf16"})
        assert e.seconds == pytest.approx(float(expected), rel=0.15)
    short = asker.seconds("attention_prefill", {**call, "new_tokens": 1, "past_tokens": 10**6}, {"kv_dtype": "bf16"})
    assert short is not None
    assert short.seconds >= 10**6 * 2 * 8 * 128 * 2 / PEAKS.hbm_bytes_per_s


def test_another_gpu_of_the_same_generation_is_nearer_than_another_engine() -> None:
    slow = PEAKS.model_copy(update={"hbm_bytes_per_s": 2e12})
    cousin = profile(table("gemm", {"m": M, "n": NK, "k": NK}, BF16, peaks=slow), gpu="h100", peaks=slow)
    stranger = profile(gemm(slower=3.0), engine="sglang")
    e = ask(cousin, stranger, peaks=PEAKS).seconds("gemm", {"m": 1, "n": 8192, "k": 8192}, BF16)
    assert e is not None and e.source == "transferred" and e.detail.startswith("h100/vllm")
    there_s, here_s = (float(truth_s("gemm", {"m": 1, "n": 8192, "k": 8192}, BF16, peaks)) for peaks in (slow, PEAKS))
    assert here_s < e.seconds < there_s
    own = ask(profile(gemm())).seconds("gemm", {"m": 1, "n": 8192, "k": 8192}, BF16)
    assert own is not None and own.source == "measured"
    assert e.high_s / e.seconds > 1.1 > own.high_s / own.seconds


def test_what_a_kernel_takes_above_its_roofline_stays_within_a_generation() -> None:
    """A kernel that needs a fixed while besides its memory's time is no faster in that on more bandwidth."""
    slow = PEAKS.model_copy(update={"hbm_bytes_per_s": 2e12})
    call = {"m": 1, "n": 8192, "k": 8192}
    cousin = profile(table("gemm", {"m": M, "n": NK, "k": NK}, BF16, peaks=slow, slower=2.0), gpu="h100", peaks=slow)
    e = ask(cousin, peaks=PEAKS).seconds("gemm", call, BF16)
    there, here = (float(p.roofline_s("gemm", call, BF16)) for p in (slow, PEAKS))
    on_cousin = ask(cousin, gpu="h100", peaks=slow).seconds("gemm", call, BF16)
    assert e is not None and on_cousin is not None
    assert e.seconds - here == pytest.approx(on_cousin.seconds - there, rel=0.05)


def test_a_host_bound_table_yields_to_another_engine() -> None:
    bound, free = gemm(slower=30.0, host_bound=True), gemm()
    e = ask(profile(bound), profile(free, engine="sglang")).seconds("gemm", {"m": 1, "n": 1024, "k": 1024}, BF16)
    assert e is not None and "sglang" in e.detail and e.source == "transferred"
    alone = ask(profile(bound)).seconds("gemm", {"m": 1, "n": 1024, "k": 1024}, BF16)
    assert alone is not None and alone.source == "transferred"  # its own, but not to be trusted as measured


def test_what_no_table_knows_is_none_and_kinds_are_not_mixed() -> None:
    module = table("mla_decode", {"batch": (1.0, 64.0), "context": (64.0, 4096.0), "heads": (16.0, 128.0)},
                   {"scope": "module", "kv_dtype": "bf16", "gemm_dtype": "bf16"})
    asker = ask(profile(module))
    call = {"batch": 8, "context": 1000, "heads": 128}
    assert asker.seconds("gemm", {"m": 1, "n": 1, "k": 1}, BF16) is None
    assert asker.seconds("mla_decode", call, {"scope": "kernel", "kv_dtype": "bf16"}) is None
    assert asker.seconds("mla_decode", call, {"scope": "module", "kv_dtype": "bf16"}) is not None
    with pytest.raises(KeyError, match="give its peaks"):
        ask(profile(module), gpu="mi300x")
    assert set(FREE_AXES) >= {"gemm", "moe", "dispatch"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=12, max_size=12))
def test_monotone_rises_and_keeps_what_already_rises(values: list[float]) -> None:
    grid = np.array(values).reshape(3, 4)
    rising = monotone(grid)
    assert all((np.diff(rising, axis=axis) >= -1e-12).all() for axis in (0, 1))
    assert rising.min() >= grid.min() - 1e-12 and rising.max() <= grid.max() + 1e-12
    np.testing.assert_allclose(monotone(rising), rising)


def test_holes_are_filled_from_both_sides_and_marked() -> None:
    values = np.array([[0.0, np.nan, 2.0], [1.0, 2.0, np.nan]])
    grid = Grid.fill(((1.0, 2.0), (1.0, 2.0, 4.0)), values)
    assert grid.values[0, 1] == pytest.approx(1.0)
    assert grid.values[1, 2] == pytest.approx(2.0)
    assert (grid.hole_octaves > 0).tolist() == [[False, True, False], [False, False, True]]


def test_held_out_points_lie_in_their_intervals_about_four_times_in_five() -> None:
    axes = {"m": tuple(float(2 ** (i / 2)) for i in range(27)), "n": NK, "k": NK}
    noisy = table("gemm", axes, BF16, noise=0.08, seed=3)
    (misses,) = hold_out(profile(noisy), seed=1)
    assert len(misses.errors) > 60
    assert np.median(np.abs(misses.errors)) < 0.10
    assert 0.68 <= misses.covered <= 0.93
    (repeat,) = hold_out(profile(noisy), seed=1)
    np.testing.assert_array_equal(misses.errors, repeat.errors)


def test_predicting_one_engine_from_another_shows_its_bias() -> None:
    store = ProfileStore((profile(gemm(slower=1.5), engine="sglang"), profile(gemm())))
    (misses,) = across(store, store.profiles[1])
    assert np.median(misses.errors) == pytest.approx(np.log(1.5), abs=0.02)
    assert (misses.halves >= 0.25).all()


def test_thinning_keeps_what_cannot_be_reproduced() -> None:
    smooth = gemm()
    small = thin(smooth, PEAKS, 0.02)
    assert small.n_points < smooth.n_points / 4
    asker = ask(profile(small))
    for n in NK:
        curve = asker.curve("gemm", {"n": n, "k": 2048}, BF16)
        assert curve is not None
        expected = truth_s("gemm", {"m": np.array(M), "n": n, "k": 2048}, BF16)
        assert np.quantile(np.abs(np.log(curve.many(np.array(M)) / expected)), 0.8) < 0.03
    rough = gemm(noise=0.3)
    assert thin(rough, PEAKS, 0.02).n_points > 0.9 * rough.n_points
    halved = with_spread_against(thin(rough, PEAKS, 0.4), rough, PEAKS)
    assert halved.spread is not None and halved.spread > 0.1
    assert small.grid(0).min() * 1.01 > LAUNCH_S
