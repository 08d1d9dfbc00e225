"""Steps with prompts as CUDA graphs, for the launches of a short prompt take the host longer than the device computes.

A graph holds a number of tokens of a ladder (`twin.policy.graphs`), whatever sequences they belong to: which rows ask for what is
data on the device (`runtime.pieces`). Rows above are padding, which writes no KV and goes to no expert: in attention one more
prompt, so that nothing unwritten is read. Prompts begin in the step and end in it. Decodes may come first: a graph with room for
them looks for each of its first rows whether it is one. The head follows outside, for the rows that want it.

Legend: N tokens of a graph, D of its rows that may be decodes, W pieces, H hidden, P blocks of a table, R rows that want logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from runtime.batch import Segment, StepInput, lay_out, rows_of, tables_of, wanted_rows
from runtime.decode import captured
from runtime.model.transformer import Transformer
from runtime.pieces import most_pieces, pieces
from twin.policy.graphs import prompt_ladder

FEW_DECODES = 32
"""So many decodes are cut along their contexts as few are, so that long ones do not take long; more have a graph of their own."""
Key = tuple[int, int]
"""N, D."""


class PromptRunner:
    """Steps of up to `most` tokens of up to `sequences` sequences, with up to `decodes` decodes of up to `max_context` tokens."""

    def __init__(self, transformer: Transformer, kv: list[torch.Tensor], block_tokens: int, *, most: int, sequences: int,
                 decodes: int, max_context: int, sizes: Sequence[int] | None = None) -> None:
        self.transformer, self.kv, self.block_tokens = transformer, kv, block_tokens
        self.sequences, self.max_context = sequences, max_context
        self.sizes = sorted(sizes or prompt_ladder(most))
        self.mixed_sizes = sorted(sizes or prompt_ladder(most, 2)) if decodes else []
        self._rooms = sorted({min(FEW_DECODES, decodes), decodes} - {0})
        device, hidden, dtype = kv[0].device, transformer.model.hidden, transformer.params["embed"].dtype
        last = self.sizes[-1]
        room = 3 * last + 2 * (1 + most_pieces(last, sequences + 1)) + decodes
        self._numbers = torch.zeros(room, dtype=torch.int64, device=device)
        self._tables_DP = torch.zeros(decodes, -(-max_context // block_tokens), dtype=torch.int32, device=device)
        self._starts = torch.arange(decodes + 2, dtype=torch.int32, device=device)  # asked for its device alone
        self.states_NH = torch.zeros(last, hidden, dtype=dtype, device=device)
        self.graphs: dict[Key, torch.cuda.CUDAGraph] = {}

    @property
    def keys(self) -> list[Key]:
        """All graphs, large to small."""
        plain = [(size, 0) for size in self.sizes]
        return sorted(plain + [(size, room) for size in self.mixed_sizes for room in self._rooms], reverse=True)

    def capture(self) -> None:
        """Capture every graph into one memory pool. Raises torch.OutOfMemoryError where the device has no room."""
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self._numbers.zero_()
        for key in self.keys:
            self._numbers[2 * key[0]:3 * key[0]] = -1  # slots: padding alone
            self._numbers[3 * key[0]:] = 0
            self.graphs[key] = captured(lambda key=key: self._step(*key), pool, stream)[0]
        torch.cuda.synchronize()

    def key_of(self, segments: Sequence[Segment]) -> Key | None:
        """The graph that holds a step; None: there is none."""
        decodes = sum(len(s.token_ids) for s in segments if not s.is_prefill)
        tokens = sum(len(s.token_ids) for s in segments)
        if decodes == tokens or len(segments) > self.sequences or any(s.is_prefill and s.start for s in segments):
            return None
        size = next((size for size in (self.mixed_sizes if decodes else self.sizes) if size >= tokens), None)
        room = next((room for room in self._rooms if room >= decodes), None) if decodes else 0
        return None if size is None or room is None else (size, room)

    def run(self, segments: Sequence[Segment], key: Key | None = None) -> torch.Tensor:
        """Logits fp32 [R, V] of the rows that want them, of a step that `key_of` has a graph for; `states_NH` has the states of
        all its tokens until the next step."""
        key = key or self.key_of(segments)
        assert key is not None, "no graph holds this step"
        segments = rows_of(segments)
        rows = self._load(segments, key)
        self.again(key)
        return self.head(rows)

    def again(self, key: Key) -> None:
        """Compute what was loaded last."""
        if self.graphs:
            self.graphs[key].replay()
        else:
            self._step(*key)

    def head(self, rows_R: torch.Tensor) -> torch.Tensor:
        """Logits of rows of the last step."""
        with torch.inference_mode():
            return self.transformer.head(self.states_NH[rows_R])

    def _load(self, segments: Sequence[Segment], key: Key) -> torch.Tensor:
        """Bring a step to the device; the rows whose logits are wanted."""
        size, room = key
        laid, decodes = lay_out(segments, self.block_tokens), sum(not s.is_prefill for s in segments)
        tokens, lines = len(laid.ids_T), 1 + most_pieces(size, self.sequences + 1)
        numbers = np.zeros(3 * size + 2 * lines + -(-room // 2), dtype=np.int64)
        numbers[:tokens], numbers[size:size + tokens] = laid.ids_T, laid.positions_T
        numbers[2 * size:3 * size] = -1
        numbers[2 * size:2 * size + tokens] = laid.slots_T
        narrow = numbers[3 * size:].view(np.int32)
        prompts = [*laid.lens[decodes:], size - tokens]
        work = pieces(prompts, prompts)
        work[1:, ::2] += decodes  # first rows and first keys, counted among all tokens
        narrow[:work.size] = work.ravel()
        narrow[4 * lines:4 * lines + decodes] = laid.contexts[:decodes]
        self._numbers[:len(numbers)].copy_(torch.from_numpy(numbers))
        if decodes:
            tables = tables_of(segments[:decodes], laid.contexts[:decodes], self.block_tokens)
            self._tables_DP[:decodes, :tables.shape[1]].copy_(torch.from_numpy(tables))
        return torch.from_numpy(wanted_rows(segments, laid.lens)).to(self.states_NH.device)

    def _step(self, size: int, room: int) -> None:
        lines, decodes = 1 + most_pieces(size, self.sequences + 1), min(room, size)
        narrow = self._numbers[3 * size:].view(torch.int32)
        lens_D = narrow[4 * lines:4 * lines + decodes]
        ids, positions, slots = self._numbers[:3 * size].view(3, size)
        step = StepInput(ids, positions, slots, self._tables_DP[:decodes], lens_D, self._starts, slice(None), decodes,
                         (*(1,) * decodes, size), (*(self.max_context,) * decodes, size), narrow[:4 * lines].view(lines, 4))
        with torch.inference_mode():
            self.states_NH[:size] = self.transformer.hidden([step], self.kv, size)
