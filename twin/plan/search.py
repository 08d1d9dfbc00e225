"""Search: enumerate, prune by bounds, simulate the survivors under the offered load, find what each could carry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

from twin.plan.bounds import Bound, Bounds, PoolBound, PoolJob, alone, bound_pools
from twin.plan.evaluate import Evaluation, Job, load_unit, offered_load, run
from twin.plan.explain import explain
from twin.plan.pareto import front
from twin.plan.space import enumerate_plans
from twin.spec.errors import Infeasible
from twin.spec.plan import Plan, PoolPlan
from twin.spec.provenance import provenance
from twin.spec.results import Candidate, SearchResult
from twin.spec.scenario import Scenario

Progress = Callable[[str, int, int], None]
CAPACITY_ROUNDS = 3
MAX_REQUESTS = 4000
WAVE = 8
"""Simulations per wave. Fixed, so that the answer does not depend on how many processes work on it."""
POOLS = 16
"""Pools to bound at a time: enough that reading the scenario costs little beside, few enough that all processes end together."""


@dataclass
class Entry:
    """A plan on its way through the search."""

    plan: Plan
    bound: Bound
    offered: Evaluation | None = None
    points: list[Evaluation] = field(default_factory=list)

    @property
    def capacity(self) -> Evaluation | None:
        """The highest simulated load that met the objectives."""
        good = [point for point in self.points if point.ok]
        return max(good, key=lambda point: point.load) if good else None


def search(
    scenario: Scenario,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
    min_requests: int = 400,
    command: str = "",
) -> SearchResult:
    """Find the plan that carries the most load per GPU within the objectives.

    Each simulation has at least `min_requests` requests, and as many as arrive in twice the time that one takes.
    Deterministic whatever `executor` runs the simulations (None: this process). Raises Infeasible, with the constraint
    that binds, when no plan serves the offered load.
    """
    say = progress or (lambda *_: None)
    bounds = Bounds(scenario)
    pruned: Counter[str] = Counter()
    failures: list[Infeasible] = []
    plans = list(enumerate_plans(scenario))
    if executor is not None:
        _bound_pools(scenario, plans, bounds, executor, say)
    entries, considered = _bounded(plans, bounds, pruned, failures, say)
    if not entries:
        raise _nothing_fits(scenario, pruned, failures)
    chosen = _shortlist(entries, scenario.search.simulate_top)
    pruned["bound"] += len(entries) - len(chosen)
    trials = Trials(scenario, bounds, executor, min_requests, say)
    trials.simulate([(entry, trials.offered) for entry in chosen], "simulate")
    for entry in chosen:
        entry.offered = entry.points[0]
    if scenario.workload.arrivals.kind != "burst":
        trials.find_capacity(chosen)
    ranked = sorted(chosen, key=_merit)
    best = ranked[0]
    if best.offered is None or not best.offered.ok:
        raise _offered_too_much(scenario, ranked)
    candidates = _candidates(ranked, trials.offered)
    return SearchResult(
        name=scenario.name, model=scenario.model.name, cluster=scenario.cluster.name, considered=considered,
        pruned=dict(sorted(pruned.items())), candidates=candidates, best=candidates[0],
        explanation=tuple(explain(scenario, ranked, candidates, bounds, load_unit(scenario.workload))),
        provenance=provenance(scenario, seed=scenario.seed, command=command),
        assumptions=(f"capacity is searched with simulations of at least {min_requests} requests on common random numbers; "
                     "open loops begin in their steady state",),
    )  # fmt: skip


def _bound_pools(scenario: Scenario, plans: Sequence[Plan | str], bounds: Bounds, executor: Executor, say: Progress) -> None:
    """Bound every different pool, many at once; each in the first plan that has it, as it would be one by one."""
    places: dict[PoolPlan, tuple[Plan, int]] = {}
    for plan in plans:
        for place, pool in enumerate(() if isinstance(plan, str) else plan.pools):
            places.setdefault(alone(pool), (plan, place))
    text = scenario.model_copy(update={"plan": None}).model_dump_json()
    work = [(plan.model_dump_json(), place) for plan, place in places.values()]
    jobs = [PoolJob(text, tuple(work[start : start + POOLS])) for start in range(0, len(work), POOLS)]
    found: list[PoolBound] = []
    for some in executor.map(bound_pools, jobs):
        found += some
        say("bound", len(found), len(work))
    for pool, bound in zip(places, found, strict=True):
        bounds.put(pool, bound)


def _bounded(
    plans: Sequence[Plan | str], bounds: Bounds, pruned: Counter[str], failures: list[Infeasible], say: Progress
) -> tuple[list[Entry], int]:
    """Every legal plan with its bound; the rest are counted by why they fell."""
    entries: list[Entry] = []
    for considered, plan in enumerate(plans):
        if considered % 200 == 199:
            say("bound", considered + 1, 0)
        if isinstance(plan, str):
            pruned["illegal"] += 1
            continue
        try:
            entries.append(Entry(plan, bounds.of(plan)))
        except Infeasible as error:
            pruned[error.constraint] += 1
            failures.append(error)
    say("bound", len(plans), len(plans))
    return entries, len(plans)


def _shortlist(entries: list[Entry], count: int) -> list[Entry]:
    """The best bounds: a quarter each for the best shapes of mixed and of separated plans, and at most a few alike in shape.

    Of plans whose shape and bound are the same the limits do not bind: one stands for all.
    """
    ordered = sorted(
        entries, key=lambda e: (-e.bound.tok_per_s_per_gpu, e.plan.gpus, e.plan.pools[0].chunk_tokens or 0, e.plan.name)
    )
    distinct: dict[tuple[object, ...], Entry] = {}
    for entry in ordered:
        chunks = entry.plan.pools[0].chunk_tokens if not entry.plan.separated else None
        distinct.setdefault(
            (_shape_of(entry.plan), chunks, f"{entry.bound.tok_per_s_per_gpu:.3g}", entry.bound.constraint), entry
        )
    ordered = list(distinct.values())
    chosen: list[Entry] = []
    for separated in (False, True):
        best_of_shape: dict[tuple[object, ...], Entry] = {}
        for entry in ordered:
            if entry.plan.separated is separated:
                best_of_shape.setdefault(_shape_of(entry.plan), entry)
        chosen += list(best_of_shape.values())[: max(1, count // 4)]
    per_shape: Counter[tuple[object, ...]] = Counter(_shape_of(entry.plan) for entry in chosen)
    for entry in ordered:
        if len(chosen) >= count:
            break
        if entry not in chosen and per_shape[_shape_of(entry.plan)] < max(1, count // 6):
            per_shape[_shape_of(entry.plan)] += 1
            chosen.append(entry)
    return chosen[:count]


def _shape_of(plan: Plan) -> tuple[object, ...]:
    return tuple((pool.role, pool.instances, pool.tp, pool.dp, pool.ep) for pool in plan.pools)


class Trials:
    """Simulations of entries under loads, on one scenario."""

    def __init__(self, scenario: Scenario, bounds: Bounds, executor: Executor | None, min_requests: int, say: Progress) -> None:
        self.scenario, self.bounds, self.executor, self.min_requests, self.say = scenario, bounds, executor, min_requests, say
        self.kind = scenario.workload.arrivals.kind
        self.offered = offered_load(scenario.workload)
        self._text = scenario.model_copy(update={"plan": None}).model_dump_json()

    def simulate(self, work: Sequence[tuple[Entry, float]], stage: str, *, only_if_ok: bool = False) -> None:
        """Run simulations in waves and add each evaluation to its entry, in order. `only_if_ok`: end those that have missed the
        objectives, without metrics."""
        done = 0
        for start in range(0, len(work), WAVE):
            wave = work[start : start + WAVE]
            jobs = [replace(self._job(entry, load), only_if_ok=only_if_ok) for entry, load in wave]
            results: Iterable[Evaluation] = map(run, jobs) if self.executor is None else self.executor.map(run, jobs)
            for (entry, _), evaluation in zip(wave, results, strict=True):
                entry.points.append(evaluation)
                done += 1
                self.say(stage, done, len(work))

    def _job(self, entry: Entry, load: float) -> Job:
        """Enough requests that those counted live under the full load: as many as arrive in twice the life of one."""
        in_flight, requests = 0, self.min_requests
        if self.kind in ("poisson", "deterministic"):
            in_flight = self.bounds.in_flight(entry.plan, load)
            requests = max(requests, min(2 * in_flight, MAX_REQUESTS))
        elif self.kind == "closed_loop":
            requests = max(requests, min(4 * int(load), MAX_REQUESTS))
        return Job(self._text, entry.plan.model_dump_json(), load, requests, in_flight)

    def find_capacity(self, entries: list[Entry]) -> None:
        """Narrow each plan's capacity: the highest load within the objectives, between what worked and what did not.

        The bound caps the first try; a plan that fails the offered load is tried below it. Halving the gap each round
        leaves at most 1/2**rounds of it unknown. Of a load that is too much only that is used, so its simulation ends as soon
        as no outcome of the other requests could meet the objectives.
        """
        low = {id(e): (self.offered if e.points[0].ok else 0.0) for e in entries}
        high = {id(e): (self._bound_load(e) if e.points[0].ok else self.offered) for e in entries}
        for turn in range(CAPACITY_ROUNDS):
            work = [(e, load) for e in entries if (load := self._between(low[id(e)], high[id(e)])) > low[id(e)] * 1.02]
            self.simulate(work, f"capacity {turn + 1}/{CAPACITY_ROUNDS}", only_if_ok=True)
            for entry, load in work:
                (low if entry.points[-1].ok else high)[id(entry)] = load

    def _between(self, low: float, high: float) -> float:
        middle = (low + high) / 2
        return float(round(middle)) if self.kind == "closed_loop" else middle

    def _bound_load(self, entry: Entry) -> float:
        """The load at which the bound says the plan is full, in the workload's own unit."""
        if self.kind == "closed_loop":
            return max(self.offered, 2 * self.bounds.in_flight(entry.plan, entry.bound.requests_per_s))
        if self.kind in ("poisson", "deterministic"):
            return max(self.offered, entry.bound.requests_per_s)
        measured = entry.points[0].metrics.get("requests_per_s", 0.0)
        return self.offered * max(1.0, entry.bound.requests_per_s / measured) if measured else self.offered


def _merit(entry: Entry) -> tuple[object, ...]:
    """Sort key: serves the offered load; then capacity per GPU; then cheaper, smaller, by name."""
    capacity = entry.capacity
    assert entry.offered is not None
    per_gpu = capacity.metrics["tok_per_s_per_gpu"] if capacity else 0.0
    return (
        not entry.offered.ok,
        -round(per_gpu, 9),
        entry.plan.gpus,
        entry.offered.metrics.get("ttft_s_p99", 0.0),
        entry.plan.name,
    )


def _candidates(ranked: list[Entry], offered: float) -> tuple[Candidate, ...]:
    points = [(e.capacity.metrics if e.capacity else {}) for e in ranked]
    able = [
        i for i, (entry, point) in enumerate(zip(ranked, points, strict=True)) if point and entry.offered and entry.offered.ok
    ]
    kept = front([(points[i]["tok_per_s_per_user"], points[i]["tok_per_s_per_gpu"]) for i in able])
    on_front = {able[i] for i in kept}
    candidates = []
    for rank, (entry, point) in enumerate(zip(ranked, points, strict=True)):
        assert entry.offered is not None
        metrics = dict(entry.offered.metrics)
        metrics |= {"offered_load": offered, "bound_requests_per_s": entry.bound.requests_per_s}
        if entry.capacity is not None:
            metrics |= {f"capacity_{k}": v for k, v in point.items()} | {"capacity_load": entry.capacity.load}
        candidates.append(
            Candidate(plan=entry.plan, stage="simulated", reason=entry.offered.reason, feasible=entry.offered.ok,
                      bound_tok_per_s_per_gpu=entry.bound.tok_per_s_per_gpu, metrics=dict(sorted(metrics.items())),
                      pareto=rank in on_front, rank=rank + 1)
        )  # fmt: skip
    return tuple(candidates)


def _nothing_fits(scenario: Scenario, pruned: Counter[str], failures: list[Infeasible]) -> Infeasible:
    """No plan passed the bounds: say which constraint stopped the plan that came closest."""
    if not failures:
        return Infeasible(f"no legal plan for {scenario.cluster.gpus} GPUs among the sizes searched", constraint="search space")
    closest = min(failures, key=lambda f: (f.needed or 0) / f.available if f.available else float("inf"))
    counts = ", ".join(f"{n} by {why}" for why, n in sorted(pruned.items()))
    return Infeasible(
        f"no plan fits: {closest} ({counts})",
        constraint=closest.constraint,
        needed=closest.needed,
        available=closest.available,
        unit=closest.unit,
    )


def _offered_too_much(scenario: Scenario, ranked: list[Entry]) -> Infeasible:
    offered, unit = offered_load(scenario.workload), load_unit(scenario.workload)
    carried = [e for e in ranked if e.capacity is not None]
    best = max(carried, key=lambda e: e.capacity.load if e.capacity else 0.0) if carried else ranked[0]
    able = best.capacity.load if best.capacity else 0.0
    why = best.offered.reason if best.offered else ""
    return Infeasible(
        f"no plan serves {offered:g} {unit} within the objectives; the closest, {best.plan.name}, carries {able:.4g} {unit} "
        f"and at {offered:g}: {why} (its limit: {best.bound.constraint})",
        constraint="load",
        needed=offered,
        available=able,
        unit=unit,
    )


def fewest_gpus(
    scenario: Scenario,
    *,
    node_counts: Sequence[int],
    executor: Executor | None = None,
    progress: Progress | None = None,
    min_requests: int = 400,
) -> tuple[int, SearchResult]:
    """The smallest number of nodes (of the first group) that serves the offered load, and its search.

    Raises the largest cluster's Infeasible when none does. More nodes never serve less, so the counts are bisected.
    """
    counts = sorted(set(node_counts))
    answers: dict[int, SearchResult | Infeasible] = {}

    def ask(nodes: int) -> SearchResult | Infeasible:
        if nodes not in answers:
            group = scenario.cluster.groups[0].model_copy(update={"nodes": nodes})
            cluster = scenario.cluster.model_copy(update={"groups": (group, *scenario.cluster.groups[1:])})
            try:
                answers[nodes] = search(
                    scenario.model_copy(update={"cluster": cluster}),
                    executor=executor,
                    progress=progress,
                    min_requests=min_requests,
                )
            except Infeasible as error:
                answers[nodes] = error
        return answers[nodes]

    low, high = 0, len(counts) - 1
    last = ask(counts[high])
    if isinstance(last, Infeasible):
        raise last
    while low < high:
        middle = (low + high) // 2
        if isinstance(ask(counts[middle]), Infeasible):
            low = middle + 1
        else:
            high = middle
    found = ask(counts[high])
    assert isinstance(found, SearchResult)
    return counts[high], found
