"""The page in a browser with the network watched: it draws, it sorts, it runs nothing that it was not given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from report_sample import write_sample
from test_report_hostile import SCRIPT

from reports.render import render


@contextmanager
def opened(browser: Any, path: Path, address: str = "", **options: Any) -> Iterator[tuple[Any, list[str]]]:
    """The page once its figures are drawn, and everything that must not have happened."""
    context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}, "offline": True, **options})
    page, bad = context.new_page(), []
    page.on("dialog", lambda dialog: (bad.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("console", lambda message: bad.append(f"console {message.text}") if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: bad.append(f"error {error}"))
    page.on(
        "request",
        lambda request: (
            bad.append(f"request {request.url}") if request.url.split(":")[0] not in ("file", "data", "blob") else None
        ),
    )
    page.goto(path.as_uri() + address)
    page.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)
    try:
        yield page, bad
    finally:
        context.close()


@pytest.fixture(scope="module")
def page(sample: Path, browser: Any) -> Iterator[tuple[Any, list[str]]]:
    with opened(browser, sample / "report.html") as found:
        yield found


def test_opens_offline_and_draws_every_figure(page: tuple[Any, list[str]]) -> None:
    shown, bad = page
    assert shown.locator(".plot").count() >= 20
    assert shown.locator(".plot:not(:has(svg.main-svg))").count() == 0
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page itself never scrolls sideways"
    assert bad == []


def test_narrow_and_dark(sample: Path, browser: Any) -> None:
    phone = {"viewport": {"width": 390, "height": 800}, "color_scheme": "dark", "has_touch": True, "is_mobile": True}
    with opened(browser, sample / "report.html", **phone) as (page, bad):
        assert page.locator(".modebar-btn").count() == 0, "buttons would stand over the figures where nothing hovers"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 20, 27)"
        assert page.evaluate("getComputedStyle(document.querySelector('.plot text')).fill") == "rgb(228, 232, 238)"
        assert bad == []


def test_a_click_on_a_point_finds_its_row(page: tuple[Any, list[str]]) -> None:
    shown, _ = page
    shown.evaluate("document.getElementById('c1-figure-pareto').emit('plotly_click', {points: [{customdata: 7}]})")
    assert shown.locator("#c1-table-candidates tr.picked td").first.text_content() == "7"


def test_table_sorts_filters_and_keeps_its_state_in_the_address(sample: Path, browser: Any, page: tuple[Any, list[str]]) -> None:
    shown, bad = page
    table = shown.locator("#c1-table-candidates")
    rows = table.locator("tbody tr:not([hidden])")
    everything = rows.count()
    heading = table.locator("th", has_text="tok/s/user")
    column = heading.evaluate("th => th.cellIndex")
    for direction in (1, -1):
        heading.locator("button").click()
        values = rows.evaluate_all(f"rows => rows.map(r => Number(r.cells[{column}].querySelector('data').value))")
        assert len(values) == everything
        assert values == sorted(values, reverse=direction < 0)
    shown.locator("#c1-candidates input[type=search]").fill("misses")
    assert 0 < rows.count() < everything
    address, kept = shown.evaluate("location.hash"), rows.all_text_contents()
    assert bad == []
    with opened(browser, sample / "report.html", address) as (again, _):
        assert again.locator("#c1-table-candidates tbody tr:not([hidden])").all_text_contents() == kept


def test_hostile_names_run_nothing(tmp_path: Path, browser: Any) -> None:
    report = render(write_sample(tmp_path / "run", lambda name: f"{SCRIPT}{name}"[:200]))
    with opened(browser, report) as (page, bad):
        assert page.locator("img").count() == 0
        assert page.get_by_text(f"{SCRIPT}deepseek-r1").count() > 0
        legends = page.locator("#c1-figure-steps-prefill .legendtext").all_text_contents()
        assert legends and all(text.startswith("</script><img src=x onerror=") for text in legends)
        assert bad == []
