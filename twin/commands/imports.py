"""`eptwin import`: models, node topologies, traces and operator tables of others."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from twin.commands.shared import say, table
from twin.cost.profile import dump_profile
from twin.cost.silicon import ENGINES, SYSTEMS, default_root, import_silicon
from twin.policy.traces import read_trace
from twin.spec.errors import SpecError
from twin.spec.load import load_cluster, load_model
from twin.spec.options import out_file
from twin.spec.rundir import dump_yaml, write_text
from twin.spec.topo import read_topo
from twin.spec.units import format_bytes

out = click.option("--out", type=click.Path(path_type=Path), callback=out_file, help="Write the result here.")


@click.group(name="import")
def import_() -> None:
    """Read models, traces, topologies and tables of others."""


@import_.command()
@click.argument("source")
@out
def model(source: str, out: Path | None) -> None:
    """SOURCE is a Hugging Face config.json, a checkpoint folder, or a preset: show its sizes; --out writes a model YAML."""
    spec = load_model(source)
    rows = [[name, f"{count:,}", f"{count / spec.total_params:.1%}"] for name, count in spec.params.items()]
    rows.append(["total", f"{spec.total_params:,}", ""])
    rows.append(["active", f"{spec.active_params:,}", f"{spec.active_params / spec.total_params:.1%}"])
    click.echo(f"{spec.name} ({spec.model_type}): {spec.layers} layers, {spec.moe_layers} of them MoE\n")
    click.echo(table(["part", "parameters", "share"], rows))
    click.echo(f"\nKV cache: {format_bytes(spec.kv_bytes_per_token())} a token in bf16")
    if out is not None:
        write_text(out, dump_yaml(spec))
        say(f"wrote {out}")


@import_.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--base", default="h200", show_default=True, help="Cluster preset whose GPU and link numbers to take.")
@click.option("--nodes", type=click.IntRange(1, 10_000), default=1, show_default=True)
@out
def topo(source: Path, base: str, nodes: int, out: Path | None) -> None:
    """SOURCE is a saved `nvidia-smi topo -m`: make a cluster YAML with that node's GPUs, NICs and NVLink domain."""
    node = read_topo(source)
    preset = load_cluster(base)
    group = preset.groups[0].model_copy(update={"nodes": nodes, "gpus_per_node": node.gpus})
    domain = node.gpus if node.all_to_all_nvlink else 1
    network = preset.network.model_copy(update={"nics_per_node": len(node.nics), "nvlink_domain_gpus": domain})
    cluster = preset.model_copy(update={"name": source.stem, "groups": (group,), "network": network})
    click.echo(
        f"{node.gpus} GPUs, {len(node.nics)} NICs; NVLink joins " + ("every pair" if node.all_to_all_nvlink else "not every pair")
    )
    for index, near in enumerate(node.near_nics):
        click.echo(f"GPU{index}: nearest NIC {', '.join(near) or 'none on its PCIe switch'}")
    if not node.all_to_all_nvlink:
        say("GPUs without NVLink between them are modelled as talking over PCIe")
    if out is not None:
        write_text(out, dump_yaml(cluster))
        say(f"wrote {out}")


@import_.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--format", "kind", type=click.Choice(["azure", "mooncake"]), required=True, help="Whose trace format.")
@click.option(
    "--max-rows", type=click.IntRange(1, 10_000_000), default=1_000_000, show_default=True, help="Rows to read at most."
)
@out
def trace(source: Path, kind: str, max_rows: int, out: Path | None) -> None:
    """SOURCE is a request trace: show its rate and lengths; --out writes a workload YAML that replays it."""
    rows = read_trace(source, kind, max_rows=max_rows)
    span = float(rows.time_s[-1]) if len(rows.time_s) else 0.0
    click.echo(f"{len(rows.time_s)} requests in {span:.0f} s: {len(rows.time_s) / span if span else 0:.2f} a second\n")
    lines = [
        [name, f"{values.mean():.0f}", *(f"{np.percentile(values, q):.0f}" for q in (50, 90, 99, 100))]
        for name, values in (("ISL", rows.isl), ("OSL", rows.osl))
    ]
    click.echo(table(["tokens", "mean", "p50", "p90", "p99", "max"], lines))
    if out is not None:
        write_text(out, f"name: {source.stem}\narrivals: {{kind: trace, file: {str(source.resolve())!r}, format: {kind}}}\n")
        say(f"wrote {out}")


@import_.command()
@click.option("--system", type=click.Choice(sorted(SYSTEMS)), required=True, help="GPU system in the tables.")
@click.option("--engine", type=click.Choice(ENGINES), required=True, help="Engine in the tables.")
@click.option("--version", default="newest", show_default=True, help="Engine version in the tables.")
@click.option("--root", type=click.Path(path_type=Path), help="The wheel's systems folder; default: the installed package.")
@click.option("--out", type=click.Path(path_type=Path), required=True, callback=out_file, help="Profile file to write.")
def silicon(system: str, engine: str, version: str, root: Path | None, out: Path) -> None:
    """Make an engine profile of the measured operator tables in aiconfigurator-core (pip install 'eptwin[silicon]')."""
    profiles = import_silicon(root or default_root(), [system], [engine], None if version == "newest" else version)
    if not profiles:
        raise SpecError(f"the tables hold nothing for {engine} on {system}")
    dump_profile(profiles[0], out)
    say(f"wrote {out}: {len(profiles[0].tables)} tables")
