"""The decoding sequences of one scheduler, as rows of arrays: a step over hundreds of them is a few operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twin.policy.kv_blocks import Blocks, TokenIds


@dataclass(slots=True, eq=False)
class Sequence:
    """One accepted request. `order` sorts by urgency: priority (lower first), then arrival.

    `computed` counts tokens whose KV is stored, `generated` those that came out; a sequence decodes once everything but
    its newest generated token is computed. While it is a row of `DecodeRows`, both counts live there.
    """

    request_id: int
    order: tuple[int, int]
    prompt_tokens: int
    max_new_tokens: int
    computed: int
    generated: int
    token_ids: TokenIds | None = None
    phase: str = "waiting"
    preemptions: int = 0

    @property
    def known_tokens(self) -> int:
        """Prompt and generated tokens: what must be computed before the next token can come out."""
        return self.prompt_tokens + self.generated

    @property
    def is_decode(self) -> bool:
        return self.generated > 0 and self.computed == self.known_tokens - 1


class DecodeRows:
    """Rows in the order of joining. `computed` tokens stored, `remaining` tokens still to come out, `room` tokens that
    the blocks held can store; all int64 [n].
    """

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._data: NDArray[np.int64] = np.zeros((3, 64), dtype=np.int64)
        self.sequences: list[Sequence] = []
        self._ids: tuple[int, ...] | None = ()

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def computed(self) -> NDArray[np.int64]:
        return self._data[0, :len(self.sequences)]

    @property
    def remaining(self) -> NDArray[np.int64]:
        return self._data[1, :len(self.sequences)]

    @property
    def room(self) -> NDArray[np.int64]:
        return self._data[2, :len(self.sequences)]

    @property
    def ids(self) -> tuple[int, ...]:
        """Request ids in row order: the same object until a row joins or leaves."""
        if self._ids is None:
            self._ids = tuple(sequence.request_id for sequence in self.sequences)
        return self._ids

    def join(self, sequence: Sequence) -> None:
        """Add a row for a sequence that decodes and holds its blocks."""
        n = len(self.sequences)
        if n == self._data.shape[1]:
            self._data = np.concatenate([self._data, np.zeros_like(self._data)], axis=1)
        room = self._blocks.held(sequence.request_id) * self._blocks.block_tokens
        self._data[:, n] = sequence.computed, sequence.max_new_tokens - sequence.generated, room
        self.sequences.append(sequence)
        sequence.phase = "decode"
        self._ids = None

    def leave(self, rows: Iterable[int]) -> list[Sequence]:
        """Take rows out, writing their counts back to their sequences; returns these in row order."""
        gone = sorted(rows)
        if not gone:
            return []
        left = [self.sequences[row] for row in gone]
        for row, sequence in zip(gone, left, strict=True):
            self.write_back(row, sequence)
        n = len(self.sequences)
        keep = np.ones(n, dtype=bool)
        keep[gone] = False
        self._data[:, :n - len(gone)] = self._data[:, :n][:, keep]
        for row in reversed(gone):
            del self.sequences[row]
        self._ids = None
        return left

    def gain(self, request_ids: tuple[int, ...], tokens: NDArray[np.int64]) -> None:
        """Book `tokens` (one number, or one a request) for these requests; those that are no rows any more are skipped.
        """
        where: NDArray[np.int64] | slice = slice(None)
        if request_ids != self.ids:  # some were cancelled while the step ran
            row_of = {request_id: row for row, request_id in enumerate(self.ids)}
            alive = [i for i, request_id in enumerate(request_ids) if request_id in row_of]
            where = np.array([row_of[request_ids[i]] for i in alive], dtype=np.int64)
            tokens = tokens[alive] if tokens.ndim else tokens
        self.computed[where] += tokens
        self.remaining[where] -= tokens

    def write_back(self, row: int, sequence: Sequence) -> None:
        sequence.computed = int(self._data[0, row])
        sequence.generated = sequence.max_new_tokens - int(self._data[1, row])

    def row_of(self, request_id: int) -> int:
        return self.ids.index(request_id)

    def grow(self, row: int, tokens: int) -> bool:
        """Reserve blocks so that the row can store `tokens` tokens."""
        request_id = self.sequences[row].request_id
        if not self._blocks.reserve(request_id, tokens):
            return False
        self._data[2, row] = self._blocks.held(request_id) * self._blocks.block_tokens
        return True

    def grow_all(self, width: NDArray[np.int64] | int) -> bool:
        """Reserve blocks for `width` more tokens in every row. False, and nothing changed, when some are missing."""
        lack = self.computed + width - self.room
        rows = np.flatnonzero(lack > 0)
        if not len(rows):
            return True
        more = -(-lack[rows] // self._blocks.block_tokens)
        if more.sum() > self._blocks.num_free:
            return False
        self._blocks.extend([self.sequences[row].request_id for row in rows.tolist()], more.tolist())
        self.room[rows] += more * self._blocks.block_tokens
        return True

    def short_rows(self, width: NDArray[np.int64] | int) -> list[int]:
        """Rows whose blocks cannot store `width` more tokens, most urgent first."""
        short = np.flatnonzero(self.computed + width > self.room).tolist()
        return sorted(short, key=lambda row: self.sequences[row].order)

    def blocks_missing(self, steps: int) -> int:
        """Blocks that all rows together lack to store `steps` more tokens each."""
        lack = self.computed + steps - self.room
        return int((-(-lack[lack > 0] // self._blocks.block_tokens)).sum())

    def steps_that_fit(self) -> int:
        """Steps of one token for every row until the first row ends or the free blocks run out."""
        if not self.sequences:
            return 0
        steps = int(self.remaining.min())
        free = self._blocks.num_free
        if self.blocks_missing(steps) <= free:
            return steps
        fits, fails = 0, steps
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if self.blocks_missing(middle) <= free else (fits, middle)
        return fits
