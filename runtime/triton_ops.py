"""The operators on a GPU: Triton kernels where there is one, plain torch for the rest."""

from __future__ import annotations

import torch

from runtime.batch import StepInput
from runtime.kernels.attention_gqa import gqa_decode
from runtime.kernels.attention_mla import mla_decode
from runtime.kernels.fused import add_rmsnorm, silu_mul
from runtime.kernels.gate import gate_topk
from runtime.kernels.moe_layer import moe_layer
from runtime.ops import SWIGLU_ALPHA, ExpertWeights, TorchOps
from twin.spec.model import MoE


class TritonOps(TorchOps):
    """See `TorchOps` for what each method means; prefill attention stays with torch."""

    name = "triton"

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if x.dim() == 2 and x.shape[0]:
            return add_rmsnorm(x, weight, eps)
        return super().rms_norm(x, weight, eps)

    def attention(self, q_TQD: torch.Tensor, cache: torch.Tensor, step: StepInput, *, scale: float, window: int | None,
                  sinks_Q: torch.Tensor | None) -> torch.Tensor:
        n = step.num_decodes
        if not n:
            return super().attention(q_TQD, cache, step, scale=scale, window=window, sinks_Q=sinks_Q)
        decoded = gqa_decode(q_TQD[:n].contiguous(), cache, step.block_tables_SB[:n], step.seq_lens_S[:n], scale=scale,
                             window=window or 0, sinks_H=sinks_Q, max_context=max(step.context_lens[:n]))
        if n == len(step.query_lens):
            return decoded
        prefilled = self.prefill_attention(q_TQD[n:], cache, step, scale=scale, window=window, sinks_Q=sinks_Q)
        return torch.cat([decoded, prefilled])

    def mla_decode(self, q_SQD: torch.Tensor, cache: torch.Tensor, step: StepInput, *, scale: float,
                   latent: int) -> torch.Tensor:
        n = step.num_decodes
        return mla_decode(q_SQD.contiguous(), cache, step.block_tables_SB[:n], step.seq_lens_S[:n], scale=scale, latent=latent,
                          max_context=max(step.context_lens[:n]))

    def route(self, x_TH: torch.Tensor, weight_EH: torch.Tensor, bias_E: torch.Tensor | None,
              score_bias_E: torch.Tensor | None, moe: MoE) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.nn.functional.linear(x_TH.float(), weight_EH.float(), bias_E)
        if not len(logits):
            return super().route(x_TH, weight_EH, bias_E, score_bias_E, moe)
        weights, ids = gate_topk(logits, moe.top_k, scoring=moe.scoring, renormalize=moe.norm_top_k, scale=moe.routed_scaling,
                                 bias_E=score_bias_E, groups=moe.groups, topk_groups=moe.top_k_groups,
                                 group_score="max" if score_bias_E is None else "top2")
        return ids.long(), weights

    def gated(self, gate_up: torch.Tensor, limit: float | None) -> torch.Tensor:
        if limit is None and gate_up.dim() == 2 and gate_up.shape[0]:
            return silu_mul(gate_up.contiguous())
        return super().gated(gate_up, limit)

    def experts(self, x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor, w: ExpertWeights,
                limit: float | None) -> torch.Tensor:
        if not len(x_NH):
            return x_NH
        return moe_layer(x_NH.contiguous(), w.w13, w.w2, weights_NK, slots_NK.int(), w13_bias_E2I=w.b13, w2_bias_EH=w.b2,
                         activation="silu_mul" if limit is None else "swiglu_clamped", alpha=SWIGLU_ALPHA,
                         limit=limit or 0.0)
