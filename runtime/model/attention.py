"""Attention blocks of one rank: grouped-query, and DeepSeek's latent attention (MLA).

MLA caches one latent a token. Decode absorbs the key and value projections into query and output, so that heads read the
latent itself; prefill expands keys and values, which is cheaper for many queries.

Legend: T tokens, S decoding sequences, Q query heads here, G KV heads here, D head size, N nope, R rotary, L latent,
V value size, C context, P positions,
A angles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runtime.batch import StepInput
from runtime.layout import RankLayout
from runtime.model.rope import softmax_scale
from runtime.ops import Down, Norm, TorchOps, Weight
from runtime.quantise import join, weight_of
from twin.spec.model import ModelSpec

_EXPANDED_KEYS = 32768
"""Positions whose keys and values are expanded at once: 2 GiB with 128 heads of 128 and 128 columns in bf16."""


def make_attention(model: ModelSpec, at: RankLayout, i: int, params: dict[str, torch.Tensor], ops: TorchOps) -> Gqa | Mla:
    """Layer i's attention. Called with (x_TH, residual_TH, norm, step, cache, angles_PA), x being what is yet to be added to the
    residual stream (None: nothing); returns the same pair, x now this rank's partial sum [T, H]."""
    if model.attention.kind == "mla":
        return _make_mla(model, at, i, params, ops)
    a = model.attention
    window = a.sliding_window if model.layer_attention[i] == "sliding" else None
    norms = (params[f"{i}.q_norm"], params[f"{i}.k_norm"]) if a.qk_norm else None
    return Gqa(ops, weight_of(params, f"{i}.qkv"), params.get(f"{i}.qkv_bias"), weight_of(params, f"{i}.out"),
               params.get(f"{i}.out_bias"), norms, params.get(f"{i}.sinks"), a.heads // at.tp,
               softmax_scale(a.rope, a.head_dim), window, a.rope.interleaved, model.norm_eps, at.tp == 1)


@dataclass(frozen=True)
class Gqa:
    """Grouped-query attention over a paged cache [blocks, 2, block_tokens, G, D]. `alone`: all heads are here."""

    ops: TorchOps
    qkv: Weight
    qkv_bias: torch.Tensor | None
    out: Weight
    out_bias: torch.Tensor | None
    norms: tuple[torch.Tensor, torch.Tensor] | None
    sinks: torch.Tensor | None
    heads: int
    scale: float
    window: int | None
    interleaved: bool
    eps: float
    alone: bool = False

    def __call__(self, x_TH: torch.Tensor | None, residual_TH: torch.Tensor, norm: Norm, step: StepInput, cache: torch.Tensor,
                 angles_PA: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        qkv, residual_TH = self.ops.norm_linear(x_TH, residual_TH, norm, self.qkv, self.qkv_bias)
        q, k, v = self.ops.rope_store(qkv, cache, step, angles_PA, heads=self.heads, norms=self.norms, eps=self.eps,
                                      interleaved=self.interleaved)
        y = self.ops.attention(q, cache, step, scale=self.scale, window=self.window, sinks_Q=self.sinks, fresh=(k, v))
        return _project(self, y, residual_TH)


@dataclass(frozen=True)
class Mla:
    """Latent attention over a paged cache [blocks, block_tokens, L + R]. `kv_up` [Q, N + V, L] expands latents to each head's
    `nope` columns of keys, and to its values. Without `down`, queries are projected at once by `q_up`."""

    ops: TorchOps
    down: Down | None
    q_up: Weight
    kv_down: Weight
    kv_down_bias: torch.Tensor | None
    kv_norm: torch.Tensor
    kv_up: torch.Tensor
    nope: int
    out: Weight
    out_bias: torch.Tensor | None
    scale: float
    interleaved: bool
    eps: float
    alone: bool = False

    def __call__(self, x_TH: torch.Tensor | None, residual_TH: torch.Tensor, norm: Norm, step: StepInput, cache: torch.Tensor,
                 angles_PA: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        if self.down is not None:
            low, latent, residual_TH = self.ops.norm_down(x_TH, residual_TH, norm, self.down)
            query = self.ops.linear(low, self.q_up)
        else:
            x_TH, residual_TH = self.ops.add_norm(x_TH, residual_TH, norm.weight, norm.eps)
            latent, query = self.ops.linear(x_TH, self.kv_down, self.kv_down_bias), self.ops.linear(x_TH, self.q_up)
        heads, width, _ = self.kv_up.shape
        q, rows = self.ops.mla_rope_store(query.unflatten(-1, (heads, -1)), latent, self.kv_norm, cache, step, angles_PA,
                                          eps=self.eps, interleaved=self.interleaved)
        n, first, y = step.num_decodes, step.first_prompt_row, query.new_empty(len(query), heads, width - self.nope)
        if n:
            self._decode(*q[:n].tensor_split((self.nope,), -1), cache, step, y[:n])
        # behind decodes, which in a captured step leave zeros in prompts' rows
        for at, part in step.prompt_parts(_EXPANDED_KEYS):
            self._prefill(q[first:][at], self.ops.prompt_latents(cache, part, rows[first:][at]), part, y[first:][at])
        return _project(self, y, residual_TH)

    def _decode(self, q_nope: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, step: StepInput,
                out_SQV: torch.Tensor) -> None:
        key_up, value_up = self.kv_up.tensor_split((self.nope,), 1)
        heads, _, latent = value_up.shape
        q_SQD = q_rope.new_empty(len(q_rope), heads, latent + q_rope.shape[-1])
        torch.bmm(q_nope.transpose(0, 1), key_up, out=q_SQD[..., :latent].transpose(0, 1))
        q_SQD[..., latent:] = q_rope
        y_SQL = self.ops.mla_decode(q_SQD, cache, step, scale=self.scale, latent=latent)
        torch.bmm(y_SQL.transpose(0, 1), value_up.transpose(1, 2), out=out_SQV.transpose(0, 1))

    def _prefill(self, q_TQD: torch.Tensor, context_CD: torch.Tensor, step: StepInput, out_TQV: torch.Tensor) -> None:
        latent, rope = context_CD.tensor_split((self.kv_up.shape[2],), -1)
        k, v = F.linear(latent, self.kv_up.flatten(0, 1)).unflatten(-1, self.kv_up.shape[:2]).tensor_split((self.nope,), -1)
        self.ops.expanded_attention(q_TQD, k, v, rope, step, scale=self.scale, out_TQV=out_TQV)


def _project(a: Gqa | Mla, y_TQD: torch.Tensor, residual_TH: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The output projection; where no other rank has a part of the sum, it may be added to the stream at once."""
    if a.alone:
        return a.ops.linear_add(y_TQD.flatten(1), a.out, a.out_bias, residual_TH)
    return a.ops.linear(y_TQD.flatten(1), a.out, a.out_bias), residual_TH


def _make_mla(model: ModelSpec, at: RankLayout, i: int, params: dict[str, torch.Tensor], ops: TorchOps) -> Mla:
    a = model.attention
    assert a.qk_nope_head_dim is not None
    up = params[f"{i}.kv_up"].unflatten(0, (a.heads // at.tp, a.qk_nope_head_dim + a.v_head_dim))
    kv_down, kv_bias = weight_of(params, f"{i}.kv_down"), params.get(f"{i}.kv_down_bias")
    down = None
    if f"{i}.q_down" in params and f"{i}.q_norm" in params:
        both = join(params, f"{i}.q_down", f"{i}.kv_down") if kv_bias is None else None
        kv_down = weight_of(params, f"{i}.kv_down")
        down = Down(weight_of(params, f"{i}.q_down"), params.get(f"{i}.q_down_bias"), Norm(params[f"{i}.q_norm"], model.norm_eps),
                    kv_down, kv_bias, both)
    return Mla(ops, down, weight_of(params, f"{i}.q_up"), kv_down, kv_bias, params[f"{i}.kv_norm"], up, a.qk_nope_head_dim,
               weight_of(params, f"{i}.out"), params.get(f"{i}.out_bias"), softmax_scale(a.rope, a.head_dim), a.rope.interleaved,
               model.norm_eps, at.tp == 1)
