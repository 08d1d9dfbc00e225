"""Which costs answer for a pool: its calibrated steps where a profile has them, else operators, measured or roofline."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from twin.cost.evidence import Evidence
from twin.cost.model import CostModel
from twin.cost.network import Network
from twin.cost.steps import CalibratedSteps, CalibrationFile, is_calibration, load_calibration
from twin.spec.plan import Plan, PoolPlan
from twin.spec.scenario import Scenario

Costs = CostModel | CalibratedSteps


def pool_costs(
    scenario: Scenario, plan: Plan, pool: PoolPlan, *, network: Network | None = None, first_gpu: int = 0, seed: int = 0
) -> Costs:
    """Costs of one pool. `scenario.profile` is a file of `eptwin calibrate` (steps.json or profile.json), or a folder of
    engine profiles; without one the profiles that ship answer where they cover the GPU and the engine.

    A pool whose shape was not calibrated falls back to operators, and its numbers say so.
    """
    calibration = _calibration(scenario.profile)
    evidence = _evidence(None if calibration is not None else scenario.profile)
    base = CostModel(scenario.model, scenario.cluster, plan, pool, routing=scenario.routing, profile=evidence, seed=seed,
                     network=network, first_gpu=first_gpu)  # fmt: skip
    steps = calibration.of(scenario.model.name, pool) if calibration is not None else None
    if calibration is None or steps is None:
        return base
    return CalibratedSteps(base, steps, frontend_s=calibration.frontend_s(scenario.model.name))


@lru_cache(maxsize=4)
def _calibration(source: str | None) -> CalibrationFile | None:
    """The calibrated steps in `source`; None where it is something else."""
    if source is None or Path(source).is_dir() or not is_calibration(Path(source)):
        return None
    return load_calibration(Path(source))


@lru_cache(maxsize=4)
def _evidence(source: str | None) -> Evidence:
    return Evidence.load(source)
