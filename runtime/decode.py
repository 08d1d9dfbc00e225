"""Decode steps as whole CUDA graphs, one for each size of a ladder, over buffers that never move.

A step of n rows runs a graph that holds them; the rows above are padding, which writes no KV and routes to no expert.
Where an instance has many ranks all of them replay the graph of one size in the same step (`twin.policy.graphs`), an
idle one with padding alone: rows and what is told of them travel between the graphs on the devices. Each graph ends with
the greedy token of every row, fed back as the next step's input, so that steps of the same sequences follow one another
without the host (`again`). On a CPU the same step runs without a graph.

Legend: B rows of a graph, P blocks of a table, V vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch

from runtime.batch import Segment, StepInput, rows_of
from runtime.kernels.step import feed_back, place_tokens
from runtime.model.transformer import Transformer
from twin.policy.graphs import EAGER, ladder

T = TypeVar("T")


@dataclass(frozen=True)
class Drawn:
    """Of a step's n rows: logits fp32 [n, V], greedy tokens int64 [n] and finished states [n, H], overwritten by the next
    step."""

    logits: torch.Tensor
    tokens: torch.Tensor
    states: torch.Tensor


def captured(step: Callable[[], T], pool: tuple[int, int] | None, stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, T]:
    """A step's graph, in a pool of memory, and what the step gave, to be overwritten by replays. The step runs once before:
    kernels are compiled and handles made outside the capture."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # NCCL's own threads ask after their work meanwhile, which another mode takes for a part of the capture
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        given = step()
    return graph, given


class DecodeRunner:
    """Steps of up to `most` rows, one for each token of a decode (drafts too), of sequences of up to `max_context`
    tokens. `sizes` are captured by `capture`, large to small; those of `halve_from` rows and more go in two halves that
    overlap (None: none does)."""

    def __init__(self, transformer: Transformer, kv: list[torch.Tensor], block_tokens: int, *, most: int, max_context: int,
                 sizes: Sequence[int] | None = None, halve_from: int | None = None) -> None:
        self.transformer, self.kv, self.block_tokens, self.halve_from = transformer, kv, block_tokens, halve_from
        self.most, self.max_context = most, max_context
        self.sizes = sorted(sizes or ladder(most))
        device = kv[0].device
        width = -(-max_context // block_tokens)
        self.ids_B = torch.zeros(most, dtype=torch.int64, device=device)
        self.lens_B = torch.zeros(most, dtype=torch.int32, device=device)
        self.tables_BP = torch.zeros(most, width, dtype=torch.int32, device=device)
        self._positions_B, self._slots_B = torch.zeros_like(self.ids_B), torch.zeros_like(self.ids_B)
        self._rows_B = torch.arange(most + 1, dtype=torch.int32, device=device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Drawn]] = {}
        self._pool: tuple[int, int] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._size = self._left = 0
        self._tables = np.zeros((most, width), dtype=np.int32)  # what the device has, or is about to
        self._blocks: list[list[int]] = [[] for _ in range(most)]

    def capture(self) -> None:
        """Capture every size into one memory pool, as all ranks of the instance must at the same time: each size runs once
        before it is captured, and meets the other ranks. Raises torch.OutOfMemoryError where the device has no room."""
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.lens_B.zero_()
        for size in reversed(self.sizes):
            self.capture_one(size)
        torch.cuda.synchronize()

    def capture_one(self, size: int) -> None:
        """Capture a size anew, with the kernels that serve it now. `capture` comes first."""
        assert self._stream is not None
        self.lens_B.zero_()
        self.graphs[size] = captured(lambda: self._step(size), self._pool, self._stream)

    def rehearse(self, size: int, replays: int = 15) -> tuple[float, torch.Tensor]:
        """Median seconds of a captured size, in made-up contexts of up to 1024 tokens, and the logits of a first step, of
        the same tokens every time. What it writes into the cache means nothing; padding alone is left as input."""
        context, width = min(1024, self.max_context), self.tables_BP.shape[1]
        tables = torch.arange(size * width, dtype=torch.int32, device=self.ids_B.device) % len(self.kv[0])
        self.tables_BP[:size] = tables.view(size, width)
        self._blocks = [[] for _ in range(self.most)]
        self.lens_B.zero_()
        self.ids_B[:size] = torch.arange(size, device=self.ids_B.device) * 7919 % self.transformer.model.vocab
        seconds, logits = [], torch.empty(0)
        for i in range(replays + 3):
            self.lens_B[:size] = context  # a step makes it longer
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.graphs[size][0].replay()
            end.record()
            end.synchronize()
            seconds += [begin.elapsed_time(end) / 1e3] if i > 2 else []
            logits = self.graphs[size][1].logits.clone() if i == 0 else logits
        self.lens_B.zero_()
        return statistics.median(seconds), logits

    @staticmethod
    def rows(segments: Sequence[Segment]) -> int:
        """Rows of a step of decodes, drafts counted; `EAGER` for one that computes prompts."""
        return EAGER if any(s.is_prefill for s in segments) else sum(len(s.token_ids) for s in segments)

    def run(self, segments: Sequence[Segment], size: int | None = None) -> Drawn:
        """Take a step of decodes in `size` rows: one of `sizes`, the same on all ranks (None: the least that holds them)."""
        segments = rows_of(segments)
        n = len(segments)
        self._size = size or next(size for size in self.sizes if size >= n)
        self._load(segments)
        return self._take(n)

    def again(self, n: int) -> Drawn:
        """The step after the last one, of the same n sequences, each with its greedy token as input.

        Raises ValueError where a sequence would outgrow the blocks that `run` was given: its token's KV would go to a block
        of somebody else.
        """
        if self._left < 1:
            raise ValueError("a sequence has outgrown its blocks; run() brings more")
        self._left -= 1
        return self._take(n)

    def _take(self, n: int) -> Drawn:
        if self.graphs:
            graph, drawn = self.graphs[self._size]
            graph.replay()
        else:
            drawn = self._step(self._size)
        return Drawn(drawn.logits[:n], drawn.tokens[:n], drawn.states[:n])

    def _load(self, segments: Sequence[Segment]) -> None:
        n, starts = len(segments), [s.start for s in segments]
        lens = np.zeros(self._size, dtype=np.int32)
        lens[:n] = starts
        lens[:n] += 1
        most, changed = self.tables_BP.shape[1], False
        for i, segment in enumerate(segments):  # a table changes once a block; which rows are whose, when somebody leaves
            blocks = list(segment.blocks)
            if blocks != self._blocks[i]:
                self._blocks[i], changed = blocks, True
                self._tables[i, :len(blocks)] = blocks[:most]
        held = [min(len(blocks), most) for blocks in self._blocks[:n]]
        self._left = min((count * self.block_tokens - start - 1 for count, start in zip(held, starts, strict=True)), default=0)
        assert self._left >= 0, "a table too short for its context"
        self.ids_B[:n].copy_(torch.tensor([s.token_ids[0] for s in segments], dtype=torch.int64))
        self.lens_B[:self._size].copy_(torch.from_numpy(lens))
        if changed:
            width = max(held)
            self.tables_BP[:n, :width].copy_(torch.from_numpy(self._tables[:n, :width]))

    def _step(self, size: int) -> Drawn:
        lens, tables = self.lens_B[:size], self.tables_BP[:size]
        positions, slots = self._positions_B[:size], self._slots_B[:size]
        place_tokens(lens, tables, self.block_tokens, positions, slots)
        halves = self.halve_from is not None and size >= max(2, self.halve_from)
        cuts = [0, -(-size // 2), size] if halves else [0, size]
        steps = [StepInput(self.ids_B[a:b], positions[a:b], slots[a:b], tables[a:b], lens[a:b], self._rows_B[:b - a + 1],
                           slice(None), b - a, (1,) * (b - a), (self.max_context,) * (b - a)) for a, b in pairwise(cuts)]
        with torch.inference_mode():
            states = self.transformer.hidden(steps, self.kv, -(-cuts[1] // self.transformer.at.tp))
            logits = self.transformer.head(states)
            tokens = logits.argmax(-1)
            feed_back(tokens, self.ids_B[:size], lens)
        return Drawn(logits, tokens, states)
