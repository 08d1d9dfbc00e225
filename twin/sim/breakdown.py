"""Where the time of a pool's steps goes: the parts of sampled steps, asked of the cost model once they are done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from twin.cost.batch import StepBatch, StepCost
from twin.sim.instance import Instance
from twin.sim.run import Run, batch_at
from twin.spec.base import Source

SHARED_LINKS = "overlap/shared_links"
_PER_OCTAVE = 4  # bits: 16 steps are sampled between step 2^n and step 2^(n+1)


def stride_at(step: int) -> int:
    """Every so many steps one is sampled around `step`: all of the first 32, then ever fewer."""
    return 1 << max(0, step.bit_length() - 1 - _PER_OCTAVE)


@dataclass
class Breakdown:
    """Sums over the sampled steps of one instance, each standing for `stride_at` steps."""

    steps: float = 0.0
    parts_s: dict[str, float] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    total_s: float = 0.0
    low_s: float = 0.0
    high_s: float = 0.0
    batches: list[tuple[int, StepBatch]] = field(default_factory=list)  # the sampled steps of an instance

    def observe(self, instance: Instance, run: Run) -> None:
        """Sample the steps of a run that are due."""
        step = run.first
        while step < run.first + run.steps:
            stride = stride_at(step)
            step += -step % stride
            if step < run.first + run.steps:
                batch = batch_at(run, step - run.first)
                self.batches.append((step, batch))
                self.add(_squeezed(instance.costs.step(batch), run, step - run.first), stride_at(step))
            step += 1

    def add(self, other: Breakdown | StepCost, weight: float = 1.0) -> None:
        """Add another one, or one step that stands for `weight` of them."""
        self.steps += weight * (other.steps if isinstance(other, Breakdown) else 1.0)
        for part, seconds in other.parts_s.items():
            self.parts_s[part] = self.parts_s.get(part, 0.0) + weight * seconds
        for part, source in other.sources.items():
            known = self.sources.setdefault(part, source)
            self.sources[part] = known if known == source else "mixed"
        self.total_s += weight * other.total_s
        self.low_s += weight * other.low_s
        self.high_s += weight * other.high_s

    def middle_batch(self, steps: int) -> StepBatch | None:
        """The sampled batch nearest the middle of `steps` steps; None when there is none."""
        return min(self.batches, key=lambda pair: abs(2 * pair[0] - steps))[1] if self.batches else None

    def mean_parts_s(self) -> dict[str, float]:
        """Mean seconds a step by part, in the order of their names."""
        return {part: self.parts_s[part] / self.steps for part in sorted(self.parts_s)} if self.steps else {}

    @property
    def source(self) -> Source:
        """Where the seconds come from, taken together."""
        return common_source(list(self.sources.values()))


def together(breakdowns: Iterable[Breakdown]) -> Breakdown:
    """The sum, added in the given order (that of the instances, whichever of them stepped first)."""
    total = Breakdown()
    for breakdown in breakdowns:
        total.add(breakdown)
    return total


def _squeezed(cost: StepCost, run: Run, offset: int) -> StepCost:
    """With what KV transfers and migrations on the same links added to the step, as a part of its own."""
    more_s = float(run.step_s[offset] - run.alone_s[offset])
    if more_s == 0.0:
        return cost
    return StepCost(cost.total_s + more_s, {**cost.parts_s, SHARED_LINKS: more_s}, {**cost.sources, SHARED_LINKS: "roofline"},
                    cost.low_s + more_s, cost.high_s + more_s)


def common_source(sources: list[Source]) -> Source:
    """The one source of a sum, `mixed` of unlike ones, `assumed` of none."""
    kinds = set(sources)
    return kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "assumed"
