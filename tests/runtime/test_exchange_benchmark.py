"""What the exchange benchmark makes of its ranks' measurements, and what it refuses."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

pytest.importorskip("triton")

from benchmarks.exchange import main, summary, table
from benchmarks.exchange_rank import Case


def rank(scale: float, mistakes: list[str]) -> dict[str, object]:
    free = {"barrier": 1e-6, "dispatch": 10e-6 * scale, "combine": 20e-6 * scale, "pair": 30e-6 * scale, "widen": 5e-6}
    fresh = {"dispatch": [1e-6 * scale, 9e-6, 4e-6 * scale], "combine": [2e-6, 2e-6, 2e-6 * scale]}
    return {"cases": [{"mistakes": mistakes, "free_s": free, "fresh_s": fresh, "rows": 5, "rows_away": 3}]}


def test_fresh_entry_is_the_slowest_rank_and_bytes_are_counted_once() -> None:
    case = Case(tokens=4, hidden=32, top_k=2, experts=8, rows="bf16", back="pull", route="uniform")
    out = summary(2, 0, case, [rank(1.0, []), rank(3.0, ["rank 1: wrong"])])
    assert out["dispatch"]["fresh_max_s"] == 9e-6 and out["combine"]["fresh_max_s"] == 2e-6
    assert out["dispatch"]["free_median_s"] == pytest.approx(20e-6)
    assert out["dispatch"]["bytes"] == out["combine"]["bytes"] == (2 * 4 + 10) * 32 * 2
    assert out["rows_sent_away"] == 6 and out["mistakes"] == ["rank 1: wrong"] and "widen_s" not in out
    pushed = summary(2, 0, Case(4, 32, 2, 8, "fp8", "push", "uniform"), [rank(1.0, []), rank(1.0, [])])
    assert pushed["combine"]["bytes"] == (2 * 4 + 3 * 10) * 64
    assert pushed["dispatch"]["bytes"] == 2 * 4 * 64 + 10 * (32 + 4) and pushed["widen_s"] == 5e-6
    text = table({"ceilings": {"read_bytes_per_s": 4e12, "copy_bytes_per_s": 3e12}, "cases": [out, pushed]})
    assert "rank 1: wrong" in text and text.splitlines()[-1].endswith("right")


@pytest.mark.parametrize(("arguments", "word"), [(["--ranks", "3"], "do not divide"), (["--rows", "int4"], "int4"),
                                                 (["--top-k", "9", "--experts", "8"], "top-k"), (["--route", "x"], "one rank")])
def test_sizes_that_cannot_be_are_refused(arguments: list[str], word: str) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2 and word in done.output
