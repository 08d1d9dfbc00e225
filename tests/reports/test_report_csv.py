"""CSV: exact numbers, and cells that no spreadsheet runs."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from report_results import requests

from reports.csv import candidates_csv, comparison_csv, neutral, requests_csv, to_csv
from twin.spec.results import Comparison, SearchResult


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


@pytest.mark.parametrize("text", ["=cmd|'/c calc'!A1", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "  =1", '=HYPERLINK("x")'])
def test_formulas_are_neutralised(text: str) -> None:
    assert neutral(text) == "'" + text
    assert read(to_csv(("name",), [[text]]))[0]["name"] == "'" + text


def test_numbers_and_plain_text_stay() -> None:
    assert [neutral(v) for v in (-1.5, 3, None, True, "plain", "a=b", "")] == [-1.5, 3, None, True, "plain", "a=b", ""]
    value = 0.1 + 0.2
    assert float(read(to_csv(("x",), [[value]]))[0]["x"]) == value
    assert read(to_csv(("a", "b"), [["1,2\n3", 'q"']]))[0] == {"a": "1,2\n3", "b": 'q"'}


def test_headings_are_neutralised_too() -> None:
    assert to_csv(("=x",), []).startswith("'=x")


def test_requests(sample: Path) -> None:
    records = requests(1, 30, 0.5, 0.02)
    rows = read(requests_csv(records))
    assert [float(row["ttft_s"]) for row in rows] == [r.ttft_s for r in records]
    assert rows[0]["kv_transfer_s"] == ""


def test_candidates_and_comparison(sample: Path) -> None:
    search = SearchResult.model_validate_json((sample / "plan/search.json").read_text(encoding="utf-8"))
    rows = read(candidates_csv(search))
    assert len(rows) == len(search.candidates)
    assert float(rows[3]["ttft_s_p50"]) == search.candidates[3].metrics["ttft_s_p50"]
    comparison = Comparison.model_validate_json((sample / "comparison.json").read_text(encoding="utf-8"))
    assert [float(row["error"]) for row in read(comparison_csv(comparison))] == [m.error for m in comparison.metrics]
