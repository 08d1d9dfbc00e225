"""Times dispatch and combine through symmetric memory at any shape, inside CUDA graphs, with an oracle before and after.

    python benchmarks/exchange.py --share-gpu --ranks 8 --tokens 128 --hidden 7168 --top-k 8 --experts 256
    python benchmarks/exchange.py --ranks 8 --tokens 128 --tokens 1024 --rows fp8 --json out.json   # a GPU for every rank

Options that may be repeated are combined with each other. Two figures for each phase, which answer different questions:
fresh entry is what a step feels that enters the phase together with all others: all ranks meet, then the slowest one counts
(median over repetitions of the maximum over ranks, by the device's clock); free running is what a loop of the phase alone
achieves, where ranks may run ahead of each other (median over graph replays and ranks, by events). Dispatch ends when rows
have arrived; rows that travelled in fp8 stay so, and what making them bf16 costs is `widen`, which experts in fp8 do without.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.exchange_rank import Case, run_rank
from runtime.comm.oracle import ROUTES
from runtime.mps import MpsUnavailable, share_gpu

_PATIENCE_S = 240


@click.command(help=__doc__)
@click.option("--ranks", multiple=True, type=click.IntRange(2), default=(8,), show_default=True, help="may be repeated")
@click.option("--tokens", multiple=True, type=click.IntRange(1), default=(128,), show_default=True,
              help="a rank; may be repeated")
@click.option("--hidden", default=7168, show_default=True, type=click.IntRange(16))
@click.option("--top-k", default=8, show_default=True, type=click.IntRange(1))
@click.option("--experts", default=256, show_default=True, type=click.IntRange(2), help="over all ranks")
@click.option("--rows", multiple=True, type=click.Choice(["bf16", "fp8"]), default=("bf16",), show_default=True,
              help="how rows travel out; results come back in bf16; may be repeated")
@click.option("--back", multiple=True, type=click.Choice(["pull", "push"]), default=("pull",), show_default=True,
              help="sources read results, or experts write them; may be repeated")
@click.option("--route", multiple=True, type=click.Choice(ROUTES), default=("uniform",), show_default=True,
              help="where tokens go, see runtime.comm.oracle; may be repeated")
@click.option("--share-gpu", "share", is_flag=True, help="all ranks on the GPUs there are, through MPS")
@click.option("--commit", default=None, help="git commit to record (else $GIT_COMMIT)")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="also write all figures here")
def main(ranks: tuple[int, ...], tokens: tuple[int, ...], hidden: int, top_k: int, experts: int, rows: tuple[str, ...],
         back: tuple[str, ...], route: tuple[str, ...], share: bool, commit: str | None, json_path: Path | None) -> None:
    uneven = [n for n in ranks if experts % n]
    if uneven or top_k > experts:
        raise click.UsageError(f"{uneven[0]} ranks do not divide {experts} experts" if uneven else "top-k exceeds experts")
    cases = [Case(n, hidden, top_k, experts, r, b, way) for n, r, b, way in itertools.product(tokens, rows, back, route)]
    try:
        with share_gpu() if share else contextlib.nullcontext({}) as env:
            worlds = [run_world(n, cases, share, env) for n in ranks]
    except MpsUnavailable as err:
        raise click.ClickException(str(err)) from err
    result = {"provenance": worlds[0][0]["provenance"] | {"commit": commit or os.environ.get("GIT_COMMIT", "unknown"),
                                                          "method": __doc__},
              "ceilings": worlds[0][0]["ceilings"], "share_gpu": share,
              "cases": [summary(n, i, case, world) for n, world in zip(ranks, worlds, strict=True)
                        for i, case in enumerate(cases)]}
    if json_path:
        partial = json_path.with_suffix(".tmp")
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.replace(json_path)
    print(table(result))
    if any(case["mistakes"] for case in result["cases"]):
        sys.exit(1)


def run_world(ranks: int, cases: list[Case], share: bool, env: dict[str, str]) -> list[dict[str, Any]]:
    """What every rank measured, in order of rank."""
    spawn = get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="exchange-") as folder, _environment({**env, "GLOO_SOCKET_IFNAME": "lo"}):
        children = [spawn.Process(target=run_rank, args=(r, ranks, folder, cases, share)) for r in range(ranks)]
        for child in children:
            child.start()
        until = time.monotonic() + _PATIENCE_S
        while any(c.is_alive() for c in children) and not any(c.exitcode for c in children) and time.monotonic() < until:
            time.sleep(0.05)
        for child in children:
            child.join(1.0)  # who waits for a rank that failed is ended with it
            if child.is_alive():
                child.kill()
        written = [Path(folder, f"rank{r}.json") for r in range(ranks)]
        missing = [r for r, path in enumerate(written) if not path.exists()]
        if missing:
            raise click.ClickException(f"rank {', '.join(map(str, missing))} of {ranks} failed (see above)")
        return [json.loads(path.read_text(encoding="utf-8")) for path in written]


@contextlib.contextmanager
def _environment(extra: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in extra}
    os.environ.update(extra)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def summary(ranks: int, index: int, case: Case, world: list[dict[str, Any]]) -> dict[str, Any]:
    """One case over all ranks. Bytes are those of all ranks together: rows read and written, each counted once."""
    each = [rank["cases"][index] for rank in world]
    out: dict[str, Any] = {"ranks": ranks, **asdict(case), "mistakes": [m for one in each for m in one["mistakes"]],
                           "barrier_s": median(one["free_s"]["barrier"] for one in each),
                           "rows_sent": sum(one["rows"] for one in each), "rows_sent_away": sum(one["rows_away"] for one in each)}
    own, sent, wide = ranks * case.tokens * case.hidden * 2, out["rows_sent"], case.hidden * 2
    narrow = case.hidden + 4 if case.rows == "fp8" else wide
    moved = {"dispatch": own + sent * narrow,
             "combine": own + sent * wide * (3 if case.back == "push" else 1)}
    for phase, bytes_ in moved.items():
        slowest = [max(stamps) for stamps in zip(*(one["fresh_s"][phase] for one in each), strict=True)]
        free = median(one["free_s"][phase] for one in each)
        out[phase] = {"fresh_max_s": median(slowest), "fresh_max_s_p90": sorted(slowest)[int(0.9 * len(slowest))],
                      "repetitions": len(slowest), "free_median_s": free, "bytes": bytes_, "bytes_per_s": bytes_ / free}
    if case.rows == "fp8":
        out["widen_s"] = median(one["free_s"]["widen"] for one in each)
    out["pair_free_median_s"] = median(one["free_s"]["pair"] for one in each)
    return out


def table(result: dict[str, Any]) -> str:
    """Figures in microseconds, and bytes against the plain copy of the same run."""
    copy = result["ceilings"]["copy_bytes_per_s"]
    lines = [f"read {result['ceilings']['read_bytes_per_s'] / 1e12:.2f} TB/s, copy {copy / 1e12:.2f} TB/s (read + written)",
             f"{'ranks tokens rows back route':40}{'barrier':>8} | {'dispatch':>8}{'p90':>7}{'free':>7}{'of copy':>8} | "
             f"{'combine':>8}{'p90':>7}{'free':>7}{'of copy':>8} | {'pair':>7}{'widen':>7}  oracle"]
    for c in result["cases"]:
        name = f"{c['ranks']:5} {c['tokens']:6} {c['rows']:4} {c['back']:4} {c['route']}"
        cells = []
        for phase in ("dispatch", "combine"):
            p = c[phase]
            cells.append(f"{p['fresh_max_s'] * 1e6:8.1f}{p['fresh_max_s_p90'] * 1e6:7.1f}{p['free_median_s'] * 1e6:7.1f}"
                         f"{p['bytes_per_s'] / copy:8.0%}")
        lines.append(f"{name:40}{c['barrier_s'] * 1e6:8.1f} | {cells[0]} | {cells[1]} | {c['pair_free_median_s'] * 1e6:7.1f}"
                     f"{c['widen_s'] * 1e6 if 'widen_s' in c else 0:7.1f}  "
                     f"{'right' if not c['mistakes'] else c['mistakes'][0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
