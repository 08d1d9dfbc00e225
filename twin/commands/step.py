"""`eptwin validate step`: what one rank's step takes, predicted and, where there is a GPU or a file, measured."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from twin.commands.shared import json_option, say, table
from twin.cost.evidence import Evidence
from twin.cost.profile import gpu_key
from twin.spec.errors import SpecError
from twin.spec.load import load_model
from twin.spec.scenario import Routing
from twin.validate.step import Case, Pair, graph_tokens_of, predict, read_measured, summary, too_large

_RUN_LIMIT_S = 1200
_ROUTING = "even, zipf:ALPHA, lognormal:SIGMA, or a file of expert loads (CSV, JSON)"


def _routing(_: click.Context, __: click.Parameter, value: str | None) -> Routing | None:
    if value is None:
        return None
    kind, _sep, number = value.partition(":")
    try:
        if value == "even":
            return Routing()
        if kind == "zipf":
            return Routing(kind="zipf", alpha=float(number))
        if kind == "lognormal":
            return Routing(kind="lognormal", sigma=float(number))
    except ValueError:
        raise click.BadParameter(f"{value!r} is none of: {_ROUTING}") from None
    if not Path(value).is_file():
        raise click.BadParameter(f"{value!r} is none of: {_ROUTING}")
    return Routing(kind="matrix", file=value)


@click.command()
@click.option("--model", help="A preset, a config.json or a checkpoint folder.")
@click.option("--ep", type=click.IntRange(1, 65_536), default=1, show_default=True, help="EP size of the rank's instance.")
@click.option("--tp", type=click.IntRange(1, 64), default=1, show_default=True, help="TP size of attention.")
@click.option("--dp", type=click.IntRange(1, 65_536), help="DP size of attention; EP / TP unless stated.")
@click.option("--redundant", type=click.IntRange(0, 4096), default=0, show_default=True, help="Redundant experts.")
@click.option("--batch", "batches", type=click.IntRange(1, 65_536), multiple=True, help="Sequences of the rank. Repeatable.")
@click.option("--context", "contexts", type=click.IntRange(1, 2**22), multiple=True,
              help="Tokens of each: its context, or its length in prefill. Repeatable.")
@click.option("--phase", type=click.Choice(["decode", "prefill"]), default="decode", show_default=True, help="What it does.")
@click.option("--precision", type=click.Choice(["bf16", "fp8"]), default="bf16", show_default=True,
              help="Of weights and experts; the KV cache is bf16.")
@click.option("--gpu", help="A cluster preset's name: h200 (unless stated), h100, ...")
@click.option("--routing", callback=_routing, help=f"Popularity of experts: {_ROUTING}. Even unless stated, as measured.")
@click.option("--profile", type=click.Path(exists=True, path_type=Path), help="An engine profile beside those that ship.")
@click.option("--instance", is_flag=True, help="The whole instance's step, with exchanges and host: never run, only predicted.")
@click.option("--against", type=click.Path(path_type=Path), multiple=True,
              help="JSON of `python -m benchmarks.step`: predict its rows. Repeatable.")
@click.option("--run/--no-run", "may_run", default=True, help="Run the step where this machine has such a GPU.")
@json_option
def step(model: str | None, batches: tuple[int, ...], contexts: tuple[int, ...], against: tuple[Path, ...], may_run: bool,
         as_json: bool, profile: Path | None, gpu: str | None, routing: Routing | None, **sizes: Any) -> None:
    """Predict one rank's step, by operator, with sources and an 80% interval; run it where the GPU is.

    The rank is alone on its GPU, as `python -m benchmarks.step --rank-slice` runs it: local copies for exchanges, its mean
    share of the experts' work, no host between steps. With `--against FILE` the measured rows stand beside.
    """
    evidence = Evidence.load(profile)
    word: str | None = None
    if against:
        pairs = _against(against, batches, contexts, evidence, gpu, routing)
    else:
        if model is None or not batches or not contexts:
            raise click.UsageError("give --model, --batch and --context, or --against FILE")
        shared = {**sizes, "gpu": gpu or "h200", "routing": routing or Routing()}
        spec = load_model(model)
        cases = [Case(spec, batch=b, context=c, **shared) for b in batches for c in contexts]
        large = next((text for text in map(too_large, cases) if text), None)
        measured, word = ({}, f"not run: does not fit a {cases[0].gpu}: {large}") if large else \
            _run(cases, model) if may_run else ({}, "not run: --no-run")
        rows = [measured.get((case.batch, case.context)) for case in cases]
        cases = [case if row is None else replace(case, graph_tokens=graph_tokens_of(row))
                 for case, row in zip(cases, rows, strict=True)]
        pairs = [Pair(case, predict(case, evidence), row) for case, row in zip(cases, rows, strict=True)]
    if as_json:
        click.echo(json.dumps({"pairs": [pair.plain() for pair in pairs], "summary": summary(pairs), "note": word}, indent=1))
        return
    click.echo("\n\n".join(_text(pair) for pair in pairs))
    if word:
        say(word)
    found = summary(pairs)
    if found["pairs"] > 1:
        click.echo(f"\n{found['pairs']} pairs: error median {found['median_abs_error']:.1%}, p95 {found['p95_abs_error']:.1%}, "
                   f"worst {found['worst_abs_error']:.1%}; {found['inside_80']:.0%} inside their 80% intervals")


def _against(files: tuple[Path, ...], batches: tuple[int, ...], contexts: tuple[int, ...], evidence: Evidence,
             gpu: str | None, routing: Routing | None) -> list[Pair]:
    pairs = []
    for file in files:
        for ran, row in read_measured(file):
            if ran.batch in (batches or (ran.batch,)) and ran.context in (contexts or (ran.context,)):
                case = replace(ran, gpu=gpu or ran.gpu, routing=routing or ran.routing)
                pairs.append(Pair(case, predict(case, evidence), row))
    if not pairs:
        raise SpecError("holds no row of these batches and contexts", file=files[0])
    return pairs


def _run(cases: list[Case], model: str) -> tuple[dict[tuple[int, int], dict[str, Any]], str]:
    """What the benchmark measures here, by (batch, context), and a word: of what ran, or why nothing did."""
    case, here = cases[0], _gpu_here()
    if here is None:
        return {}, "not run: this machine has no NVIDIA GPU"
    if not case.alone:
        return {}, "not run: one GPU runs one rank alone (TP 1, not --instance)"
    if gpu_key(here) != gpu_key(case.gpu):
        return {}, f"not run: the GPU here is {here}, the prediction is for {case.gpu}"
    if case.dp not in (None, case.ep) or case.routing.kind in ("zipf", "matrix"):
        return {}, "not run: the benchmark knows DP = EP, and even or lognormal routing"
    if importlib.util.find_spec("benchmarks") is None or importlib.util.find_spec("benchmarks.step") is None:
        return {}, "not run: `benchmarks.step` comes with the sources, not with the package"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step.json"
        command = [sys.executable, "-m", "benchmarks.step", "--model", model, "--ep", str(case.ep), "--phase", case.phase,
                   "--redundant", str(case.redundant), "--precision", case.precision, "--skew", str(case.routing.sigma),
                   "--json", str(out), *(["--rank-slice"] if case.ep > 1 else []),
                   *(["--variants"] if case.phase == "decode" else [])]  # as an engine serves: kernels chosen by timing
        for option, values in (("--batch", {c.batch for c in cases}), ("--context", {c.context for c in cases})):
            command += [text for value in sorted(values) for text in (option, str(value))]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,  # noqa: S603
                                  timeout=_RUN_LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            return {}, f"not run: the benchmark took longer than {_RUN_LIMIT_S} s"
        if done.returncode or not out.exists():
            return {}, "not run: the benchmark failed: " + (done.stdout.strip().splitlines() or ["without a word"])[-1][:200]
        return {(ran.batch, ran.context): row for ran, row in read_measured(out)}, f"ran on this {here}"


def _gpu_here() -> str | None:
    """The name of this machine's first GPU, asked without torch."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],  # noqa: S607
                              capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    names = done.stdout.strip().splitlines()
    return names[0].strip() if done.returncode == 0 and names else None


def _text(pair: Pair) -> str:
    p = pair.predicted
    lines = [f"{pair.case.named()}: predicted {_ms(p.total_s)} [{_ms(p.low_s)}, {_ms(p.high_s)}]"]
    if pair.measured is not None and pair.error is not None:
        lines[0] += (f", measured {_ms(pair.measured['step_s'])}: {pair.error:+.1%}, "
                     f"{'inside' if pair.inside else 'outside'} the 80% interval")
        rows = [[name, _ms(a), "-" if b is None else _ms(b), "-" if not b else f"{a / b - 1:+.1%}"]
                for name, a, b in pair.phases()]
        lines.append(table(["phase", "predicted", "measured", "error"], rows))
    parts = sorted(p.parts_s.items(), key=lambda item: -item[1])
    lines.append(table(["operator", "predicted", "source"], [[key, _ms(seconds), p.sources[key]] for key, seconds in parts]))
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"
