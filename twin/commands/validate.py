"""`eptwin validate`: was the prediction true?"""

from __future__ import annotations

from pathlib import Path

import click

from twin.commands.against import against
from twin.commands.shared import json_option, render_report, say
from twin.commands.step import step
from twin.spec.errors import OutOfBand, SpecError
from twin.spec.options import a_number
from twin.spec.results import RunResult
from twin.spec.rundir import dump_json, read_run, read_spec, write_run
from twin.validate.compare import compare, format_comparison


class AgainstAsOption(click.Group):
    """`--against FILE` before any command means the command `against`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-"):
            for i, arg in enumerate(args):
                if arg in self.commands:
                    break
                name, joined, file = arg.partition("=")
                if name == "--against":
                    named = [file] if joined else args[i + 1:i + 2]
                    args = ["against", *named, *args[:i], *args[i + (1 if joined else 2):]]
                    break
        return super().parse_args(ctx, args)


@click.group(cls=AgainstAsOption)
def validate() -> None:
    """Compare predictions with measurements.

    `eptwin validate run RUN_DIR` compares `predicted/` with `measured/` in a run directory (as `eptwin run --out` writes
    them); `eptwin validate pair PREDICTED MEASURED` compares any two results; `eptwin validate against FILE` (or
    `--against FILE`) predicts public measurements; `eptwin validate step` predicts one rank's step, and runs it where
    the GPU is.
    """


validate.add_command(against)
validate.add_command(step)


band_option = click.option(
    "--band", type=click.FloatRange(0, 10), callback=a_number,
    help="Exit 1 when any metric's error is larger than this, e.g. 0.15."
)


@validate.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@band_option
@json_option
def run(run_dir: Path, band: float | None, as_json: bool) -> None:
    """Compare `predicted/` with `measured/` in RUN_DIR, write comparison.json there and render the report."""
    parts = read_run(run_dir).parts
    results = [parts[name].result if name in parts else None for name in ("predicted", "measured")]
    if results[0] is None or results[1] is None:
        raise SpecError(
            "holds no predicted/ and measured/ results", file=run_dir, hint="`eptwin run SCENARIO --out DIR` writes both"
        )
    _show(results[0], results[1], band, as_json, run_dir)


@validate.command()
@click.argument("predicted", type=click.Path(path_type=Path))
@click.argument("measured", type=click.Path(path_type=Path))
@band_option
@json_option
def pair(predicted: Path, measured: Path, band: float | None, as_json: bool) -> None:
    """Compare two results: each a results.json or a run directory."""
    results = []
    for path in (predicted, measured):
        result = read_run(path).result if path.is_dir() else read_spec(RunResult, path)
        if result is None:
            raise SpecError("holds no results.json" if path.is_dir() else "no such file", file=path)
        results.append(result)
    _show(results[0], results[1], band, as_json, None)


def _show(predicted: RunResult, measured: RunResult, band: float | None, as_json: bool, out: Path | None) -> None:
    comparison = compare(predicted, measured, band=band)
    click.echo(dump_json(comparison) if as_json else format_comparison(comparison), nl=not as_json)
    if out is not None:
        write_run(out, comparison=comparison)
        say(f"wrote {render_report(out)}")
    if comparison.within_band is False:
        raise OutOfBand(f"the largest error is {comparison.max_abs_error:.1%}, the band is {band:.1%}")
