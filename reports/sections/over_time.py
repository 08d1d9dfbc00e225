"""What changed while the run went on: queues, KV cache, utilisation, with the warm-up shaded."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from reports.blocks import Figure, Section, Table, Text
from reports.figures import figure, run_colours
from reports.load import Run, Story
from reports.words import cell, clip, label, number, word
from twin.spec.results import Series

MAX_PANELS = 12
MAX_POINTS = 1000
PANEL_PX = 118


def section(story: Story) -> Section:
    title = "Over time"
    runs = [run for run in story.results if run.result is not None and run.result.series]
    if not runs:
        why = "results.json has no time series" if story.results else "no results.json here"
        return Section("time", title, absent=why)
    names = list(dict.fromkeys(s.name for run in runs if run.result for s in run.result.series))[:MAX_PANELS]
    drawn, said = _panels(runs, names)
    return Section(
        "time",
        title,
        (Figure("time", drawn, " ".join(said), height_px=90 + PANEL_PX * len(names)), *_steady(story), *_reasons(story)),
        lead="Shaded: the warm-up, which the averages leave out.",
    )


def _panels(runs: list[Run], names: list[str]) -> tuple[dict[str, Any], list[str]]:
    """One panel a quantity over the same time axis, one line a run; and the same in words."""
    colours = run_colours([run.title for run in runs])
    traces, annotations, said = [], [], []
    axes: dict[str, dict[str, Any]] = {}
    for panel, name in enumerate(names):
        top = 1 - panel / len(names)
        axis, unit = "y" if panel == 0 else f"y{panel + 1}", ""
        for colour, run in zip(colours, runs, strict=True):
            series = _series(run, name)
            if series is not None and series.value:
                unit = series.unit
                traces.append(_line(run.title, series, axis, colour, first=panel == 0))
                said.append(
                    f"{clip(name, 60)} ({run.title}): mean {number(sum(series.value) / len(series.value))}, "
                    f"highest {number(max(series.value))} {clip(unit, 20)}."
                )
        axes[axis.replace("y", "yaxis")] = {
            "domain": [top - 0.86 / len(names), top - 0.14 / len(names)],
            "rangemode": "tozero",
            "title": {"text": label(unit), "font": {"size": 11}},
            "nticks": 4,
        }
        annotations.append(_panel_name(name, top - 0.12 / len(names)))
    bottom = "y" if len(names) == 1 else f"y{len(names)}"
    drawn = figure(
        traces,
        shapes=[_warmup(run, colour) for colour, run in zip(colours, runs, strict=True)],
        annotations=annotations,
        xaxis={"title": {"text": "seconds since the start"}, "anchor": bottom},
        margin={"l": 64, "r": 20, "t": 28, "b": 48},
        **axes,
    )
    return drawn, said


def _series(run: Run, name: str) -> Series | None:
    assert run.result is not None
    return next((s for s in run.result.series if s.name == name), None)


def _line(title: str, series: Series, axis: str, colour: str, *, first: bool) -> go.Scatter:
    times, values = _thin(series)
    return go.Scatter(
        x=times,
        y=values,
        yaxis=axis,
        mode="lines",
        name=title,
        legendgroup=title,
        showlegend=first,
        line={"color": colour, "width": 1.6, "shape": "hv"},
        hovertemplate=f"%{{x:.3g}} s: %{{y:.4g}} {label(series.unit)}<extra>{title}</extra>",
    )


def _panel_name(name: str, y: float) -> dict[str, Any]:
    return {
        "x": 0,
        "y": y,
        "xref": "paper",
        "yref": "paper",
        "text": label(name),
        "showarrow": False,
        "xanchor": "left",
        "yanchor": "bottom",
        "font": {"size": 12},
    }


def _warmup(run: Run, colour: str) -> dict[str, Any]:
    assert run.result is not None
    return {
        "type": "rect",
        "xref": "x",
        "yref": "paper",
        "x0": 0,
        "x1": run.result.steady.warmup_s,
        "y0": 0,
        "y1": 1,
        "fillcolor": colour,
        "opacity": 0.09,
        "line": {"width": 0},
        "layer": "below",
    }


def _thin(series: Series) -> tuple[list[float], list[float]]:
    step = max(1, -(-len(series.value) // MAX_POINTS))
    return list(series.time_s[::step]), list(series.value[::step])


def _steady(story: Story) -> tuple[Table, Table]:
    """The counted window of each run, and what became of its requests."""
    windows, ends = [], []
    names = (
        "submitted",
        "finished",
        "rejected",
        "failed",
        "unfinished",
        "counted",
        "preemptions",
        "input_tokens",
        "output_tokens",
    )
    for run in story.results:
        assert run.result is not None
        steady, rates, path = run.result.steady, run.result.throughput, run.file("results.json")
        windows.append(
            (
                word(run.title),
                word(steady.verdict, "good" if steady.verdict == "steady" else "warn"),
                cell(steady.warmup_s, "s", f"{path}#steady.warmup_s"),
                cell(rates.window_s, "s", f"{path}#throughput.window_s"),
                cell(steady.drift, "%", f"{path}#steady.drift"),
                cell(steady.queue_slope_per_s, "", f"{path}#steady.queue_slope_per_s"),
                cell(rates.requests_per_s, "", f"{path}#throughput.requests_per_s"),
                cell(rates.input_tok_per_s, "", f"{path}#throughput.input_tok_per_s"),
                cell(rates.output_tok_per_s, "", f"{path}#throughput.output_tok_per_s"),
                cell(rates.slo_attainment, "%", f"{path}#throughput.slo_attainment"),
            )
        )
        ends.append((word(run.title), *(cell(getattr(run.result.counts, n), "", f"{path}#counts.{n}") for n in names)))
    return (
        Table(
            "steady",
            (
                "run",
                "window",
                "warm-up",
                "length",
                "drift",
                "queue growth",
                "requests/s",
                "input tok/s",
                "output tok/s",
                "SLO met",
            ),
            tuple(windows),
        ),
        Table("ends", ("run", *(n.replace("_", " ") for n in names)), tuple(ends)),
    )


def _reasons(story: Story) -> tuple[Text, ...]:
    reasons = tuple(
        clip(f"{run.title.capitalize()}: {run.result.steady.reason}")
        for run in story.results
        if run.result is not None and run.result.steady.reason
    )
    return (Text(reasons, "quiet"),) if reasons else ()
