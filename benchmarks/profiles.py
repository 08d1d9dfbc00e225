"""Make the profiles that ship with eptwin from measured tables, and study how well they predict.

    python benchmarks/profiles.py ship         # twin/cost/profiles/*.json, thinned
    python benchmarks/profiles.py efficiency   # twin/cost/profiles/efficiency.json
    python benchmarks/profiles.py study        # benchmarks/profiles.json: the figures of docs/profiles.md

Needs the extra `[silicon]`. Everything is seeded: the same wheel gives the same bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import click
import numpy as np

from twin.cost.efficiency import EfficiencyFile, best_first, fit_profile
from twin.cost.holdout import Misses, across, hold_out, on_full_table, with_spread, with_spread_against
from twin.cost.profile import Profile, ProfileStore, Table, dump_profile, load_profile
from twin.cost.silicon import ENGINES, SYSTEMS, default_root, import_silicon
from twin.cost.thin import thin
from twin.spec.errors import EptwinError

HERE = Path(__file__).parent
SHIPPED = HERE.parent / "twin" / "cost" / "profiles"
SHIP_SYSTEMS = ("h100_sxm", "h200_sxm", "b200_sxm")


# (hidden, intermediate, experts) of the experts of DeepSeek-V3, Kimi K2, Qwen3 (30B, 235B, Coder, 3.5), gpt-oss, GLM-4.5
# and 5, MiniMax-M2, Mixtral: what ships. `import silicon` brings every other shape.
EXPERTS = {(7168, 2048, 256), (7168, 2048, 384), (2048, 768, 128), (4096, 1536, 128), (6144, 2560, 160), (2048, 512, 256),
           (4096, 1024, 512), (2880, 2880, 32), (2880, 2880, 128), (4096, 1408, 128), (5120, 1536, 160), (6144, 2048, 256),
           (3072, 1536, 256), (4096, 14336, 8), (6144, 16384, 8)}
TOLERANCE = {"gemm": 0.03, "attention_prefill": 0.03, "attention_decode": 0.03, "moe": 0.03}  # others 2%


def wanted(table: Table) -> Table | None:
    """What models served with expert parallelism ask for: grouped-query heads, gated experts of known models."""
    keep = range(len(table.sheets))
    at = {name: i for i, name in enumerate(table.shape)}
    if table.operator.startswith("attention"):
        keep = [i for i in keep if table.sheets[i][at["kv_heads"]] <= 8 and table.sheets[i][at["head_dim"]] <= 256]
    if table.operator == "moe":
        keep = [i for i in keep if tuple(table.sheets[i][at[n]] for n in ("hidden", "intermediate", "experts")) in EXPERTS]
    if not keep or (table.attrs.get("layout") == "fused" and table.attrs["distribution"] == "power_law_1.2"):
        return None
    return table.model_copy(update={"sheets": tuple(table.sheets[i] for i in keep),
                                    "seconds": tuple(table.seconds[i] for i in keep)})


def thinned(profile: Profile, most_bytes: int, path: Path) -> Profile:
    """The profile thinned to the tolerances above, or as many times those as its file needs to fit."""
    tables = [t for t in map(wanted, profile.tables) if t is not None]
    scale = 1.0
    while True:
        small = [thin(t, profile.peaks, TOLERANCE.get(t.operator, 0.02) * scale) for t in tables]
        small = [with_spread_against(s, t, profile.peaks) for s, t in zip(small, tables, strict=True)]
        note = {**profile.provenance, "thinned": f"points that the rest gives within {0.02 * scale:.1%} "
                                                 f"(GEMM, attention and MoE: {0.03 * scale:.1%}) left out"}
        result = profile.model_copy(update={"tables": tuple(small), "provenance": note})
        dump_profile(result, path)
        if path.stat().st_size <= most_bytes:
            return finished(path)
        scale *= 1.25


def finished(path: Path) -> Profile:
    """The file at `path`, with a spread for the tables that lost too little to show one; written back."""
    profile = load_profile(path)
    tables = tuple(t if t.spread is not None else with_spread(t, profile.peaks) for t in profile.tables)
    whole = profile.model_copy(update={"tables": tables})
    dump_profile(whole, path)
    return whole


@click.group()
def cli() -> None:
    """Profiles from measured tables."""


@cli.command()
@click.option("--most-bytes", default=430_000, show_default=True, help="Size of one file.")
@click.option("--system", "systems", multiple=True, default=SHIP_SYSTEMS, show_default=True)
@click.option("--engine", "engines", multiple=True, default=ENGINES, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=SHIPPED)
def ship(most_bytes: int, systems: tuple[str, ...], engines: tuple[str, ...], out: Path) -> None:
    """Write thinned profiles."""
    for profile in import_silicon(default_root(), systems, engines):
        path = out / f"{profile.gpu}-{profile.engine}.json"
        small = thinned(profile, most_bytes, path)
        points = sum(t.n_points for t in small.tables), sum(t.n_points for t in profile.tables)
        click.echo(f"{path.name}: {path.stat().st_size} bytes, {points[0]} of {points[1]} points, "
                   f"{small.provenance['thinned']}")


@cli.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=SHIPPED)
def efficiency(out: Path) -> None:
    """Fit launch latency and efficiencies of every GPU and engine."""
    fits = [fit for profile in import_silicon(default_root()) for fit in fit_profile(profile)]
    version = import_silicon(default_root(), ("h100_sxm",), ("vllm",))[0].sources[0].version
    file = EfficiencyFile(source=f"measured:aiconfigurator-core {version}", license="Apache-2.0", fits=best_first(fits))
    lines = ",\n".join(fit.model_dump_json() for fit in file.fits)
    head = json.dumps(file.model_dump(mode="json", exclude={"fits"}), indent=1)[:-2]
    path = out / "efficiency.json"
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(f'{head},\n "fits": [\n{lines}\n]}}\n', encoding="utf-8")
    scratch.replace(path)
    click.echo(f"{path}: {len(fits)} fits")


def summary(misses: Iterable[Misses]) -> list[dict[str, object]]:
    """Median, 80% and 95% error and interval coverage by operator and kind."""
    groups: dict[tuple[str, str], list[Misses]] = {}
    for miss in misses:
        kind = next((miss.attrs[k] for k in ("scope", "layout", "mode", "backend") if k in miss.attrs), "")
        groups.setdefault((miss.operator, kind), []).append(miss)
    rows = []
    for (operator, kind), group in sorted(groups.items()):
        errors, halves = np.concatenate([m.errors for m in group]), np.concatenate([m.halves for m in group])
        median, p80, p95 = (round(float(np.quantile(np.abs(errors), q)), 4) for q in (0.5, 0.8, 0.95))
        rows.append({"operator": operator, "kind": kind, "points": len(errors), "bias": round(float(np.median(errors)), 4),
                     "median": median, "p80": p80, "p95": p95, "half_width": round(float(np.median(halves)), 4),
                     "covered": round(float(np.mean(np.abs(errors) <= halves)), 3)})
    return rows


@cli.command()
@click.option("--seed", default=0)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=HERE / "profiles.json")
def study(seed: int, out: Path) -> None:
    """Leave points, engines and GPUs out and predict them; compare what ships with the full tables."""
    full = import_silicon(default_root(), SHIP_SYSTEMS)
    by = {(p.gpu, p.engine): p for p in full}
    gpus = [SYSTEMS[s] for s in SHIP_SYSTEMS]
    results = {"held_out_points": summary(m for p in full for m in hold_out(p, seed))}
    results["other_engine"] = summary(m for p in full for m in across(
        ProfileStore(tuple(by[p.gpu, e] for e in ENGINES)), p, seed))
    for name, source, target in (("h100_to_h200", "h100", "h200"), ("h200_to_b200", "h200", "b200")):
        results[name] = summary(m for e in ENGINES for m in across(ProfileStore((by[source, e],)), by[target, e], seed))
    shipped = {p.id: p for p in (load_profile(f) for f in sorted(SHIPPED.glob("*-*.json")))}
    results["shipped_against_full"] = summary(m for p in full if p.id in shipped
                                              for m in on_full_table(shipped[p.id], p, seed))
    body = {"command": "python benchmarks/profiles.py study", "seed": seed, "gpus": gpus,
            "source": f"{full[0].sources[0].name} {full[0].sources[0].version}", "results": results}
    out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    for name, rows in results.items():
        click.echo(f"\n{name}")
        for r in rows:
            errors = " | ".join(f"{r[k]:.1%}" for k in ("bias", "median", "p80", "p95"))
            click.echo(f"| {r['operator']} {r['kind']} | {r['points']} | {errors} | {r['covered']:.0%} |")


if __name__ == "__main__":
    try:
        cli()
    except EptwinError as error:
        sys.exit(f"error: {error}")
