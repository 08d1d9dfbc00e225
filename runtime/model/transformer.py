"""The transformer: from a step's tokens to the logits of the rows that asked, on one rank of an instance.

Every rank holds its cut of the weights; `all_reduce` over the TP group makes attention and dense outputs whole. In MoE
layers each TP rank dispatches its own share of the tokens, so that each token travels once; the shares and the partial
sums of shared experts become whole in one all_reduce.

Legend: T tokens, H hidden, Q query heads here, G KV heads here, D head size, L latent, R rotary, K choices, V vocabulary,
P positions, A angles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runtime.batch import StepInput
from runtime.comm.experts import ExpertComm
from runtime.comm.group import Group
from runtime.layout import RankLayout
from runtime.model.attention import make_attention
from runtime.model.params import Placement, linear_placement, vocab_slice
from runtime.model.rope import cos_sin, inverse_frequencies, rope_width
from runtime.ops import ExpertWeights, Router, TorchOps, Weight
from runtime.quantise import weight_of
from twin.spec.model import ModelSpec

Params = dict[str, torch.Tensor]
Mark = Callable[[str], None]
"""Called with the name of the phase that begins."""


@dataclass(frozen=True)
class Rig:
    """What a model runs with: operators, groups, the expert backend, and who is told of phases."""

    ops: TorchOps
    tp: Group
    experts: ExpertComm
    mark: Mark = lambda phase: None


class Transformer:
    """A model on one rank. `kv[i]` is layer i's cache; see `runtime.kv`."""

    def __init__(self, model: ModelSpec, at: RankLayout, params: Params, rig: Rig, placement: Placement | None = None) -> None:
        self.model, self.at, self.rig, self.params = model, at, rig, params
        a = model.attention
        width = a.qk_rope_head_dim if a.kind == "mla" else rope_width(a.rope, a.head_dim)
        assert width is not None
        inverse, factor = inverse_frequencies(a.rope, width)
        positions = torch.arange(model.max_context, device=params["embed"].device)
        self.angles_PA = torch.cat(cos_sin(positions, inverse.to(positions.device), factor), -1)
        self.layers = [self._layer(i, placement or linear_placement(model, at.slots)) for i in range(model.layers)]

    def _layer(self, i: int, placement: Placement) -> Layer:
        attention = make_attention(self.model, self.at, i, self.params, self.rig.ops)
        ffn: DenseFfn | MoeFfn
        if self.model.layer_ffn[i] == "dense":
            ffn = DenseFfn(weight_of(self.params, f"{i}.ffn.w13"), weight_of(self.params, f"{i}.ffn.w2"), self.rig)
        else:
            slots = placement[self.model.layer_ffn[:i].count("moe")]
            ffn = MoeFfn(self.model, self.at, i, self.params, self.rig, slots)
        return Layer(self.params[f"{i}.attn_norm"], attention, self.params[f"{i}.ffn_norm"], ffn)

    def forward(self, step: StepInput, kv: list[torch.Tensor], capacity: int) -> torch.Tensor:
        """Logits fp32 [rows, V] of the step's `logit_rows`, the same on all TP ranks; writes KV of all its tokens.

        `capacity`: the most tokens that any rank of the instance dispatches in this step (see ExpertComm).
        """
        ops, tp, mark, eps = self.rig.ops, self.rig.tp, self.rig.mark, self.model.norm_eps
        mark("embed")
        stream_TH = self._embed(step.token_ids_T)
        x_TH = None
        for layer, cache in zip(self.layers, kv, strict=True):
            mark("attention")
            normed, stream_TH = ops.add_norm(x_TH, stream_TH, layer.attn_norm, eps)
            x_TH = tp.all_reduce(layer.attention(normed, step, cache, self.angles_PA))
            normed, stream_TH = ops.add_norm(x_TH, stream_TH, layer.ffn_norm, eps)
            x_TH = layer.ffn(normed, step.slots_T, capacity)
        mark("head")
        assert x_TH is not None
        normed, _ = ops.add_norm(x_TH[step.logit_rows], stream_TH[step.logit_rows], self.params["norm"], eps)
        return self._head(normed)

    def _embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        table = self.params["embed"]
        if self.rig.tp.size == 1:
            return F.embedding(ids_T, table)
        start, stop = vocab_slice(self.model.vocab, self.at)
        mine = (ids_T >= start) & (ids_T < stop)
        if start == stop:
            return self.rig.tp.all_reduce(table.new_zeros(len(ids_T), self.model.hidden))
        rows = F.embedding(torch.where(mine, ids_T - start, 0), table)
        return self.rig.tp.all_reduce(torch.where(mine[:, None], rows, 0))

    def _head(self, x_RH: torch.Tensor) -> torch.Tensor:
        logits = F.linear(x_RH, self.params["embed" if self.model.tie_embeddings else "head"])
        if self.rig.tp.size > 1:
            each = -(-self.model.vocab // self.rig.tp.size)
            padded = logits.new_zeros(len(logits), each)
            padded[:, :logits.shape[1]] = logits
            logits = self.rig.tp.all_gather(padded).transpose(0, 1).flatten(1)[:, :self.model.vocab]
        return logits.float()


@dataclass(frozen=True)
class Layer:
    attn_norm: torch.Tensor
    attention: Callable[..., torch.Tensor]
    ffn_norm: torch.Tensor
    ffn: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class DenseFfn:
    """Gated FFN, its width cut over the TP group."""

    w13: Weight
    w2: Weight
    rig: Rig

    def __call__(self, x_TH: torch.Tensor, slots_T: torch.Tensor, capacity: int) -> torch.Tensor:
        self.rig.mark("dense_ffn")
        return self.rig.tp.all_reduce(self.partial(x_TH))

    def partial(self, x_TH: torch.Tensor) -> torch.Tensor:
        """This rank's share of the sum over the width."""
        linear = self.rig.ops.linear
        return linear(self.rig.ops.gated(linear(x_TH, self.w13), None), self.w2)


class MoeFfn:
    """Router, routed experts by dispatch and combine, shared experts."""

    def __init__(self, model: ModelSpec, at: RankLayout, i: int, params: Params, rig: Rig, slot_experts: Sequence[int]) -> None:
        assert model.moe is not None
        self.moe, self.at, self.rig = model.moe, at, rig
        router = params[f"{i}.router"]
        self.router = Router(router, params.get(f"{i}.router_bias"), params.get(f"{i}.score_bias"),
                             router.to(params["embed"].dtype))
        device = self.router.weight_EH.device
        self.weights = ExpertWeights(params[f"{i}.experts.w13"], params[f"{i}.experts.w2"],
                                     params.get(f"{i}.experts.b13"), params.get(f"{i}.experts.b2"),
                                     params.get(f"{i}.experts.w13.scale"), params.get(f"{i}.experts.w2.scale"))
        self.shared = None
        if model.moe.shared_intermediate:
            self.shared = DenseFfn(weight_of(params, f"{i}.shared.w13"), weight_of(params, f"{i}.shared.w2"), rig)
        self.in_order = list(slot_experts) == list(range(model.moe.experts))
        self.replicas_ER, self.replica_count_E = replica_table(slot_experts, model.moe.experts, device)
        self.load_E = torch.zeros(model.moe.experts, dtype=torch.int64, device=device)

    def __call__(self, x_TH: torch.Tensor, slots_T: torch.Tensor, capacity: int) -> torch.Tensor:
        rig, mark = self.rig, self.rig.mark
        mark("gate")
        start, stop = token_share(len(x_TH), rig.tp.size, rig.tp.index)
        mine = x_TH[start:stop]
        ids_TK, weights_TK = rig.ops.route(mine, self.router, self.moe, slots_T[start:stop], self.load_E)
        slots_TK = ids_TK if self.in_order else self._slots(ids_TK)
        mark("dispatch")
        arrived = rig.experts.dispatch(mine, slots_TK, weights_TK, capacity)
        mark("experts")
        y_NH = rig.ops.experts(arrived.x_NH, arrived.slots_NK, arrived.weights_NK, self.weights, self.moe.swiglu_limit)
        mark("combine")
        routed = rig.experts.combine(y_NH, arrived)
        if self.shared is None and rig.tp.size == 1:
            return routed
        mark("shared_experts")
        out = self.shared.partial(x_TH) if self.shared is not None else torch.zeros_like(x_TH)
        out[start:stop] += routed
        return rig.tp.all_reduce(out)

    def _slots(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """A physical slot for every choice, -1 for -1; replicas take turns by token and rank."""
        known_TK = ids_TK.clamp(min=0)
        turn = torch.arange(len(ids_TK), device=ids_TK.device)[:, None] + self.at.local_rank
        slots_TK = self.replicas_ER[known_TK, turn % self.replica_count_E[known_TK]]
        return torch.where(ids_TK < 0, -1, slots_TK)


def token_share(tokens: int, parts: int, part: int) -> tuple[int, int]:
    """The rows [start, stop) that one of `parts` ranks takes of `tokens`."""
    each = -(-tokens // parts)
    return min(part * each, tokens), min((part + 1) * each, tokens)


def replica_table(slot_experts: Sequence[int], experts: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(slots of every expert [E, most replicas], how many of them count [E]). Every expert needs a slot."""
    slots: list[list[int]] = [[] for _ in range(experts)]
    for slot, expert in enumerate(slot_experts):
        slots[expert].append(slot)
    assert all(slots), "an expert without a slot"
    widest = max(map(len, slots))
    table = torch.tensor([row + [row[0]] * (widest - len(row)) for row in slots], device=device)
    return table, torch.tensor([len(row) for row in slots], device=device)
