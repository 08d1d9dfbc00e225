"""Names from strangers are shown as written, everywhere, and never run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from page_reader import read_page
from report_sample import write_sample

from reports.render import MAX_BYTES, render
from reports.sections.timeline import spans_of

SCRIPT = "</script><img src=x onerror=alert(1)><script>alert(2)</script>"
HOSTILE = {
    "script": SCRIPT,
    "template": "{{7*7}}{% for x in y %}${7*7}",
    "attribute": '" onmouseover="alert(1)" x=\'',
    "comment": "--><!--<svg onload=alert(1)>",
    "link": "<a href='javascript:alert(1)'>x</a>javascript:alert(1)",
    "right-to-left": "abc\u202e\u2066gnp.exe\u2069",
    "entities": "&lt;b&gt;&amp;amp;",
    "unicode": "𝕏 ✓ \u2028 \u00a0 é",
    "formula": "=cmd|'/c calc'!A1",
}


def page_of(tmp_path: Path, text: str) -> Path:
    """A report in which every name and text is the hostile one (with something behind it where names must differ)."""
    return render(write_sample(tmp_path / "run", lambda name: f"{text}{name}"[:200]))


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_hostile_names_are_shown_literally(tmp_path: Path, kind: str) -> None:
    text = HOSTILE[kind]
    html = page_of(tmp_path, text).read_text(encoding="utf-8")
    page = read_page(html)
    plain = {tag for tag, _ in page.tags}
    assert not plain & {"img", "iframe"}
    assert [a for tag, a in page.tags if tag == "script"] == [{"type": "application/json", "id": "figures"}, {}, {}]
    assert not [name for _, a in page.tags for name in a if name.startswith("on")]
    for word in (
        "deepseek-r1",
        "4 nodes of 8 H200",
        "prompts share no prefix",
        "3 points lay outside the profile",
        "Decode at EP16 reads each expert",
        "moe/experts",
        "8 cores, 64 GiB",
        "h200-eptwin",
        "eptwin plan r1_chat",
    ):
        assert f"{text}{word}" in page.text, f"{word} is not shown literally"
    if kind == "template":
        assert "49" not in page.text.replace("{{7*7}}", "").split("Provenance")[-1].split("Raw files")[0]


def test_figures_hold_no_markup_from_names(tmp_path: Path) -> None:
    """Plotly reads tags in labels; names must reach it escaped."""
    html = page_of(tmp_path, SCRIPT).read_text(encoding="utf-8")
    figures = html.split('id="figures">', 1)[1].split("</script>", 1)[0]
    assert "<" not in figures
    found: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            [walk(v) for v in value.values()]
        elif isinstance(value, list):
            [walk(v) for v in value]
        elif isinstance(value, str):
            found.append(
                value.replace("<b>", "", 1)
                .replace("</b>", "", 1)
                .replace("<br>", "")
                .replace("<extra></extra>", "")
                .replace("<extra>predicted</extra>", "")
                .replace("<extra>measured</extra>", "")
            )

    walk(json.loads(figures))
    assert len(found) > 500
    assert not [text for text in found if "<" in text]
    assert any("&lt;/script&gt;&lt;img src=x" in text for text in found)


def test_very_long_names(tmp_path: Path) -> None:
    """10,000 characters in every field that allows it: shown, and the page stays within its limit."""
    long = "L" * 10_000
    bounded = {"chosen", "pair", "tiny-moe", "deepseek-r1", "chat", "question", "4 nodes of 8 H200", "this machine"}

    def named(name: str) -> str:
        if name in {"H200", "CPU"}:
            return long[:70] + name
        return (long[:150] if name in bounded else long) + name

    path = render(write_sample(tmp_path / "run", named))
    assert path.stat().st_size < MAX_BYTES
    text = read_page(path.read_text(encoding="utf-8")).text
    assert long + "run of 1" in text, "a name is shown whole"
    assert "more characters)" in text, "and text in tables says how much is not shown"


def test_a_malformed_trace_is_skipped_over() -> None:
    good = {"ph": "X", "name": "step", "pid": 0, "tid": 0, "ts": 5, "dur": 7}
    bad: list[Any] = [
        {},
        {"ph": "X"},
        {**good, "ts": "soon"},
        {**good, "dur": None},
        {**good, "ts": float("nan")},
        {**good, "ts": True},
        3,
        "x",
        None,
        {"ph": "M", "name": "process_name", "args": 3},
        {**good, "name": {"a": 1}, "pid": [1]},
    ]
    spans = spans_of([*bad, good])
    assert [s.name for s in spans] == ["step", "{'a': 1}"] or [s.name for s in spans] == ["{'a': 1}", "step"]
    assert spans_of([{**good, "name": "\ud800"}])[0].name == "?"


def test_transfers_are_paired_from_begin_to_end() -> None:
    """Two transfers that overlap keep their own ends; one that never ends is not drawn."""
    both = {"name": "KV", "cat": "kv", "pid": 0, "tid": 0}
    events = [
        {**both, "ph": "b", "id": 1, "ts": 10},
        {**both, "ph": "b", "id": 2, "ts": 20},
        {**both, "ph": "b", "id": 3, "ts": 30},
        {**both, "ph": "e", "id": 1, "ts": 110},
        {**both, "ph": "e", "id": 2, "ts": 50},
        {**both, "ph": "e", "id": 9, "ts": 60},
    ]
    spans = spans_of(events)
    assert [(s.kind, round(s.start_s * 1e6), round(s.length_s * 1e6)) for s in spans] == [
        ("KV transfer", 10, 100),
        ("KV transfer", 20, 30),
    ]
