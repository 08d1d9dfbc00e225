"""A prediction against a measurement: signed errors, metric by metric.

comparison = compare(prediction, measurement, band=0.2)
print(format_comparison(comparison))
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from twin.spec.errors import SpecError
from twin.spec.results import ComparedMetric, Comparison, PoolResult, RunResult, Summary
from twin.spec.units import format_s

LATENCIES = ("ttft_s", "tpot_s", "itl_s", "e2e_s")
STATISTICS = ("mean", "p50", "p99")
RATES = (("output_tok_per_s", "tok/s"), ("requests_per_s", "/s"), ("tok_per_s_per_user", "tok/s"), ("goodput_per_s", "/s"))
POOL_METRICS = (
    ("step_s_mean", "s"),
    ("step_s_p50", "s"),
    ("step_s_p99", "s"),
    ("batch_seqs_mean", ""),
    ("batch_tokens_mean", ""),
    ("kv_usage_mean", ""),
    ("kv_usage_max", ""),
    ("utilisation", ""),
)
JUDGED = (
    "ttft_s_mean",
    "ttft_s_p50",
    "tpot_s_mean",
    "tpot_s_p50",
    "e2e_s_mean",
    "e2e_s_p50",
    "output_tok_per_s",
    "requests_per_s",
)
"""What the band is held against: the middle of the distributions and the rates. Tails and pool averages are shown, but a
p99 of a short run is a handful of requests."""
FEW = 100
"""Under this many counted requests, a p99 is one request or less."""


def compare(
    prediction: RunResult, measurement: RunResult, *, band: float | None = None, judged: Sequence[str] = JUDGED
) -> Comparison:
    """Compare two results of the same question. Errors are predicted / measured - 1.

    `median_abs_error`, `max_abs_error` and `within_band` are over those of the `judged` metrics that both sides have;
    `within_band` is None without a band or when nothing could be judged. A prediction's interval is found under the
    metric's own name. Raises SpecError when the two are given the wrong way round, or the band is not positive.
    """
    if prediction.kind == "measurement" and measurement.kind == "prediction":
        raise SpecError("the prediction and the measurement are swapped", expected="prediction first, then measurement")
    if band is not None and not band > 0:
        raise SpecError(f"band {band} is not positive", field="band", expected="a share such as 0.2")
    metrics = tuple(
        _metric(prediction, name, unit, predicted, measured)
        for name, unit, predicted, measured in _pairs(prediction, measurement)
        if predicted is not None or measured is not None
    )
    errors = [abs(m.error) for m in metrics if m.name in judged and m.error is not None]
    return Comparison(
        name=prediction.name if prediction.name == measurement.name else f"{prediction.name} against {measurement.name}",
        metrics=metrics,
        median_abs_error=median(errors) if errors else None,
        max_abs_error=max(errors) if errors else None,
        band=band,
        within_band=max(errors) <= band if band is not None and errors else None,
        predicted=prediction.provenance,
        measured=measurement.provenance,
        notes=tuple(_notes(prediction, measurement, [m for m in metrics if m.name in judged and m.error is not None])),
    )


def signed_error(predicted: float | None, measured: float | None) -> float | None:
    """predicted / measured - 1; 0 when both are 0; None when it is not defined."""
    if predicted is None or measured is None:
        return None
    if measured == 0:
        return 0.0 if predicted == 0 else None
    return predicted / measured - 1


def _metric(prediction: RunResult, name: str, unit: str, predicted: float | None, measured: float | None) -> ComparedMetric:
    interval = prediction.intervals.get(name)
    inside = None if interval is None or measured is None else interval.low <= measured <= interval.high
    return ComparedMetric(
        name=name,
        unit=unit,
        predicted=predicted,
        measured=measured,
        error=signed_error(predicted, measured),
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        inside=inside,
    )


def _pairs(prediction: RunResult, measurement: RunResult) -> list[tuple[str, str, float | None, float | None]]:
    """(name, unit, predicted, measured) of everything that the two schemas share, in the order of a report."""
    pairs: list[tuple[str, str, float | None, float | None]] = []
    for latency in LATENCIES:
        p, m = getattr(prediction.latencies, latency), getattr(measurement.latencies, latency)
        pairs += [(f"{latency}_{s}", "s", getattr(p, s), getattr(m, s)) for s in STATISTICS]
    for rate, unit in RATES:
        pairs.append((rate, unit, getattr(prediction.throughput, rate), getattr(measurement.throughput, rate)))
    measured_pools = _named_pools(measurement)
    for pool_name, pool in _named_pools(prediction).items():
        other = measured_pools.get(pool_name)
        if other is not None:
            pairs += [
                (f"{pool_name}/{name}", unit, _pool_value(pool, name), _pool_value(other, name)) for name, unit in POOL_METRICS
            ]
    return pairs


def _named_pools(result: RunResult) -> dict[str, PoolResult]:
    """Pools by role; further pools of one role are numbered in order ("decode", "decode 2")."""
    named: dict[str, PoolResult] = {}
    for pool in result.pools:
        before = sum(other.role == pool.role for other in named.values())
        named[pool.role if not before else f"{pool.role} {before + 1}"] = pool
    return named


def _pool_value(pool: PoolResult, name: str) -> float | None:
    """A pool's number; None for what a pool that took no step cannot have."""
    if name.startswith("step_s_"):
        summary: Summary = pool.step_s
        value: float | None = getattr(summary, name.removeprefix("step_s_"))
        return value
    return float(getattr(pool, name)) if pool.steps else None


def _notes(prediction: RunResult, measurement: RunResult, judged: Sequence[ComparedMetric]) -> list[str]:
    """What a reader must know before believing the errors."""
    notes = ["Judged: " + ", ".join(m.name for m in judged) + "." if judged else "Nothing could be judged."]
    if prediction.kind == measurement.kind:
        notes.append(f"Both results are {prediction.kind}s.")
    if prediction.plan is not None and measurement.plan is not None and prediction.plan != measurement.plan:
        notes.append("The two ran different plans.")
    for field in ("model", "cluster"):
        if getattr(prediction, field) != getattr(measurement, field):
            notes.append(f"Different {field}s: {getattr(prediction, field)} and {getattr(measurement, field)}.")
    hashes = (prediction.provenance.spec_sha256, measurement.provenance.spec_sha256)
    if all(hashes) and hashes[0] != hashes[1]:
        notes.append("The two answer different scenarios (their spec hashes differ).")
    for result in (prediction, measurement):
        if result.steady.verdict != "steady":
            notes.append(f"The {result.kind} is {result.steady.verdict}: {result.steady.reason or 'its averages may not last'}.")
        if result.counts.counted < FEW:
            notes.append(f"The {result.kind} counts {result.counts.counted} requests, too few for a p99.")
        lost = result.counts.rejected + result.counts.failed
        if lost:
            notes.append(f"{lost} requests of the {result.kind} were rejected or failed; latencies leave them out.")
    return notes


def format_comparison(comparison: Comparison) -> str:
    """A table for a terminal, then the verdict and the notes."""
    rows = [("metric", "predicted", "measured", "error", "80% interval", "")]
    for metric in comparison.metrics:
        interval = (
            ""
            if metric.low is None or metric.high is None
            else f"{_text(metric.low, metric.unit)} … {_text(metric.high, metric.unit)}"
        )
        rows.append(
            (
                metric.name,
                _text(metric.predicted, metric.unit),
                _text(metric.measured, metric.unit),
                "–" if metric.error is None else f"{100 * metric.error:+.1f}%",
                interval,
                {True: "inside", False: "outside", None: ""}[metric.inside],
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, 5) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths[:5]))
    if comparison.median_abs_error is not None and comparison.max_abs_error is not None:
        words = f"median absolute error {100 * comparison.median_abs_error:.1f}%, largest {100 * comparison.max_abs_error:.1f}%"
        if comparison.band is not None:
            words += f"; {'within' if comparison.within_band else 'outside'} the band of ±{100 * comparison.band:g}%"
        lines += ["", words]
    return "\n".join([*lines, *(f"note: {note}" for note in comparison.notes)])


def _text(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    if unit == "s":
        return format_s(value)
    return f"{value:,.0f}{' ' + unit if unit else ''}" if abs(value) >= 1000 else f"{value:.3g}{' ' + unit if unit else ''}"
