"""What an instance's collectives (and experts that move) are to others on the same links, and what others do to its steps.

Legend of shapes: k links that the exchanges use, d DP ranks, n steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from twin.cost.batch import StepBatch
from twin.cost.model import CostModel
from twin.cost.network import Ints
from twin.cost.wire import Wire, wire_of

Floats = NDArray[np.float64]
_MOST_TAKEN = 0.95  # of a link by others: an exchange always gets something


class Presence:
    """A `Neighbour` of transfers. `changed` is called when the instance begins to do something else, `retime` when the step
    under way is to take another time than it was said to."""

    def __init__(self, costs: CostModel, gpus: tuple[int, ...], changed: Callable[[Presence], None],
                 retime: Callable[[], None]) -> None:
        self.costs = costs
        self._gpus, self._changed, self._retime = gpus, changed, retime
        self._work: tuple[StepBatch, float] | None = None  # what it does, and how long a step of it takes alone
        self._amounts: tuple[Floats, tuple[Floats, ...]] | None = None  # of that, once somebody wants to know
        self._more_s = 0.0
        self._taken_k: Floats | None = None
        self._moved_k: Floats | None = None  # bytes/s of expert weights on their way to other ranks

    @cached_property
    def wire(self) -> Wire | None:
        return wire_of(self.costs, self._gpus)

    @cached_property
    def links_k(self) -> Ints:
        return np.zeros(0, dtype=np.int64) if self.wire is None else self.wire.links_k

    @cached_property
    def on_link(self) -> NDArray[np.bool_]:
        """Whether its exchanges use a link: [links of the network]."""
        used = np.zeros(len(self.costs.network.capacity), dtype=bool)
        used[self.links_k] = True
        return used

    # What it does to others.

    def load(self) -> tuple[Floats, Floats]:
        """Mean bytes/s on each link and the flows of an exchange: [k], [k]; nothing between steps."""
        if self._work is None or self.wire is None:
            none = np.zeros(len(self.links_k))
            return none, none
        load_k = self._known()[0] / self._work[1]
        return load_k if self._moved_k is None else load_k + self._moved_k, self.wire.flows_k

    def _known(self) -> tuple[Floats, tuple[Floats, ...]]:
        """Bytes of a step on each link [k], and seconds of each leg on each."""
        if self._amounts is None:
            assert self._work is not None and self.wire is not None
            tokens_d = self.costs.exchanged_tokens(self._work[0])
            self._amounts = self.wire.step_bytes(tokens_d), self.wire.alone_s(tokens_d)
        return self._amounts

    def begins(self, batch: StepBatch, step_s: float) -> None:
        """A step (or many alike) begins. Long decodes of the same sequences count as one load, whose steps grow unnoticed."""
        known = self._work
        same = known is not None and not batch.prefill_seqs.any() and not known[0].prefill_seqs.any() and \
            np.array_equal(known[0].decode_seqs, batch.decode_seqs)
        if not same:
            self._work, self._amounts = (batch, step_s), None
            self._more_s = self._longer_s()
            self._changed(self)

    def rests(self) -> None:
        """There is nothing to do."""
        if self._work is not None:
            self._work = None
            self._changed(self)

    def moves(self, bytes_per_s: Floats | None) -> None:
        """Expert weights begin (or cease) to travel: so much on each link of the network while steps are taken."""
        self._moved_k = None if bytes_per_s is None else bytes_per_s[self.links_k]
        self._work = None  # a new load, for whoever shares the links

    # What others do to it.

    def squeeze(self, taken_k: Floats) -> None:
        """From now on transfers take this part of each link."""
        self._taken_k = taken_k if taken_k.any() else None
        before, self._more_s = self._more_s, self._longer_s()
        if self._more_s != before:
            self._retime()

    def _longer_s(self) -> float:
        """What the exchanges of a step take longer than alone, for all that is taken of the links."""
        if self._work is None or self.wire is None or (self._taken_k is None and self._moved_k is None):
            return 0.0
        taken_k = np.zeros(len(self.links_k)) if self._taken_k is None else self._taken_k
        if self._moved_k is not None:
            taken_k = taken_k + self._moved_k / self.costs.network.capacity[self.links_k]
        return self.wire.more_s(self._known()[1], np.minimum(taken_k, _MOST_TAKEN))

    def longer_s(self, batch: StepBatch, steps: int) -> Floats | float:
        """What `steps` decodes from `batch` on (or one step of any kind) take longer, of the load that has begun: [n]."""
        return self.costs.longer_s(rows(batch, steps), self._more_s) if self._more_s > 0 else 0.0


def rows(batch: StepBatch, steps: int) -> StepBatch:
    """The batch as rows [n, d]: a decode context grows by a token a sequence from one to the next."""
    grown = np.arange(steps)[:, None] * batch.decode_seqs
    same = [np.broadcast_to(part, grown.shape) for part in (
        batch.decode_seqs, batch.prefill_tokens, batch.prefill_context, batch.prefill_seqs)]
    return StepBatch(same[0], batch.decode_context + grown, *same[1:])
