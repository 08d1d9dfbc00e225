"""The paged KV cache of one rank: one tensor a layer, and the rows that a transfer moves.

GQA: [blocks, 2, block_tokens, kv heads here, head_dim]. MLA: [blocks, block_tokens, kv_lora_rank + rotary]; every rank
of a TP group holds the same latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.layout import RankLayout
from runtime.model.params import Range, kv_head_slice
from twin.spec.model import ModelSpec


def kv_shape(model: ModelSpec, at: RankLayout, blocks: int, block_tokens: int) -> tuple[int, ...]:
    """Shape of one layer's cache."""
    a = model.attention
    if a.kind == "mla":
        assert a.kv_lora_rank and a.qk_rope_head_dim
        return blocks, block_tokens, a.kv_lora_rank + a.qk_rope_head_dim
    first, last = kv_head_slice(model, at.tp, at.tp_rank)
    return blocks, 2, block_tokens, last - first, a.head_dim


def make_kv(model: ModelSpec, at: RankLayout, blocks: int, block_tokens: int, dtype: torch.dtype,
            device: torch.device | str = "cpu") -> list[torch.Tensor]:
    """Zeroed caches, one a layer (the model `with_mtp` has one more)."""
    shape = kv_shape(model, at, blocks, block_tokens)
    return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(model.layers)]


@dataclass(frozen=True)
class Route:
    """KV that one prefill TP rank sends to one decode TP rank: heads [start, stop) of each side's own cache.

    MLA moves whole latents; its ranges are (0, 1)."""

    source: int
    target: int
    source_heads: Range
    target_heads: Range


def kv_routes(model: ModelSpec, source_tp: int, target_tp: int) -> list[Route]:
    """Who sends what, in a fixed order, so that every target rank gets every head that it holds exactly once."""
    if model.attention.kind == "mla":
        return [Route(target % source_tp, target, (0, 1), (0, 1)) for target in range(target_tp)]
    holders = [kv_head_slice(model, source_tp, rank) for rank in range(source_tp)]
    routes = []
    for target in range(target_tp):
        need = kv_head_slice(model, target_tp, target)
        head = need[0]
        while head < need[1]:
            able = [rank for rank, (first, last) in enumerate(holders) if first <= head < last]
            source = able[target % len(able)]  # replicas share the work
            first, last = holders[source][0], min(holders[source][1], need[1])
            routes.append(Route(source, target, (head - first, last - first), (head - need[0], last - need[0])))
            head = last
    return routes


def read_kv(cache: torch.Tensor, blocks: Sequence[int], tokens: Range, heads: Range) -> torch.Tensor:
    """Tokens [first, last) of a table, contiguous: [tokens, X] or [tokens, 2, heads, D]."""
    bt = cache.shape[1 if cache.dim() == 3 else 2]
    skipped = tokens[0] // bt
    found = cache[torch.tensor(blocks[skipped:-(-tokens[1] // bt)], device=cache.device)]
    first, last = tokens[0] - skipped * bt, tokens[1] - skipped * bt
    if cache.dim() == 3:
        return found.flatten(0, 1)[first:last].contiguous()
    return found.transpose(1, 2).flatten(0, 1)[first:last, :, heads[0]:heads[1]].contiguous()


def write_kv(cache: torch.Tensor, blocks: Sequence[int], values: torch.Tensor, heads: Range, first: int = 0) -> None:
    """The inverse of `read_kv`, from token `first`, at this side's blocks and heads; the block sizes may differ."""
    bt = cache.shape[1 if cache.dim() == 3 else 2]
    at = torch.arange(first, first + len(values), device=cache.device)
    block = torch.tensor(blocks, device=cache.device)[at // bt]
    if cache.dim() == 3:
        cache[block, at % bt] = values
        return
    for j in (0, 1):
        cache[block, j, at % bt, heads[0]:heads[1]] = values[:, j]
