"""Requests that do not end well: clients that vanish or do not read, overload, and the service's own end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import aiohttp
import pytest
from fake_engine import FakeEngine, running_server, wait_until
from test_api import call

from runtime.bench import bench
from twin.spec.workload import WorkloadSpec

LONG = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True}
STEP_S = 0.02


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def open_request(url: str, **more: object) -> socket.socket:
    body = json.dumps({**LONG, **more}).encode()
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_vanish_free_their_requests_within_a_step(stream: bool) -> None:
    engine = FakeEngine(STEP_S, slots=10)
    with running_server(engine) as (url, _):
        clients = [open_request(url, stream=stream) for _ in range(20)]
        wait_until(lambda: len(engine.running) == 10 and len(engine.waiting) == 10)
        if stream:
            wait_until(lambda: engine.steps > 3)
        for client in clients:
            client.close()
        assert wait_until(lambda: not engine.running and not engine.waiting) < STEP_S + 0.25
        assert engine.cancelled == 20
        wait_until(lambda: call(url, "/load")[1] == {"server_load": 0})
        start = time.monotonic()
        assert call(url, "/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200
        assert time.monotonic() - start < 5 * STEP_S + 5


def test_every_choice_of_a_vanished_client_is_cancelled() -> None:
    engine = FakeEngine(STEP_S)
    with running_server(engine) as (url, _):
        client = open_request(url, n=4, stream=True)
        wait_until(lambda: len(engine.running) == 4)
        client.close()
        wait_until(lambda: not engine.running, 5)


def test_long_requests_with_short_timeouts_then_one() -> None:
    """200 clients give up after half a second; the next one is answered at once."""
    engine = FakeEngine(STEP_S, slots=64)

    async def load(url: str) -> int:
        timeout = aiohttp.ClientTimeout(total=0.5)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            async def one() -> bool:
                try:
                    async with session.post(f"{url}/v1/completions", json=LONG) as response:
                        await response.read()
                        return False
                except TimeoutError:
                    return True
            return sum(await asyncio.gather(*(one() for _ in range(200))))

    with running_server(engine) as (url, _):
        assert run(load(url)) == 200
        start = time.monotonic()
        assert call(url, "/v1/completions", {"prompt": "x", "max_tokens": 3})[0] == 200
        assert time.monotonic() - start < 10
        wait_until(lambda: not engine.running and not engine.waiting)


def test_overload_is_refused_at_once_and_the_admitted_are_served() -> None:
    engine = FakeEngine(STEP_S)

    async def offer(url: str, count: int) -> list[tuple[int, float, str | None]]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            async def one() -> tuple[int, float, str | None]:
                start = time.monotonic()
                body = {"prompt": "x", "max_tokens": 30, "stream": True, "ignore_eos": True}
                async with session.post(f"{url}/v1/completions", json=body) as response:
                    headers_s = time.monotonic() - start
                    assert (await response.text()).endswith("[DONE]\n\n") == (response.status == 200)
                    return response.status, headers_s, response.headers.get("Retry-After")
            return await asyncio.gather(*(one() for _ in range(count)))

    with running_server(engine, max_outstanding=16) as (url, _):
        answers = run(offer(url, 64))
        served = [a for a in answers if a[0] == 200]
        refused = [a for a in answers if a[0] == 429]
        assert len(served) == 16
        assert len(refused) == 48
        assert all(int(retry or 0) >= 1 and took_s < 5 for _, took_s, retry in refused)
        assert len([a for a in run(offer(url, 16)) if a[0] == 200]) == 16


def test_the_engines_own_refusal_keeps_its_status() -> None:
    with running_server(FakeEngine(STEP_S, max_waiting=0)) as (url, _):
        status, body, headers = call(url, "/v1/completions", {"prompt": "x"})
        assert (status, headers["retry-after"], body["error"]["type"]) == (429, "2", "rate_limit_error")


def test_a_reader_that_stalls_is_cut_off_and_others_are_not_slowed() -> None:
    engine = FakeEngine(0.001)
    with running_server(engine, write_timeout_s=0.5, max_context=200_000) as (url, _):
        sluggish = socket.socket()
        sluggish.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sluggish.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        body = json.dumps({**LONG, "max_tokens": 150_000, "stream": True, "n": 8}).encode()
        sluggish.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                         b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: len(engine.running) == 8)
        status, _, _ = call(url, "/v1/completions", {"prompt": "x", "max_tokens": 50})
        assert status == 200
        wait_until(lambda: not engine.running, 20)
        assert engine.cancelled == 8
        sluggish.close()


def test_first_tokens_do_not_wait_for_acknowledgements() -> None:
    """Headers and first event are two small writes; without TCP_NODELAY the second waits 40 ms for the client's ACK."""
    load = WorkloadSpec.model_validate({"arrivals": {"kind": "closed_loop", "concurrency": 1}, "isl": {"mean": 5.0},
                                        "osl": {"mean": 8.0}, "requests": 20})
    with running_server(FakeEngine(0.004)) as (url, _):
        ttft_s = bench(url, load).result.latencies.ttft_s.p50
    assert ttft_s is not None
    assert ttft_s < 0.03


def test_idle_sockets_do_not_slow_others_and_are_closed() -> None:
    engine = FakeEngine(STEP_S)
    with running_server(engine, idle_timeout_s=3.0) as (url, _):
        port = int(url.rpartition(":")[2])
        idle = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(400)]
        start = time.monotonic()
        assert call(url, "/v1/completions", {"prompt": "x", "max_tokens": 20})[0] == 200
        assert time.monotonic() - start < 20 * STEP_S + 10.0
        assert {connection.recv(1) for connection in idle} == {b""}
        for connection in idle:
            connection.close()


SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
from fake_engine import FakeEngine
from runtime.gateway import GatewaySettings, serve
engine = FakeEngine(0.02)
serve(lambda: engine, settings=GatewaySettings("tiny", 4096, drain_s=float(sys.argv[2])), vocab=512, port=0,
      on_start=lambda port: print(port, flush=True))
print("stopped", len(engine.running), flush=True)
"""


def start_server(drain_s: float) -> tuple[subprocess.Popen[str], str]:
    here = Path(__file__).parent
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(here), str(drain_s)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd=here.parents[1],
                               env={**os.environ, "EPTWIN_API_KEY": "from-env"})
    assert process.stdout is not None
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}"


@pytest.mark.parametrize(("tokens", "drain_s", "ends_whole"), [(40, 10.0, True), (3000, 1.0, False)])
def test_sigterm_drains(tokens: int, drain_s: float, ends_whole: bool) -> None:
    process, url = start_server(drain_s)
    try:
        assert call(url, "/readyz")[0] == 401, "the key from the environment is in force"
        body = {**LONG, "max_tokens": tokens, "stream": True}

        async def stream_through_sigterm() -> bytes:
            async with aiohttp.ClientSession(headers={"Authorization": "from-env"}) as session, \
                    session.post(f"{url}/v1/completions", json=body) as response:
                received = await response.content.readline()
                process.send_signal(signal.SIGTERM)
                try:
                    return received + await response.read()
                except aiohttp.ClientError:
                    return received

        received = run(stream_through_sigterm())
        assert received.endswith(b"data: [DONE]\n\n") == ends_whole
        out, _ = process.communicate(timeout=drain_s + 5)
        assert process.returncode == 0
        assert "stopped 0" in out
        with pytest.raises(ConnectionRefusedError):
            call(url, "/livez")
    finally:
        process.kill()
        process.communicate()


def test_only_loopback_listens() -> None:
    process, url = start_server(1.0)
    try:
        port = int(url.rpartition(":")[2])
        listening = [line.split()[1] for name in ("tcp", "tcp6") if Path(f"/proc/net/{name}").exists()
                     for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:] if line.split()[3] == "0A"]
        assert [a for a in listening if int(a.rpartition(":")[2], 16) == port] == [f"0100007F:{port:04X}"]
    finally:
        process.terminate()
        process.communicate(timeout=10)


def test_an_engine_that_does_not_start_stops_the_service() -> None:
    from runtime.gateway import GatewaySettings, serve
    from twin.spec.errors import RankFailed

    class Broken(FakeEngine):
        async def start(self) -> None:
            raise RankFailed("rank 1 died", rank=1)

    with pytest.raises(RankFailed, match="rank 1"):
        serve(Broken, settings=GatewaySettings("tiny", 4096), vocab=512, port=0)


def test_an_engine_that_fails_later_ends_the_service() -> None:
    """For a moment clients and probes hear 503, then `serve` raises what happened."""
    from runtime.gateway import GatewaySettings, serve
    from twin.spec.errors import RankFailed

    seen: list[tuple[str, int]] = []

    def probe(port: int) -> None:
        url = f"http://127.0.0.1:{port}"
        engine.failure = RankFailed("rank 1 died", rank=1)
        seen.extend((path, call(url, path)[0]) for path in ("/livez", "/readyz", "/health", "/metrics"))

    engine = FakeEngine(STEP_S)
    settings = GatewaySettings("tiny", failed_s=2.5)
    with pytest.raises(RankFailed, match="rank 1 died"):
        serve(lambda: engine, settings=settings, vocab=512, port=0,
              on_start=lambda port: threading.Thread(target=probe, args=(port,)).start())
    assert seen == [("/livez", 200), ("/readyz", 503), ("/health", 503), ("/metrics", 200)]
