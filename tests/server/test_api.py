"""The API as clients use it: the target service's own client, OpenAI's shapes, stop strings, usage, metrics."""

from __future__ import annotations

import json
import urllib.request
from http.client import HTTPConnection
from typing import Any

import pytest
from fake_engine import BREAKS, RAISES, TEXT, FakeEngine, wait_until
from prometheus_client.parser import text_string_to_metric_families

Service = tuple[str, FakeEngine]
SHOWN = TEXT.decode()


def call(url: str, path: str, body: object = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    """(status, JSON or text, headers) of one request."""
    host = url.removeprefix("http://")
    connection = HTTPConnection(host, timeout=10)
    data = None if body is None else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, data, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    found = {k.lower(): v for k, v in response.getheaders()}
    return response.status, json.loads(text) if "json" in found.get("content-type", "") else text, found


def chat(url: str, **more: object) -> Any:
    body = {"model": "", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 10, "ignore_eos": True, **more}
    status, answer, _ = call(url, "/v1/chat/completions", body)
    assert status == 200, answer
    return answer


def events(text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_the_target_services_client(service: Service) -> None:
    """Bare token, empty model, content parts; the client indexes choices[0].delta.content of each line unchecked."""
    url, _ = service
    body = {"model": "", "stream": True, "max_tokens": 20, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
            "messages": [{"role": "system", "content": "You help."},
                         {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(),
                                     {"Authorization": "any-token", "Content-Type": "application/json"})
    printed = []
    with urllib.request.urlopen(request, timeout=10) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        for raw in response:
            line = raw.decode().strip()
            if line.startswith("data"):
                data = line[6:]
                if data == "[DONE]":
                    break
                printed.append(json.loads(data)["choices"][0]["delta"]["content"])
    assert len(printed) == 20
    assert "".join(printed) == SHOWN[:20]


def test_chat_has_openais_shape(service: Service) -> None:
    url, engine = service
    answer = chat(url, seed=7, top_k=-1, min_p=0.1)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": SHOWN[:10]}
    assert choice["finish_reason"] == "length"
    prompt_tokens = 1 + 1 + len("user\nhi") + 1 + 1 + len("assistant\n")
    assert answer["usage"] == {"prompt_tokens": prompt_tokens, "completion_tokens": 10, "total_tokens": prompt_tokens + 10}
    params = engine.seen[-1]
    assert (params.seed, params.top_k, params.min_p, params.temperature) == (7, 0, 0.1, 1.0)


def test_first_delta_has_the_role_and_usage_comes_last(service: Service) -> None:
    url, _ = service
    _, text, _ = call(url, "/v1/chat/completions", {
        "messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 3, "stream": True,
        "stream_options": {"include_usage": True}})
    chunks = events(text)
    assert chunks[0]["choices"][0]["delta"] == {"content": "T", "role": "assistant"}
    assert [c["choices"][0]["finish_reason"] for c in chunks[:3]] == [None, None, "length"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert all(c["usage"] is None for c in chunks[:-1])


def test_characters_are_never_split(service: Service) -> None:
    url, _ = service
    _, text, _ = call(url, "/v1/completions", {"prompt": "x", "max_tokens": len(TEXT), "stream": True, "ignore_eos": True})
    pieces = [c["choices"][0]["text"] for c in events(text)]
    assert "".join(pieces) == SHOWN
    assert "é" in pieces
    assert "🦊" in pieces
    assert pieces.count("") == 4  # one byte of é and three of the fox complete nothing


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("stop", "shown"), [("fox", "The quick brown "), (["zzz", "k b"], "The quic"), ("café", None)])
def test_stop_strings_span_tokens_and_free_the_request(service: Service, stop: object, shown: str | None, stream: bool) -> None:
    url, engine = service
    body = {"prompt": "x", "max_tokens": 1000, "stop": stop, "stream": stream, "ignore_eos": True}
    _, answer, _ = call(url, "/v1/completions", body)
    if stream:
        chunks = events(answer)
        text, reason = "".join(c["choices"][0]["text"] for c in chunks), chunks[-1]["choices"][0]["finish_reason"]
    else:
        text, reason = answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]
    assert text == (shown if shown is not None else SHOWN[:SHOWN.index("café")])
    assert reason == "stop"
    wait_until(lambda: not engine.running)


def test_a_stop_string_that_never_completes_is_shown(service: Service) -> None:
    url, _ = service
    _, answer, _ = call(url, "/v1/completions", {"prompt": "x", "max_tokens": 9, "stop": "quick!", "ignore_eos": True})
    assert answer["choices"][0]["text"] == "The quick"
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [True, False])
def test_n_choices_and_lists_of_prompts(service: Service, stream: bool) -> None:
    url, engine = service
    _, answer, _ = call(url, "/v1/completions", {"prompt": ["ab", "abcd"], "n": 2, "max_tokens": 5, "seed": 3,
                                                 "stream": stream, "stream_options": {"include_usage": True}})
    if stream:
        chunks = events(answer)
        usage = chunks.pop()["usage"]
        indices = {c["choices"][0]["index"] for c in chunks}
    else:
        usage, indices = answer["usage"], {c["index"] for c in answer["choices"]}
    assert indices == {0, 1, 2, 3}
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (6, 20)
    assert [p.seed for p in engine.seen[-4:]] == [3, 4, 3, 4]


def test_token_ids_as_prompt_and_stop_token(service: Service) -> None:
    url, _ = service
    _, answer, _ = call(url, "/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 50, "stop_token_ids": [ord("q")]})
    assert answer["choices"][0] == {"index": 0, "text": "The ", "logprobs": None, "finish_reason": "stop"}
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 5


def test_a_failing_request_fails_alone(service: Service) -> None:
    url, _ = service
    status, answer, _ = call(url, "/v1/completions", {"prompt": RAISES, "max_tokens": 5})
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert "bug" not in json.dumps(answer)
    status, answer, headers = call(url, "/v1/completions", {"prompt": BREAKS, "max_tokens": 5})
    assert status == 503
    assert int(headers["retry-after"]) >= 1
    _, text, _ = call(url, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2})
    assert text["choices"][0]["message"]["content"] == "Th"
    _, text, _ = call(url, "/v1/completions", {"prompt": BREAKS, "max_tokens": 5, "stream": True})
    broken = events(text)[-1]
    assert broken["error"]["code"] == "engine_failed"
    assert broken["choices"][0]["text"] == ""


def test_models_probes_and_load(service: Service) -> None:
    url, _ = service
    _, models, _ = call(url, "/v1/models")
    assert models["data"][0]["id"] == "tiny"
    assert call(url, "/health")[0] == call(url, "/livez")[0] == call(url, "/readyz")[0] == 200
    assert call(url, "/load")[1] == {"server_load": 0}


def test_metrics_parse_and_count(service: Service) -> None:
    url, _ = service

    def read() -> dict[str, float]:
        _, text, headers = call(url, "/metrics")
        assert headers["content-type"].startswith("text/plain")
        return {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples}

    before = read()
    chat(url, max_tokens=7)
    after = read()
    assert after["eptwin:generation_tokens_total"] - before["eptwin:generation_tokens_total"] == 7
    assert after["eptwin:time_to_first_token_seconds_count"] - before["eptwin:time_to_first_token_seconds_count"] == 1
    assert after["eptwin:inter_token_latency_seconds_count"] - before["eptwin:inter_token_latency_seconds_count"] == 6
    assert after["eptwin:num_requests_running"] == 0


def test_no_series_come_from_what_clients_send(service: Service) -> None:
    url, _ = service
    call(url, "/metrics")  # counts itself, so that its own series exist
    call(url, "/v1/models/none")
    series = len(call(url, "/metrics")[1].splitlines())
    for i in range(100):
        assert call(url, f"/nowhere/{i}", {"model": f"m{i}"})[0] == 404
        assert call(url, "/v1/completions", {"prompt": "x", "model": f"m{i}"})[0] == 404
    assert len(call(url, "/metrics")[1].splitlines()) == series
