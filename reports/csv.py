"""Tables for a spreadsheet, from result files alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from reports.words import plan_words
from twin.spec.results import Comparison, RequestRecord, SearchResult

Value = str | float | int | bool | None
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def neutral(value: Value) -> Value:
    """A cell that no spreadsheet runs: text that begins like a formula gets an apostrophe before it; numbers stay."""
    return f"'{value}" if isinstance(value, str) and value.lstrip(" ").startswith(FORMULA) else value


def to_csv(columns: Sequence[str], rows: Iterable[Sequence[Value]]) -> str:
    """RFC 4180 text (CRLF). None becomes an empty cell; numbers are written so that they read back the same."""
    out = io.StringIO()
    writer = csv.writer(out)
    for row in (columns, *rows):
        writer.writerow([neutral(value) for value in row])
    return out.getvalue()


def requests_csv(records: Iterable[RequestRecord]) -> str:
    """One row a request, with its TTFT, TPOT and E2E in seconds."""
    fields = tuple(RequestRecord.model_fields)
    derived = ("ttft_s", "tpot_s", "e2e_s")
    return to_csv((*fields, *derived), ([getattr(r, name) for name in (*fields, *derived)] for r in records))


def candidates_csv(search: SearchResult) -> str:
    """One row a candidate: its plan, how far it got, and every metric that any candidate has."""
    metrics = sorted({name for candidate in search.candidates for name in candidate.metrics})
    rows: list[list[Value]] = [
        [
            c.rank,
            c.plan.name,
            plan_words(c.plan),
            c.plan.gpus,
            c.stage,
            c.feasible,
            c.pareto,
            c.reason,
            *map(c.metrics.get, metrics),
        ]
        for c in search.candidates
    ]
    return to_csv(("rank", "plan", "pools", "gpus", "stage", "feasible", "pareto", "reason", *metrics), rows)


def comparison_csv(comparison: Comparison) -> str:
    """One row a metric."""
    columns = ("name", "unit", "predicted", "measured", "error", "low", "high", "inside")
    return to_csv(columns, ([getattr(metric, name) for name in columns] for metric in comparison.metrics))
