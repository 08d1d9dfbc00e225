"""Why this plan and not that one, in sentences with numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from twin.plan.bounds import Bounds, batch
from twin.spec.plan import Plan
from twin.spec.results import Candidate
from twin.spec.scenario import Scenario
from twin.spec.units import format_bytes, format_s

if TYPE_CHECKING:
    from twin.plan.search import Entry


def explain(
    scenario: Scenario, ranked: Sequence[Entry], candidates: Sequence[Candidate], bounds: Bounds, unit: str
) -> Iterator[str]:
    """Sentences for the winner and for the best plan of another shape or mode."""
    best, top = ranked[0], candidates[0]
    yield (
        f"{best.plan.name} wins: it carries {top.metrics.get('capacity_load', 0):.4g} {unit} within the objectives, "
        f"{top.metrics.get('capacity_tok_per_s_per_gpu', 0):.4g} output tok/s per GPU. Its limit is {best.bound.constraint}."
    )
    shape = _shape(best.plan)
    for entry, candidate in zip(ranked[1:], candidates[1:], strict=True):
        if _shape(entry.plan) != shape:
            yield from _against(scenario, best, top, entry, candidate, bounds, "The runner-up of another shape")
            break
    other = next(((e, c) for e, c in zip(ranked, candidates, strict=True) if e.plan.separated is not best.plan.separated), None)
    if other is not None:
        kind = "PD separation" if other[0].plan.separated else "one mixed pool"
        yield from _against(scenario, best, top, *other, bounds, f"The best with {kind}")
    yield from _memory(best)


def _shape(plan: Plan) -> tuple[object, ...]:
    return tuple((p.role, p.instances, p.tp, p.dp, p.ep) for p in plan.pools)


def _against(
    scenario: Scenario, best: Entry, top: Candidate, entry: Entry, candidate: Candidate, bounds: Bounds, who: str
) -> Iterator[str]:
    mine, theirs = top.metrics.get("capacity_tok_per_s_per_gpu", 0.0), candidate.metrics.get("capacity_tok_per_s_per_gpu", 0.0)
    lost = f"{theirs / mine - 1:+.1%}" if mine and theirs else "nothing within the objectives"
    text = f"{who}, {entry.plan.name}, carries {lost} per GPU; its limit is {entry.bound.constraint}."
    if candidate.reason:
        text += f" Under the offered load: {candidate.reason}."
    yield text
    yield from _step_difference(scenario, best, entry, bounds)


def _step_difference(scenario: Scenario, best: Entry, entry: Entry, bounds: Bounds) -> Iterator[str]:
    """Where the seconds of a decode step go, compared at equal sequences per GPU."""
    steps = []
    for one in (best, entry):
        pool = one.plan.pools_of("decode", "mixed")[0]
        per_gpu = min(p.max_num_seqs * p.dp / p.world for e in (best, entry) for p in e.plan.pools_of("decode", "mixed"))
        seqs = max(1.0, per_gpu * pool.world / pool.dp)
        steps.append(bounds.cost_model(one.plan, pool).step(batch(pool, decode_seqs=seqs, context=bounds.isl + bounds.osl / 2)))
    keys = sorted(set(steps[0].parts_s) | set(steps[1].parts_s))
    differences = np.array([steps[1].parts_s.get(k, 0.0) - steps[0].parts_s.get(k, 0.0) for k in keys])
    worst = np.argsort(-np.abs(differences))[:3]
    parts = ", ".join(f"{keys[i]} {differences[i] * 1e3:+.2f} ms" for i in worst if abs(differences[i]) > 1e-6)
    if parts:
        yield (
            f"At equal sequences per GPU its decode step takes {format_s(steps[1].total_s)} "
            f"against {format_s(steps[0].total_s)}: {parts}."
        )


def _memory(best: Entry) -> Iterator[str]:
    for role, memory in best.bound.memory.items():
        yield (
            f"Memory of a {role} rank: {format_bytes(memory.expert_weight_bytes + memory.dense_weight_bytes)} weights, "
            f"{format_bytes(memory.kv_pool_bytes)} KV for {memory.kv_tokens} tokens, {format_bytes(memory.free_bytes)} left free."
        )
