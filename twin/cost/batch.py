"""What one engine step computes, and what it costs.

Legend of shapes: n steps, d DP ranks of an instance, f features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twin.spec.base import Source
from twin.spec.model import ModelSpec

Array = npt.NDArray[np.float64]

FEATURES = (
    "any", "any_decode", "any_prefill",  # 1 when the rank has such tokens: what a kernel does once
    "tokens", "rows",  # tokens computed; rows of the LM head (one a decode token, one a prefill chunk)
    "decode_seqs", "decode_tokens", "decode_kv", "decode_kv_window", "decode_kv_sparse",  # KV tokens read
    "decode_pairs", "decode_pairs_window", "decode_pairs_sparse",  # query-key pairs scored
    "prefill_tokens", "prefill_kv", "prefill_kv_window",
    "prefill_pairs", "prefill_pairs_window", "prefill_pairs_sparse",
    "padding",  # of `tokens`, those that only fill a graph with prompts (`graphs.py`): no expert gets them
)
INDEX = {name: i for i, name in enumerate(FEATURES)}


@dataclass(frozen=True)
class StepBatch:
    """What the DP ranks of one instance do in one step; arrays over DP ranks, shape [d] (or [n, d] for n steps).

    decode_seqs: sequences that decode one token each (verification of drafts widens it inside the cost model);
    decode_context: sum of their context lengths; prefill_tokens: prompt tokens computed; prefill_context: sum over
    chunks of tokens x (past + tokens / 2), the score pairs; prefill_seqs: chunks.
    """

    decode_seqs: npt.NDArray[Any]
    decode_context: npt.NDArray[Any]
    prefill_tokens: npt.NDArray[Any]
    prefill_context: npt.NDArray[Any]
    prefill_seqs: npt.NDArray[Any]

    @classmethod
    def decode(cls, seqs: npt.ArrayLike, context: npt.ArrayLike) -> StepBatch:
        """A pure decode step: `seqs` sequences with `context` tokens of KV in all, for each rank."""
        seqs_d = np.atleast_1d(np.asarray(seqs, dtype=float))
        none = np.zeros_like(seqs_d)
        return cls(seqs_d, np.atleast_1d(np.asarray(context, dtype=float)), none, none, none)

    @classmethod
    def prefill(cls, tokens: npt.ArrayLike, past: npt.ArrayLike = 0.0, seqs: npt.ArrayLike = 1.0) -> StepBatch:
        """A pure prefill step: each rank computes `tokens` in `seqs` equal chunks, each after `past` tokens."""
        tokens_d, past_d, seqs_d = np.broadcast_arrays(
            *(np.atleast_1d(np.asarray(x, dtype=float)) for x in (tokens, past, seqs)))
        none = np.zeros(tokens_d.shape)
        pairs = tokens_d * (past_d + tokens_d / np.maximum(seqs_d, 1.0) / 2)
        return cls(none, none, tokens_d, pairs, np.where(tokens_d > 0, seqs_d, 0.0))


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step by part; `total_s` is the sum of `parts_s` (overlap is a negative part)."""

    total_s: float
    parts_s: dict[str, float]
    sources: dict[str, Source]
    low_s: float
    high_s: float


@dataclass(frozen=True)
class Extents:
    """How far a model's attention looks: None sees everything."""

    window: int | None
    sparse: int | None
    drafts: int

    @classmethod
    def of(cls, model: ModelSpec, drafts: int) -> Extents:
        sliding = "sliding" in model.layer_attention
        return cls(model.attention.sliding_window if sliding else None, model.attention.index_top_k, drafts)


def features(batch: StepBatch, extents: Extents, pad: Callable[[Array], Array] | None = None) -> Array:
    """The numbers that the work of every operator is linear in: [..., d, f], names in `FEATURES`.

    `pad` rounds decode tokens up to what the engine runs (CUDA-graph sizes). Contexts of the sequences of a rank are
    taken as equal; so are its chunks.
    """
    seqs = np.asarray(batch.decode_seqs, dtype=float)
    x = np.zeros((*seqs.shape, len(FEATURES)))
    queries = seqs * (1 + extents.drafts)
    padded = queries if pad is None else pad(queries)
    context = np.asarray(batch.decode_context, dtype=float)
    x[..., 1] = seqs > 0
    x[..., 5], x[..., 6], x[..., 7] = seqs, padded, context
    x[..., 10] = context * (1 + extents.drafts)
    for limit, kv, pairs in ((extents.window, 8, 11), (extents.sparse, 9, 12)):
        if limit is not None:
            x[..., kv] = np.minimum(context, seqs * limit)
            x[..., pairs] = x[..., kv] * (1 + extents.drafts)
    x[..., 3], x[..., 4] = padded, padded
    new = np.asarray(batch.prefill_tokens, dtype=float)
    if new.any():
        _prefill_features(x, batch, new, extents)
    x[..., 0] = x[..., 3] > 0
    return x


def _prefill_features(x: Array, batch: StepBatch, new: Array, extents: Extents) -> None:
    """Fill in the prefill columns of `x`; a chunk of t tokens after `past` has t x (past + t / 2) pairs."""
    chunks = np.maximum(np.asarray(batch.prefill_seqs, dtype=float), 1.0)
    pairs = np.asarray(batch.prefill_context, dtype=float)
    each = new / chunks
    past = np.maximum(pairs / np.maximum(new, 1.0) - each / 2, 0.0)
    x[..., 2] = new > 0
    x[..., 3] += new
    x[..., 4] += np.where(new > 0, chunks, 0.0)
    x[..., 13], x[..., 14], x[..., 16] = new, chunks * (past + each) * (new > 0), pairs
    if extents.window is not None:
        x[..., 15] = chunks * np.minimum(past + each, extents.window + each) * (new > 0)
        x[..., 17] = chunks * (_area(past + each, extents.window) - _area(past, extents.window))
    if extents.sparse is not None:
        x[..., 18] = chunks * (_area(past + each, extents.sparse) - _area(past, extents.sparse))


def _area(length: Array, limit: int) -> Array:
    """Integral of min(x, limit) from 0 to length: pairs of a sequence that looks back at most `limit` tokens."""
    return np.where(length < limit, length**2 / 2, limit * (length - limit / 2))
