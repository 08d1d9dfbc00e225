"""`eptwin run` and `eptwin calibrate`: the real engine, loaded by name, beside its prediction."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from twin.commands.shared import Progress, json_option, out_option, overrides, render_report, say
from twin.commands.simulate import text
from twin.cost.steps import StepCalibration, merge
from twin.sim import simulate
from twin.spec.check import check_plan
from twin.spec.errors import SpecError
from twin.spec.load import load_plan, load_scenario
from twin.spec.options import a_number, out_file, out_folder
from twin.spec.plan import Plan
from twin.spec.results import RunResult
from twin.spec.rundir import dump_json, write_run, write_text
from twin.spec.scenario import Scenario
from twin.validate.compare import compare, format_comparison

plan_option = click.option(
    "--plan", "plan_file", type=click.Path(path_type=Path), help="A plan.json; default: the plan that the scenario states."
)
device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where ranks compute."
)
dtype_option = click.option(
    "--dtype", type=click.Choice(["fp32", "bf16"]), help="Arithmetic; default: fp32 on cpu, bf16 on cuda."
)
checkpoint_option = click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Folder of safetensors; default: random weights."
)
timeout_option = click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.1, 3600),
    callback=a_number,
    default=3.0,
    show_default=True,
    help="Seconds without a sign of life after which a rank counts as lost.",
)


@click.command()
@click.argument("scenario")
@plan_option
@overrides
@device_option
@dtype_option
@checkpoint_option
@timeout_option
@click.option("--recover", is_flag=True, help="Go on without ranks that are lost; otherwise the first ends the run.")
@click.option("--record-routing", type=click.Path(path_type=Path), callback=out_file,
              help="Write expert loads here: .csv, or .json with pairs.")
@click.option("--profile", help="Profile to predict with (of `eptwin calibrate`); default: the scenario's.")
@out_option
@json_option
def run(
    scenario: str,
    plan_file: Path | None,
    overrides: tuple[str, ...],
    device: str,
    dtype: str | None,
    checkpoint: Path | None,
    timeout_s: float,
    recover: bool,
    record_routing: Path | None,
    profile: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Execute a plan for real: start its ranks, send SCENARIO's traffic, measure, and compare with the prediction.

    With --out the run directory holds `predicted/`, `measured/`, comparison.json and report.html. A rank that dies ends
    the run with exit code 1, naming it. What --record-routing writes, `routing: {kind: matrix, file: ...}` reads.
    """
    question = load_scenario(scenario, overrides)
    if profile is not None:
        question = question.model_copy(update={"profile": profile})
    plan = stated_plan(question, plan_file)
    options = engine_options(
        device=device, dtype=dtype, checkpoint=checkpoint, timeout_s=timeout_s, seed=question.seed, recover=recover,
        record_routing=str(record_routing) if record_routing else None, kv_send=question.kv_send,
    )  # fmt: skip
    predicted, measured = execute(question, plan, out, options)
    if as_json:
        click.echo(dump_json(measured), nl=False)
    else:
        click.echo(text(measured))
        click.echo("\n" + format_comparison(compare(predicted, measured)))
    if out is not None:
        say(f"wrote {out} and {render_report(out)}")


def stated_plan(question: Scenario, plan_file: Path | None) -> Plan:
    """The plan of a file, or of the scenario, checked against the model and the cluster."""
    plan = load_plan(plan_file, question.model) if plan_file else question.plan
    if plan is None:
        raise SpecError("this scenario states no plan", field="plan", hint="give --plan, or let `eptwin plan` find one")
    check_plan(plan, question.model, question.cluster, file=str(plan_file) if plan_file else None)
    return plan


def execute(
    question: Scenario,
    plan: Plan,
    out: Path | None,
    options: Any = None,
) -> tuple[RunResult, RunResult]:
    """(prediction, measurement) of one plan; both and their comparison go to `out` when both are whole. `options` are the
    engine's; default: those of this question on a CPU."""
    answer = simulate(question, plan)
    options = options or engine_options(seed=question.seed, kv_send=question.kv_send)
    progress = Progress()
    done = importlib.import_module("runtime.offline").run_workload(
        plan, question.model, question.workload, options, seed=question.seed, name=plan.name, cluster=question.cluster.name,
        progress=lambda finished, total: progress("requests", finished, total), command="eptwin run",
    )  # fmt: skip
    progress.close()
    # Both answer this question: the runtime, which knows no scenario, cannot say so itself.
    asked = done.result.provenance.model_copy(update={"spec_sha256": answer.result.provenance.spec_sha256})
    measured = done.result.model_copy(update={"provenance": asked})
    if out is not None:
        write_run(out, scenario=question, plan=plan, comparison=compare(answer.result, measured))
        write_run(out / "predicted", result=answer.result, requests=answer.requests, trace=answer.trace)
        write_run(out / "measured", result=measured, requests=done.requests, trace=done.trace)
    return answer.result, measured


def engine_options(
    *, device: str = "cpu", dtype: str | None = None, checkpoint: Path | None = None, timeout_s: float = 3.0, **more: Any
) -> Any:
    """The runtime's EngineOptions; the class is loaded by name."""
    return importlib.import_module("runtime.cli").make_options(checkpoint, device, dtype, timeout_s, **more)


@click.command()
@click.argument("scenario")
@plan_option
@overrides
@device_option
@dtype_option
@click.option(
    "--budget", "budget_s", type=click.FloatRange(5, 3600), callback=a_number, default=45.0, show_default=True,
    help="Seconds to spend, about.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, callback=out_folder,
              help="Folder for steps.json and profile.json.")
def calibrate(
    scenario: str, plan_file: Path | None, overrides: tuple[str, ...], device: str, dtype: str | None, budget_s: float, out: Path
) -> None:
    """Measure this machine with SCENARIO's plan: whole engine steps, and single operators, into a profile.

    Use it with `--set profile=OUT/steps.json` in `plan`, `simulate` and `run`.
    """
    question = load_scenario(scenario, overrides)
    steps, profile = calibrate_plans(question, [stated_plan(question, plan_file)], device=device, dtype=dtype, budget_s=budget_s)
    write_text(_made(out) / "steps.json", steps)
    write_text(out / "profile.json", json.dumps(profile, indent=1, allow_nan=False) + "\n")
    say(f"wrote {out / 'steps.json'} and {out / 'profile.json'}")


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"cannot make the output folder: {error.strerror}", file=folder) from error
    return folder


def calibrate_plans(
    question: Scenario, plans: Sequence[Plan], *, device: str = "cpu", dtype: str | None = None, budget_s: float = 45.0
) -> tuple[str, Any]:
    """(steps.json for several plan shapes, the operator profile of the last)."""
    options = engine_options(device=device, dtype=dtype, checkpoint=None, timeout_s=30.0, seed=question.seed)
    measure = importlib.import_module("runtime.calibrate").calibrate
    found, profile = [], None
    for plan in plans:
        say(f"calibrating {plan.name}")
        one = measure(question.model, plan, options, budget_s=budget_s, progress=lambda line: say(f"  {line}"))
        found.append(StepCalibration.model_validate_json(json.dumps(one.steps)))
        profile = one.profile
    return dump_json(merge(found)), profile
