"""The fast operators with, for steps of up to 16 tokens, fewer and wider kernels: norms, biases and the residual stream fused
into the products beside them.

Which of them serves, and how it is cut, stands in a table: an entry for a part of a layer, a number of tokens and a weight's
shape. `runtime.tune` fills it by timing on the device; without an entry everything is as in `TritonOps`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from runtime.kernels.gate import norm_gate_topk
from runtime.kernels.moe_rows import moe_rows
from runtime.kernels.skinny import MOST_ROWS, Cut, skinny_linear
from runtime.ops import SWIGLU_ALPHA, ExpertWeights, Fp8Weight, Norm, Router, Weight
from runtime.triton_ops import TritonOps
from twin.spec.model import MoE

Key = tuple[str, int, tuple[int, ...]]
"""Part of a layer (qkv, out, router or experts), tokens, shape of its (first) weight."""
Cuts = tuple[Cut, ...]
"""Of its kernels, in order."""


@dataclass
class FewRows:
    """The table. `seconds`: what was timed, by key: the plain operators, then those of the entry or the best that lost."""

    cuts: dict[Key, Cuts] = field(default_factory=dict)
    seconds: dict[Key, tuple[float, float]] = field(default_factory=dict)
    refined: dict[int, bool] = field(default_factory=dict)
    """Tokens of steps that were chosen for as a whole: whether the next layer's projections are brought into the cache."""

    def find(self, part: str, tokens: int, weight: torch.Tensor) -> Cuts | None:
        """How this part is cut, if it is to be."""
        return self.cuts.get((part, tokens, tuple(weight.shape))) if 0 < tokens <= MOST_ROWS else None

    def forget(self, tokens: int) -> dict[Key, Cuts]:
        """Take out, and give, all entries of steps of so many tokens."""
        return {key: self.cuts.pop(key) for key in [key for key in self.cuts if key[1] == tokens]}

    def report(self) -> list[dict[str, object]]:
        """A line a part that was timed or has an entry, for records; what only whole steps chose has no seconds."""
        lines = []
        for part, tokens, shape in sorted({*self.seconds, *self.cuts}):
            cuts = self.cuts.get((part, tokens, shape))
            plain, fused = self.seconds.get((part, tokens, shape), (None, None))
            lines.append({"part": part, "tokens": tokens, "shape": list(shape), "plain_s": plain, "fused_s": fused,
                          "serves": "fused" if cuts else "plain", "cuts": [vars(cut) for cut in cuts or ()]})
        return lines


class FewRowsOps(TritonOps):
    """See `TorchOps` for what each method means."""

    def __init__(self) -> None:
        self.few = FewRows()
        self.ahead: dict[int, torch.Tensor] = {}
        """By a router weight's address: the weight to bring into the cache beside it, in steps of one token."""
        self._arrived: torch.Tensor | None = None

    def arrived(self, device: torch.device) -> torch.Tensor:
        """Counters that kernels find and leave at zero."""
        if self._arrived is None or self._arrived.device != device:
            self._arrived = torch.zeros(MOST_ROWS, dtype=torch.int32, device=device)
        return self._arrived

    def norm_linear(self, x_TH: torch.Tensor | None, residual_TH: torch.Tensor, norm: Norm, weight: Weight,
                    bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        data, scale = _parts(weight)
        cuts = self.few.find("qkv", len(residual_TH), data) if x_TH is None else None
        if cuts is None:
            return super().norm_linear(x_TH, residual_TH, norm, weight, bias)
        return skinny_linear(residual_TH, data, cuts[0], norm=norm, scale_N=scale, bias_N=bias), residual_TH

    def linear_add(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None,
                   residual_TH: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        data, scale = _parts(weight)
        cuts = self.few.find("out", len(x), data)
        if cuts is None:
            return super().linear_add(x, weight, bias, residual_TH)
        return None, skinny_linear(x, data, cuts[0], scale_N=scale, bias_N=bias, residual_TN=residual_TH)

    def norm_route(self, x_TH: torch.Tensor | None, residual_TH: torch.Tensor, norm: Norm, router: Router, moe: MoE,
                   slots_T: torch.Tensor, load_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        weight = router.narrow_EH if router.narrow_EH is not None else router.weight_EH
        cuts = self.few.find("router", len(residual_TH), weight) if x_TH is None else None
        if cuts is None:
            return super().norm_route(x_TH, residual_TH, norm, router, moe, slots_T, load_E)
        arrived, ahead = self.arrived(residual_TH.device), self.ahead.get(weight.data_ptr())
        normed, weights, ids = norm_gate_topk(
            residual_TH, *norm, weight, moe.top_k, cuts[0], arrived, scoring=moe.scoring, renormalize=moe.norm_top_k,
            scale=moe.routed_scaling, logit_bias_E=router.bias_E, bias_E=router.score_bias_E, groups=moe.groups,
            topk_groups=moe.top_k_groups, group_score="max" if router.score_bias_E is None else "top2", slots_T=slots_T,
            load_E=load_E, ahead=ahead if len(residual_TH) == 1 else None)
        return normed, residual_TH, ids, weights

    def experts_add(self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor, w: ExpertWeights,
                    limit: float | None, residual_TH: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        cuts = self.few.find("experts", len(x_TH), w.w13)
        if cuts is None:
            return super().experts_add(x_TH, slots_TK, weights_TK, w, limit, residual_TH)
        activation = "silu_mul" if limit is None else "swiglu_clamped"
        return None, moe_rows(
            x_TH.contiguous(), w.w13, w.w2, weights_TK, slots_TK, *cuts, activation=activation,
            w13_scale_E2I=w.s13, w2_scale_EH=w.s2, w13_bias_E2I=w.b13, w2_bias_EH=w.b2, alpha=SWIGLU_ALPHA, limit=limit or 0.0,
            residual_TH=residual_TH)


def _parts(weight: Weight) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (weight.data, weight.scale) if isinstance(weight, Fp8Weight) else (weight, None)
