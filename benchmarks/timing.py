"""Timing on a CUDA device, and the two ceilings that every figure is held against, measured in the same run."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median over replays, and the 10th and 90th percentile beside it."""

    median_s: float
    p10_s: float
    p90_s: float
    replays: int
    calls_per_replay: int


@dataclass(frozen=True)
class Ceilings:
    """What this device did in this run: the fastest plain read, and a large bf16 matrix product."""

    read_bytes_per_s: float
    bf16_flop_per_s: float


def time_graph(calls: Sequence[Call], replays: int = 30, least_s: float = 0.002) -> Timing:
    """Times `calls` (the same operator on different inputs) as replays of one CUDA graph that runs them in turn.

    Each call runs twice before capture (compilation, handles), the graph three times before timing. A graph repeats its
    calls until a replay lasts about `least_s`, so that the events' own cost vanishes.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [*calls, *calls]:
            call()
        stream.synchronize()
        once_s = _eager_s(calls)
        rounds = max(1, min(50, round(least_s / once_s)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    for _ in range(3):
        graph.replay()
    count = rounds * len(calls)
    seconds = sorted(_replay_s(graph) / count for _ in range(replays))
    at = lambda q: seconds[min(len(seconds) - 1, int(q * len(seconds)))]  # noqa: E731
    return Timing(statistics.median(seconds), at(0.1), at(0.9), replays, count)


def _eager_s(calls: Sequence[Call]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return max(start.elapsed_time(end) / 1e3, 1e-6)


def _replay_s(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure_ceilings() -> Ceilings:
    """Read bandwidth over 4 GiB of random data; bf16 product of 8192 x 8192 x 8192 random matrices (the best of 3)."""
    words = 1 << 30
    data = torch.randint(0, 1 << 30, (words,), dtype=torch.int32, device="cuda")
    programs = torch.cuda.get_device_properties(0).multi_processor_count * 8
    out = torch.empty(programs, dtype=torch.int32, device="cuda")
    read = time_graph([lambda: _read_kernel[(programs,)](data, out, words, programs, BLOCK=4096, num_warps=8)])
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = min(time_graph([lambda: torch.mm(a, b)], replays=10).median_s for _ in range(3))
    return Ceilings(words * 4 / read.median_s, 2 * 8192**3 / product)


@triton.jit
def _read_kernel(data, out, words, programs, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.int32)
    for start in range(pid * BLOCK * 2, words, programs * BLOCK * 2):
        acc += tl.load(data + start + lane)
        acc ^= tl.load(data + start + BLOCK + lane)
    tl.store(out + pid, tl.sum(acc))


def rotations(set_bytes: int) -> int:
    """How many input sets to rotate so that together they are three times the L2 cache (at most 64)."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(64, -(-3 * l2 // max(set_bytes, 1))))


def provenance(commit: str | None) -> dict[str, object]:
    """Where figures come from: device, driver, library versions, commit, command."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()
    return {
        "gpu": torch.cuda.get_device_name(0),
        "driver": driver or "unknown",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit or os.environ.get("GIT_COMMIT", "unknown"),
        "command": " ".join(Path(a).name if a.startswith("/") else a for a in sys.argv),
        "method": time_graph.__doc__,
    }


def as_row(timing: Timing, bytes_: int, flops: int, ceilings: Ceilings) -> dict[str, float | dict[str, float]]:
    """Achieved rates and their share of the ceilings of the same run."""
    return {
        **asdict(timing),
        "bytes": bytes_,
        "flop": flops,
        "bytes_per_s": bytes_ / timing.median_s,
        "flop_per_s": flops / timing.median_s,
        "read_share": bytes_ / timing.median_s / ceilings.read_bytes_per_s,
        "bf16_share": flops / timing.median_s / ceilings.bf16_flop_per_s,
    }
