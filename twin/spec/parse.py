"""YAML 1.2 and JSON into plain data with line numbers, within limits and without surprises.

YAML is read event by event: no object construction, no aliases, no tags, no duplicate keys, bounded depth and size.
Sequences become tuples, since specs are immutable.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
    StreamStartEvent,
)

from twin.spec.errors import Problem, SpecError

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 10_000
MAX_SCALAR_CHARS = 100_000

Path_ = tuple[str | int, ...]
_INT = re.compile(r"[-+]?[0-9]+$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_NOT_FINITE = re.compile(r"([-+]?\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$")


class Document:
    """Parsed data and where each path of it stood. `changed`: paths that overrides set, and their text."""

    def __init__(self, data: Any, lines: dict[Path_, int], file: str) -> None:
        self.data, self.lines, self.file = data, lines, file
        self.changed: dict[tuple[str, ...], str] = {}

    def override_of(self, path: Path_) -> str:
        """The override that set this path, or ''."""
        named = tuple(str(part) for part in path)
        return next((text for at, text in self.changed.items() if at == named[: len(at)]), "")

    def line_of(self, path: Path_) -> int | None:
        """Line of the nearest enclosing path that has one, from 1."""
        for end in range(len(path), -1, -1):
            line = self.lines.get(path[:end])
            if line is not None:
                return line
        return None


def read_text(path: Path, *, max_bytes: int = MAX_FILE_BYTES) -> str:
    """The text of a regular UTF-8 file within `max_bytes`. Raises SpecError for anything else."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a usable path"
        raise SpecError(f"cannot read: {reason}", file=path) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise SpecError(f"cannot read: it is {kind}", file=path, expected="a YAML or JSON file")
    if status.st_size > max_bytes:
        raise SpecError(f"file is too large ({status.st_size} bytes)", file=path, expected=f"at most {max_bytes} bytes")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(f"not UTF-8 text (byte {error.start})", file=path, expected="a YAML or JSON text file") from error
    except OSError as error:
        raise SpecError(f"cannot read: {error.strerror}", file=path) from error


def parse_file(path: Path) -> Document:
    """Parse a YAML (or .json) file. Raises SpecError with file and line."""
    text = read_text(path)
    if path.suffix == ".json":
        return Document(_json(text, path), {}, str(path))
    return parse_yaml(text, str(path))


def parse_yaml(text: str, file: str) -> Document:
    """Parse YAML 1.2 text; see the module's limits."""
    builder = _Builder(file)
    if "\x00" in text:
        raise SpecError("contains a NUL character", file=file, expected="YAML text")
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            builder.take(event)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        message = str(getattr(error, "problem", None) or error).splitlines()[0][:200]
        raise SpecError(Problem(f"not valid YAML: {message}", line=mark.line + 1 if mark else None), file=file) from error
    except (RecursionError, ValueError) as error:
        reason = "is nested too deep" if isinstance(error, RecursionError) else f"not valid YAML: {type(error).__name__}"
        raise SpecError(reason, file=file) from error
    return Document(builder.root, builder.lines, file)


class _Builder:
    """Folds parser events into data. `stack` holds open containers: (container, path, pending key)."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.root: Any = None
        self.lines: dict[Path_, int] = {}
        self.stack: list[list[Any]] = []
        self.nodes = 0
        self.documents = 0

    def fail(self, message: str, event: Event, **more: str) -> SpecError:
        line = event.start_mark.line + 1 if event.start_mark is not None else None
        return SpecError(Problem(message, line=line, **more), file=self.file)

    def take(self, event: Event) -> None:
        if isinstance(event, (StreamStartEvent, StreamEndEvent, DocumentEndEvent)):
            return
        if isinstance(event, DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise self.fail("holds more than one document", event, expected="one YAML document")
            return
        if isinstance(event, AliasEvent):
            raise self.fail("aliases (*name) are not accepted", event, hint="write the value out")
        if isinstance(event, (MappingEndEvent, SequenceEndEvent)):
            container, path, _ = self.stack.pop()
            self.put(tuple(container) if isinstance(container, list) else container, path, event, closing=True)
            return
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.fail(f"holds more than {MAX_NODES} values", event)
        path = self.path()
        if isinstance(event, (MappingStartEvent, SequenceStartEvent)):
            if len(self.stack) >= MAX_DEPTH:
                raise self.fail(f"is nested deeper than {MAX_DEPTH} levels", event)
            if event.tag is not None:
                raise self.fail(f"tag {event.tag[:40]} is not accepted", event, hint="remove it")
            if self.stack and isinstance(self.stack[-1][0], dict) and self.stack[-1][2] is None:
                raise self.fail("a key must be plain text", event)
            self.lines.setdefault(path, event.start_mark.line + 1)
            self.stack.append([{} if isinstance(event, MappingStartEvent) else [], path, None])
            return
        assert isinstance(event, ScalarEvent)
        self.put(self.scalar(event), path, event)

    def path(self) -> Path_:
        if not self.stack:
            return ()
        container, path, key = self.stack[-1]
        if isinstance(container, list):
            return (*path, len(container))
        return path if key is None else (*path, key)

    def put(self, value: Any, path: Path_, event: Event, *, closing: bool = False) -> None:
        if not self.stack:
            self.root = value
            self.lines.setdefault((), 1)
            return
        frame = self.stack[-1]
        container, base, key = frame
        if isinstance(container, list):
            if not closing:
                self.lines[path] = event.start_mark.line + 1
            container.append(value)
        elif key is None:
            if not isinstance(value, str):
                value = str(value)
            if value in container:
                raise self.fail(f"duplicate key {value[:60]!r}", event, hint="keep one of them")
            container[value] = None
            self.lines[(*base, value)] = event.start_mark.line + 1
            frame[2] = value
        else:
            container[key] = value
            frame[2] = None

    def scalar(self, event: ScalarEvent) -> Any:
        text: str = event.value
        if event.tag is not None and event.tag not in ("!", "tag:yaml.org,2002:str"):
            raise self.fail(f"tag {str(event.tag)[:40]} is not accepted", event, hint="remove it")
        if len(text) > MAX_SCALAR_CHARS:
            raise self.fail(f"value is longer than {MAX_SCALAR_CHARS} characters", event)
        if event.style is not None or event.tag is not None:
            return text
        if text in ("", "~", "null", "Null", "NULL"):
            return None
        if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
            return text.lower() == "true"
        if _NOT_FINITE.match(text):
            raise self.fail(f"{text} is not a finite number", event)
        if _INT.match(text):
            if len(text) > 30:
                raise self.fail(f"number of {len(text)} digits is out of range", event)
            return int(text)
        if text.startswith("0x") or text.startswith("0o"):
            try:
                return int(text, 0)
            except ValueError:
                return text
        if _FLOAT.match(text):
            value = float(text)
            if value in (float("inf"), float("-inf")):
                raise self.fail(f"{text[:40]} is out of range", event)
            return value
        return text


def _json(text: str, file: Path) -> Any:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise SpecError(f"duplicate key {key[:60]!r}", file=file)
            seen[key] = tuple(value) if isinstance(value, list) else value
        return seen

    def no_constant(name: str) -> Any:
        raise SpecError(f"{name} is not a finite number", file=file)

    try:
        data = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constant, parse_float=_finite(file))
    except json.JSONDecodeError as error:
        raise SpecError(Problem(f"not valid JSON: {error.msg}", line=error.lineno), file=file) from error
    except (RecursionError, ValueError) as error:
        reason = "is nested too deep" if isinstance(error, RecursionError) else f"not valid JSON: {type(error).__name__}"
        raise SpecError(reason, file=file) from error
    return _bounded(data, file)


def _finite(file: Path) -> Any:
    def convert(text: str) -> float:
        value = float(text)
        if value in (float("inf"), float("-inf")):
            raise SpecError(f"{text[:40]} is out of range", file=file)
        return value

    return convert


def _bounded(data: Any, file: Path) -> Any:
    """Tuples for lists, at every depth; refuses what is nested too deep or too big."""
    count = 0

    def walk(value: Any, depth: int) -> Any:
        nonlocal count
        count += 1
        if depth > MAX_DEPTH:
            raise SpecError(f"is nested deeper than {MAX_DEPTH} levels", file=file)
        if count > 20 * MAX_NODES:
            raise SpecError(f"holds more than {20 * MAX_NODES} values", file=file)
        if isinstance(value, dict):
            return {key: walk(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return tuple(walk(item, depth + 1) for item in value)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
            raise SpecError("a number is out of range", file=file)
        return value

    return walk(data, 0)
