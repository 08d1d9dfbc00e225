"""What to believe and why: assumptions, warnings, sources of numbers, and what made the results."""

from __future__ import annotations

from reports.blocks import Block, Cell, Facts, Section, Table, Text
from reports.load import Run, Story
from reports.words import NAME_CHARS, clip, plural, word
from twin.spec.base import Source
from twin.spec.results import Provenance

MEANING = {
    "measured": "timed on this hardware",
    "interpolated": "between measured points",
    "transferred": "measured on another GPU and scaled",
    "calibrated": "roofline with an efficiency fitted here",
    "roofline": "peak rates with a stated efficiency",
    "assumed": "stated, not measured",
    "mixed": "a sum of unlike sources",
}


def assumptions(story: Story) -> Section:
    title = "Assumptions, warnings, sources"
    blocks: list[Block] = []
    warnings = [clip(f"{run.title.capitalize()}: {text}") for run in story.results if run.result for text in run.result.warnings]
    if warnings:
        blocks.append(Text(tuple(warnings[:40]), "warn"))
    stated: dict[str, None] = {}
    for run in story.runs:
        if run.result is not None:
            stated.update(dict.fromkeys(run.result.assumptions))
        if run.search is not None:
            stated.update(dict.fromkeys(run.search.assumptions))
    if story.scenario is not None:
        stated.update(dict.fromkeys(story.scenario.cluster.notes))
        for group in story.scenario.cluster.groups:
            gpu = group.gpu
            stated[f"{gpu.name}: {gpu.status}" + (f", {gpu.source}" if gpu.source else "")] = None
    if stated:
        blocks.append(Text(tuple(clip(text, 1000) for text in list(stated)[:60])))
    sources = _sources(story)
    if sources.rows:
        blocks.append(sources)
    return Section("assumptions", title, tuple(blocks), absent="none were stated")


def _sources(story: Story) -> Table:
    """How many operator times, and what share of a step, rest on each kind of source."""
    rows = []
    for run in story.results:
        assert run.result is not None
        for pool in run.result.pools:
            total = sum(pool.breakdown_s.values())
            kinds: dict[Source, tuple[int, float]] = {}
            for operator, seconds in pool.breakdown_s.items():
                kind: Source = pool.sources.get(operator, "assumed")
                count, time = kinds.get(kind, (0, 0.0))
                kinds[kind] = (count + 1, time + seconds)
            for source, (count, time) in sorted(kinds.items(), key=lambda item: (-item[1][1], item[0])):
                share = f"{100 * time / total:.0f}%" if total > 0 else "–"
                rows.append(
                    (
                        word(f"{pool.role}, {run.title}"),
                        word(source),
                        word(MEANING[source]),
                        word(plural(count, "operator")),
                        word(share),
                    )
                )
    return Table("sources", ("pool", "source", "which means", "operators", "share of a step"), tuple(rows))


def provenance(story: Story) -> Section:
    made = [(run, p) for run in story.runs for p in [_of(run)] if p is not None]
    if not made:
        return Section("provenance", "Provenance", absent="no result states what made it")
    blocks: list[Block] = []
    for run, source in made:
        rows: list[tuple[str, Cell]] = [("Result", word(f"{_what(run)} ({run.where or 'this directory'})"))]
        if run.result is not None:
            rows.append(("Name", word(run.result.name, limit=NAME_CHARS)))
        rows += [
            ("Tool", word(f"eptwin {source.tool_version}" + (f", commit {source.git_commit}" if source.git_commit else ""))),
            ("Seed", Cell(str(source.seed), source.seed)),
            ("Spec SHA-256", word(source.spec_sha256 or "–")),
            ("Profiles", word(", ".join(source.profiles) or "none")),
            ("Libraries", word(", ".join(f"{k} {v}" for k, v in sorted(source.libraries.items())) or "–")),
            ("Host", word(source.host or "–")),
        ]
        if source.command:
            rows.append(("Command", word(source.command)))
        blocks.append(Facts(tuple(rows)))
    return Section("provenance", "Provenance", tuple(blocks))


def _of(run: Run) -> Provenance | None:
    if run.result is not None:
        return run.result.provenance
    return run.search.provenance if run.search is not None else None


def _what(run: Run) -> str:
    return run.title if run.result is not None else "search"
