"""Plan: which pools of which instances serve the model, and the switches they run with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, Field, model_validator

from twin.spec.base import Dtype, Spec

Role = Literal["prefill", "decode", "mixed"]
CommBackend = Literal["auto", "symm", "nccl", "ag_rs", "gloo", "deepep_normal", "deepep_low_latency"]
RouterKind = Literal["round_robin", "least_loaded", "power_of_two", "predicted_ttft", "prefix_affinity"]
Degree = Annotated[int, Field(ge=1, le=65_536)]


class Precision(Spec):
    """Formats of the dense weights, the routed experts, the KV cache and the dispatched activations."""

    weights: Dtype = "bf16"
    experts: Dtype = "bf16"
    kv: Literal["bf16", "fp8", "fp32"] = "bf16"
    dispatch: Literal["bf16", "fp8", "fp32"] = "bf16"


class Eplb(Spec):
    """Online rebalancing of experts over the EP ranks of an instance. Every `period_steps` steps the loads of the last
    `window_steps` decide whether a better placement is worth its migration, which then moves at most `budget_bytes` of
    expert weights a step, over all ranks together, while the instance serves."""

    window_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    period_steps: Annotated[int, Field(ge=1, le=10_000_000)] = 1024
    budget_bytes: Annotated[int, Field(ge=1, le=1 << 50)] = 64 << 20

    @model_validator(mode="after")
    def _consistent(self) -> Eplb:
        if self.window_steps > self.period_steps:
            raise ValueError(f"window_steps ({self.window_steps}) must not exceed period_steps ({self.period_steps})")
        return self


class PoolPlan(Spec):
    """Equal instances of one role. Per instance: world = dp x tp GPUs; the routed experts are spread over `ep` ranks,
    and each expert is cut over world / ep ranks (expert TP) when ep is smaller than the world.

    Limits are per DP rank: at most `max_num_seqs` running sequences and `max_batch_tokens` tokens a step; prompts are
    computed in chunks of at most `chunk_tokens` (None: whole prompts).
    """

    role: Role
    instances: Annotated[int, Field(ge=1, le=10_000)] = 1
    dp: Degree = Field(default=1, validation_alias=AliasChoices("dp", "data_parallel_size", "data-parallel-size", "DP_SIZE"))
    tp: Degree = Field(default=1, validation_alias=AliasChoices("tp", "tensor_parallel_size", "tensor-parallel-size", "TP_SIZE"))
    ep: Degree = Field(default=1, validation_alias=AliasChoices("ep", "expert_parallel_size", "expert-parallel-size", "EP_SIZE"))
    node_group: str | None = None
    max_num_seqs: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    max_batch_tokens: Annotated[int, Field(ge=1, le=10_000_000)] = 8192
    chunk_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = 2048
    block_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    kv_blocks: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9
    redundant_experts: Annotated[int, Field(ge=0, le=65_536)] = 0
    placement: Literal["linear", "eplb_global", "eplb_hierarchical"] = "linear"
    eplb: Eplb | None = None
    tbo: bool = False
    tbo_min_tokens: Annotated[int, Field(ge=0, le=1_000_000)] = 64
    mtp_draft_tokens: Annotated[int, Field(ge=0, le=16)] = 0
    mtp_acceptance: Annotated[float, Field(ge=0, le=1)] = 0.8
    comm: CommBackend = "auto"
    prefix_cache: bool = False
    cuda_graphs: bool = True

    @property
    def max_step_tokens(self) -> int:
        """Tokens of one rank's step: every running sequence may decode, however few tokens a batch may have."""
        return max(self.max_batch_tokens, self.max_num_seqs)

    @property
    def world(self) -> int:
        """GPUs of one instance."""
        return self.dp * self.tp

    @property
    def gpus(self) -> int:
        return self.instances * self.world

    @property
    def expert_tp(self) -> int:
        """Ranks that share one expert's matrices."""
        return self.world // self.ep

    @model_validator(mode="after")
    def _consistent(self) -> PoolPlan:
        if self.world % self.ep:
            legal = [d for d in range(1, self.world + 1) if self.world % d == 0]
            raise ValueError(
                f"ep ({self.ep}) does not divide the world dp x tp = {self.dp} x {self.tp} = {self.world}; "
                f"legal: {', '.join(map(str, legal))}"
            )
        return self


class Plan(Spec):
    """How a model is served: one mixed pool, or prefill and decode pools (PD separation)."""

    name: Annotated[str, Field(min_length=1, max_length=200)] = "plan"
    pools: Annotated[tuple[PoolPlan, ...], Field(min_length=1, max_length=16)]
    precision: Precision = Precision()
    router: RouterKind = "least_loaded"
    engine: Literal["eptwin", "vllm", "sglang", "trtllm"] = "eptwin"
    engine_version: str | None = None
    max_outstanding: Annotated[int, Field(ge=1, le=10_000_000)] | None = None

    @property
    def gpus(self) -> int:
        return sum(pool.gpus for pool in self.pools)

    @property
    def separated(self) -> bool:
        """True when prefill and decode run in different pools."""
        return any(pool.role == "prefill" for pool in self.pools)

    def pools_of(self, *roles: Role) -> tuple[PoolPlan, ...]:
        return tuple(pool for pool in self.pools if pool.role in roles)

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        roles = {pool.role for pool in self.pools}
        if roles not in ({"mixed"}, {"prefill", "decode"}):
            raise ValueError(f"pools must be all mixed, or prefill and decode together; got {sorted(roles)}")
        return self
