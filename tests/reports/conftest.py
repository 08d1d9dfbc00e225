"""Fixtures: a complete run directory, and a browser where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_sample import write_sample

from reports.render import render


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with every kind of file, and its report. Not to be changed."""
    run_dir = write_sample(tmp_path_factory.mktemp("report") / "run")
    render(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium under playwright. Skips where either is missing. Of a module, since its event loop must not outlive it."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed, so no page was opened")
    path = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no chromium on this machine, so no page was opened")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()
