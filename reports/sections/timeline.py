"""The timeline: steps and KV transfers of each rank, from trace.json; and how to open the whole of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from reports.blocks import Block, Figure, Section, Text
from reports.figures import FAMILY, ROLE, figure
from reports.load import Story
from reports.words import clip, label, plural, text_of

MAX_EVENTS = 900
MAX_ROWS = 32
MAX_KINDS = 10
COLOURS = {**ROLE, "idle": "rgba(148,163,184,0.35)", "KV transfer": "#db2777"}
SHADES = (FAMILY["other"][2], FAMILY["moe"][3], "#db2777", "#65a30d", "#a855f7", "#0ea5e9", "#eab308", "#64748b")


@dataclass(frozen=True)
class Span:
    """One complete event: times in seconds, `row` the track it lies on, `kind` what it is coloured by."""

    start_s: float
    length_s: float
    row: str
    kind: str
    name: str


def section(story: Story) -> Section:
    title = "Timeline"
    blocks: list[Block] = []
    for number, run in enumerate(run for run in story.runs if run.trace):
        spans = spans_of(run.trace)
        if spans:
            blocks.append(_gantt(f"timeline-{number}", run.title, spans))
            blocks.append(
                Text(
                    (
                        f"To look at all {plural(len(spans), 'span')}: open ui.perfetto.dev (or chrome://tracing) and drop "
                        f"{run.file('trace.json')} on it. The file stays on your machine.",
                    ),
                    "quiet",
                )
            )
    return Section("timeline", title, tuple(blocks), absent="no trace.json with complete events here")


def spans_of(events: Sequence[dict[str, Any]]) -> list[Span]:
    """Complete ("X") events, and asynchronous ones from "b" to "e", in order of time, with the names that metadata ("M")
    events give their tracks. Times in a Chrome trace are microseconds. Anything malformed is skipped."""
    processes: dict[str, str] = {}
    threads: dict[tuple[str, str], str] = {}
    events = [event for event in events if isinstance(event, dict)]
    for event in events:
        args = event.get("args") if event.get("ph") == "M" else None
        if isinstance(args, dict) and isinstance(args.get("name"), str):
            pid, tid = _clean(event.get("pid")), _clean(event.get("tid"))
            if event.get("name") == "process_name":
                processes[pid] = _clean(args["name"])
            elif event.get("name") == "thread_name":
                threads[pid, tid] = _clean(args["name"])
    spans: list[Span] = []
    begun: dict[tuple[str, str, str], tuple[float, str]] = {}
    for event in events:
        start, pid, name = _number(event.get("ts")), _clean(event.get("pid")), _clean(event.get("name", ""))
        if start is None:
            continue
        process, phase = processes.get(pid, f"process {pid}"), event.get("ph")
        length = _number(event.get("dur"))
        key = (_clean(event.get("cat")), _clean(event.get("id")), name)
        if phase == "X" and length is not None:
            tid = _clean(event.get("tid"))
            row = f"{process} · {threads.get((pid, tid), f'track {tid}')}"
            spans.append(Span(start * 1e-6, length * 1e-6, row, _kind(event, name), name))
        elif phase == "b":
            begun[key] = (start, f"{process} · {'KV sent' if key[0] == 'kv' else key[0]}")
        elif phase == "e" and key in begun:
            first, row = begun.pop(key)
            spans.append(Span(first * 1e-6, (start - first) * 1e-6, row, "KV transfer" if key[0] == "kv" else key[0], name))
    return sorted(spans, key=lambda s: (s.start_s, s.row, s.name))


def _kind(event: dict[str, Any], name: str) -> str:
    """What a span is coloured by: for a step what it computed, else its category or the first word of its name."""
    args = event.get("args")
    if event.get("cat") == "step" and isinstance(args, dict) and "decode_seqs" in args and "prefill_tokens" in args:
        decode, prefill = bool(args["decode_seqs"]), bool(args["prefill_tokens"])
        return "mixed" if decode and prefill else "prefill" if prefill else "decode" if decode else "idle"
    return _clean(event.get("cat") or re.split(r"[\s\d(]", name, maxsplit=1)[0])


def _clean(text: object) -> str:
    """JSON may hold halves of surrogate pairs, which no page can be written with."""
    return str(text).encode("utf-8", "replace").decode()


def _number(value: object) -> float | None:
    """A finite number within a lifetime of microseconds, else None."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e16
    return float(value) if usable else None  # type: ignore[arg-type]


def _window(spans: list[Span]) -> list[Span]:
    """All spans, or those from the middle of the run when there are too many to draw."""
    if len(spans) <= MAX_EVENTS:
        return spans
    first = (len(spans) - MAX_EVENTS) // 2
    return spans[first : first + MAX_EVENTS]


def _gantt(id_: str, title: str, spans: list[Span]) -> Figure:
    shown = _window(spans)
    rows = sorted({s.row for s in shown}, key=_natural)
    kept = rows[:MAX_ROWS]
    shown = [s for s in shown if s.row in set(kept)]
    begin = min(s.start_s for s in shown)
    end = max(s.start_s + s.length_s for s in shown)
    unit, scale = ("ms", 1e3) if end - begin < 2 else ("s", 1.0)
    totals: dict[str, float] = {}
    for span in shown:
        totals[span.kind] = totals.get(span.kind, 0.0) + span.length_s
    kinds = sorted(totals, key=lambda k: (-totals[k], k))
    traces = []
    for index, kind in enumerate(kinds[:MAX_KINDS]):
        members = [s for s in shown if s.kind == kind or (index == MAX_KINDS - 1 and s.kind in kinds[MAX_KINDS:])]
        traces.append(
            go.Bar(
                y=[label(s.row) for s in members],
                base=[(s.start_s - begin) * scale for s in members],
                x=[s.length_s * scale for s in members],
                orientation="h",
                name=label(kind or "span"),
                width=0.72,
                marker={"color": COLOURS.get(kind, SHADES[index % len(SHADES)]), "line": _edge(kind)},
                hovertext=[
                    f"{label(s.name)}<br>{label(s.row)}<br>{text_of(s.start_s, 's')} + {text_of(s.length_s, 's')}"
                    for s in members
                ],
                hovertemplate="%{hovertext}<extra></extra>",
            )
        )
    drawn = figure(
        traces,
        barmode="overlay",
        xaxis={"title": {"text": f"{unit} after {text_of(begin, 's')}" if begin else f"{unit} since the start"}},
        yaxis={
            "categoryorder": "array",
            "categoryarray": [label(r) for r in kept],
            "autorange": "reversed",
            "showgrid": False,
            "automargin": True,
        },
        margin={"l": 150, "r": 20, "t": 44, "b": 48},
    )
    words = (
        f"{title.capitalize()}: {plural(len(shown), 'span')} on {plural(len(kept), 'track')} between {text_of(begin, 's')} and "
        f"{text_of(end, 's')}; most time in "
        + ", ".join(f"{clip(k or 'span', 40)} ({text_of(totals[k], 's')})" for k in kinds[:4])
        + "."
    )
    if len(spans) > len(shown) or len(rows) > len(kept):
        words += f" The trace has {plural(len(spans), 'span')}; the middle of the run is drawn."
    return Figure(id_, drawn, words, title=title, height_px=120 + (30 if len(kept) <= 16 else 20) * len(kept))


def _edge(kind: str) -> dict[str, Any]:
    """Transfers are so short that their outline is what one sees."""
    return {"width": 1, "color": COLOURS[kind]} if kind == "KV transfer" else {"width": 0.4, "color": "rgba(255,255,255,0.7)"}


def _natural(row: str) -> list[tuple[int, int, str]]:
    """Sort key under which "rank 10" comes after "rank 9"."""
    return [(1, int(part), "") if part.isdigit() and len(part) < 16 else (0, 0, part) for part in re.split(r"(\d+)", row)]
