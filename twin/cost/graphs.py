"""Which of a pool's steps are one replay of a CUDA graph, and what they are padded to. `Engine` says which sizes there are.

Legend of shapes: n steps, d DP ranks, f features, k graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twin.cost.batch import INDEX, Array
from twin.cost.engines import Engine
from twin.spec.plan import PoolPlan

_TOKENS, _PADDING, _NEW, _PAIRS = (INDEX[name] for name in ("tokens", "padding", "prefill_tokens", "prefill_pairs"))
_NONE: Array = np.zeros(0)


@dataclass(frozen=True)
class Graphs:
    """Sizes [k], ascending, empty where there are none: rows of steps that decode alone, tokens of steps of whole prompts alone
    and of whole prompts beside decodes."""

    decodes: Array
    prompts: Array
    beside: Array

    @classmethod
    def of(cls, engine: Engine, pool: PoolPlan, *, prompts: bool) -> Graphs:
        """Those of a pool. `prompts`: whether its ranks could run prompts from graphs, if the engine has such."""
        if not pool.cuda_graphs:
            return cls(_NONE, _NONE, _NONE)
        decodes = np.array(engine.graphs(pool.max_num_seqs, pool.mtp_draft_tokens), dtype=float)
        alone, beside = engine.prompt_graphs(pool.max_step_tokens) if prompts else ((), ())
        return cls(decodes, np.array(alone, dtype=float), np.array(beside, dtype=float))

    def pad(self, queries: Array) -> Array:
        """Tokens of steps that decode alone, rounded up to the next graph; unchanged beyond the largest."""
        return _up(self.decodes, queries)

    def fill(self, x: Array) -> None:
        """Round up, in place, the tokens of steps [..., d, f] that hold whole prompts. What is added is known as padding: rows
        that dense products compute, but no expert, no attention and no LM head."""
        if not len(self.prompts):
            return
        tokens = x[..., _TOKENS]
        full = np.where(x[..., INDEX["any_decode"]] > 0, _up(self.beside, tokens), _up(self.prompts, tokens))
        x[..., _PADDING] = np.where((x[..., _NEW] > 0) & _whole(x), full - tokens, 0.0)
        x[..., _TOKENS] += x[..., _PADDING]

    def cover(self, x: Array) -> npt.NDArray[np.bool_]:
        """Which steps [n, d, f] are one replay: [n]."""
        prompts = (x[..., INDEX["any_prefill"]] > 0).any(axis=-1)
        fits = x[..., _TOKENS].max(axis=-1) <= np.where(prompts, _last(self.prompts), _last(self.decodes))
        return np.asarray(fits & _whole(x).all(axis=-1)) if len(self.prompts) else np.asarray(fits)


def _whole(x: Array) -> npt.NDArray[np.bool_]:
    """Whether a rank's prompts begin in the step, as graphs hold them. What goes on from a step before, or from a cached prefix,
    has more query-key pairs than one whole prompt of all those tokens; among many prompts a short past is not seen."""
    new = x[..., _NEW]
    return np.asarray(x[..., _PAIRS] <= new * (new + 1) / 2 * (1 + 1e-9))


def _up(sizes: Array, amounts: Array) -> Array:
    """Amounts rounded up to the next of `sizes`; unchanged where 0 or beyond the largest."""
    if not len(sizes):
        return amounts
    place = np.searchsorted(sizes, amounts)
    return np.where((amounts > 0) & (place < len(sizes)), sizes[np.minimum(place, len(sizes) - 1)], amounts)


def _last(sizes: Array) -> float:
    return float(sizes[-1]) if len(sizes) else -1.0
