"""The arithmetic of expert placement on plain arrays: how many replicas, and which rank gets which.

Shapes: L layers (solved side by side), E logical experts, S slots, R ranks, K = S / R slots a rank.
The three steps are those of EPLB (github.com/deepseek-ai/EPLB): replicate the expert whose replicas are most loaded,
deal replicas out longest first, each to the least loaded rank; then, beyond EPLB, swap replicas between ranks while that
lowers the fullest rank, and never put two replicas of one expert on one rank where that can be avoided.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_SWAPS = 400  # per call; refinement ends much earlier on real loads
GOOD_ENOUGH = 1.001  # fullest rank over the mean: below this, batch noise is a hundred times what a swap could gain


def replicate(load_LE: Floats, num_slots: int, max_replicas: int) -> Ints:
    """Replicas of each expert [L, E], at least one, `num_slots` a layer: each further one halves the worst share.

    Greedy is optimal here: it minimises the largest load per replica. An expert gets at most `max_replicas`.
    """
    L, E = load_LE.shape
    count_LE = np.ones((L, E), dtype=np.int64)
    share_LE = load_LE.copy()
    layers = np.arange(L)
    for _ in range(num_slots - E):
        share_LE[count_LE >= max_replicas] = -1.0
        worst_L = share_LE.argmax(axis=1)
        count_LE[layers, worst_L] += 1
        share_LE[layers, worst_L] = load_LE[layers, worst_L] / count_LE[layers, worst_L]
    return count_LE


def pack(load_LE: Floats, count_LE: Ints, num_ranks: int) -> Ints:
    """Experts of each rank's slots [L, R, K], the fullest rank as low as longest-first and swaps get it."""
    expert_LS, weight_LS = _longest_first(load_LE, count_LE)
    expert_LRK, weight_LRK = _deal(expert_LS, weight_LS, load_LE.shape[1], num_ranks)
    return _swap(expert_LRK, weight_LRK, load_LE.shape[1])


def balanced_groups(load_LG: Floats, num_bins: int) -> Ints:
    """Deal G weighted groups into bins of G / bins each: the bin of each group [L, G]."""
    G = load_LG.shape[1]
    order_LG = np.argsort(-load_LG, axis=1, kind="stable")
    group_LBK, _ = _deal(order_LG, np.take_along_axis(load_LG, order_LG, 1), G, num_bins)
    bin_LG = np.empty_like(order_LG)
    bins = np.broadcast_to(np.arange(num_bins)[None, :, None], group_LBK.shape)
    np.put_along_axis(bin_LG, group_LBK.reshape(len(load_LG), G), bins.reshape(len(load_LG), G), 1)
    return bin_LG


def _longest_first(load_LE: Floats, count_LE: Ints) -> tuple[Ints, Floats]:
    """One entry per replica [L, S], heaviest first: its expert and its share of the expert's load."""
    L, E = load_LE.shape
    expert_LS = np.repeat(np.tile(np.arange(E), L), count_LE.ravel()).reshape(L, -1)
    weight_LS = np.take_along_axis(load_LE / count_LE, expert_LS, 1)
    order_LS = np.argsort(-weight_LS, axis=1, kind="stable")
    return np.take_along_axis(expert_LS, order_LS, 1), np.take_along_axis(weight_LS, order_LS, 1)


def _deal(expert_LS: Ints, weight_LS: Floats, num_experts: int, num_ranks: int) -> tuple[Ints, Floats]:
    """Each replica in turn to the least loaded rank with room, of those that lack its expert if there is one."""
    L, S = expert_LS.shape
    K = S // num_ranks
    layers = np.arange(L)
    total_LR = np.zeros((L, num_ranks))
    fill_LR = np.zeros((L, num_ranks), dtype=np.int64)
    here_LER = np.zeros((L, num_experts, num_ranks), dtype=bool)
    expert_LRK = np.zeros((L, num_ranks, K), dtype=np.int64)
    weight_LRK = np.zeros((L, num_ranks, K))
    twin = float(weight_LS.sum(axis=1).max(initial=0.0)) + 1.0  # more than any load: worse than every other rank
    for s in range(S):
        expert_L = expert_LS[:, s]
        cost_LR = total_LR + twin * here_LER[layers, expert_L]
        cost_LR[fill_LR == K] = np.inf
        rank_L = cost_LR.argmin(axis=1)
        slot_L = fill_LR[layers, rank_L]
        expert_LRK[layers, rank_L, slot_L] = expert_L
        weight_LRK[layers, rank_L, slot_L] = weight_LS[:, s]
        total_LR[layers, rank_L] += weight_LS[:, s]
        fill_LR[layers, rank_L] += 1
        here_LER[layers, expert_L, rank_L] = True
    return expert_LRK, weight_LRK


def _swap(expert_LRK: Ints, weight_LRK: Floats, num_experts: int) -> Ints:
    """While it helps, exchange one replica of the fullest rank with one of another; layers that are done drop out."""
    L, R, K = expert_LRK.shape
    expert_LS, weight_LS = expert_LRK.reshape(L, R * K).copy(), weight_LRK.reshape(L, R * K).copy()
    active = np.arange(L)
    for _ in range(MAX_SWAPS):
        active = _swap_once(expert_LS, weight_LS, active, R, num_experts)
        if not len(active):
            break
    return expert_LS.reshape(L, R, K)


def _swap_once(expert_LS: Ints, weight_LS: Floats, active: Ints, R: int, num_experts: int) -> Ints:
    """The best swap in each active layer (A of them), in place; the layers where one helped."""
    expert_AS, weight_AS = expert_LS[active], weight_LS[active]
    A, S = expert_AS.shape
    K = S // R
    rows = np.arange(A)
    rank_S = np.arange(S) // K
    total_AR = weight_AS.reshape(A, R, K).sum(axis=2)
    full_A = total_AR.argmax(axis=1)
    mine_AK = full_A[:, None] * K + np.arange(K)
    give_AKS = np.take_along_axis(weight_AS, mine_AK, 1)[:, :, None] - weight_AS[:, None, :]
    level_A = total_AR[rows, full_A]
    after_AKS = np.maximum(level_A[:, None, None] - give_AKS, total_AR[:, rank_S][:, None, :] + give_AKS)
    # Experts that the other rank already has, or that the full rank has, would meet their twin.
    here_AER = np.zeros((A, num_experts, R), dtype=bool)
    here_AER[rows[:, None], expert_AS, rank_S] = True
    mine_here_AKR = here_AER[rows[:, None], np.take_along_axis(expert_AS, mine_AK, 1)]
    theirs_here_AS = here_AER[rows[:, None], expert_AS, full_A[:, None]]
    after_AKS[np.repeat(mine_here_AKR, K, axis=2) | theirs_here_AS[:, None, :]] = np.inf
    best_A = after_AKS.reshape(A, -1).argmin(axis=1)
    helps_A = after_AKS.reshape(A, -1)[rows, best_A] < level_A * (1 - 1e-6)
    helps_A &= level_A > GOOD_ENOUGH * total_AR.mean(axis=1)
    layer: Ints = active[helps_A]
    row = rows[helps_A]
    a, b = mine_AK[row, best_A[helps_A] // S], best_A[helps_A] % S
    for values in (expert_LS, weight_LS):
        values[layer, a], values[layer, b] = values[layer, b], values[layer, a]
    return layer
