"""From one placement to the next with as few expert weights moved as possible, and whether that pays.

Shapes as in placement: L layers, S slots, R ranks, K slots a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twin.policy.packing import Ints
from twin.policy.placement import Placement
from twin.spec.errors import SpecError


@dataclass(frozen=True)
class Migration:
    """`placement` loads ranks exactly as the new one does, with slots renumbered inside ranks.

    `changes[l]` lists the (slot, expert) pairs of layer l whose weights must be written; all else stays in place.
    """

    placement: Placement
    changes: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def num_copies(self) -> int:
        """Expert copies to move, over all layers."""
        return sum(len(layer) for layer in self.changes)


def migration(old: Placement, new: Placement) -> Migration:
    """The least rewriting that turns `old` into `new`: an expert that stays on a rank stays in its slot."""
    slots_LS = _keep_slots(old, new).reshape(new.num_layers, new.num_slots)
    changed_LS = slots_LS != old.slot_to_logical
    changes = tuple(
        tuple((int(s), int(slots_LS[layer, s])) for s in np.flatnonzero(changed_LS[layer]))
        for layer in range(new.num_layers))
    return Migration(Placement(slots_LS, new.num_ranks), changes)


@dataclass(frozen=True)
class Copy:
    """Weights of `expert` go from a slot of EP rank `source` to a slot of EP rank `target`."""

    expert: int
    source: int
    source_slot: int
    target: int
    target_slot: int


def copies(now: Placement, layer: int, changes: tuple[tuple[int, int], ...]) -> tuple[Copy, ...]:
    """Where the weights of changed (slot, expert) pairs come from: the rank itself if it can, else holders by turns."""
    found = []
    for slot, expert in changes:
        target = slot // now.slots_per_rank
        holders = [int(s) for s in now.logical_to_slots[layer, expert] if s >= 0]
        own = [s for s in holders if s // now.slots_per_rank == target]
        source = own[0] if own else holders[slot % len(holders)]
        found.append(Copy(expert, source // now.slots_per_rank, source, target, slot))
    return tuple(found)


def keep_ranks(old: Placement, new: Placement, num_nodes: int = 1) -> Placement:
    """`new` with whole ranks exchanged (inside nodes) so that more experts find themselves where they were.

    Which of two equal GPUs gets which set of experts is free, so this changes no rank's load, only whose it is. Greedy:
    the pair of ranks with the most experts in common is matched first.
    """
    _check_alike(old, new)
    if num_nodes < 1 or new.num_ranks % num_nodes:
        raise SpecError(f"{new.num_ranks} ranks do not divide over {num_nodes} nodes", field="num_nodes",
                        expected="a divisor of the ranks")
    L, R, E = new.num_layers, new.num_ranks, new.num_experts
    layers = np.arange(L)
    common_LRR = (_hosts(old).reshape(L, R, E).astype(np.float32)
                  @ _hosts(new).reshape(L, R, E).astype(np.float32).transpose(0, 2, 1))
    node_R = np.arange(R) // (R // num_nodes)
    common_LRR[:, node_R[:, None] != node_R[None, :]] = -1.0
    source_LR = np.zeros((L, R), dtype=np.int64)
    for _ in range(R):
        best_L = common_LRR.reshape(L, -1).argmax(axis=1)
        here_L, there_L = best_L // R, best_L % R
        source_LR[layers, here_L] = there_L
        common_LRR[layers, here_L, :] = -2.0
        common_LRR[layers, :, there_L] = -2.0
    slots_LRK = new.slot_to_logical.reshape(L, R, -1)
    return Placement(slots_LRK[layers[:, None], source_LR].reshape(L, -1), R)


def should_rebalance(gain_s_per_step: float, steps_ahead: float, cost_s: float) -> bool:
    """Whether the time won in the steps that the new placement will serve exceeds the time that moving costs."""
    return gain_s_per_step * steps_ahead > cost_s


def _keep_slots(old: Placement, new: Placement) -> Ints:
    """New experts of each rank [L, R, K], in old slots where the rank had them, the rest in the slots left over."""
    _check_alike(old, new)
    L, R, K = new.num_layers, new.num_ranks, new.slots_per_rank
    old_LRK = old.slot_to_logical.reshape(L, R, K)
    new_LRK = new.slot_to_logical.reshape(L, R, K)
    placed_LRK = np.full((L, R, K), -1, dtype=np.int64)
    used_LRK = np.zeros((L, R, K), dtype=bool)
    for k in range(K):  # old slot k keeps its expert if the rank still has an unplaced copy of it
        match_LRK = (new_LRK == old_LRK[:, :, k:k + 1]) & ~used_LRK
        found_LR = match_LRK.any(axis=2)
        layer, rank = np.nonzero(found_LR)
        which = match_LRK.argmax(axis=2)[found_LR]
        placed_LRK[layer, rank, k] = new_LRK[layer, rank, which]
        used_LRK[layer, rank, which] = True
    placed_LRK[placed_LRK < 0] = new_LRK[~used_LRK]  # as many of each in every rank, both in slot order
    return placed_LRK


def _hosts(placement: Placement) -> NDArray[np.bool_]:
    """[L, R, E]: whether the rank holds the expert."""
    L, R, E = placement.num_layers, placement.num_ranks, placement.num_experts
    hosts_LRE = np.zeros((L, R, E), dtype=bool)
    hosts_LRE[np.arange(L)[:, None], placement.rank_of_slot, placement.slot_to_logical] = True
    return hosts_LRE


def _check_alike(old: Placement, new: Placement) -> None:
    for what in ("num_layers", "num_experts", "num_slots", "num_ranks"):
        if getattr(old, what) != getattr(new, what):
            raise SpecError(f"old and new placement differ in {what}: {getattr(old, what)} and {getattr(new, what)}",
                            field=what, expected="the same")
