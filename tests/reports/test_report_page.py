"""The page is a view of the files: same bytes every time, the very numbers of the results, nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from page_reader import Page, read_page
from report_results import requests
from report_sample import write_sample

import reports
from reports.render import MAX_BYTES, render
from reports.sections.truth import metric_words
from reports.words import number, signed_percent, text_of
from twin.spec.errors import SpecError
from twin.spec.results import RunResult
from twin.spec.rundir import dump_json, write_run

TITLES = [
    "Verdict",
    "Throughput against speed",
    "Candidates",
    "Why this plan",
    "Topology",
    "Pools",
    "Where a step's time goes",
    "Memory",
    "Latency",
    "Over time",
    "Expert load",
    "Timeline",
    "Assumptions, warnings, sources",
    "Provenance",
]


@pytest.fixture(scope="module")
def page(sample: Path) -> Page:
    return read_page((sample / "report.html").read_text(encoding="utf-8"))


def headings(html: str) -> list[str]:
    return re.findall(r'<h3 id="[^"]+">([^<]+)</h3>', html.replace("&#39;", "'"))


def test_sections_come_in_order(sample: Path) -> None:
    found = headings((sample / "report.html").read_text(encoding="utf-8"))
    assert found[: len(TITLES)] == TITLES
    assert "Predicted against measured" in found[len(TITLES) :]


def test_rendering_again_gives_the_same_bytes(sample: Path, tmp_path: Path) -> None:
    first = (sample / "report.html").read_bytes()
    copy = tmp_path / "elsewhere"
    shutil.copytree(sample, copy)
    assert render(copy).read_bytes() == first
    command = "import sys; from pathlib import Path; from reports.render import render; render(Path(sys.argv[1]))"
    for seed in ("1", "2"):
        (copy / "report.html").unlink()
        subprocess.run(
            [sys.executable, "-c", command, str(copy)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
        )
        assert (copy / "report.html").read_bytes() == first


def at(data: Any, path: str) -> Any:
    """The value at a dotted path; names may hold dots only where no other reading fits."""
    parts = path.split(".")
    while parts:
        head = parts.pop(0)
        if isinstance(data, list):
            data = data[int(head)]
        else:
            while head not in data:
                head += "." + parts.pop(0)
            data = data[head]
    return data


def test_every_number_is_the_file_s_own(sample: Path, page: Page) -> None:
    """Each <data> names file and field: parsed back, it is exactly what the file says."""
    files: dict[str, Any] = {}
    assert len(page.numbers) > 700
    for where, value, _ in page.numbers:
        name, path = where.split("#", 1)
        files.setdefault(name, json.loads((sample / name).read_text(encoding="utf-8")))
        assert float(value) == at(files[name], path), where


@pytest.mark.parametrize(
    "field",
    [
        "latencies.ttft_s.p50",
        "latencies.tpot_s.p99",
        "throughput.output_tok_per_s_per_gpu",
        "throughput.tok_per_s_per_user",
        "cost.usd_per_million_output_tokens",
        "counts.submitted",
        "pools.1.memory.free_bytes",
        "pools.0.breakdown_s.moe/experts",
    ],
)
def test_the_main_numbers_are_shown(page: Page, field: str) -> None:
    assert any(where == f"plan/results.json#{field}" and text.strip() for where, _, text in page.numbers)


def test_a_changed_number_changes_the_page(sample: Path, tmp_path: Path) -> None:
    copy = tmp_path / "changed"
    shutil.copytree(sample, copy)
    result = RunResult.model_validate_json((copy / "plan/results.json").read_text(encoding="utf-8"))
    ttft = result.latencies.ttft_s.model_copy(update={"p50": 0.123456789})
    changed = result.model_copy(update={"latencies": result.latencies.model_copy(update={"ttft_s": ttft})})
    (copy / "plan/results.json").write_text(dump_json(changed), encoding="utf-8")
    html = render(copy).read_text(encoding="utf-8")
    assert (
        '<data value="0.123456789" data-field="plan/results.json#latencies.ttft_s.p50" title="0.123456789">123 ms</data>' in html
    )


def test_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert value is not None
                assert value.startswith(("#", "data:")) or not re.match(r"[a-z+.-]*:|//", value), (tag, name, value)
        assert tag not in ("iframe", "object", "embed", "base", "form")
        assert not [name for name in attributes if name.startswith("on")]


def test_policy_lets_only_the_page_s_own_scripts_run(sample: Path, page: Page) -> None:
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy and "http" not in policy and "unsafe-eval" not in policy
    script_rule = next(rule for rule in policy.split(";") if "script-src" in rule)
    assert "unsafe-inline" not in script_rule
    html = (sample / "report.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    hashes = {base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts}
    assert len(scripts) == 2 and hashes == set(re.findall(r"sha256-([A-Za-z0-9+/=]+)", script_rule))


def test_plotly_is_there_once_and_the_page_is_small(sample: Path) -> None:
    html = (sample / "report.html").read_text(encoding="utf-8")
    assert html.count("* plotly.js v") == 1
    assert len(html.encode()) < 6_500_000 < MAX_BYTES


def test_a_large_run_stays_within_the_limit(sample: Path, tmp_path: Path) -> None:
    big = tmp_path / "big"
    shutil.copytree(sample / "plan", big)
    events = [{"ph": "X", "name": f"step {i}", "pid": i % 64, "tid": i % 3, "ts": i * 10, "dur": 9} for i in range(60_000)]
    write_run(big, requests=requests(9, 20_000, 0.5, 0.02), trace=events)
    page = render(big)
    assert page.stat().st_size < MAX_BYTES
    assert "the middle of the run is drawn" in page.read_text(encoding="utf-8")


REMOVED = {
    "plan/results.json": ["Pools", "Where a step's time goes", "Memory", "Latency", "Over time", "Expert load"],
    "plan/search.json": ["Throughput against speed", "Candidates", "Why this plan"],
    "plan/scenario.yaml": ["Topology"],
    "plan/trace.json": ["Timeline"],
}


@pytest.mark.parametrize("missing", sorted(REMOVED))
def test_without_a_file_its_sections_are_left_out_and_the_page_says_why(sample: Path, tmp_path: Path, missing: str) -> None:
    copy = tmp_path / "run"
    shutil.copytree(sample / "plan", copy / "plan")
    (copy / missing).unlink()
    html = render(copy).read_text(encoding="utf-8")
    text = read_page(html).text
    for title in REMOVED[missing]:
        assert title not in headings(html)
        assert re.search(re.escape(title) + r": .{12,}\.", text), f"no word on why {title} is left out"
    assert "Verdict" in headings(html)


@pytest.mark.parametrize(
    "only", ["results.json", "search.json", "plan.json", "scenario.yaml", "comparison.json", "trace.json", "requests.jsonl"]
)
def test_any_single_file_makes_a_page(sample: Path, tmp_path: Path, only: str) -> None:
    source = sample / only if (sample / only).exists() else sample / "plan" / only
    shutil.copy(source, tmp_path / only)
    html = render(tmp_path).read_text(encoding="utf-8")
    assert "Left out" in html
    assert f'<a href="{only}">' in html


def test_without_requests_the_summaries_remain(sample: Path, tmp_path: Path) -> None:
    shutil.copy(sample / "plan/results.json", tmp_path)
    html = render(tmp_path).read_text(encoding="utf-8")
    assert "Latency" in headings(html)
    assert "No requests.jsonl here" in html
    assert 'id="c1-figure-latency-ttft_s"' not in html


def test_measured_meets_predicted_in_one_chapter(sample: Path, page: Page) -> None:
    html = (sample / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r'<article id="c\d+">', html)) == 2
    assert "there is nothing to compare with" in page.text, "the searched plan was not run"
    fields = {where for where, _, _ in page.numbers}
    assert {
        "predicted/results.json#latencies.ttft_s.p99",
        "measured/results.json#latencies.ttft_s.p99",
        "comparison.json#metrics.0.error",
    } <= fields


def test_ids_are_unique(page: Page) -> None:
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_every_figure_is_described(page: Page) -> None:
    figures = [a for tag, a in page.tags if tag == "div" and a.get("class") == "plot"]
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert len(figures) >= 20
    assert all(a["role"] == "img" and a["aria-describedby"] in ids for a in figures)


def test_an_objective_that_is_missed_is_called_so(page: Page) -> None:
    assert "Predicted: meets its objectives" in page.text
    assert "Measured: misses its objectives: TPOT p95" in page.text


def test_out_and_title(sample: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert render(sample, title="A <b>title</b>", out=out) == out
    page = read_page(out.read_text(encoding="utf-8"))
    assert "A <b>title</b>" in page.text
    linked = [a["href"] for tag, a in page.tags if tag == "a" and (a.get("href") or "").endswith("results.json")]
    assert len(linked) == 3
    assert all((tmp_path / str(href)).resolve().is_file() for href in linked)
    assert not list(tmp_path.glob(".*")), "no temporary file stays"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", "{"),
        ("results.json", "[]"),
        ("search.json", '{"name": 3}'),
        ("trace.json", "nonsense"),
        ("requests.jsonl", "{}\n"),
        ("plan.json", "\0"),
    ],
)
def test_a_damaged_file_is_an_error_not_a_page(sample: Path, tmp_path: Path, name: str, content: str) -> None:
    shutil.copy(sample / "plan/results.json", tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(SpecError, match=re.escape(name)):
        render(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_an_empty_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="holds no results"):
        render(tmp_path)
    with pytest.raises(SpecError, match="not a directory"):
        render(tmp_path / "absent")


def test_runs_may_lie_deeper(tmp_path: Path) -> None:
    write_sample(tmp_path / "local")
    html = render(tmp_path).read_text(encoding="utf-8")
    assert "local/predicted/results.json" in html


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read(scheme: str) -> None:
    """Contrast of the text colours against the card and the page is at least 4.5:1 (WCAG 2 AA)."""
    style = (Path(reports.__file__).parent / "templates" / "style.css.j2").read_text(encoding="utf-8")
    light, dark = style.split("@media (prefers-color-scheme: dark)", 1)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light))
    if scheme == "dark":
        colours |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", dark.split("} }", 1)[0]))
    for ink in ("ink", "soft", "accent", "good", "bad", "warn"):
        for ground in ("card", "page"):
            bright, dim = sorted((luminance(colours[ink]), luminance(colours[ground])), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, f"{ink} on {ground}"


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ttft_s_p50", "TTFT p50"),
        ("decode/step_s_mean", "decode: step mean"),
        ("requests_per_s", "requests/s"),
        ("decode 2/kv_usage_max", "decode 2: KV in use max"),
        ("own_thing", "own_thing"),
    ],
)
def test_metrics_are_named_in_the_field_s_words(name: str, words: str) -> None:
    assert metric_words(name) == words


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0183, "s", "18.3 ms"),
        (2300.5, "", "2,300"),
        (0.4, "%", "40.0%"),
        (2.345, "$", "$2.35"),
        (0.0123, "$", "$0.0123"),
        (None, "s", "–"),
        (18.4e9, "bytes", "17.1 GiB"),
        (12, "", "12"),
        (0.0, "", "0"),
        (3.0, "", "3"),
        (1e300, "", number(1e300)),
    ],
)
def test_numbers_in_words(value: float | None, unit: str, text: str) -> None:
    assert text_of(value, unit) == text


def test_errors_that_round_to_nothing_have_no_sign() -> None:
    assert [signed_percent(e) for e in (-0.0001, 0.0, 0.123, -0.2, None)] == ["0.0%", "0.0%", "+12.3%", "-20.0%", "–"]
