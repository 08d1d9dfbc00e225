"""Which replica of an expert each choice of a step goes to: every rank spreads what it brings over all ranks evenly, batch
by batch, as `twin.policy.replica_split.BatchSplit` has it. Which replica is taken never changes a result.

Legend: E experts, S slots, J experts with several replicas, R ranks that experts are spread over; T tokens, K choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from twin.policy.replica_split import BATCH_SWEEPS, BatchSplit


class Replicas:
    """One layer's placement on one rank. `may_move` says that it can change after graphs were captured: tables are written
    in place, but a captured step looks at them only if it had to when it was captured."""

    def __init__(self, experts: int, slots: int, ranks: int, source: int, device: torch.device, *, kernels: bool) -> None:
        self._experts, self._ranks, self._source, self._kernels = experts, ranks, source, kernels
        self.may_move = False
        several = max(1, min(slots - experts, experts))  # as many experts can have more than one slot
        self._first_E, self._rank_E, self._slot_JR = (
            torch.empty(shape, dtype=torch.int32, device=device) for shape in ((experts,), (experts,), (several, ranks)))

    def place(self, slot_experts: Sequence[int]) -> None:
        """Experts are in these slots from now on."""
        self._in_order = list(slot_experts) == list(range(self._experts))
        self._split = split = BatchSplit(slot_experts, self._experts, self._ranks)
        first = torch.from_numpy(split.first_E)
        rank_E = first // (len(slot_experts) // self._ranks)
        rank_E[torch.from_numpy(split.experts_J)] = self._ranks + torch.arange(len(split.experts_J))
        slot_JR = torch.full(self._slot_JR.shape, -1)
        slot_JR[:len(split.experts_J)] = torch.from_numpy(split.slot_JR)
        for table, values in ((self._first_E, first), (self._rank_E, rank_E), (self._slot_JR, slot_JR)):
            table.copy_(values)

    def slots(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """A physical slot for every choice, -1 for -1."""
        if self._in_order and not self.may_move:
            return ids_TK
        if not self._kernels:
            slots = self._split.slots(ids_TK.flatten().cpu().numpy(), self._source)
            return torch.from_numpy(slots).to(ids_TK).view(ids_TK.shape)
        from runtime.kernels.replicas import Tables, split  # needs triton

        return split(ids_TK.contiguous(), Tables(self._first_E, self._rank_E, self._slot_JR), self._source, BATCH_SWEEPS)
