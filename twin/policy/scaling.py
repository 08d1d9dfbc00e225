"""How many instances a pool should have, from how busy it is. Prefill and decode pools are scaled apart."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from twin.spec.errors import SpecError


@dataclass(frozen=True)
class TargetTracking:
    """Keeps utilisation near a target; the owner evaluates it at a fixed interval of its own, one step each.

    Utilisation is work over capacity of the pool, and may exceed 1 where work queues up. Nothing happens within
    `tolerance` (a fraction) of the target, nor sooner after the last change than the cooldown of that direction: growing
    must be quick, shrinking patient.
    """

    target_utilisation: float
    min_instances: int = 1
    max_instances: int = 1
    tolerance: float = 0.1
    grow_cooldown_steps: int = 1
    shrink_cooldown_steps: int = 5

    def __post_init__(self) -> None:
        for field, ok, expected in (
            ("target_utilisation", 0.0 < self.target_utilisation <= 1.0, "0 < target <= 1"),
            ("min_instances", self.min_instances >= 1, "at least 1"),
            ("max_instances", self.max_instances >= self.min_instances, f"at least min_instances = {self.min_instances}"),
            ("tolerance", 0.0 <= self.tolerance < 1.0, "0 <= tolerance < 1"),
            ("grow_cooldown_steps", self.grow_cooldown_steps >= 0, "at least 0"),
            ("shrink_cooldown_steps", self.shrink_cooldown_steps >= 0, "at least 0"),
        ):
            if not ok:
                raise SpecError(f"is {getattr(self, field)}", field=field, expected=expected)

    def decide(self, instances: int, utilisation: float, steps_since_change: int) -> int:
        """The number of instances wanted now; `instances` itself for no change.

        The work that keeps `instances` busy to `utilisation` is spread so that each is busy to the target.
        """
        wanted = min(max(instances, self.min_instances), self.max_instances)
        if wanted != instances:
            return wanted  # outside the allowed range: no cooldown
        ratio = utilisation / self.target_utilisation
        if abs(ratio - 1.0) <= self.tolerance:
            return instances
        wanted = min(max(ceil(instances * ratio - 1e-9), self.min_instances), self.max_instances)
        cooldown = self.grow_cooldown_steps if wanted > instances else self.shrink_cooldown_steps
        return wanted if steps_since_change >= cooldown else instances


@dataclass(frozen=True)
class PoolScaling:
    """One tracker a role: prompts load the prefill pool, tokens in flight the decode pool, and they rarely agree."""

    prefill: TargetTracking
    decode: TargetTracking

    def decide(self, instances: tuple[int, int], utilisation: tuple[float, float],
               steps_since_change: tuple[int, int]) -> tuple[int, int]:
        """(prefill, decode) instances wanted; every argument is such a pair."""
        return (self.prefill.decide(instances[0], utilisation[0], steps_since_change[0]),
                self.decode.decide(instances[1], utilisation[1], steps_since_change[1]))
