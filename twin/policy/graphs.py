"""Which sizes of step our engine captures as CUDA graphs: the runtime captures them, the cost model pads to them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


def ladder(most: int) -> tuple[int, ...]:
    """Rows: 1, 2, 4, 8, then multiples of 16 to 64, of 32 to 256, of 64 above; `most` is the last."""
    sizes = (1, 2, 4, 8, *range(16, 64, 16), *range(64, 256, 32), *range(256, most + 64, 64))
    return (*(s for s in sizes if s < most), most)


PROMPT_GRAPH_TOKENS = 4096
"""Tokens of the largest step with prompts that our engine captures: a longer one keeps the GPU busy past its launches."""

_FIRST_PROMPT_RUNG, _FINER_FROM = 64, 1024


@lru_cache(maxsize=256)
def prompt_ladder(most_tokens: int, each: int = 4) -> tuple[int, ...]:
    """Tokens of a step with prompts that a graph is captured for: `each` evenly spaced rungs a doubling from 64 on (64, 80, 96,
    112, 128, 160, ...), twice as many from 1024 on, where padding costs more than launches; the least of `most_tokens` and
    `PROMPT_GRAPH_TOKENS` is the last. `each` divides 64."""
    last = min(most_tokens, PROMPT_GRAPH_TOKENS)
    rungs: list[int] = []
    start = _FIRST_PROMPT_RUNG
    while start < last:
        rungs += range(start, min(2 * start, last), start // (each if start < _FINER_FROM else 2 * each))
        start *= 2
    return (*rungs, last)


EAGER = -1
"""A rank's number of rows where its step is none that a graph can hold: it computes prompts."""


def agreed_size(rows: Sequence[int], sizes: Sequence[int]) -> int | None:
    """Which of the ascending `sizes` all ranks of an instance run together, from the rows that each of them has.

    Ranks exchange tokens inside a step, so a graph is of use only if every rank replays the one of the same size: the
    smallest that holds the rank with most rows; a rank without any runs padding alone. None: nobody has rows, a rank has
    `EAGER`, or one has more than the largest size. Then all do without a graph.
    """
    most = max(rows)
    if min(rows) < 0 or most == 0:
        return None
    return next((size for size in sizes if size >= most), None)
