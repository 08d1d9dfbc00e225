"""`eptwin plan` and `eptwin size`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from twin.commands.shared import Progress, json_option, out_option, overrides, pool, render_report, say, table, workers_option
from twin.plan.bounds import Bounds
from twin.plan.evaluate import load_unit, offered_load
from twin.plan.search import fewest_gpus, search
from twin.sim import simulate
from twin.spec.load import load_scenario
from twin.spec.results import Candidate, SearchResult
from twin.spec.rundir import dump_json, write_run
from twin.spec.scenario import Scenario
from twin.spec.units import format_bytes, format_s

requests_option = click.option(
    "--requests",
    type=click.IntRange(20, 1_000_000),
    default=400,
    show_default=True,
    help="Least requests of a simulation in the search.",
)
top_option = click.option("--top", type=click.IntRange(1, 1000), default=10, show_default=True, help="Rows of the table.")


@click.command()
@click.argument("scenario")
@overrides
@out_option
@json_option
@workers_option
@requests_option
@top_option
def plan(
    scenario: str, overrides: tuple[str, ...], out: Path | None, as_json: bool, workers: int | None, requests: int, top: int
) -> None:
    """Search the plans for SCENARIO (a YAML file, or the name of a shipped one; see `eptwin presets scenarios`).

    Enumerates EP/DP/TP sizes, the split between prefill and decode against mixed pools, and batch limits; prunes by
    memory and closed-form bounds; simulates the rest under the offered load; finds the load that each could carry within
    the objectives; ranks by output tokens per second per GPU at that load, and says why the others lost.
    Exits 1 naming the binding constraint when no plan serves the load.
    """
    question = load_scenario(scenario, overrides)
    began = time.monotonic()
    progress = Progress()
    with pool(workers) as executor:
        found = search(question, executor=executor, progress=progress, min_requests=requests, command="eptwin plan")
    progress.close()
    say(
        f"considered {found.considered} plans in {time.monotonic() - began:.1f} s: "
        + ", ".join(f"{n} pruned ({why})" for why, n in found.pruned.items())
        + f", {len(found.candidates)} simulated"
    )
    if as_json:
        click.echo(dump_json(found), nl=False)
    else:
        click.echo(ranking(found, question, top))
        for sentence in found.explanation:
            click.echo(f"\n{sentence}")
    if out is not None:
        write(out, question, found)
        say(f"wrote {out} and {render_report(out)}")


def write(out: Path, question: Scenario, found: SearchResult) -> None:
    """The run directory of a search: its winner simulated in full beside it."""
    assert found.best is not None
    answer = simulate(question, found.best.plan, in_flight=Bounds(question).at_start(found.best.plan))
    write_run(
        out,
        scenario=question,
        plan=found.best.plan,
        search=found,
        result=answer.result,
        requests=answer.requests,
        trace=answer.trace,
    )


def ranking(found: SearchResult, question: Scenario, top: int) -> str:
    """The ranked table: what each plan carries within the objectives, and what it does under the offered load."""
    unit = load_unit(question.workload)
    header = [
        "#",
        "plan",
        "GPUs",
        f"max {unit}",
        "tok/s/GPU",
        "tok/s/user",
        "TTFT p50",
        "p99",
        "TPOT p50",
        "p99",
        "goodput/s",
        "free HBM",
        "$/Mtok",
        "",
    ]
    rows = [_row(candidate) for candidate in found.candidates[:top]]
    title = (
        f"{found.name}: {found.model} on {found.cluster}. Left: the most load within the objectives; "
        f"right: at the offered {offered_load(question.workload):g} {unit}."
    )
    return f"{title}\n\n{table(header, rows, left=2)}"


def _row(candidate: Candidate) -> list[str]:
    m = candidate.metrics

    def number(name: str, digits: int = 4) -> str:
        return f"{m[name]:.{digits}g}" if name in m else "–"

    free = [v for k, v in m.items() if k.endswith("_free_bytes") and not k.startswith("capacity_")]
    marks = ("◆" if candidate.pareto else "") + ("" if candidate.feasible else f" {candidate.reason}")
    return [
        str(candidate.rank),
        candidate.plan.name,
        str(candidate.plan.gpus),
        number("capacity_load"),
        number("capacity_tok_per_s_per_gpu"),
        number("capacity_tok_per_s_per_user", 3),
        format_s(m.get("ttft_s_p50")),
        format_s(m.get("ttft_s_p99")),
        format_s(m.get("tpot_s_p50")),
        format_s(m.get("tpot_s_p99")),
        number("goodput_per_s", 3),
        format_bytes(min(free)) if free else "–",
        number("capacity_usd_per_million_output_tokens", 3),
        marks,
    ]


@click.command()
@click.argument("scenario")
@overrides
@json_option
@workers_option
@requests_option
@click.option(
    "--max-nodes", type=click.IntRange(1, 10_000), default=16, show_default=True, help="Largest number of nodes to try."
)
def size(scenario: str, overrides: tuple[str, ...], as_json: bool, workers: int | None, requests: int, max_nodes: int) -> None:
    """Find the fewest nodes of SCENARIO's cluster that serve its load within its objectives, and the plan for them."""
    question = load_scenario(scenario, overrides)
    progress = Progress()
    with pool(workers) as executor:
        nodes, found = fewest_gpus(
            question, node_counts=range(1, max_nodes + 1), executor=executor, progress=progress, min_requests=requests
        )
    progress.close()
    if as_json:
        click.echo(dump_json(found), nl=False)
        return
    gpus = nodes * question.cluster.groups[0].gpus_per_node
    click.echo(f"{nodes} nodes ({gpus} GPUs) serve {offered_load(question.workload):g} {load_unit(question.workload)}\n")
    click.echo(ranking(found, question, 5))
