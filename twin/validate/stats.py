"""How good predictions are over many cases: bias and spread of errors, agreement of rankings, regret, coverage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ErrorSummary:
    """Of signed relative errors: `mean` and `median` show bias, the absolute ones size. All None when `count` is 0."""

    count: int
    mean: float | None = None
    median: float | None = None
    median_abs: float | None = None
    mean_abs: float | None = None
    p95_abs: float | None = None
    max_abs: float | None = None


def summarise_errors(errors: Sequence[float | None]) -> ErrorSummary:
    """Summarise signed errors, leaving out those that are not defined (None)."""
    known = np.array([e for e in errors if e is not None], dtype=float)
    if known.size == 0:
        return ErrorSummary(0)
    size = np.abs(known)
    return ErrorSummary(
        int(known.size),
        float(known.mean()),
        float(np.median(known)),
        float(np.median(size)),
        float(size.mean()),
        float(np.percentile(size, 95)),
        float(size.max()),
    )


def bootstrap_interval(
    values: Sequence[float],
    statistic: Callable[[np.ndarray], float] = np.mean,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap of `statistic` (of a 1-D array) over `values`; the same seed gives the same interval.

    Raises ValueError without values, or for a confidence outside (0, 1).
    """
    if len(values) == 0:
        raise ValueError("a bootstrap needs at least one value")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    sample = np.asarray(values, dtype=float)
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    drawn = np.array([statistic(sample[rng.integers(0, sample.size, sample.size)]) for _ in range(resamples)])
    low, high = np.percentile(drawn, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


def kendall_tau_b(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank agreement in [-1, 1] with Kendall's correction for ties; None when either side is constant or too short.

    tau_b = (concordant - discordant) / sqrt((pairs - ties_a)(pairs - ties_b)). Quadratic in memory a row at a time.
    """
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"two sequences of the same length are needed, not {x.shape} and {y.shape}")
    score, untied_x, untied_y = 0, 0, 0
    for i in range(x.size - 1):
        sign_x, sign_y = np.sign(x[i + 1 :] - x[i]), np.sign(y[i + 1 :] - y[i])
        score += int(sign_x @ sign_y)
        untied_x += int(np.count_nonzero(sign_x))
        untied_y += int(np.count_nonzero(sign_y))
    return score / math.sqrt(untied_x * untied_y) if untied_x and untied_y else None


def regret(predicted: Sequence[float], actual: Sequence[float], *, higher_is_better: bool = True) -> float:
    """What choosing by prediction gives away: the share by which the chosen plan's actual value falls short of the best
    plan's. 0 when the predicted best is the best. Of equals in prediction the worst counts.

    Raises ValueError for empty or unequal sequences, or actual values that are not positive.
    """
    p, y = np.asarray(predicted, dtype=float), np.asarray(actual, dtype=float)
    if p.shape != y.shape or p.size == 0:
        raise ValueError("regret needs two sequences of the same length, not empty")
    if not np.all(y > 0):
        raise ValueError("regret is a share of positive values")
    if higher_is_better:
        chosen, best = y[p == p.max()].min(), y.max()
        return float(1 - chosen / best)
    chosen, best = y[p == p.min()].max(), y.min()
    return float(chosen / best - 1)


def coverage(low: Sequence[float], high: Sequence[float], actual: Sequence[float]) -> float | None:
    """Share of actual values inside their predicted intervals, ends included; None for none."""
    lo, hi, y = (np.asarray(v, dtype=float) for v in (low, high, actual))
    if not lo.shape == hi.shape == y.shape:
        raise ValueError("low, high and actual need the same length")
    return float(np.mean((lo <= y) & (y <= hi))) if y.size else None
