"""Which experts tokens go to: popularity by layer, loads by rank, and the chance that a token touches a rank or a node.

Legend of shapes: L MoE layers (or distinct ones), E experts, S slots (physical experts), R ranks, G groups.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twin.cost.batch import Array
from twin.cost.drift import Drift, Recorded, layer_scores
from twin.policy.placement import Placement, linear, place_global, place_hierarchical, slots_to_ranks
from twin.policy.replica_split import split_over_replicas
from twin.spec.errors import SpecError
from twin.spec.model import ModelSpec, MoE
from twin.spec.plan import PoolPlan
from twin.spec.scenario import Routing

Ints = npt.NDArray[np.int64]
_MAX_SUBSETS = 512  # more selections of groups than this are sampled


def popularity(model: ModelSpec, routing: Routing, seed: int = 0) -> Array:
    """Share of the token-expert pairs that each expert gets, rows sum to 1: [L, E].

    A single row when all layers are alike (uniform). zipf: share ~ rank^-alpha; lognormal: exp(sigma z); each layer
    orders its experts by its own permutation, or by scores that are correlated between layers. matrix: from a CSV (or the
    "loads" of a JSON file, or the first of its "windows"), one row a layer (rows are reused in turn when the model has more
    layers). Raises SpecError for a file that does not fit.
    """
    assert model.moe is not None
    experts, layers = model.moe.experts, model.moe_layers
    if routing.kind == "matrix":
        return _from_file(Path(routing.file or ""), experts, layers)
    if routing.kind == "uniform" or (routing.kind == "zipf" and routing.alpha == 0) or \
            (routing.kind == "lognormal" and routing.sigma == 0):
        return np.full((1, experts), 1.0 / experts)
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0x65787065]))  # the stream named "expe"
    if routing.layer_correlation:
        scores_LE = layer_scores(layers, experts, routing.layer_correlation, rng)
        ranks = np.argsort(np.argsort(-scores_LE, axis=1, kind="stable"), axis=1)
        weights = (ranks + 1.0) ** -routing.alpha if routing.kind == "zipf" else np.exp(routing.sigma * scores_LE)
    elif routing.kind == "zipf":
        base = np.arange(1, experts + 1, dtype=float) ** -routing.alpha
        weights = np.stack([rng.permutation(base) for _ in range(layers)])
    else:
        weights = np.exp(routing.sigma * rng.standard_normal((layers, experts)))
    # no expert gets more than one of a token's top-k choices
    return _capped(weights / weights.sum(axis=1, keepdims=True), 1.0 / model.moe.top_k)


def _capped(shares: Array, cap: float) -> Array:
    """Shares with none above `cap`, the excess spread over the others in proportion."""
    for _ in range(64):
        over = shares > cap
        if not over.any():
            break
        clipped = np.where(over, cap, 0.0)
        rest = np.where(over, 0.0, shares)
        room = 1.0 - clipped.sum(axis=1, keepdims=True)
        shares = clipped + rest * room / np.maximum(rest.sum(axis=1, keepdims=True), 1e-300)
    return np.minimum(shares, cap)


def over_time(model: ModelSpec, routing: Routing, first_LE: Array, stream: np.random.Generator) -> Drift | Recorded | None:
    """How popularity changes from `first_LE` on: by drift, as the file's windows have it, or not at all."""
    assert model.moe is not None
    path, windows = Path(routing.file or ""), []
    if routing.kind == "matrix" and path.suffix == ".json":
        windows = _tables(path)[0]
    if len(windows) < 2:
        return None if routing.drift_half_life_s is None else Drift(first_LE, routing, stream)
    if routing.drift_half_life_s is not None:
        raise SpecError("popularity follows the file's windows, and cannot drift as well", file=path,
                        field="routing.drift_half_life_s")
    window_s = _tables(path)[1]
    return Recorded([_shares(rows, path, model.moe.experts, model.moe_layers) for rows in windows], window_s)


def _from_file(path: Path, experts: int, layers: int) -> Array:
    """The loads of a file, of its first window where it has several."""
    return _shares(_tables(path)[0][0], path, experts, layers)


def _tables(path: Path) -> tuple[list[Any], float]:
    """The tables of a file, yet to be checked, and the seconds that each stands for (0 for one that stands for all)."""
    try:
        with path.open(newline="", encoding="utf-8") as handle:
            if path.suffix != ".json":
                return [[row for row in csv.reader(handle) if row]], 0.0
            data = json.load(handle)
            if "windows" not in data:
                return [data["loads"]], 0.0
            windows, window_s = list(data["windows"]), float(data["window_s"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as err:
        raise SpecError(f"cannot read the expert loads: {err}", file=path, field="routing.file") from None
    if not windows or not 1e-3 <= window_s <= 1e9:
        raise SpecError("a recording needs windows, and window_s of at least a millisecond", file=path, field="routing.file")
    return windows, window_s


def _shares(rows: Any, path: Path, experts: int, layers: int) -> Array:
    """Shares [L, E] of one table of loads."""
    try:
        table = np.array([[float(cell) for cell in row] for row in rows])
    except (ValueError, TypeError):
        try:  # one header line
            table = np.array([[float(cell) for cell in row] for row in rows[1:]])
        except (ValueError, TypeError, KeyError) as err:
            raise SpecError(f"not a table of numbers: {err}", file=path, field="routing.file") from None
    if table.ndim != 2 or table.shape[1] != experts:
        raise SpecError(f"expert loads have shape {table.shape}", file=path, field="routing.file",
                        expected=f"one row a layer, {experts} columns")
    if not np.isfinite(table).all() or (table < 0).any() or (table.sum(axis=1) <= 0).any():
        raise SpecError("expert loads must be finite, not negative, and not all zero in a layer", file=path, field="routing.file")
    table = table / table.sum(axis=1, keepdims=True)
    return np.asarray(table[np.arange(layers) % len(table)])


def place(model: ModelSpec, pool: PoolPlan, popularity_LE: Array, domains: int) -> Placement:
    """The pool's placement over its EP ranks, for the popularity that it was made from: [L, S] slots."""
    assert model.moe is not None
    moe = model.moe
    slots = moe.experts + pool.redundant_experts
    if pool.placement == "linear":
        return linear(len(popularity_LE), moe.experts, pool.ep, pool.redundant_experts)
    if pool.placement == "eplb_hierarchical" and pool.ep % domains == 0 and slots % domains == 0:
        return place_hierarchical(popularity_LE, slots, pool.ep, domains, moe.groups)
    return place_global(popularity_LE, slots, pool.ep)


def slot_shares(popularity_LE: Array, placement: Placement, *, split: bool = False) -> Array:
    """Share of the pairs by slot [L, S]: replicas of an expert share evenly, or (`split`) so that ranks are even."""
    if split and placement.num_slots > placement.num_experts:
        return _split(placement, np.ascontiguousarray(popularity_LE).tobytes())
    each = popularity_LE / placement.replica_count
    return np.take_along_axis(each, placement.slot_to_logical, axis=1)


@lru_cache(maxsize=64)
def _split(placement: Placement, popularity: bytes) -> Array:
    """`split_over_replicas` once for all pools of a search that are placed alike."""
    shares_LE = np.frombuffer(popularity).reshape(placement.num_layers, -1)
    found: Array = np.asarray(split_over_replicas(shares_LE, placement), dtype=np.float64)
    found.setflags(write=False)
    return found


def touch_probability(moe: MoE, popularity_E: Array, slot_expert_S: Ints, owner_S: Ints, owners: int) -> Array:
    """Chance that a token has at least one of its top-k on each owner (a rank, or a node): [owners].

    k draws without replacement. Equal experts: hypergeometric. Unequal: the product of 1 - k s over an owner's slots,
    corrected by what drawing without replacement changes for equal experts of the same total. Group-limited routing
    averages over the sets of groups a token may keep; a group is kept for its best experts, so each kept group is drawn
    from once, and the rest of the k from all kept ones.
    """
    copies = np.bincount(slot_expert_S, minlength=moe.experts)
    by_slot = (popularity_E / np.maximum(copies, 1))[slot_expert_S]
    if moe.top_k_groups < moe.groups:
        return _touch_grouped(moe, popularity_E, by_slot, slot_expert_S, owner_S, owners)
    share = np.bincount(owner_S, weights=by_slot, minlength=owners)
    slots = np.maximum(np.bincount(owner_S, minlength=owners), 1)
    apart = np.bincount(owner_S, weights=np.log1p(-np.minimum(moe.top_k * by_slot, 1 - 1e-12)), minlength=owners)
    equal = slots * np.log1p(-np.minimum(moe.top_k * share / slots, 1 - 1e-12))
    drawn = np.arange(moe.top_k)[:, None] / moe.experts
    without = np.prod(np.clip(1.0 - share / (1.0 - drawn), 0.0, 1.0), axis=0)
    return np.asarray(1.0 - np.clip(without * np.exp(apart - equal), 0.0, 1.0))


def _touch_grouped(moe: MoE, popularity_E: Array, by_slot: Array, slot_expert_S: Ints, owner_S: Ints, owners: int) -> Array:
    group_of_slot = slot_expert_S // (moe.experts // moe.groups)
    share_OG = np.zeros((owners, moe.groups))
    np.add.at(share_OG, (owner_S, group_of_slot), by_slot)
    group_share = popularity_E.reshape(moe.groups, -1).sum(axis=1)
    keep, weight = _group_sets(moe.groups, moe.top_k_groups, group_share)
    share = (share_OG @ keep.T) / (keep @ group_share)  # [owners, sets]
    missed = np.log(np.maximum(1.0 - share_OG / np.maximum(group_share, 1e-30), 1e-30))
    first = min(moe.top_k_groups, moe.top_k)
    untouched = np.exp((missed @ keep.T) * (first / moe.top_k_groups))
    within = moe.experts * moe.top_k_groups / moe.groups
    for i in range(first, moe.top_k):
        untouched *= np.clip(1.0 - share / (1.0 - i / within), 0.0, 1.0)
    return np.asarray((1.0 - untouched) @ weight)


def _group_sets(groups: int, keep: int, share_G: Array) -> tuple[Array, Array]:
    """Sets of groups that a token may keep, as 0/1 rows [sets, G], and their chances, popular groups more often."""
    if keep >= groups:
        return np.ones((1, groups)), np.ones(1)
    if math.comb(groups, keep) <= _MAX_SUBSETS:
        members = np.array(list(itertools.combinations(range(groups), keep)))
    else:
        rng = np.random.default_rng(0)
        members = np.stack([rng.permutation(groups)[:keep] for _ in range(_MAX_SUBSETS)])
    rows = np.zeros((len(members), groups))
    rows[np.arange(len(members))[:, None], members] = 1.0
    weight = np.prod(share_G[members] * groups, axis=1)
    return rows, weight / weight.sum()


def sample_top_k(moe: MoE, popularity_E: Array, tokens: int, rng: np.random.Generator) -> Ints:
    """Expert choices of `tokens` tokens, [tokens, k]: Gumbel top-k by popularity, group-limited as the gate does it
    (a group's score is the sum of its two best). Marginals follow `popularity` for one draw."""
    scores = np.log(np.maximum(popularity_E, 1e-30)) + rng.gumbel(size=(tokens, moe.experts))
    if moe.top_k_groups < moe.groups:
        grouped = scores.reshape(tokens, moe.groups, -1)
        best_two = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
        kept = np.argpartition(-best_two, moe.top_k_groups - 1, axis=1)[:, : moe.top_k_groups]
        mask = np.full((tokens, moe.groups), -np.inf)
        np.put_along_axis(mask, kept, 0.0, axis=1)
        scores = (grouped + mask[:, :, None]).reshape(tokens, -1)
    return np.argpartition(-scores, moe.top_k - 1, axis=1)[:, : moe.top_k].astype(np.int64)


def expected_max(mean_LR: Array, variance_LR: Array, ranks_kept: int = 12) -> Array:
    """Expected largest of independent normal loads, by row: [L]. Where means differ, the likeliest winners are kept."""
    mean, std = mean_LR, np.sqrt(np.maximum(variance_LR, 1e-30))
    if mean.shape[1] == 1:
        return np.asarray(mean[:, 0])
    if np.allclose(mean, mean[:, :1], rtol=1e-9) and np.allclose(std, std[:, :1], rtol=1e-9):
        one = np.zeros((1, mean.shape[1]))
        return np.asarray(mean[:, 0] + std[:, 0] * _integrate_max(one, one + 1.0, 65)[0])
    if mean.shape[1] > ranks_kept:
        top = np.argpartition(-(mean + 2 * std), ranks_kept - 1, axis=1)[:, :ranks_kept]
        mean, std = np.take_along_axis(mean, top, 1), np.take_along_axis(std, top, 1)
    return _integrate_max(mean, std, 15)


@lru_cache(maxsize=256)
def typical_max(count: int) -> float:
    """Expected largest of `count` standard normal numbers."""
    return float(expected_max(np.zeros((1, count)), np.ones((1, count)))[0])


def _integrate_max(mean: Array, std: Array, points: int) -> Array:
    """E[max] = high - integral of prod F(x) over [low, high], which hold all but 1e-5 of the mass."""
    low = (mean - 4.5 * std).max(axis=1)
    high = (mean + 4.5 * std).max(axis=1)
    x = low[:, None] + (high - low)[:, None] * np.linspace(0.0, 1.0, points)
    below = np.prod(_normal_cdf((x[:, None, :] - mean[:, :, None]) / std[:, :, None]), axis=1)
    return np.asarray(high - np.trapezoid(below, x, axis=1))


_REACH, _FINE = 5, 200  # the normal distribution function is tabulated on [-5, 5], 200 points a unit
_CDF: Array = np.array([(1.0 + math.erf(i / (_FINE * math.sqrt(2.0)))) / 2 for i in range(-_REACH * _FINE, _REACH * _FINE + 1)])


def _normal_cdf(z: Array) -> Array:
    """Normal distribution function, true to 0.001: expected maxima integrate over it."""
    return _CDF[np.clip((z + _REACH) * _FINE + 0.5, 0, len(_CDF) - 1).astype(np.intp)]


def load_variance(moe: MoE, tokens: Array, rank_shares: Array) -> Array:
    """Variance of a rank's pairs when tokens route independently.

    A token's k draws without replacement leave k s (1 - s) (E - k) / (E - 1) of variance to a rank of share s.
    """
    shrink = (moe.experts - moe.top_k) / max(moe.experts - 1, 1)
    return np.asarray(tokens * moe.top_k * rank_shares * (1 - rank_shares) * shrink)


def split_variance(moe: MoE, placement: Placement, popularity_LE: Array, variance: Array, tokens: Array, senders: int) -> Array:
    """What remains of `variance` [g, L, R] where each of `senders` ranks evens out its own batch over replicas.

    A sender levels ranks to within a token (half a token of deviation each), as far as ranks hold replicas: by half of what
    they carry on average a rank may be above the rest and still be levelled.
    """
    several = placement.replica_count > 1
    carried_LS = np.take_along_axis(np.where(several, popularity_LE / placement.replica_count, 0.0), placement.slot_to_logical, 1)
    movable = tokens / senders * moe.top_k * slots_to_ranks(carried_LS, placement) / 2
    alike = np.sqrt(variance / senders)
    return np.asarray(senders * np.minimum(alike, np.maximum(alike - movable, 0.5)) ** 2)
