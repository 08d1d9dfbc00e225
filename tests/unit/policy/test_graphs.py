"""The ladder of graph sizes that runtime and cost model share."""

from __future__ import annotations

import pytest

from twin.policy.graphs import EAGER, agreed_size, ladder


@pytest.mark.parametrize("most", [1, 3, 16, 100, 256, 512])
def test_the_ladder_rises_from_one_to_the_most(most: int) -> None:
    sizes = ladder(most)
    assert sizes[0] == 1 and sizes[-1] == most and list(sizes) == sorted(set(sizes))


def test_it_pads_less_than_twofold_and_less_than_a_quarter_from_128_rows() -> None:
    sizes = ladder(1024)
    for rows in range(1, 1025):
        padded = next(size for size in sizes if size >= rows)
        assert padded < 2 * rows or rows == 1
        assert rows < 128 or padded < 1.25 * rows + 1


@pytest.mark.parametrize(("rows", "size"), [
    ([3, 1, 0, 2], 4), ([0, 0, 0, 16], 16), ([5], 8), ([0, 0], None), ([17, 1], None), ([4, EAGER, 0], None), ([EAGER], None)])
def test_ranks_agree_on_the_graph_that_holds_the_fullest(rows: list[int], size: int | None) -> None:
    """Idle ranks follow, one prompt sends all to do without, and so does a step that is too large."""
    assert agreed_size(rows, ladder(16)) == size
    assert agreed_size(rows[::-1], ladder(16)) == size, "whoever looks sees the same"
