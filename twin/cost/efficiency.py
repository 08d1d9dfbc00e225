"""What part of peak an operator reaches: launch latency and two efficiencies fitted to measured tables.

    seconds = launch_s + max(flops / (peak x compute), bytes / (bandwidth x memory), wire / (link x wire))

Where no profile covers a call, a roofline with these answers. Fitted by the smallest mean absolute log error, so that
no single point, and no host-bound half of a table, decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from twin.cost.grid import Array
from twin.cost.profile import Profile, Table, gpu_key
from twin.cost.work import work_of
from twin.spec.base import Spec

Share = Annotated[float, Field(gt=0, le=1)]
_MOST_POINTS = 1500


class FittedEfficiency(Spec):
    """One fit. `compute`, `memory` and `wire` are null where the tables never were bound by them.

    `spread` is the 80% half width of the log error of the fit; `host_bound` as in Table.
    """

    gpu: str
    engine: str
    operator: str
    variant: str = ""
    dtype: str = ""
    launch_s: float
    compute: Share | None
    memory: Share | None
    wire: Share | None
    spread: float
    points: int
    host_bound: bool = False


class EfficiencyFile(Spec):
    """All fits, best engine first for each (gpu, operator, variant, dtype)."""

    format: Literal["eptwin-efficiency-1"] = "eptwin-efficiency-1"
    source: str
    license: str
    fits: tuple[FittedEfficiency, ...]

    def find(self, gpu: str, operator: str, dtype: str, engine: str | None = None, variant: str = "") -> FittedEfficiency | None:
        """The fit for a call: of that engine, else of the engine whose fit is best; None where there is none."""
        key = gpu_key(gpu)
        fits = [f for f in self.fits if (f.gpu, f.operator, f.variant) == (key, operator, variant) and f.dtype in (dtype, "")]
        own = [f for f in fits if f.engine == engine and not f.host_bound]
        return next(iter(own or [f for f in fits if not f.host_bound] or fits), None)


def load_efficiency(path: Path | None = None) -> EfficiencyFile:
    """The fits that ship with the package, or those of a file."""
    path = path or Path(__file__).parent / "profiles" / "efficiency.json"
    return EfficiencyFile.model_validate_json(path.read_bytes())


def variant_of(table: Table) -> str:
    """What splits an operator's tables into kernels too unlike to share a fit."""
    a = table.attrs
    return a.get("scope") or a.get("layout") or "/".join(x for x in (a.get("backend"), a.get("mode"), a.get("launch")) if x)


def fit_profile(profile: Profile, seed: int = 0) -> list[FittedEfficiency]:
    """One fit for each (operator, variant, dtype) of a profile."""
    groups: dict[tuple[str, str, str], list[Table]] = {}
    for table in profile.tables:
        kv = table.attrs.get("kv_dtype", "") if "decode" in table.operator else ""
        dtype = table.attrs.get("gemm_dtype") or kv or table.attrs.get("dtype", "")
        groups.setdefault((table.operator, variant_of(table), dtype), []).append(table)
    return [_fit_group(profile, key, groups[key], seed) for key in sorted(groups)]


def _fit_group(profile: Profile, key: tuple[str, str, str], tables: Sequence[Table], seed: int) -> FittedEfficiency:
    points = np.concatenate([_bounds(profile, table) for table in tables], axis=1)
    rng = np.random.default_rng(np.random.SeedSequence([seed, points.shape[1]]))
    if points.shape[1] > _MOST_POINTS:
        points = points[:, np.sort(rng.choice(points.shape[1], _MOST_POINTS, replace=False))]
    seconds, bounds = points[0], points[1:]
    launch_s, shares = _fit(seconds, bounds)
    predicted = launch_s + np.max([b / s for b, s in zip(bounds, shares, strict=True)], axis=0)
    spread = float(np.quantile(np.abs(np.log(predicted / seconds)), 0.8))
    binding = np.argmax([b / s for b, s in zip(bounds, shares, strict=True)], axis=0)
    binding = binding[predicted > 1.5 * launch_s]  # where work, not launching, sets the pace
    compute, memory, wire = (round(s, 4) if np.sum(binding == i) >= 8 else None for i, s in enumerate(shares))
    return FittedEfficiency(gpu=profile.gpu, engine=profile.engine, operator=key[0], variant=key[1], dtype=key[2],
                            launch_s=float(f"{launch_s:.3g}"), compute=compute, memory=memory, wire=wire,
                            spread=round(spread, 3), points=points.shape[1], host_bound=any(t.host_bound for t in tables))


def _bounds(profile: Profile, table: Table) -> Array:
    """[4, n]: measured seconds and the compute, HBM and wire bounds at full efficiency."""
    peaks, columns = profile.peaks, []
    for sheet in range(len(table.sheets)):
        grid, work = table.grid(sheet), work_of(table.operator, table.values(sheet), table.attrs)
        wire_s = np.maximum(work.link_bytes / peaks.nvlink_bytes_per_s, work.nic_bytes / peaks.nic_bytes_per_s)
        parts = (grid, work.flops / peaks.flop_per_s(work.rate), work.hbm_bytes / peaks.hbm_bytes_per_s, wire_s)
        stacked = np.stack([np.broadcast_to(part, grid.shape).ravel() for part in parts])
        columns.append(stacked[:, ~np.isnan(stacked[0])])
    return np.concatenate(columns, axis=1)


def _fit(seconds: Array, bounds: Array) -> tuple[float, list[float]]:
    """launch_s and one share for each bound, by coordinate descent on a shrinking log grid (smallest mean log error)."""
    guess = np.array([np.quantile(seconds, 0.05), 0.6, 0.7, 0.7])
    low, high = np.array([seconds.min() / 4, 0.02, 0.02, 0.02]), np.array([np.median(seconds), 1.0, 1.0, 1.0])
    high = np.maximum(high, low)

    def error(x: Array) -> float:
        predicted = x[0] + np.max(bounds / x[1:, None], axis=0)
        return float(np.mean(np.abs(np.log(predicted / seconds))))

    for width in (4.0, 2.0, 1.4, 1.2, 1.1, 1.05, 1.02, 1.01):
        for _ in range(3):
            for i in range(4):
                tries = np.clip(guess[i] * width ** np.linspace(-1, 1, 9), low[i], high[i])
                scores = [error(np.where(np.arange(4) == i, t, guess)) for t in tries]
                guess[i] = tries[int(np.argmin(scores))]
    return float(guess[0]), guess[1:].tolist()


def best_first(fits: Iterable[FittedEfficiency]) -> tuple[FittedEfficiency, ...]:
    """Sorted by what they describe; within that, the fit with the higher efficiency first."""
    def key(f: FittedEfficiency) -> tuple[str, str, str, str, float, str]:
        reached = max(f.compute or 0.0, f.memory or 0.0, f.wire or 0.0)
        return f.gpu, f.operator, f.variant, f.dtype, -reached, f.engine
    return tuple(sorted(fits, key=key))
