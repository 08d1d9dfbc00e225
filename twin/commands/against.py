"""`eptwin validate against FILE`: public measurements beside the twin's predictions of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from twin.commands.shared import Progress, json_option, say, table
from twin.spec.urls import readable
from twin.validate.against import GROUPS, Split, Verdict, finite, judge, plain, summarise

_LINE_CHARS = 2000


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--limit", type=click.IntRange(1, 1_000_000), help="Only the first N rows or records.")
@click.option("--split", type=click.Choice(["fit", "report", "all"]), default="all", show_default=True,
              help="Only the half of the configurations that constants were fitted on, or only the other.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Of the split and of drawn lengths.")
@click.option("--deployments", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Factors of measured deployments to use instead of those that ship (written by benchmarks.fit_deployments).")
@json_option
def against(file: Path, limit: int | None, split: Split, seed: int, deployments: Path | None, as_json: bool) -> None:
    """Predict every row of FILE and compare.

    FILE is a CSV in the columns of aiconfigurator's table of silicon measurements (mean TTFT and TPOT of closed loops; other
    models, GPUs, engines and batch sizes are welcome), or a YAML list of published records (throughput, layer times,
    all-to-all, KV hand-over, balance). A row or record that cannot be answered says why.
    """
    if file.suffix.lower() in (".yaml", ".yml"):
        _records(file, limit, as_json)
        return
    progress = Progress()
    verdicts = judge(file, split=split, seed=seed, limit=limit, deployments=deployments,
                     tell=lambda done, total: progress("predicting", done, total))
    progress.close()
    summary = summarise(verdicts)
    if as_json:
        document = {"file": file.name, "split": split, "seed": seed, "summary": summary, "rows": [plain(v) for v in verdicts]}
        click.echo(json.dumps(finite(document), indent=1))
        return
    for verdict in verdicts:
        click.echo(readable(_line(verdict), _LINE_CHARS))
        for note in verdict.answer.notes if verdict.answer is not None else ():
            click.echo(f"  note: {readable(note, _LINE_CHARS)}")
    click.echo("\n" + _tables(summary))


def _line(verdict: Verdict) -> str:
    if verdict.answer is None:
        return f"{verdict.row.name}: not answered: {verdict.reason}"
    parts = [verdict.row.name + ":"]
    for metric in ("tpot", "ttft"):
        low, high = verdict.interval_s(metric)
        text = f"{metric.upper()} {verdict.predicted_s(metric) * 1e3:.2f} ms [{low * 1e3:.2f}, {high * 1e3:.2f}]"
        error, measured = verdict.error(metric), verdict.measured_s(metric)
        if error is not None and measured is not None:
            text += f" measured {measured * 1e3:.2f} ({error:+.1%})"
        parts.append(text)
    sources = sorted(set(verdict.answer.sources.values()))
    return "  ".join(parts) + f"  ({', '.join(sources)})"


def _percent(value: float | None, signed: bool = False) -> str:
    return "-" if value is None else f"{value:+.1%}" if signed else f"{value:.1%}"


def _tables(summary: dict[str, Any]) -> str:
    """The summary as plain tables."""
    header = ["", "rows", "TPOT median", "mean", "p95", "bias", "in 80%", "TTFT median", "mean", "p95", "bias", "in 80%"]
    rows = [_cells("all", summary["all"])]
    for group in GROUPS:
        rows += [_cells(f"{group}: {name}", found) for name, found in summary[f"by_{group}"].items()]
    text = (f"{summary['answered']} of {summary['rows']} rows answered ({_percent(summary['row_coverage'])} of those that are no "
            f"mistakes of the collection; {summary['mistakes_of_the_collection']} are)\n\n" + table(header, rows))
    for peer, found in summary["peers"].items():
        text += f"\n\nbeside {peer}, on the rows that it answered:"
        for metric, one in found.items():
            text += (f"\n  {metric.upper()} ({one['rows']} rows): median {_percent(one['median_abs_error'])}, mean "
                     f"{_percent(one['mean_abs_error'])}; the twin {_percent(one['twin_median_abs_error'])}, "
                     f"{_percent(one['twin_mean_abs_error'])}")
    return text


def _cells(name: str, found: dict[str, Any]) -> list[str]:
    cells = [name, str(found["rows"])]
    for metric in ("tpot", "ttft"):
        one = found[metric]
        cells += [_percent(one["median_abs_error"]), _percent(one["mean_abs_error"]), _percent(one["p95_abs_error"]),
                  _percent(one["bias_median"], signed=True), _percent(one["interval_coverage"])]
    return cells


def _records(file: Path, limit: int | None, as_json: bool) -> None:
    from twin.validate.records import judge_records, summarise_records
    found = judge_records(file, limit)
    summary = summarise_records(found)
    if as_json:
        click.echo(json.dumps(finite({"file": file.name, "summary": summary, "records": [r.plain() for r in found]}), indent=1))
        return
    for record in found:
        click.echo(readable(record.line(), _LINE_CHARS))
    say()
    rows = [[name, str(one["records"]), str(one["answered"]), _percent(one["median_abs_error"]), _percent(one["worst_abs_error"])]
            for name, one in summary["by_kind"].items()]
    click.echo(table(["kind", "records", "answered", "median error", "worst"], rows))
    if summary["layer_parts"]:
        say()
        rows = [[name, str(one["records"]), _percent(one["median_abs_error"]), _percent(one["worst_abs_error"]),
                 _percent(one["bias"], signed=True)] for name, one in summary["layer_parts"].items()]
        click.echo(table(["layer part", "records", "median error", "worst", "bias"], rows))
    if summary["overlap_gains"]:
        say()
        rows = [[one["with"], _percent(one["published"], signed=True), _percent(one["predicted"], signed=True)]
                for one in summary["overlap_gains"]]
        click.echo(table(["two-batch overlap", "published gain", "predicted gain"], rows))
