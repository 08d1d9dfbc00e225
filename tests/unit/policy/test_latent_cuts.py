"""How latent attention is cut: rounds of 132 programs, an H200's multiprocessors."""

from __future__ import annotations

import numpy as np
import pytest

from twin.policy.latent_cuts import (
    KERNELS,
    Cut,
    Shape,
    block_heads,
    choose_cut,
    chosen_over_measured,
    filling,
    in_full_rounds,
    seconds,
)

SLOTS = 132


@pytest.mark.parametrize("sequences, heads, context, want", [
    (128, 64, 4096, Cut(128, 1)),  # one round
    (132, 16, 4096, Cut(132, 1)),
    (132, 64, 4096, Cut(132, 1)),
    (128, 128, 4096, Cut(128, 1)),  # 256 programs, two rounds
    (66, 128, 4096, Cut(66, 1)),
    (160, 64, 2500, Cut(132, 4)),  # 28 remain: 112 programs
    (200, 128, 1500, Cut(198, 24)),  # 2 of two blocks remain: a split has a tile
    (300, 16, 2000, Cut(264, 3)),  # 36 remain
    (20, 64, 4096, Cut(0, 6)),  # nothing fills a round: all are cut to fill it
    (1, 128, 4096, Cut(0, 64)),
    (1, 16, 65536, Cut(0, 64)),
    (1, 64, 64, Cut(1, 1)),  # one tile
    (0, 64, 64, Cut(0, 1)),
])
def test_only_what_full_rounds_leave_is_cut(sequences: int, heads: int, context: int, want: Cut) -> None:
    assert choose_cut(sequences, heads, context, SLOTS) == want


def test_a_program_serves_a_block_of_heads() -> None:
    assert [block_heads(h) for h in (1, 16, 17, 32, 33, 64, 128)] == [16, 16, 32, 32, 64, 64, 64]
    assert [Shape(h, SLOTS).blocks for h in (16, 32, 64, 96, 128)] == [1, 1, 1, 2, 2]
    assert set(KERNELS) == {16, 32, 64}


def test_seconds_count_rounds_tiles_and_a_merge() -> None:
    """160 sequences of 40 tiles: two rounds, or one and a round of ten tiles, whose 28 x 64 rows are merged."""
    shape, kernel = Shape(64, SLOTS), KERNELS[64]
    round_of = lambda tiles: kernel.program_s + tiles * kernel.tile_s  # noqa: E731
    whole = float(seconds(shape, 160, 2500, 160, 1))
    assert whole == pytest.approx(kernel.launch_s + 2 * round_of(40))
    assert whole == pytest.approx(float(seconds(shape, 160, 2500, 132, 1)))
    cut = float(seconds(shape, 160, 2500, 132, 4))
    merge = cut - kernel.launch_s - round_of(40) - round_of(10)
    assert 0 < merge < round_of(10) < round_of(40)
    assert float(seconds(shape, 300, 2500, 264, 4)) - cut > round_of(40), "more rows are merged, and a round is added"


def test_no_choice_is_predicted_to_take_longer_than_filling_the_device_once() -> None:
    """On the mean over the contexts below the bound, and for exact contexts as the cost model has them."""
    for heads in (8, 16, 32, 64, 128):
        shape = Shape(heads, SLOTS)
        for sequences in (1, 2, 5, 20, 48, 66, 67, 96, 131, 132, 133, 140, 160, 200, 263, 300, 512, 1000):
            for bound in (64, 1100, 2500, 4096, 30000, 131072):
                cut = choose_cut(sequences, heads, bound, SLOTS)
                contexts = np.array([float(bound)])
                while contexts[-1] >= 2048:
                    contexts = np.append(contexts, contexts[-1] / 2)
                new = np.log(seconds(shape, sequences, contexts, cut.whole, cut.splits)).mean()
                old = np.log(seconds(shape, sequences, contexts, 0, filling(shape, sequences, bound))).mean()
                assert new <= old + 1e-9, (heads, sequences, bound, cut)
                assert 1 <= cut.splits <= 64 and 0 <= cut.whole <= sequences
                assert cut.splits <= -(-bound // 64), "no split without a tile"
                n, c = np.array([float(sequences)]), np.array([float(bound)])
                assert sequences * shape.blocks > SLOTS or chosen_over_measured(shape, n, c)[0] <= 1.0


def test_whole_sequences_fill_their_rounds() -> None:
    for slots, heads in ((132, 64), (132, 128), (148, 128), (78, 64)):
        shape = Shape(heads, slots)
        for sequences in (1, 60, 133, 160, 200, 400):
            whole = float(in_full_rounds(shape, sequences))
            assert whole <= sequences and whole * shape.blocks % slots == 0
            assert (sequences - whole) * shape.blocks < slots


@pytest.mark.parametrize("real", [129, 132, 136, 159])
def test_padding_of_a_graph_adds_no_round(real: int) -> None:
    """A graph of 160 runs `real` sequences; the others are empty and last, so that what is whole is real, and the splits of the
    real ones that remain fit the round of those of 160."""
    cut, padded = choose_cut(160, 64, 4096, SLOTS), real
    remaining = max(0, padded - cut.whole)
    assert cut.whole == SLOTS and remaining * cut.splits <= SLOTS
    took = float(seconds(Shape(64, SLOTS), max(real, cut.whole), 4096, min(real, cut.whole), cut.splits))
    assert took <= float(seconds(Shape(64, SLOTS), 160, 4096, cut.whole, cut.splits)) + 1e-12


def test_a_table_of_powers_of_two_keeps_what_it_says_of_batches_whose_cut_is_kept() -> None:
    """Beyond a round in proportion to programs: 256 are the two rounds that they were measured as."""
    context = np.full(4, 4096.0)
    assert chosen_over_measured(Shape(64, SLOTS), np.array([32.0, 64.0, 128.0, 256.0]), context) == pytest.approx(np.ones(4))
    longer = chosen_over_measured(Shape(64, SLOTS), np.array([160.0, 200.0, 264.0, 300.0]), context)
    uncut = np.array([2, 2, 2, 3]) / (np.array([160, 200, 264, 300]) / 128)
    assert (longer <= uncut + 0.02).all() and longer[0] < 0.75 * uncut[0]


@pytest.mark.parametrize("longest", [2048, 4096, 32768])
@pytest.mark.parametrize("heads", [16, 32, 64, 128])
def test_one_sequence_meets_every_merge_that_batches_need(heads: int, longest: int) -> None:
    """An engine's warm-up takes one decode at every power of two of context: merges are compiled by powers of two of splits."""
    width = lambda sequences, context: (choose_cut(sequences, heads, context, SLOTS).splits - 1).bit_length()  # noqa: E731
    warm = {width(1, 1 << octave) for octave in range(longest.bit_length())}
    assert {width(n, c) for n in range(2, 290, 3) for c in range(64, longest + 1, longest // 12)} <= warm
