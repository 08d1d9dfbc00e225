"""With a key set, every route but /livez wants it, in either form; the routes are read from the service itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_engine import FakeEngine, running_server
from test_api import call


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server(FakeEngine(step_s=0.005), api_key="s3cret") as (found, _):
        yield found


def test_every_route_is_closed(url: str) -> None:
    status, document, _ = call(url, "/openapi.json", Authorization="s3cret")
    assert status == 200
    routes = [(path, method) for path, item in document["paths"].items() for method in item]
    assert len(routes) >= 8
    for path, method in [*routes, ("/openapi.json", "get"), ("/nowhere", "get"), ("/livez/", "get"), ("/docs", "get")]:
        status, body, headers = call(url, path, {} if method == "post" else None)
        assert status == (200 if path == "/livez" else 401), path
        if status == 401:
            assert body["error"]["code"] == "invalid_api_key"
            assert headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("value", ["s3cret", "Bearer s3cret", "bearer s3cret", "  s3cret "])
def test_both_forms_open(url: str, value: str) -> None:
    assert call(url, "/v1/models", Authorization=value)[0] == 200


@pytest.mark.parametrize("value", ["", "s3cre", "s3crets", "Bearer", "Bearer ", "Basic s3cret", "Bearer Bearer s3cret",
                                   "\xff\xfe"])
def test_wrong_keys_do_not(url: str, value: str) -> None:
    assert call(url, "/v1/models", Authorization=value)[0] == 401


def test_a_refused_client_sends_no_body(url: str) -> None:
    """401 comes from the headers alone; the body is not read."""
    assert call(url, "/v1/completions", {"prompt": "x" * 2_000_000})[0] == 401
