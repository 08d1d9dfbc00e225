"""Statistics of predictions, against their definitions."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twin.validate.stats import bootstrap_interval, coverage, kendall_tau_b, regret, summarise_errors

small = st.lists(st.integers(-4, 4), min_size=2, max_size=12)


def tau_by_definition(a: list[int], b: list[int]) -> float | None:
    """Kendall's tau-b, pair by pair."""
    pairs = list(combinations(range(len(a)), 2))
    signs = [((a[i] > a[j]) - (a[i] < a[j]), (b[i] > b[j]) - (b[i] < b[j])) for i, j in pairs]
    ties_a, ties_b = sum(x == 0 for x, _ in signs), sum(y == 0 for _, y in signs)
    below = (len(pairs) - ties_a) * (len(pairs) - ties_b)
    return sum(x * y for x, y in signs) / math.sqrt(below) if below else None


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_tau_matches_its_definition(data: st.DataObject) -> None:
    a = data.draw(small)
    b = data.draw(st.lists(st.integers(-4, 4), min_size=len(a), max_size=len(a)))
    expected = tau_by_definition(a, b)
    found = kendall_tau_b(a, b)
    assert found == (None if expected is None else pytest.approx(expected))
    assert found is None or -1 - 1e-12 <= found <= 1 + 1e-12


def test_tau_of_known_rankings() -> None:
    assert kendall_tau_b([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert kendall_tau_b([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert kendall_tau_b([12, 2, 1, 12, 2], [1, 4, 7, 1, 0]) == pytest.approx(-0.47140452079103173)  # published worked example
    assert kendall_tau_b([1, 1, 1], [1, 2, 3]) is None
    assert kendall_tau_b([], []) is None
    with pytest.raises(ValueError, match="same length"):
        kendall_tau_b([1, 2], [1])


def test_error_summary() -> None:
    found = summarise_errors([0.1, -0.3, None, 0.2, -0.1])
    assert found.count == 4
    assert found.mean == pytest.approx(-0.025)
    assert found.median == pytest.approx(0.0)
    assert found.median_abs == pytest.approx(0.15)
    assert found.mean_abs == pytest.approx(0.175)
    assert found.p95_abs == pytest.approx(0.285)
    assert found.max_abs == pytest.approx(0.3)
    assert summarise_errors([None]).median is None


def test_bootstrap_is_repeatable_and_covers_the_mean() -> None:
    """80% intervals of the mean of 40 exponential draws should hold the true mean about 80% of the time."""
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.exponential(1.0, 40), confidence=0.8, resamples=200, seed=trial)
        inside += low <= 1.0 <= high
    assert 0.68 <= inside / 200 <= 0.9
    values = list(rng.exponential(1.0, 30))
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert bootstrap_interval([2.0], np.median) == (2.0, 2.0)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval([1.0], confidence=1.0)


def test_regret() -> None:
    assert regret([3, 2, 1], [30, 20, 10]) == 0
    assert regret([1, 2, 3], [100, 90, 80]) == pytest.approx(0.2)
    assert regret([5, 5], [100, 50]) == pytest.approx(0.5), "of equals, the worst counts"
    assert regret([1, 2, 3], [1.2, 1.0, 3.0], higher_is_better=False) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="positive"):
        regret([1, 2], [0, 1])
    with pytest.raises(ValueError, match="same length"):
        regret([], [])


def test_coverage() -> None:
    assert coverage([0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0.5, 2]) == 0.75
    assert coverage([], [], []) is None
    with pytest.raises(ValueError, match="same length"):
        coverage([0], [1], [0, 1])
