"""Attention blocks of one rank: grouped-query, and DeepSeek's latent attention (MLA).

MLA caches one latent a token. Decode absorbs the key and value projections into query and output, so that heads read the
latent itself; prefill expands keys and values, which is cheaper for many queries.

Legend: T tokens, S decoding sequences, Q query heads here, G KV heads here, D head size, N nope, R rotary, L latent,
V value size, C context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runtime.batch import StepInput
from runtime.layout import RankLayout
from runtime.model.params import kv_head_slice
from runtime.model.rope import softmax_scale
from runtime.ops import TorchOps
from twin.spec.model import ModelSpec


def make_attention(model: ModelSpec, at: RankLayout, i: int, params: dict[str, torch.Tensor], ops: TorchOps) -> Gqa | Mla:
    """Layer i's attention. Called with (x_TH, step, cache, cos_TR, sin_TR); returns this rank's partial sum [T, H]."""
    if model.attention.kind == "mla":
        return _make_mla(model, at, i, params, ops)
    a = model.attention
    first, last = kv_head_slice(model, at.tp, at.tp_rank)
    window = a.sliding_window if model.layer_attention[i] == "sliding" else None
    norms = (params[f"{i}.q_norm"], params[f"{i}.k_norm"]) if a.qk_norm else None
    return Gqa(ops, params[f"{i}.qkv"], params.get(f"{i}.qkv_bias"), params[f"{i}.out"], params.get(f"{i}.out_bias"), norms,
               params.get(f"{i}.sinks"), a.heads // at.tp, last - first, a.head_dim, softmax_scale(a.rope, a.head_dim), window,
               a.rope.interleaved, model.norm_eps)


@dataclass(frozen=True)
class Gqa:
    """Grouped-query attention over a paged cache [blocks, 2, block_tokens, G, D]."""

    ops: TorchOps
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    norms: tuple[torch.Tensor, torch.Tensor] | None
    sinks: torch.Tensor | None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    interleaved: bool
    eps: float

    def __call__(self, x_TH: torch.Tensor, step: StepInput, cache: torch.Tensor, cos: torch.Tensor,
                 sin: torch.Tensor) -> torch.Tensor:
        qkv = F.linear(x_TH, self.qkv, self.qkv_bias).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        if self.norms is not None:
            q, k = self.ops.rms_norm(q, self.norms[0], self.eps), self.ops.rms_norm(k, self.norms[1], self.eps)
        q, k = self.ops.rope(q, cos, sin, self.interleaved), self.ops.rope(k, cos, sin, self.interleaved)
        self.ops.store_kv(cache, k, v, step.slots_T)
        y = self.ops.attention(q, cache, step, scale=self.scale, window=self.window, sinks_Q=self.sinks)
        return F.linear(y.flatten(1), self.out, self.out_bias)


@dataclass(frozen=True)
class Mla:
    """Latent attention over a paged cache [blocks, block_tokens, L + R]. `key_up` [Q, N, L], `value_up` [Q, V, L]."""

    ops: TorchOps
    q_down: torch.Tensor | None
    q_down_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    q_up: torch.Tensor
    kv_down: torch.Tensor
    kv_down_bias: torch.Tensor | None
    kv_norm: torch.Tensor
    key_up: torch.Tensor
    value_up: torch.Tensor
    out: torch.Tensor
    out_bias: torch.Tensor | None
    scale: float
    interleaved: bool
    eps: float

    def __call__(self, x_TH: torch.Tensor, step: StepInput, cache: torch.Tensor, cos: torch.Tensor,
                 sin: torch.Tensor) -> torch.Tensor:
        heads, nope, latent = self.key_up.shape
        q_nope, q_rope = self._query(x_TH).unflatten(-1, (heads, -1)).tensor_split((nope,), -1)
        q_rope = self.ops.rope(q_rope, cos, sin, self.interleaved)
        kv, k_rope = F.linear(x_TH, self.kv_down, self.kv_down_bias).tensor_split((latent,), -1)
        k_rope = self.ops.rope(k_rope[:, None], cos, sin, self.interleaved)[:, 0]
        self.ops.store_latent(cache, torch.cat([self.ops.rms_norm(kv, self.kv_norm, self.eps), k_rope], -1), step.slots_T)
        n = step.num_decodes
        parts = [self._decode(q_nope[:n], q_rope[:n], cache, step)] if n else []
        row = n
        for i in range(n, len(step.query_lens)):
            stop = row + step.query_lens[i]
            parts.append(self._prefill(q_nope[row:stop], q_rope[row:stop], self.ops.mla_context(cache, step, i)))
            row = stop
        y = torch.cat(parts) if parts else x_TH.new_empty(0, heads, self.value_up.shape[1])
        return F.linear(y.flatten(1), self.out, self.out_bias)

    def _query(self, x_TH: torch.Tensor) -> torch.Tensor:
        if self.q_down is None or self.q_norm is None:
            return F.linear(x_TH, self.q_up)
        return F.linear(self.ops.rms_norm(F.linear(x_TH, self.q_down, self.q_down_bias), self.q_norm, self.eps), self.q_up)

    def _decode(self, q_nope: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, step: StepInput) -> torch.Tensor:
        q_SQD = torch.cat([torch.einsum("sqn,qnl->sql", q_nope, self.key_up), q_rope], -1)
        y_SQL = self.ops.mla_decode(q_SQD, cache, step, scale=self.scale, latent=self.key_up.shape[2])
        return torch.einsum("sql,qvl->sqv", y_SQL, self.value_up)

    def _prefill(self, q_nope: torch.Tensor, q_rope: torch.Tensor, context_CD: torch.Tensor) -> torch.Tensor:
        latent, k_rope = context_CD.to(q_nope.dtype).tensor_split((self.key_up.shape[2],), -1)
        k_nope = torch.einsum("cl,qnl->cqn", latent, self.key_up)
        k = torch.cat([k_nope, k_rope[:, None].expand(-1, k_nope.shape[1], -1)], -1)
        v = torch.einsum("cl,qvl->cqv", latent, self.value_up)
        return self.ops.causal_attention(torch.cat([q_nope, q_rope], -1), k, v, scale=self.scale)


def _make_mla(model: ModelSpec, at: RankLayout, i: int, params: dict[str, torch.Tensor], ops: TorchOps) -> Mla:
    a = model.attention
    assert a.qk_nope_head_dim is not None
    up = params[f"{i}.kv_up"].unflatten(0, (a.heads // at.tp, a.qk_nope_head_dim + a.v_head_dim))
    key_up, value_up = up.tensor_split((a.qk_nope_head_dim,), 1)
    return Mla(ops, params.get(f"{i}.q_down"), params.get(f"{i}.q_down_bias"), params.get(f"{i}.q_norm"), params[f"{i}.q_up"],
               params[f"{i}.kv_down"], params.get(f"{i}.kv_down_bias"), params[f"{i}.kv_norm"], key_up, value_up,
               params[f"{i}.out"], params.get(f"{i}.out_bias"), softmax_scale(a.rope, a.head_dim), a.rope.interleaved,
               model.norm_eps)
