"""Expert placement on layouts worked out by hand, and the figures it promises on skewed loads."""

import numpy as np
import pytest

from twin.policy import packing
from twin.policy.migration import keep_ranks, migration, should_rebalance
from twin.policy.packing import replicate
from twin.policy.placement import (
    Placement,
    imbalance,
    linear,
    max_over_mean,
    place_global,
    place_hierarchical,
    rank_load,
    slots_to_ranks,
)
from twin.policy.replica_split import even_split, split_over_replicas
from twin.spec.errors import SpecError


def skewed(layers=58, experts=256, seed=0, sigma=0.9):
    """As uneven as a trained model's experts: the busiest of 256 gets about ten times the mean."""
    return np.random.default_rng(seed).lognormal(0.0, sigma, (layers, experts))


def test_derived_arrays_of_a_small_placement():
    #                          rank 0   rank 1   rank 2
    placement = Placement(np.array([[0, 1, 2, 0, 3, 0]]), num_ranks=3)
    assert (placement.num_experts, placement.slots_per_rank) == (4, 2)
    assert placement.rank_of_slot.tolist() == [0, 0, 1, 1, 2, 2]
    assert placement.replica_count.tolist() == [[3, 1, 1, 1]]
    assert placement.logical_to_slots.tolist() == [[[0, 3, 5], [1, -1, -1], [2, -1, -1], [4, -1, -1]]]
    assert rank_load([[6.0, 1.0, 2.0, 3.0]], placement).tolist() == [[3.0, 4.0, 5.0]]
    assert imbalance([[6.0, 1.0, 2.0, 3.0]], placement).tolist() == [1.25]
    with pytest.raises(ValueError, match="read-only"):
        placement.slot_to_logical[0, 0] = 1


def test_linear_repeats_the_first_experts():
    placement = linear(2, 6, num_ranks=4, num_redundant=2)
    assert placement.slot_to_logical.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]] * 2
    assert placement == linear(2, 6, 4, 2) != linear(2, 6, 2, 2)
    assert hash(placement) == hash(linear(2, 6, 4, 2))


def test_replicas_go_where_the_share_is_largest():
    # 12 -> 6 -> 4 each; 7 -> 3.5 each.
    assert replicate(np.array([[12.0, 7.0, 1.0]]), 6, max_replicas=4).tolist() == [[3, 2, 1]]
    assert replicate(np.array([[12.0, 7.0, 1.0]]), 6, max_replicas=2).tolist() == [[2, 2, 2]]


def test_the_busy_expert_is_spread_and_ranks_even_out():
    load = [[8.0, 4.0, 2.0, 2.0]]
    placement = place_global(load, num_slots=8, num_ranks=4)
    assert placement.replica_count[0, 0] == 4  # its share of 2 then equals the smallest
    assert imbalance(load, placement)[0] == 1.0


def test_replicas_of_one_expert_sit_on_different_ranks():
    placement = place_global(skewed(layers=6), num_slots=288, num_ranks=32)
    for row in placement.slot_to_logical.reshape(6 * 32, 9):
        assert len(set(row.tolist())) == 9


def test_a_swap_mends_what_longest_first_gets_wrong():
    # Longest first deals {5, 3, 0} and {4, 3, 3}; exchanging a 3 for the 4 makes both 9.
    load = [[5.0, 4.0, 3.0, 3.0, 3.0, 0.0]]
    assert rank_load(load, place_global(load, 6, 2)).tolist() == [[9.0, 9.0]]


def test_swaps_only_ever_lower_the_fullest_rank():
    lower = 0
    for seed in range(20):
        load = skewed(layers=1, experts=24, seed=seed, sigma=0.5)
        totals, room = np.zeros(6), np.full(6, 4)
        for weight in np.sort(load[0])[::-1]:  # longest first, nothing else
            rank = min((r for r in range(6) if room[r]), key=lambda r: totals[r])
            totals[rank] += weight
            room[rank] -= 1
        fullest = rank_load(load, place_global(load, 24, 6)).max()
        assert fullest <= totals.max() * (1 + 1e-6)
        lower += fullest < totals.max() * (1 - 1e-6)
    assert lower >= 12


def test_hierarchical_keeps_groups_on_a_node():
    load = skewed(layers=5, experts=32, seed=3)
    placement = place_hierarchical(load, num_slots=40, num_ranks=8, num_nodes=2, num_groups=4)
    node_of_slot = placement.rank_of_slot // 4
    for layer in range(5):
        group = placement.slot_to_logical[layer] // 8
        for g in range(4):
            assert len(set(node_of_slot[group == g].tolist())) == 1
    # Two groups a node, the heaviest with the lightest of what is left.
    load = np.repeat(np.array([[8.0, 1.0, 4.0, 5.0]]), 8, axis=1)
    placement = place_hierarchical(load, 32, 8, num_nodes=2, num_groups=4)
    first_node = set((placement.slot_to_logical[0, :16] // 8).tolist())
    assert first_node in ({0, 1}, {2, 3})


def test_hierarchical_falls_back_to_global_when_groups_do_not_divide():
    load = skewed(layers=2, experts=24)
    assert place_hierarchical(load, 30, 6, num_nodes=3, num_groups=4) == place_global(load, 30, 6)


def test_a_layer_without_load_is_placed_and_perfect():
    load = np.vstack([np.zeros(8), np.arange(8.0)])
    placement = place_global(load, 12, 4)
    assert placement.replica_count.min() == 1 and placement.replica_count[0].max() == 2
    assert imbalance(load, placement)[0] == 1.0


@pytest.mark.parametrize("ranks", [8, 32])
def test_skewed_loads_are_levelled_in_few_rounds(ranks, monkeypatch):
    """Layers are solved side by side, so time goes by the rounds of swaps; `benchmarks/twin_speed.py` has the seconds."""
    load, rounds, swap_once = skewed(), [], packing._swap_once
    def counted(*args):
        rounds.append(len(args[2]))
        return swap_once(*args)
    monkeypatch.setattr(packing, "_swap_once", counted)
    placement = place_global(load, num_slots=288, num_ranks=ranks)
    assert imbalance(load, linear(58, 256, ranks, 32)).mean() > 1.3
    assert imbalance(load, placement).max() <= 1.02
    assert len(rounds) <= 60, rounds


def test_batch_noise_is_split_far_better_than_evenly():
    load = skewed(seed=1)
    placement = place_global(load, num_slots=288, num_ranks=8)
    tokens = np.round(load * np.random.default_rng(2).lognormal(0.0, 0.5, load.shape) * 100).astype(np.int64)
    even = max_over_mean(slots_to_ranks(even_split(tokens, placement), placement)).mean()
    split_LS = split_over_replicas(tokens, placement)
    assert split_LS.dtype == np.int64
    assert even > 1.1
    assert max_over_mean(slots_to_ranks(split_LS, placement)).mean() <= 1.05


def test_split_fills_the_emptier_rank_first():
    placement = Placement(np.array([[0, 1, 0, 2]]), num_ranks=2)
    # rank 0 has 5 of expert 1, rank 1 has 1 of expert 2: of 10 tokens 3 go to rank 0 and 7 to rank 1.
    assert split_over_replicas([10, 5, 1], placement).tolist() == [[3, 5, 7, 1]]
    assert split_over_replicas([2, 9, 1], placement).tolist() == [[0, 9, 2, 1]]
    assert split_over_replicas([[10.0, 5.0, 2.0]], placement).tolist() == [[3.5, 5.0, 6.5, 2.0]]
    assert split_over_replicas([0, 0, 0], placement).tolist() == [[0, 0, 0, 0]]


def test_migration_keeps_what_stays_in_its_slot():
    old = Placement(np.array([[0, 1, 2, 3, 0, 4]]), num_ranks=2)
    new = Placement(np.array([[4, 2, 0, 0, 1, 3]]), num_ranks=2)
    moved = migration(old, new)
    assert moved.placement.slot_to_logical.tolist() == [[0, 4, 2, 3, 0, 1]]
    assert moved.changes == (((1, 4), (5, 1)),) and moved.num_copies == 2
    assert migration(old, old).num_copies == 0
    twins = Placement(np.array([[0, 0, 1, 2]]), num_ranks=2)
    assert migration(twins, Placement(np.array([[0, 1, 2, 0]]), 2)).changes == (((1, 1), (2, 0)),)


def test_equal_sets_of_experts_under_other_rank_numbers_move_nothing():
    old = place_global(skewed(layers=3), 288, 32)
    order = np.random.default_rng(0).permutation(32)
    new = Placement(old.slot_to_logical.reshape(3, 32, 9)[:, order].reshape(3, 288), 32)
    assert migration(old, new).num_copies > 700
    assert migration(old, keep_ranks(old, new)).num_copies == 0
    inside = keep_ranks(old, new, num_nodes=4).slot_to_logical.reshape(3, 4, 72)
    assert np.array_equal(np.sort(inside), np.sort(new.slot_to_logical.reshape(3, 4, 72)))


def test_rebalancing_must_pay_for_itself():
    assert should_rebalance(1e-3, 1000, 0.5) and not should_rebalance(1e-3, 100, 0.5)
    assert not should_rebalance(-1e-3, 1000, 0.0)


@pytest.mark.parametrize(("call", "named"), [
    (lambda: linear(1, 256, 24), r"256 expert slots do not divide over 24 ranks.*multiple of 24"),
    (lambda: place_global(np.ones((1, 8)), 6, 2), "6 slots cannot hold 8 experts"),
    (lambda: place_global(np.ones((1, 2)), 8, 2), "at most 4"),
    (lambda: place_global(np.ones(8), 8, 2), r"\[layers, experts\]"),
    (lambda: place_global(-np.ones((1, 8)), 8, 2), "negative"),
    (lambda: place_global(np.full((1, 8), np.nan), 8, 2), "finite"),
    (lambda: place_hierarchical(np.ones((1, 8)), 8, 4, 3, 4), "num_ranks = 4 does not divide over num_nodes = 3"),
    (lambda: place_hierarchical(np.ones((1, 8)), 8, 4, 2, 3), "num_experts = 8 does not divide over num_groups = 3"),
    (lambda: Placement(np.array([[0, 0, 2, 2]]), 2), "expert 1 of layer 0"),
    (lambda: Placement(np.array([[0, 9]]), 2), "expert 9 of layer 0 or one below"),
    (lambda: Placement(np.zeros((0, 4)), 2), "slot_to_logical"),
    (lambda: rank_load(np.ones((1, 5)), linear(1, 4, 2)), r"\(1, 4\)"),
    (lambda: migration(linear(1, 4, 2), linear(1, 4, 4)), "num_ranks: 2 and 4"),
    (lambda: keep_ranks(linear(1, 4, 2), linear(1, 4, 2), 3), "2 ranks do not divide over 3 nodes"),
])
def test_errors_name_what_does_not_fit(call, named):
    with pytest.raises(SpecError, match=named):
        call()
