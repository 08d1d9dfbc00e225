"""Seconds of an operator from measured tables, with an 80% interval and where the number came from.

What is interpolated is the logarithm of measured / (launch + roofline), which varies slowly where seconds vary by
decades: near one where launching dominates, 1 / efficiency where work does. Roofline and launch latency carry a value
across the compute/memory knee, beyond the table, to a shape nobody measured and to another GPU; the interval widens
with each. The result is tabulated as a `Curve` over one or two free axes that rises along each of them and is nowhere
below the roofline; reading a curve costs about a microsecond.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from twin.cost.engines import OUR_ENGINE
from twin.cost.grid import Array, Grid, monotone
from twin.cost.profile import GpuPeaks, Profile, ProfileStore, Table, gpu_key, normal_window
from twin.cost.work import ENGINE_KERNELS, Attrs, equivalent_tokens
from twin.spec.base import Source

# The axes that a curve leaves free; the rest of a call (model shape, parallel sizes) is fixed for a whole simulation.
FREE_AXES: dict[str, tuple[str, ...]] = {
    "gemm": ("m",), "attention_prefill": ("batch", "new_tokens"), "attention_decode": ("batch", "context"),
    "mla_prefill": ("batch", "new_tokens"), "mla_decode": ("batch", "context"), "mla_bmm": ("tokens",),
    "moe": ("tokens",), "dispatch": ("tokens",), "combine": ("tokens",), "all_reduce": ("bytes",),
    "all_gather": ("bytes",), "reduce_scatter": ("bytes",), "all_to_all": ("bytes",),
    **dict.fromkeys(ENGINE_KERNELS, ("tokens",)),
}
_REACH = {"batch": 2.0**13, "context": 2.0**21, "new_tokens": 2.0**21, "bytes": 2.0**36}  # others: 2**22
# Two calls that differ in these are different operators: no ratio of rooflines leads from one to the other.
_HARD = ("scope", "mode", "side", "gated", "layout")
# What a mismatch costs in the search for the nearest evidence, and the 80% half width (log) that it adds. Measured by
# predicting whole engines and GPUs from the others (docs/profiles.md): the same engine on another GPU of the same
# generation tells more than another engine on the same GPU.
_VERSION, _GENERATION, _OTHER_GENERATION = (1.0, 0.05), (10.0, 0.16), (40.0, 0.55)
_ENGINE_PENALTY = 30.0
_OWN_KERNELS = 8.0  # times that, for what our engine measured: its kernels are nobody else's
_ENGINE_WIDTH = {"gemm": 0.25, "mla_bmm": 0.3, "mla_prefill": 0.35, "mla_decode": 0.35, "all_reduce": 0.4,
                 "attention_decode": 0.55, "attention_prefill": 0.65, "moe": 0.8, "combine": 0.9, "dispatch": 1.2}
_HOST_BOUND = (35.0, 0.70)  # another engine's kernels under a graph say more than one's own without
_ATTR = {"distribution": (4.0, 0.15), "kernel": (0.5, 0.15), "backend": (50.0, 0.5), "launch": (25.0, 0.5),
         "kv_dtype": (15.0, 0.2), "gemm_dtype": (500.0, 0.4), "dtype": (1000.0, 0.5)}
_SAME = (("yes", None), ("fused", None), ("kernel", None), (None, "fused"))  # (of a table, of a call): what goes unsaid
_OCTAVE_PENALTY = 6.0
_GENERATIONS = {"h100": "hopper", "h200": "hopper", "h800": "hopper", "h20": "hopper", "b200": "blackwell",
                "b300": "blackwell", "gb200": "blackwell", "gb300": "blackwell"}
_ON_LINKS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "dispatch", "combine")
# How far apart two shapes are: octaves of each number, weighed by how much kernels care.
_WEIGHT = {"top_k": 0.5, "experts": 0.7, "slots": 0.3, "sms": 1.0, "window": 0.3, "nodes": 4.0, "head_dim": 2.0}
_DEFAULTS = {"nodes": 1.0, "sms": 20.0, "moe_tp": 1.0, "moe_ep": 1.0, "window": 0.0, "past_tokens": 0.0}
_NEAREST_SHEETS = 4
_DEFAULT_SPREAD = 0.10


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of one call, the 80% interval around them, and the kind of evidence behind.

    `source` is measured | interpolated | transferred, `extrapolated` true beyond the table; `detail` names the profile
    and the table.
    """

    seconds: float
    low_s: float
    high_s: float
    source: Source
    extrapolated: bool = False
    detail: str = ""


class Curve:
    """Seconds over one or two free axes, tabulated on a log grid: straight in log-log between knots.

    Rises along every axis and stays at or above the roofline at each knot (and between knots too, as a roofline is
    convex in log-log). Arguments below the first knot count as the first knot, beyond the last as the last.
    """

    def __init__(self, axes: tuple[str, ...], knots: tuple[Array, ...], log_seconds: Array, half_width: Array,
                 kind: Array, detail: str, transferred: bool) -> None:
        self.axes, self.detail, self.transferred = axes, detail, transferred
        self._knots, self._log_s, self._half, self._kind = knots, log_seconds, half_width, kind
        self._logs = tuple(np.log(k) for k in knots)
        self._lists = [axis.tolist() for axis in self._logs]
        self._rows = log_seconds.tolist()
        self._estimates: dict[tuple[float, float | None], Estimate] = {}

    def __call__(self, x: float, y: float | None = None) -> float:
        """Seconds at a point; `y` where there are two axes."""
        xs, rows = self._lists[0], self._rows
        log_x = math.log(x) if x > 0 else xs[0]
        i = min(max(bisect_right(xs, log_x), 1), len(xs) - 1)
        u = (log_x - xs[i - 1]) / (xs[i] - xs[i - 1])
        u = 0.0 if u < 0 else min(u, 1.0)
        if y is None:
            return math.exp(rows[i - 1] + u * (rows[i] - rows[i - 1]))
        ys = self._lists[1]
        log_y = math.log(y) if y > 0 else ys[0]
        j = min(max(bisect_right(ys, log_y), 1), len(ys) - 1)
        v = (log_y - ys[j - 1]) / (ys[j] - ys[j - 1])
        v = 0.0 if v < 0 else min(v, 1.0)
        low, high = rows[i - 1], rows[i]
        at_low = low[j - 1] + v * (low[j] - low[j - 1])
        return math.exp(at_low + u * (high[j - 1] + v * (high[j] - high[j - 1]) - at_low))

    def many(self, x: Array, y: Array | None = None) -> Array:
        """Seconds at many points at once; `x` and `y` broadcast."""
        return np.asarray(np.exp(self._read(self._log_s, x, y)))

    def half_width(self, x: Array, y: Array | None = None) -> Array:
        """Half width of the 80% interval at many points, as a logarithm: low = seconds x exp(-half)."""
        return self._read(self._half, x, y)

    def estimate(self, x: float, y: float | None = None) -> Estimate:
        """Seconds with interval and source at one point; kept, as every model of a search asks for the same few."""
        if (x, y) not in self._estimates:
            self._estimates[x, y] = self.estimate_once(x, y)
        return self._estimates[x, y]

    def estimate_once(self, x: float, y: float | None = None) -> Estimate:
        """As `estimate`, and not kept: for many points that nobody asks for again."""
        point = [np.asarray(float(x))] + ([] if y is None else [np.asarray(float(y))])
        log_s, half = float(self._read(self._log_s, *point)), float(self._read(self._half, *point))
        kind = float(self._read(self._kind, *point))
        beyond = kind > 1 or any(p < k[0] * 0.99 or p > k[-1] * 1.01 for p, k in zip(point, self._knots, strict=True))
        source: Source = "transferred" if self.transferred else "measured" if kind < 0.02 else "interpolated"
        return Estimate(math.exp(log_s), math.exp(log_s - half), math.exp(log_s + half), source, beyond, self.detail)

    def _read(self, table: Array, x: Array, y: Array | None = None) -> Array:
        points = [np.log(np.maximum(p, 1e-9)) for p in ([x] if y is None else [x, y])]
        points = list(np.broadcast_arrays(*points))
        index, share = [], []
        for axis, point in zip(self._logs, points, strict=True):
            i = np.clip(np.searchsorted(axis, point, side="right"), 1, len(axis) - 1)
            index.append(i)
            share.append(np.clip((point - axis[i - 1]) / (axis[i] - axis[i - 1]), 0, 1))
        if len(points) == 1:
            low, high = table[index[0] - 1], table[index[0]]
            return np.asarray(low + share[0] * (high - low))
        (i, j), (u, v) = index, share
        at_low = table[i - 1, j - 1] + v * (table[i - 1, j] - table[i - 1, j - 1])
        at_high = table[i, j - 1] + v * (table[i, j] - table[i, j - 1])
        return np.asarray(at_low + u * (at_high - at_low))


@dataclass(frozen=True)
class _Choice:
    """The table that will answer, the sheets of it with their weights, and what had to be bridged."""

    profile: Profile
    table: Table
    sheets: tuple[tuple[int, float], ...]
    octaves: float
    bridged: float
    transferred: bool
    cost: float


class Interpolator:
    """Seconds for one (GPU, engine, version) from a store of profiles, nearest evidence first.

    `peaks` are the target GPU's; None takes those of the store's profile for that GPU. The search prefers, in this
    order: another version, another engine, another GPU (scaled by rooflines), another dtype; such answers
    say `transferred`. Curves are kept: asking again for the same shape costs a dictionary look-up.
    """

    def __init__(self, store: ProfileStore, gpu: str, engine: str, version: str | None = None,
                 peaks: GpuPeaks | None = None) -> None:
        self.store, self.gpu, self.engine, self.version = store, gpu_key(gpu), engine, version
        found = peaks or next((p.peaks for p in store if p.gpu == self.gpu), None)
        if found is None:
            raise KeyError(f"no profile of GPU {gpu!r}: give its peaks")
        self.peaks: GpuPeaks = found
        self._curves: dict[tuple[object, ...], Curve | None] = {}
        self._grids: dict[tuple[int, int], Grid] = {}

    def seconds(self, operator: str, values: Mapping[str, float], attrs: Attrs | None = None) -> Estimate | None:
        """One call. None where no table knows the operator: a roofline must answer then.

        `values` holds every number of the call by the table's names, `attrs` its words. A prefill with past tokens is
        read at the length with as many query-key pairs (`equivalent_tokens`).
        """
        free = FREE_AXES[operator]
        fixed = {name: float(v) for name, v in values.items() if name not in free and name != "past_tokens"}
        curve = self.curve(operator, fixed, attrs)
        if curve is None:
            return None
        point = [float(values[name]) for name in free]
        if values.get("past_tokens"):
            point[-1] = float(equivalent_tokens(point[-1], values["past_tokens"], values.get("window", 0)))
        found = curve.estimate_once(*point)
        if not values.get("past_tokens"):
            return found
        floor_s = float(self.peaks.roofline_s(operator, {**_DEFAULTS, **values}, attrs or {}))
        if found.seconds >= floor_s:
            return found
        return replace(found, seconds=floor_s, low_s=floor_s, high_s=max(found.high_s, floor_s))

    def curve(self, operator: str, fixed: Mapping[str, float], attrs: Attrs | None = None) -> Curve | None:
        """The curve over FREE_AXES[operator] with everything else fixed; None where no table knows the operator."""
        attrs = dict(attrs or {})
        key = (operator, tuple(sorted(fixed.items())), tuple(sorted(attrs.items())))
        if key not in self._curves:
            whole = {**_DEFAULTS, **{k: float(v) for k, v in fixed.items()}}
            whole["window"] = normal_window(whole["window"])
            whole.setdefault("slots", whole.get("experts", 1.0))
            whole.setdefault("ep", 8.0 * whole["nodes"])
            choice = self._choose(operator, whole, attrs)
            self._curves[key] = None if choice is None else self._tabulate(choice, operator, whole, attrs)
        return self._curves[key]

    def under(self, engine: str) -> Interpolator:
        """The same question asked of another engine: several take their kernels from the same libraries."""
        return Interpolator(self.store, self.gpu, engine, None, self.peaks)

    def _choose(self, operator: str, fixed: Mapping[str, float], attrs: Attrs) -> _Choice | None:
        best: _Choice | None = None
        for profile in self.store:
            if operator in ENGINE_KERNELS and profile.engine != self.engine:
                continue
            for table in profile.tables:
                if table.operator != operator:
                    continue
                below = math.inf if best is None else best.cost
                best = _match(profile, table, fixed, attrs, self._away(profile, table), below) or best
        return best

    def _away(self, profile: Profile, table: Table) -> list[tuple[float, float]]:
        """What lies between this profile and the target: (penalty, half width) of each difference."""
        away = []
        if profile.gpu != self.gpu:
            near = _GENERATIONS.get(profile.gpu, profile.gpu) == _GENERATIONS.get(self.gpu, self.gpu)
            away.append(_GENERATION if near else _OTHER_GENERATION)
        if profile.engine != self.engine and table.attrs.get("backend") != "nccl":
            lent = 1.0 if profile.engine != OUR_ENGINE else _OWN_KERNELS
            away.append((lent * _ENGINE_PENALTY, _ENGINE_WIDTH.get(table.operator, 0.0)))
        elif self.version not in (None, profile.engine_version) and profile.engine == self.engine:
            away.append(_VERSION)
        if table.host_bound:
            away.append(_HOST_BOUND)
        return away

    def _grid(self, profile: Profile, table: Table, sheet: int) -> Grid:
        key = (id(table), sheet)
        if key not in self._grids:
            self._grids[key] = Grid.fill(tuple(table.axes.values()), log_ratio(table, sheet, profile.peaks))
        return self._grids[key]

    def _tabulate(self, choice: _Choice, operator: str, fixed: Mapping[str, float], attrs: Attrs) -> Curve:
        table, free = choice.table, FREE_AXES[operator]
        knots = tuple(_knots(name, table.axes.get(name, ()), 8 if len(free) == 1 else 3) for name in free)
        mesh = dict(zip(free, np.meshgrid(*knots, indexing="ij"), strict=True))
        point = [np.log2(mesh.get(name, np.full(mesh[free[0]].shape, fixed.get(name, 1.0)))) for name in table.axes]
        total, half, kind = (np.zeros(mesh[free[0]].shape) for _ in range(3))
        spread = _DEFAULT_SPREAD if table.spread is None else table.spread
        for sheet, weight in choice.sheets:
            ratio, gap, outside, rough = self._grid(choice.profile, table, sheet).read(point)
            total += weight * ratio
            half += weight * half_width(spread, gap, outside, rough)
            kind = np.maximum(kind, np.where(outside > 0.05, 1.0 + outside, np.minimum(gap, 1.0)))
        peaks = self.peaks if choice.profile.gpu != self.gpu else choice.profile.peaks
        floor_s = np.broadcast_to(peaks.roofline_s(operator, {**fixed, **mesh}, {**table.attrs, **attrs}), total.shape)
        log_s = monotone(np.log(self._transferred_s(choice, operator, floor_s, total, {**fixed, **mesh}, attrs)))
        log_s = np.maximum(log_s, np.log(np.maximum(monotone(floor_s), 1e-12)))
        half = np.sqrt(half**2 + choice.bridged**2 + (0.12 * choice.octaves) ** 2)
        kind = np.maximum(kind, 1.5 if choice.octaves > 3 else 0.5 if choice.octaves > 0 else 0.0)
        detail = f"{choice.profile.id}: {table.source}"
        return Curve(free, knots, log_s, half, kind, detail, choice.transferred)


    def _transferred_s(self, choice: _Choice, operator: str, floor_s: Array, ratio: Array, values: Mapping[str, Any],
                       attrs: Attrs) -> Array:
        """Seconds here, from the log of measured over launch + roofline there: in proportion to it, or from a GPU of the
        same generation as much above it as there. What a kernel takes above its roofline is latency and instructions, whatever
        tensor cores and memory reach: H200 from H100 and back errs 3 to 7% by it (median of an operator), else 4 to 13%."""
        source, table = choice.profile, choice.table
        near = source.gpu != self.gpu and _GENERATIONS.get(source.gpu, "") == _GENERATIONS.get(self.gpu)
        if not near or operator in _ON_LINKS:
            return np.asarray((table.least_s + floor_s) * np.exp(ratio))
        there_s = np.broadcast_to(source.peaks.roofline_s(operator, values, {**table.attrs, **attrs}), ratio.shape)
        above_s = np.maximum((table.least_s + there_s) * np.exp(ratio) - there_s, 0.0)
        return np.asarray(floor_s + above_s)


def log_ratio(table: Table, sheet: int, peaks: GpuPeaks, launch: float | None = None) -> Array:
    """What is interpolated: the log of measured over launch + roofline, on the grid of one sheet (nan: not measured)."""
    yardstick = peaks.roofline_s(table.operator, table.values(sheet), table.attrs) + (launch or table.least_s)
    return np.asarray(np.log(table.grid(sheet)) - np.log(yardstick))


def half_width(spread: float, gap: Array, outside: Array, rough: Array) -> Array:
    """80% half width (log): the table's spread, more where the table is rough, half of it on a measured point, and more
    the farther from one."""
    off = gap / (gap + 0.05)  # 0 on a measured point, near 1 a twentieth of an octave away
    near = spread * (0.4 + 0.6 * np.minimum(rough, 4.0)) * (0.5 + 0.5 * off)
    return np.asarray(np.maximum(near, 0.005) + 0.10 * np.maximum(gap - 1, 0) + 0.10 * outside)


def _knots(name: str, levels: tuple[float, ...], an_octave: int) -> Array:
    """A table's own levels, and enough points between and beyond them for straight lines to follow the curve."""
    reach = _REACH.get(name, 2.0**22)
    own = sorted({level for level in levels if level > 0} | {1.0, reach})
    knots = [own[0]]
    for low, high in itertools.pairwise(own):
        steps = max(2, math.ceil(math.log2(high / low) * an_octave - 1e-9))
        knots += [low * (high / low) ** (k / steps) for k in range(1, steps + 1)]
    return np.array(knots)


def _match(profile: Profile, table: Table, fixed: Mapping[str, float], attrs: Attrs,
           away: list[tuple[float, float]], below: float) -> _Choice | None:
    """How well a table answers a call; None where it cannot, or not at a cost `below` what is found already."""
    gaps, unnamed = list(away), 0
    for name in sorted(set(table.attrs) | set(attrs)):
        have, want = table.attrs.get(name), attrs.get(name)
        if name in _HARD and have != want and (have, want) not in _SAME:
            return None
        if have is not None and want is not None and have != want:
            gaps.append(_ATTR.get(name, (20.0, 0.3)))
        unnamed += have != want
    cost = sum(penalty for penalty, _ in gaps) + 0.01 * unnamed
    if cost >= below:
        return None
    sheets, octaves = nearest_sheets(table, fixed)
    cost += _OCTAVE_PENALTY * octaves
    if cost >= below:
        return None
    bridged = math.sqrt(sum(half**2 for _, half in gaps))
    return _Choice(profile, table, sheets, octaves, bridged, bool(gaps), cost)


def nearest_sheets(table: Table, fixed: Mapping[str, float]) -> tuple[tuple[tuple[int, float], ...], float]:
    """Sheets with weights that sum to one, and how many octaves away the nearest is. An exact sheet stands alone."""
    if not table.shape:
        return ((0, 1.0),), 0.0
    known = [(i, name) for i, name in enumerate(table.shape) if name in fixed]
    have = table.log_sheets if len(known) == len(table.shape) else table.log_sheets[:, [i for i, _ in known]]
    want = np.log2(np.array([max(fixed[name], 1e-3) for _, name in known]))
    weights = np.array([_WEIGHT.get(name, 1.0) for _, name in known])
    away = np.minimum(np.abs(have - want), 8.0) @ weights
    order = np.argsort(away, kind="stable")[:_NEAREST_SHEETS]
    if away[order[0]] < 1e-6:
        return ((int(order[0]), 1.0),), 0.0
    closeness = 1.0 / away[order] ** 2
    closeness /= closeness.sum()
    return tuple((int(i), float(w)) for i, w in zip(order, closeness, strict=True)), float(away[order[0]])
