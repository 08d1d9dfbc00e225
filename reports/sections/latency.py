"""How long requests waited: percentiles, and distributions with what was promised."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import plotly.graph_objects as go

from reports.blocks import Block, Cell, Figure, Section, Table
from reports.figures import SLO, figure, run_colours
from reports.load import Run, Story
from reports.sections.verdict import slo_of
from reports.words import cell, plural, text_of, word
from twin.spec.results import Summary

METRICS = (("TTFT", "ttft_s", "time to first token"), ("TPOT", "tpot_s", "time per output token"), ("E2E", "e2e_s", "end to end"))
QUANTILES = ("mean", "p50", "p90", "p95", "p99", "max")
BINS, STEPS = 48, 160


def section(story: Story) -> Section:
    if not story.results:
        return Section("latency", "Latency", absent="no results.json here")
    blocks: list[Block] = [_percentiles(story)]
    runs = [run for run in story.results if any(r.counted for r in run.requests)]
    lead = ""
    if runs:
        blocks += [f for name, field, words in METRICS if (f := _distribution(story, runs, name, field, words)) is not None]
        lead = "Bars: share of the counted requests. Line: share that was at least as fast. Diamonds: p50 and p99."
    else:
        lead = "No requests.jsonl here, so only the summaries can be shown."
    return Section("latency", "Latency", tuple(blocks), lead)


def _percentiles(story: Story) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for run in story.results:
        assert run.result is not None
        for name, field, _ in (*METRICS[:2], ("ITL", "itl_s", "gap between tokens"), METRICS[2]):
            summary: Summary = getattr(run.result.latencies, field)
            path = f"{run.file('results.json')}#latencies.{field}"
            rows.append(
                (
                    word(name),
                    word(run.title),
                    cell(summary.count, "", f"{path}.count"),
                    *(cell(getattr(summary, q), "s", f"{path}.{q}") for q in QUANTILES),
                )
            )
    rows.sort(key=lambda row: ("TTFT", "TPOT", "ITL", "E2E").index(row[0].text))
    return Table("latency", ("latency", "run", "count", *QUANTILES), tuple(rows))


def _values(run: Run, field: str) -> list[float]:
    return sorted(v for r in run.requests if r.counted and (v := getattr(r, field)) is not None)


@dataclass(frozen=True)
class Axis:
    """The latency axis that all runs of a figure share: `width_s` is a bin's; values are shown in `unit` = `scale` a second.
    The longest half percent lies beyond `top_s`, so that one straggler does not squeeze the rest."""

    low_s: float
    top_s: float
    limit_s: float | None

    @classmethod
    def over(cls, samples: Sequence[Sequence[float]], limit_s: float | None) -> Axis:
        low = min(values[0] for values in samples)
        top = max(values[min(len(values) - 1, int(0.995 * len(values)))] for values in samples)
        return cls(low, top if top > low else low + max(abs(low), 1e-9) * 0.1, limit_s)

    @property
    def unit(self) -> str:
        return "ms" if self.top_s < 1 else "s"

    @property
    def scale(self) -> float:
        return 1e3 if self.unit == "ms" else 1.0

    @property
    def width_s(self) -> float:
        return (self.top_s - self.low_s) / BINS

    @property
    def limit_shown(self) -> bool:
        """An objective far beyond what happened would only squeeze the figure; the words tell of it."""
        return self.limit_s is not None and self.limit_s <= 2 * self.top_s

    @property
    def range(self) -> list[float]:
        end = max(self.top_s, self.limit_s if self.limit_shown and self.limit_s is not None else 0.0)
        return [max(0.0, self.low_s - self.width_s) * self.scale, (end + self.width_s) * self.scale]


def _distribution(story: Story, runs: list[Run], name: str, field: str, words: str) -> Figure | None:
    """Histogram (left axis) and CDF (right axis) of every run, with its p50, p99 and the objective."""
    samples = [(run, values) for run in runs if (values := _values(run, field))]
    if not samples:
        return None
    axis = Axis.over([values for _, values in samples], getattr(slo_of(story), field))
    traces: list[go.Bar | go.Scatter] = []
    said = [f"{words.capitalize()}."]
    for colour, (run, values) in zip(run_colours([run.title for run, _ in samples]), samples, strict=True):
        assert run.result is not None
        summary: Summary = getattr(run.result.latencies, field)
        traces += [_histogram(values, axis, run.title, colour), _cdf(values, axis, colour), _marks(summary, axis, colour)]
        said.append(_words(run.title, summary, values, axis.limit_s))
    drawn = figure(
        traces,
        barmode="overlay",
        **_objective(axis),
        xaxis={"title": {"text": f"{name}, {axis.unit}"}, "range": axis.range},
        yaxis={"title": {"text": "% of requests"}, "rangemode": "tozero"},
        yaxis2={
            "overlaying": "y",
            "side": "right",
            "range": [0, 103],
            "showgrid": False,
            "tickvals": [0, 25, 50, 75, 100],
            "ticksuffix": "%",
        },
        margin={"l": 56, "r": 52, "t": 44, "b": 48},
    )
    return Figure(f"latency-{field}", drawn, " ".join(said), title=f"{name}: {words}", height_px=320, half=True)


def _histogram(values: list[float], axis: Axis, title: str, colour: str) -> go.Bar:
    """Shares of the values in equal bins; what lies beyond the axis is counted in the last."""
    edges = [bisect_right(values, axis.low_s + axis.width_s * (i + 1)) for i in range(BINS - 1)] + [len(values)]
    shares = [(b - a) / len(values) for a, b in pairwise([0, *edges])]
    return go.Bar(
        x=[(axis.low_s + axis.width_s * (i + 0.5)) * axis.scale for i in range(BINS)],
        y=[100 * share for share in shares],
        width=axis.width_s * axis.scale,
        name=title,
        marker={"color": colour, "opacity": 0.35, "line": {"width": 0}},
        hovertemplate=f"%{{x:.4g}} {axis.unit}: %{{y:.1f}}% of requests<extra></extra>",
    )


def _cdf(values: list[float], axis: Axis, colour: str) -> go.Scatter:
    return go.Scatter(
        x=[values[round(i * (len(values) - 1) / STEPS)] * axis.scale for i in range(STEPS + 1)],
        y=[100 * i / STEPS for i in range(STEPS + 1)],
        yaxis="y2",
        mode="lines",
        line={"color": colour, "width": 2},
        showlegend=False,
        hovertemplate=f"%{{y:.0f}}% within %{{x:.4g}} {axis.unit}<extra></extra>",
    )


def _marks(summary: Summary, axis: Axis, colour: str) -> go.Scatter:
    marks = [(q, v) for q, v in ((50, summary.p50), (99, summary.p99)) if v is not None]
    return go.Scatter(
        x=[v * axis.scale for _, v in marks],
        y=[q for q, _ in marks],
        yaxis="y2",
        mode="markers",
        marker={"symbol": "diamond", "size": 9, "color": colour},
        showlegend=False,
        hovertemplate=f"p%{{y}} = %{{x:.4g}} {axis.unit}<extra></extra>",
    )


def _objective(axis: Axis) -> dict[str, list[dict[str, object]]]:
    """A dashed line where the objective lies."""
    if not axis.limit_shown or axis.limit_s is None:
        return {}
    at = axis.limit_s * axis.scale
    line = {
        "type": "line",
        "x0": at,
        "x1": at,
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "line": {"color": SLO, "width": 1.5, "dash": "dash"},
    }
    note = {
        "x": at,
        "y": 1,
        "yref": "paper",
        "text": "objective",
        "showarrow": False,
        "xanchor": "center",
        "yanchor": "bottom",
        "font": {"color": SLO, "size": 11},
    }
    return {"shapes": [line], "annotations": [note]}


def _words(title: str, summary: Summary, values: list[float], limit_s: float | None) -> str:
    said = f"{title.capitalize()}: p50 {text_of(summary.p50, 's')}, p99 {text_of(summary.p99, 's')}"
    said += f" over {plural(len(values), 'request')}."
    if limit_s is None:
        return said
    met = bisect_right(values, limit_s) / len(values)
    return f"{said} {100 * met:.1f}% are within the objective of {text_of(limit_s, 's')}."
