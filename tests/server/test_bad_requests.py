"""Every bad request gets a prompt 4xx in OpenAI's shape that repeats nothing, and the service lives on."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import time
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest
from fake_engine import FakeEngine, running_server

MARK = "Zebra" * 60
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
TEXT = {"prompt": "x", "max_tokens": 2}


def chat(**more: object) -> bytes:
    return json.dumps({**CHAT, **more}).encode()


def text(**more: object) -> bytes:
    return json.dumps({**TEXT, **more}).encode()


C, T = "/v1/chat/completions", "/v1/completions"
BAD: dict[str, tuple[str, bytes, int]] = {
    "not json": (C, b"{" + MARK.encode(), 400),
    "empty body": (C, b"", 400),
    "array": (C, b"[]", 400),
    "string": (C, json.dumps(MARK).encode(), 400),
    "invalid utf-8": (C, b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', 400),
    "lone surrogate": (C, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    "surrogate as key": (C, b'{"messages": [{"role": "user", "content": "x"}], "stream_options": {"include_usage": "\\ud800"}}',
                         400),
    "surrogate model": (C, chat()[:-1] + b', "model": "\\ud800"}', 400),
    "nan temperature": (C, chat()[:-1] + b', "temperature": NaN}', 400),
    "infinite top_p": (C, chat()[:-1] + b', "top_p": 1e999}', 400),
    "huge integer": (C, chat()[:-1] + b', "max_tokens": ' + b"9" * 4000 + b"}", 400),
    "5000 digits": (C, chat()[:-1] + b', "max_tokens": ' + b"9" * 5000 + b"}", 400),
    "deep json": (C, b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400),
    "deep unknown field": (C, chat()[:-1] + b', "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400),
    "negative temperature": (C, chat(temperature=-0.1), 400),
    "hot": (C, chat(temperature=1e6), 400),
    "top_p 0": (C, chat(top_p=0), 400),
    "top_k -2": (C, chat(top_k=-2), 400),
    "min_p 2": (C, chat(min_p=2), 400),
    "seed too long": (C, chat(seed=2**70), 400),
    "n 1e6": (C, chat(n=1_000_000), 400),
    "n 0": (C, chat(n=0), 400),
    "n as text": (C, chat(n="2"), 400),
    "prompts x n": (T, text(prompt=["a"] * 8, n=2), 400),
    "max_tokens 0": (C, chat(max_tokens=0), 400),
    "max_tokens negative": (C, chat(max_tokens=-5), 400),
    "max_tokens beyond context": (C, chat(max_tokens=1_000_000), 400),
    "max_tokens as float": (C, chat(max_tokens=2.5), 400),
    "max_tokens as boolean": (C, chat(max_tokens=True), 400),
    "prompt beyond context": (T, text(prompt="x" * 5000), 400),
    "empty prompt": (T, text(prompt=""), 400),
    "empty list": (T, text(prompt=[]), 400),
    "empty list in list": (T, text(prompt=[[]]), 400),
    "token beyond vocabulary": (T, text(prompt=[512]), 400),
    "negative token": (T, text(prompt=[-1]), 400),
    "mixed prompt": (T, text(prompt=["a", 1]), 400),
    "no messages": (C, b'{"model": ""}', 400),
    "messages empty": (C, chat(messages=[]), 400),
    "messages as text": (C, chat(messages=MARK), 400),
    "unknown role": (C, chat(messages=[{"role": MARK, "content": "x"}]), 400),
    "image part": (C, chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": MARK}]}]), 400),
    "content a number": (C, chat(messages=[{"role": "user", "content": 5}]), 400),
    "10k stops": (C, chat(stop=["a"] * 10_000), 400),
    "empty stop": (C, chat(stop=""), 400),
    "long stop": (C, chat(stop="a" * 200), 400),
    "logit_bias of 1e4 keys": (C, chat(logit_bias={str(i): 1 for i in range(10_000)}), 400),
    "logprobs": (C, chat(logprobs=True), 400),
    "completion logprobs 0": (T, text(logprobs=0), 400),
    "tools": (C, chat(tools=[{"type": "function"}]), 400),
    "json mode": (C, chat(response_format={"type": "json_object"}), 400),
    "penalty": (C, chat(frequency_penalty=0.5), 400),
    "stream as text": (C, chat(stream="yes"), 400),
    "unknown model": (C, chat(model="gpt-4"), 404),
    "long model name": (C, chat(model=MARK), 400),
    "2 MiB": (C, chat(user="x" * (2 << 20)), 413),
}


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[str, FakeEngine]]:
    engine = FakeEngine(step_s=0.005)
    with running_server(engine, body_timeout_s=0.6, idle_timeout_s=1.0) as (url, _):
        yield url, engine


def post(url: str, path: str, body: bytes | Iterator[bytes], **headers: str) -> tuple[int, bytes, float]:
    connection = HTTPConnection(url.removeprefix("http://"), timeout=10)
    start = time.monotonic()
    # A refusal may come before all of the body is sent; then the answer is there to read.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, data, time.monotonic() - start


def refused(status: int, data: bytes, expected: int) -> None:
    assert status == expected, data[:300]
    error = json.loads(data)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) <= 200
    assert b"Zebra" not in data


@pytest.mark.parametrize("name", BAD)
def test_bad_body(service: tuple[str, FakeEngine], name: str) -> None:
    url, engine = service
    before = engine.submitted
    path, body, expected = BAD[name]
    status, data, took_s = post(url, path, body)
    refused(status, data, expected)
    assert took_s < 5, "a refusal waits for nothing"
    assert engine.submitted == before, "the engine heard of a bad request"
    assert post(url, T, text())[0] == 200


def test_bad_envelopes(service: tuple[str, FakeEngine]) -> None:
    url, _ = service
    refused(*post(url, C, gzip.compress(b"0" * 10_000_000), **{"Content-Encoding": "gzip"})[:2], 415)
    refused(*post(url, C, chat(), **{"Content-Type": "text/plain"})[:2], 400)
    refused(*post(url, C, chat(), **{"X-Long": "Zebra" * 7000})[:2], 431)
    refused(*post(url, C, (b"x" * 65536 for _ in range(40)))[:2], 413)  # chunked: no Content-Length to look at
    refused(*post(url, "/v1/models", chat())[:2], 405)
    refused(*post(url, "/v1/embeddings", chat())[:2], 404)


@pytest.mark.parametrize("raw", [
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: zebra\r\n\r\n",
    b"\x00\x01\x02\r\n\r\n",
])
def test_broken_http_is_refused(service: tuple[str, FakeEngine], raw: bytes) -> None:
    url, _ = service
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5) as connection:
        connection.sendall(raw)
        line = connection.recv(4096).split(b"\r\n", 1)[0]
    assert line.split()[1][:1] in (b"4", b"5")
    assert line.split()[1] != b"500"
    assert post(url, T, text())[0] == 200


@pytest.mark.parametrize("raw", [
    b"",
    b"POST /v1/completions HT",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
])
def test_slow_senders_are_closed(service: tuple[str, FakeEngine], raw: bytes) -> None:
    url, _ = service
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5) as connection:
        connection.sendall(raw)
        start = time.monotonic()
        answer = connection.recv(4096)
        assert answer == b"" or b" 408 " in answer
        assert time.monotonic() - start < 3
    assert post(url, T, text())[0] == 200


def test_good_requests_with_odd_but_legal_parts(service: tuple[str, FakeEngine]) -> None:
    url, _ = service
    for body in (chat(logprobs=False, tools=[], logit_bias={}, frequency_penalty=0, presence_penalty=0.0, user="me",
                      response_format={"type": "text"}, metadata={"a": "b"}),
                 chat(messages=[{"role": "user", "content": "\x00 \u202e", "name": "x"}, {"role": "assistant", "content": None}]),
                 chat(stop=None, seed=-1, model=None), chat(stream_options=None)):
        status, data, _ = post(url, C, body)
        assert status == 200, data
