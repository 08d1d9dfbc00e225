"""The load client against services whose speed is known, that misbehave, or that are somebody else's."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fake_engine import FakeEngine, running_server

from runtime.bench import BenchOptions, Progress, bench, first_model
from runtime.bench_client import prompt_text
from twin.spec.errors import EptwinError, SpecError
from twin.spec.results import RunResult
from twin.spec.urls import check_url
from twin.spec.workload import WorkloadSpec

STEP_S = 0.02


def workload(arrivals: dict[str, object], requests: int = 24, osl: float = 20.0, **more: object) -> WorkloadSpec:
    return WorkloadSpec.model_validate({"arrivals": arrivals, "isl": {"mean": 50.0}, "osl": {"mean": osl},
                                        "requests": requests, **more})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server(FakeEngine(STEP_S)) as (found, _):
        yield found


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_closed_loop_measures_what_the_engine_does(url: str, api: str) -> None:
    load = workload({"kind": "closed_loop", "concurrency": 8}, requests=40, slo={"ttft_s": 5.0, "tpot_s": 5.0})
    run = bench(url, load, BenchOptions(api=api, gpus=2, usd_per_h=3.6))  # type: ignore[arg-type]
    result = run.result
    assert RunResult.model_validate_json(result.model_dump_json()) == result
    assert (result.kind, result.model, result.source) == ("measurement", "tiny", "measured")
    assert result.counts.finished == 40
    assert result.counts.counted == 32
    assert result.counts.output_tokens == 40 * 20
    assert {r.isl for r in run.records} == {50}, "prompts have their exact length, the chat template's tokens included"
    # Nothing may be faster than the engine; a busy machine may be slower.
    assert 0.9 * STEP_S < (result.latencies.tpot_s.p50 or 0) < 5 * STEP_S
    assert 0.8 * STEP_S < (result.latencies.itl_s.p50 or 0) < 5 * STEP_S
    assert result.latencies.itl_s.count == 32 * 19
    assert 0.1 * 8 / STEP_S < result.throughput.output_tok_per_s < 1.05 * 8 / STEP_S
    assert result.throughput.output_tok_per_s_per_gpu == pytest.approx(result.throughput.output_tok_per_s / 2)
    assert result.throughput.slo_attainment == 1.0
    assert result.cost.usd_per_million_output_tokens is not None
    assert result.warnings == ()
    assert not run.interrupted


def test_open_loops_keep_to_their_schedule(url: str) -> None:
    run = bench(url, workload({"kind": "deterministic", "rate_per_s": 40.0}, requests=40, osl=5.0))
    arrivals = [r.arrival_s for r in run.records]
    assert arrivals == [pytest.approx(i / 40) for i in range(40)]
    assert run.result.throughput.requests_per_s == pytest.approx(40, rel=0.3)
    first = bench(url, workload({"kind": "poisson", "rate_per_s": 100.0}, osl=3.0), BenchOptions(seed=5))
    again = bench(url, workload({"kind": "poisson", "rate_per_s": 100.0}, osl=3.0), BenchOptions(seed=5))
    assert [r.arrival_s for r in first.records] == [r.arrival_s for r in again.records]


def test_burst(url: str) -> None:
    run = bench(url, workload({"kind": "burst"}, requests=30, osl=4.0))
    assert run.result.counts.finished == 30
    assert {r.arrival_s for r in run.records} == {0.0}
    assert run.result.steady.verdict == "too short"


def test_latency_counts_from_the_scheduled_instant() -> None:
    """Two slots, eight requests at once: the queue shows in TTFT."""
    with running_server(FakeEngine(STEP_S, slots=2)) as (url, _):
        run = bench(url, workload({"kind": "burst"}, requests=8, osl=10.0, warmup_fraction=0.0))
    ttft = sorted(r.ttft_s or 0 for r in run.records)
    assert 3 * 10 * STEP_S <= ttft[-1] < 2 * 3 * 10 * STEP_S
    assert ttft[0] < 10 * STEP_S


def test_rejections_are_counted_apart() -> None:
    with running_server(FakeEngine(STEP_S), max_outstanding=4) as (url, _):
        run = bench(url, workload({"kind": "burst"}, requests=20, slo={"ttft_s": 5.0}, warmup_fraction=0.0))
    counts = run.result.counts
    assert (counts.finished, counts.rejected, counts.failed) == (4, 16, 0)
    assert run.result.throughput.slo_attainment == pytest.approx(0.2)
    assert [(f.kind, f.count) for f in run.failures] == [("http 429", 16)]
    assert "outstanding" in run.failures[0].samples[0] or "overloaded" in run.failures[0].samples[0]


def test_progress_is_told(url: str) -> None:
    told: list[Progress] = []
    bench(url, workload({"kind": "closed_loop", "concurrency": 2}, requests=6, osl=20.0), progress=told.append)
    assert told[-1].finished == 6
    assert told[-1].output_tokens == 120
    assert len(told) >= 2


def test_duration_ends_a_closed_loop(url: str) -> None:
    load = WorkloadSpec.model_validate({"arrivals": {"kind": "closed_loop", "concurrency": 3}, "isl": {"mean": 5.0},
                                        "osl": {"mean": 5.0}, "duration_s": 0.5})
    start = time.monotonic()
    run = bench(url, load)
    assert 0.4 < time.monotonic() - start < 10.0
    assert 3 <= run.result.counts.finished == len(run.records) < 60


Handler = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture
def foreign() -> Iterator[tuple[str, dict[str, Handler]]]:
    """(URL, {"post": what to do}) of a service that is not ours."""
    behaviour: dict[str, Handler] = {}

    class Service(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"data": [{"id": "foreign"}]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            behaviour["post"](self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", behaviour
    server.shutdown()
    server.server_close()


def stream(*lines: str) -> Handler:
    def handler(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "text/event-stream")
        request.end_headers()
        request.wfile.write("".join(f"{line}\n\n" for line in lines).encode())
        request.close_connection = True
    return handler


def status(code: int, body: bytes = b"Zebra\x1b[31m") -> Handler:
    def handler(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("Location", "http://192.0.2.1/")
        request.end_headers()
        request.wfile.write(body)
    return handler


def chunk(text: str) -> str:
    return "data: " + json.dumps({"choices": [{"index": 0, "text": text}]})


@pytest.mark.parametrize(("handler", "kind"), [
    (status(500), "http 500"), (status(307), "http 307"), (status(200), "not a stream"),
    (stream(chunk("a")), "cut short"), (stream("data: {", "data: [DONE]"), "bad stream"),
    (stream("data: " + "[" * 5000, "data: [DONE]"), "bad stream"), (stream("data: [1]"), "bad stream"),
    (stream('data: {"usage": {"prompt_tokens": "x"}}'), "bad stream"),
    (stream('data: {"error": {"message": "out of memory"}}', "data: [DONE]"), "error event"),
    (stream("data: [DONE]"), "no tokens"), (stream("data: " + "x" * (1 << 21)), "bad stream"),
    (lambda request: request.connection.close(), "connection"),
])
def test_failures_by_kind(foreign: tuple[str, dict[str, Handler]], handler: Handler, kind: str) -> None:
    url, behaviour = foreign
    behaviour["post"] = handler
    run = bench(url, workload({"kind": "burst"}, requests=3))
    assert [(f.kind, f.count) for f in run.failures] == [(kind, 3)]
    assert run.result.counts.failed == 3
    assert all(message.isprintable() and len(message) <= 200 for f in run.failures for message in f.samples)
    assert any(kind in warning for warning in run.result.warnings)


def test_a_foreign_stream_without_usage_counts_text(foreign: tuple[str, dict[str, Handler]]) -> None:
    url, behaviour = foreign
    behaviour["post"] = stream(": ping", chunk(""), chunk("a"), chunk("b"), "data: [DONE]")
    run = bench(url, workload({"kind": "burst"}, requests=2, osl=2.0), BenchOptions(unit="words"))
    assert run.result.counts.output_tokens == 4
    assert run.result.model == "foreign"
    assert any("no usage" in warning for warning in run.result.warnings)


def test_requests_time_out(foreign: tuple[str, dict[str, Handler]]) -> None:
    url, behaviour = foreign
    behaviour["post"] = lambda request: time.sleep(1.0)
    run = bench(url, workload({"kind": "burst"}, requests=2), BenchOptions(timeout_s=0.2))
    assert [f.kind for f in run.failures] == ["timeout"]


@pytest.mark.parametrize("bad", ["", "nowhere", "ftp://127.0.0.1", "http://", "http://user:pw@127.0.0.1", "http://127.0.0.1:99999",
                                 "http://127.0.0.1/?q=1", "http://[::1", "http://example.com", "http://10.0.0.1:8000",
                                 "http://127.0.0.1.example.com", "file:///etc/passwd"])
def test_only_plain_loopback_urls(bad: str) -> None:
    with pytest.raises(SpecError):
        check_url(bad, allow_remote=False)


def test_good_urls() -> None:
    assert check_url("http://127.0.0.1:8000/v1/", allow_remote=False) == "http://127.0.0.1:8000"
    assert check_url("http://[::1]:80", allow_remote=False) == "http://[::1]:80"
    assert check_url("https://example.com/api", allow_remote=True) == "https://example.com/api"


@pytest.mark.parametrize("listed", [b"", b"[]", b'{"data": []}', b"[" * 3000, b"\xff"])
def test_odd_model_lists(listed: bytes) -> None:
    assert first_model(listed) == ""


def test_a_service_that_is_not_there_or_refuses_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    load = workload({"kind": "burst"}, requests=2, osl=2.0)
    with pytest.raises(EptwinError, match="cannot reach"):
        bench("http://127.0.0.1:9", load)
    with running_server(FakeEngine(0.005), api_key="s3cret") as (url, _):
        with pytest.raises(EptwinError, match="EPTWIN_API_KEY"):
            bench(url, load)
        monkeypatch.setenv("EPTWIN_API_KEY", "s3cret")
        for auth in ("bearer", "bare"):
            run = bench(url, load, BenchOptions(auth=auth))  # type: ignore[arg-type]
            assert run.result.counts.finished == 2
            assert "s3cret" not in run.result.model_dump_json()


def test_prompts_are_exact_and_repeatable() -> None:
    assert len(prompt_text(1, 2, 100, "bytes", 0.3)) == 100
    assert prompt_text(1, 2, 100, "bytes", 0.3)[:30] == prompt_text(1, 3, 100, "bytes", 0.3)[:30]
    assert prompt_text(1, 2, 100, "bytes", 0.3)[30:] != prompt_text(1, 3, 100, "bytes", 0.3)[30:]
    assert len(prompt_text(1, 2, 100, "words", 0.0).split()) == 100
    assert prompt_text(1, 2, 100, "words", 0.0) == prompt_text(1, 2, 100, "words", 0.0)


CLIENT = """
import sys
from runtime.bench import bench
from twin.spec.workload import WorkloadSpec
run = bench(sys.argv[1], WorkloadSpec.model_validate_json(sys.argv[2]))
print(run.interrupted, run.result.counts.finished > 0, run.result.counts.unfinished, run.result.warnings[0])
"""


def test_interrupt_gives_what_was_measured(url: str) -> None:
    load = workload({"kind": "closed_loop", "concurrency": 4}, requests=1000, osl=10.0)
    client = subprocess.Popen([sys.executable, "-c", CLIENT, url, load.model_dump_json()], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], env=dict(os.environ))
    time.sleep(3.0)
    client.send_signal(signal.SIGINT)
    out, err = client.communicate(timeout=10)
    assert re.match("True True [1-4] interrupted: ", out), (out, err)  # one may have ended just before
