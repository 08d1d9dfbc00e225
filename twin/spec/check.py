"""Does a plan fit its model and cluster? All that is wrong, at once, before anything is simulated or started."""

from __future__ import annotations

from twin.spec.cluster import ClusterSpec
from twin.spec.errors import Problem, SpecError
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan


def plan_problems(plan: Plan, model: ModelSpec, cluster: ClusterSpec) -> list[Problem]:
    """Everything that makes `plan` impossible for `model` on `cluster`, memory apart (the cost model answers that)."""
    problems: list[Problem] = []
    used: dict[str, int] = {}
    for index, pool in enumerate(plan.pools):
        problems += _pool_problems(pool, model, f"pools.{index}")
        try:
            group = cluster.group(pool.node_group)
        except KeyError:
            names = ", ".join(g.name for g in cluster.groups)
            problems.append(
                Problem(
                    f"the cluster has no node group {pool.node_group!r}",
                    field=f"pools.{index}.node_group",
                    expected=f"one of {names}",
                )
            )
            continue
        used[group.name] = used.get(group.name, 0) + pool.gpus
    for name, gpus in used.items():
        available = cluster.group(name).gpus
        if gpus > available:
            problems.append(
                Problem(
                    f"the pools need {gpus} GPUs of group {name!r}, {gpus - available} more than its {available}", field="pools"
                )
            )
    return problems


def check_plan(plan: Plan, model: ModelSpec, cluster: ClusterSpec, *, file: str | None = None) -> None:
    """Raise SpecError with every problem of `plan_problems`."""
    problems = plan_problems(plan, model, cluster)
    if problems:
        raise SpecError(problems, file=file)


def _pool_problems(pool: PoolPlan, model: ModelSpec, at: str) -> list[Problem]:
    problems = []
    heads = model.attention.heads
    if heads % pool.tp:
        legal = [t for t in range(1, heads + 1) if heads % t == 0]
        problems.append(
            Problem(
                f"tp ({pool.tp}) does not divide the {heads} attention heads",
                field=f"{at}.tp",
                expected="one of " + ", ".join(map(str, legal[:12])),
            )
        )
    kv_heads = model.attention.kv_heads
    if model.attention.kind == "gqa" and pool.tp > 1 and kv_heads % pool.tp and pool.tp % kv_heads:
        problems.append(Problem(f"tp ({pool.tp}) and the {kv_heads} KV heads do not divide one another", field=f"{at}.tp"))
    if model.moe is None:
        if pool.ep > 1:
            problems.append(Problem(f"ep ({pool.ep}) needs experts, and this model is dense", field=f"{at}.ep", expected="1"))
        if pool.redundant_experts:
            problems.append(Problem("redundant experts need experts, and this model is dense", field=f"{at}.redundant_experts"))
        return problems
    slots = model.moe.experts + pool.redundant_experts
    if slots % pool.ep:
        short = -slots % pool.ep
        problems.append(
            Problem(
                f"{model.moe.experts} experts + {pool.redundant_experts} redundant = {slots} slots "
                f"do not divide over ep = {pool.ep} ranks",
                field=f"{at}.redundant_experts",
                hint=f"redundant_experts = {pool.redundant_experts + short} would",
            )
        )
    if pool.redundant_experts > model.moe.experts * (pool.ep - 1):
        problems.append(
            Problem(
                f"{pool.redundant_experts} redundant experts are more copies than {pool.ep} ranks can tell apart",
                field=f"{at}.redundant_experts",
                expected=f"at most {model.moe.experts * (pool.ep - 1)}",
            )
        )
    if model.moe.intermediate % pool.expert_tp:
        problems.append(
            Problem(
                f"experts of {model.moe.intermediate} columns do not divide over world / ep = {pool.expert_tp} ranks",
                field=f"{at}.ep",
            )
        )
    return problems
