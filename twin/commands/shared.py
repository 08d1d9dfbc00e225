"""What commands have in common: options, progress on stderr, tables, and worker processes."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from twin.spec.options import out_folder

overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change one field of the scenario, e.g. workload.arrivals.rate_per_s=30. Repeatable.",
)
out_option = click.option("--out", type=click.Path(path_type=Path), callback=out_folder,
                          help="Write a run directory here (with report.html).")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout and nothing else.")
workers_option = click.option(
    "--workers",
    type=click.IntRange(0, 256),
    default=None,
    help="Work in this many processes (0: in this one). Default: one a core. The answer is the same.",
)


def say(text: str = "") -> None:
    """A word to the person, on stderr."""
    click.echo(text, err=True)


class Progress:
    """One line on stderr that is rewritten when it is a terminal; a line every few seconds when it is not."""

    def __init__(self) -> None:
        self.tty = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        self.last = 0.0
        self.width = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last < (0.1 if self.tty else 5.0) and done != total:
            return
        self.last = now
        text = f"{stage}: {done}/{total}" if total else f"{stage}: {done}"
        if self.tty:
            click.echo("\r" + text.ljust(self.width), nl=False, err=True)
            self.width = len(text)
        else:
            click.echo(text, err=True)

    def close(self) -> None:
        if self.tty and self.width:
            click.echo("\r" + " " * self.width + "\r", nl=False, err=True)


@contextmanager
def pool(workers: int | None) -> Iterator[Executor | None]:
    """Worker processes for simulations; None means this process. They start fresh, so no state leaks in."""
    count = (os.cpu_count() or 1) if workers is None else workers
    if count <= 1:
        yield None
        return
    executor = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Plain aligned columns; the first `left` are flush left, the rest right."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [str(c).ljust(w) if i < left else str(c).rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def render_report(folder: Path) -> Path:
    """Render report.html of a run directory (the reports room is loaded by name: it alone imports plotly)."""
    render: Callable[..., Any] = importlib.import_module("reports.render").render
    page = render(folder)
    assert isinstance(page, Path)
    return page
