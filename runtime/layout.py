"""Who does what: from a plan and a global rank to that rank's share of the model.

Global ranks go pool by pool, instance by instance; within an instance `dp_rank * tp + tp_rank`. Experts are spread over
`ep` ranks, each of which is `world / ep` neighbouring ranks that cut every expert's width between them (expert TP).
"""

from __future__ import annotations

from dataclasses import dataclass

from twin.spec.errors import Problem, SpecError
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan, Role

BUILDABLE = ("deepseek_v2", "deepseek_v3", "kimi_k2", "qwen3_moe", "mixtral", "gpt_oss", "glm4_moe", "llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class RankLayout:
    """One rank's place. `first_rank` is the global rank of its instance's first; `slots` are counted per MoE layer."""

    rank: int
    pool: int
    role: Role
    instance: int
    first_rank: int
    dp: int
    tp: int
    ep: int
    dp_rank: int
    tp_rank: int
    slots: int = 0

    @property
    def world(self) -> int:
        return self.dp * self.tp

    @property
    def local_rank(self) -> int:
        """Rank within the instance."""
        return self.rank - self.first_rank

    @property
    def expert_tp(self) -> int:
        return self.world // self.ep

    @property
    def ep_rank(self) -> int:
        return self.local_rank // self.expert_tp

    @property
    def expert_tp_rank(self) -> int:
        return self.local_rank % self.expert_tp

    @property
    def slots_per_rank(self) -> int:
        return self.slots // self.ep

    @property
    def local_slots(self) -> range:
        """This rank's physical expert slots, the same in every layer."""
        return range(self.ep_rank * self.slots_per_rank, (self.ep_rank + 1) * self.slots_per_rank)

    @property
    def is_leader(self) -> bool:
        """The first TP rank of a DP rank schedules and samples for it."""
        return self.tp_rank == 0

    @property
    def instance_ranks(self) -> list[int]:
        return list(range(self.first_rank, self.first_rank + self.world))

    @property
    def tp_ranks(self) -> list[int]:
        start = self.first_rank + self.dp_rank * self.tp
        return list(range(start, start + self.tp))


def single(model: ModelSpec) -> RankLayout:
    """The layout of one process that holds the whole model."""
    return RankLayout(0, 0, "mixed", 0, 0, 1, 1, 1, 0, 0, model.moe.experts if model.moe else 0)


def layouts(plan: Plan, model: ModelSpec) -> list[RankLayout]:
    """Every rank's layout, in order of global rank. Raises SpecError when the model cannot be cut this way."""
    check(plan, model)
    ranks: list[RankLayout] = []
    for index, pool in enumerate(plan.pools):
        slots = model.moe.experts + pool.redundant_experts if model.moe else 0
        for instance in range(pool.instances):
            first = len(ranks)
            for local in range(pool.world):
                ranks.append(RankLayout(first + local, index, pool.role, instance, first, pool.dp, pool.tp, pool.ep,
                                        local // pool.tp, local % pool.tp, slots))
    return ranks


def check(plan: Plan, model: ModelSpec) -> None:
    """Raise SpecError naming every size that does not divide, with the sizes that would."""
    problems = _unsupported(model)
    for index, pool in enumerate(plan.pools):
        at = f"pools.{index}"
        problems += _cuts(pool, model, at)
    if problems:
        raise SpecError(problems)


def _unsupported(model: ModelSpec) -> list[Problem]:
    a = model.attention
    missing = [(model.model_type not in BUILDABLE, "model_type", f"{model.model_type} cannot be run yet", ", ".join(BUILDABLE)),
               ("linear" in model.layer_attention, "layer_attention", "linear attention cannot be run yet", ""),
               (a.output_gate, "attention.output_gate", "gated attention output cannot be run yet", ""),
               (a.index_top_k is not None, "attention.index_top_k", "sparse attention cannot be run yet", ""),
               (a.kind == "gqa" and a.head_dim != a.v_head_dim, "attention.v_head_dim", "must equal head_dim for gqa", "")]
    return [Problem(message, field=field, expected=expected) for bad, field, message, expected in missing if bad]


def _cuts(pool: PoolPlan, model: ModelSpec, at: str) -> list[Problem]:
    a, tp, problems = model.attention, pool.tp, []

    def divide(size: int, what: str, field: str, by: int) -> None:
        if size % by:
            legal = [d for d in range(1, min(size, 1024) + 1) if size % d == 0]
            problems.append(Problem(f"{by} does not divide {what} ({size})", field=f"{at}.{field}",
                                    expected=f"one of {', '.join(map(str, legal[:16]))}"))

    divide(a.heads, "attention heads", "tp", tp)
    if a.kind == "gqa" and a.kv_heads % tp and tp % a.kv_heads:
        problems.append(Problem(f"{tp} neither divides nor is a multiple of kv_heads ({a.kv_heads})", field=f"{at}.tp"))
    if "dense" in model.layer_ffn:
        divide(model.dense_intermediate, "the dense intermediate size", "tp", tp)
    if model.moe is None:
        if pool.ep > 1 or pool.redundant_experts:
            problems.append(Problem(f"{model.name} has no experts", field=f"{at}.ep", expected="1, without redundant experts"))
        return problems
    if model.moe.shared_intermediate:
        divide(model.moe.shared_intermediate, "the shared experts' intermediate size", "tp", tp)
    divide(model.moe.experts + pool.redundant_experts, "expert slots (experts + redundant_experts)", "ep", pool.ep)
    divide(model.moe.intermediate, "the experts' intermediate size over expert TP", "ep", pool.expert_tp)
    return problems
