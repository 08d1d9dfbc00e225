"""One self-contained page from the files of a run directory: no clock, no network, the same bytes every time."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from reports.blocks import Block, Chapter, Drawing, Facts, Figure, Links, Table, Text, Tiles
from reports.load import Story, raw_files, read_stories
from reports.sections import candidates, latency, origin, over_time, pools, timeline, topology, truth, verdict
from reports.words import NAME_CHARS, clip
from twin.spec.errors import SpecError
from twin.spec.rundir import write_text

MAX_BYTES = 8_000_000
SECTIONS = (
    verdict.section,
    candidates.pareto,
    candidates.table,
    candidates.explanation,
    topology.section,
    pools.pools,
    pools.breakdown,
    pools.memory,
    latency.section,
    over_time.section,
    pools.experts,
    timeline.section,
    truth.section,
    origin.assumptions,
    origin.provenance,
)


@dataclass(frozen=True)
class Script:
    """A script of the page and the hash under which the page's policy lets it run."""

    text: Markup

    @property
    def sha256(self) -> str:
        return base64.b64encode(hashlib.sha256(self.text.encode()).digest()).decode()


def render(run_dir: Path, *, title: str | None = None, out: Path | None = None) -> Path:
    """Write `report.html` (or `out`) from the files in `run_dir` and its folders; returns its path.

    Depends on nothing but those files: rendering twice gives the same bytes. A section whose file is missing is left
    out, and the page says why. Raises SpecError when the directory holds no run or a file in it is damaged.
    """
    run_dir = Path(run_dir)
    target = Path(out) if out is not None else run_dir / "report.html"
    stories = read_stories(run_dir)
    chapters = tuple(_chapter(story, index, len(stories)) for index, story in enumerate(stories, start=1))
    files = Links(raw_files(run_dir, target.parent))
    page = _page(title or _title(stories), chapters, files)
    size = len(page.encode())
    if size > MAX_BYTES:
        raise SpecError(
            f"the page would have {size:,} bytes",
            file=run_dir,
            expected=f"at most {MAX_BYTES:,}",
            hint="names or texts in the results are extraordinarily long",
        )
    write_text(target, page)
    return target


def _title(stories: tuple[Story, ...]) -> str:
    return " · ".join(dict.fromkeys(clip(story.model, 80) or "run" for story in stories))


def _chapter(story: Story, index: int, chapters: int) -> Chapter:
    """The sections of one story; ids carry the chapter's number, so that they are unique and the same every time."""
    prefix = f"c{index}-"
    sections = []
    for make in SECTIONS:
        section = make(story)
        blocks = tuple(_named(block, prefix) for block in section.blocks)
        sections.append(replace(section, id=prefix + section.id, blocks=blocks))
    names = [name for name in (story.model, story.cluster) if name]
    return Chapter(f"c{index}", clip(" on ".join(names), NAME_CHARS) or f"Run {index}", tuple(sections))


def _named(block: Block, prefix: str) -> Block:
    if isinstance(block, (Table, Figure, Drawing)):
        return replace(block, id=f"{prefix}{type(block).__name__.lower()}-{block.id}")
    return block


def _page(title: str, chapters: tuple[Chapter, ...], files: Links) -> str:
    environment = Environment(
        loader=PackageLoader("reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests |= {
        kind.__name__.lower(): (lambda block, kind=kind: isinstance(block, kind))
        for kind in (Table, Figure, Drawing, Text, Tiles, Facts)
    }
    figures = {
        block.id: block.spec
        for chapter in chapters
        for section in chapter.sections
        for block in section.blocks
        if isinstance(block, Figure)
    }
    templates = resources.files("reports") / "templates"
    plotly = Script(Markup(get_plotlyjs() if figures else ""))  # noqa: S704  plotly's own bundle
    own = Script(Markup((templates / "page.js.j2").read_text(encoding="utf-8")))  # noqa: S704
    return environment.get_template("page.html.j2").render(
        title=title,
        chapters=chapters,
        files=files,
        plotly=plotly,
        own=own,
        figures=_json_in_html(figures),
        style=Markup((templates / "style.css.j2").read_text(encoding="utf-8")),  # noqa: S704
    )


def _json_in_html(data: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, separators=(",", ":"), sort_keys=True, allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)  # noqa: S704
