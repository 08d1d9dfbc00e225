"""Steps of many models in one process: a check of the twin on shapes that nothing was calibrated with.

    python -m benchmarks.shapes OUT                       # benchmarks/shapes.txt
    python -m benchmarks.shapes OUT --list mine.txt --share 1/2 --budget 400
    eptwin validate step $(printf -- '--against %s ' OUT/*.json)

Every line of the list is the options of `python -m benchmarks.step`; its figures go to `OUT/NAME.json`, named after them. Models
may be cut to a few layers (`--layers`), which both sides then count. A line that fails is told and the next begins; a line
whose file is there with all its points is not run again. `--share I/N` takes every Nth line from the Ith on: a GPU each.
"""

from __future__ import annotations

import gc
import json
import re
import shlex
import sys
import time
import traceback
from pathlib import Path

import click
import torch

from benchmarks import step

LIST = Path(__file__).with_name("shapes.txt")


def lines_of(path: Path, share: str) -> list[list[str]]:
    """The options of each line that is this share's. Raises BadParameter for a share that is none."""
    found = re.fullmatch(r"(\d+)/(\d+)", share)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise click.BadParameter(f"{share!r} is no share: 1/2 is the first of two", param_hint="--share")
    lines = [shlex.split(line, comments=True) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line][int(found[1]) - 1::int(found[2])]


def name_of(options: list[str]) -> str:
    """A file's name from options: `--model a --ep 8 --rank-slice` is `a_ep8_rank-slice`."""
    words = " ".join(options).replace("--model ", "").split("--")
    return "_".join(re.sub(r"[^\w.-]", "", word) for word in words if word.strip())


def done(path: Path, options: list[str]) -> bool:
    """Whether the file holds every point."""
    if not path.exists():
        return False
    wanted = max(1, options.count("--batch")) * max(1, options.count("--context"))
    return len(json.loads(path.read_text(encoding="utf-8"))["rows"]) >= wanted


@click.command(help=__doc__)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--list", "listed", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=LIST)
@click.option("--share", default="1/1", show_default=True, help="I/N: every Nth line from the Ith on.")
@click.option("--budget", "budget_s", type=float, default=1e9, help="Seconds after which no line begins.")
@click.option("--commit", default=None)
def main(out: Path, listed: Path, share: str, budget_s: float, commit: str | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    began, failed = time.monotonic(), 0
    for options in lines_of(listed, share):
        path = out / f"{name_of(options)}.json"
        if done(path, options) or time.monotonic() - began > budget_s:
            continue
        click.echo(f"[{time.monotonic() - began:.0f} s] {shlex.join(options)}")
        try:
            step.main.main([*options, *(["--commit", commit] if commit else []), "--json", str(path)], standalone_mode=False)
        except Exception:  # the next line's model is another: it may well run
            traceback.print_exc()
            failed += 1
        gc.collect()
        torch.cuda.empty_cache()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
