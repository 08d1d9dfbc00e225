"""How far to trust an interpolation: leave points, engines or GPUs out and predict them from the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twin.cost.grid import Array, Grid
from twin.cost.interpolate import FREE_AXES, Interpolator, half_width, log_ratio
from twin.cost.profile import GpuPeaks, Profile, ProfileStore, Table

_SHEETS, _LINES = 16, 24  # of each table, as many sheets and as many fixed coordinates as are looked at


@dataclass(frozen=True)
class Misses:
    """Log errors of predictions (predicted / measured) and the log half widths that were promised with them."""

    operator: str
    attrs: Mapping[str, str]
    errors: Array
    halves: Array

    @property
    def covered(self) -> float:
        """The share of points inside their 80% interval."""
        return float(np.mean(np.abs(self.errors) <= self.halves))


def with_spread(table: Table, peaks: GpuPeaks, seed: int = 0) -> Table:
    """The table with `spread` measured, so that the interval covers 80% of a seeded fifth of its points, left out."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, table.n_points]))
    misses = []
    for sheet in _some(rng, len(table.sheets), 200):
        ratio = log_ratio(table, sheet, peaks)
        hidden = ~np.isnan(ratio) & (rng.random(ratio.shape) < 0.2)
        kept = np.where(hidden, np.nan, ratio)
        if hidden.any() and not np.isnan(kept).all():
            filled = Grid.fill(tuple(table.axes.values()), kept)
            misses.append(_scaled_misses(filled, table, hidden, ratio))
    return _spread_of(table, misses)


def with_spread_against(small: Table, full: Table, peaks: GpuPeaks) -> Table:
    """A thinned table with `spread` measured on the points that it lost."""
    number = {sheet: i for i, sheet in enumerate(full.sheets)}
    misses = []
    for i, sheet in enumerate(small.sheets[:200]):
        ratio = log_ratio(full, number[sheet], peaks)
        places = [np.isin(levels, small.axes[name]) for name, levels in full.axes.items()]
        lost = ~np.isnan(ratio) & ~np.logical_and.reduce(np.meshgrid(*places, indexing="ij"))
        if lost.any():
            filled = Grid.fill(tuple(small.axes.values()), log_ratio(small, i, peaks, full.least_s))
            misses.append(_scaled_misses(filled, full, lost, ratio))
    return _spread_of(small, misses)


def _scaled_misses(grid: Grid, table: Table, hidden: npt.NDArray[np.bool_], ratio: Array) -> Array:
    """Errors at the hidden points of `table`, in units of the half width that a spread of one would give."""
    points = [np.log2(np.maximum(np.asarray(levels), 2.0**-4))[i]
              for levels, i in zip(table.axes.values(), np.nonzero(hidden), strict=True)]
    value, gap, outside, rough = grid.read(points)
    return np.abs(value - ratio[hidden]) / half_width(1.0, gap, outside, rough)


def _spread_of(table: Table, misses: list[Array]) -> Table:
    errors = np.concatenate(misses) if misses else np.empty(0)
    return table if len(errors) < 3 else table.model_copy(update={"spread": round(float(np.quantile(errors, 0.8)), 4)})


def hold_out(profile: Profile, seed: int = 0, share: float = 0.2) -> Iterator[Misses]:
    """Hide a seeded share of the points of each table and predict them through the interpolator from the rest."""
    for number, table in enumerate(profile.tables):
        if table.n_points < 20:
            continue
        rng = np.random.default_rng(np.random.SeedSequence([seed, number]))
        sheets = _some(rng, len(table.sheets), _SHEETS)
        grids = [table.grid(s) for s in sheets]
        hidden = [~np.isnan(g) & (rng.random(g.shape) < share) for g in grids]
        keep = [k for k, (g, h) in enumerate(zip(grids, hidden, strict=True)) if (~np.isnan(g) & ~h).any()]
        rest = table.model_copy(update={
            "sheets": tuple(table.sheets[sheets[k]] for k in keep),
            "seconds": tuple(_row(np.where(hidden[k], np.nan, grids[k])) for k in keep)})
        rest = with_spread(rest, profile.peaks, seed + 1)
        alone = ProfileStore((profile.model_copy(update={"tables": (rest,)}),))
        asker = Interpolator(alone, profile.gpu, profile.engine, profile.engine_version)
        errors, halves = [], []
        for k in keep:
            for error, half in _ask(asker, table, sheets[k], hidden[k], rng):
                errors.append(error)
                halves.append(half)
        if errors:
            yield Misses(table.operator, table.attrs, np.concatenate(errors), np.concatenate(halves))


def across(store: ProfileStore, profile: Profile, seed: int = 0) -> Iterator[Misses]:
    """Predict the tables of `profile` from the other profiles of the store (another engine, another GPU)."""
    others = ProfileStore(tuple(p for p in store if p.id != profile.id))
    asker = Interpolator(others, profile.gpu, profile.engine, None, profile.peaks)
    for number, table in enumerate(profile.tables):
        if table.host_bound:
            continue
        rng = np.random.default_rng(np.random.SeedSequence([seed, number]))
        answers = []
        for sheet in _some(rng, len(table.sheets), _SHEETS // 3):
            grid = table.grid(sheet)
            answers += list(_ask(asker, table, sheet, ~np.isnan(grid) & (rng.random(grid.shape) < 0.2), rng))
        if answers:
            yield Misses(table.operator, table.attrs, *(np.concatenate(part) for part in zip(*answers, strict=True)))


def on_full_table(shipped: Profile, full: Profile, seed: int = 0) -> Iterator[Misses]:
    """What a thinned profile makes of the points that it was thinned from."""
    asker = Interpolator(ProfileStore((shipped,)), shipped.gpu, shipped.engine, shipped.engine_version)
    kept = {(t.operator, tuple(sorted(t.attrs.items()))) for t in shipped.tables}
    for number, table in enumerate(full.tables):
        if (table.operator, tuple(sorted(table.attrs.items()))) not in kept:
            continue
        rng = np.random.default_rng(np.random.SeedSequence([seed, number]))
        answers = [a for sheet in _some(rng, len(table.sheets), _SHEETS)
                   for a in _ask(asker, table, sheet, ~np.isnan(table.grid(sheet)), rng)]
        if answers:
            yield Misses(table.operator, table.attrs, *(np.concatenate(part) for part in zip(*answers, strict=True)))


def _ask(asker: Interpolator, table: Table, sheet: int, hidden: npt.NDArray[np.bool_],
         rng: np.random.Generator) -> Iterator[tuple[Array, Array]]:
    """Errors and half widths at the hidden points of one sheet, a curve for each combination of fixed coordinates."""
    free, names = FREE_AXES[table.operator], tuple(table.axes)
    grid, shape = table.grid(sheet), dict(zip(table.shape, table.sheets[sheet], strict=True))
    where = np.argwhere(hidden)
    if not len(where):
        return
    fixed_axes = [i for i, name in enumerate(names) if name not in free]
    lines = np.unique(where[:, fixed_axes], axis=0)
    for line in lines[_some(rng, len(lines), _LINES)]:
        at = where[(where[:, fixed_axes] == line).all(axis=1)]
        fixed = {names[i]: table.axes[names[i]][j] for i, j in zip(fixed_axes, line, strict=True)}
        curve = asker.curve(table.operator, {**shape, **fixed}, table.attrs)
        if curve is None:
            return
        point = [np.array([table.axes[name][j] for j in at[:, names.index(name)]]) for name in free]
        measured = grid[tuple(at.T)]
        yield np.log(curve.many(*point) / measured), curve.half_width(*point)


def _some(rng: np.random.Generator, count: int, most: int) -> list[int]:
    return sorted(rng.choice(count, most, replace=False).tolist()) if count > most else list(range(count))


def _row(values: Array) -> tuple[float | None, ...]:
    return tuple(None if math.isnan(v) else v for v in values.ravel().tolist())
