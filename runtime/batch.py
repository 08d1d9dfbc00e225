"""One step's batch as tensors: what a rank computes, whatever mixture of prompts and decodes it is.

Legend: T tokens of the step, S sequences, B blocks of the longest table. Decodes come first, then prompt chunks; a
sequence's tokens are consecutive. A decode with drafts is as many rows of one token as it has tokens: each sees what the
rows before it stored, so that no kernel need know of drafts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from runtime.pieces import pieces


@dataclass(slots=True)  # not frozen: hundreds are made every step, and that takes three times as long
class Segment:
    """One sequence's part of a step: its tokens from position `start`, and the blocks of all its context. A decode's
    tokens are its newest and drafts after it; all their rows give logits. Nothing changes one."""

    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    is_prefill: bool = False
    wants_logits: bool = True


@dataclass(frozen=True)
class StepInput:
    """Tensors of a step. The Python integers beside them bound sizes without asking the device.

    `slots_T` is where a token's KV goes: block * block_tokens + offset, -1 for nowhere (padding).
    `seq_lens_S` counts context including this step; `query_starts` [S+1] delimits each sequence's tokens.
    `logit_rows` are the token rows whose next token is wanted, in sequence order.

    `held_W4` is there where launches are captured while sequences change: whole prompts as pieces (`runtime.pieces`), of rows
    counted among all tokens. The first `num_decodes` tokens may then be decodes: those whose `seq_lens_S` is not 0.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    block_tables_SB: torch.Tensor
    seq_lens_S: torch.Tensor
    query_starts: torch.Tensor
    logit_rows: torch.Tensor | slice
    num_decodes: int
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    held_W4: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.token_ids_T.shape[0]

    @property
    def first_prompt_row(self) -> int:
        """Where rows of prompts may begin: behind the decodes; in a captured step, which rows are whose changes."""
        return 0 if self.held_W4 is not None else self.num_decodes

    @cached_property
    def _pieces(self) -> dict[int, torch.Tensor]:
        return {}

    def prompt_parts(self, most_keys: int) -> Iterator[tuple[slice, StepInput]]:
        """The prompts in as few parts as look at no more positions each, unless one alone does: a part's rows among the prompts'
        tokens, and the part as a step."""
        lens, contexts, n = self.query_lens, self.context_lens, self.num_decodes
        first, row = n, 0
        while first < len(lens):
            last = first + 1
            while last < len(lens) and sum(contexts[first:last + 1]) <= most_keys:
                last += 1
            rows = sum(lens[first:last])
            if (first, last) == (n, len(lens)):
                yield slice(0, rows), self
                return
            yield slice(row, row + rows), replace(
                self, block_tables_SB=self.block_tables_SB[first:last], seq_lens_S=self.seq_lens_S[first:last],
                query_starts=self.query_starts[first:last + 1] - (row + n), num_decodes=0, query_lens=lens[first:last],
                context_lens=contexts[first:last])
            first, row = last, row + rows

    def prompt_keys(self, window: int = 0) -> list[int]:
        """Positions that each prompt's tokens look at: all of its context, or what a window reaches back to."""
        n = self.num_decodes
        return [min(context, length + window - 1) if window else context
                for length, context in zip(self.query_lens[n:], self.context_lens[n:], strict=True)]

    def prompt_pieces(self, window: int = 0) -> torch.Tensor:
        """The prompts' pieces, rows counted from `first_prompt_row`, each prompt's keys behind those of the one before."""
        if self.held_W4 is not None:
            return self.held_W4
        lens = self.query_lens[self.num_decodes:]
        keys = self.context_lens[self.num_decodes:]
        reach = 0 if lens == keys else window
        if reach not in self._pieces:
            found = pieces(lens, self.prompt_keys(reach) if reach else keys)
            self._pieces[reach] = torch.from_numpy(found).to(self.query_starts.device)
        return self._pieces[reach]


@dataclass(frozen=True)
class Laid:
    """A step's segments as arrays on the host: int64 of each token, lengths and contexts of each sequence."""

    ids_T: npt.NDArray[np.int64]
    positions_T: npt.NDArray[np.int64]
    slots_T: npt.NDArray[np.int64]
    lens: tuple[int, ...]
    contexts: tuple[int, ...]


def lay_out(segments: Sequence[Segment], block_tokens: int) -> Laid:
    """Segments behind one another."""
    lens = [len(s.token_ids) for s in segments]
    contexts = [s.start + n for s, n in zip(segments, lens, strict=True)]
    positions, slots = (np.empty(sum(lens), dtype=np.int64) for _ in range(2))
    row = 0
    for segment, context in zip(segments, contexts, strict=True):
        blocks = np.asarray(segment.blocks[: -(-context // block_tokens)], dtype=np.int64)
        assert len(blocks) * block_tokens >= context, "a table too short for its context"
        where, stop = np.arange(segment.start, context), row + context - segment.start
        positions[row:stop] = where
        slots[row:stop] = blocks[where // block_tokens] * block_tokens + where % block_tokens
        row = stop
    ids = np.fromiter((t for s in segments for t in s.token_ids), dtype=np.int64, count=row)
    return Laid(ids, positions, slots, tuple(lens), tuple(contexts))


def tables_of(segments: Sequence[Segment], contexts: Sequence[int], block_tokens: int) -> npt.NDArray[np.int32]:
    """The blocks of each sequence's context [S, B], filled up with block 0."""
    width = max((-(-c // block_tokens) for c in contexts), default=0)
    tables = np.zeros((len(segments), width), dtype=np.int32)
    for row, segment, context in zip(tables, segments, contexts, strict=True):
        blocks = segment.blocks[: -(-context // block_tokens)]
        row[: len(blocks)] = blocks
    return tables


def make_step(segments: Sequence[Segment], block_tokens: int, device: torch.device | str = "cpu") -> StepInput:
    """Lay segments out as a step; decodes must come before prefills. An empty list is the batch of an idle rank."""
    segments = rows_of(segments)
    decodes = sum(not s.is_prefill for s in segments)
    assert all(s.is_prefill for s in segments[decodes:]), "decodes come first"
    laid = lay_out(segments, block_tokens)
    starts = np.array([0, *accumulate(laid.lens)], dtype=np.int32)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return StepInput(tensor(laid.ids_T), tensor(laid.positions_T), tensor(laid.slots_T),
                     tensor(tables_of(segments, laid.contexts, block_tokens)), tensor(np.array(laid.contexts, dtype=np.int32)),
                     tensor(starts), tensor(wanted_rows(segments, laid.lens)), decodes, laid.lens, laid.contexts)


def wanted_rows(segments: Sequence[Segment], lens: Sequence[int]) -> npt.NDArray[np.int64]:
    """The last token's row of every segment that wants logits."""
    return np.array([stop - 1 for s, stop in zip(segments, accumulate(lens), strict=True) if s.wants_logits], dtype=np.int64)


def rows_of(segments: Sequence[Segment]) -> list[Segment]:
    """Decodes with drafts as decodes of one token each; everything else as it is."""
    if all(s.is_prefill or len(s.token_ids) == 1 for s in segments):
        return list(segments)
    return [row for s in segments for row in ([s] if s.is_prefill or len(s.token_ids) == 1 else
                                              [Segment((t,), s.start + i, s.blocks) for i, t in enumerate(s.token_ids)])]


def logit_rows(steps: Sequence[StepInput]) -> torch.Tensor | slice:
    """The rows of several steps' tokens, one step after another, whose next tokens are wanted."""
    if len(steps) == 1:
        return steps[0].logit_rows
    starts = accumulate((step.num_tokens for step in steps), initial=0)
    return torch.cat([step.logit_rows + start for step, start in zip(steps, starts, strict=False)
                      if isinstance(step.logit_rows, torch.Tensor)])


def halve(segments: Sequence[Segment]) -> tuple[list[Segment], list[Segment]]:
    """The step's tokens in two parts of equal size (the first may have one more), in order; one segment may be cut."""
    first: list[Segment] = []
    second: list[Segment] = []
    room = -(-sum(len(s.token_ids) for s in segments) // 2)
    for s in segments:
        here = min(room, len(s.token_ids))
        room -= here
        if here == len(s.token_ids):
            first.append(s)
        elif not here:
            second.append(s)
        else:
            first.append(replace(s, token_ids=s.token_ids[:here], wants_logits=s.wants_logits and not s.is_prefill))
            second.append(replace(s, token_ids=s.token_ids[here:], start=s.start + here))
    return first, second
