"""The twin's answer to a row: mean TTFT and TPOT with intervals and sources."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from twin.cost.batch import StepBatch
from twin.cost.deployments import Deployments, keys_of, load_deployments
from twin.cost.engines import Engine
from twin.cost.evidence import Evidence
from twin.cost.model import CostModel
from twin.cost.serving import Serving, serving_of
from twin.policy.arrivals import named_stream
from twin.spec.cluster import ClusterSpec
from twin.spec.errors import Infeasible
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan
from twin.spec.workload import Lengths
from twin.validate.closed_loop import Loop, Worker, run_loop
from twin.validate.recipes import served_as
from twin.validate.rows import Question
from twin.validate.step_times import StepTimes

_MOST_REQUESTS = 4096
# The least log half width of a typical decode step. Intervals of TPOT and TTFT are multiples of it, from errors of rows that a
# fit had not seen (`deployments.NEAR`). TTFT is queueing: what is wrong with steps shows several times over.
_LEAST_WIDTH = 0.05


@dataclass(frozen=True)
class Answer:
    """Predicted means; `parts_s`, `sources` and `step_width` (log half of its 80% interval) are those of the typical decode
    step, `near` is the nearest thing to the deployment that was measured (`deployments.NEAR`)."""

    ttft_s: float
    tpot_s: float
    ttft_low_s: float
    ttft_high_s: float
    tpot_low_s: float
    tpot_high_s: float
    parts_s: dict[str, float]
    sources: dict[str, str]
    notes: tuple[str, ...]
    step_width: float
    near: str


@lru_cache(maxsize=1)
def _shipped() -> Evidence:
    return Evidence.load()


class Answers:
    """Answers questions; keeps the cost models of pools it has met."""

    def __init__(self, seed: int = 0, profile: Evidence | None = None, deployments: Deployments | None = None) -> None:
        self.seed, self.profile, self.deployments = seed, profile, deployments
        self._costs: dict[str, CostModel] = {}

    def costs_of(self, model: ModelSpec, cluster: ClusterSpec, plan: Plan, pool: PoolPlan,
                 engine: Engine | None = None) -> CostModel:
        """The cost model of a pool; `engine` replaces the plan's own."""
        key = "|".join((model.name, cluster.name, plan.engine, plan.engine_version or "", plan.precision.model_dump_json(),
                        pool.model_dump_json()))
        if key not in self._costs:
            self._costs[key] = CostModel(model, cluster, plan, pool, profile=self.profile or _shipped(), seed=self.seed,
                                         engine=engine, deployments=self.deployments)
        return self._costs[key]

    def answer(self, question: Question) -> Answer:
        """Predict one row. Raises SpecError where the cost model refuses the plan."""
        isl, osl = means_of(question)
        notes = doubts_of(question)
        entry: list[Worker] = []
        decode: list[Worker] = []
        costs: list[CostModel] = []
        serving = serving_for(question)
        for pool in question.plan.pools:
            model = self.costs_of(question.model, question.cluster, question.plan, pool)
            costs.append(model)
            seqs = -(-question.concurrency // (pool.dp * pool.instances)) + (8 if pool.instances > 1 else 0)
            times = StepTimes(model, seqs, isl + osl, serving.budget_tokens, float(isl))
            room = room_of(model, notes)
            if isl + osl > room:
                notes.append(f"a request of {isl + osl} tokens does not fit the {pool.role} pool's KV cache of {room:.0f}")
            workers = [Worker(times, serving, pool.role, room) for _ in range(pool.instances)]
            (decode if pool.role == "decode" else entry).extend(workers)
        loop = self._loop(question, entry, decode, costs)
        return _answer(question, loop, costs[-1], notes, self.deployments or load_deployments())

    def lengths(self, question: Question, waves: int) -> list[tuple[int, int]]:
        """Prompt and output tokens of the requests of so many waves; the same for the same seed."""
        stream = named_stream(self.seed, "lengths")
        count = waves * question.concurrency
        isl = _draw(question.workload.isl, stream, count)
        return list(zip(isl, _draw(question.workload.osl, stream, count), strict=True))

    def _loop(self, question: Question, entry: list[Worker], decode: list[Worker], costs: list[CostModel]) -> Loop:
        simulated = 4 if question.concurrency * 4 <= _MOST_REQUESTS else 3
        lengths = self.lengths(question, simulated)

        def handover_s(tokens: int) -> float:
            return costs[0].kv_transfer_bytes(tokens) / 40e9 + 5e-3 if decode else 0.0

        return run_loop(entry, decode, question.concurrency, lengths.__getitem__, handover_s=handover_s,
                        frontend_s=costs[0].site.engine.frontend_s, waves=question.waves, simulated=simulated)


def serving_for(question: Question) -> Serving:
    """How the engine schedules a question's traffic, its recipe's flags included."""
    users, isl = question.concurrency, means_of(question)[0]
    serving = serving_of(question.plan.engine, question.cluster.groups[0].gpu, users, isl)
    if question.recipe is None:
        return serving
    return served_as(question.recipe, serving, question.row.count("isl"), users, question.plan.pools[0].mtp_draft_tokens)


def doubts_of(question: Question) -> list[str]:
    """What of a row cannot have been as it says; it is answered all the same."""
    notes = []
    longest = question.row.count("isl") + question.row.count("osl")
    if longest > question.model.max_context:
        notes.append(f"{longest} tokens exceed the model's context of {question.model.max_context}")
    for pool in question.plan.pools:
        prefix = "" if pool.role == "mixed" else f"{pool.role}_"
        moe_tp, moe_ep = question.row.count(prefix + "moe_tp_size"), question.row.count(prefix + "moe_ep_size")
        if question.model.moe is not None and moe_tp * moe_ep not in (1, pool.world):
            notes.append(f"{prefix}moe_tp_size {moe_tp} times {prefix}moe_ep_size {moe_ep} are not the {pool.world} ranks of "
                         f"attention: taken as EP {pool.ep}")
    return notes


def room_of(costs: CostModel, notes: list[str]) -> float:
    """KV tokens that a rank holds; without a bound where the deployment ran though our memory model says it does not fit."""
    try:
        return float(costs.memory().kv_tokens)
    except Infeasible as error:
        notes.append(str(error))
        return float("inf")


def means_of(question: Question) -> tuple[int, int]:
    """Mean prompt and output tokens."""
    return _mean(question.workload.isl), _mean(question.workload.osl)


def _mean(lengths: Lengths | None) -> int:
    assert lengths is not None
    if lengths.kind == "fixed":
        return round(lengths.mean or 1)
    return round(((lengths.low or 1) + (lengths.high or 1)) / 2)


def _draw(lengths: Lengths | None, stream: np.random.Generator, count: int) -> list[int]:
    assert lengths is not None
    if lengths.kind == "fixed":
        return [round(lengths.mean or 1)] * count
    assert lengths.low is not None and lengths.high is not None
    return [int(x) for x in stream.integers(lengths.low, lengths.high + 1, count)]


def _answer(question: Question, loop: Loop, costs: CostModel, notes: list[str], deployments: Deployments) -> Answer:
    isl, osl = means_of(question)
    pool, plan = costs.pool, question.plan
    seqs = max(1.0, question.concurrency / (pool.dp * pool.instances))
    step = costs.step(StepBatch.decode([seqs], [seqs * (isl + osl / 2)]))
    width = math.hypot(math.log(step.high_s / step.total_s), _LEAST_WIDTH)
    keys = keys_of(plan.engine, question.cluster.groups[0].gpu, question.model, plan.precision, pool)
    tpot, ttft = (math.exp(width * times) for times in deployments.widths_of(keys, len(plan.pools) > 1))
    tpot_s = loop.tpot_s
    if question.row.count("osl") == 1:  # there is no second token to wait for
        tpot_s = step.total_s
        notes.append("one token comes out: TPOT is a decode step's")
    return Answer(loop.ttft_s, tpot_s, loop.ttft_s / ttft, loop.ttft_s * ttft, tpot_s / tpot, tpot_s * tpot,
                  step.parts_s, {key: str(source) for key, source in step.sources.items()}, tuple(notes), width,
                  deployments.near(keys))
