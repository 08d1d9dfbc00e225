"""What moving experts costs the steps beside it: an instance under constant load, its routing shifted again and again.

    python -m benchmarks.migration --json benchmarks/results/cpu_migration.json

Streams of requests keep every place of the batch taken. Their prompts are one token repeated, another one every few
seconds, each token takes one expert, so loads are skewed and change, and experts move. Each migration is a window of steps, held
against as many steps right before and right after it: what else the machine does drifts more slowly than that. Full decode
steps alone are compared, whose batch is the same, so throughput is their number a second. Beside the wall's seconds stand
those of the ranks' processors, all threads counted, which others on the machine change little. `throughput_while_migrating`
is the median over migrations of seconds a step around them over seconds a step in them, with its middle half.
`moving_thread_share` is what the thread that decides and moves took of its rank's processor seconds meanwhile, which hardly
depends on the machine; what sockets and the change of slots cost is not in it. The same run without rebalancing
(`eplb: null`) stands beside it, for what counting and deciding cost.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from runtime.frontend import Frontend
from runtime.options import EngineOptions
from runtime.types import SamplingParams
from twin.spec.load import load_scenario
from twin.spec.model import ModelSpec
from twin.spec.plan import Eplb, Plan, PoolPlan
from twin.spec.rundir import write_text

SEQUENCES, ISL, OSL = 8, 8, 120
MIN_STEPS = 5
"""Fewer full steps in, before or after a migration are no window."""
_SHIFT_S = 4.0


@click.command()
@click.option("--seconds", default=40.0, show_default=True, help="Length of each of the two runs.")
@click.option("--period", "period_steps", default=150, show_default=True, help="Steps between decisions.")
@click.option("--budget", "budget_bytes", default=1 << 18, show_default=True, help="Bytes that may move a step.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here.")
def main(seconds: float, period_steps: int, budget_bytes: int, out: Path | None) -> None:
    """Measure and print."""
    model = load_scenario("tiny_cpu").model
    assert model.moe is not None
    model = model.model_copy(update={"moe": model.moe.model_copy(update={"top_k": 1})})
    eplb = Eplb(window_steps=period_steps // 2, period_steps=period_steps, budget_bytes=budget_bytes)
    figures = {"machine": {"cpus": os.cpu_count(), "load_before": os.getloadavg()[0]}, "model": model.name,
               "sequences": SEQUENCES, "eplb": eplb.model_dump(),
               "with": asyncio.run(measure(model, plan_of(model, eplb), seconds)),
               "without": asyncio.run(measure(model, plan_of(model, None), seconds))}
    print(json.dumps(figures, indent=1))
    if out is not None:
        write_text(out, json.dumps(figures, indent=1) + "\n")


def plan_of(model: ModelSpec, eplb: Eplb | None) -> Plan:
    """Two ranks, experts spread over them, two spare slots each."""
    pool = PoolPlan(role="mixed", dp=2, ep=2, max_num_seqs=SEQUENCES // 2, max_batch_tokens=64, chunk_tokens=32, block_tokens=16,
                    kv_blocks=256, redundant_experts=4, eplb=eplb, comm="gloo")
    return Plan(pools=(pool,))


async def measure(model: ModelSpec, plan: Plan, seconds: float) -> dict[str, Any]:
    """Step times of one run, and its cycles of rebalancing."""
    frontend = Frontend(plan, model, EngineOptions(record=True, threads=1))
    await frontend.start()
    try:
        until = time.monotonic() + seconds
        await asyncio.gather(*(_stream(frontend, model, i, until) for i in range(SEQUENCES)))
    finally:
        await frontend.stop()
    return figures_of(frontend.records.steps, frontend.rebalances)


async def _stream(frontend: Frontend, model: ModelSpec, number: int, until: float) -> None:
    while time.monotonic() < until:
        token = (7919 * int(time.monotonic() / _SHIFT_S) + number // 4) % model.vocab
        async for _ in frontend.submit([token] * ISL, SamplingParams(max_tokens=OSL, ignore_eos=True)):
            pass


@dataclass(frozen=True)
class Round:
    """A step of all ranks: seconds by the wall, and of their processors together."""

    wall_s: float
    cpu_s: float


def full_rounds(steps: Sequence[dict[str, Any]]) -> dict[int, Round]:
    """The rounds in which every rank took a full step of decodes alone."""
    ranks: dict[int, list[dict[str, Any]]] = {}
    for step in steps:
        if not step["prefill_seqs"] and step["decode_seqs"] == SEQUENCES // 2:
            ranks.setdefault(step["round"], []).append(step)
    return {number: Round(max(s["end"] - s["start"] for s in both), sum(s["cpu_s"] for s in both))
            for number, both in ranks.items() if len(both) == 2}


def figures_of(steps: Sequence[dict[str, Any]], cycles: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of full decode steps in and around migrations; what moved."""
    rounds, moved = full_rounds(steps), [c for c in cycles if c["copies"]]
    busy = {n for c in moved for n in range(c["first_round"] + 1, c["last_round"] + 1)}
    steady = sorted(rounds.keys() - busy)
    found: dict[str, Any] = {"steps": len(steady), "step_s": _summary([rounds[n].wall_s for n in steady]),
                             "cpu_s_per_step": _summary([rounds[n].cpu_s for n in steady]), "decisions": len(cycles)}
    windows = []
    for c in moved:
        inside = [rounds[n] for n in range(c["first_round"] + 1, c["last_round"] + 1) if n in rounds]
        before = [rounds[n] for n in steady if n <= c["first_round"]][-len(inside):]
        after = [rounds[n] for n in steady if n > c["last_round"]][:len(inside)]
        if len(inside) >= MIN_STEPS and len(before) >= MIN_STEPS and len(after) >= MIN_STEPS:
            windows.append({name: (_mean(before, name) + _mean(after, name)) / 2 / _mean(inside, name)
                            for name in ("wall_s", "cpu_s")})
    if windows:
        pace = {name: _spread([w[name] for w in windows]) for name in ("wall_s", "cpu_s")}
        found |= {"windows": len(windows), "throughput_while_migrating": pace["wall_s"],
                  "throughput_by_processor_seconds": pace["cpu_s"],
                  "moving_thread_share": _spread([2 * c["thread_cpu_s"] / (c["last_round"] - c["first_round"])
                                                  / found["cpu_s_per_step"]["mean"] for c in moved]),
                  "migrations": len(moved), "bytes": sum(c["bytes"] for c in moved),
                  "steps_per_migration": statistics.mean(c["last_round"] - c["first_round"] for c in moved),
                  "imbalance_before": statistics.mean(c["imbalance_before"] for c in moved),
                  "imbalance_after": statistics.mean(c["imbalance_after"] for c in moved),
                  "solve_s": statistics.median(c["solve_s"] for c in cycles)}
    return found


def _mean(rounds: Sequence[Round], name: str) -> float:
    return statistics.mean(getattr(one, name) for one in rounds)


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "p25": low, "p75": high, "mean": statistics.mean(values)}


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    ordered = sorted(seconds)
    quarter = ordered[:max(1, len(ordered) // 4)]
    return {"mean": statistics.mean(ordered), "p50": statistics.median(ordered), "fast_quarter": statistics.mean(quarter)}


if __name__ == "__main__":
    main()
