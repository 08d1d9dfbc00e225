"""The operators a model is made of, behind one interface, so that kernels can be swapped without touching a model.

`TorchOps` is the reference: any device, any shape, plain torch. `ops_for("triton")` loads `runtime.triton_ops`,
whose `TritonOps` overrides the methods it has kernels for.

Legend: T tokens, S sequences, Q query heads, G KV heads, D head size, L latent (kv_lora_rank), R rotary channels,
H hidden, I expert width, E local expert slots, K choices a token, N rows, C context.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from runtime.batch import StepInput
from twin.spec.errors import SpecError
from twin.spec.model import MoE

if TYPE_CHECKING:
    from runtime.kernels.products import Rows8  # needs triton

SWIGLU_ALPHA = 1.702
"""Slope of the sigmoid in gpt-oss's clamped SwiGLU (`swiglu_alpha` of its configuration)."""


@dataclass(frozen=True)
class ExpertWeights:
    """Local experts: `w13` holds gate rows, then up rows [E, 2I, H]; `w2` [E, H, I]; biases [E, 2I] and [E, H]; of fp8
    weights, the scales of their rows [E, 2I] and [E, H]. `slots`: over how many slots of all ranks choices spread (0: E)."""

    w13: torch.Tensor
    w2: torch.Tensor
    b13: torch.Tensor | None = None
    b2: torch.Tensor | None = None
    s13: torch.Tensor | None = None
    s2: torch.Tensor | None = None
    slots: int = 0


@dataclass(frozen=True)
class Fp8Weight:
    """A matrix [N, K] in float8_e4m3fn with one fp32 scale a row [N]."""

    data: torch.Tensor
    scale: torch.Tensor

    def wide(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers it stands for."""
        return (self.data.float() * self.scale[:, None]).to(dtype)


Weight = torch.Tensor | Fp8Weight


@dataclass(frozen=True)
class Router:
    """`weight_EH` and `bias_E` give logits; `score_bias_E` is added to scores for choosing only. All fp32;
    `narrow_EH` is the weight in the activations' format, for operators that multiply in it."""

    weight_EH: torch.Tensor
    bias_E: torch.Tensor | None = None
    score_bias_E: torch.Tensor | None = None
    narrow_EH: torch.Tensor | None = None


class Norm(NamedTuple):
    """An RMS norm: gain [H] and epsilon."""

    weight: torch.Tensor
    eps: float


class Down(NamedTuple):
    """MLA's projections down to queries and to the latent; `both`: of fp8 weights, one over the other [Q + L + R, H]."""

    q: Weight
    q_bias: torch.Tensor | None
    q_norm: Norm
    kv: Weight
    kv_bias: torch.Tensor | None
    both: Fp8Weight | None = None


class TorchOps:
    """Reference operators. Padded slots (-1) are not understood here: the eager path makes none."""

    name = "torch"

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / rms(x) * weight over the last dim, the mean in fp32."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (weight * wide.to(x.dtype)).to(x.dtype)

    def add_norm(self, x_TH: torch.Tensor | None, residual_TH: torch.Tensor, weight: torch.Tensor,
                 eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of the sum, the sum) of x and the residual stream, which may be overwritten. None adds nothing."""
        total = residual_TH if x_TH is None else residual_TH + x_TH
        return self.rms_norm(total, weight, eps), total

    def norm_linear(self, x_TH: torch.Tensor | None, residual_TH: torch.Tensor, norm: Norm, weight: Weight,
                    bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(`linear` of `add_norm`, the sum)."""
        normed, residual_TH = self.add_norm(x_TH, residual_TH, norm.weight, norm.eps)
        return self.linear(normed, weight, bias), residual_TH

    def linear_add(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None,
                   residual_TH: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(`linear`, the residual stream that it is yet to be added to), or (None, their sum)."""
        return self.linear(x, weight, bias), residual_TH

    def norm_route(self, x_TH: torch.Tensor | None, residual_TH: torch.Tensor, norm: Norm, router: Router, moe: MoE,
                   slots_T: torch.Tensor, load_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(`add_norm`, the sum, and what `route` makes of the norm: ids, weights)."""
        normed, residual_TH = self.add_norm(x_TH, residual_TH, norm.weight, norm.eps)
        return normed, residual_TH, *self.route(normed, router, moe, slots_T, load_E)

    def experts_add(self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor, w: ExpertWeights,
                    limit: float | None, residual_TH: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(`experts`, the residual stream that it is yet to be added to), or (None, their sum)."""
        return self.experts(x_TH, slots_TK, weights_TK, w, limit), residual_TH

    def linear(self, x: torch.Tensor | Rows8, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x weight' + bias."""
        assert isinstance(x, torch.Tensor)
        return F.linear(x, weight.wide(x.dtype) if isinstance(weight, Fp8Weight) else weight, bias)

    def norm_down(self, x_TH: torch.Tensor | None, residual_TH: torch.Tensor, norm: Norm,
                  down: Down) -> tuple[torch.Tensor | Rows8, torch.Tensor, torch.Tensor]:
        """(normed low-rank queries, to be given to `linear`; latents; the sum) of `add_norm`'s norm."""
        normed, residual_TH = self.add_norm(x_TH, residual_TH, norm.weight, norm.eps)
        latent_TL = self.linear(normed, down.kv, down.kv_bias)
        return self.rms_norm(self.linear(normed, down.q, down.q_bias), *down.q_norm), latent_TL, residual_TH

    def gated_ffn(self, x_TH: torch.Tensor, w13: Weight, w2: Weight) -> torch.Tensor:
        """`linear` of `gated` of `linear`."""
        return self.linear(self.gated(self.linear(x_TH, w13), None), w2)

    def rope_store(self, qkv_TC: torch.Tensor, cache: torch.Tensor, step: StepInput, angles_PA: torch.Tensor, *, heads: int,
                   norms: tuple[torch.Tensor, torch.Tensor] | None, eps: float,
                   interleaved: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(q [T, Q, D], k, v [T, G, D]) of fused projections, q and k normed and turned; k and v are stored as well.

        `angles_PA` holds every position's cosines, then its sines.
        """
        kv_heads, dim = cache.shape[-2:]
        q, k, v = qkv_TC.unflatten(-1, (-1, dim)).split([heads, kv_heads, kv_heads], 1)
        if norms is not None:
            q, k = self.rms_norm(q, norms[0], eps), self.rms_norm(k, norms[1], eps)
        cos, sin = angles_PA[step.positions_T].chunk(2, -1)
        q, k = self.rope(q, cos, sin, interleaved), self.rope(k, cos, sin, interleaved)
        self.store_kv(cache, k, v, step.slots_T)
        return q, k, v

    def mla_rope_store(self, q_TQD: torch.Tensor, latent_TL: torch.Tensor, norm: torch.Tensor, cache: torch.Tensor,
                       step: StepInput, angles_PA: torch.Tensor, *, eps: float,
                       interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(q with its rotary part turned, finished latents [T, L + R]); the latents are stored as well."""
        cos, sin = angles_PA[step.positions_T].chunk(2, -1)
        rotary = angles_PA.shape[-1]
        q_nope, q_rope = q_TQD.tensor_split((q_TQD.shape[-1] - rotary,), -1)
        latent, k_rope = latent_TL.tensor_split((latent_TL.shape[-1] - rotary,), -1)
        k_rope = self.rope(k_rope[:, None], cos, sin, interleaved)[:, 0]
        rows = torch.cat([self.rms_norm(latent, norm, eps), k_rope], -1)
        self.store_latent(cache, rows, step.slots_T)
        return torch.cat([q_nope, self.rope(q_rope, cos, sin, interleaved)], -1), rows

    def rope(self, x_TQD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, interleaved: bool) -> torch.Tensor:
        """Rotate the first 2R channels of every head: halves (neox) or neighbouring pairs (interleaved)."""
        width = 2 * cos_TR.shape[-1]
        head, rest = x_TQD[..., :width].float(), x_TQD[..., width:]
        cos, sin = cos_TR[:, None], sin_TR[:, None]
        a, b = (head[..., ::2], head[..., 1::2]) if interleaved else head.chunk(2, -1)
        turned = (a * cos - b * sin, b * cos + a * sin)
        out = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
        return torch.cat([out.to(x_TQD.dtype), rest], -1) if rest.shape[-1] else out.to(x_TQD.dtype)

    def store_kv(self, cache: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, slots_T: torch.Tensor) -> None:
        """Write keys and values into a layer's cache [blocks, 2, block_tokens, G, D]."""
        block, offset = slots_T // cache.shape[2], slots_T % cache.shape[2]
        cache[block, 0, offset] = k_TGD.to(cache.dtype)
        cache[block, 1, offset] = v_TGD.to(cache.dtype)

    def store_latent(self, cache: torch.Tensor, latent_TL: torch.Tensor, slots_T: torch.Tensor) -> None:
        """Write latents with their rotary key into a layer's cache [blocks, block_tokens, L + R]."""
        cache.view(-1, cache.shape[-1])[slots_T] = latent_TL.to(cache.dtype)

    def attention(self, q_TQD: torch.Tensor, cache: torch.Tensor, step: StepInput, *, scale: float, window: int | None,
                  sinks_Q: torch.Tensor | None, fresh: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Paged causal GQA of a mixed batch over the stored keys, this step's included. Returns [T, Q, D].

        `fresh`: this step's own keys and values [T, G, D], for prompts without a past.
        """
        n = step.num_decodes
        parts = [self.prefill_attention(q_TQD[n:], cache, step, scale=scale, window=window, sinks_Q=sinks_Q, fresh=fresh)]
        if n:
            kv = _gather(cache, step.block_tables_SB[:n], max(step.context_lens[:n]))
            k, v = (kv[:, i].transpose(1, 2).to(q_TQD.dtype) for i in (0, 1))
            mask = _decode_mask(step.seq_lens_S[:n], k.shape[2], window)
            parts.insert(0, attend(q_TQD[:n, :, None], k, v, mask, scale, sinks_Q)[:, :, 0])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def prefill_attention(self, q_TQD: torch.Tensor, cache: torch.Tensor, step: StepInput, *, scale: float,
                          window: int | None, sinks_Q: torch.Tensor | None,
                          fresh: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """`attention` of the step's prompt chunks alone; q of their tokens only, `fresh` of all."""
        out, row = torch.empty_like(q_TQD), 0
        for i in range(step.num_decodes, len(step.query_lens)):
            q_len, context = step.query_lens[i], step.context_lens[i]
            kv = _gather(cache, step.block_tables_SB[i:i + 1], context)
            k, v = (kv[:, j].transpose(1, 2).to(q_TQD.dtype) for j in (0, 1))
            mask = _causal_mask(q_len, context, window, q_TQD.device)
            q = q_TQD[row:row + q_len].transpose(0, 1)[None]
            out[row:row + q_len] = attend(q, k, v, mask, scale, sinks_Q)[0].transpose(0, 1)
            row += q_len
        return out

    def mla_decode(self, q_SQD: torch.Tensor, cache: torch.Tensor, step: StepInput, *, scale: float,
                   latent: int) -> torch.Tensor:
        """Absorbed MLA of the step's decodes: q and keys of L + R channels, values the first L. Returns [S, Q, L]."""
        n = step.num_decodes
        kv = _gather(cache, step.block_tables_SB[:n], max(step.context_lens[:n]))[:, None].to(q_SQD.dtype)
        mask = _decode_mask(step.seq_lens_S[:n], kv.shape[2], None)
        return attend(q_SQD[:, :, None], kv, kv[..., :latent], mask, scale, None)[:, :, 0]

    def prompt_latents(self, cache: torch.Tensor, step: StepInput, fresh_TD: torch.Tensor) -> torch.Tensor:
        """Latents [C, L + R] that the step's prompts look at, one prompt behind the other. `fresh_TD`: those of their tokens."""
        n, lens, contexts = step.num_decodes, step.query_lens, step.context_lens
        if lens[n:] == contexts[n:]:
            return fresh_TD
        parts = [_gather(cache, step.block_tables_SB[i:i + 1], contexts[i])[0].to(fresh_TD.dtype) for i in range(n, len(lens))]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def expanded_attention(self, q_TQD: torch.Tensor, k_CQN: torch.Tensor, v_CQV: torch.Tensor, rope_CR: torch.Tensor,
                           step: StepInput, *, scale: float, out_TQV: torch.Tensor | None = None) -> torch.Tensor:
        """Causal attention of the step's prompts over keys and values of all their positions, prompts behind one another. Keys
        have N columns of their own and R that all heads share; queries N + R. Returns [T, Q, V], in `out_TQV` if given."""
        parts, row, first = [], 0, 0
        k_CQD = torch.cat([k_CQN, rope_CR[:, None].expand(-1, k_CQN.shape[1], -1)], -1)
        for i in range(step.num_decodes, len(step.query_lens)):
            stop, last = row + step.query_lens[i], first + step.context_lens[i]
            mask = _causal_mask(stop - row, last - first, None, q_TQD.device)
            q, k, v = (x.transpose(0, 1)[None] for x in (q_TQD[row:stop], k_CQD[first:last], v_CQV[first:last]))
            parts.append(attend(q, k, v, mask, scale, None)[0].transpose(0, 1))
            row, first = stop, last
        return torch.cat(parts, out=out_TQV)

    def route(self, x_TH: torch.Tensor, router: Router, moe: MoE, slots_T: torch.Tensor,
              load_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts: (ids [T, K], weights fp32 [T, K]); every choice is counted in `load_E`.

        Tokens whose KV slot in `slots_T` is negative are padding: they choose expert -1 and are not counted.

        Groups are ranked by the sum of their two best scores where a correction bias exists (DeepSeek-V3), by their
        best score otherwise (DeepSeek-V2); the bias only chooses, it does not weigh.
        """
        score_bias_E = router.score_bias_E
        logits = F.linear(x_TH.float(), router.weight_EH.float(), router.bias_E)
        scores = logits.sigmoid() if moe.scoring == "sigmoid" else logits.softmax(-1)
        choice = scores if score_bias_E is None else scores + score_bias_E
        if moe.groups > 1:
            grouped = choice.unflatten(-1, (moe.groups, -1))
            best = grouped.amax(-1) if score_bias_E is None else grouped.topk(min(2, grouped.shape[-1]), -1)[0].sum(-1)
            keep = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(moe.top_k_groups, -1)[1], True)
            choice = grouped.masked_fill(~keep[..., None], float("-inf")).flatten(-2)
        ids = choice.topk(moe.top_k, -1)[1]
        weights = scores.gather(1, ids)
        if moe.norm_top_k:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        real = (slots_T >= 0)[:, None].expand_as(ids)
        load_E.scatter_add_(0, ids.flatten(), real.flatten().to(load_E.dtype))
        return torch.where(real, ids, -1), weights * moe.routed_scaling

    def gated(self, gate_up: torch.Tensor, limit: float | None) -> torch.Tensor:
        """silu(gate) * up, or gpt-oss's (up + 1) * gate * sigmoid(alpha gate) with both clamped at `limit`."""
        gate, up = gate_up.chunk(2, -1)
        if limit is None:
            return F.silu(gate) * up
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(gate * SWIGLU_ALPHA)

    def experts(self, x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor, w: ExpertWeights,
                limit: float | None, out_NH: torch.Tensor | None = None,
                scale_N: torch.Tensor | None = None) -> torch.Tensor:
        """y_N = sum over K of weight * expert(x); choices with a slot outside 0..E-1 add nothing. `out_NH` may be filled and
        returned. With `scale_N`, x is fp8 with a scale a row, and `out_NH` is given."""
        if scale_N is not None:
            assert out_NH is not None
            came = ((slots_NK >= 0) & (slots_NK < w.w13.shape[0])).any(1)  # other rows may hold anything
            x_NH = torch.where(came[:, None], x_NH.float() * scale_N[:, None], 0.0).to(out_NH.dtype)
        n_slots, choices = w.w13.shape[0], slots_NK.shape[1]
        w13, w2 = _wide(w.w13, w.s13, x_NH.dtype), _wide(w.w2, w.s2, x_NH.dtype)
        flat = slots_NK.flatten()
        flat = torch.where((flat >= 0) & (flat < n_slots), flat, n_slots)  # the absent sort behind every expert
        order = flat.argsort(stable=True)
        owner, row = flat[order], order // choices
        ends = torch.bincount(flat, minlength=n_slots + 1)[:n_slots].cumsum(0).int()
        safe = owner.clamp(max=n_slots - 1)
        hidden = F.grouped_mm(x_NH[row], w13.transpose(1, 2), offs=ends)
        hidden = self.gated(hidden if w.b13 is None else hidden + w.b13[safe], limit)
        y = F.grouped_mm(hidden, w2.transpose(1, 2), offs=ends)
        y = y if w.b2 is None else y + w.b2[safe]
        # rows beyond the last expert are uninitialised, so they are masked, not multiplied away
        y = torch.where((owner < n_slots)[:, None], y.float() * weights_NK.flatten()[order, None], 0.0)
        return torch.zeros(x_NH.shape, dtype=torch.float32, device=x_NH.device).index_add_(0, row, y).to(x_NH.dtype)


def _wide(w_ENK: torch.Tensor, scale_EN: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return w_ENK if scale_EN is None else (w_ENK.float() * scale_EN[..., None]).to(dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float,
           sinks_Q: torch.Tensor | None) -> torch.Tensor:
    """softmax(scale q k' + mask) v for q [S, Q, T, D], k [S, G, C, D], v [S, G, C, E]; mask [S, 1, T, C] or [T, C], bool.

    A sink is a logit of its head that takes probability and gives nothing: one more key of zeros whose score is the
    sink (as additive mask) and whose value is zero.
    """
    if sinks_Q is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
    bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], -1)
    sink = sinks_Q.to(q.dtype)[None, :, None, None].expand(q.shape[0], -1, q.shape[2], 1)
    zero_k, zero_v = k.new_zeros(*k.shape[:2], 1, k.shape[3]), v.new_zeros(*v.shape[:2], 1, v.shape[3])
    return F.scaled_dot_product_attention(q, torch.cat([k, zero_k], 2), torch.cat([v, zero_v], 2),
                                          attn_mask=torch.cat([bias, sink], -1), scale=scale,
                                          enable_gqa=q.shape[1] != k.shape[1])


def _gather(cache: torch.Tensor, tables_SB: torch.Tensor, context: int) -> torch.Tensor:
    """Stored tokens in order: [S, C, X] from a latent cache, [S, 2, C, G, D] from a KV cache."""
    blocks = -(-context // cache.shape[-2 if cache.dim() == 3 else 2])
    found = cache[tables_SB[:, :blocks].long()]
    if cache.dim() == 3:
        return found.flatten(1, 2)[:, :context]
    return found.transpose(1, 2).flatten(2, 3)[:, :, :context]


def _decode_mask(seq_lens_S: torch.Tensor, context: int, window: int | None) -> torch.Tensor:
    """[S, 1, 1, C]: positions below the length and, with a window, among its last `window`."""
    position = torch.arange(context, device=seq_lens_S.device)
    mask = position < seq_lens_S[:, None]
    if window is not None:
        mask &= position >= seq_lens_S[:, None] - window
    return mask[:, None, None]


def _causal_mask(queries: int, context: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[T, C] for the last `queries` positions of `context`."""
    q = torch.arange(context - queries, context, device=device)[:, None]
    k = torch.arange(context, device=device)
    mask = k <= q
    return mask if window is None else mask & (k > q - window)


def ops_for(backend: str) -> TorchOps:
    """The operators of a backend. Raises SpecError for an unknown one."""
    if backend == "torch":
        return TorchOps()
    if backend == "triton":
        ops: TorchOps = import_module("runtime.few_rows").FewRowsOps()
        return ops
    raise SpecError(f"backend {backend[:40]!r} is unknown", field="backend", expected="torch or triton")
