"""The ladder of graph sizes that runtime and cost model share."""

from __future__ import annotations

import pytest

from twin.policy.graphs import ladder


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
