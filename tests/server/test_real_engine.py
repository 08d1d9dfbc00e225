"""The whole path once, with nothing faked: two gloo ranks with expert parallelism behind the service, loaded by bench."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_api import call, events
from test_lifecycle import open_request

from runtime.bench import bench
from twin.spec.workload import WorkloadSpec

pytest.importorskip("torch")

SERVER = """
from runtime.frontend import Frontend
from runtime.gateway import GatewaySettings, serve
from runtime.options import EngineOptions
from twin.spec.load import load_scenario
scenario = load_scenario("tiny_cpu")
serve(lambda: Frontend(scenario.plan, scenario.model, EngineOptions(threads=1)), vocab=scenario.model.vocab, port=0,
      settings=GatewaySettings("tiny-moe"), on_start=lambda port: print(port, flush=True))
print("stopped", flush=True)
"""


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               cwd=Path(__file__).parents[2], env=dict(os.environ))
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "stopped\n"), err
    finally:
        process.kill()
        process.communicate()


def running(url: str) -> dict[str, float]:
    lines = call(url, "/metrics")[1].splitlines()
    return {name: sum(float(line.split()[-1]) for line in lines if line.startswith(f"eptwin:{name}{{"))
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")}


def test_greedy_answers_repeat_and_streams_agree(service: str) -> None:
    body = {"messages": [{"role": "user", "content": "Which experts?"}], "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    whole = call(service, "/v1/chat/completions", body)[1]
    assert whole["usage"]["completion_tokens"] == 24
    text = whole["choices"][0]["message"]["content"]
    assert call(service, "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"] == text
    chunks = events(call(service, "/v1/chat/completions", {**body, "stream": True})[1])
    assert len(chunks) == 24
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == text


def test_seeds_repeat_and_differ(service: str) -> None:
    def drawn(seed: int) -> str:
        body = {"prompt": "abc", "max_tokens": 16, "temperature": 1.0, "seed": seed, "ignore_eos": True}
        return str(call(service, "/v1/completions", body)[1]["choices"][0]["text"])

    assert drawn(1) == drawn(1) != drawn(2)


def test_the_engine_refuses_what_exceeds_the_context(service: str) -> None:
    assert call(service, "/v1/models")[1]["data"][0]["max_model_len"] <= 4096
    assert call(service, "/v1/completions", {"prompt": "x" * 5000, "max_tokens": 1})[0] == 400


def test_bench_measures_it_and_abandoned_requests_leave_nothing(service: str) -> None:
    load = WorkloadSpec.model_validate({"arrivals": {"kind": "closed_loop", "concurrency": 4}, "requests": 24,
                                        "isl": {"kind": "uniform", "low": 16, "high": 64}, "osl": {"mean": 16.0}})
    clients = [open_request(service, stream=True, max_tokens=2000) for _ in range(4)]
    for client in clients:
        client.recv(1)
        client.close()
    run = bench(service, load)
    assert run.failures == ()
    assert run.result.counts.finished == 24
    assert run.result.counts.output_tokens == 24 * 16
    assert run.result.latencies.ttft_s.p50 is not None
    assert run.result.warnings == ()
    assert running(service) == {"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0}
