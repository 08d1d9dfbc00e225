"""The ladder of graph sizes that runtime and cost model share."""

from __future__ import annotations

import pytest

from twin.policy.graphs import EAGER, PROMPT_GRAPH_TOKENS, agreed_size, ladder, prompt_ladder


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


@pytest.mark.parametrize("each", [2, 4])
@pytest.mark.parametrize("most", [1, 63, 64, 65, 100, 3000, 4096, 20_000])
def test_steps_with_prompts_have_even_rungs_a_doubling(most: int, each: int) -> None:
    rungs = prompt_ladder(most, each)
    last = min(most, PROMPT_GRAPH_TOKENS)
    assert rungs[-1] == last and list(rungs) == sorted(set(rungs))
    assert len(rungs) == 1 or rungs[0] == 64
    for tokens in range(65, last + 1):
        assert min(rung for rung in rungs if rung >= tokens) <= tokens * (1 + 1 / each), "no more padding than a rung"


def test_rungs_beside_decodes_are_every_second() -> None:
    assert prompt_ladder(320) == (64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
    assert prompt_ladder(4096, each=2) == prompt_ladder(4096)[::2]
    assert prompt_ladder(48) == (48,)


@pytest.mark.parametrize(("rows", "size"), [
    ([3, 1, 0, 2], 4), ([0, 0, 0, 16], 16), ([5], 8), ([0, 0], None), ([17, 1], None), ([4, EAGER, 0], None), ([EAGER], None)])
def test_ranks_agree_on_the_graph_that_holds_the_fullest(rows: list[int], size: int | None) -> None:
    """Idle ranks follow, one prompt sends all to do without, and so does a step that is too large."""
    assert agreed_size(rows, ladder(16)) == size
    assert agreed_size(rows[::-1], ladder(16)) == size, "whoever looks sees the same"
