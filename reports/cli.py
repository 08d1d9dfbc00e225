"""`eptwin report`."""

from __future__ import annotations

from pathlib import Path

import click

from reports.render import render


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Write the page here instead of RUN_DIR/report.html.")
@click.option("--title", help="Title of the page.")
def report(run_dir: Path, out: Path | None, title: str | None) -> None:
    """Render RUN_DIR as one self-contained HTML page, and print its path. Needs no network to make or to read."""
    click.echo(render(run_dir, title=title, out=out))
