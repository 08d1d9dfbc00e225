"""Seconds of the steps of one instance, fast: its cost model read once on a grid, then straight lines between.

Legend: d DP ranks. For one rank steps come from tables; for more, the model is asked (ranks are unlike).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from twin.cost.batch import StepBatch
from twin.cost.model import CostModel

Array = npt.NDArray[np.float64]
_CONTEXTS = 6  # contexts a sequence between knots of the decode table
_TOKENS, _SEQS, _DEPTHS = 12, 7, 5  # knots of the table of steps with prompts


class StepTimes:
    """Steps of an instance whose ranks hold up to `seqs` sequences of up to `context` tokens each.

    decode_s: `n` sequences with `context` tokens in all. prompt_s: the same beside `tokens` of prompts whose
    query-key pairs a token are `depth` (past tokens and half the chunk).
    """

    def __init__(self, costs: CostModel, seqs: int, context: int, budget: int, chunk: float) -> None:
        self.costs, self.dp, self.chunk = costs, costs.pool.dp, max(chunk, 1.0)
        self._memo: dict[tuple[float, ...], float] = {}
        if self.dp == 1:
            self._contexts = np.linspace(1.0, float(context), _CONTEXTS)
            self._spacing = (float(context) - 1.0) / (_CONTEXTS - 1)
            mixed = self.mixed_grid(seqs, context, budget)
            self.fill(costs.decode_s(*self.decode_grid(seqs)), costs.steps_s(mixed))

    def decode_grid(self, seqs: int) -> tuple[Array, Array]:
        """Sequences and contexts of the table of decode steps, flat."""
        n = np.arange(1, seqs + 1, dtype=float)
        return np.repeat(n, _CONTEXTS), (n[:, None] * self._contexts[None, :]).ravel()

    def mixed_grid(self, seqs: int, context: int, budget: int) -> StepBatch:
        """Steps of the table of steps with prompts, flat."""
        tokens = np.geomspace(16.0, max(float(budget), 32.0), _TOKENS)
        n = np.unique(np.concatenate([[0.0], np.geomspace(1.0, max(seqs, 2), _SEQS - 1)]))
        depth = np.linspace(0.0, float(context), _DEPTHS)
        self._log_tokens, self._n, self._depth = np.log(tokens).tolist(), n.tolist(), depth.tolist()
        t, s, z = (a.ravel() for a in np.meshgrid(tokens, n, depth, indexing="ij"))
        rows = [a[:, None] for a in (s, s * context * 0.75, t, t * z, np.ceil(t / self.chunk))]
        return StepBatch(*rows)

    def fill(self, decode_s: Array, mixed_s: Array) -> None:
        """Fill both tables with seconds over their grids."""
        self._decode = decode_s.reshape(-1, _CONTEXTS).tolist()
        self._mixed = mixed_s.reshape(len(self._log_tokens), len(self._n), len(self._depth)).tolist()

    # --- one rank
    def decode_s(self, n: int, context: float) -> float:
        """Seconds of one decode step."""
        row = self._decode[min(n, len(self._decode)) - 1]
        at = min(max((context / n - 1.0) / self._spacing, 0.0), _CONTEXTS - 1.001)
        low = int(at)
        return float(row[low] + (at - low) * (row[low + 1] - row[low]))

    def prompt_s(self, n: int, tokens: float, depth: float) -> float:
        """Seconds of a step with prompts."""
        i, u = _place(self._log_tokens, math.log(max(tokens, 1.0)))
        j, v = _place(self._n, float(n))
        k, w = _place(self._depth, depth)
        total = 0.0
        for di, a in ((0, 1 - u), (1, u)):
            for dj, b in ((0, 1 - v), (1, v)):
                line = self._mixed[i + di][j + dj]
                total += a * b * (line[k] + w * (line[k + 1] - line[k]))
        return total

    # --- several ranks in lockstep
    def ranks_s(self, n: Sequence[int], context: Sequence[float], tokens: Sequence[float], depth: Sequence[float]) -> float:
        """Seconds of one step in which each rank does its own."""
        if self.dp == 1:
            return self.prompt_s(n[0], tokens[0], depth[0]) if tokens[0] else self.decode_s(n[0], context[0])
        rounded = (*n, *(float(f"{c:.2g}") for c in context), *(float(f"{t:.2g}") for t in tokens))
        if rounded not in self._memo:
            t = np.array(tokens, dtype=float)
            batch = StepBatch(np.array(n, dtype=float), np.array(context, dtype=float), t, t * np.array(depth),
                              np.ceil(t / self.chunk))
            self._memo[rounded] = float(self.costs.step_s(batch))
        return self._memo[rounded]


def _place(knots: list[float], x: float) -> tuple[int, float]:
    """Interval of `x` among `knots` and how far into it; held at the ends."""
    low = 0
    while low < len(knots) - 2 and knots[low + 1] <= x:
        low += 1
    return low, min(max((x - knots[low]) / (knots[low + 1] - knots[low]), 0.0), 1.5)
