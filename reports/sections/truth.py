"""Predicted against measured: the table with signed errors, and the figure."""

from __future__ import annotations

import plotly.graph_objects as go

from reports.blocks import Block, Figure, Section, Table, Text, Tone
from reports.figures import GOOD, KIND, SLO, figure
from reports.load import Story
from reports.words import cell, clip, label, percent, signed_percent, word
from twin.spec.results import ComparedMetric, Comparison

MAX_METRICS = 80


def section(story: Story) -> Section:
    title = "Predicted against measured"
    run = story.compared
    if run is None or run.comparison is None:
        kinds = {r.result.kind for r in story.results if r.result}
        why = (
            "no comparison.json here; `eptwin validate` writes one"
            if kinds == {"prediction", "measurement"}
            else "this plan was not run, so there is nothing to compare with"
            if "measurement" not in kinds
            else "there is no prediction to compare with"
        )
        return Section("truth", title, absent=why)
    comparison, path = run.comparison, run.file("comparison.json")
    shown = comparison.metrics[:MAX_METRICS]
    blocks: list[Block] = [Text((_verdict(comparison),), _tone(comparison))]
    known = [m for m in shown if m.error is not None]
    dots = [m for m in known if "/" not in m.name] or known
    if dots:
        blocks.append(_dots(dots, comparison.band))
    blocks.append(_table(shown, path))
    if comparison.notes:
        blocks.append(Text(tuple(clip(note) for note in comparison.notes[:30]), "quiet"))
    return Section(
        "truth", title, tuple(blocks), lead="An error is predicted / measured − 1: positive means the prediction was too high."
    )


WORDS = {
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "itl_s": "ITL",
    "e2e_s": "E2E",
    "step_s": "step",
    "kv_usage": "KV in use",
    "batch_seqs": "sequences a step",
    "batch_tokens": "tokens a step",
    "output_tok_per_s": "output tok/s",
    "requests_per_s": "requests/s",
    "tok_per_s_per_user": "tok/s/user",
    "goodput_per_s": "goodput/s",
}


def metric_words(name: str) -> str:
    """The field's own words for a metric: "ttft_s_p50" is TTFT p50, "decode/step_s_mean" is decode: step mean."""
    pool, slash, metric = name.rpartition("/")
    words = WORDS.get(metric)
    if words is None:
        stem, _, statistic = metric.rpartition("_")
        words = f"{WORDS[stem]} {statistic}" if stem in WORDS else metric
    return f"{pool}: {words}" if slash else words


def _verdict(comparison: Comparison) -> str:
    words = f"Median absolute error {percent(comparison.median_abs_error)}, largest {percent(comparison.max_abs_error)}"
    if comparison.band is not None:
        verdict = {True: "within", False: "outside", None: "not judged against"}[comparison.within_band]
        words += f"; {verdict} the band of ±{percent(comparison.band)}"
    judged = [m for m in comparison.metrics if m.inside is not None]
    if judged:
        words += f". {sum(bool(m.inside) for m in judged)} of {len(judged)} measured values lie inside the predicted interval"
    return words + "."


def _tone(comparison: Comparison) -> Tone:
    return {True: "good", False: "bad", None: ""}[comparison.within_band]  # type: ignore[return-value]


def _table(shown: tuple[ComparedMetric, ...], path: str) -> Table:
    rows = []
    for index, metric in enumerate(shown):
        at = f"{path}#metrics.{index}"
        unit = metric.unit
        interval = (
            f"{cell(metric.low, unit).text} … {cell(metric.high, unit).text}"
            if metric.low is not None and metric.high is not None
            else "–"
        )
        tone: Tone = "" if metric.inside is None else "good" if metric.inside else "bad"
        error = cell(metric.error, "%", f"{at}.error")
        rows.append(
            (
                word(metric_words(metric.name)),
                cell(metric.predicted, unit, f"{at}.predicted"),
                cell(metric.measured, unit, f"{at}.measured"),
                type(error)(signed_percent(metric.error), metric.error, error.path),
                word(interval),
                word({True: "inside", False: "outside", None: "–"}[metric.inside], tone),
            )
        )
    return Table("truth", ("metric", "predicted", "measured", "error", "80% interval", "measured lies"), tuple(rows))


def _dots(dots: list[ComparedMetric], band: float | None) -> Figure:
    """One line a metric: the dot is the error, the bar the predicted interval as seen from the measured value."""
    names = [label(metric_words(m.name)) for m in dots]
    traces = [bar for metric, name in zip(dots, names, strict=True) if (bar := _interval(metric, name)) is not None]
    traces.append(
        go.Scatter(
            x=[100 * (m.error or 0.0) for m in dots],
            y=names,
            mode="markers",
            showlegend=False,
            marker={"size": 10, "color": [KIND["predicted"] if m.inside is not False else SLO for m in dots]},
            hovertemplate="%{y}: %{x:+.1f}%<extra></extra>",
        )
    )
    drawn = figure(
        traces,
        shapes=_measured_and_band(band),
        xaxis={"title": {"text": "error of the prediction, %"}, "ticksuffix": "%", "zeroline": False},
        yaxis={"autorange": "reversed", "automargin": True, "categoryorder": "array", "categoryarray": names},
        margin={"l": 150, "r": 20, "t": 12, "b": 48},
    )
    words = "; ".join(f"{clip(metric_words(m.name), 60)} {signed_percent(m.error)}" for m in dots[:24])
    meaning = "The orange line is the measurement; bars are the predicted 80% intervals, red dots miss theirs"
    band_words = ", the green area is the band." if band is not None else "."
    return Figure("truth", drawn, f"Signed errors: {words}. {meaning}{band_words}", height_px=110 + 26 * len(dots))


def _interval(metric: ComparedMetric, name: str) -> go.Scatter | None:
    if metric.low is None or metric.high is None or not metric.measured:
        return None
    return go.Scatter(
        x=[100 * (metric.low / metric.measured - 1), 100 * (metric.high / metric.measured - 1)],
        y=[name, name],
        mode="lines",
        line={"width": 7, "color": KIND["predicted"]},
        opacity=0.3,
        hoverinfo="skip",
        showlegend=False,
    )


def _measured_and_band(band: float | None) -> list[dict[str, object]]:
    tall: dict[str, object] = {"y0": 0, "y1": 1, "yref": "paper", "layer": "below"}
    shapes = [{"type": "line", "x0": 0, "x1": 0, "line": {"color": KIND["measured"], "width": 2}, **tall}]
    if band is not None:
        area = {"fillcolor": GOOD, "opacity": 0.08, "line": {"width": 0}}
        shapes.append({"type": "rect", "x0": -100 * band, "x1": 100 * band, **area, **tall})
    return shapes
