"""`eptwin demo`: the whole way through the house, on any machine."""

from __future__ import annotations

import time
from pathlib import Path

import click

from twin.commands.plan import ranking
from twin.commands.plan import write as write_search
from twin.commands.run import calibrate_plans, execute
from twin.commands.shared import Progress, pool, render_report, say
from twin.plan.search import search
from twin.plan.space import enumerate_plans
from twin.spec.load import load_scenario
from twin.spec.options import a_number, out_folder
from twin.spec.plan import Plan
from twin.spec.results import SearchResult
from twin.spec.rundir import write_run, write_text
from twin.spec.scenario import Scenario
from twin.validate.compare import compare, format_comparison


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), callback=out_folder, default=Path("run/demo"), show_default=True,
    help="Run directory to write.",
)
@click.option("--scenario", default="r1_chat", show_default=True, help="The question to plan.")
@click.option("--here", default="tiny_cpu", show_default=True, help="The question to calibrate, plan and run on this machine.")
@click.option(
    "--budget",
    "budget_s",
    type=click.FloatRange(5, 600),
    callback=a_number,
    default=12.0,
    show_default=True,
    help="Seconds of calibration for each plan shape.",
)
def demo(out: Path, scenario: str, here: str, budget_s: float) -> None:
    """Plan DeepSeek-R1 on 32 H200; then calibrate this machine, plan a small MoE on it, run the chosen plan for real,
    compare predicted with measured; and write one self-contained report.html with both. Needs no network."""
    began = time.monotonic()

    def stage(number: int, what: str) -> None:
        say(f"\n[{number}/4] {what}  ({time.monotonic() - began:.0f} s)")

    question = load_scenario(scenario)
    stage(1, f"planning {question.name}: {question.description}")
    with pool(None) as executor:
        found = _searched(question, executor)
        click.echo(ranking(found, question, 8))
        for sentence in found.explanation:
            click.echo(f"\n{sentence}")
        write_search(out, question, found)

        local = load_scenario(here)
        shapes = _shapes(local)
        stage(2, f"calibrating this machine for {local.model.name}, {len(shapes)} ways to cut it")
        steps, _ = calibrate_plans(local, shapes, budget_s=budget_s)
        write_text(_here(out) / "steps.json", steps)
        local = local.model_copy(update={"profile": str((_here(out) / "steps.json").resolve())})

        stage(3, f"planning {local.name} with that profile")
        answer = _searched(local, executor)
    assert answer.best is not None
    click.echo(ranking(answer, local, 6))
    write_run(_here(out), scenario=local, search=answer)

    stage(4, f"running {answer.best.plan.name} for real")
    predicted, measured = execute(local, answer.best.plan, _here(out))
    click.echo("\n" + format_comparison(compare(predicted, measured)))
    page = render_report(out)
    say(f"\ndone in {time.monotonic() - began:.0f} s; open this page:")
    click.echo(str(page.resolve()))


def _here(out: Path) -> Path:
    folder = out / "here"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _searched(question: Scenario, executor: object) -> SearchResult:
    progress = Progress()
    found = search(question, executor=executor, progress=progress, command="eptwin demo")  # type: ignore[arg-type]
    progress.close()
    return found


def _shapes(question: Scenario) -> list[Plan]:
    """One plan for each way of cutting the model that the search will look at: calibration does not depend on limits
    of sequences, and one with the largest limits covers the others."""
    largest: dict[tuple[object, ...], Plan] = {}
    for plan in enumerate_plans(question):
        if isinstance(plan, Plan):
            largest[tuple((p.role, p.dp, p.tp, p.ep) for p in plan.pools)] = plan
    return list(largest.values())
