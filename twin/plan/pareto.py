"""The Pareto front of two quantities that are both better when larger."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Indices of points that no other beats in one quantity without losing in the other. Equal points all stay."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    kept: set[int] = set()
    best_y, best_x = float("-inf"), float("nan")
    for i in order:
        x, y = points[i]
        if y > best_y or (y == best_y and x == best_x):
            kept.add(i)
            best_y, best_x = y, x
    return kept
