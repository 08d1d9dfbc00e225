"""The fit of deployment factors on made-up rows whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.fit_deployments import Seen, folds, left_over, solve, with_widths
from twin.cost.deployments import NONE

FAST, SLOW = ("vllm", "qwen3_moe"), ("vllm", "gpt_oss")


def rows(key: tuple[str, str], decode: float, prefill: float, count: int = 12, noise: float = 0.0) -> list[Seen]:
    """Rows that are off by these log factors; TPOT takes nine tenths of its time from decode steps, TTFT all from prompts."""
    off = noise * np.random.default_rng(7).standard_normal((count, 2)) - (0.9 * decode + 0.1 * prefill, prefill)
    return [Seen(f"{key}{i % 4}", True, (key, (*key, "fp8", "hopper")), (off[i][0], off[i][1]), ((0.9, 0.1), (0.0, 1.0)), 0.1)
            for i in range(count)]


def test_factors_are_found_and_errors_vanish() -> None:
    seen = [*rows(FAST, 0.3, -0.2), *rows(SLOW, -0.1, 0.25)]
    fit = solve(seen, 0.01)
    assert fit.factors(seen[0].keys) == pytest.approx((0.3, -0.2), abs=0.01)
    assert fit.factors(seen[-1].keys) == pytest.approx((-0.1, 0.25), abs=0.01)
    assert np.abs(left_over(seen, fit, NONE)).max() < 0.01
    again = solve([Seen(s.configuration, s.moe, s.keys, (0.0, 0.0), s.slope, s.width) for s in seen], 0.01, fit)
    assert again.factors(seen[0].keys) == pytest.approx((0.3, -0.2), abs=0.01), "errors seen under factors add to them"


def test_a_pull_shrinks_what_few_rows_say() -> None:
    one, many = rows(FAST, 0.3, 0.3, count=1), rows(FAST, 0.3, 0.3, count=40)
    few, more = (solve(seen, 4.0).factors(seen[0].keys)[0] for seen in (one, many))
    assert 0 < few < 0.15 < more < 0.31


def test_one_wild_row_does_not_decide() -> None:
    seen = rows(FAST, 0.2, 0.0, noise=0.02)
    wild = Seen("wild", True, seen[0].keys, (2.0, 2.0), seen[0].slope, 0.1)
    assert solve([*seen, wild], 0.1).factors(seen[0].keys)[0] == pytest.approx(0.2, abs=0.04)


def test_configurations_left_out_are_predicted_by_the_others_and_strangers_are_not() -> None:
    seen = [*rows(FAST, 0.3, 0.0), *rows(SLOW, 0.0, 0.0)]
    known = np.abs(folds(seen, 0.1, NONE, "model"))[:12, 0]
    strange = np.abs(folds(seen, 0.1, NONE, "engine"))[:12, 0]
    assert known.max() < 0.05 and strange.min() > 0.2


def test_widths_hold_four_configurations_in_five_and_grow_with_what_is_not_known() -> None:
    seen = [Seen(f"c{i}", True, (FAST, (*FAST, "fp8", "hopper")), (0.0, 0.0), ((1.0, 0.0), (0.0, 1.0)), 0.1, separated=i < 10)
            for i in range(100) for _ in range(1 + 9 * (i == 0))]
    off = np.array([[int(s.configuration[1:]) / 1000, 0.0] for s in seen])
    off[:, 1] = [0.3 if s.separated else 0.01 for s in seen]
    fit = with_widths(NONE, {"configuration": off, "model": 0.5 * off, "engine": 2 * off, "nothing": 3 * off}, seen)
    assert fit.widths["configuration"][0] == pytest.approx(0.79, abs=0.02), "ten rows of one count as three"
    assert fit.widths["model"] == fit.widths["configuration"], "never narrower where less is known"
    assert fit.widths["engine"][0] == pytest.approx(1.6, abs=0.04) and fit.widths["nothing"][0] == pytest.approx(2.4, abs=0.06)
    assert fit.separated > 1
