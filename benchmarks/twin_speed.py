"""How fast the twin itself answers: expert placement, a profile's curve, one step of EP144 x 61 layers.

    python -m benchmarks.twin_speed --json out.json

Process seconds, best and median of repeats (what others do on the machine touches them little). Building EP144 begins with the
words in hand and makes the network anew each time, as the first prediction of a search does. The limits beside them are
those of docs/benchmarks.md; nothing fails when one is missed, the ratio says so.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from twin.cost.batch import StepBatch
from twin.cost.model import CostModel
from twin.cost.network import Network
from twin.policy.placement import place_global
from twin.spec.cluster import ClusterSpec
from twin.spec.load import load_cluster, load_model
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan, Precision
from twin.spec.rundir import write_text
from twin.spec.scenario import Routing

FP8 = Precision(weights="fp8_block", experts="fp8_block", kv="bf16", dispatch="fp8")
LIMITS_S = {"placement_58x256_on_32_ranks": 0.3, "step_ep144_build_and_first": 5e-3, "step_ep144_again": 5e-3}


def _repeat(call: Callable[[], object], count: int) -> list[float]:
    """Process seconds of each of `count` calls."""
    took = []
    for _ in range(count):
        began = time.process_time()
        call()
        took.append(time.process_time() - began)
    return took


def _ep144(words: tuple[ModelSpec, ClusterSpec], network: Network | None = None) -> CostModel:
    pool = PoolPlan(role="decode", dp=144, ep=144, redundant_experts=32)
    plan = Plan(pools=(pool, PoolPlan(role="prefill")), precision=FP8)
    return CostModel(*words, plan, pool, routing=Routing(), network=network)


def _words() -> tuple[ModelSpec, ClusterSpec]:
    """Model and cluster from their files."""
    return load_model("deepseek-r1"), load_cluster("h200-18x8")


def measure(repeats: int) -> dict[str, list[float]]:
    """{what: process seconds of each repeat}"""
    load = np.random.default_rng(0).lognormal(0.0, 0.9, (58, 256))
    batch = StepBatch.decode([64] * 144, [64 * 2000] * 144)
    words = _words()
    cost = _ep144(words)
    cost.step(batch)
    return {
        "placement_58x256_on_32_ranks": _repeat(lambda: place_global(load, 288, 32), repeats),
        "words_of_model_and_cluster": _repeat(_words, repeats),
        "step_ep144_build_and_first": _repeat(lambda: _ep144(words, Network(words[1])).step(batch), 3 * repeats),
        "step_ep144_again": _repeat(lambda: cost.step(batch), 10 * repeats),
        "step_ep144_seconds_only": _repeat(lambda: cost.step_s(batch), 10 * repeats),
    }


@click.command()
@click.option("--repeats", type=click.IntRange(3), default=10, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="write every repeat here")
def main(repeats: int, json_path: Path | None) -> None:
    """Print the median and the best of each, and their ratio to the limit where there is one."""
    found = measure(repeats)
    for name, took in found.items():
        middle, limit = statistics.median(took), LIMITS_S.get(name)
        beside = f", {middle / limit:.2f} of its limit" if limit else ""
        click.echo(f"{name}: median {middle * 1e3:.3f} ms, best {min(took) * 1e3:.3f} ms{beside}")
    if json_path is not None:
        write_text(json_path, json.dumps(found, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
