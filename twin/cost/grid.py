"""Numbers on a grid with holes: filling, multilinear reading, monotone cleaning. Pure numpy, no words of serving.

Coordinates are given as log2 of the axis levels; values are logarithms too, so that straight lines between grid
points are power laws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """`values` at every grid point (holes filled), and how trustworthy each is.

    `hole_octaves` is 0 where a point was measured, else the distance to the measured neighbour it was filled from;
    `rough` is the mean absolute misfit of a point and its neighbours to the line through theirs, over its mean.
    """

    logs: tuple[Array, ...]
    values: Array
    hole_octaves: Array
    rough: Array

    @classmethod
    def fill(cls, levels: Sequence[Sequence[float]], values: Array) -> Grid:
        """Fill the nan of `values`: between measured points by lines along the axes, beyond them by the nearest one."""
        logs = tuple(np.log2(np.maximum(np.asarray(axis, dtype=float), 2.0**-4)) for axis in levels)
        filled, distance = values.copy(), np.where(np.isnan(values), np.inf, 0.0)
        for inside in (True, False):
            while np.isnan(filled).any():
                if not _fill_pass(logs, filled, distance, inside):
                    break
        assert not np.isnan(filled).any(), "a grid needs at least one measured point"
        return cls(logs, filled, distance, _roughness(logs, filled))

    def read(self, points: Sequence[Array]) -> tuple[Array, Array, Array, Array]:
        """Values at `points` (log2 coordinates, one array an axis), held constant outside the grid.

        Returns (value, gap, outside, rough): `gap` is how many octaves of unmeasured ground surround a point, `outside`
        how many octaves it lies beyond the grid, `rough` the local misfit.
        """
        shape = np.broadcast_shapes(*(p.shape for p in points))
        total, hole, rough = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        gap, outside = np.zeros(shape), np.zeros(shape)
        cells = []
        for axis, point in zip(self.logs, points, strict=True):
            clipped = np.clip(point, axis[0], axis[-1])
            low = np.clip(np.searchsorted(axis, clipped, side="right") - 1, 0, max(len(axis) - 2, 0))
            high = np.minimum(low + 1, len(axis) - 1)
            width = axis[high] - axis[low]
            share = np.divide(clipped - axis[low], width, out=np.zeros_like(clipped), where=width > 0)
            gap = gap + 2 * np.minimum(share, 1 - share) * width
            outside = outside + np.abs(point - clipped)
            cells.append((low, high, share))
        for corner in range(1 << len(cells)):
            weight: Array = np.ones(shape)
            index = []
            for bit, (low, high, share) in enumerate(cells):
                up = corner >> bit & 1
                weight = weight * (share if up else 1 - share)
                index.append(high if up else low)
            where = tuple(index)
            total += weight * self.values[where]
            hole += weight * self.hole_octaves[where]
            rough += weight * self.rough[where]
        return total, gap + hole, outside, rough


def _fill_pass(logs: tuple[Array, ...], filled: Array, distance: Array, inside: bool) -> bool:
    """One round of filling in place, from points known before the round. False when nothing could be filled."""
    known = ~np.isnan(filled)
    total, weight, nearest = np.zeros(filled.shape), np.zeros(filled.shape), np.full(filled.shape, np.inf)
    for number, axis in enumerate(logs):
        lines, marks = np.moveaxis(filled, number, -1), np.moveaxis(known, number, -1)
        far = np.moveaxis(distance, number, -1)
        t, w, d = (np.moveaxis(a, number, -1) for a in (total, weight, nearest))
        for line in map(tuple, np.argwhere(marks.any(axis=-1) & ~marks.all(axis=-1)).tolist()):
            mark = marks[line]
            have, want = np.flatnonzero(mark), np.flatnonzero(~mark)
            if inside:
                want = want[(want > have[0]) & (want < have[-1])]
            after = np.clip(np.searchsorted(have, want), 0, len(have) - 1)
            before = np.clip(after - 1, 0, len(have) - 1)
            steps = np.minimum(np.abs(axis[want] - axis[have[before]]), np.abs(axis[have[after]] - axis[want]))
            trust = 1.0 / (steps + 1e-3)
            t[line][want] += trust * np.interp(axis[want], axis[have], lines[line][have])
            w[line][want] += trust
            d[line][want] = np.minimum(d[line][want], steps + np.minimum(far[line][have[before]], far[line][have[after]]))
    new = ~known & (weight > 0)
    filled[new] = total[new] / weight[new]
    distance[new] = nearest[new]
    return bool(new.any())


def _roughness(logs: tuple[Array, ...], values: Array) -> Array:
    """How far each point lies from the line through its two neighbours along each axis, averaged over axes and nearby;
    in units of the grid's mean."""
    misfit, count = np.zeros(values.shape), np.zeros(values.shape)
    for number, axis in enumerate(logs):
        if len(axis) < 3:
            continue
        v = np.moveaxis(values, number, -1)
        share = (axis[1:-1] - axis[:-2]) / (axis[2:] - axis[:-2])
        off = np.abs(v[..., 1:-1] - (v[..., :-2] * (1 - share) + v[..., 2:] * share))
        off = np.concatenate([off[..., :1], off, off[..., -1:]], axis=-1)
        padded = np.concatenate([off[..., :1], off, off[..., -1:]], axis=-1)
        smooth = (padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]) / 4
        misfit += np.moveaxis(smooth, -1, number)
        count += 1
    rough = misfit / np.maximum(count, 1)
    return np.asarray(rough / max(float(rough.mean()), 1e-6))


def monotone(values: Array) -> Array:
    """A nearby array that never falls along any axis.

    Along each axis the least-squares one (pool adjacent violators); what that leaves falling along earlier axes goes
    midway between the running maximum from below and the running minimum from above. A running maximum along one axis
    keeps the order along the others, so the result rises along all.
    """
    rising = values
    for axis in range(values.ndim):
        falls = (np.diff(rising, axis=axis) < 0).any(axis=axis)
        if not falls.any():
            continue
        lines = np.moveaxis(rising.copy(), axis, -1)
        for line in np.argwhere(falls):
            lines[tuple(line)] = _pool(lines[tuple(line)].tolist())
        rising = np.moveaxis(lines, -1, axis)
    for axis in range(values.ndim):
        if (np.diff(rising, axis=axis) < 0).any():
            up = np.maximum.accumulate(rising, axis=axis)
            down = np.flip(np.minimum.accumulate(np.flip(rising, axis), axis=axis), axis)
            rising = (up + down) / 2
    return rising


def _pool(line: list[float]) -> list[float]:
    """Pool adjacent violators: the nearest rising sequence in least squares."""
    means: list[float] = []
    counts: list[int] = []
    for value in line:
        means.append(value)
        counts.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            mean, count = means.pop(), counts.pop()
            means[-1] = (means[-1] * counts[-1] + mean * count) / (counts[-1] + count)
            counts[-1] += count
    return [mean for mean, count in zip(means, counts, strict=True) for _ in range(count)]
