"""The space of plans: every legal shape, split and limit that a scenario's search names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from twin.spec.check import plan_problems
from twin.spec.plan import Plan, PoolPlan, Role
from twin.spec.scenario import Scenario


@dataclass(frozen=True)
class Shape:
    """How one instance is cut: world = tp x dp GPUs, experts over ep ranks."""

    tp: int
    dp: int
    ep: int

    @property
    def world(self) -> int:
        return self.tp * self.dp


def enumerate_plans(scenario: Scenario) -> Iterator[Plan | str]:
    """Yield every candidate plan, or the reason why a combination is illegal (counted, not simulated).

    Separated plans take each pair of prefill and decode shapes with each split of the cluster's GPUs between them;
    with two node groups, prefill may use one and decode another.
    """
    search = scenario.search
    shapes: list[Shape] = []
    for tp, dp in product(search.tp, search.dp):
        for ep in expert_sizes(scenario, tp, dp):
            problems = _shape_problems(scenario, Shape(tp, dp, ep))
            if problems:
                yield problems
            else:
                shapes.append(Shape(tp, dp, ep))
    shapes = list(dict.fromkeys(shapes))
    for mode in search.modes:
        yield from (_mixed(scenario, shapes) if mode == "mixed" else _separated(scenario, shapes))


def expert_sizes(scenario: Scenario, tp: int, dp: int) -> tuple[int, ...]:
    """EP sizes to try for a world of tp x dp: the scenario's own, or the whole world and pure expert TP within `tp`."""
    world = tp * dp
    if scenario.model.moe is None:
        return (1,)
    if scenario.search.ep is not None:
        return tuple(ep for ep in scenario.search.ep if world % ep == 0)
    return (world,) if dp > 1 or world == 1 else (1, world)


def _shape_problems(scenario: Scenario, shape: Shape) -> str:
    """Why this shape is illegal on every node group, or ''."""
    biggest = max(scenario.cluster.groups, key=lambda g: g.gpus)
    if shape.world > biggest.gpus:
        return f"world {shape.world} exceeds the {biggest.gpus} GPUs"
    if shape.tp > biggest.gpus_per_node and scenario.cluster.network.nvlink_domain_gpus < shape.tp:
        return f"tp {shape.tp} spans nodes"
    pool = pool_plan(scenario, "mixed", shape, 1, {}, node_group=biggest.name)
    problems = plan_problems(Plan(pools=(pool,)), scenario.model, scenario.cluster)
    return problems[0].message if problems else ""


def _mixed(scenario: Scenario, shapes: list[Shape]) -> Iterator[Plan | str]:
    for group, shape in product(scenario.cluster.groups, shapes):
        instances, left = divmod(group.gpus, shape.world)
        if instances == 0 or (left and scenario.search.use_all_gpus):
            yield f"{group.gpus} GPUs are not a multiple of world {shape.world}"
            continue
        for limits in _limits(scenario, mixed=True):
            pool = pool_plan(scenario, "mixed", shape, instances, limits, node_group=_name(scenario, group.name))
            yield from _plans(scenario, (pool,))


def _separated(scenario: Scenario, shapes: list[Shape]) -> Iterator[Plan | str]:
    for prefill_group, decode_group in product(scenario.cluster.groups, repeat=2):
        names = _name(scenario, prefill_group.name), _name(scenario, decode_group.name)
        for prefill, decode in product(shapes, repeat=2):
            for n_prefill, n_decode in _splits(
                prefill,
                decode,
                prefill_group.gpus,
                decode_group.gpus,
                same=prefill_group is decode_group,
                all_gpus=scenario.search.use_all_gpus,
            ):
                for limits in _limits(scenario, mixed=False):
                    pools = (
                        pool_plan(scenario, "prefill", prefill, n_prefill, limits, node_group=names[0]),
                        pool_plan(scenario, "decode", decode, n_decode, limits, node_group=names[1]),
                    )  # fmt: skip
                    yield from _plans(scenario, pools)


def _splits(
    prefill: Shape, decode: Shape, prefill_gpus: int, decode_gpus: int, *, same: bool, all_gpus: bool
) -> Iterator[tuple[int, int]]:
    """Instance counts of both pools; within one group they share its GPUs."""
    if not same:
        counts = (prefill_gpus // prefill.world, decode_gpus // decode.world)
        if min(counts) > 0:
            yield counts
        return
    for n_prefill in range(1, (prefill_gpus - 1) // prefill.world + 1):
        n_decode, left = divmod(prefill_gpus - n_prefill * prefill.world, decode.world)
        if n_decode and not (left and all_gpus):
            yield n_prefill, n_decode


def _limits(scenario: Scenario, *, mixed: bool) -> Iterator[dict[str, Any]]:
    search = scenario.search
    # A prefill pool computes whole steps of prompts whatever their chunks; only in a mixed pool do chunks hold up decoding.
    chunks = search.chunk_tokens if mixed else (max(search.chunk_tokens),)
    names = ("max_num_seqs", "max_batch_tokens", "chunk_tokens", "redundant_experts", "mtp_draft_tokens", "tbo")
    for values in product(
        search.max_num_seqs, search.max_batch_tokens, chunks, search.redundant_experts, search.mtp_draft_tokens, search.tbo
    ):
        limits = dict(zip(names, values, strict=True))
        limits["chunk_tokens"] = min(limits["chunk_tokens"], limits["max_batch_tokens"])
        yield limits


def _plans(scenario: Scenario, pools: tuple[PoolPlan, ...]) -> Iterator[Plan | str]:
    for router in scenario.search.routers:
        plan = Plan(name=describe(pools), pools=pools, precision=scenario.search.precision, router=router, engine=scenario.engine)
        problems = plan_problems(plan, scenario.model, scenario.cluster)
        yield problems[0].message if problems else plan


def _name(scenario: Scenario, name: str) -> str | None:
    return name if len(scenario.cluster.groups) > 1 else None


def pool_plan(
    scenario: Scenario, role: Role, shape: Shape, instances: int, limits: dict[str, Any], *, node_group: str | None
) -> PoolPlan:
    """One pool. Redundant experts are rounded up to what divides over EP, and leave the placement to EPLB.

    A prefill pool holds a prompt only while it computes and sends it, so that it needs no long list of sequences.
    """
    fields: dict[str, Any] = {**scenario.search.pool_defaults, **limits}
    moe = scenario.model.moe
    redundant = int(fields.get("redundant_experts", 0))
    if moe is not None and shape.ep > 1:
        redundant += -(moe.experts + redundant) % shape.ep
        redundant = min(redundant, moe.experts * (shape.ep - 1))
    else:
        redundant = 0
    fields["redundant_experts"] = redundant
    if redundant:
        fields.setdefault("placement", "eplb_hierarchical")
    if role == "prefill":
        fields["mtp_draft_tokens"] = 0
    return PoolPlan(role=role, instances=instances, tp=shape.tp, dp=shape.dp, ep=shape.ep, node_group=node_group, **fields)


def describe(pools: tuple[PoolPlan, ...]) -> str:
    """A plan in one line: "2P tp8·ep8 + 1D dp16·ep16 | 128 seqs, 8192 tok"."""
    letters = {"mixed": "M", "prefill": "P", "decode": "D"}
    parts = []
    for pool in pools:
        cut = "·".join(f"{name}{size}" for name, size in (("dp", pool.dp), ("tp", pool.tp), ("ep", pool.ep)) if size > 1)
        parts.append(f"{pool.instances}{letters[pool.role]} {cut or 'single'}")
    last = pools[-1]
    extras = [f"{last.max_num_seqs} seqs", f"{pools[0].max_batch_tokens} tok"]
    if last.role == "mixed" and last.chunk_tokens:
        extras.append(f"chunk {last.chunk_tokens}")
    extras += [f"+{last.redundant_experts} experts"] if last.redundant_experts else []
    extras += [f"MTP{last.mtp_draft_tokens}"] if last.mtp_draft_tokens else []
    extras += ["TBO"] if last.tbo else []
    return " + ".join(parts) + " | " + ", ".join(extras)
