"""Calibration: what steps and operators take on THIS machine, written down for the twin.

Whole steps are measured on the real engine of a plan: batches of known size and context are sent and every step is
recorded in the cost model's own words (StepBatch), so that host time, lockstep and communication are all inside. Single
operators are measured by `runtime.operators`. The twin reads both files; it never imports this.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.frontend import Frontend
from runtime.layout import layouts
from runtime.measure import Step, group_steps
from runtime.operators import operator_profile
from runtime.options import EngineOptions
from runtime.rank import DTYPES
from runtime.types import SamplingParams
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan
from twin.spec.provenance import provenance

FORMAT = "eptwin-steps-1"
FIELDS = ("decode_seqs", "decode_context", "prefill_tokens", "prefill_context", "prefill_seqs")
SHARED = ("decode_seqs", "prefill_tokens")
TERMS = ("step", "any_prefill", *FIELDS, *(f"mean_{field}" for field in SHARED))
"""Of the fitted line: seconds = sum of coefficient x term. The first two are 1 or 0, `FIELDS` are the busiest DP rank's
(attention waits for it), `mean_*` the mean over ranks (the experts, spread over all, work on everybody's tokens)."""
_DECODE_STEPS = 6
_REPEATS = 3
Json = dict[str, Any]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Calibration:
    """`profile`: an engine profile of operators. `steps`: measured steps by pool and a line fitted to them."""

    profile: Json
    steps: Json

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write `profile.json` and `steps.json` whole; their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = (folder / "profile.json", folder / "steps.json")
        for path, content in zip(paths, (self.profile, self.steps), strict=True):
            scratch = path.with_name(path.name + ".tmp")
            scratch.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            scratch.replace(path)
        return paths


def calibrate(model: ModelSpec, plan: Plan, options: EngineOptions | None = None, *, budget_s: float = 45.0,
              progress: Progress = lambda line: None) -> Calibration:
    """Measure the plan's engine and one rank's operators in about `budget_s` seconds.

    Raises SpecError when the plan does not fit the model, RankFailed when a rank dies.
    """
    options = replace(options or EngineOptions(), record=True)
    began = time.monotonic()
    steps = asyncio.run(_measure_steps(model, plan, options, budget_s, progress))
    progress(f"operators ({time.monotonic() - began:.0f} s so far)")
    if options.device == "cuda":
        return Calibration(_gpu_profile(budget_s, progress), steps)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads_for(plan.gpus))
    try:
        at = layouts(plan, model)[0]
        largest = max(pool.max_batch_tokens for pool in plan.pools)
        profile = operator_profile(model, at, DTYPES[options.dtype], options.device, max_tokens=min(largest, 1024),
                                   max_context=min(model.max_context, 1024))
    finally:
        torch.set_num_threads(threads)
    return Calibration(profile, steps)


def _gpu_profile(budget_s: float, progress: Progress) -> Json:
    """The GPU's operators, on the grid that serves every model; `python -m runtime.gpu_operators` keeps what it found."""
    with tempfile.TemporaryDirectory() as scratch:
        found: Json = import_module("runtime.gpu_operators").measure(Path(scratch) / "profile.json", budget_s, progress)
    return found


async def _measure_steps(model: ModelSpec, plan: Plan, options: EngineOptions, budget_s: float, progress: Progress) -> Json:
    frontend = Frontend(plan, model, options)
    await frontend.start()
    try:
        until = time.monotonic() + 0.7 * budget_s
        for batch, context in _warm_first(_grid(frontend)):
            if time.monotonic() > until:
                progress("out of time: the largest batches were left out")
                break
            progress(f"{batch} sequences a DP rank, {context} tokens of context")
            for _ in range(_REPEATS if batch == 1 else 1):
                await _send(frontend, batch, context)
            if batch == 0:
                frontend.forget()
        front = await _frontend_s(frontend)
        handover = [{"tokens": len(f.prompt), "seconds": f.transfer[1] - f.transfer[0]}
                    for f in frontend.finished_flights if f.transfer is not None]
        steps = group_steps(frontend.records.steps, 0.0)
    finally:
        await frontend.stop()
    pools = [_pool(index, pool, [s for s in steps if s.pool == index]) for index, pool in enumerate(plan.pools)]
    return {"format": FORMAT, "model": model.name, "dtype": options.dtype, "device": options.device,
            "threads": options.threads_for(plan.gpus), "frontend_s": front, "pools": pools, "handovers": handover,
            "provenance": provenance(model, plan, libraries=("torch", "numpy")).model_dump(mode="json")}


def _grid(frontend: Frontend) -> list[tuple[int, int]]:
    """(sequences a DP rank, prompt tokens), small ones first; what the KV cache of a rank can hold."""
    pools = frontend.plan.pools
    decode = min(p.max_num_seqs for p in pools)
    room = min(m["kv_blocks"] for m in frontend.ready.values()) * min(p.block_tokens for p in pools)
    longest = frontend.max_context - _DECODE_STEPS - 40
    contexts = sorted({c for c in (8, 32, 128, 512, 2048, longest) if 0 < c <= longest})
    batches = sorted({b for b in (1, 2, 4, 8, 16, 32, 64, 128, decode) if b <= decode})
    points = [(b, c) for b in batches for c in contexts if b * (c + 40) <= room]
    return sorted(points, key=lambda point: (point[0] * point[1], point))


def _warm_first(points: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Batch 0 stands for a throw-away round of one sequence."""
    yield 0, points[0][1]
    yield from points


async def _send(frontend: Frontend, batch: int, context: int) -> None:
    """`batch` prompts for every DP rank that takes prompts, and enough output that they all decode together."""
    targets = frontend.targets.decoders or frontend.targets.entries
    count = max(1, batch) * len(targets)
    pool = frontend.targets.entries[0].plan
    per_step = min(pool.chunk_tokens or pool.max_batch_tokens, pool.max_batch_tokens)
    prompts_s = -(-max(1, batch) * context // max(1, per_step - max(1, batch)))
    rng = np.random.default_rng(count * 7919 + context)
    most = frontend.max_context - context
    params = SamplingParams(max_tokens=max(1, min(most, prompts_s + _DECODE_STEPS)), ignore_eos=True)
    streams = [frontend.submit(rng.integers(0, frontend.model.vocab, context).tolist(), params) for _ in range(count)]
    for stream in streams:
        async for _ in stream:
            pass


async def _frontend_s(frontend: Frontend) -> float:
    """Median seconds that a first token takes beside its step, in an idle engine: control channel, scheduling, streaming."""
    extra = []
    for _ in range(8):
        before = len(frontend.records.steps)
        arrival = time.monotonic()
        stream = frontend.submit([1] * 8, SamplingParams(max_tokens=1, ignore_eos=True))
        async for event in stream:
            steps = frontend.records.steps[before:]
            extra.append(event.time - arrival - sum(s["end"] - s["start"] for s in steps[:1]))
    return max(0.0, statistics.median(extra))


def _pool(index: int, pool: PoolPlan, steps: Sequence[Step]) -> Json:
    """Samples of equal batches pooled to their median, and the fitted line."""
    groups: dict[tuple[tuple[float, ...], ...], list[float]] = {}
    for step in steps:
        key = tuple(tuple(_amounts(step, pool.dp, field)) for field in FIELDS)
        groups.setdefault(key, []).append(step.end_s - step.start_s)
    samples = [{**dict(zip(FIELDS, map(list, key), strict=True)), "seconds": statistics.median(seconds), "count": len(seconds)}
               for key, seconds in sorted(groups.items())]
    coefficients, errors = fit(samples)
    names = sorted({name for step in steps for name in step.parts})
    return {"pool": index, "role": pool.role, "dp": pool.dp, "tp": pool.tp, "ep": pool.ep, "samples": samples,
            "fit": dict(zip(TERMS, coefficients, strict=True)),
            "fit_error": {"median": float(np.median(errors)), "p90": float(np.quantile(errors, 0.9))} if len(errors) else None,
            "parts_s": {name: statistics.fmean(step.parts.get(name, 0.0) for step in steps) for name in names}}


def _amounts(step: Step, dp: int, field: str) -> list[float]:
    by_rank = {rank["dp_rank"]: float(rank[field]) for rank in step.ranks}
    return [by_rank.get(rank, 0.0) for rank in range(dp)]


def fit(samples: Sequence[Json]) -> tuple[list[float], np.ndarray]:
    """(coefficients of TERMS, none negative; relative errors of the samples). Least squares of relative errors; a term
    that would be negative is left out and the rest fitted again."""
    if not samples:
        return [0.0] * len(TERMS), np.zeros(0)
    rows = []
    for sample in samples:
        busiest = [max(sample[field]) for field in FIELDS]
        shared = [statistics.fmean(sample[field]) for field in SHARED]
        rows.append([1.0, float(busiest[2] > 0), *busiest, *shared])
    x, y = np.array(rows), np.array([sample["seconds"] for sample in samples])
    weight = np.sqrt([sample["count"] for sample in samples]) / y
    active = list(range(len(TERMS)))
    while True:
        found = np.linalg.lstsq(x[:, active] * weight[:, None], y * weight, rcond=None)[0]
        if (found >= 0).all() or len(active) == 1:
            break
        del active[int(found.argmin())]
    coefficients = np.zeros(len(TERMS))
    coefficients[active] = np.maximum(found, 0.0)
    return coefficients.tolist(), np.abs(x @ coefficients / y - 1)

