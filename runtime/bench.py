"""Load a service with a workload and measure it: `bench(url, workload)`.

The result is a RunResult of the same schema, and by the same definitions (twin.spec.summarise), as the simulator's.
Open loops send on schedule whatever the service does, and count latency from the scheduled instant, so that a client
that falls behind cannot flatter the service. Ctrl-C ends the load and gives what was measured so far.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import aiohttp

from runtime.bench_client import Api, Outcome, PromptUnit, Target, ask
from twin.policy.arrivals import RequestSet, sample_requests
from twin.spec.errors import EptwinError
from twin.spec.provenance import provenance
from twin.spec.results import RequestRecord, RunResult, Summary
from twin.spec.summarise import mark_warmup, summarise
from twin.spec.urls import API_KEY_VARIABLE, check_url, readable
from twin.spec.workload import WorkloadSpec

MAX_REQUESTS = 100_000
"""Most requests of one load test: a bound on what the client keeps in memory."""
_LATE_S = 0.05
_BACK_OFF_S = 0.1
"""A closed loop's user waits this long after a failure, or a service that is down would end the test in a blink."""


@dataclass(frozen=True)
class Progress:
    """How far a load test is."""

    elapsed_s: float
    total: int
    sent: int
    finished: int
    failed: int
    output_tokens: int


@dataclass(frozen=True)
class Failure:
    """One kind of failure, how often, and what the service said (at most 3 samples)."""

    kind: str
    count: int
    samples: tuple[str, ...]


@dataclass(frozen=True)
class BenchRun:
    """A Measurement, its requests, what went wrong, and whether the load was cut short by the user."""

    result: RunResult
    records: list[RequestRecord]
    failures: tuple[Failure, ...]
    interrupted: bool


@dataclass(frozen=True)
class BenchOptions:
    """How to ask, and what the result says of the service. `unit` words suits services with their own tokenizer; the
    byte-level one takes letters, so that prompts have their exact length. `auth` is how the key of EPTWIN_API_KEY is
    sent. `gpus` and `usd_per_h` (of all of them) are the service's, for rates per GPU and cost."""

    model: str = ""
    api: Api = "completions"
    unit: PromptUnit = "bytes"
    auth: Literal["bearer", "bare"] = "bearer"
    seed: int = 0
    ignore_eos: bool = True
    temperature: float = 0.0
    timeout_s: float = 600.0
    allow_remote: bool = False
    gpus: int = 1
    usd_per_h: float | None = None
    name: str = "bench"
    cluster: str = "unknown"


def bench(url: str, workload: WorkloadSpec, options: BenchOptions | None = None, *,
          progress: Callable[[Progress], None] | None = None) -> BenchRun:
    """Send the workload to `url` (as `http://127.0.0.1:8000`) and measure.

    Raises SpecError for a bad URL or one that is not loopback without `allow_remote`, EptwinError when the service
    cannot be reached or refuses the key. `progress` hears once a second.
    """
    options = options or BenchOptions()
    target = Target(url=check_url(url, allow_remote=options.allow_remote), api=options.api, model=options.model,
                    unit=options.unit, headers=_headers(options.auth), timeout_s=options.timeout_s,
                    ignore_eos=options.ignore_eos, temperature=options.temperature, seed=options.seed,
                    prefix_share=workload.prefix_share)
    requests = sample_requests(workload, options.seed, max_requests=MAX_REQUESTS)
    load = asyncio.run(_bench(target, workload, requests, progress))
    return _measurement(load, workload, requests, options)


def stderr_progress(now: Progress) -> None:
    """A progress line on stderr, rewritten in place on a terminal and silent elsewhere."""
    if sys.stderr.isatty():
        failed = f", {now.failed} failed" if now.failed else ""
        sys.stderr.write(f"\r{now.elapsed_s:6.1f} s  {now.finished}/{now.total} requests{failed}, "
                         f"{now.output_tokens} output tokens ")
        sys.stderr.flush()


def _headers(auth: str) -> tuple[tuple[str, str], ...]:
    key = os.environ.get(API_KEY_VARIABLE, "").strip()
    kind = (("Content-Type", "application/json"),)
    if not key:
        return kind
    return (*kind, ("Authorization", f"Bearer {key}" if auth == "bearer" else key))


@dataclass
class _Load:
    """A load test as it goes. Times of outcomes are on the monotonic clock, `start_s` is its zero."""

    target: Target
    start_s: float
    arrivals_s: dict[int, float] = field(default_factory=dict)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    interrupted: bool = False

    def progress(self, total: int) -> Progress:
        ended = [o for o in self.outcomes.values() if o.end_s is not None]
        failed = sum(bool(o.kind) for o in ended)
        return Progress(time.monotonic() - self.start_s, total, len(self.outcomes), len(ended) - failed, failed,
                        sum(o.output_tokens for o in self.outcomes.values()))


async def _bench(target: Target, workload: WorkloadSpec, requests: RequestSet,
                 progress: Callable[[Progress], None] | None) -> _Load:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers=dict(target.headers), trust_env=False,
                                     timeout=aiohttp.ClientTimeout(total=None)) as session:
        target = await _prepare(session, target)
        load = _Load(target, time.monotonic())
        sender = _Sender(session, target, requests, load)
        reporter = asyncio.create_task(_report(load, len(requests), progress))
        try:
            if requests.arrival_s is None:
                await sender.closed_loop(workload)
            else:
                await sender.open_loop([float(t) for t in requests.arrival_s])
        except asyncio.CancelledError:
            load.interrupted = True  # Ctrl-C: keep what was measured
        finally:
            reporter.cancel()
            await asyncio.gather(reporter, return_exceptions=True)
    if progress is not None:
        progress(load.progress(len(requests)))
    return load


async def _report(load: _Load, total: int, progress: Callable[[Progress], None] | None) -> None:
    while progress is not None:
        await asyncio.sleep(1.0)
        progress(load.progress(total))


async def _prepare(session: aiohttp.ClientSession, target: Target) -> Target:
    """See that the service answers and takes the key; learn what its chat template adds to a prompt."""
    try:
        async with asyncio.timeout(min(30.0, target.timeout_s)):
            async with session.get(f"{target.url}/v1/models", allow_redirects=False) as response:
                if response.status in (401, 403):
                    raise EptwinError(f"the service at {target.url} refuses the key; set {API_KEY_VARIABLE}")
                listed = await response.content.read(1 << 16) if response.status == 200 else b""
    except (aiohttp.ClientError, TimeoutError) as error:
        raise EptwinError(f"cannot reach {target.url}: {readable(str(error)) or 'no answer'}") from error
    target = replace(target, model=target.model or first_model(listed))
    if target.api == "chat" and target.unit == "bytes":
        probe = Outcome()
        await ask(session, target, -1, 1, 1, probe)
        if probe.kind:
            raise EptwinError(f"the service at {target.url} fails a probe ({probe.kind}): {probe.message}")
        target = replace(target, overhead_tokens=max(0, (probe.prompt_tokens or 1) - 1))
    return target


def first_model(listed: bytes) -> str:
    """The first id of an answer of /v1/models; "" when it is not one."""
    with contextlib.suppress(ValueError, KeyError, IndexError, TypeError, RecursionError):
        return readable(str(json.loads(listed)["data"][0]["id"]))
    return ""


class _Sender:
    """Sends requests, as a group that is cancelled as one."""

    def __init__(self, session: aiohttp.ClientSession, target: Target, requests: RequestSet, load: _Load) -> None:
        self._session, self._target, self._requests, self._load = session, target, requests, load

    async def open_loop(self, arrivals_s: Sequence[float]) -> None:
        async with asyncio.TaskGroup() as group:
            for index, arrival_s in enumerate(arrivals_s):
                wait_s = self._load.start_s + arrival_s - time.monotonic()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                group.create_task(self._one(index, arrival_s))

    async def closed_loop(self, workload: WorkloadSpec) -> None:
        indices = iter(range(len(self._requests)))
        users = min(workload.arrivals.concurrency or 1, len(self._requests))
        async with asyncio.TaskGroup() as group:
            for _ in range(users):
                group.create_task(self._user(indices, workload.arrivals.think_s, workload.duration_s))

    async def _user(self, indices: Iterator[int], think_s: float, duration_s: float | None) -> None:
        for index in indices:
            now_s = time.monotonic() - self._load.start_s
            if duration_s is not None and now_s >= duration_s:
                return
            served = await self._one(index, now_s)
            await asyncio.sleep(think_s if served else max(think_s, _BACK_OFF_S))

    async def _one(self, index: int, arrival_s: float) -> bool:
        outcome = Outcome(sent_s=time.monotonic())
        self._load.arrivals_s[index], self._load.outcomes[index] = arrival_s, outcome
        await ask(self._session, self._target, index, int(self._requests.isl[index]), int(self._requests.osl[index]),
                  outcome)
        return not outcome.kind


def _measurement(load: _Load, workload: WorkloadSpec, requests: RequestSet, options: BenchOptions) -> BenchRun:
    records = mark_warmup([_record(i, load, requests) for i in load.outcomes], workload.warmup_fraction)
    gaps = [gap for r in records if r.counted and r.status == "ok" for gap in _gaps(load.outcomes[r.id])]
    summary = summarise(records, workload, gpus=options.gpus, usd_per_h=options.usd_per_h, itl_s=Summary.of(gaps))
    failures = _failures(load)
    result = RunResult(
        kind="measurement", name=options.name, model=load.target.model or "unknown", cluster=options.cluster,
        provenance=provenance(workload, seed=options.seed, libraries=("aiohttp", "numpy"), command=f"bench {load.target.url}"),
        latencies=summary.latencies, throughput=summary.throughput, counts=summary.counts, steady=summary.steady,
        cost=summary.cost, source="measured", warnings=tuple(_warnings(load, requests, failures)))
    return BenchRun(result, records, failures, load.interrupted)


def _record(index: int, load: _Load, requests: RequestSet) -> RequestRecord:
    outcome = load.outcomes[index]
    status = "ok"
    if outcome.end_s is None:
        status = "unfinished"
    elif outcome.kind in ("http 429", "http 503"):
        status = "rejected"
    elif outcome.kind:
        status = "failed"
    first = outcome.token_s[0] - load.start_s if outcome.token_s else None
    last = outcome.token_s[-1] - load.start_s if outcome.token_s and status == "ok" else None
    return RequestRecord.model_validate({
        "id": index, "arrival_s": load.arrivals_s[index], "isl": outcome.prompt_tokens or int(requests.isl[index]),
        "osl": int(requests.osl[index]), "output_tokens": outcome.output_tokens, "first_token_s": first,
        "finish_s": last, "itl_max_s": max(_gaps(outcome), default=None), "status": status})


def _gaps(outcome: Outcome) -> list[float]:
    times = outcome.token_s
    return [b - a for a, b in itertools.pairwise(times)]


def _failures(load: _Load) -> tuple[Failure, ...]:
    found: dict[str, list[str]] = {}
    for outcome in load.outcomes.values():
        if outcome.kind:
            found.setdefault(outcome.kind, []).append(outcome.message)
    return tuple(Failure(kind, len(messages), tuple(dict.fromkeys(messages))[:3]) for kind, messages in sorted(found.items()))


def _warnings(load: _Load, requests: RequestSet, failures: Sequence[Failure]) -> Iterator[str]:
    if load.interrupted:
        yield f"interrupted: {len(load.outcomes)} of {len(requests)} requests were sent"
    for failure in failures:
        yield f"{failure.count} requests failed ({failure.kind}): {failure.samples[0] if failure.samples else ''}"
    served = [(i, o) for i, o in load.outcomes.items() if o.end_s is not None and not o.kind]
    unlike = sum(o.prompt_tokens is not None and o.prompt_tokens != int(requests.isl[i]) for i, o in served)
    if unlike:
        yield f"{unlike} prompts had another length than the workload says; records have the service's own count"
    shorter = sum(o.output_tokens < int(requests.osl[i]) for i, o in served)
    if shorter:
        yield f"{shorter} answers were shorter than the workload says"
    uncounted = sum(o.prompt_tokens is None for _, o in served)
    if uncounted:
        yield f"the service gave no usage for {uncounted} requests; their tokens were counted as chunks with text"
    late = sum(o.sent_s - load.start_s - load.arrivals_s[i] > _LATE_S for i, o in load.outcomes.items())
    if late:
        yield f"the client sent {late} requests more than {_LATE_S * 1e3:.0f} ms late; it was too busy for this load"
