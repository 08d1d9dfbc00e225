"""Steps of an engine that was calibrated as a whole: `eptwin calibrate` fits seconds of a step to what is in it.

    seconds = step + any_prefill + a x decode_seqs + b x decode_context + c x prefill_tokens + ... + m x mean_prefill_tokens

with the numbers of the busiest DP rank, which attention waits for, and means over ranks, which the experts work on. Whole
steps hold host time, lockstep and communication, which operator tables do not; so where a calibration covers a pool's model
and shape, it answers instead of the operators. Memory and KV bytes stay those of the cost model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from twin.cost.batch import Array, StepBatch, StepCost
from twin.cost.model import CostModel
from twin.spec.base import Spec
from twin.spec.errors import Problem, SpecError
from twin.spec.parse import read_text
from twin.spec.plan import PoolPlan, Role
from twin.spec.results import Memory, Provenance

FORMAT = "eptwin-steps-1"
MAX_FILE_BYTES = 64 << 20
BUSIEST = ("decode_seqs", "decode_context", "prefill_tokens", "prefill_context", "prefill_seqs")
SHARED = ("decode_seqs", "prefill_tokens")
TERMS = ("step", "any_prefill", *BUSIEST, *(f"mean_{name}" for name in SHARED))


class FitError(Spec):
    """Relative errors of the fitted line on its own samples."""

    median: float
    p90: float


class StepSample(Spec):
    """One measured batch: per DP rank what it held, and the median seconds of `count` such steps."""

    decode_seqs: tuple[float, ...]
    decode_context: tuple[float, ...]
    prefill_tokens: tuple[float, ...]
    prefill_context: tuple[float, ...]
    prefill_seqs: tuple[float, ...]
    seconds: float
    count: int


class PoolSteps(Spec):
    """Measured steps of one pool and the line through them."""

    pool: int
    role: Role
    dp: int
    tp: int
    ep: int
    samples: tuple[StepSample, ...]
    fit: dict[str, float]
    fit_error: FitError | None = None
    parts_s: dict[str, float] = {}


class Handover(Spec):
    """One measured KV transfer from a prefill to a decode rank."""

    tokens: int
    seconds: float


class StepCalibration(Spec):
    """What `eptwin calibrate` wrote of one engine. `frontend_s` is the time a request spends outside any step."""

    format: Literal["eptwin-steps-1"]
    model: str
    dtype: str
    device: str
    threads: int
    frontend_s: float
    pools: tuple[PoolSteps, ...]
    handovers: tuple[Handover, ...] = ()
    provenance: Provenance


class CalibrationFile(Spec):
    """Calibrations of one machine, one a plan shape."""

    format: Literal["eptwin-steps-1"]
    calibrations: tuple[StepCalibration, ...]

    def of(self, model: str, pool: PoolPlan) -> PoolSteps | None:
        """The calibration of a model cut like `pool`: same role, DP, TP and EP."""
        for calibration in self.calibrations:
            for steps in calibration.pools:
                if calibration.model == model and (steps.role, steps.dp, steps.tp, steps.ep) == (
                    pool.role,
                    pool.dp,
                    pool.tp,
                    pool.ep,
                ):
                    return steps
        return None

    def frontend_s(self, model: str) -> float:
        """Median time of a request outside steps, 0 where the model was not calibrated."""
        found = [c.frontend_s for c in self.calibrations if c.model == model]
        return float(np.median(found)) if found else 0.0


def is_calibration(path: Path) -> bool:
    """Whether a file says that it holds calibrated steps (an engine profile of operators says otherwise)."""
    return f'"{FORMAT}"' in read_text(path, max_bytes=MAX_FILE_BYTES)[:400]


def load_calibration(path: Path) -> CalibrationFile:
    """Read a file of `eptwin calibrate`. Raises SpecError naming what is wrong."""
    text = read_text(path, max_bytes=MAX_FILE_BYTES)
    try:
        return CalibrationFile.model_validate_json(text)
    except ValidationError as error:
        problems = [
            Problem(e["msg"], field=".".join(map(str, e["loc"]))) for e in error.errors(include_url=False, include_input=False)
        ]
        raise SpecError(problems, file=path) from error


class CalibratedSteps:
    """A pool's costs from its calibration; the same questions as CostModel's."""

    def __init__(self, base: CostModel, steps: PoolSteps, *, frontend_s: float = 0.0) -> None:
        unknown = set(steps.fit) - set(TERMS)
        if unknown:
            raise SpecError(f"unknown terms {sorted(unknown)}", field="fit", expected=", ".join(TERMS))
        self.base, self.steps, self.pool, self.frontend_s = base, steps, base.pool, frontend_s
        self._terms: Mapping[str, float] = {term: steps.fit.get(term, 0.0) for term in TERMS}

    def step(self, batch: StepBatch) -> StepCost:
        """A step by the fitted terms; the interval is the fit's own 90% error, narrowed to 80%."""
        amounts = self._amounts(batch)
        parts = {f"calibrated/{term}": float(self._terms[term] * amounts[term][0]) for term in TERMS if self._terms[term]}
        total_s = float(sum(parts.values()))
        half = 0.8 / 0.9 * (self.steps.fit_error.p90 if self.steps.fit_error else 0.5)
        return StepCost(total_s, parts, dict.fromkeys(parts, "calibrated"), total_s / (1 + half), total_s * (1 + half))

    def step_s(self, batch: StepBatch) -> float:
        return float(self.steps_s(batch)[0])

    def steps_s(self, batch: StepBatch) -> Array:
        """Seconds of steps, arrays [n, d] -> [n]."""
        amounts = self._amounts(batch)
        total: Array = np.zeros(len(amounts["step"]))
        for term in TERMS:
            total = total + self._terms[term] * amounts[term]
        return total

    def decode_s(self, seqs: npt.ArrayLike, context: npt.ArrayLike) -> Array:
        """Seconds of pure decode steps: arrays [n] (ranks alike) or [n, d] -> [n]."""
        seqs_n, context_n = np.broadcast_arrays(np.asarray(seqs, dtype=float), np.asarray(context, dtype=float))
        if seqs_n.ndim == 1:
            seqs_n, context_n = seqs_n[:, None], context_n[:, None]
        none = np.zeros(seqs_n.shape)
        return self.steps_s(StepBatch(seqs_n, context_n, none, none, none))

    def _amounts(self, batch: StepBatch) -> dict[str, Array]:
        """Every term of steps, [n]."""
        by_rank = {name: np.atleast_2d(np.asarray(getattr(batch, name), dtype=float)) for name in BUSIEST}
        busiest = {name: values.max(axis=-1) for name, values in by_rank.items()}
        busy = (busiest["decode_seqs"] > 0) | (busiest["prefill_tokens"] > 0)
        means = {f"mean_{name}": by_rank[name].mean(axis=-1) for name in SHARED}
        return {"step": busy.astype(float), "any_prefill": (busiest["prefill_tokens"] > 0).astype(float), **busiest, **means}

    @cached_property
    def tokens_per_step(self) -> float:
        return self.base.tokens_per_step

    def memory(self) -> Memory:
        return self.base.memory()

    @property
    def kv_blocks_per_rank(self) -> int:
        return self.base.kv_blocks_per_rank

    def kv_transfer_bytes(self, tokens: int) -> float:
        return self.base.kv_transfer_bytes(tokens)


def merge(calibrations: Sequence[StepCalibration]) -> CalibrationFile:
    """Calibrations of several plan shapes as one file."""
    return CalibrationFile(format="eptwin-steps-1", calibrations=tuple(calibrations))
