"""Expert placement (EPLB): which logical expert sits in which physical slot, and how evenly ranks are loaded then.

Slots are numbered through the instance; rank r owns slots r*K .. r*K + K-1 of every layer. Shapes: L layers, E logical
experts, S slots, R ranks, K = S / R. A load is any number per expert that work grows with (tokens, usually).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twin.policy.packing import Floats, Ints, balanced_groups, pack, replicate
from twin.spec.errors import Problem, SpecError


@dataclass(frozen=True, eq=False)
class Placement:
    """`slot_to_logical[l, s]` is the expert in slot s of layer l. Every expert has a slot in every layer.

    Arrays are read-only. Raises SpecError when slots do not divide over ranks or an expert has no slot.
    """

    slot_to_logical: Ints
    num_ranks: int

    def __post_init__(self) -> None:
        slots_LS = np.array(self.slot_to_logical, dtype=np.int64)
        if slots_LS.ndim != 2 or not slots_LS.size or slots_LS.min() < 0:
            raise SpecError(f"has shape {slots_LS.shape}", field="slot_to_logical", expected="[layers, slots] of ids >= 0")
        check_division(slots_LS.shape[1], self.num_ranks)
        slots_LS.setflags(write=False)
        object.__setattr__(self, "slot_to_logical", slots_LS)
        if slots_LS.max() >= slots_LS.shape[1] or (self.replica_count == 0).any():
            layer, expert = (0, int(slots_LS.max())) if slots_LS.max() >= slots_LS.shape[1] else (
                int(axis[0]) for axis in np.nonzero(self.replica_count == 0))
            raise SpecError(f"expert {expert} of layer {layer} or one below it has no slot", field="slot_to_logical",
                            expected="every expert in at least one slot of every layer")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return self.num_ranks == other.num_ranks and np.array_equal(self.slot_to_logical, other.slot_to_logical)

    def __hash__(self) -> int:
        return hash((self.num_ranks, self.slot_to_logical.tobytes()))

    @property
    def num_layers(self) -> int:
        return int(self.slot_to_logical.shape[0])

    @property
    def num_slots(self) -> int:
        return int(self.slot_to_logical.shape[1])

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.num_ranks

    @cached_property
    def num_experts(self) -> int:
        return int(self.slot_to_logical.max()) + 1

    @cached_property
    def rank_of_slot(self) -> Ints:
        """[S]"""
        return np.arange(self.num_slots) // self.slots_per_rank

    @cached_property
    def replica_count(self) -> Ints:
        """[L, E]"""
        L, E = self.num_layers, self.num_experts
        flat = self.slot_to_logical + np.arange(L)[:, None] * E
        return np.bincount(flat.ravel(), minlength=L * E).reshape(L, E)

    @cached_property
    def logical_to_slots(self) -> Ints:
        """[L, E, most replicas]: the slots of each expert in rising order, padded with -1."""
        L, S, E = self.num_layers, self.num_slots, self.num_experts
        order_LS = np.argsort(self.slot_to_logical, axis=1, kind="stable")
        expert_LS = np.take_along_axis(self.slot_to_logical, order_LS, 1)
        first_LE = np.cumsum(self.replica_count, axis=1) - self.replica_count
        nth_LS = np.arange(S) - np.take_along_axis(first_LE, expert_LS, 1)
        slots = np.full((L, E, int(self.replica_count.max())), -1, dtype=np.int64)
        slots[np.arange(L)[:, None], expert_LS, nth_LS] = order_LS
        return slots


def linear(num_layers: int, num_experts: int, num_ranks: int, num_redundant: int = 0) -> Placement:
    """Experts in order, then the first `num_redundant` of them again (wrapping round)."""
    num_slots = num_experts + num_redundant
    _check_slots(num_experts, num_slots, num_ranks)
    return Placement(np.tile(np.arange(num_slots) % num_experts, (num_layers, 1)), num_ranks)


def place_global(load_LE: ArrayLike, num_slots: int, num_ranks: int) -> Placement:
    """The best placement over all ranks as equals. Never worse than `linear` with as many slots, in any layer."""
    load = checked_load(load_LE)
    L, E = load.shape
    _check_slots(E, num_slots, num_ranks)
    found = Placement(_solve(load, num_slots, num_ranks), num_ranks)
    plain = linear(L, E, num_ranks, num_slots - E)
    better_L = imbalance(load, found) <= imbalance(load, plain)
    if better_L.all():
        return found
    return Placement(np.where(better_L[:, None], found.slot_to_logical, plain.slot_to_logical), num_ranks)


def place_hierarchical(load_LE: ArrayLike, num_slots: int, num_ranks: int, num_nodes: int, num_groups: int) -> Placement:
    """Whole expert groups stay on one node, so that group-limited routing reaches few nodes.

    Groups are dealt over nodes by load, then each node replicates and packs its own experts. Where groups do not divide
    over nodes this is `place_global`, as in EPLB. Raises SpecError naming what else does not divide.
    """
    load = checked_load(load_LE)
    L, E = load.shape
    problems = [Problem(f"{what} = {a} does not divide over {by} = {b}", field=what, expected=f"a multiple of {b}")
                for what, a, by, b in (("num_experts", E, "num_groups", num_groups),
                                       ("num_ranks", num_ranks, "num_nodes", num_nodes)) if b < 1 or a % b]
    if problems:
        raise SpecError(problems)
    if num_groups % num_nodes:
        return place_global(load, num_slots, num_ranks)
    _check_slots(E, num_slots, num_ranks, num_nodes)
    size = E // num_groups
    node_LG = balanced_groups(load.reshape(L, num_groups, size).sum(axis=2), num_nodes)
    group_LG = np.argsort(node_LG, axis=1, kind="stable")  # groups of node 0, then of node 1, ...
    expert_LE = (group_LG[:, :, None] * size + np.arange(size)).reshape(L, E)
    local = np.take_along_axis(load, expert_LE, 1).reshape(L * num_nodes, E // num_nodes)
    slots = _solve(local, num_slots // num_nodes, num_ranks // num_nodes).reshape(L, num_nodes, -1)
    slots += np.arange(num_nodes)[None, :, None] * (E // num_nodes)
    return Placement(np.take_along_axis(expert_LE, slots.reshape(L, num_slots), 1), num_ranks)


def rank_load(load_LE: ArrayLike, placement: Placement) -> Floats:
    """Load of each rank [L, R] when every expert's load is split evenly over its replicas."""
    load = checked_load(load_LE, placement)
    share_LS = np.take_along_axis(load / placement.replica_count, placement.slot_to_logical, 1)
    return slots_to_ranks(share_LS, placement)


def slots_to_ranks(share_LS: NDArray[np.float64], placement: Placement) -> Floats:
    """Sum per-slot loads [L, S] to ranks [L, R]."""
    shape = (placement.num_layers, placement.num_ranks, placement.slots_per_rank)
    total_LR: Floats = np.asarray(share_LS, dtype=np.float64).reshape(shape).sum(axis=2)
    return total_LR


def imbalance(load_LE: ArrayLike, placement: Placement) -> Floats:
    """Fullest rank over the mean [L] under an even split: 1 is perfect, and a layer without load counts as perfect."""
    return max_over_mean(rank_load(load_LE, placement))


def max_over_mean(load_LR: Floats) -> Floats:
    """[L] from [L, R]"""
    mean_L = load_LR.mean(axis=1)
    ratio_L: Floats = np.divide(load_LR.max(axis=1), mean_L, out=np.ones(len(load_LR)), where=mean_L > 0)
    return ratio_L


def checked_load(load_LE: ArrayLike, placement: Placement | None = None) -> Floats:
    """Loads as float64 [L, E]; SpecError unless finite, >= 0 and of the placement's shape."""
    load = np.asarray(load_LE, dtype=np.float64)
    if load.ndim != 2 or not load.size:
        raise SpecError(f"has shape {load.shape}", field="load", expected="[layers, experts]")
    if not np.isfinite(load).all() or load.min() < 0:
        raise SpecError("holds negative or non-finite numbers", field="load", expected="finite numbers >= 0")
    if placement is not None and load.shape != (placement.num_layers, placement.num_experts):
        raise SpecError(f"has shape {load.shape}", field="load",
                        expected=f"the placement's {(placement.num_layers, placement.num_experts)}")
    return load


def check_division(num_slots: int, num_ranks: int) -> None:
    if num_ranks < 1 or num_slots % num_ranks:
        near = -(-num_slots // max(num_ranks, 1)) * max(num_ranks, 1)
        raise SpecError(f"{num_slots} expert slots do not divide over {num_ranks} ranks", field="num_slots",
                        expected=f"a multiple of {num_ranks}", hint=f"{near} slots would divide")


def _check_slots(num_experts: int, num_slots: int, num_ranks: int, num_nodes: int = 1) -> None:
    if num_slots < num_experts:
        raise SpecError(f"{num_slots} slots cannot hold {num_experts} experts", field="num_slots",
                        expected=f"at least {num_experts}")
    check_division(num_slots, num_ranks)
    most = num_experts // num_nodes * num_ranks
    if num_slots > most:
        raise SpecError(f"{num_slots} slots are more than {num_experts} experts can fill without twins on a rank",
                        field="num_slots", expected=f"at most {most}", hint="use fewer redundant experts")


def _solve(load_LE: Floats, num_slots: int, num_ranks: int) -> Ints:
    # A trace of load for every expert spreads replicas evenly where nothing was counted.
    load = load_LE + 1e-9 * np.maximum(load_LE.mean(axis=1, keepdims=True), 1e-9)
    count_LE = replicate(load, num_slots, num_ranks)
    return pack(load, count_LE, num_ranks).reshape(len(load), num_slots)
