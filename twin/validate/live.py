"""A live service's own counters, read twice: what it did in between, as a Measurement and as traffic for its twin.

The counters are those of `/metrics` in Prometheus' text format, by vLLM's names. They are means and histograms: nobody's
requests are seen, and percentiles are not asked for, since buckets are too wide for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from pydantic import ValidationError

from twin.spec.errors import EptwinError
from twin.spec.plan import Plan
from twin.spec.provenance import provenance
from twin.spec.results import Counts, Latencies, RunResult, Steady, Summary, Throughput
from twin.spec.scenario import Scenario
from twin.spec.workload import Arrivals, Lengths, WorkloadSpec

JUDGED = ("ttft_s_mean", "tpot_s_mean", "e2e_s_mean", "output_tok_per_s")
"""What the band is held against: means and a rate, which is what counters tell."""
_SAMPLE = re.compile(r"^(?:eptwin|vllm):([a-z0-9_]+)(?:\{(.*)\})?\s+(\S+)", re.MULTILINE)
_EDGE = re.compile(r'(?:^|,)le="([^"]*)"')
_TTFT, _TPOT, _E2E, _ITL = ("time_to_first_token_seconds", "request_time_per_output_token_seconds",
                            "e2e_request_latency_seconds", "inter_token_latency_seconds")  # fmt: skip
_ISL, _OSL = "request_prompt_tokens", "request_generation_tokens"
_GROWS = ("_total", "_sum", "_count", "_bucket")
_VALUES = 200
"""Lengths that stand for a histogram."""

Samples = dict[tuple[str, float | None], float]
"""By name and, in histograms, by the upper edge of the bucket; other labels are summed over."""


def read_samples(text: str) -> Samples:
    """The counters in a scrape. Raises EptwinError for what is no scrape of such a service."""
    found: Samples = {}
    for name, labels, value in _SAMPLE.findall(text):
        edge = _EDGE.search(labels)
        if not name.endswith(_GROWS):
            continue  # gauges may be NaN, and are not asked for
        try:
            key, number = (name, float(edge[1]) if edge else None), float(value)
        except ValueError:
            number = np.nan
        if not np.isfinite(number):
            raise EptwinError(f"/metrics tells {name} in no number")
        found[key] = found.get(key, 0.0) + number
    if (f"{_E2E}_count", None) not in found:
        raise EptwinError("/metrics has no request latencies by the names of eptwin or vLLM")
    return found


@dataclass(frozen=True)
class Window:
    """What a service did in `seconds`: how much its counters grew."""

    seconds: float
    grown: Mapping[tuple[str, float | None], float]

    @property
    def accepted(self) -> int:
        return int(self._of(f"{_ISL}_count"))

    @property
    def finished(self) -> int:
        return int(self._of(f"{_E2E}_count"))

    def mean(self, name: str) -> float | None:
        """Mean of a histogram; None when nothing was observed."""
        count = self._of(f"{name}_count")
        return self._of(f"{name}_sum") / count if count > 0 else None

    def _of(self, name: str) -> float:
        return self.grown.get((name, None), 0.0)

    def traffic(self, asked: WorkloadSpec) -> WorkloadSpec:
        """The traffic that the service had: the rate that came (or, of a closed loop, the users that there must have been,
        by Little's law), with lengths as they were. Raises EptwinError for what nobody can have sent."""
        try:
            return self._traffic(asked)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise EptwinError(f"/metrics tells traffic that cannot be: {first['msg']}, got {str(first['input'])[:40]}") from None

    def _traffic(self, asked: WorkloadSpec) -> WorkloadSpec:
        isl, osl = self._lengths(_ISL), self._lengths(_OSL)
        if asked.arrivals.kind == "closed_loop":
            users = self.finished / self.seconds * ((self.mean(_E2E) or 0.0) + asked.arrivals.think_s)
            arrivals = asked.arrivals.model_copy(update={"concurrency": max(1, round(users))})
        else:
            arrivals = Arrivals(kind="poisson", rate_per_s=max(1, self.accepted or self.finished) / self.seconds)
        return asked.model_copy(update={"arrivals": arrivals, "isl": isl, "osl": osl, "duration_s": None})

    def _lengths(self, name: str) -> Lengths:
        """Evenly spread quantiles of a histogram, straight within each bucket, moved so that their mean is the true one."""
        edges = sorted(edge for n, edge in self.grown if n == f"{name}_bucket" and edge is not None)
        mean, counts = self.mean(name), [self.grown[f"{name}_bucket", edge] for edge in edges]
        if mean is None or not any(counts):
            raise EptwinError(f"/metrics tells nothing of {name}")
        ends = [edge for edge in edges if np.isfinite(edge)]
        at = np.interp((np.arange(_VALUES) + 0.5) / _VALUES * counts[-1], [0.0, *counts[: len(ends)]], [0.0, *ends])
        values = np.maximum(1, np.rint(at * (mean / at.mean()))).astype(int)
        return Lengths(kind="empirical", values=tuple(values.tolist()))

    def measurement(self, scenario: Scenario, plan: Plan) -> RunResult:
        """In the schema of all results."""
        output, prompt = self._of("generation_tokens_total"), self._of("prompt_tokens_total")
        tpot_s = self.mean(_TPOT)
        summaries = [Summary(count=int(self._of(f"{name}_count")), mean=self.mean(name)) for name in (_TTFT, _TPOT, _ITL, _E2E)]
        ttft, tpot, itl, e2e = summaries
        return RunResult(
            kind="measurement", name=scenario.name, model=scenario.model.name, cluster=scenario.cluster.name, plan=plan,
            provenance=provenance(scenario.model, plan, command="eptwin watch"),
            latencies=Latencies(ttft_s=ttft, tpot_s=tpot, itl_s=itl, e2e_s=e2e),
            throughput=Throughput(
                window_s=self.seconds, requests_per_s=self.finished / self.seconds, input_tok_per_s=prompt / self.seconds,
                output_tok_per_s=output / self.seconds, output_tok_per_s_per_gpu=output / self.seconds / plan.gpus,
                total_tok_per_s_per_gpu=(output + prompt) / self.seconds / plan.gpus,
                tok_per_s_per_user=1 / tpot_s if tpot_s else None),
            counts=Counts(submitted=max(self.accepted, self.finished), finished=self.finished, counted=self.finished,
                          unfinished=max(0, self.accepted - self.finished), input_tokens=int(prompt), output_tokens=int(output)),
            steady=Steady(verdict="too short", warmup_s=0.0, reason="counters do not tell how load changed within the window"),
            source="measured",
        )  # fmt: skip


def between(before: Samples, after: Samples, seconds: float) -> Window | None:
    """What was done between two readings; None when counters went back, as those of a service that was started again do."""
    grown = {key: value - before.get(key, 0.0) for key, value in after.items()}
    return None if any(value < 0 for value in grown.values()) else Window(seconds, grown)
