"""Results: what a run did, predicted or measured, in one schema; and how two of them compare.

A run directory is the truth, pages are views of it: scenario.yaml, plan.json, results.json (RunResult),
requests.jsonl (one RequestRecord a line), trace.json (Chrome trace), comparison.json (Comparison), report.html.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from twin.spec.base import Source, Spec
from twin.spec.plan import Plan, Role


class Provenance(Spec):
    """What made a result. `host` describes the machine in words, never its name."""

    tool_version: str
    git_commit: str = ""
    seed: int = 0
    spec_sha256: str = ""
    profiles: tuple[str, ...] = ()
    libraries: dict[str, str] = {}
    host: str = ""
    command: str = ""


class Summary(Spec):
    """Distribution of a quantity over requests or steps. All None when `count` is 0."""

    count: Annotated[int, Field(ge=0)]
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarise plain numbers; percentiles interpolate linearly between order statistics (numpy's default)."""
        if len(values) == 0:
            return cls(count=0)
        ordered = sorted(float(v) for v in values)

        def at(q: float) -> float:
            position = (len(ordered) - 1) * q
            low = int(position)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

        return cls(
            count=len(ordered),
            mean=sum(ordered) / len(ordered),
            p50=at(0.5),
            p90=at(0.9),
            p95=at(0.95),
            p99=at(0.99),
            max=ordered[-1],
        )


class Interval(Spec):
    """An 80% interval around a predicted value."""

    low: float
    high: float


class Latencies(Spec):
    """Over the counted (steady) requests. TPOT is the mean time per output token after the first; ITL each gap."""

    ttft_s: Summary
    tpot_s: Summary
    itl_s: Summary
    e2e_s: Summary


class Throughput(Spec):
    """Rates over the counted window."""

    window_s: float
    requests_per_s: float
    input_tok_per_s: float
    output_tok_per_s: float
    output_tok_per_s_per_gpu: float
    total_tok_per_s_per_gpu: float
    tok_per_s_per_user: float | None = None
    goodput_per_s: float | None = None
    slo_attainment: float | None = None


class Counts(Spec):
    """Requests by end; tokens of all of them. submitted = finished + rejected + failed + unfinished."""

    submitted: int
    finished: int
    rejected: int = 0
    failed: int = 0
    unfinished: int = 0
    counted: int
    preemptions: int = 0
    input_tokens: int
    output_tokens: int


class Memory(Spec):
    """Bytes on the fullest rank of a pool. `free_bytes` is what is left of the GPU after everything."""

    hbm_bytes: float
    dense_weight_bytes: float
    expert_weight_bytes: float
    kv_pool_bytes: float
    activation_bytes: float
    comm_buffer_bytes: float
    reserved_bytes: float
    free_bytes: float
    kv_tokens: int
    kv_blocks: int


class Rebalance(Spec):
    """One decision of online rebalancing and what came of it: expert weights moved (0 when it did not pay) over `steps` steps
    in which the instance served on. Imbalances are the fullest EP rank over the mean, a mean over layers: as it was, and as
    the new placement makes it for the same loads. `gain_s_per_step` and `cost_s` (of moving) decided; `solve_s` is the
    time it took to."""

    start_s: float
    end_s: float
    steps: int
    layers: int
    copies: int
    moved_bytes: float
    imbalance_before: float
    imbalance_after: float
    gain_s_per_step: float
    cost_s: float
    solve_s: float


class PoolResult(Spec):
    """One pool's behaviour. `breakdown_s` is the mean seconds of a step by operator path ("attention/kv_read");
    `sources` says where each came from. `expert_load` is [layers][ranks] relative to the mean (1.0 = balanced).
    `mtp_accepted[j]` is the share of the (j+1)-th speculated tokens that were right, all before them included."""

    role: Role
    instances: int
    gpus: int
    dp: int
    tp: int
    ep: int
    utilisation: float
    steps: int
    step_s: Summary
    batch_seqs_mean: float
    batch_tokens_mean: float
    kv_usage_mean: float
    kv_usage_max: float
    preemptions: int
    breakdown_s: dict[str, float] = {}
    sources: dict[str, Source] = {}
    memory: Memory | None = None
    expert_load: tuple[tuple[float, ...], ...] | None = None
    kv_transfer_s: Summary | None = None
    kv_transfer_bytes: float = 0.0
    rebalances: tuple[Rebalance, ...] = ()
    mtp_accepted: tuple[float, ...] | None = None


class Series(Spec):
    """A quantity over time, thinned to at most a few hundred points."""

    name: str
    unit: str
    time_s: tuple[float, ...]
    value: tuple[float, ...]


class Steady(Spec):
    """Was the counted window steady? `drift` is the relative change of mean E2E latency from its first to its second
    half; `queue_slope_per_s` the growth of unfinished requests as a share of the arrival rate."""

    verdict: Literal["steady", "not steady", "too short"]
    warmup_s: float
    drift: float | None = None
    queue_slope_per_s: float | None = None
    reason: str = ""


class Cost(Spec):
    """Money: None where the cluster states no price."""

    usd_per_h: float | None = None
    usd_per_million_output_tokens: float | None = None
    usd_per_million_tokens: float | None = None


class RunResult(Spec):
    """A Prediction (of the twin) or a Measurement (of the runtime, or of a service under load)."""

    schema_version: Literal[1] = 1
    kind: Literal["prediction", "measurement"]
    name: str
    model: str
    cluster: str
    plan: Plan | None = None
    provenance: Provenance
    latencies: Latencies
    throughput: Throughput
    counts: Counts
    steady: Steady
    pools: tuple[PoolResult, ...] = ()
    cost: Cost = Cost()
    intervals: dict[str, Interval] = {}
    series: tuple[Series, ...] = ()
    source: Source = "assumed"
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class RequestRecord(Spec):
    """One request, times in seconds from the run's start. None: it never got there. `status` ok, rejected or failed."""

    id: int
    arrival_s: float
    isl: int
    osl: int
    output_tokens: int = 0
    prefill_start_s: float | None = None
    first_token_s: float | None = None
    finish_s: float | None = None
    itl_max_s: float | None = None
    prefill_instance: int | None = None
    decode_instance: int | None = None
    kv_transfer_s: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    counted: bool = True
    status: Literal["ok", "rejected", "failed", "unfinished"] = "ok"

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def e2e_s(self) -> float | None:
        return None if self.finish_s is None else self.finish_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        if self.finish_s is None or self.first_token_s is None or self.output_tokens < 2:
            return None
        return (self.finish_s - self.first_token_s) / (self.output_tokens - 1)


class ComparedMetric(Spec):
    """Prediction against measurement of one metric. `error` is signed: predicted / measured - 1."""

    name: str
    unit: str
    predicted: float | None = None
    measured: float | None = None
    error: float | None = None
    low: float | None = None
    high: float | None = None
    inside: bool | None = None


class Comparison(Spec):
    """How true a prediction was. `band` is the largest error that counts as agreement."""

    schema_version: Literal[1] = 1
    name: str
    metrics: tuple[ComparedMetric, ...]
    median_abs_error: float | None = None
    max_abs_error: float | None = None
    band: float | None = None
    within_band: bool | None = None
    predicted: Provenance | None = None
    measured: Provenance | None = None
    notes: tuple[str, ...] = ()


class Candidate(Spec):
    """One plan that the search looked at. `stage` says how far it got; `reason` why it fell."""

    plan: Plan
    stage: Literal["illegal", "memory", "bound", "simulated"]
    reason: str = ""
    feasible: bool = False
    bound_tok_per_s_per_gpu: float | None = None
    metrics: dict[str, float] = {}
    pareto: bool = False
    rank: int | None = None


class SearchResult(Spec):
    """The whole search: every candidate simulated, counts of the rest, and why the winner won."""

    schema_version: Literal[1] = 1
    name: str
    model: str
    cluster: str
    considered: int
    pruned: dict[str, int]
    candidates: tuple[Candidate, ...]
    best: Candidate | None = None
    explanation: tuple[str, ...] = ()
    seconds: float | None = None
    provenance: Provenance | None = None
    assumptions: tuple[str, ...] = ()
