"""Fuzzed from the service's own OpenAPI document, with good and with bad data: no 5xx, nothing undocumented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fake_engine import FakeEngine, running_server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from test_api import call


def bad_data_is_refused(ctx: Any, response: Any, case: Any) -> bool | None:
    """As negative_data_rejection, which does not know that 413 is a refusal too."""
    return None if response.status_code == 413 else negative_data_rejection(ctx, response, case)


CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
          bad_data_is_refused, unsupported_method]
RELAXED = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server(FakeEngine(step_s=0.0005), max_context=48) as (found, _):
        yield found


def fuzz(url: str, mode: GenerationMode, cases: int) -> set[tuple[str, int]]:
    """Send `cases` cases to every operation; returns the (path, status) pairs seen."""
    seen: set[tuple[str, int]] = set()
    for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = found.ok()
        try:
            strategy = operation.as_strategy(generation_mode=mode)

            @settings(max_examples=cases, **RELAXED)
            @given(strategy)
            def one(case: Any) -> None:
                response = case.call_and_validate(checks=CHECKS)
                seen.add((case.path, response.status_code))

            one()
        except Unsatisfiable:
            assert mode == GenerationMode.NEGATIVE, "only routes without input have no bad input"
    return seen


def test_good_and_bad_cases_of_every_route(url: str) -> None:
    good, bad = fuzz(url, GenerationMode.POSITIVE, 20), fuzz(url, GenerationMode.NEGATIVE, 20)
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert (path, 200) in good
        assert (path, 400) in bad


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_five_hundred_cases_a_route(url: str, mode: GenerationMode) -> None:
    assert fuzz(url, mode, 500)


JSON = st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8)
FIELDS = st.sampled_from(["model", "messages", "prompt", "temperature", "top_p", "top_k", "min_p", "seed", "n", "max_tokens",
                          "max_completion_tokens", "stop", "stop_token_ids", "stream", "stream_options", "ignore_eos",
                          "logprobs", "logit_bias", "tools", "response_format", "echo"])


@settings(max_examples=150, **RELAXED)
@given(changes=st.dictionaries(FIELDS, JSON, min_size=1, max_size=3), chat=st.booleans())
def test_any_value_in_any_field(url: str, changes: dict[str, object], chat: bool) -> None:
    """A good request with some fields replaced by anything at all."""
    base = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    status, answer, _ = call(url, "/v1/chat/completions" if chat else "/v1/completions", {**base, "max_tokens": 2, **changes})
    assert status in (200, 400, 404)
    assert status == 200 or len(answer["error"]["message"]) <= 200
