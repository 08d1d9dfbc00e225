"""When requests come and how long they are, drawn the same way for the simulator and for the load generator.

Randomness comes from streams keyed by name: each name has its own generator, so a new stream changes no other, and two
plans compared on one seed see the same requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from twin.policy.traces import read_trace
from twin.spec.errors import SpecError
from twin.spec.workload import Lengths, WorkloadSpec

MAX_REQUESTS = 10_000_000
_CHUNK = 4096


def named_stream(seed: int, name: str) -> np.random.Generator:
    """The generator of one named purpose. The same (seed, name) gives the same numbers in every process."""
    return np.random.Generator(np.random.PCG64(named_seed(seed, name)))


def named_seed(seed: int, name: str) -> np.random.SeedSequence:
    """What `named_stream` starts from, for those who make their own generator."""
    digest = blake2b(name.encode(), digest_size=16).digest()
    key = tuple(int.from_bytes(digest[i:i + 4], "little") for i in range(0, 16, 4))
    return np.random.SeedSequence(seed, spawn_key=key)


@dataclass(frozen=True)
class RequestSet:
    """Requests in order of arrival: lengths in tokens [n], and when each comes, in seconds from the start [n].

    `arrival_s` is None for a closed loop: there a request comes when a user is free to send it.
    """

    arrival_s: NDArray[np.float64] | None
    isl: NDArray[np.int64]
    osl: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.isl)


def sample_requests(workload: WorkloadSpec, seed: int, *, max_requests: int | None = None) -> RequestSet:
    """Draw the whole traffic of a workload, at most `max_requests` requests of it.

    Sampling is prefix-stable: more requests of the same workload and seed begin with the same ones. Raises SpecError
    for a bad trace and for traffic that holds no request or more than MAX_REQUESTS.
    """
    limit = min(n for n in (workload.requests, max_requests, MAX_REQUESTS) if n is not None)
    if workload.arrivals.kind == "trace":
        return _from_trace(workload, seed, limit)
    arrival_s = _arrival_times(workload, seed, limit)
    n = limit if arrival_s is None else len(arrival_s)
    if n == 0:
        raise SpecError("no request arrives within duration_s", field="workload.duration_s",
                        hint="raise duration_s or the rate")
    assert workload.isl is not None and workload.osl is not None, "the spec demands lengths outside traces"
    return RequestSet(arrival_s, sample_lengths(workload.isl, named_stream(seed, "isl"), n),
                      sample_lengths(workload.osl, named_stream(seed, "osl"), n))


def sample_lengths(lengths: Lengths, stream: np.random.Generator, n: int) -> NDArray[np.int64]:
    """`n` lengths in tokens, rounded, then clipped to [min_tokens, max_tokens]."""
    values = _raw_lengths(lengths, stream, n)
    low = max(1, lengths.min_tokens)
    return np.asarray(np.clip(np.rint(values), low, lengths.max_tokens), dtype=np.int64)


def _raw_lengths(lengths: Lengths, stream: np.random.Generator, n: int) -> NDArray[np.float64]:
    mean = lengths.mean or 1.0
    if lengths.kind == "fixed":
        return np.full(n, mean)
    if lengths.kind == "uniform":
        assert lengths.low is not None and lengths.high is not None
        # One uniform number a request, so that changing a bound leaves the others' ranks alone.
        return lengths.low + np.floor(stream.random(n) * (lengths.high - lengths.low + 1))
    if lengths.kind == "lognormal":
        variance = np.log1p((lengths.cv or 0.0) ** 2)  # of log(length), so that mean and cv are those of the length
        return np.asarray(mean * np.exp(np.sqrt(variance) * stream.standard_normal(n) - variance / 2))
    if lengths.kind == "geometric":
        success = min(1.0, 1.0 / mean)
        if success == 1.0:
            return np.ones(n)
        return np.asarray(np.ceil(np.log1p(-stream.random(n)) / np.log1p(-success)))  # inverse transform
    values = np.asarray(lengths.values, dtype=np.float64)
    return np.asarray(values[(stream.random(n) * len(values)).astype(np.int64)])


def _arrival_times(workload: WorkloadSpec, seed: int, limit: int) -> NDArray[np.float64] | None:
    """Arrival times up to `limit` requests and `duration_s`; None for a closed loop."""
    kind, rate = workload.arrivals.kind, workload.arrivals.rate_per_s
    if kind == "closed_loop":
        return None
    if kind == "burst":
        if workload.requests is None:
            raise SpecError("a burst needs to know how many requests it has", field="workload.requests")
        return np.zeros(limit)
    assert rate is not None, "the spec demands a rate"
    duration_s = workload.duration_s
    if kind == "deterministic":
        n = limit if duration_s is None else min(limit, int(np.floor(duration_s * rate)) + 1)
        _check_size(n, workload)
        times = np.arange(n) / rate
    else:
        times = _poisson_times(named_stream(seed, "arrivals"), rate, limit, duration_s)
        _check_size(len(times), workload)
    return times if duration_s is None else times[times <= duration_s]


def _poisson_times(stream: np.random.Generator, rate: float, limit: int,
                   duration_s: float | None) -> NDArray[np.float64]:
    """Unit-mean gaps scaled by the rate: two rates of one seed see the same sequence, stretched."""
    if duration_s is None:
        return np.asarray(np.cumsum(stream.standard_exponential(limit)) / rate)
    chunks: list[NDArray[np.float64]] = []
    count, last = 0, 0.0
    while count < limit and last / rate <= duration_s:
        sums = last + np.cumsum(stream.standard_exponential(min(_CHUNK, limit - count)))
        chunks.append(sums)
        count, last = count + len(sums), float(sums[-1])
    return np.concatenate(chunks) / rate if chunks else np.zeros(0)


def _check_size(n: int, workload: WorkloadSpec) -> None:
    if n >= MAX_REQUESTS and workload.requests is None:
        raise SpecError(f"more than {MAX_REQUESTS} requests arrive within duration_s", field="workload.duration_s",
                        hint="shorten duration_s or give requests")


def _from_trace(workload: WorkloadSpec, seed: int, limit: int) -> RequestSet:
    """Times and lengths of a trace, `speedup` times as dense. Lengths stated beside the trace replace the trace's."""
    arrivals = workload.arrivals
    assert arrivals.file is not None and arrivals.format is not None, "the spec demands a file and its format"
    until_s = None if workload.duration_s is None else workload.duration_s * arrivals.speedup
    trace = read_trace(arrivals.file, arrivals.format, max_rows=limit, until_s=until_s)
    isl, osl = trace.isl, trace.osl
    if workload.isl is not None:
        isl = sample_lengths(workload.isl, named_stream(seed, "isl"), len(isl))
    if workload.osl is not None:
        osl = sample_lengths(workload.osl, named_stream(seed, "osl"), len(osl))
    return RequestSet(trace.time_s / arrivals.speedup, isl, osl)
