"""Fit what `twin/cost/engine_fits.py` holds on the fit half of a table of public deployments.

    python -m benchmarks.fit_silicon silicon.csv [--seed 0] [--group sglang:blackwell ...]

For each (engine, GPU generation): launch time of small kernels, host time of a step and of a kernel launched alone, what a
request spends outside steps, and a few scales on families of operators. The loss is the mean absolute log error of TPOT and
(half as heavy) of TTFT, large errors bounded, plus a pull towards the values that engines.py states.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.fit_deployments import told_apart
from twin.cost.batch import INDEX, StepBatch
from twin.cost.build import helper_launches
from twin.cost.engine_fits import generation
from twin.cost.engines import ENGINES, Engine
from twin.cost.measured import RowTable
from twin.cost.model import CostModel
from twin.cost.serving import Serving
from twin.spec.errors import EptwinError
from twin.validate.answer import Answers, means_of, room_of, serving_for
from twin.validate.closed_loop import Worker, run_loop
from twin.validate.rows import Question, Unanswered, in_fit_half, question_of, read_rows
from twin.validate.step_times import StepTimes

# name: (how far its log may go, pull towards 1). A group holds three to six models: what is one model's own is left to
# `fit_deployments.py`, so these stay near what engines.py states unless all of a group's models ask for more.
PARAMETERS = {"graph_launch_s": (0.9, 0.06), "step_host_s": (1.2, 0.03), "eager_launch_s": (3.4, 0.003),
              "frontend_s": (0.7, 0.03), "prefill_slowdown": (0.6, 0.10),
              "products_scale": (0.3, 0.25), "attention_scale": (0.4, 0.20),
              "experts_scale": (0.4, 0.20), "collectives_scale": (0.6, 0.20)}
_MOST_USERS = 160
_BOUND = 0.9  # log error beyond which a row counts no more: another deployment than its columns say


class FamilyTimes(StepTimes):
    """Step times that can be put together again for other constants without asking the cost model."""

    def __init__(self, costs: CostModel, seqs: int, context: int, budget: int, chunk: float) -> None:
        super().__init__(costs, seqs, context, budget, chunk)
        n, contexts = self.decode_grid(seqs)
        self._decode_parts = families(costs, StepBatch(*(a[:, None] for a in (n, contexts, 0 * n, 0 * n, 0 * n))))
        self._mixed_parts = families(costs, self.mixed_grid(seqs, context, budget))

    def set(self, engine: Engine) -> None:
        """Take the constants of `engine`."""
        self.fill(assembled(self._decode_parts, engine, False), assembled(self._mixed_parts, engine, True))


def families(costs: CostModel, batch: StepBatch) -> dict[str, np.ndarray]:
    """Seconds of steps [n] by family, at scale 1, of a pool without DP; launches and sequences as counts."""
    x, stack = costs._features(batch), costs._stack
    found = {"launches": (x @ stack.table.launch / costs.site.launch_s).sum(axis=-1).max(axis=-1)}
    found["other"] = stack.table.seconds(x).sum(axis=-1).max(axis=-1) - found["launches"] * costs.site.launch_s
    for name in ("products", "attention", "collectives", "experts"):
        found[name] = np.zeros(len(x))
    for own in stack.measured:
        found["products" if isinstance(own, RowTable) else "attention"] += own.seconds(x).max(axis=-1)
    for one in stack.collectives:
        found["collectives"] += one.seconds(x).max(axis=-1)
    if stack.experts is not None:
        total = x[..., INDEX["tokens"]].sum(axis=-1)
        found["experts"] = sum(stack.experts.seconds(total))
    streams = stack.streams(x)
    found["other"] += streams.compute + streams.comm - sum(v for k, v in found.items() if k != "launches") \
        - found["launches"] * costs.site.launch_s
    found["eager"] = stack.launches(x) + helper_launches(costs.model, costs.site.engine)
    found["seqs"] = (batch.decode_seqs + batch.prefill_seqs).max(axis=-1)
    found["covered"] = costs.graphs.cover(x)
    return found


def assembled(parts: dict[str, np.ndarray], engine: Engine, prompts: bool) -> np.ndarray:
    """Seconds of steps from their families."""
    device = parts["other"] + parts["launches"] * engine.graph_launch_s
    for name in ("products", "attention", "collectives", "experts"):
        device = device + parts[name] * getattr(engine, f"{name}_scale")
    device = device * (engine.prefill_slowdown if prompts else 1.0)
    eager = np.maximum(parts["eager"] * engine.eager_launch_s - device, 0.0) * ~parts["covered"].astype(bool)
    return device + eager + engine.step_host_s + engine.seq_host_s * parts["seqs"]


@dataclass
class Case:
    """One row ready to be predicted again and again."""

    question: Question
    times: FamilyTimes
    serving: Serving
    room: float
    lengths: list[tuple[int, int]]

    def errors(self, engine: Engine) -> tuple[float, float]:
        """Log errors of TPOT and TTFT."""
        self.times.set(engine)
        serving = self.serving
        worker = Worker(self.times, serving, "mixed", self.room)
        loop = run_loop([worker], [], self.question.concurrency, lambda i: self.lengths[i], frontend_s=engine.frontend_s,
                        handover_s=lambda _: 0.0, waves=10, simulated=3)
        return (math.log(loop.tpot_s / self.question.measured_tpot_s), math.log(loop.ttft_s / self.question.measured_ttft_s))


def cases_of(path: Path, seed: int, key: tuple[str, str]) -> list[Case]:
    """Rows of the fit half that one group is fitted on: one GPU group, no drafts, each measurement once."""
    answers, seen, questions = Answers(), set(), []
    for row in read_rows(path):
        if row.texts["backend"] != key[0] or row.texts["mode"] != "agg" or not in_fit_half(row, seed):
            continue
        q = question_of(row)
        if isinstance(q, Unanswered) or q.concurrency > _MOST_USERS or q.plan.pools[0].dp > 1 or q.plan.pools[0].mtp_draft_tokens:
            continue
        gpu = q.cluster.groups[0].gpu
        mark = (row.configuration, q.concurrency, q.workload.isl, q.workload.osl, round(q.measured_tpot_s, 7))
        if generation(gpu) == key[1] and mark not in seen and q.measured_tpot_s > 0 and q.measured_ttft_s > 0:
            seen.add(mark)
            questions.append(q)
    return [_case(q, answers) for q in told_apart(questions)]


def _case(q: Question, answers: Answers) -> Case:
    isl, osl = means_of(q)
    pool, serving = q.plan.pools[0], serving_for(q)
    costs = answers.costs_of(q.model, q.cluster, q.plan, pool, engine=ENGINES[q.plan.engine])
    times = FamilyTimes(costs, q.concurrency, isl + osl, serving.budget_tokens, float(isl))
    return Case(q, times, serving, room_of(costs, []), answers.lengths(q, 3))


def loss(cases: Sequence[Case], engine: Engine, factors: dict[str, float], weights: np.ndarray) -> float:
    errors = np.array([case.errors(engine) for case in cases])
    bounded = np.minimum(np.abs(errors), _BOUND)
    pull = sum(PARAMETERS[name][1] * math.log(f) ** 2 for name, f in factors.items())
    return float(np.average(bounded[:, 0], weights=weights) + 0.5 * np.average(bounded[:, 1], weights=weights) + pull)


def fit(args: tuple[Path, int, tuple[str, str]]) -> tuple[tuple[str, str], dict[str, float], dict[str, float]]:
    """Coordinate descent on a shrinking log grid; each model of a group weighs the square root of its rows."""
    path, seed, key = args
    cases = cases_of(path, seed, key)
    names = [c.question.model.name + c.question.plan.precision.experts for c in cases]
    weights = np.array([names.count(name) ** -0.5 for name in names])
    own = ENGINES[key[0]]
    factors = dict.fromkeys(PARAMETERS, 1.0)

    def engine_at(chosen: dict[str, float]) -> Engine:
        return replace(own, **{name: getattr(own, name) * f for name, f in chosen.items()})

    best = start = loss(cases, own, factors, weights)
    # a launch time shows only once it outlasts the GPU: no small step finds it
    starts = {f: {**factors, "eager_launch_s": f} for f in (4.0, 8.0, 16.0)}
    for tried in starts.values():
        found = loss(cases, engine_at(tried), tried, weights)
        if found < best:
            best, factors = found, tried
    for width in (1.0, 0.5, 0.25, 0.12):
        for name, (reach, _) in PARAMETERS.items():
            for way in (-1, 1):
                for _ in range(6):
                    log_f = math.log(factors[name]) + way * width * (1.0 if reach > 2 else min(reach, 0.5))
                    if abs(log_f) > reach:
                        break
                    tried = {**factors, name: math.exp(log_f)}
                    found = loss(cases, engine_at(tried), tried, weights)
                    if found >= best - 1e-5:
                        break
                    best, factors = found, tried
        print(key, len(cases), f"{start:.4f} -> {best:.4f}", {k: round(v, 2) for k, v in factors.items()}, flush=True)
    fitted = {name: float(f"{getattr(own, name) * f:.3g}") for name, f in factors.items() if f != 1.0}
    return key, fitted, {"rows": len(cases), "loss_before": start, "loss_after": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--group", action="append", default=[], help="engine:generation; default: all")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fit_silicon.json"))
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    everything = [(e, g) for e in ("sglang", "vllm", "trtllm") for g in ("blackwell", "hopper")]
    groups = [tuple(g.split(":")) for g in args.group] or everything
    with ProcessPoolExecutor(args.workers) as pool:
        found = list(pool.map(fit, [(args.table, args.seed, g) for g in groups]))
    content = [{"engine": k[0], "generation": k[1], "fit": f, **info} for k, f, info in found]
    args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for key, fitted, _ in found:
        print(f"    {key!r}: {fitted!r},")


if __name__ == "__main__":
    try:
        main()
    except EptwinError as error:
        sys.exit(f"error: {error}")
