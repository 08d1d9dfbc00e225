"""The transformer: from a step's tokens to the logits of the rows that asked, on one rank of an instance.

Every rank holds its cut of the weights; `all_reduce` over the TP group makes attention and dense outputs whole. In MoE
layers each TP rank dispatches its own share of the tokens, so that each token travels once; the shares and the partial
sums of shared experts become whole in one all_reduce.

Legend: T tokens, H hidden, Q query heads here, G KV heads here, D head size, L latent, R rotary, K choices, V vocabulary,
P positions, A angles.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
import torch.nn.functional as F

from runtime.batch import StepInput
from runtime.comm.experts import ExpertComm, Local
from runtime.comm.group import TensorGroup
from runtime.comm.overlap import Overlap
from runtime.layout import RankLayout
from runtime.model.attention import Gqa, Mla, make_attention
from runtime.model.params import Placement, linear_placement, vocab_slice
from runtime.model.rope import cos_sin, inverse_frequencies, rope_width
from runtime.ops import ExpertWeights, Norm, Router, TorchOps, Weight
from runtime.quantise import weight_of
from runtime.replicas import Replicas
from twin.spec.model import ModelSpec

Params = dict[str, torch.Tensor]
T = TypeVar("T")
Mark = Callable[[str], None]
"""Called with the name of the phase that begins."""
Streams = Generator[None, None, tuple[torch.Tensor | None, torch.Tensor]]
"""Work that yields wherever something of it is on its way to other ranks, so that other work can run meanwhile. It takes and
gives (what is yet to be added, the residual stream) [T, H] each; None where nothing is."""


@dataclass(frozen=True)
class Rig:
    """What a model runs with: operators, groups, the expert backend, who is told of phases, and of layers whose KV is stored."""

    ops: TorchOps
    tp: TensorGroup
    experts: ExpertComm
    mark: Mark = lambda phase: None
    stored: Callable[[int], None] | None = None

    @cached_property
    def exchange(self) -> Overlap:
        """The expert backend, with calls that return while their messages travel."""
        return Overlap(self.experts)


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
        placement = placement or linear_placement(model, at.slots)
        self.layers = [make_layer(model, at, i, params, rig, placement) for i in range(model.layers)]

    @property
    def moe_layers(self) -> list[MoeFfn]:
        """The MoE layers' feed-forward parts, in order."""
        return [layer.ffn for layer in self.layers if isinstance(layer.ffn, MoeFfn)]

    def forward(self, step: StepInput, kv: list[torch.Tensor], capacity: int) -> torch.Tensor:
        """Logits fp32 [rows, V] of the step's `logit_rows`, the same on all TP ranks; writes KV of all its tokens.

        `capacity`: the most tokens that any rank of the instance dispatches in this step (see ExpertComm).
        """
        x_TH, stream_TH = drive([self.stages(step, kv, capacity)])[0]
        self.rig.mark("head")
        rows = step.logit_rows
        last = None if x_TH is None else x_TH[rows]
        return self.head(self.rig.ops.add_norm(last, stream_TH[rows], self.params["norm"], self.model.norm_eps)[0])

    def hidden(self, steps: Sequence[StepInput], kv: list[torch.Tensor], capacity: int) -> torch.Tensor:
        """Finished states [T, H] of all tokens of one step, or of its two halves side by side; `head` makes logits of them.

        `capacity` is that of the larger half.
        """
        parts = drive([self.stages(step, kv, capacity) for step in steps])
        self.rig.mark("head")
        states = [self.rig.ops.add_norm(x, stream, self.params["norm"], self.model.norm_eps)[0] for x, stream in parts]
        return torch.cat(states) if len(states) > 1 else states[0]

    def stages(self, step: StepInput, kv: list[torch.Tensor], capacity: int) -> Streams:
        """All layers, layer by layer."""
        self.rig.mark("embed")
        x_TH, stream_TH = None, self.embed(step.token_ids_T)
        for i, (layer, cache) in enumerate(zip(self.layers, kv, strict=False)):  # a cache more may belong to an MTP module
            x_TH, stream_TH = yield from layer.stages(self.rig, x_TH, stream_TH, step, cache, self.angles_PA, capacity)
            if self.rig.stored is not None:
                self.rig.stored(i)
        return x_TH, stream_TH

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        table = self.params["embed"]
        if self.rig.tp.size == 1:
            return F.embedding(ids_T, table)
        start, stop = vocab_slice(self.model.vocab, self.at)
        mine = (ids_T >= start) & (ids_T < stop)
        if start == stop:
            return self.rig.tp.all_reduce(table.new_zeros(len(ids_T), self.model.hidden))
        rows = F.embedding(torch.where(mine, ids_T - start, 0), table)
        return self.rig.tp.all_reduce(torch.where(mine[:, None], rows, 0))

    def head(self, x_RH: torch.Tensor) -> torch.Tensor:
        logits = F.linear(x_RH, self.params["embed" if self.model.tie_embeddings else "head"])
        if self.rig.tp.size > 1:
            each = -(-self.model.vocab // self.rig.tp.size)
            padded = logits.new_zeros(len(logits), each)
            padded[:, :logits.shape[1]] = logits
            logits = self.rig.tp.all_gather(padded).transpose(0, 1).flatten(1)[:, :self.model.vocab]
        return logits.float()


def make_layer(model: ModelSpec, at: RankLayout, i: int, params: Params, rig: Rig, placement: Placement) -> Layer:
    """Layer i of a model, from its parameters `{i}.*`."""
    attention = make_attention(model, at, i, params, rig.ops)
    ffn: DenseFfn | MoeFfn
    if model.layer_ffn[i] == "dense":
        ffn = DenseFfn(weight_of(params, f"{i}.ffn.w13"), weight_of(params, f"{i}.ffn.w2"), rig)
    else:
        ffn = MoeFfn(model, at, i, params, rig, placement[model.layer_ffn[:i].count("moe")])
    return Layer(params[f"{i}.attn_norm"], attention, params[f"{i}.ffn_norm"], ffn, model.norm_eps)


@dataclass(frozen=True)
class Layer:
    attn_norm: torch.Tensor
    attention: Gqa | Mla
    ffn_norm: torch.Tensor
    ffn: DenseFfn | MoeFfn
    eps: float

    def stages(self, rig: Rig, x_TH: torch.Tensor | None, stream_TH: torch.Tensor, step: StepInput, cache: torch.Tensor,
               angles_PA: torch.Tensor, capacity: int) -> Streams:
        """Attention, then FFN; x is what the layer before has yet to add to the residual stream."""
        rig.mark("attention")
        norm = Norm(self.attn_norm, self.eps)
        x_TH, stream_TH = self.attention(x_TH, stream_TH, norm, step, cache, angles_PA)
        x_TH = None if x_TH is None else rig.tp.all_reduce(x_TH)
        x_TH, stream_TH = yield from self.ffn.stages(x_TH, stream_TH, Norm(self.ffn_norm, self.eps), step.slots_T, capacity)
        return x_TH, stream_TH


def drive(works: Sequence[Generator[None, None, T]]) -> list[T]:
    """Run generators by turns, each to its next yield; what they return. All ranks take the same turns."""
    results: dict[int, T] = {}
    while len(results) < len(works):
        for i, work in enumerate(works):
            if i not in results:
                try:
                    next(work)
                except StopIteration as end:
                    results[i] = end.value
    return [results[i] for i in range(len(works))]


@dataclass(frozen=True)
class DenseFfn:
    """Gated FFN, its width cut over the TP group."""

    w13: Weight
    w2: Weight
    rig: Rig

    def stages(self, x_TH: torch.Tensor | None, stream_TH: torch.Tensor, norm: Norm, slots_T: torch.Tensor,
               capacity: int) -> Streams:
        self.rig.mark("dense_ffn")
        normed, stream_TH = self.rig.ops.add_norm(x_TH, stream_TH, norm.weight, norm.eps)
        return self.rig.tp.all_reduce(self.partial(normed)), stream_TH
        yield  # never reached: nothing travels here

    def partial(self, x_TH: torch.Tensor) -> torch.Tensor:
        """This rank's share of the sum over the width."""
        return self.rig.ops.gated_ffn(x_TH, self.w13, self.w2)


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
                                     params.get(f"{i}.experts.w13.scale"), params.get(f"{i}.experts.w2.scale"), at.slots)
        self.shared = None
        if model.moe.shared_intermediate:
            self.shared = DenseFfn(weight_of(params, f"{i}.shared.w13"), weight_of(params, f"{i}.shared.w2"), rig)
        self.replicas = Replicas(model.moe.experts, at.slots, at.ep, at.local_rank, device, kernels=rig.ops.name == "triton")
        self.load_E = torch.zeros(model.moe.experts, dtype=torch.int64, device=device)
        self.pairs_EE: torch.Tensor | None = None
        self.replicas.place(slot_experts)

    def count_pairs(self) -> None:
        """From now on count which experts tokens choose together."""
        experts = self.moe.experts
        self.pairs_EE = torch.zeros(experts, experts, dtype=torch.int64, device=self.load_E.device)

    def stages(self, x_TH: torch.Tensor | None, stream_TH: torch.Tensor, norm: Norm, slots_T: torch.Tensor,
               capacity: int) -> Streams:
        """Yields while tokens travel to experts and while results travel back."""
        rig, mark = self.rig, self.rig.mark
        mark("gate")
        start, stop = token_share(len(stream_TH), rig.tp.size, rig.tp.index)
        if rig.tp.size == 1:
            x_TH, stream_TH, ids_TK, weights_TK = rig.ops.norm_route(x_TH, stream_TH, norm, self.router, self.moe, slots_T,
                                                                     self.load_E)
        else:
            x_TH, stream_TH = rig.ops.add_norm(x_TH, stream_TH, norm.weight, norm.eps)
            ids_TK, weights_TK = rig.ops.route(x_TH[start:stop], self.router, self.moe, slots_T[start:stop], self.load_E)
        mine = x_TH[start:stop]
        if self.pairs_EE is not None:
            add_pairs(self.pairs_EE, ids_TK)
        slots_TK = self.replicas.slots(ids_TK)
        mark("dispatch")
        if self.alone:
            mark("experts")
            x_TH, stream_TH = rig.ops.experts_add(mine, slots_TK, weights_TK, self.weights, self.moe.swiglu_limit, stream_TH)
            mark("combine")
            return x_TH, stream_TH
        dispatched = rig.exchange.dispatch(mine, slots_TK, weights_TK, capacity)
        out = None
        if self.shared is not None:
            mark("shared_experts")
            out = self.shared.partial(x_TH)
        yield
        mark("dispatch")
        arrived = dispatched()
        mark("experts")
        y_NH = rig.ops.experts(arrived.x_NH, arrived.slots_NK, arrived.weights_NK, self.weights, self.moe.swiglu_limit,
                                arrived.out_NH, arrived.scale_N)
        mark("combine")
        combined = rig.exchange.combine(y_NH, arrived)
        yield
        mark("combine")
        routed = combined()
        if out is None and rig.tp.size == 1:
            return routed, stream_TH
        out = torch.zeros_like(x_TH) if out is None else out
        out[start:stop] += routed
        return rig.tp.all_reduce(out), stream_TH

    @property
    def alone(self) -> bool:
        """Nothing but the routed experts, all of them here, adds to the stream."""
        return isinstance(self.rig.experts, Local) and self.rig.tp.size == 1 and self.shared is None


def token_share(tokens: int, parts: int, part: int) -> tuple[int, int]:
    """The rows [start, stop) that one of `parts` ranks takes of `tokens`."""
    each = -(-tokens // parts)
    return min(part * each, tokens), min((part + 1) * each, tokens)


def add_pairs(pairs_EE: torch.Tensor, ids_TK: torch.Tensor) -> None:
    """Count every ordered pair of experts that a token chose; the diagonal counts tokens. -1 is no choice."""
    chosen_TE = torch.zeros(len(ids_TK), len(pairs_EE) + 1, device=ids_TK.device)
    chosen_TE = chosen_TE.scatter_(1, torch.where(ids_TK < 0, len(pairs_EE), ids_TK), 1.0)[:, :-1]
    pairs_EE += (chosen_TE.T @ chosen_TE).long()
