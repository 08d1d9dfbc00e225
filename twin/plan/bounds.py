"""What a plan could do at best, in closed form: prunes the search before anything is simulated.

The bound is a steady state without queueing, bursts or length variance. Per rank, `b` sequences decode together;
in a mixed pool each step also computes the prompt tokens that arrive meanwhile, b x ISL / OSL of them, so that one
step takes t(b) and a rank completes b / (OSL t) requests a second. A prefill pool completes a full batch of prompt
tokens a step. Waiting only makes it worse, so no simulated plan may beat its bound by more than sampling noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from twin.cost.batch import StepBatch
from twin.cost.choose import Costs, pool_costs
from twin.cost.model import LIMITS, CostModel
from twin.policy.arrivals import sample_requests
from twin.spec.errors import Infeasible
from twin.spec.plan import Plan, PoolPlan
from twin.spec.results import Memory
from twin.spec.scenario import Scenario

T = TypeVar("T")
Array = npt.NDArray[np.float64]
_NO_LIMITS = {name: PoolPlan.model_fields[name].default for name in LIMITS}


@dataclass(frozen=True)
class Bound:
    """At best: `requests_per_s` for the whole plan within the objectives, limited by `constraint`."""

    requests_per_s: float
    tok_per_s_per_gpu: float
    tpot_s: float
    ttft_s: float
    constraint: str
    memory: dict[str, Memory] = field(default_factory=dict)


@dataclass(frozen=True)
class PoolBound:
    """What one instance of a pool could do at best: requests/s, TPOT and TTFT in seconds, and what limits it. Where memory or
    an objective cannot be met, the Infeasible that says so."""

    memory: Memory | Infeasible
    capacity: tuple[float, float, float, str] | Infeasible


@dataclass(frozen=True)
class PoolJob:
    """Pools to bound, as text so that any executor can carry it to any process: plans, and which pool of each."""

    scenario_json: str
    pools: tuple[tuple[str, int], ...]


def bound_pools(job: PoolJob) -> list[PoolBound]:
    """Bound a job's pools. Deterministic: the same job gives the same bounds in any process."""
    bounds = Bounds(Scenario.model_validate_json(job.scenario_json))
    plans = [(Plan.model_validate_json(text), place) for text, place in job.pools]
    return [bounds.pool(plan, plan.pools[place]) for plan, place in plans]


class Bounds:
    """Bounds of a scenario's plans, sharing cost models and per-pool results between plans."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.isl, self.osl = mean_lengths(scenario)
        self._models: dict[PoolPlan, Costs] = {}
        self._shapes: dict[PoolPlan, CostModel] = {}  # the last of each shape, whatever its limits: it has what others compiled
        self._pools: dict[PoolPlan, PoolBound] = {}

    def cost_model(self, plan: Plan, pool: PoolPlan) -> Costs:
        """One cost model for each different pool; how many instances there are does not change its steps."""
        key = alone(pool)
        if key not in self._models:
            shape = key.model_copy(update=_NO_LIMITS)
            like = self._shapes.get(shape)
            made = like.limited(plan, key) if like is not None else pool_costs(self.scenario, plan, key, seed=self.scenario.seed)
            self._models[key] = made
            if isinstance(made, CostModel):
                self._shapes[shape] = made
        return self._models[key]

    def pool(self, plan: Plan, pool: PoolPlan) -> PoolBound:
        """The bound of one instance of a pool: the same for all plans that have such a pool."""
        key = alone(pool)
        if key not in self._pools:
            self._pools[key] = self._pool(plan, key)
        return self._pools[key]

    def put(self, pool: PoolPlan, found: PoolBound) -> None:
        """Take a bound that was found elsewhere."""
        self._pools[alone(pool)] = found

    def of(self, plan: Plan) -> Bound:
        """The bound of a plan. Raises Infeasible when memory or an objective cannot be met even without load."""
        found = [self.pool(plan, pool) for pool in plan.pools]
        memory = {pool.role: _or_raise(one.memory) for pool, one in zip(plan.pools, found, strict=True)}
        rates, tpot_s, ttft_s, constraint = [], 0.0, 0.0, ""
        for pool, one in zip(plan.pools, found, strict=True):
            per_instance, tpot, ttft, why = _or_raise(one.capacity)
            rates.append(per_instance * pool.instances)
            tpot_s, ttft_s = max(tpot_s, tpot), max(ttft_s, ttft)
            if rates[-1] <= min(rates):
                constraint = f"{pool.role}: {why}"
        rate = min(rates)
        return Bound(rate, rate * self.osl / plan.gpus, tpot_s, ttft_s, constraint, memory)

    def in_flight(self, plan: Plan, requests_per_s: float) -> int:
        """Sequences that decode at any moment when the plan is in its steady state at this load.

        Little's law: the load of a rank times OSL times the seconds of a step with that many sequences; where no number of
        sequences carries the load, as many as fit.
        """
        total = 0
        for pool in plan.pools_of("decode", "mixed"):
            cost = self.cost_model(plan, pool)
            per_rank = requests_per_s / sum(p.instances * p.dp for p in plan.pools_of("decode", "mixed"))
            most = min(pool.max_num_seqs, int(cost.kv_blocks_per_rank * pool.block_tokens // (self.isl + self.osl)))
            sizes = _ladder(most)
            needed = per_rank * self.osl * self._mixed_steps_s(pool, cost, sizes) / cost.tokens_per_step
            seqs = next((size for size, least in zip(sizes, needed.tolist(), strict=True) if size >= least), most)
            total += seqs * pool.dp * pool.instances
        return total

    def at_start(self, plan: Plan) -> int:
        """Sequences that decode when a simulation of the whole scenario begins: an open loop's steady state, which a service
        that is empty would need many requests to reach (until then it looks as if they piled up); others begin empty."""
        arrivals = self.scenario.workload.arrivals
        open_loop = arrivals.kind in ("poisson", "deterministic")
        return self.in_flight(plan, arrivals.rate_per_s or 0.0) if open_loop else 0

    def _mixed_steps_s(self, pool: PoolPlan, cost: Costs, sizes: Sequence[int]) -> Array:
        """Steps that decode `sizes` sequences on every rank, in a mixed pool with the prompts that arrive meanwhile: [n]."""
        seqs = np.array(sizes, dtype=float)
        prompt_tokens = np.minimum(seqs * self.isl / self.osl, pool.max_batch_tokens) if pool.role == "mixed" else 0 * seqs
        context = self.isl + self.osl / 2
        return cost.steps_s(batch(pool, decode_seqs=seqs, context=context, prefill_tokens=prompt_tokens, prompt=self.isl))

    def _pool(self, plan: Plan, pool: PoolPlan) -> PoolBound:
        cost = self.cost_model(plan, pool)
        try:
            memory = cost.memory()
        except Infeasible as error:
            return PoolBound(error, error)
        try:
            capacity = self._prefill(pool, cost) if pool.role == "prefill" else self._decode(pool, cost)
        except Infeasible as error:
            return PoolBound(memory, error)
        return PoolBound(memory, capacity)

    def _prefill(self, pool: PoolPlan, cost: Costs) -> tuple[float, float, float, str]:
        alone_s = self._prompt_s(pool, cost)
        self._check_ttft(alone_s)
        tokens = float(min(pool.max_batch_tokens, max(cost.kv_blocks_per_rank * pool.block_tokens, 1)))
        step_s = cost.step_s(batch(pool, prefill_tokens=tokens, prompt=self.isl))
        return pool.dp * tokens / self.isl / step_s, 0.0, alone_s, f"{tokens:.0f} prompt tokens a step take {step_s * 1e3:.1f} ms"

    def _prompt_s(self, pool: PoolPlan, cost: Costs) -> float:
        """Seconds to prefill one mean prompt in chunks on an idle instance."""
        chunk = min(pool.chunk_tokens or pool.max_batch_tokens, pool.max_batch_tokens)
        past = np.arange(0.0, self.isl, chunk)
        tokens = np.minimum(chunk, self.isl - past)
        return float(cost.steps_s(batch(pool, prefill_tokens=tokens, prompt=self.isl, past=past, ranks=1)).sum())

    def _decode(self, pool: PoolPlan, cost: Costs) -> tuple[float, float, float, str]:
        slo, mixed = self.scenario.workload.slo, pool.role == "mixed"
        kv_tokens = cost.kv_blocks_per_rank * pool.block_tokens
        fits = int(kv_tokens // (self.isl + self.osl))
        if fits < 1:
            raise Infeasible(
                f"the KV cache of a rank holds {kv_tokens} tokens, a request needs {self.isl + self.osl:.0f}",
                constraint="kv_memory",
                needed=self.isl + self.osl,
                available=float(kv_tokens),
                unit="tokens",
            )
        most = min(pool.max_num_seqs, fits)
        ttft_s = self._prompt_s(pool, cost) if mixed else 0.0
        best = (0.0, 0.0, ttft_s, "")
        fastest_s = float("inf")
        sizes = [seqs for seqs in _ladder(most) if not mixed or seqs * self.isl / self.osl <= pool.max_batch_tokens]
        for seqs, step_s in zip(sizes, self._mixed_steps_s(pool, cost, sizes).tolist() if sizes else (), strict=True):
            tpot_s = step_s / cost.tokens_per_step
            fastest_s = min(fastest_s, tpot_s)
            if slo.tpot_s is not None and tpot_s > slo.tpot_s:
                break
            rate = pool.dp * seqs / (self.osl * tpot_s)
            if rate > best[0]:
                best = (rate, tpot_s, ttft_s, f"{seqs} sequences a rank, {step_s * 1e3:.1f} ms a step")
        if best[0] == 0.0:
            assert slo.tpot_s is not None
            raise Infeasible(
                f"one sequence a rank already takes {fastest_s * 1e3:.1f} ms a token, over the TPOT objective of "
                f"{slo.tpot_s * 1e3:.1f} ms",
                constraint="tpot_s",
                needed=fastest_s,
                available=slo.tpot_s,
                unit="s",
            )
        self._check_ttft(ttft_s)
        return best

    def _check_ttft(self, alone_s: float) -> None:
        limit = self.scenario.workload.slo.ttft_s
        if limit is not None and alone_s > limit:
            message = f"a mean prompt alone takes {alone_s:.3g} s to prefill, over the TTFT objective of {limit:.3g} s"
            raise Infeasible(message, constraint="ttft_s", needed=alone_s, available=limit, unit="s")


def alone(pool: PoolPlan) -> PoolPlan:
    """One instance of a pool, by which pools are told apart."""
    return pool.model_copy(update={"instances": 1})


def _or_raise(found: T | Infeasible) -> T:
    if isinstance(found, Infeasible):
        raise found.with_traceback(None)  # it may be raised for many plans: each would lengthen its traceback
    return found


def batch(
    pool: PoolPlan,
    *,
    decode_seqs: Array | float = 0.0,
    context: float = 0.0,
    prefill_tokens: Array | float = 0.0,
    prompt: float = 0.0,
    past: Array | None = None,
    ranks: int | None = None,
) -> StepBatch:
    """Equal work on `ranks` DP ranks (all of them by default), none on the others: one step [d], or [n, d] of arrays [n]."""
    busy = np.zeros(pool.dp)
    busy[: pool.dp if ranks is None else ranks] = 1.0
    seqs, tokens = np.asarray(decode_seqs, dtype=float), np.asarray(prefill_tokens, dtype=float)
    behind = prompt / 2 if past is None else past + tokens / 2
    chunks = np.ceil(tokens / prompt) if prompt else np.zeros_like(tokens)
    parts = np.broadcast_arrays(seqs, seqs * context, tokens, tokens * behind, chunks)
    return StepBatch(*(part[..., None] * busy for part in parts))


def mean_lengths(scenario: Scenario) -> tuple[float, float]:
    """Mean ISL and OSL in tokens, as sampled: clipping and traces included."""
    sample = sample_requests(scenario.workload, scenario.seed, max_requests=20_000)
    return float(sample.isl.mean()), float(sample.osl.mean())


def _ladder(most: int) -> list[int]:
    """Batch sizes to try, about 12% apart, always with the largest."""
    sizes, size = [], 1.0
    while size < most:
        sizes.append(int(size))
        size = max(size + 1, size * 1.12)
    return sorted({*sizes, most})
