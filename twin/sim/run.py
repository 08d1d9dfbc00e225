"""Steps of an instance in flight, and what it asks of a cost model to know how long they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from twin.cost.batch import StepBatch, StepCost
from twin.policy.steps import StepPlan


class StepCosts(Protocol):
    """What an instance asks of a cost model."""

    def step(self, batch: StepBatch) -> StepCost: ...
    def step_s(self, batch: StepBatch) -> float: ...
    def decode_s(self, seqs: NDArray[np.int64], context: NDArray[np.int64]) -> NDArray[np.float64]: ...


@dataclass(slots=True)
class Run:
    """Steps in flight: `planned` ranks do what their plans say (then it is one step), all others decode.

    `batch`: what each rank does in the first of the steps; decode contexts grow by `decode_seqs` a step.
    `alone_s`, `step_s`: seconds of each step without and with what others take of its links.
    `first`: index of the first step in the log, once it is logged.
    """

    start_s: float
    ends_s: NDArray[np.float64]
    step_s: NDArray[np.float64]
    alone_s: NDArray[np.float64]
    steps: int
    batch: StepBatch
    planned: list[tuple[int, StepPlan]]
    first: int = -1
    retimed: int = -1  # the last step, when its pace changed on the way, to `pace_s` for a whole step
    pace_s: float = 0.0


def batch_at(run: Run, offset: int) -> StepBatch:
    """What the ranks did in the step `offset` steps into a run."""
    batch = run.batch
    return StepBatch(batch.decode_seqs, np.asarray(batch.decode_context + offset * batch.decode_seqs),
                     batch.prefill_tokens, batch.prefill_context, batch.prefill_seqs)
