"""A service over a fake engine, shared by the quick tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_engine import FakeEngine, running_server


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[str, FakeEngine]]:
    """(base URL, engine) with steps of 5 ms, so that tests are quick."""
    engine = FakeEngine(step_s=0.005)
    with running_server(engine) as (url, _):
        yield url, engine
