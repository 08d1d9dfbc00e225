"""What two-batch overlap gains: the same steps whole, in two halves one after the other, and in two halves that overlap.

    python -m benchmarks.tbo --json benchmarks/results/cpu_tbo.json
    python -m benchmarks.tbo --device cuda --model qwen3-30b-a3b --dp 4 --ep 4 --shape 4096:0 --shape 0:128

A shape is PROMPT:DECODES: one prompt chunk of so many tokens and so many decodes (of 64 tokens each) on every rank. A step
takes as long as its slowest rank; a barrier comes before every step; the three kinds go by turns, and the fastest quarter of
steps counts, for machines that others use as well. `gain` is of halves that overlap over the whole step; `overlap_gain` over
the same halves one after the other, which is what overlap itself is worth. Below zero is a loss. `exposed_s` is what rank 0
spent in dispatch and combine, waiting included.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

from runtime.batch import Segment, halve, make_step
from runtime.clock import Clock, DeviceClock
from runtime.options import EngineOptions
from runtime.rank import Rank, build_rank
from runtime.tiny import tiny_config
from twin.spec.hf import model_from_hf_config
from twin.spec.load import load_model
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan
from twin.spec.rundir import write_text

CONTEXT = 64
BLOCK = 16
Json = dict[str, Any]


def segments_of(prompt: int, decodes: int) -> list[Segment]:
    """A step of one prompt chunk and some decodes, each with blocks of its own."""
    each = CONTEXT // BLOCK
    first = decodes * each
    found = [Segment([17 + i], CONTEXT - 1, range(i * each, (i + 1) * each)) for i in range(decodes)]
    chunk = [Segment([i % 100 for i in range(prompt)], 0, range(first, first + -(-prompt // BLOCK)), True)] if prompt else []
    return found + chunk


KINDS = ("whole", "apart", "overlapped")


def time_steps(rank: Rank, clock: Clock, segments: list[Segment], steps: int) -> Json:
    """Of each kind: seconds of every step of the slowest rank, and mean seconds by phase here."""
    found: Json = {kind: {"steps_s": [], "phases_s": {}} for kind in KINDS}
    capacity = -(-sum(len(s.token_ids) for s in segments) // rank.at.tp)
    for turn in range(len(KINDS) * (steps + 2)):
        kind = KINDS[turn % len(KINDS)]
        parts = [segments] if kind == "whole" else list(halve(segments))
        rank.groups.control.all_reduce(torch.zeros(1))
        clock.take()
        began = time.perf_counter()
        inputs = [make_step(part, BLOCK, rank.device) for part in parts]
        for together in [inputs] if kind == "overlapped" else [[one] for one in inputs]:
            states = rank.transformer.hidden(together, rank.kv, capacity if kind == "whole" else -(-capacity // 2))
        float(states[-1, 0])  # waits for the device
        seconds = rank.groups.control.all_gather(torch.tensor([time.perf_counter() - began])).max()
        if turn >= 2 * len(KINDS):  # the first of each kind warm up
            found[kind]["steps_s"].append(float(seconds))
            phases = found[kind]["phases_s"]
            for phase, spent in clock.take().items():
                phases[phase] = phases.get(phase, 0.0) + spent / steps
    return found


def row_of(prompt: int, decodes: int, found: Json) -> Json:
    """One shape's figures."""
    fast = {kind: statistics.quantiles(found[kind]["steps_s"], n=4)[0] for kind in KINDS}
    exposed = {kind: found[kind]["phases_s"].get("dispatch", 0.0) + found[kind]["phases_s"].get("combine", 0.0) for kind in KINDS}
    return {"prompt_tokens": prompt, "decodes": decodes, "step_s": fast, "gain": fast["whole"] / fast["overlapped"] - 1,
            "overlap_gain": fast["apart"] / fast["overlapped"] - 1, "exposed_s": exposed, "kinds": found}


def run_rank(number: int, world: int, store: str, ask: Json, pipe: Any) -> None:
    """One rank's process: measure every shape; rank 0 answers."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=number, world_size=world,
                            timeout=timedelta(seconds=120))
    model, plan = ModelSpec.model_validate_json(ask["model"]), Plan.model_validate_json(ask["plan"])
    clock = (DeviceClock if ask["device"] == "cuda" else Clock)(None, number)
    options = EngineOptions(device=ask["device"], backend="triton" if ask["device"] == "cuda" else "torch",
                            dtype="bf16" if ask["device"] == "cuda" else "fp32", graphs=False)
    rank = build_rank(model, plan, options, number, clock.mark)
    clock.mark("idle")
    rows = [row_of(prompt, decodes, time_steps(rank, clock, segments_of(prompt, decodes), ask["steps"]))
            for prompt, decodes in ask["shapes"]]
    pipe.send(rows)
    os._exit(0)  # groups need no farewell


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--model", "name", help="a model by name (default: a small DeepSeek-shaped one)")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--dp", default=2, show_default=True)
@click.option("--tp", default=1, show_default=True)
@click.option("--ep", default=2, show_default=True)
@click.option("--shape", "shapes", multiple=True, default=["256:0", "64:0", "0:64", "0:16"], show_default=True)
@click.option("--steps", default=20, show_default=True, help="timed steps of each kind")
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(name: str | None, device: str, dp: int, tp: int, ep: int, shapes: tuple[str, ...], steps: int, out: Path | None) -> None:
    small = tiny_config("deepseek_v3", hidden=256, layers=4, experts=16, top_k=4, vocab=512)
    model = load_model(name) if name else model_from_hf_config(small, "small-deepseek")
    sizes = [(int(prompt), int(decodes)) for prompt, _, decodes in (shape.partition(":") for shape in shapes)]
    blocks = max(-(-prompt // BLOCK) + decodes * CONTEXT // BLOCK for prompt, decodes in sizes)
    plan = Plan(pools=(PoolPlan(role="mixed", dp=dp, tp=tp, ep=ep, tbo=True, block_tokens=BLOCK, kv_blocks=blocks),))
    ask = {"model": model.model_dump_json(), "plan": plan.model_dump_json(), "device": device, "shapes": sizes, "steps": steps}
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=run_rank, args=(i, plan.gpus, f"{folder}/store", ask, send if i == 0 else _Mute()))
                 for i in range(plan.gpus)]
        for rank in ranks:
            rank.start()
        send.close()
        rows = receive.recv()
        for rank in ranks:
            rank.join()
    for row in rows:
        times = ", ".join(f"{kind} {row['step_s'][kind] * 1e3:.2f} ms (exposed {row['exposed_s'][kind] * 1e3:.2f})"
                          for kind in KINDS)
        click.echo(f"{row['prompt_tokens']:>5} prompt + {row['decodes']:>3} decodes: {times}; gain {row['gain']:+.1%}, "
                   f"of overlap itself {row['overlap_gain']:+.1%}")
    if out is not None:
        about = {"model": model.name, "dp": dp, "tp": tp, "ep": ep, "device": device, "cores": os.cpu_count(),
                 "torch": torch.__version__, "python": platform.python_version(), "command": " ".join(sys.argv[1:])}
        write_text(out, json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


class _Mute:
    """Where ranks other than the first answer to."""

    def send(self, rows: list[Json]) -> None:
        pass


if __name__ == "__main__":
    main()
