"""`eptwin report`."""

from __future__ import annotations

from pathlib import Path

import click

from reports.csv import candidates_csv, comparison_csv, requests_csv
from reports.render import render
from twin.spec.errors import SpecError
from twin.spec.options import out_file, out_folder
from twin.spec.rundir import read_run, write_text


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), callback=out_file,
              help="Write the page here instead of RUN_DIR/report.html.")
@click.option("--title", help="Title of the page.")
@click.option("--csv", "csv_dir", type=click.Path(path_type=Path), callback=out_folder,
              help="Also write its tables as CSV in this folder.")
def report(run_dir: Path, out: Path | None, title: str | None, csv_dir: Path | None) -> None:
    """Render RUN_DIR as one self-contained HTML page, and print its path. Needs no network to make or to read."""
    click.echo(render(run_dir, title=title, out=out))
    if csv_dir is not None:
        write_csv(run_dir, csv_dir)


def write_csv(run_dir: Path, folder: Path) -> None:
    """The tables of a run and of the runs inside it, each file named after its part. Spreadsheet formulas are neutralised."""
    run = read_run(run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"cannot make the output folder: {error.strerror}", file=folder) from error
    for part, name in ((run, ""), *((inner, f"{key}-") for key, inner in run.parts.items())):
        if part.requests:
            write_text(folder / f"{name}requests.csv", requests_csv(part.requests))
        if part.search is not None:
            write_text(folder / f"{name}candidates.csv", candidates_csv(part.search))
        if part.comparison is not None:
            write_text(folder / f"{name}comparison.csv", comparison_csv(part.comparison))
