"""What recording costs: half of the steps, drawn at random, with a record; in one process.

    python -m benchmarks.measuring --json benchmarks/results/cpu_measuring.json

The difference of two kinds of steps is as noisy as the machine. So the record's own seconds are counted as well: those of making
it and of encoding it with the step's news (`own_share`). Marks (which phase a rank is in) are always on, since the watch over
ranks needs them; their cost is counted apart: marks a step times the cost of one. `--hidden` and `--layers` set the size of the
model; on a small one everything costs most.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from runtime.batch import Segment
from runtime.board import Board
from runtime.clock import Clock
from runtime.loop import StepLoop
from runtime.options import EngineOptions
from runtime.rank import Rank, build_rank
from runtime.tiny import tiny_config
from runtime.types import SamplingParams
from twin.policy.batching import StepPlan
from twin.spec.hf import model_from_hf_config
from twin.spec.plan import Plan, PoolPlan
from twin.spec.rundir import write_text


class Script:
    """Control without a socket: says everything at once, encodes what it is told as the socket would be sent it.

    Every step it draws whether the next is recorded; `took` keeps CPU seconds from one step's news to the next, recorded or
    not. What others do on the machine touches CPU seconds little.
    """

    formation = 0

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.loop: Timed | None = None
        self.took: dict[bool, list[float]] = {True: [], False: []}
        self.own: list[float] = []
        self._last: float | None = None
        self._coin = random.Random(1)

    def drain(self, *, wait: bool) -> list[dict[str, Any]]:
        said, self.messages = self.messages or ([{"op": "stop"}] if wait else []), []
        return said

    def send(self, message: dict[str, Any]) -> None:
        began = time.process_time()
        json.dumps(message, separators=(",", ":"))
        now, before, self._last = time.process_time(), self._last, None
        if message["ev"] != "step" or self.loop is None:
            return
        if before is not None:
            self.took["record" in message].append(now - before)
        if "record" in message:
            without, again = {key: value for key, value in message.items() if key != "record"}, time.process_time()
            json.dumps(without, separators=(",", ":"))
            self.own.append(self.loop.record_s + now - began - (time.process_time() - again))
        self.loop.record = self._coin.random() < 0.5
        self._last = time.process_time()


class Counted(Clock):
    """Counts marks."""

    marks = 0

    def mark(self, phase: str) -> None:
        self.marks += 1
        super().mark(phase)


class Timed(StepLoop):
    """Knows what the last record took to make."""

    record_s = 0.0

    def _step_record(self, plan: StepPlan, segments: list[Segment]) -> dict[str, Any] | None:
        began = time.process_time()
        record = super()._step_record(plan, segments)
        self.record_s = time.process_time() - began
        return record


def serve(rank: Rank, clock: Clock, script: Script, requests: int, tokens: int) -> None:
    """A batch of requests, all at once."""
    params = asdict(SamplingParams(max_tokens=tokens, ignore_eos=True))
    script.messages = [{"op": "add", "id": i, "tokens": [i + 1] * 16, "prompt_len": 16, "seed": i, "params": params, "wake": 1}
                       for i in range(requests)]
    script.loop = Timed(rank, script, clock, record=True)  # type: ignore[arg-type]
    script.loop.run()


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--hidden", default=256, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--requests", default=8, show_default=True)
@click.option("--tokens", default=48, show_default=True)
@click.option("--rounds", default=15, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(hidden: int, layers: int, requests: int, tokens: int, rounds: int, out: Path | None) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = model_from_hf_config(tiny_config("deepseek_v3", hidden=hidden, layers=layers), "small-deepseek")
    plan = Plan(pools=(PoolPlan(role="mixed", max_num_seqs=requests, block_tokens=16, kv_blocks=8 * requests),))
    with tempfile.TemporaryDirectory() as folder:
        clock = Counted(Board(Path(folder) / "board", 1), 0)
        rank = build_rank(model, plan, EngineOptions(), 0, clock.mark)
        serve(rank, clock, Script(), requests, tokens)
        script, clock.marks = Script(), 0
        for _ in range(rounds):
            serve(rank, clock, script, requests, tokens)
        took = script.took
        marks = clock.marks / sum(map(len, took.values()))
        began = time.process_time()
        for _ in range(50_000):
            clock.mark("attention")
            clock.mark("gate")
        mark_s = (time.process_time() - began) / 100_000
    on, off, own = (statistics.median(seconds) for seconds in (took[True], took[False], script.own))
    fast = {kind: statistics.quantiles(seconds, n=10)[0] for kind, seconds in took.items()}
    best = fast[True] / fast[False] - 1
    row = {"step_s": {"recorded": on, "not": off}, "overhead": on / off - 1, "steps": len(took[True]),
           "fastest_tenth_s": {"recorded": fast[True], "not": fast[False]}, "overhead_of_fastest": best,
           "own_s": own, "own_share": own / off,
           "marks_a_step": marks, "mark_s": mark_s, "marks_share": marks * mark_s / off, "hidden": hidden, "layers": layers,
           "requests": requests, "cores": os.cpu_count(), "torch": torch.__version__}
    click.echo(f"step {off * 1e3:.3f} ms, recorded {on * 1e3:.3f} ms: {row['overhead']:+.2%} (fastest tenth {best:+.2%}); "
               f"a record's own {own * 1e6:.0f} us: {own / off:.2%}; "
               f"{marks:.0f} marks a step of {mark_s * 1e9:.0f} ns: {row['marks_share']:.2%}")
    if out is not None:
        write_text(out, json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
