"""Where the time of a pool's steps goes: the parts of sampled steps, asked of the cost model once they are done."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from twin.cost.batch import StepBatch
from twin.sim.instance import Instance, Run
from twin.spec.base import Source

_PER_OCTAVE = 4  # bits: 16 steps are sampled between step 2^n and step 2^(n+1)


def stride_at(step: int) -> int:
    """Every so many steps one is sampled around `step`: all of the first 32, then ever fewer."""
    return 1 << max(0, step.bit_length() - 1 - _PER_OCTAVE)


@dataclass
class Breakdown:
    """Sums over the sampled steps of one pool, each standing for `stride_at` steps."""

    steps: float = 0.0
    parts_s: dict[str, float] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    total_s: float = 0.0
    low_s: float = 0.0
    high_s: float = 0.0

    def observe(self, instance: Instance, run: Run) -> None:
        """Sample the steps of a run that are due."""
        step = run.first
        while step < run.first + run.steps:
            stride = stride_at(step)
            step += -step % stride
            if step < run.first + run.steps:
                self._sample(instance, batch_at(run, step - run.first), stride_at(step))
            step += 1

    def _sample(self, instance: Instance, batch: StepBatch, weight: float) -> None:
        cost = instance.costs.step(batch)
        self.steps += weight
        for part, seconds in cost.parts_s.items():
            self.parts_s[part] = self.parts_s.get(part, 0.0) + weight * seconds
        for part, source in cost.sources.items():
            known = self.sources.setdefault(part, source)
            self.sources[part] = known if known == source else "mixed"
        self.total_s += weight * cost.total_s
        self.low_s += weight * cost.low_s
        self.high_s += weight * cost.high_s

    def mean_parts_s(self) -> dict[str, float]:
        """Mean seconds a step by part, in the order of their names."""
        return {part: self.parts_s[part] / self.steps for part in sorted(self.parts_s)} if self.steps else {}

    @property
    def source(self) -> Source:
        """Where the seconds come from, taken together."""
        return common_source(list(self.sources.values()))


def batch_at(run: Run, offset: int) -> StepBatch:
    """What the ranks did in the step `offset` steps into a run."""
    batch = run.batch
    return StepBatch(batch.decode_seqs, np.asarray(batch.decode_context + offset * batch.decode_seqs),
                     batch.prefill_tokens, batch.prefill_context, batch.prefill_seqs)


def common_source(sources: list[Source]) -> Source:
    """The one source of a sum, `mixed` of unlike ones, `assumed` of none."""
    kinds = set(sources)
    return kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "assumed"
