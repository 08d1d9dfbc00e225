"""Scenario: one question. Which model, on which cluster, under which traffic, and either a plan or a search for one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from twin.spec.base import Spec
from twin.spec.cluster import ClusterSpec
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan, Precision, RouterKind
from twin.spec.units import Seconds
from twin.spec.workload import WorkloadSpec

KvSend = Literal["engine", "prompt", "chunk", "layer"]
"""What of a prompt's KV leaves while the rest is computed; `engine`: as the plan's engine does it."""
Degrees = Annotated[tuple[Annotated[int, Field(ge=1, le=65_536)], ...], Field(min_length=1, max_length=64)]


class Routing(Spec):
    """How uneven experts are. uniform; zipf with `alpha`; lognormal with `sigma`; matrix from `file`: CSV, a row a
    layer, a column an expert, or JSON with such `loads`, or with `windows` of them that follow one another every `window_s`.

    `layer_correlation`: of the popularity of experts with the same number in two layers (zipf and lognormal; 0: each layer
    has an order of its own). `drift_half_life_s`: seconds in which half of the correlation with today's popularity is lost;
    which experts are popular changes then, how uneven they are does not. None: nothing changes.
    """

    kind: Literal["uniform", "zipf", "lognormal", "matrix"] = "uniform"
    alpha: Annotated[float, Field(ge=0, le=5)] = 0.0
    sigma: Annotated[float, Field(ge=0, le=5)] = 0.0
    file: str | None = None
    layer_correlation: Annotated[float, Field(ge=0, le=1)] = 0.0
    drift_half_life_s: Annotated[Seconds, Field(ge=1e-3)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Routing:
        if self.kind == "matrix" and not self.file:
            raise ValueError("matrix routing needs file")
        if self.kind == "uniform" and self.drift_half_life_s is not None:
            raise ValueError("uniform routing cannot drift: no expert is more popular than another")
        if self.kind in ("uniform", "matrix") and self.layer_correlation:
            raise ValueError("layer_correlation is for zipf and lognormal routing")
        return self


class Search(Spec):
    """The space of plans: products of these, cut to what is legal, fits and can meet the objectives."""

    modes: tuple[Literal["mixed", "separated"], ...] = ("mixed", "separated")
    tp: Degrees = (1, 2, 4, 8)
    dp: Degrees = (1, 2, 4, 8, 16, 32)
    ep: Degrees | None = None
    max_num_seqs: Degrees = (32, 64, 128, 256)
    max_batch_tokens: Degrees = (2048, 8192)
    chunk_tokens: Degrees = (2048,)
    redundant_experts: tuple[Annotated[int, Field(ge=0, le=65_536)], ...] = (0,)
    mtp_draft_tokens: tuple[Annotated[int, Field(ge=0, le=16)], ...] = (0,)
    tbo: tuple[bool, ...] = (False,)
    routers: tuple[RouterKind, ...] = ("least_loaded",)
    precision: Precision = Precision()
    pool_defaults: dict[str, int | float | bool | str] = {}
    simulate_top: Annotated[int, Field(ge=1, le=10_000)] = 24
    use_all_gpus: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Search:
        unknown = set(self.pool_defaults) - set(PoolPlan.model_fields)
        if unknown:
            raise ValueError(f"pool_defaults has unknown fields {sorted(unknown)}; known: {sorted(PoolPlan.model_fields)}")
        return self


class Scenario(Spec):
    """A question. With `plan`, `simulate` and `run` answer it; without, `plan` searches as `search` says."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    description: str = ""
    model: ModelSpec
    cluster: ClusterSpec
    workload: WorkloadSpec
    plan: Plan | None = None
    search: Search = Search()
    routing: Routing = Routing()
    engine: Literal["eptwin", "vllm", "sglang", "trtllm"] = "eptwin"
    kv_send: KvSend = "engine"
    profile: str | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
