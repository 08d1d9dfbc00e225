"""Steps that an engine takes before its first request, so that no request waits for a kernel to be compiled.

Steps that a graph holds are met when they are captured. Other steps with prompts run without one, at any number of
tokens; which kernels they need changes at thresholds (tiles, histograms, which implementation serves the experts) that are
further than a quarter apart. So four steps for every doubling of the tokens, and one at the limit, meet all of them.
Integers that change from step to step are not specialised on by kernels. Decodes beside prompts are cut finer the longer
the context: one such step at every power of two of blocks meets those kernels.

The steps are real ones, of random tokens: every backend and every exchange takes them as it takes a request's. What they
write into the cache is overwritten before it is read; what they counted as load of experts is forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from runtime.batch import Segment, make_step
from runtime.compiles import compiles

if TYPE_CHECKING:
    from runtime.rank import Rank

_SEED = 7


def warm_up(rank: Rank) -> dict[str, float]:
    """Take every step of `warm_steps`; seconds and kernels compiled. All ranks of an instance call this at the same time: their
    steps are the same, as their limits are."""
    began, before = time.monotonic(), compiles.total
    steps = 0
    for segments in warm_steps(rank):
        tokens = sum(len(s.token_ids) for s in segments)
        step = make_step(segments, rank.pool.block_tokens, rank.device)
        with torch.inference_mode():
            if rank.mtp is None:
                rank.transformer.forward(step, rank.kv, max(1, -(-tokens // rank.at.tp)))
            else:
                rank.transformer.head(rank.transformer.hidden([step], rank.kv, max(1, -(-tokens // rank.at.tp)))[step.logit_rows])
        steps += 1
    for ffn in rank.transformer.moe_layers:
        ffn.load_E.zero_()
        if ffn.pairs_EE is not None:
            ffn.pairs_EE.zero_()
    if rank.device.type == "cuda":
        torch.cuda.synchronize(rank.device)
    return {"seconds": time.monotonic() - began, "kernels": compiles.total - before, "steps": steps}


def warm_steps(rank: Rank) -> Iterator[list[Segment]]:
    """The steps' segments, the largest first: what it takes of the allocator serves the smaller ones."""
    from runtime.loop import limits_of  # which imports the rank

    limits, block = limits_of(rank), rank.pool.block_tokens
    stream = torch.Generator().manual_seed(_SEED)
    longest = min(rank.max_context, limits.max_batch_tokens)
    room = rank.kv_blocks * block

    def ids(count: int) -> list[int]:
        return torch.randint(rank.model.vocab, (count,), generator=stream).tolist()

    def prompts(tokens: int, first_block: int = 0) -> list[Segment]:
        """Several where they fit, of unlike lengths."""
        found = []
        most = min(longest, -(-(tokens * 3 // 5 + 1) // block) * block)
        while tokens > 0 and first_block < rank.kv_blocks:
            count = min(tokens, most, (rank.kv_blocks - first_block) * block)
            most, used = longest, -(-count // block)
            found.append(Segment(ids(count), 0, range(first_block, first_block + used), is_prefill=True, wants_logits=True))
            tokens, first_block = tokens - count, first_block + used
        return found

    held = rank.prompts.sizes[-1] if rank.prompts is not None else 0
    for tokens in ladder(min(limits.max_batch_tokens, room), 4):
        if tokens > held:
            yield prompts(tokens)
    for context in ladder(min(rank.max_context, room - block), 1):
        used = -(-context // block)
        decode = Segment(ids(1), context - 1, range(used), wants_logits=True)
        yield [decode, *prompts(min(block, limits.max_batch_tokens - 1), used)]
        if 1 < context < limits.max_batch_tokens:  # the rest of a prompt whose first part came before
            half = context // 2
            yield [Segment(ids(context - half), half, range(used), is_prefill=True, wants_logits=True)]


def ladder(most: int, each: int) -> list[int]:
    """`most`, and below it `each` evenly spaced numbers in every doubling from 1, falling."""
    marks = {(each + i << octave) // each for octave in range(most.bit_length()) for i in range(each)} if most > 0 else set()
    return sorted({m for m in marks if m < most} | ({most} if most > 0 else set()), reverse=True)
