"""Make a profile small: drop the grid levels and the sheets that the rest reproduces."""

from __future__ import annotations

import math

import numpy as np

from twin.cost.grid import Array
from twin.cost.interpolate import log_ratio, nearest_sheets
from twin.cost.profile import GpuPeaks, Table

_QUANTILE = 0.8  # a level may go when four fifths of its points come back within the tolerance


def thin(table: Table, peaks: GpuPeaks, tolerance: float) -> Table:
    """The table with fewer levels and sheets, each dropped point reproduced within `tolerance` (log, 80% of them)."""
    ratios = [log_ratio(table, sheet, peaks) for sheet in range(len(table.sheets))]
    kept = _levels(table, np.stack(ratios), tolerance)
    small = [r[np.ix_(*kept)] for r in ratios]
    sheets = _sheets(table, np.stack([r.ravel() for r in small]), tolerance)
    grids = [table.grid(s)[np.ix_(*kept)] for s in sheets]
    whole = [(s, g) for s, g in zip(sheets, grids, strict=True) if not np.isnan(g).all()]
    axes = {name: tuple(levels[i] for i in keep) for (name, levels), keep in zip(table.axes.items(), kept, strict=True)}
    return table.model_copy(update={
        "axes": axes, "sheets": tuple(table.sheets[s] for s, _ in whole),
        "seconds": tuple(tuple(None if math.isnan(v) else v for v in g.ravel().tolist()) for _, g in whole)})


def _levels(table: Table, ratios: Array, tolerance: float) -> list[list[int]]:
    """For each axis the levels to keep: greedily the one whose loss shows least goes, until one would show."""
    kept = []
    for number, levels in enumerate(table.axes.values()):
        axis, lines = np.log2(np.maximum(np.asarray(levels), 2.0**-4)), np.moveaxis(ratios, number + 1, 0)
        keep = list(range(len(levels)))
        while len(keep) > 2:
            costs = [_loss(axis, lines, keep[i - 1], keep[i + 1]) for i in range(1, len(keep) - 1)]
            least = int(np.argmin(costs))
            if costs[least] > tolerance:
                break
            del keep[least + 1]
        kept.append(keep)
    return kept


def _loss(axis: Array, lines: Array, low: int, high: int) -> float:
    """The error quantile at the levels strictly between `low` and `high` when a line between those two stands for them.

    A level is not to be missed where one of its ends was not measured: such points count as lost.
    """
    inner = slice(low + 1, high)
    share = ((axis[inner] - axis[low]) / (axis[high] - axis[low])).reshape(-1, *([1] * (lines.ndim - 1)))
    off = np.abs(lines[inner] - (lines[low] * (1 - share) + lines[high] * share))
    there = ~np.isnan(lines[inner])
    return float(np.quantile(np.where(np.isnan(off), 1.0, off)[there], _QUANTILE)) if there.any() else 0.0


def _sheets(table: Table, ratios: Array, tolerance: float) -> list[int]:
    """The sheets to keep: one goes when its nearest others reproduce it, and then those stay."""
    keep, needed = list(range(len(table.sheets))), set[int]()
    for sheet in range(len(table.sheets)):
        if sheet in needed or len(keep) < 4:
            continue
        others = [s for s in keep if s != sheet]
        rest = table.model_copy(update={"sheets": tuple(table.sheets[s] for s in others)})
        nearest, _ = nearest_sheets(rest, dict(zip(table.shape, table.sheets[sheet], strict=True)))
        guess = np.sum([weight * ratios[others[i]] for i, weight in nearest], axis=0)
        off = np.abs(guess - ratios[sheet])[~np.isnan(ratios[sheet])]
        if len(off) and np.quantile(np.where(np.isnan(off), 1.0, off), _QUANTILE) <= tolerance:
            keep = others
            needed.update(others[i] for i, _ in nearest)
    return keep


