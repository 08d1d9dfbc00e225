"""Read what a directory holds: runs, in it and in its folders, gathered into stories (one model on one cluster)."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from twin.spec.errors import SpecError
from twin.spec.plan import Plan
from twin.spec.results import Comparison, RequestRecord, RunResult, SearchResult
from twin.spec.rundir import read_one
from twin.spec.scenario import Scenario
from twin.spec.units import format_bytes

NAMES = ("scenario.yaml", "plan.json", "results.json", "requests.jsonl", "trace.json", "comparison.json", "search.json")
ORDER = {"": 0, "plan": 1, "predicted": 2, "measured": 3}
MAX_DEPTH = 3


@dataclass(frozen=True)
class Run:
    """The files of one folder, read. `where` is its path in the report's directory ("" for the directory itself)."""

    where: str
    scenario: Scenario | None = None
    plan: Plan | None = None
    result: RunResult | None = None
    requests: tuple[RequestRecord, ...] = ()
    trace: tuple[dict[str, Any], ...] = ()
    comparison: Comparison | None = None
    search: SearchResult | None = None

    def file(self, name: str) -> str:
        """Path of one of this run's files, as the page names it."""
        return f"{self.where}/{name}" if self.where else name

    @property
    def title(self) -> str:
        """How figures call this run."""
        if self.result is None:
            return self.where or "plan"
        return {"prediction": "predicted", "measurement": "measured"}[self.result.kind]


@dataclass(frozen=True)
class Story:
    """Runs of one model on one cluster: perhaps a search, what was predicted, what was measured."""

    model: str
    cluster: str
    runs: tuple[Run, ...] = field(default_factory=tuple)

    @property
    def results(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.result is not None)

    @property
    def searched(self) -> Run | None:
        return next((run for run in self.runs if run.search is not None), None)

    @property
    def compared(self) -> Run | None:
        return next((run for run in self.runs if run.comparison is not None), None)

    @property
    def scenario(self) -> Scenario | None:
        return next((run.scenario for run in self.runs if run.scenario is not None), None)

    @property
    def plan(self) -> Plan | None:
        """The plan that was run, else stated, else found by the search."""
        for run in self.runs:
            if run.result is not None and run.result.plan is not None:
                return run.result.plan
        for run in self.runs:
            if run.plan is not None:
                return run.plan
        searched = self.searched
        if searched is not None and searched.search is not None and searched.search.best is not None:
            return searched.search.best.plan
        return None


def read_stories(run_dir: Path) -> tuple[Story, ...]:
    """All runs under `run_dir`, grouped, in reading order. Raises SpecError for a file that cannot be read."""
    if not run_dir.is_dir():
        raise SpecError(
            f"{run_dir} is not a directory",
            expected="a run directory",
            hint="give the directory that `eptwin plan`, `simulate` or `run` wrote",
        )
    runs = [run for folder in _folders(run_dir) if (run := _read_run(run_dir, folder)) is not None]
    if not runs:
        raise SpecError("holds no results", file=run_dir, expected="one of " + ", ".join(NAMES))
    return _group(runs)


def _folders(run_dir: Path) -> list[Path]:
    """`run_dir` and its folders, well-known ones first, down to MAX_DEPTH."""
    found = [Path()]
    for depth in range(MAX_DEPTH):
        for parent in [p for p in found if len(p.parts) == depth]:
            found += [
                parent / child.name
                for child in (run_dir / parent).iterdir()
                if child.is_dir() and not child.is_symlink() and not child.name.startswith(".")
            ]
    return sorted(found, key=lambda p: [(ORDER.get(part, 9), part) for part in p.parts])


def _read_run(run_dir: Path, folder: Path) -> Run | None:
    read = read_one(run_dir / folder)
    if read is None:
        return None
    return Run(
        "" if folder == Path() else folder.as_posix(),
        read.scenario,
        read.plan,
        read.result,
        read.requests,
        read.trace,
        read.comparison,
        read.search,
    )


def _group(runs: list[Run]) -> tuple[Story, ...]:
    """Stories in order of appearance; a folder that names neither model nor cluster joins the story it belongs to."""
    stories: dict[tuple[str, str], Story] = {}
    homeless: list[Run] = []
    for run in runs:
        key = _subject(run)
        if key is None:
            homeless.append(run)
            continue
        story = stories.get(key, Story(*key))
        stories[key] = replace(story, runs=(*story.runs, run))
    for run in homeless:
        key = _home(run, stories) or ("", "")
        story = stories.get(key, Story(*key))
        stories[key] = replace(story, runs=(*story.runs, run))
    return tuple(stories.values())


def _subject(run: Run) -> tuple[str, str] | None:
    for named in (run.result, run.search):
        if named is not None:
            return named.model, named.cluster
    if run.scenario is not None:
        return run.scenario.model.name, run.scenario.cluster.name
    return None


def _home(run: Run, stories: dict[tuple[str, str], Story]) -> tuple[str, str] | None:
    """Where a comparison (or a lone plan or trace) belongs: to the story with the runs that it compared, else to one
    that has both a prediction and a measurement, else to the last."""
    if run.comparison is not None:
        for key, story in stories.items():
            if any(
                r.result and r.result.provenance in (run.comparison.predicted, run.comparison.measured) for r in story.results
            ):
                return key
        for key, story in stories.items():
            if {r.result.kind for r in story.results if r.result} == {"prediction", "measurement"}:
                return key
    return next(reversed(stories), None)


def raw_files(run_dir: Path, page_dir: Path) -> tuple[tuple[str, str, str, str], ...]:
    """The files a reader may want: address as seen from `page_dir`, name, size, first digits of the SHA-256."""
    rows = []
    way = Path(os.path.relpath(run_dir.resolve(), page_dir.resolve()))
    for folder in _folders(run_dir):
        for path in sorted((run_dir / folder).iterdir()):
            if path.is_file() and path.name in NAMES:
                name = (folder / path.name).as_posix()
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                rows.append((quote((way / name).as_posix()), name, format_bytes(path.stat().st_size), digest[:12]))
    return tuple(rows)
