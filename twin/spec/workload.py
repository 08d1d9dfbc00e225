"""WorkloadSpec: when requests come, how long they are, and what they are promised."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from twin.spec.base import Spec
from twin.spec.units import PerSecond, Seconds

Tokens = Annotated[int, Field(ge=1, le=10_000_000)]


class Lengths(Spec):
    """Distribution of a length in tokens, clipped to [min_tokens, max_tokens] and rounded.

    fixed: `mean`. uniform: [low, high]. lognormal: `mean` and coefficient of variation `cv`. empirical: drawn from
    `values`. geometric: `mean` (at least 1).
    """

    kind: Literal["fixed", "uniform", "lognormal", "geometric", "empirical"] = "fixed"
    mean: Annotated[float, Field(gt=0, le=1e7)] | None = None
    cv: Annotated[float, Field(ge=0, le=20)] | None = None
    low: Tokens | None = None
    high: Tokens | None = None
    values: tuple[Tokens, ...] = ()
    min_tokens: Tokens = 1
    max_tokens: Tokens = 10_000_000

    @model_validator(mode="after")
    def _consistent(self) -> Lengths:
        needs = {
            "fixed": ("mean",),
            "geometric": ("mean",),
            "lognormal": ("mean", "cv"),
            "uniform": ("low", "high"),
            "empirical": ("values",),
        }[self.kind]
        for field in needs:
            if getattr(self, field) in (None, ()):
                raise ValueError(f"{self.kind} lengths need {field}")
        if self.kind == "uniform" and self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low ({self.low}) exceeds high ({self.high})")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) exceeds max_tokens ({self.max_tokens})")
        return self


class Arrivals(Spec):
    """poisson: `rate_per_s`. deterministic: one every 1/rate. closed_loop: `concurrency` users, each sends the next
    request `think_s` after the last ended. burst: all at once. trace: times and lengths from `file`, sped up by
    `speedup`."""

    kind: Literal["poisson", "deterministic", "closed_loop", "burst", "trace"]
    rate_per_s: PerSecond | None = None
    concurrency: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    think_s: Seconds = 0.0
    file: str | None = None
    format: Literal["azure", "mooncake"] | None = None
    speedup: Annotated[float, Field(gt=0, le=1e6)] = 1.0

    @model_validator(mode="after")
    def _consistent(self) -> Arrivals:
        needs = {
            "poisson": ("rate_per_s",),
            "deterministic": ("rate_per_s",),
            "closed_loop": ("concurrency",),
            "burst": (),
            "trace": ("file", "format"),
        }[self.kind]
        for field in needs:
            if getattr(self, field) is None:
                raise ValueError(f"{self.kind} arrivals need {field}")
        return self


class Slo(Spec):
    """Objectives: the `percentile` of TTFT and TPOT (and E2E) must not exceed these. None: no objective."""

    ttft_s: Annotated[Seconds, Field(gt=0)] | None = None
    tpot_s: Annotated[Seconds, Field(gt=0)] | None = None
    e2e_s: Annotated[Seconds, Field(gt=0)] | None = None
    percentile: Annotated[float, Field(gt=0, le=100)] = 95.0


class WorkloadSpec(Spec):
    """Traffic. A run serves `requests` requests (or arrivals within `duration_s`); the first `warmup_fraction` of them
    is not counted. `ignore_eos` fixes output lengths, as load tests do."""

    name: Annotated[str, Field(min_length=1, max_length=200)] = "workload"
    arrivals: Arrivals
    isl: Lengths | None = None
    osl: Lengths | None = None
    requests: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    duration_s: Seconds | None = None
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    slo: Slo = Slo()
    prefix_share: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> WorkloadSpec:
        if self.arrivals.kind != "trace" and (self.isl is None or self.osl is None):
            raise ValueError("isl and osl are needed unless arrivals come from a trace")
        if self.requests is None and self.duration_s is None and self.arrivals.kind != "trace":
            raise ValueError("give requests or duration_s, so that the run ends")
        return self
