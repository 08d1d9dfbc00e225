"""One DP rank of a simulated instance: the shared scheduler over counted blocks, seen as the numbers a step costs by."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twin.policy.batching import BatchScheduler
from twin.policy.kv_blocks import CountingBlocks
from twin.policy.steps import BatchLimits
from twin.sim.request import Request
from twin.spec.plan import PoolPlan


class Rank(BatchScheduler):
    """The scheduler, its memory in tokens, and the hand-overs that wait for a seat and memory here."""

    def __init__(self, pool: PoolPlan, kv_blocks: int) -> None:
        limits = BatchLimits(max_seqs=pool.max_num_seqs, max_batch_tokens=pool.max_step_tokens,
                             chunk_tokens=pool.chunk_tokens)
        super().__init__(limits, CountingBlocks(kv_blocks, pool.block_tokens))
        self.incoming: set[int] = set()  # requests whose KV is on its way: memory and a seat are theirs already
        self.handovers: deque[Handover] = deque()
        self.preempted: set[int] = set()  # requests that lost their memory and have not been recomputed

    @property
    def num_decoding(self) -> int:
        return len(self._rows)

    @property
    def decode_context(self) -> int:
        """Context of all decoding sequences, tokens, with the token that each one computes next."""
        return int(self._rows.computed.sum()) + len(self._rows)

    @property
    def other_kv_tokens(self) -> int:
        """KV memory that is not of decoding sequences (prompts in progress, held, incoming), in tokens."""
        return self.blocks.num_used * self.blocks.block_tokens - int(self._rows.room.sum())

    @property
    def capacity_tokens(self) -> int:
        return self.blocks.num_blocks * self.blocks.block_tokens

    def take_handovers(self) -> list[Handover]:
        """Give memory and a seat to the hand-overs that wait, in order, as far as both are free.

        A block is left for each running sequence and each one incoming, so that they can go on; and those that were
        pre-empted come back first.
        """
        taken: list[Handover] = []
        while self.handovers and not self.preempted:
            seats = self.limits.max_seqs - self.num_running - self.num_waiting - len(self.incoming)
            request = self.handovers[0].request
            spare = self.num_running + len(self.incoming)
            if seats < 1 or not self.blocks.can_admit(request.id, request.isl + 1, spare=spare):
                break
            self.blocks.admit(request.id, request.isl + 1)
            self.incoming.add(request.id)
            taken.append(self.handovers.popleft())
        return taken


@dataclass(frozen=True)
class Handover:
    """A prefilled request that looks for memory in a decode rank; `start` is called when it has it."""

    request: Request
    start: Callable[[], None]


@dataclass(slots=True)
class Batch:
    """What the ranks of an instance do in one step, arrays over ranks [dp]; the names are the cost model's."""

    decode_seqs: NDArray[np.int64]
    decode_context: NDArray[np.int64]
    prefill_tokens: NDArray[np.int64]
    prefill_context: NDArray[np.float64]
    prefill_seqs: NDArray[np.int64]

    @property
    def is_decode_only(self) -> bool:
        return not self.prefill_seqs.any()
