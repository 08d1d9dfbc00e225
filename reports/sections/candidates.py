"""The search: the Pareto figure, the ranked table with why each lost, and the explanation."""

from __future__ import annotations

from dataclasses import dataclass

import plotly.graph_objects as go

from reports.blocks import Block, Cell, Figure, Section, Table, Text, Tone
from reports.figures import GOOD, KIND, QUIET, figure
from reports.load import Story
from reports.sections.verdict import arrivals_words
from reports.words import NAME_CHARS, cell, clip, label, number, plan_switches, plan_words, plural, text_of, word
from twin.spec.results import Candidate, SearchResult

MAX_ROWS = 250
PRUNED = {"memory": "do not fit in memory", "bound": "ranked too low by their bounds", "illegal": "are not legal"}
NO_SEARCH = "no search.json here: this plan was given, not searched for"


@dataclass(frozen=True)
class Metric:
    """A column: its heading, its unit, and the candidate's metrics that may answer it, the first one found counting.

    What a plan can carry within the objectives comes before what it does under the offered load, where all plans that
    keep up give the same tokens.
    """

    heading: str
    unit: str
    names: tuple[str, ...]

    def key(self, candidate: Candidate) -> str | None:
        """The name under which this candidate has the metric."""
        if self.names == FREE:
            free = [k for k in candidate.metrics if k.endswith("free_bytes") and not k.startswith("capacity_")]
            return min(free, key=lambda k: (candidate.metrics[k], k), default=None)
        return next((name for name in self.names if name in candidate.metrics), None)

    def of(self, candidate: Candidate) -> float | None:
        key = self.key(candidate)
        return None if key is None else candidate.metrics[key]

    def cell(self, candidate: Candidate, path: str, badge: str = "") -> Cell:
        key = self.key(candidate)
        return cell(self.of(candidate), self.unit, f"{path}.metrics.{key}", badge=badge)


FREE = ("free_bytes",)
USER = Metric("tok/s/user", "", ("capacity_tok_per_s_per_user", "tok_per_s_per_user"))
PER_GPU = Metric("tok/s/GPU", "", ("capacity_tok_per_s_per_gpu", "tok_per_s_per_gpu", "output_tok_per_s_per_gpu"))
METRICS = (
    Metric("most load", "", ("capacity_load",)),
    PER_GPU,
    USER,
    Metric("$ / 1M out", "$", ("capacity_usd_per_million_output_tokens", "usd_per_million_output_tokens")),
    *(Metric(f"{name.upper()} {q}", "s", (f"{name}_s_{q}",)) for name in ("ttft", "tpot") for q in ("p50", "p99")),
    Metric("goodput /s", "", ("goodput_per_s",)),
    Metric("SLO met", "%", ("slo_attainment",)),
    Metric("memory left", "bytes", FREE),
)


def pareto(story: Story) -> Section:
    title = "Throughput against speed"
    search = _search(story)
    if search is None:
        return Section("pareto", title, absent=NO_SEARCH)
    points = [c for c in search.candidates if USER.key(c) and PER_GPU.key(c)]
    if not points:
        return Section("pareto", title, absent="no candidate was simulated far enough to have both numbers")
    groups = [
        ("misses the objectives", QUIET, "circle-open", [c for c in points if not c.feasible]),
        ("meets the objectives", KIND["predicted"], "circle", [c for c in points if c.feasible]),
    ]
    traces = [_points(name, colour, symbol, members) for name, colour, symbol, members in groups if members]
    traces = [*_front([c for c in points if c.pareto]), *traces, *_chosen(search.best)]
    drawn = figure(traces, xaxis={"title": {"text": "tok/s/user (1 / TPOT)"}}, yaxis={"title": {"text": "output tok/s/GPU"}})
    return Section(
        "pareto",
        title,
        (Figure("pareto", drawn, _pareto_words(search, points), height_px=440),),
        lead="Each point is a simulated plan at the most load that it carries within the objectives; one that misses them is "
        "shown at the offered load. Up: cheaper tokens. Right: faster for each user. Click a point to find its row below.",
    )


def table(story: Story) -> Section:
    title = "Candidates"
    search = _search(story)
    if search is None:
        return Section("candidates", title, absent=NO_SEARCH)
    run = story.searched
    assert run is not None
    shown = sorted(range(len(search.candidates)), key=lambda i: _order(search.candidates[i], i))[:MAX_ROWS]
    metrics = [metric for metric in METRICS if any(metric.key(search.candidates[i]) for i in shown)]
    common = _common_switches([search.candidates[i] for i in shown])
    rows: list[tuple[Cell, ...]] = []
    marked: set[int] = set()
    for index in shown:
        candidate = search.candidates[index]
        if search.best is not None and candidate == search.best:
            marked.add(len(rows))
        rows.append(_row(candidate, f"{run.file('search.json')}#candidates.{index}", metrics, common))
    columns = ("#", "plan", "GPUs", *(metric.heading for metric in metrics), "verdict", "why")
    blocks: list[Block] = [
        Text((_counts(search, len(rows)),)),
        Table("candidates", columns, tuple(rows), live=True, marked=frozenset(marked)),
    ]
    return Section("candidates", title, tuple(blocks), lead=_loads(story))


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
    lines = [f"<b>{label(candidate.plan.name)}</b>", *(label(part) for part in plan_words(candidate.plan).split(" + "))]
    lines += [f"{m.heading}: {text_of(m.of(candidate), m.unit)}" for m in METRICS if m.key(candidate)]
    if candidate.reason:
        lines.append(label(candidate.reason))
    return "<br>".join(lines)


def _front(front: list[Candidate]) -> list[go.Scatter]:
    ordered = sorted(front, key=lambda c: (USER.of(c) or 0.0, -(PER_GPU.of(c) or 0.0)))
    if not ordered:
        return []
    line = {"color": GOOD, "width": 2, "dash": "dot"}
    xs, ys = [USER.of(c) for c in ordered], [PER_GPU.of(c) for c in ordered]
    return [go.Scatter(x=xs, y=ys, mode="lines", name="Pareto front", line=line, hoverinfo="skip")]


def _chosen(best: Candidate | None) -> list[go.Scatter]:
    if best is None or not USER.key(best) or not PER_GPU.key(best):
        return []
    star = {"symbol": "star", "size": 17, "color": "#f97316", "line": {"width": 1, "color": "#7c2d12"}}
    return [
        go.Scatter(
            x=[USER.of(best)],
            y=[PER_GPU.of(best)],
            mode="markers+text",
            name="chosen",
            text=["chosen"],
            textposition="top center",
            hovertext=[_hover(best)],
            hovertemplate="%{hovertext}<extra></extra>",
            customdata=[best.rank],
            marker=star,
        )
    ]


def _points(name: str, colour: str, symbol: str, members: list[Candidate]) -> go.Scatter:
    return go.Scatter(
        x=[USER.of(c) for c in members],
        y=[PER_GPU.of(c) for c in members],
        mode="markers",
        name=name,
        hovertext=[_hover(c) for c in members],
        hovertemplate="%{hovertext}<extra></extra>",
        customdata=[c.rank for c in members],
        marker={"symbol": symbol, "size": 9, "color": colour, "opacity": 0.85},
    )


def _pareto_words(search: SearchResult, points: list[Candidate]) -> str:
    per_gpu = [PER_GPU.of(c) or 0.0 for c in points]
    user = [USER.of(c) or 0.0 for c in points]
    words = (
        f"{plural(len(points), 'simulated plan')}, from {number(min(per_gpu))} to {number(max(per_gpu))} output tok/s/GPU "
        "and from "
        f"{number(min(user))} to {number(max(user))} tok/s/user; {sum(c.pareto for c in points)} on the Pareto front."
    )
    best = search.best
    if best is not None and USER.key(best) and PER_GPU.key(best):
        words += f" The chosen plan, {clip(best.plan.name)}, gives {number(PER_GPU.of(best))} tok/s/GPU at "
        words += f"{number(USER.of(best))} tok/s/user."
    return words


def _row(candidate: Candidate, path: str, metrics: list[Metric], common: frozenset[str]) -> tuple[Cell, ...]:
    verdict, tone = _verdict(candidate)
    switches = ", ".join(phrase for phrase in plan_switches(candidate.plan) if phrase not in common)
    return (
        cell(candidate.rank, "", f"{path}.rank"),
        Cell(clip(candidate.plan.name), badge=clip(f"{plan_words(candidate.plan)}{'; ' if switches else ''}{switches}", 300)),
        Cell(f"{candidate.plan.gpus:,}", candidate.plan.gpus),
        *(metric.cell(candidate, path) for metric in metrics),
        word(verdict, tone),
        word(candidate.reason, limit=300),
    )


def _verdict(candidate: Candidate) -> tuple[str, Tone]:
    if candidate.feasible:
        return ("meets, Pareto" if candidate.pareto else "meets"), "good"
    if candidate.stage == "simulated":
        return "misses", "bad"
    return {"illegal": "not legal", "memory": "does not fit", "bound": "bounded out"}[candidate.stage], "quiet"


def _loads(story: Story) -> str:
    """At which load the columns hold."""
    words = "Most load, tok/s/GPU, tok/s/user and $ are what a plan carries within the objectives; latencies, goodput and memory "
    return words + (
        f"are under the offered load ({arrivals_words(story.scenario.workload)})."
        if story.scenario
        else "are under the offered load."
    )


def _counts(search: SearchResult, shown: int) -> str:
    simulated = sum(c.stage == "simulated" for c in search.candidates)
    pruned = ", ".join(f"{count:,} {PRUNED.get(reason, clip(reason, 80))}" for reason, count in sorted(search.pruned.items()))
    words = f"{search.considered:,} plans considered; {simulated:,} simulated"
    words += f"; set aside before that: {pruned}." if pruned else "."
    if shown < len(search.candidates):
        words += f" The first {shown} of {len(search.candidates):,} are shown; search.json has all."
    return clip(words, NAME_CHARS)
