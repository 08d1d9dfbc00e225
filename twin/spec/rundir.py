"""Run directories: each file written whole (temporary name, then renamed) and read back strictly.

A directory may hold one run, or several in subfolders (`plan/`, `predicted/`, `measured/`).
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML

from twin.spec.base import Spec
from twin.spec.errors import Problem, SpecError
from twin.spec.load import load_scenario
from twin.spec.plan import Plan
from twin.spec.results import Comparison, RequestRecord, RunResult, SearchResult
from twin.spec.scenario import Scenario

S = TypeVar("S", bound=Spec)
MAX_RESULT_BYTES = 256 << 20


@dataclass(frozen=True)
class RunDir:
    """What a run directory holds; None or empty for a file that is not there."""

    path: Path
    scenario: Scenario | None = None
    plan: Plan | None = None
    result: RunResult | None = None
    comparison: Comparison | None = None
    search: SearchResult | None = None
    requests: tuple[RequestRecord, ...] = ()
    trace: tuple[dict[str, Any], ...] = ()
    parts: Mapping[str, RunDir] = field(default_factory=dict)


def write_run(
    path: Path,
    *,
    scenario: Scenario | None = None,
    plan: Plan | None = None,
    result: RunResult | None = None,
    requests: Iterable[RequestRecord] | None = None,
    trace: Iterable[Mapping[str, Any]] | None = None,
    comparison: Comparison | None = None,
    search: SearchResult | None = None,
) -> None:
    """Write what is given into `path`, made if needed. Raises SpecError when the place cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"cannot make the output folder: {error.strerror}", file=path) from error
    if scenario is not None:
        write_text(path / "scenario.yaml", dump_yaml(scenario))
    for name, spec in (("plan.json", plan), ("results.json", result), ("comparison.json", comparison), ("search.json", search)):
        if spec is not None:
            write_text(path / name, dump_json(spec))
    if requests is not None:
        write_text(path / "requests.jsonl", "".join(r.model_dump_json(exclude_none=True) + "\n" for r in requests))
    if trace is not None:
        lines = ",\n".join(json.dumps(event, sort_keys=True, allow_nan=False) for event in trace)
        write_text(path / "trace.json", '{"displayTimeUnit": "ms", "traceEvents": [\n' + lines + "\n]}\n")


def read_run(path: Path) -> RunDir:
    """Read a run directory and its subfolders' runs. Raises SpecError when it holds none or a file is damaged."""
    if not path.is_dir():
        raise SpecError("is not a run directory", file=path, hint="`eptwin simulate ... --out DIR` makes one")
    found = read_one(path)
    parts = {sub.name: part for sub in sorted(path.iterdir()) if sub.is_dir() and (part := read_one(sub)) is not None}
    if found is None and not parts:
        raise SpecError("holds no results", file=path, expected="results.json, search.json or plan.json")
    found = found or RunDir(path)
    return RunDir(
        path, found.scenario, found.plan, found.result, found.comparison, found.search, found.requests, found.trace, parts
    )


def read_one(path: Path) -> RunDir | None:
    """The files of this folder alone; None when it holds none of a run's. Raises SpecError for a damaged file."""
    names = ("scenario.yaml", "plan.json", "results.json", "comparison.json", "search.json", "requests.jsonl", "trace.json")
    if not any((path / name).is_file() for name in names):
        return None
    scenario = load_scenario(path / "scenario.yaml") if (path / "scenario.yaml").is_file() else None
    requests: tuple[RequestRecord, ...] = ()
    if (path / "requests.jsonl").is_file():
        requests = tuple(
            _validated(RequestRecord, line, path / "requests.jsonl", number)
            for number, line in enumerate(_text(path / "requests.jsonl").splitlines(), 1)
            if line
        )
    trace: tuple[dict[str, Any], ...] = ()
    if (path / "trace.json").is_file():
        try:
            trace = tuple(json.loads(_text(path / "trace.json"))["traceEvents"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SpecError("is not a Chrome trace", file=path / "trace.json") from error
    return RunDir(
        path,
        scenario,
        read_spec(Plan, path / "plan.json"),
        read_spec(RunResult, path / "results.json"),
        read_spec(Comparison, path / "comparison.json"),
        read_spec(SearchResult, path / "search.json"),
        requests,
        trace,
    )


def read_spec(cls: type[S], path: Path) -> S | None:
    """One spec from a JSON file; None when the file is not there."""
    return _validated(cls, _text(path), path) if path.is_file() else None


def _validated(cls: type[S], text: str, path: Path, line: int | None = None) -> S:
    try:
        return cls.model_validate_json(text)
    except ValidationError as error:
        problems = [
            Problem(item["msg"].removeprefix("Value error, "), field=".".join(map(str, item["loc"])), line=line)
            for item in error.errors(include_url=False, include_input=False)
        ]
        raise SpecError(problems, file=path) from error


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_RESULT_BYTES:
        raise SpecError("file is too large", file=path, expected=f"at most {MAX_RESULT_BYTES} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpecError("not UTF-8 text", file=path) from error
    except OSError as error:
        raise SpecError(f"cannot read: {error.strerror}", file=path) from error


def dump_json(spec: Spec) -> str:
    """Stable JSON: declared field order, two spaces, one newline at the end."""
    return spec.model_dump_json(indent=2, exclude_none=True) + "\n"


def dump_yaml(spec: Spec) -> str:
    """YAML that `twin.spec.load` reads back to an equal spec."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.allow_unicode = True
    yaml.width = 110
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    out = io.StringIO()
    yaml.dump(json.loads(spec.model_dump_json(exclude_none=True)), out)
    return out.getvalue()


def check_out(path: Path | None, *, folder: bool = True) -> Path | None:
    """`path`, where a folder (or a file) can be written; raises SpecError where it cannot. Commands ask before they work:
    nobody waits for an answer that then has no place."""
    if path is None:
        return None
    try:
        if path.exists() and path.is_dir() != folder:
            raise SpecError("cannot write: it is a file" if folder else "cannot write: it is a directory", file=path)
        place = path if folder else path.parent
        while not place.exists():
            if not folder or place == place.parent:
                raise SpecError("cannot write: No such file or directory", file=path)
            place = place.parent
        if not place.is_dir():
            raise SpecError(f"cannot write: {place} is not a directory", file=path)
        if not os.access(place, os.W_OK | os.X_OK):
            raise SpecError("cannot write: Permission denied", file=path)
    except OSError as error:
        raise SpecError(f"cannot write: {error.strerror}", file=path) from error
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file whole: a temporary neighbour, flushed, then renamed over `path`. What is no regular file (a device, a
    pipe) is written into, never replaced; so is what a link names."""
    try:
        target = path.resolve()
        if target.exists() and not target.is_file():
            with target.open("w", encoding="utf-8") as file:
                file.write(text)
            return
    except (OSError, RuntimeError) as error:
        raise SpecError(f"cannot write: {getattr(error, 'strerror', None) or error}", file=path) from error
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    except OSError as error:
        raise SpecError(f"cannot write: {error.strerror}", file=path) from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SpecError(f"cannot write: {error.strerror}", file=path) from error
        raise
