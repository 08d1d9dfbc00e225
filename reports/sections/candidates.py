"""The search: the Pareto figure, the ranked table with why each lost, and the explanation."""

from __future__ import annotations

import plotly.graph_objects as go

from reports.blocks import Block, Cell, Figure, Section, Table, Text, Tone
from reports.figures import GOOD, KIND, QUIET, figure
from reports.load import Story
from reports.words import NAME_CHARS, cell, clip, label, number, plan_switches, plan_words, text_of, word
from twin.spec.results import Candidate, SearchResult

METRICS: dict[str, tuple[str, str]] = {
    "output_tok_per_s_per_gpu": ("tok/s/GPU", ""),
    "tok_per_s_per_user": ("tok/s/user", ""),
    "ttft_s_p50": ("TTFT p50", "s"),
    "ttft_s_p95": ("TTFT p95", "s"),
    "ttft_s_p99": ("TTFT p99", "s"),
    "tpot_s_p50": ("TPOT p50", "s"),
    "tpot_s_p95": ("TPOT p95", "s"),
    "tpot_s_p99": ("TPOT p99", "s"),
    "goodput_per_s": ("goodput req/s", ""),
    "slo_attainment": ("SLO met", "%"),
    "free_bytes": ("memory left", "bytes"),
    "usd_per_million_output_tokens": ("$ / 1M out", "$"),
    "usd_per_million_tokens": ("$ / 1M", "$"),
}
X, Y = "tok_per_s_per_user", "output_tok_per_s_per_gpu"
MAX_ROWS = 250
NO_SEARCH = "no search.json here: this plan was given, not searched for"


def pareto(story: Story) -> Section:
    title = "Throughput against speed"
    search = _search(story)
    if search is None:
        return Section("pareto", title, absent=NO_SEARCH)
    points = [c for c in search.candidates if X in c.metrics and Y in c.metrics]
    if not points:
        return Section("pareto", title, absent="no candidate was simulated far enough to have both numbers")
    groups = [
        ("misses the objectives", QUIET, "circle-open", [c for c in points if not c.feasible]),
        ("meets the objectives", KIND["predicted"], "circle", [c for c in points if c.feasible]),
    ]
    traces = [_points(name, colour, symbol, members) for name, colour, symbol, members in groups if members]
    front = sorted((c for c in points if c.pareto), key=lambda c: (c.metrics[X], -c.metrics[Y]))
    if front:
        traces.insert(
            0,
            go.Scatter(
                x=[c.metrics[X] for c in front],
                y=[c.metrics[Y] for c in front],
                mode="lines",
                name="Pareto front",
                line={"color": GOOD, "width": 2, "dash": "dot"},
                hoverinfo="skip",
            ),
        )
    best = search.best
    if best is not None and X in best.metrics and Y in best.metrics:
        traces.append(
            go.Scatter(
                x=[best.metrics[X]],
                y=[best.metrics[Y]],
                mode="markers+text",
                name="chosen",
                text=["chosen"],
                textposition="top center",
                hovertext=[_hover(best)],
                hovertemplate="%{hovertext}<extra></extra>",
                customdata=[best.rank],
                marker={"symbol": "star", "size": 17, "color": "#f97316", "line": {"width": 1, "color": "#7c2d12"}},
            )
        )
    drawn = figure(
        traces,
        xaxis={"title": {"text": "tok/s/user (1 / TPOT)"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "output tok/s/GPU"}, "rangemode": "tozero"},
    )
    return Section(
        "pareto",
        title,
        (Figure("pareto", drawn, _pareto_words(search, points), height_px=440),),
        lead="Each point is a simulated plan. Up: cheaper tokens. Right: faster for each user. "
        "Click a point to find its row below.",
    )


def table(story: Story) -> Section:
    title = "Candidates"
    search = _search(story)
    if search is None:
        return Section("candidates", title, absent=NO_SEARCH)
    run = story.searched
    assert run is not None
    shown = sorted(range(len(search.candidates)), key=lambda i: _order(search.candidates[i], i))[:MAX_ROWS]
    names = [name for name in METRICS if any(name in search.candidates[i].metrics for i in shown)]
    common = _common_switches([search.candidates[i] for i in shown])
    rows: list[tuple[Cell, ...]] = []
    marked: set[int] = set()
    for index in shown:
        candidate = search.candidates[index]
        if search.best is not None and candidate == search.best:
            marked.add(len(rows))
        rows.append(_row(candidate, f"{run.file('search.json')}#candidates.{index}", names, common))
    columns = ("#", "plan", "GPUs", *(METRICS[name][0] for name in names), "verdict", "why")
    blocks: list[Block] = [
        Text((_counts(search, len(rows)),)),
        Table("candidates", columns, tuple(rows), live=True, marked=frozenset(marked)),
    ]
    return Section("candidates", title, tuple(blocks))


def explanation(story: Story) -> Section:
    title = "Why this plan"
    search = _search(story)
    if search is None:
        return Section("why", title, absent=NO_SEARCH)
    if not search.explanation:
        return Section("why", title, absent="the search left no explanation")
    return Section("why", title, (Text(tuple(clip(s, 4000) for s in search.explanation[:50]), numbered=True),))


def _search(story: Story) -> SearchResult | None:
    return story.searched.search if story.searched is not None else None


def _order(candidate: Candidate, index: int) -> tuple[bool, int, bool, int]:
    return (candidate.rank is None, candidate.rank or 0, candidate.stage != "simulated", index)


def _common_switches(candidates: list[Candidate]) -> frozenset[str]:
    """What every plan of the table has, which therefore tells none from another."""
    return frozenset.intersection(*(frozenset(plan_switches(c.plan)) for c in candidates)) if candidates else frozenset()


def _hover(candidate: Candidate) -> str:
    lines = [label(candidate.plan.name), *(label(part) for part in plan_words(candidate.plan).split(" + "))]
    lines += [label(", ".join(plan_switches(candidate.plan)[i : i + 3])) for i in range(0, len(plan_switches(candidate.plan)), 3)]
    lines += [
        f"{name}: {text_of(candidate.metrics[key], unit)}" for key, (name, unit) in METRICS.items() if key in candidate.metrics
    ]
    if candidate.reason:
        lines.append(label(candidate.reason[:90]))
    return "<br>".join(lines)


def _points(name: str, colour: str, symbol: str, members: list[Candidate]) -> go.Scatter:
    return go.Scatter(
        x=[c.metrics[X] for c in members],
        y=[c.metrics[Y] for c in members],
        mode="markers",
        name=name,
        hovertext=[_hover(c) for c in members],
        hovertemplate="%{hovertext}<extra></extra>",
        customdata=[c.rank for c in members],
        marker={"symbol": symbol, "size": 9, "color": colour, "opacity": 0.85},
    )


def _pareto_words(search: SearchResult, points: list[Candidate]) -> str:
    words = (
        f"{len(points)} simulated plans, from {number(min(c.metrics[Y] for c in points))} to "
        f"{number(max(c.metrics[Y] for c in points))} output tok/s/GPU and from "
        f"{number(min(c.metrics[X] for c in points))} to {number(max(c.metrics[X] for c in points))} tok/s/user; "
        f"{sum(c.pareto for c in points)} lie on the Pareto front."
    )
    best = search.best
    if best is not None and X in best.metrics and Y in best.metrics:
        words += (
            f" The chosen plan, {plan_words(best.plan)}, gives {number(best.metrics[Y])} tok/s/GPU at "
            f"{number(best.metrics[X])} tok/s/user."
        )
    return words


def _row(candidate: Candidate, path: str, names: list[str], common: frozenset[str]) -> tuple[Cell, ...]:
    verdict, tone = _verdict(candidate)
    metrics = [cell(candidate.metrics.get(name), METRICS[name][1], f"{path}.metrics.{name}") for name in names]
    switches = ", ".join(phrase for phrase in plan_switches(candidate.plan) if phrase not in common)
    return (
        cell(candidate.rank, "", f"{path}.rank"),
        Cell(clip(plan_words(candidate.plan)), badge=clip(switches, 300)),
        Cell(f"{candidate.plan.gpus:,}", candidate.plan.gpus),
        *metrics,
        word(verdict, tone),
        word(candidate.reason, limit=300),
    )


def _verdict(candidate: Candidate) -> tuple[str, Tone]:
    if candidate.feasible:
        return ("meets, Pareto" if candidate.pareto else "meets"), "good"
    if candidate.stage == "simulated":
        return "misses", "bad"
    return {"illegal": "not legal", "memory": "does not fit", "bound": "bounded out"}[candidate.stage], "quiet"


def _counts(search: SearchResult, shown: int) -> str:
    simulated = sum(c.stage == "simulated" for c in search.candidates)
    pruned = ", ".join(f"{count:,} {clip(reason, 80)}" for reason, count in sorted(search.pruned.items()))
    words = f"{search.considered:,} plans considered; {simulated:,} simulated"
    words += f"; set aside before that: {pruned}." if pruned else "."
    if shown < len(search.candidates):
        words += f" The first {shown} of {len(search.candidates):,} are shown; search.json has all."
    return clip(words, NAME_CHARS)
