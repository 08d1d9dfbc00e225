"""What speculative decoding gains: the same requests with no, one, two, ... drafts, through the whole engine.

    python -m benchmarks.mtp --json benchmarks/results/cpu_mtp.json
    python -m benchmarks.mtp --drafter ngram --echo 0.1

How often drafts are right is a matter of trained weights, which random ones cannot show. So the checkpoint is made to be
more or less easy to draft (`--echo`, see `runtime.tiny`): acceptance is that of these weights, and the gain is what the
engine makes of such an acceptance on this machine. Rounds go by turns; the fastest round of each kind counts, since
others slow a shared machine at times and nothing makes it faster.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from runtime.offline import run_workload
from runtime.options import EngineOptions
from runtime.tiny import tiny_config, write_checkpoint
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan
from twin.spec.rundir import write_text
from twin.spec.workload import Arrivals, Lengths, WorkloadSpec

Json = dict[str, Any]


def measure(folder: Path, model: ModelSpec, pool: Json, drafts: int, users: int, requests: int) -> Json:
    """One run: rates, and drafts by place."""
    plan = Plan(pools=(PoolPlan(role="mixed", **pool, mtp_draft_tokens=drafts),))
    workload = WorkloadSpec(arrivals=Arrivals(kind="closed_loop", concurrency=users), isl=Lengths(mean=32.0),
                            osl=Lengths(mean=64.0), requests=requests)
    run = run_workload(plan, model, workload, EngineOptions(checkpoint=str(folder), threads=1))
    result = run.result.pools[0]
    decodes = sum(step.total("decode_seqs") for step in run.steps)
    made = sum(step.total("made") for step in run.steps) - len(run.requests)  # prefill gives the first token of each
    return {"tok_per_s": run.result.throughput.output_tok_per_s, "tpot_s": run.result.latencies.tpot_s.mean,
            "accepted": result.mtp_accepted, "tokens_a_decode": made / decodes, "step_s": result.step_s.mean,
            "draft_s": result.breakdown_s.get("mtp/draft", 0.0)}


def summary(runs: list[Json], base: Json | None, about: Json) -> Json:
    """The fastest round, held against that without drafts; all rounds beside it."""
    best = max(runs, key=lambda run: float(run["tok_per_s"]))
    return {**about, **best, "gain": best["tok_per_s"] / (base or best)["tok_per_s"] - 1,
            "tok_per_s_of_rounds": [run["tok_per_s"] for run in runs]}


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--drafter", type=click.Choice(["module", "ngram"]), default="module", show_default=True)
@click.option("--echo", "echoes", type=float, multiple=True, default=[0.05, 0.2, 0.5], show_default=True)
@click.option("--drafts", "counts", type=int, multiple=True, default=[1, 2, 3], show_default=True)
@click.option("--users", default=4, show_default=True)
@click.option("--requests", default=24, show_default=True)
@click.option("--dp", default=1, show_default=True)
@click.option("--ep", default=1, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(drafter: str, echoes: tuple[float, ...], counts: tuple[int, ...], users: int, requests: int, dp: int, ep: int,
         rounds: int, out: Path | None) -> None:
    pool = {"dp": dp, "ep": ep, "block_tokens": 16, "max_num_seqs": users, "max_batch_tokens": 512, "chunk_tokens": 256}
    rows = []
    for echo in echoes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "small"
            config = tiny_config("deepseek_v3", hidden=256, layers=4, experts=16, top_k=4, vocab=512,
                                 mtp=int(drafter == "module"))
            model = write_checkpoint(folder, config, echo=echo)
            runs: dict[int, list[Json]] = {count: [] for count in (0, *counts)}
            for _ in range(rounds):
                for count, found in runs.items():
                    found.append(measure(folder, model, pool, count, users, requests))
        base = summary(runs[0], None, {"drafts": 0, "echo": echo})
        for count, found in runs.items():
            row = summary(found, base, {"drafts": count, "echo": echo})
            rows.append(row)
            accepted = ", ".join(f"{share:.0%}" for share in row["accepted"] or ()) or "-"
            click.echo(f"echo {echo:<5} drafts {count}: {row['tok_per_s']:7.1f} tok/s ({row['gain']:+.1%}), "
                       f"{row['tokens_a_decode']:.2f} tokens a decode, step {row['step_s'] * 1e3:.2f} ms "
                       f"(drafting {row['draft_s'] * 1e3:.2f}), stood: {accepted}")
    if out is not None:
        about = {"drafter": drafter, "users": users, "requests": requests, "pool": pool, "device": "cpu", "cores": os.cpu_count(),
                 "torch": torch.__version__, "python": platform.python_version(), "command": " ".join(sys.argv[1:])}
        write_text(out, json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
