"""Which replica of an expert each choice of a step goes to: every rank spreads what it brings over all ranks evenly, batch
by batch, as `twin.policy.replica_split.BatchSplit` has it. Which replica is taken never changes a result.

Legend: E experts, S slots, J experts with several replicas, Q rounds of them with P replicas at most, R ranks that experts
are spread over; T tokens, K choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from twin.policy.replica_split import BATCH_SWEEPS, BatchSplit, places_of_a_round


class Replicas:
    """One layer's placement on one rank. `may_move` says that it can change after graphs were captured: tables are written
    in place, but a captured step looks at them only if it had to when it was captured."""

    def __init__(self, experts: int, slots: int, ranks: int, source: int, device: torch.device, *, kernels: bool) -> None:
        self._experts, self._ranks, self._source, self._kernels = experts, ranks, source, kernels
        self.may_move = False
        several = max(1, min(slots - experts, experts))  # as many experts can have more than one slot, and be rounds alone
        places = places_of_a_round(slots, experts, ranks)
        self._table = {name: torch.full(shape, -1, dtype=torch.int32, device=device) for name, shape in (
            ("first_E", (experts,)), ("rank_E", (experts,)), ("start_J", (several,)), ("count_J", (several,)), ("rounds", (2,)),
            ("expert_QP", (several, places)), ("rank_QP", (several, places)), ("slot_QP", (several, places)))}

    def place(self, slot_experts: Sequence[int]) -> None:
        """Experts are in these slots from now on."""
        self._in_order = list(slot_experts) == list(range(self._experts))
        self._split = split = BatchSplit(slot_experts, self._experts, self._ranks)
        if not self._kernels:
            return
        table = {name: torch.full(old.shape, -1, dtype=torch.int32) for name, old in self._table.items()}
        table["first_E"] = torch.from_numpy(split.first_E)
        table["rank_E"] = table["first_E"] // (len(slot_experts) // self._ranks)
        table["rank_E"][torch.from_numpy(split.experts_J)] = self._ranks + torch.arange(len(split.experts_J))
        table["rounds"][:] = torch.tensor([len(set(split.round_J.tolist())), (split.slot_JR >= 0).sum(axis=1).max(initial=0)])
        filled, places = [0] * len(table["expert_QP"]), split.places
        for j, q in enumerate(split.round_J.tolist()):
            ranks = (split.slot_JR[j] >= 0).nonzero()[0]
            here = slice(filled[q], filled[q] + len(ranks))
            table["start_J"][j], table["count_J"][j] = q * places + filled[q], len(ranks)
            table["expert_QP"][q, here] = j
            table["rank_QP"][q, here] = torch.from_numpy(ranks).int()
            table["slot_QP"][q, here] = torch.from_numpy(split.slot_JR[j, ranks]).int()
            filled[q] += len(ranks)
        for name, values in table.items():
            self._table[name].copy_(values)

    def slots(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """A physical slot for every choice, -1 for -1."""
        if self._in_order and not self.may_move:
            return ids_TK
        if not self._kernels:
            slots = self._split.slots(ids_TK.flatten().cpu().numpy(), self._source)
            return torch.from_numpy(slots).to(ids_TK).view(ids_TK.shape)
        from runtime.kernels.replicas import Tables, split  # needs triton

        return split(ids_TK.contiguous(), Tables(**self._table), self._source, self._ranks, BATCH_SWEEPS)
