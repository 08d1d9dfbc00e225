"""Placements hold every expert, are never worse than the plain one, and splits reach the optimum."""

from itertools import chain, combinations

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from twin.policy.migration import keep_ranks, migration
from twin.policy.placement import (
    Placement,
    imbalance,
    linear,
    place_global,
    place_hierarchical,
    rank_load,
    slots_to_ranks,
)
from twin.policy.replica_split import even_split, split_over_replicas


@st.composite
def loads(draw, max_layers=3):
    """(load [L, E], slots, ranks, nodes, groups), everything dividing."""
    nodes = draw(st.sampled_from([1, 2, 4]))
    ranks = nodes * draw(st.integers(1, 3))
    groups = nodes * draw(st.integers(1, 2))
    experts = int(np.lcm(groups, nodes)) * draw(st.integers(1, 4))
    per_rank = draw(st.integers(-(-experts // ranks), experts // nodes))
    layers = draw(st.integers(1, max_layers))
    values = st.one_of(st.integers(0, 50).map(float), st.floats(0, 1e6, allow_subnormal=False))
    rows = draw(st.lists(st.lists(values, min_size=experts, max_size=experts), min_size=layers, max_size=layers))
    return np.array(rows), per_rank * ranks, ranks, nodes, groups


@settings(max_examples=120, deadline=None)
@given(loads())
def test_every_expert_has_a_slot_and_global_is_never_worse_than_linear(case):
    load, slots, ranks, nodes, groups = case
    found = place_global(load, slots, ranks)
    split = place_hierarchical(load, slots, ranks, nodes, groups)
    plain = linear(*load.shape, ranks, slots - load.shape[1])
    for placement in (found, split, plain):
        assert placement.replica_count.shape == load.shape and placement.replica_count.min() >= 1
        assert (placement.replica_count.sum(axis=1) == slots).all()
        assert np.bincount(placement.rank_of_slot).tolist() == [slots // ranks] * ranks
        np.testing.assert_allclose(rank_load(load, placement).sum(axis=1), load.sum(axis=1))
    assert (imbalance(load, found) <= imbalance(load, plain)).all()
    assert place_global(load, slots, ranks) == found
    for layer in range(len(load)):  # layers are solved side by side, yet each as if alone
        assert np.array_equal(place_global(load[layer:layer + 1], slots, ranks).slot_to_logical[0],
                              found.slot_to_logical[layer])


def lowest_possible(load_E, placement, layer):
    """The best fullest rank of any split: the densest set of ranks, counting experts that live only inside it."""
    ranks = range(placement.num_ranks)
    homes = [frozenset((slots[slots >= 0] // placement.slots_per_rank).tolist())
             for slots in placement.logical_to_slots[layer]]
    subsets = chain.from_iterable(combinations(ranks, n) for n in range(1, placement.num_ranks + 1))
    return max(sum(load for load, home in zip(load_E, homes, strict=True) if home <= set(subset)) / len(subset)
               for subset in subsets)


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(1, 4))
@example(18847207, 4, 2)  # the fullest rank gets no emptier before others have moved
def test_split_conserves_tokens_and_reaches_the_optimum(seed, ranks, per_rank):
    random = np.random.default_rng(seed)
    slots = ranks * per_rank
    experts = int(random.integers(max(1, per_rank), slots + 1))
    placement = place_global(random.lognormal(0, 1, (2, experts)), slots, ranks)
    tokens = np.floor(random.lognormal(3, 1.2, (2, experts))).astype(np.int64)
    share_LS = split_over_replicas(tokens, placement, sweeps=200)
    for layer in range(2):
        got = np.bincount(placement.slot_to_logical[layer], share_LS[layer], minlength=experts)
        assert got.tolist() == tokens[layer].tolist()
    assert share_LS.min() >= 0
    exact = split_over_replicas(tokens.astype(float), placement, sweeps=200)
    fullest = slots_to_ranks(exact, placement).max(axis=1)
    even = slots_to_ranks(even_split(tokens, placement), placement).max(axis=1)
    for layer in range(2):
        best = lowest_possible(tokens[layer], placement, layer)
        assert best - 1e-6 <= fullest[layer] <= best * 1.01 + 1e-6
    assert (fullest <= even + 1e-6).all()
    rounding = slots_to_ranks(share_LS, placement).max(axis=1) - fullest
    assert rounding.max() <= per_rank


@settings(max_examples=80, deadline=None)
@given(loads(), st.integers(0, 2**32 - 1))
def test_migration_rewrites_the_least_and_keeps_every_rank_set(case, seed):
    load, slots, ranks, nodes, _ = case
    old = place_global(load, slots, ranks)
    new = place_global(np.random.default_rng(seed).permuted(load, axis=1), slots, ranks)
    shape = (len(load), ranks, slots // ranks)
    for target in (new, keep_ranks(old, new, nodes)):
        moved = migration(old, target)
        assert np.array_equal(np.sort(moved.placement.slot_to_logical.reshape(shape)),
                              np.sort(target.slot_to_logical.reshape(shape)))
        rebuilt = old.slot_to_logical.copy()
        for layer, changes in enumerate(moved.changes):
            for slot, expert in changes:
                rebuilt[layer, slot] = expert
        assert Placement(rebuilt, ranks) == moved.placement
        fewest = 0
        for was, will in zip(old.slot_to_logical.reshape(-1, shape[2]), target.slot_to_logical.reshape(-1, shape[2]),
                             strict=True):
            experts = load.shape[1]
            fewest += int(np.maximum(np.bincount(will, minlength=experts) - np.bincount(was, minlength=experts),
                                     0).sum())
        assert moved.num_copies == fewest
