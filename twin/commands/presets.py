"""`eptwin presets` and `eptwin schema`."""

from __future__ import annotations

import json
import textwrap

import click

from twin.commands.shared import json_option, table
from twin.spec.cluster import ClusterSpec
from twin.spec.load import load_cluster, load_gpu, load_model, load_scenario
from twin.spec.load import presets as names_of
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan
from twin.spec.results import Comparison, RunResult, SearchResult
from twin.spec.scenario import Scenario
from twin.spec.units import format_bytes, format_si
from twin.spec.workload import WorkloadSpec

FORMATS = {
    "scenario": Scenario,
    "plan": Plan,
    "model": ModelSpec,
    "cluster": ClusterSpec,
    "workload": WorkloadSpec,
    "results": RunResult,
    "comparison": Comparison,
    "search": SearchResult,
}
KINDS = ["models", "clusters", "gpus", "scenarios"]


@click.command()
@click.argument("kind", type=click.Choice(KINDS), required=False)
@json_option
def presets(kind: str | None, as_json: bool) -> None:
    """List what ships with eptwin: KIND is models, clusters, gpus or scenarios; without, their names alone."""
    if kind is None:
        every = {each: names_of(each) for each in KINDS}
        if as_json:
            click.echo(json.dumps(every))
            return
        for each, names in every.items():
            line = f"{each}: {', '.join(names)}"
            click.echo("\n".join(textwrap.wrap(line, 100, subsequent_indent="  ", break_on_hyphens=False)) + "\n")
        click.echo("eptwin presets models (clusters, gpus, scenarios) says more of each.")
        return
    names = names_of(kind)
    if as_json:
        click.echo(json.dumps(names))
    elif kind == "models":
        rows = [
            [
                n,
                f"{m.total_params / 1e9:.1f} B",
                f"{m.active_params / 1e9:.1f} B",
                str(m.moe.experts if m.moe else 0),
                m.attention.kind,
                f"{m.kv_bytes_per_token() / 1024:.0f} KiB",
                m.expert_dtype,
            ]
            for n in names
            for m in [load_model(n)]
        ]
        click.echo(table(["model", "params", "active", "experts", "attention", "KV/token bf16", "experts stored"], rows))
    elif kind == "clusters":
        rows = [[n, str(c.nodes), str(c.gpus), c.groups[0].gpu.name, c.status] for n in names for c in [load_cluster(n)]]
        click.echo(table(["cluster", "nodes", "GPUs", "GPU", "numbers"], rows))
        click.echo("\nNAME-NxG is NAME with N nodes of G GPUs, e.g. h200-4x8")
    elif kind == "gpus":
        rows = [
            [n, format_bytes(g.hbm_bytes), format_si(g.hbm_bytes_per_s, "B/s"), format_si(g.bf16_flop_per_s, "FLOP/s"), g.status]
            for n in names
            for g in [load_gpu(n)]
        ]
        click.echo(table(["GPU", "memory", "bandwidth", "bf16 dense", "numbers"], rows))
    else:
        click.echo(table(["scenario", "what it asks"], [[n, load_scenario(n).description] for n in names], left=2))


@click.command()
@click.argument("kind", type=click.Choice(sorted(FORMATS)))
def schema(kind: str) -> None:
    """Print the JSON Schema of a file format, for editors: `eptwin schema scenario > scenario.schema.json`."""
    click.echo(json.dumps(FORMATS[kind].model_json_schema(), indent=2))
