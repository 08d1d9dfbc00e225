"""Request traces in the two formats that are published most: Azure's CSV and Mooncake's JSON lines.

Azure: a header `TIMESTAMP,ContextTokens,GeneratedTokens`, then a request a line, times as `2023-11-16 18:15:46.68`.
Mooncake: one JSON object a line with `timestamp` (milliseconds), `input_length`, `output_length`; `hash_ids` is allowed
and not used. Files are read as a stream; a bad row is an error that names its line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twin.spec.errors import Problem, SpecError

MAX_BYTES = 256 * 2**20
MAX_LINE_BYTES = 2**20
MAX_TOKENS = 10_000_000
_AZURE_HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
Row = tuple[float, int, int]  # seconds, input tokens, output tokens


@dataclass(frozen=True)
class Trace:
    """Rows in order: seconds since the first row [n], prompt and output tokens [n]."""

    time_s: NDArray[np.float64]
    isl: NDArray[np.int64]
    osl: NDArray[np.int64]


def read_trace(file: str | Path, kind: str, *, max_rows: int, until_s: float | None = None) -> Trace:
    """Read at most `max_rows` rows, and none later than `until_s` after the first. `kind` is azure or mooncake.

    Raises SpecError with file and line for a row that is not one, for times that run backwards, for a file that is
    empty, too large, or no regular file.
    """
    path = Path(file)
    parse = {"azure": _azure_row, "mooncake": _mooncake_row}[kind]
    rows: list[Row] = []
    for number, line in _lines(path):
        if kind == "azure" and number == 1:
            _check_azure_header(line, path)
            continue
        row = parse(line, path, number)
        if rows and row[0] < rows[-1][0]:
            raise _bad("time runs backwards", path, number, "rows in order of time")
        if until_s is not None and rows and row[0] - rows[0][0] > until_s:
            break
        rows.append(row)
        if len(rows) >= max_rows:
            break
    if not rows:
        raise SpecError("the trace has no rows", file=path)
    times, isl, osl = zip(*rows, strict=True)
    time_s = np.asarray(times, dtype=np.float64)
    return Trace(time_s - time_s[0], np.asarray(isl, dtype=np.int64), np.asarray(osl, dtype=np.int64))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Non-empty lines with their numbers, from 1; refuses what is too large before reading it."""
    try:
        if not path.is_file():
            raise SpecError("no such trace file", file=path, expected="a regular file")
        if path.stat().st_size > MAX_BYTES:
            raise SpecError(f"trace is larger than {MAX_BYTES} bytes", file=path)
        with path.open("rb") as stream:
            for number in range(1, MAX_BYTES):
                raw = stream.readline(MAX_LINE_BYTES + 1)
                if not raw:
                    return
                if len(raw) > MAX_LINE_BYTES:
                    raise _bad("line is too long", path, number, f"at most {MAX_LINE_BYTES} bytes")
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, text
    except UnicodeDecodeError:
        raise SpecError("the trace is not UTF-8 text", file=path) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise SpecError(f"cannot read the trace: {error}", file=path) from None


def _check_azure_header(line: str, path: Path) -> None:
    if [name.strip() for name in line.split(",")] != _AZURE_HEADER:
        raise _bad("unknown columns", path, 1, ",".join(_AZURE_HEADER))


def _azure_row(line: str, path: Path, number: int) -> Row:
    cells = line.split(",")
    if len(cells) != 3:
        raise _bad(f"{len(cells)} columns", path, number, "TIMESTAMP,ContextTokens,GeneratedTokens")
    stamp, isl, osl = cells
    return (_azure_time_s(stamp.strip(), path, number), _count(isl.strip(), "ContextTokens", path, number),
            _count(osl.strip(), "GeneratedTokens", path, number))


def _azure_time_s(stamp: str, path: Path, number: int) -> float:
    """Seconds since 1970. Stamps carry seven digits of fraction, one more than datetime reads, and perhaps a zone."""
    expected = "a time like 2023-11-16 18:15:46.6805900"
    if len(stamp) > 64:
        raise _bad("TIMESTAMP is too long", path, number, expected)
    head, _, fraction = stamp.partition(".")
    digits = fraction[:len(fraction) - len(fraction.lstrip("0123456789"))]
    try:
        when = datetime.fromisoformat(head + fraction[len(digits):])
    except ValueError:
        raise _bad(f"TIMESTAMP {stamp[:40]!r} is not a time", path, number, expected) from None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return (when - _EPOCH).total_seconds() + (float("0." + digits) if digits else 0.0)


def _mooncake_row(line: str, path: Path, number: int) -> Row:
    expected = "an object with timestamp, input_length, output_length"
    try:
        row = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise _bad("not a JSON object", path, number, expected) from None
    if not isinstance(row, dict):
        raise _bad("not a JSON object", path, number, expected)
    unknown = sorted(set(row) - {"timestamp", "input_length", "output_length", "hash_ids"})
    if unknown:
        raise _bad(f"unknown key {unknown[0][:40]!r}", path, number, expected)
    stamp = row.get("timestamp")
    if isinstance(stamp, bool) or not isinstance(stamp, int | float) or not 0 <= stamp <= 1e15:
        raise _bad(f"timestamp is {str(stamp)[:40]!r}", path, number, "milliseconds, at least 0")
    return (stamp / 1e3, _count(row.get("input_length"), "input_length", path, number),
            _count(row.get("output_length"), "output_length", path, number))


def _count(value: Any, name: str, path: Path, number: int) -> int:
    """A number of tokens, 1..MAX_TOKENS, from a CSV cell or a JSON number."""
    if isinstance(value, str) and len(value) < 16 and value.isascii() and value.isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_TOKENS:
        raise _bad(f"{name} is {str(value)[:40]!r}", path, number, f"a whole number of tokens, 1 to {MAX_TOKENS}")
    return value


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _bad(message: str, path: Path, number: int, expected: str) -> SpecError:
    return SpecError(Problem(message, line=number, expected=expected), file=path)
