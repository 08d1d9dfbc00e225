"""Predicted against measured: the arithmetic, what is judged, and what the reader is told."""

from __future__ import annotations

import pytest

from twin.spec.errors import SpecError
from twin.spec.results import (
    Comparison,
    Counts,
    Interval,
    Latencies,
    PoolResult,
    Provenance,
    RunResult,
    Steady,
    Summary,
    Throughput,
)
from twin.validate.compare import JUDGED, compare, format_comparison, signed_error


def summary(mean: float) -> Summary:
    return Summary(count=500, mean=mean, p50=mean * 0.9, p90=mean * 1.5, p95=mean * 1.7, p99=mean * 2, max=mean * 3)


def result(kind: str, scale: float = 1.0, **changes: object) -> RunResult:
    """A result whose latencies are `scale` times those of scale 1 and whose rates are divided by it."""
    pool = PoolResult(
        role="mixed",
        instances=1,
        gpus=2,
        dp=2,
        tp=1,
        ep=2,
        utilisation=0.8,
        steps=100,
        step_s=summary(0.01 * scale),
        batch_seqs_mean=6.0,
        batch_tokens_mean=9.0,
        kv_usage_mean=0.4,
        kv_usage_max=0.7,
        preemptions=0,
    )
    made = RunResult(
        kind=kind,
        name="run",
        model="m",
        cluster="c",
        provenance=Provenance(tool_version="0", spec_sha256="aa"),
        latencies=Latencies(
            ttft_s=summary(0.2 * scale), tpot_s=summary(0.02 * scale), itl_s=summary(0.02 * scale), e2e_s=summary(4 * scale)
        ),
        throughput=Throughput(
            window_s=60,
            requests_per_s=5 / scale,
            input_tok_per_s=5000,
            output_tok_per_s=900 / scale,
            output_tok_per_s_per_gpu=450 / scale,
            total_tok_per_s_per_gpu=3000,
            tok_per_s_per_user=50 / scale,
            goodput_per_s=None,
            slo_attainment=None,
        ),
        counts=Counts(submitted=600, finished=600, counted=500, input_tokens=1, output_tokens=1),
        steady=Steady(verdict="steady", warmup_s=5),
        pools=(pool,),
    )
    return made.model_copy(update=changes)


def metric(comparison: Comparison, name: str) -> object:
    return next(m for m in comparison.metrics if m.name == name)


def test_every_promised_metric_is_there_with_its_signed_error() -> None:
    comparison = compare(result("prediction", 1.1), result("measurement"), band=0.2)
    latencies = {f"{q}_s_{s}" for q in ("ttft", "tpot", "itl", "e2e") for s in ("mean", "p50", "p99")}
    rates = {"output_tok_per_s", "requests_per_s"}
    pool = {f"mixed/{n}" for n in ("step_s_mean", "batch_seqs_mean", "batch_tokens_mean", "kv_usage_mean")}
    by_name = {m.name: m for m in comparison.metrics}
    assert latencies | rates | pool <= set(by_name)
    assert "goodput_per_s" not in by_name, "neither side has a goodput, so there is nothing to show"
    for name in latencies | {"mixed/step_s_mean"}:
        assert by_name[name].error == pytest.approx(0.1)
    for name in rates:
        assert by_name[name].error == pytest.approx(1 / 1.1 - 1)
    assert by_name["mixed/batch_seqs_mean"].error == 0.0


def test_equal_results_have_no_error() -> None:
    comparison = compare(result("prediction"), result("measurement"), band=0.01)
    assert all(m.error == 0 for m in comparison.metrics)
    assert (comparison.median_abs_error, comparison.max_abs_error, comparison.within_band) == (0.0, 0.0, True)


@pytest.mark.parametrize(("band", "within"), [(0.2, True), (0.11, True), (0.09, False), (None, None)])
def test_the_band_decides(band: float | None, within: bool | None) -> None:
    comparison = compare(result("prediction", 1.1), result("measurement"), band=band)
    assert comparison.within_band is within
    assert comparison.max_abs_error == pytest.approx(0.1)


def test_tails_and_pool_averages_are_shown_but_not_judged() -> None:
    prediction = result("prediction")
    wild = prediction.latencies.model_copy(update={"ttft_s": summary(0.2).model_copy(update={"p99": 40.0})})
    comparison = compare(prediction.model_copy(update={"latencies": wild}), result("measurement"), band=0.05)
    assert metric(comparison, "ttft_s_p99").error == pytest.approx(99)
    assert comparison.within_band is True
    assert "ttft_s_p99" not in JUDGED
    strict = compare(prediction.model_copy(update={"latencies": wild}), result("measurement"), band=0.05, judged=("ttft_s_p99",))
    assert strict.within_band is False


def test_intervals_are_found_under_the_metric_s_name() -> None:
    intervals = {"ttft_s_p50": Interval(low=0.17, high=0.19), "tpot_s_p50": Interval(low=0.02, high=0.03)}
    comparison = compare(result("prediction", intervals=intervals), result("measurement"))
    assert metric(comparison, "ttft_s_p50").inside is True
    assert metric(comparison, "tpot_s_p50").inside is False
    assert metric(comparison, "e2e_s_p50").inside is None


def test_what_is_missing_on_one_side_is_shown_without_an_error() -> None:
    empty = Summary(count=0)
    measured = result("measurement")
    latencies = measured.latencies.model_copy(update={"tpot_s": empty})
    found = metric(compare(result("prediction"), measured.model_copy(update={"latencies": latencies})), "tpot_s_p50")
    assert (found.predicted, found.measured, found.error) == (pytest.approx(0.018), None, None)


def test_nothing_in_common_is_not_a_pass() -> None:
    none = Summary(count=0)
    measured = result(
        "measurement",
        latencies=Latencies(ttft_s=none, tpot_s=none, itl_s=none, e2e_s=none),
        throughput=result("measurement").throughput.model_copy(update={"output_tok_per_s": 0.0, "requests_per_s": 0.0}),
    )
    comparison = compare(result("prediction"), measured, band=0.5)
    assert comparison.within_band is None
    assert comparison.median_abs_error is None


def test_two_pools_of_one_role_are_told_apart() -> None:
    pool = result("prediction").pools[0]
    slow = pool.model_copy(update={"step_s": summary(0.05)})
    comparison = compare(result("prediction", pools=(pool, pool)), result("measurement", pools=(pool, slow)))
    assert metric(comparison, "mixed/step_s_mean").error == 0
    assert metric(comparison, "mixed 2/step_s_mean").error == pytest.approx(-0.8)


@pytest.mark.parametrize(
    ("predicted", "measured", "error"),
    [(2.0, 1.0, 1.0), (0.5, 1.0, -0.5), (0.0, 0.0, 0.0), (1.0, 0.0, None), (None, 1.0, None), (1.0, None, None)],
)
def test_signed_error(predicted: float | None, measured: float | None, error: float | None) -> None:
    assert signed_error(predicted, measured) == error


def test_notes_warn_of_what_would_mislead() -> None:
    measured = result(
        "measurement",
        model="other",
        steady=Steady(verdict="not steady", warmup_s=0, reason="the queue grew"),
        counts=Counts(submitted=50, finished=40, rejected=10, counted=30, input_tokens=1, output_tokens=1),
        provenance=Provenance(tool_version="0", spec_sha256="bb"),
    )
    notes = " ".join(compare(result("prediction"), measured).notes)
    for words in ("Different models: m and other", "spec hashes differ", "the queue grew", "30 requests", "10 requests"):
        assert words in notes
    assert len(compare(result("prediction"), result("measurement")).notes) == 1


def test_swapped_and_senseless_are_refused() -> None:
    with pytest.raises(SpecError, match="swapped"):
        compare(result("measurement"), result("prediction"))
    for band in (0.0, -1.0, float("nan")):
        with pytest.raises(SpecError, match="band"):
            compare(result("prediction"), result("measurement"), band=band)


def test_round_trip_and_table() -> None:
    comparison = compare(
        result("prediction", 1.1, intervals={"ttft_s_p50": Interval(low=0.1, high=0.2)}), result("measurement"), band=0.05
    )
    assert Comparison.model_validate_json(comparison.model_dump_json()) == comparison
    lines = format_comparison(comparison).splitlines()
    row = next(line for line in lines if line.startswith("ttft_s_p50"))
    assert row.split() == ["ttft_s_p50", "198", "ms", "180", "ms", "+10.0%", "100", "ms", "…", "200", "ms", "inside"]
    assert "largest 10.0%; outside the band of ±5%" in format_comparison(comparison)
    assert all(line == line.rstrip() for line in lines)
