"""The rank slice: one rank of a wide expert-parallel instance, run alone on one device.

The rank computes its share of attention for its own tokens, and its experts for what tokens of all ranks would send it;
dispatch and combine are local copies of as many rows as would arrive and return, one row for each (token, expert), as
low-latency exchanges send them. Which rows arrive is drawn once a layer by routing the tokens of all ranks.

Legend: T own tokens, N arriving rows, R ranks, E experts, K choices, H hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from runtime.comm.experts import Dispatched
from runtime.kernels.moe_prefill import weighted_sum
from runtime.layout import RankLayout
from twin.policy.placement import place_global
from twin.spec.errors import SpecError
from twin.spec.model import ModelSpec

_DRAWN = 1 << 17
"""Tokens whose choices are drawn at a time: of 256 experts that takes 128 MiB, and a step of a wide instance's prompts has
millions."""


@dataclass(frozen=True)
class Arrival:
    """Of one layer: the own token that stands in for each arriving row, its local slot and weight; and the computed row
    that stands in for each of the T x K rows that return, already weighted."""

    source_N: torch.Tensor
    slots_N1: torch.Tensor
    weights_N1: torch.Tensor
    back_TK: torch.Tensor
    ones_TK: torch.Tensor


class SliceComm:
    """An ExpertComm that gives every MoE layer in turn the rows that routing over all ranks would send. `padded`: steps may have
    more rows than arrivals were drawn for, which get nothing."""

    sent_bytes = 0
    moves = False

    def __init__(self, arrivals: list[Arrival], *, padded: bool = False) -> None:
        self._arrivals, self.padded = arrivals, padded
        self._turn = self._rows = 0

    def dispatch(self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor, capacity: int) -> Dispatched:
        arrival = self._arrivals[self._turn]
        if len(arrival.back_TK) > len(x_TH) or (len(x_TH) > len(arrival.back_TK) and not self.padded):
            raise ValueError(f"arrivals were drawn for {len(arrival.back_TK)} tokens a rank, and {len(x_TH)} came to dispatch")
        self._rows = len(x_TH)
        self._turn = (self._turn + 1) % len(self._arrivals)
        return Dispatched(x_TH[arrival.source_N], arrival.slots_N1, arrival.weights_N1, arrival)

    def combine(self, y_NH: torch.Tensor, arrived: Dispatched) -> torch.Tensor:
        arrival = arrived.handle
        drawn = len(arrival.back_TK)
        out_TH = (y_NH.new_zeros if self._rows > drawn else y_NH.new_empty)(self._rows, y_NH.shape[1])
        weighted_sum(y_NH, arrival.back_TK, arrival.ones_TK, out_TH[:drawn])
        return out_TH

    @property
    def rows(self) -> list[int]:
        """Rows that arrive, by layer."""
        return [len(arrival.source_N) for arrival in self._arrivals]


def slice_layout(model: ModelSpec, ep: int, redundant: int = 0, rank: int = 0) -> RankLayout:
    """Rank `rank` of an instance of `ep` data-parallel attention ranks over which the experts are spread.

    Raises SpecError when the slots do not divide."""
    if model.moe is None:
        raise SpecError(f"{model.name} has no experts", field="ep", expected="a MoE model")
    slots = model.moe.experts + redundant
    if slots % ep:
        raise SpecError(f"{ep} does not divide {slots} expert slots", field="ep", hint="give redundant experts")
    return RankLayout(rank, 0, "mixed", 0, 0, ep, 1, ep, rank, 0, slots)


def slice_placement(model: ModelSpec, at: RankLayout) -> list[list[int]]:
    """Slot -> expert of every MoE layer, as a balancer places them: the first experts are twice as popular and have the redundant
    slots, which lie apart."""
    m = model.moe
    assert m is not None
    load_E = np.ones(m.experts)
    load_E[:at.slots - m.experts] = 2
    row: list[int] = place_global(load_E[None], at.slots, at.ep).slot_to_logical[0].tolist()
    return [row] * model.moe_layers


def draw_arrivals(model: ModelSpec, at: RankLayout, tokens: int, *, skew: float, seed: int,
                  device: torch.device | str) -> list[Arrival]:
    """Route `tokens` tokens of each of the instance's ranks in every MoE layer and keep what reaches this rank.

    Experts are chosen without replacement with odds exp(skew z), z normal: `skew` 0 is uniform. Experts of two replicas are twice
    as popular, since a balancer would not have doubled them otherwise: every slot gets alike. A token that chose one goes to
    either replica at random.
    """
    m = model.moe
    assert m is not None
    stream = torch.Generator(device).manual_seed(seed)
    total = tokens * at.dp
    arrivals = []
    here_EP = _replicas_here(slice_placement(model, at)[0], m.experts, at).to(device)
    for _ in range(model.moe_layers):
        odds = skew * torch.randn(m.experts, generator=stream, device=device)
        odds[:at.slots - m.experts] += math.log(2)
        parts = [_local_slots(m.top_k, here_EP, odds, min(_DRAWN, total - first), stream) for first in range(0, total, _DRAWN)]
        local = torch.cat(parts)
        local = local if len(local) else torch.zeros(1, dtype=local.dtype, device=device)
        n = len(local)
        weights = torch.full((n, 1), 1.0 / m.top_k, device=device)
        source = torch.randint(tokens, (n,), generator=stream, device=device)
        back = torch.randint(n, (tokens, m.top_k), generator=stream, device=device).int()
        arrivals.append(Arrival(source, local[:, None].int().contiguous(), weights, back, torch.ones_like(back).float()))
    return arrivals


def _replicas_here(slot_experts: list[int], experts: int, at: RankLayout) -> torch.Tensor:
    """Of each expert's replicas the slots counted from this rank's first, -1 where they are elsewhere; an expert of fewer
    replicas has its own several times. int64 [E, most replicas]."""
    slots = [[slot - at.local_slots.start if slot in at.local_slots else -1 for slot, e in enumerate(slot_experts) if e == expert]
             for expert in range(experts)]
    most = math.lcm(*(len(own) for own in slots))
    return torch.tensor([own * (most // len(own)) for own in slots])


def _local_slots(top_k: int, here_EP: torch.Tensor, odds_E: torch.Tensor, tokens: int, stream: torch.Generator) -> torch.Tensor:
    """Of what `tokens` tokens choose, the slots that are here, counted from this rank's first: int64 [rows that arrive]."""
    (experts, replicas), device = here_EP.shape, odds_E.device
    noise = torch.rand(tokens, experts, generator=stream, device=device).clamp(min=1e-12)
    ids = (odds_E - noise.log().neg().log()).topk(top_k, -1)[1]
    slots = here_EP[ids, torch.randint(replicas, ids.shape, generator=stream, device=device)]
    return slots[slots >= 0]
