"""What two-batch overlap gains: the same steps whole and in two halves, by turns, in one instance of real ranks.

    python -m benchmarks.tbo --json benchmarks/results/cpu_tbo.json
    python -m benchmarks.tbo --device cuda --model qwen3-30b-a3b --dp 4 --ep 4 --shape 4096:0 --shape 0:128

A shape is PROMPT:DECODES: one prompt chunk of so many tokens and so many decodes (of 64 tokens each) on every rank. A step
takes as long as its slowest rank; a barrier comes before every step. The gain is that of medians; that of the fastest
quarter of steps stands beside it, for machines that others use as well. `exposed_s` is what rank 0 spent in dispatch and
combine, waiting included. A gain below zero is a loss.
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


def time_steps(rank: Rank, clock: Clock, segments: list[Segment], steps: int) -> tuple[dict[bool, list[float]], Json]:
    """Seconds of every step of the slowest rank, and mean seconds by phase here; whole (False) and halved (True)."""
    parts = {False: [segments], True: list(halve(segments))}
    took: dict[bool, list[float]] = {False: [], True: []}
    phases: dict[bool, dict[str, float]] = {False: {}, True: {}}
    capacity = -(-sum(len(s.token_ids) for s in segments) // rank.at.tp)
    for turn in range(2 * (steps + 2)):
        halved = turn % 2 == 1
        rank.groups.control.all_reduce(torch.zeros(1))
        clock.take()
        began = time.perf_counter()
        inputs = [make_step(part, BLOCK, rank.device) for part in parts[halved]]
        states = rank.transformer.hidden(inputs, rank.kv, -(-capacity // 2) if halved else capacity)
        float(states[-1, 0])  # waits for the device
        seconds = rank.groups.control.all_gather(torch.tensor([time.perf_counter() - began])).max()
        if turn >= 4:  # the first of each kind warm up
            took[halved].append(float(seconds))
            for phase, spent in clock.take().items():
                phases[halved][phase] = phases[halved].get(phase, 0.0) + spent / steps
    return took, {"whole": phases[False], "halved": phases[True]}


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
    rows = []
    for prompt, decodes in ask["shapes"]:
        took, phases = time_steps(rank, clock, segments_of(prompt, decodes), ask["steps"])
        whole, halved = statistics.median(took[False]), statistics.median(took[True])
        fast = {kind: statistics.quantiles(seconds, n=4)[0] for kind, seconds in took.items()}
        exposed = {kind: parts.get("dispatch", 0.0) + parts.get("combine", 0.0) for kind, parts in phases.items()}
        rows.append({"prompt_tokens": prompt, "decodes": decodes, "whole_s": whole, "halved_s": halved,
                     "gain": whole / halved - 1, "gain_of_fastest": fast[False] / fast[True] - 1, "exposed_s": exposed,
                     "phases_s": phases, "steps_s": {"whole": took[False], "halved": took[True]}})
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
        exposed = row["exposed_s"]
        click.echo(f"{row['prompt_tokens']:>5} prompt + {row['decodes']:>3} decodes: whole {row['whole_s'] * 1e3:.2f} ms, "
                   f"halved {row['halved_s'] * 1e3:.2f} ms, gain {row['gain']:+.1%} (fastest {row['gain_of_fastest']:+.1%}); "
                   f"in dispatch and combine {exposed['whole'] * 1e3:.2f} -> {exposed['halved'] * 1e3:.2f} ms")
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
