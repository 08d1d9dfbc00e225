"""The service while its engine re-forms: alive, not ready, and honest about when to come back."""

from __future__ import annotations

import http.client
import json
import threading
import time
from typing import Any

from chaos_kit import plan_of
from runtime_checkpoints import Checkpoint, Checkpoints

from runtime.frontend import Frontend
from runtime.gateway import GatewayServer, GatewaySettings, create_app, listen
from runtime.options import EngineOptions
from runtime.tokenizer import ByteTokenizer


def serve(made: Checkpoint, faults: str) -> tuple[GatewayServer, threading.Thread, int]:
    options = EngineOptions(checkpoint=str(made.folder), recover=True, faults=faults)
    settings = GatewaySettings(model_name="tiny")
    app = create_app(lambda: Frontend(plan_of({"role": "mixed"}), made.model, options), ByteTokenizer(260), settings)
    ports: list[int] = []
    server = GatewayServer(app, settings, on_start=ports.append)
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not ports:
        assert thread.is_alive() and time.monotonic() < until, "the service did not start"
        time.sleep(0.02)
    return server, thread, ports[0]


def call(port: int, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, str], dict[str, Any]]:
    """(status, headers, JSON) of a GET, or of a POST with a body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        text = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, text, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, json.loads(answer.read())
    finally:
        connection.close()


def wait(port: int, *, until_ready: bool, limit_s: float) -> None:
    until = time.monotonic() + limit_s
    while (call(port, "/readyz")[0] == 200) != until_ready:
        assert time.monotonic() < until, f"readiness never became {until_ready}"
        time.sleep(0.01)


def test_a_service_of_one_rank_that_dies(checkpoints: Checkpoints) -> None:
    """The rank dies at rest after the first answer; a new process takes its seat, and answers as the old one did."""
    made = checkpoints["qwen3_moe"]
    server, thread, port = serve(made, "0:idle:kill:2")
    ask = {"model": "tiny", "prompt": made.prompts[0], "max_tokens": 6, "temperature": 0}
    try:
        status, _, first = call(port, "/v1/completions", ask)
        assert status == 200
        wait(port, until_ready=False, limit_s=10)
        status, headers, error = call(port, "/v1/completions", ask)
        assert status == 503
        assert int(headers["retry-after"]) >= 1
        assert error["error"]["type"]
        status, headers, _ = call(port, "/readyz")
        assert (status, headers["retry-after"]) == (503, "2")
        assert call(port, "/livez")[0] == 200
        wait(port, until_ready=True, limit_s=30)
        _, _, again = call(port, "/v1/completions", ask)
        assert again["choices"] == first["choices"]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
