"""`eptwin simulate`."""

from __future__ import annotations

from pathlib import Path

import click

from twin.commands.shared import json_option, out_option, overrides, render_report, say, table
from twin.plan.bounds import Bounds
from twin.plan.evaluate import missed
from twin.sim import simulate as run_simulation
from twin.spec.check import check_plan
from twin.spec.errors import SLOMissed, SpecError
from twin.spec.load import load_plan, load_scenario
from twin.spec.results import RunResult
from twin.spec.rundir import dump_json, write_run
from twin.spec.units import format_bytes, format_s


@click.command()
@click.argument("scenario")
@click.option(
    "--plan", "plan_file", type=click.Path(path_type=Path), help="A plan.json; default: the plan that the scenario states."
)
@overrides
@out_option
@json_option
@click.option("--check-slo", is_flag=True, help="Exit 1 when the objectives are missed or the run is not steady.")
def simulate(
    scenario: str, plan_file: Path | None, overrides: tuple[str, ...], out: Path | None, as_json: bool, check_slo: bool
) -> None:
    """Predict what one plan does under SCENARIO's traffic: latencies, throughput, utilisation, cost.

    Poisson and deterministic arrivals meet a service that has been up for a while, as in `eptwin plan`; others an empty one.
    """
    question = load_scenario(scenario, overrides)
    plan = load_plan(plan_file, question.model) if plan_file else question.plan
    if plan is None:
        raise SpecError("this scenario states no plan", field="plan", hint="give --plan, or let `eptwin plan` find one")
    check_plan(plan, question.model, question.cluster, file=str(plan_file) if plan_file else None)
    answer = run_simulation(question, plan, in_flight=Bounds(question).at_start(plan))
    click.echo(dump_json(answer.result) if as_json else text(answer.result), nl=not as_json)
    if out is not None:
        write_run(out, scenario=question, plan=plan, result=answer.result, requests=answer.requests, trace=answer.trace)
        say(f"wrote {out} and {render_report(out)}")
    reason = missed(answer.result, question.workload.slo)
    if check_slo and reason:
        raise SLOMissed(reason)


def text(result: RunResult) -> str:
    """A result for a terminal."""
    head = f"{result.kind} of {result.name}: {result.model} on {result.cluster}"
    if result.plan is not None:
        head += f"\nplan: {result.plan.name}"
    rows = [
        [name, *(format_s(getattr(summary, field)) for field in ("mean", "p50", "p90", "p95", "p99", "max"))]
        for name, summary in (
            ("TTFT", result.latencies.ttft_s),
            ("TPOT", result.latencies.tpot_s),
            ("ITL", result.latencies.itl_s),
            ("E2E", result.latencies.e2e_s),
        )
    ]
    latency = table(["", "mean", "p50", "p90", "p95", "p99", "max"], rows)
    t, c = result.throughput, result.counts
    lines = [
        f"requests: {c.submitted} submitted, {c.finished} finished, {c.rejected + c.failed} refused or failed, "
        f"{c.counted} counted; {result.steady.verdict}" + (f" ({result.steady.reason})" if result.steady.reason else ""),
        f"output {t.output_tok_per_s:.4g} tok/s ({t.output_tok_per_s_per_gpu:.4g} per GPU), {t.requests_per_s:.3g} requests/s",
    ]
    if t.goodput_per_s is not None:
        lines.append(f"goodput {t.goodput_per_s:.3g} requests/s; {t.slo_attainment or 0:.1%} of requests within the objectives")
    if result.cost.usd_per_million_output_tokens is not None:
        lines.append(f"${result.cost.usd_per_million_output_tokens:.3g} per million output tokens")
    for p in result.pools:
        lines.append(
            f"{p.role}: {p.instances} x (dp{p.dp} tp{p.tp} ep{p.ep}), busy {p.utilisation:.0%}, step {format_s(p.step_s.mean)}, "
            f"{p.batch_seqs_mean:.3g} sequences, KV {p.kv_usage_mean:.0%} (max {p.kv_usage_max:.0%})"
            + (f", {format_bytes(p.memory.free_bytes)} free" if p.memory else "")
        )
        top = sorted(p.breakdown_s.items(), key=lambda item: -item[1])[:6]
        if top:
            lines.append("  step: " + ", ".join(f"{name} {format_s(value)}" for name, value in top))
    lines += [f"source: {result.source}"] + [f"warning: {w}" for w in result.warnings]
    return "\n".join([head, "", latency, "", *lines])
