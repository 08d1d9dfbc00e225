"""A step's forward pass: from a graph of decodes, from a graph of prompts, or kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from runtime.batch import Segment, halve, logit_rows, make_step
from runtime.rank import Rank


class Computed(NamedTuple):
    """Logits of the rows that asked; their greedy tokens, where the step gives them as well; the finished states of all
    tokens, where somebody needs them."""

    logits: torch.Tensor
    tokens: torch.Tensor | None
    states: torch.Tensor | None


def forward(rank: Rank, segments: list[Segment], mark: Callable[[str], None], *, graph: int | None, tokens: int,
            capacity: int) -> Computed:
    """Compute a step, as all ranks of the instance do at the same time. `graph`: of which size the decode graph is that all
    take (None: none is); `tokens`: the most of any DP rank; `capacity`: the most that any rank dispatches."""
    if graph is not None:
        assert rank.decode is not None
        mark("graph")
        drawn = rank.decode.run(segments, graph)
        return Computed(drawn.logits, drawn.tokens, drawn.states)
    key = rank.prompts.key_of(segments) if rank.prompts is not None else None
    if key is not None:
        assert rank.prompts is not None
        mark("graph")
        return Computed(rank.prompts.run(segments, key), None, None)
    pool, model = rank.pool, rank.transformer
    overlaps = pool.tbo and tokens >= pool.tbo_min_tokens
    steps = [make_step(part, pool.block_tokens, rank.device) for part in (halve(segments) if overlaps else [segments])]
    if rank.progress is not None:
        rank.progress.begin(segments, len(steps))
    with torch.inference_mode():
        if not overlaps and rank.mtp is None:
            return Computed(model.forward(steps[0], rank.kv, capacity), None, None)
        states = model.hidden(steps, rank.kv, -(-capacity // 2) if overlaps else capacity)
        return Computed(model.head(states[logit_rows(steps)]), None, states)
