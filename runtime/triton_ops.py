"""The operators on a GPU: Triton kernels where there is one, torch's fastest for the rest.

Nothing here asks the device for a value, so that a step whose sizes are known on the host can be captured in a graph.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F

from runtime.batch import StepInput
from runtime.kernels.attention_gqa import gqa_decode
from runtime.kernels.attention_mla import mla_decode
from runtime.kernels.attention_prefill import prompt_attention
from runtime.kernels.fused import add_rmsnorm, add_rmsnorm_quant, silu_mul, silu_mul_quant
from runtime.kernels.gate import gate_topk, router_logits
from runtime.kernels.moe_fp8 import FP8_TILES
from runtime.kernels.moe_layer import moe_layer
from runtime.kernels.products import Rows8, fp8_product_gated, fp8_product_normed, row_fits
from runtime.kernels.rope import mla_rope_norm_cache, rope_norm_cache
from runtime.ops import SWIGLU_ALPHA, Down, ExpertWeights, Norm, Router, TorchOps, Weight
from runtime.products import Products, cut_product, narrow, torch_product
from twin.spec.model import MoE


class TritonOps(TorchOps):
    """See `TorchOps` for what each method means."""

    name = "triton"

    @cached_property
    def products(self) -> Products:
        """Which kernels serve fp8 products; empty unless filled."""
        return Products()

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if x.dim() == 2 and x.shape[0]:
            return add_rmsnorm(x, weight, eps)
        return super().rms_norm(x, weight, eps)

    def add_norm(self, x_TH: torch.Tensor | None, residual_TH: torch.Tensor, weight: torch.Tensor,
                 eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        if not len(residual_TH):
            return super().add_norm(x_TH, residual_TH, weight, eps)
        if x_TH is None:
            return add_rmsnorm(residual_TH, weight, eps), residual_TH
        return add_rmsnorm(x_TH, weight, eps, residual_TH), residual_TH

    def linear(self, x: torch.Tensor | Rows8, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        if isinstance(weight, torch.Tensor):
            assert isinstance(x, torch.Tensor)
            return F.linear(x, weight, bias)
        rows = len(x.data if isinstance(x, Rows8) else x)
        share = self.products.find(rows, weight)
        if share is not None:
            return cut_product(narrow(x, share), weight, share, bias)
        if isinstance(x, torch.Tensor) and not (x.is_cuda and rows):
            return super().linear(x, weight, bias)
        return torch_product(narrow(x), weight, bias)

    def norm_down(self, x_TH: torch.Tensor | None, residual_TH: torch.Tensor, norm: Norm,
                  down: Down) -> tuple[torch.Tensor | Rows8, torch.Tensor, torch.Tensor]:
        both = down.both
        share = None if both is None else self.products.find(len(residual_TH), both)
        if both is None or not len(residual_TH) or not (share or residual_TH.is_cuda):
            return super().norm_down(x_TH, residual_TH, norm, down)
        rows = Rows8(*add_rmsnorm_quant(residual_TH if x_TH is None else x_TH, norm.weight, norm.eps,
                                        None if x_TH is None else residual_TH, early=share is not None and share.pdl),
                     residual_TH.dtype)
        if share is not None and row_fits(len(down.q_norm.weight), share):
            q, latent = fp8_product_normed(rows, both.data, both.scale, share, down.q_norm)
            return q, latent, residual_TH
        q_TQ, latent = self.linear(rows, both).tensor_split((len(down.q_norm.weight),), -1)
        return self.rms_norm(q_TQ, *down.q_norm), latent, residual_TH

    def gated_ffn(self, x_TH: torch.Tensor, w13: Weight, w2: Weight) -> torch.Tensor:
        if isinstance(w13, torch.Tensor):
            return super().gated_ffn(x_TH, w13, w2)
        share = self.products.find(len(x_TH), w13)
        if share is not None and row_fits(len(w13.data) // 2, share):
            return self.linear(fp8_product_gated(narrow(x_TH, share), w13.data, w13.scale, share), w2)
        if not (x_TH.is_cuda and len(x_TH)):
            return super().gated_ffn(x_TH, w13, w2)
        return self.linear(Rows8(*silu_mul_quant(self.linear(x_TH, w13)), x_TH.dtype), w2)

    def rope_store(self, qkv_TC: torch.Tensor, cache: torch.Tensor, step: StepInput, angles_PA: torch.Tensor, *, heads: int,
                   norms: tuple[torch.Tensor, torch.Tensor] | None, eps: float,
                   interleaved: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not len(qkv_TC):
            return super().rope_store(qkv_TC, cache, step, angles_PA, heads=heads, norms=norms, eps=eps, interleaved=interleaved)
        q_norm, k_norm = norms or (None, None)
        return rope_norm_cache(qkv_TC, step.positions_T, step.slots_T, angles_PA, cache, heads=heads, interleaved=interleaved,
                               q_norm_D=q_norm, k_norm_D=k_norm, eps=eps)

    def mla_rope_store(self, q_TQD: torch.Tensor, latent_TL: torch.Tensor, norm: torch.Tensor, cache: torch.Tensor,
                       step: StepInput, angles_PA: torch.Tensor, *, eps: float,
                       interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if not len(q_TQD):
            return super().mla_rope_store(q_TQD, latent_TL, norm, cache, step, angles_PA, eps=eps, interleaved=interleaved)
        rows = mla_rope_norm_cache(q_TQD, latent_TL, norm, step.positions_T, step.slots_T, angles_PA, cache,
                                   interleaved=interleaved, eps=eps)
        return q_TQD, rows

    def attention(self, q_TQD: torch.Tensor, cache: torch.Tensor, step: StepInput, *, scale: float, window: int | None,
                  sinks_Q: torch.Tensor | None, fresh: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        n, first, out = step.num_decodes, step.first_prompt_row, torch.empty_like(q_TQD)
        if n:
            gqa_decode(q_TQD[:n], cache, step.block_tables_SB[:n], step.seq_lens_S[:n], scale=scale, window=window or 0,
                       sinks_H=sinks_Q, max_context=max(step.context_lens[:n]), out_BHD=out[:n])
        self.prefill_attention(q_TQD[first:], cache, step, scale=scale, window=window, sinks_Q=sinks_Q, fresh=fresh,
                               out_TQD=out[first:])  # behind decodes, which in a captured step leave zeros in prompts' rows
        return out

    def prefill_attention(self, q_TQD: torch.Tensor, cache: torch.Tensor, step: StepInput, *, scale: float,
                          window: int | None, sinks_Q: torch.Tensor | None,
                          fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
                          out_TQD: torch.Tensor | None = None) -> torch.Tensor:
        reach = window or 0
        if not len(q_TQD):
            return q_TQD
        k, v = _prompt_keys(cache, step, reach, fresh)
        return prompt_attention(q_TQD, k.to(q_TQD.dtype), v.to(q_TQD.dtype), step.prompt_pieces(reach), scale=scale, window=reach,
                                sinks_H=sinks_Q, out_THE=out_TQD)

    def expanded_attention(self, q_TQD: torch.Tensor, k_CQN: torch.Tensor, v_CQV: torch.Tensor, rope_CR: torch.Tensor,
                           step: StepInput, *, scale: float, out_TQV: torch.Tensor | None = None) -> torch.Tensor:
        return prompt_attention(q_TQD, k_CQN, v_CQV, step.prompt_pieces(), scale=scale, shared_CR=rope_CR, out_THE=out_TQV)

    def mla_decode(self, q_SQD: torch.Tensor, cache: torch.Tensor, step: StepInput, *, scale: float,
                   latent: int) -> torch.Tensor:
        n = step.num_decodes
        return mla_decode(q_SQD.contiguous(), cache, step.block_tables_SB[:n], step.seq_lens_S[:n], scale=scale, latent=latent,
                          max_context=max(step.context_lens[:n]))

    def route(self, x_TH: torch.Tensor, router: Router, moe: MoE, slots_T: torch.Tensor,
              load_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not len(x_TH):
            return super().route(x_TH, router, moe, slots_T, load_E)
        logits = self._logits(x_TH, router)
        weights, ids = gate_topk(logits, moe.top_k, scoring=moe.scoring, renormalize=moe.norm_top_k, scale=moe.routed_scaling,
                                 bias_E=router.score_bias_E, groups=moe.groups, topk_groups=moe.top_k_groups,
                                 group_score="max" if router.score_bias_E is None else "top2", slots_T=slots_T, load_E=load_E)
        return ids, weights

    def _logits(self, x_TH: torch.Tensor, router: Router) -> torch.Tensor:
        """fp32 logits, in parts to be summed. On a GPU half-precision tokens meet a router of their own format, summed in
        fp32: checkpoints keep routers in bf16, so that nothing is lost of those."""
        if x_TH.dtype == torch.float32:
            return F.linear(x_TH, router.weight_EH, router.bias_E)
        narrow = router.narrow_EH if router.narrow_EH is not None else router.weight_EH.to(x_TH.dtype)
        logits = router_logits(x_TH, narrow)
        if router.bias_E is not None:
            logits[0] += router.bias_E
        return logits

    def gated(self, gate_up: torch.Tensor, limit: float | None) -> torch.Tensor:
        if limit is None and gate_up.dim() == 2 and gate_up.shape[0]:
            return silu_mul(gate_up.contiguous())
        return super().gated(gate_up, limit)

    def experts(self, x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor, w: ExpertWeights,
                limit: float | None, out_NH: torch.Tensor | None = None,
                scale_N: torch.Tensor | None = None) -> torch.Tensor:
        if not len(x_NH):
            return x_NH
        # rows of one choice came expert by expert, all of them ours; rows of many chose among all slots of the instance
        spread = w.slots if slots_NK.shape[1] > 1 and w.slots else None
        return moe_layer(x_NH.contiguous(), w.w13, w.w2, weights_NK, slots_NK.int(), w13_bias_E2I=w.b13, w2_bias_EH=w.b2,
                         activation="silu_mul" if limit is None else "swiglu_clamped", alpha=SWIGLU_ALPHA,
                         limit=limit or 0.0, w13_scale_E2I=w.s13, w2_scale_EH=w.s2, all_experts=spread, out_TH=out_NH,
                         x_scale_T=scale_N, fp8_tiles=self.products.prefill.get(tuple(w.w13.shape), FP8_TILES))


def _prompt_keys(cache: torch.Tensor, step: StepInput, window: int,
                 fresh: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [C, G, D] that the step's prompts look at, one prompt behind the other. `fresh`: the step's own, decodes'
    first; those of prompts that go on lie in the cache."""
    n, lens, contexts, start = step.num_decodes, step.query_lens, step.context_lens, step.first_prompt_row
    if fresh is not None and lens[n:] == contexts[n:]:
        return fresh[0][start:], fresh[1][start:]
    parts, row, block = [], n, cache.shape[2]
    for i, keys in enumerate(step.prompt_keys(window), n):
        stop = row + lens[i]
        if fresh is not None and lens[i] == contexts[i]:
            parts.append((fresh[0][row:stop], fresh[1][row:stop]))
        else:
            first = (contexts[i] - keys) // block
            found = cache[step.block_tables_SB[i, first:-(-contexts[i] // block)].long()]
            span = slice(contexts[i] - keys - first * block, contexts[i] - first * block)
            parts.append((found[:, 0].flatten(0, 1)[span], found[:, 1].flatten(0, 1)[span]))
        row = stop
    if len(parts) == 1:
        return parts[0]
    k, v = (torch.cat(several) for several in zip(*parts, strict=True))
    return k, v
