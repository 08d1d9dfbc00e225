"""Many streams at once: the engine's pace must reach the clients."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path

import pytest
from test_lifecycle import start_server

from runtime.bench import BenchOptions, bench
from twin.spec.workload import WorkloadSpec

STEP_S = 0.02


def hold(streams: int, seconds: float, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float, float, float]:
    """(ITL p50, ITL p99, output tok/s, growth of the server's memory in its second half) over a closed loop."""
    monkeypatch.setenv("EPTWIN_API_KEY", "from-env")
    process, url = start_server(2.0)
    try:
        osl = 100
        load = WorkloadSpec.model_validate({
            "arrivals": {"kind": "closed_loop", "concurrency": streams}, "isl": {"mean": 100.0}, "osl": {"mean": float(osl)},
            "requests": int(streams * max(2, seconds / (osl * STEP_S)))})
        memory: list[int] = []
        run = bench(url, load, BenchOptions(), progress=lambda _: memory.append(rss_bytes(process)))
        assert run.failures == ()
        assert run.result.counts.finished == len(run.records) == load.requests
        assert run.result.counts.output_tokens == load.requests * osl
        itl = run.result.latencies.itl_s
        growth = memory[-1] / memory[len(memory) // 2] - 1
        rate = run.result.throughput.output_tok_per_s
        print(f"{streams} streams: ITL p50 {itl.p50:.4f} p99 {itl.p99:.4f} s, {rate:.0f} tok/s, "
              f"TTFT p50 {run.result.latencies.ttft_s.p50:.4f} s, RSS {memory[-1] >> 20} MiB, growth {growth:+.1%}")
        return itl.p50 or 0, itl.p99 or 0, run.result.throughput.output_tok_per_s, growth
    finally:
        process.terminate()
        process.communicate(timeout=20)


def rss_bytes(process: subprocess.Popen[str]) -> int:
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * resource.getpagesize()


def test_64_streams_keep_the_engines_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    p50, p99, tok_per_s, _ = hold(64, 4, monkeypatch)
    assert p50 < 2 * STEP_S
    assert p99 < 10 * STEP_S
    assert tok_per_s > 0.4 * 64 / STEP_S


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_256_streams_on_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds leave room for other work on the machine; alone on it, p99 stays below two steps or so."""
    p50, p99, tok_per_s, growth = hold(256, 60, monkeypatch)
    assert p50 < 2 * STEP_S
    assert p99 < 10 * STEP_S
    assert tok_per_s > 5000
    assert growth < 0.05


