"""What recording costs: rounds of requests with every step recorded, and with half of them, drawn at random; in one process.

    python -m benchmarks.measuring --json benchmarks/results/cpu_measuring.json
    python -m benchmarks.measuring --device cuda --model qwen3-30b-a3b --layers 12 --requests 1 --requests 64 --tokens 200 \
        --rounds 30 --json out.json

On a GPU steps are timed by the wall, in ways of their own: see `benchmarks.recording`. What follows is of a CPU.

The difference of two kinds of steps is as noisy as the machine. So the record's own seconds are counted as well: those of taking
the step's times, of keeping them and of packing and encoding batches of rows, as a mean over the steps recorded (`own_share`).
After a step on this processor its caches hold the model; `repeated_s` is what a record costs when they hold the record's code,
as they may where a GPU has the model. What the front end does with a batch is timed apart, and so is reading its rows, which it
does only when asked. Marks (which phase a rank is in) are always on, since the watch over ranks needs them; their cost is
counted apart: marks a step times the cost of one. `--hidden` and `--layers` set the size of the model; on a small one
everything costs most.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import recording
from runtime.batch import Segment
from runtime.board import Board
from runtime.clock import Clock, Cut
from runtime.layout import layouts
from runtime.loop import StepLoop
from runtime.options import EngineOptions
from runtime.rank import Rank, build_rank
from runtime.records import StepLog, StepRecords, did
from runtime.targets import Targets
from runtime.tiny import tiny_config
from runtime.types import SamplingParams
from twin.policy.steps import StepPlan
from twin.spec.hf import model_from_hf_config
from twin.spec.load import load_model
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan
from twin.spec.rundir import write_text
from twin.validate.step import shorten

Json = dict[str, Any]
PHASES_OF_A_STEP = ("schedule", "embed", "attention", "dense_ffn", "gate", "dispatch", "experts", "combine", "shared_experts",
                    "head", "sample", "book")


class Script:
    """Control without a socket: says everything at once, encodes what it is told as the socket would be sent it, and keeps
    the batches of rows.

    With a `coin` it draws every step whether the next is recorded; `took` keeps CPU seconds from one step's news to the next,
    recorded or not. What others do on the machine touches CPU seconds little.
    """

    formation = 0

    def __init__(self, coin: random.Random | None = None) -> None:
        self.messages: list[dict[str, Any]] = []
        self.loop: Timed | None = None
        self.took: dict[bool, list[float]] = {True: [], False: []}
        self.batches: list[str] = []
        self._last: float | None = None
        self._coin, self.log = coin, TimedLog(self.send)

    def drain(self, *, wait: bool) -> list[dict[str, Any]]:
        said, self.messages = self.messages or ([{"op": "stop"}] if wait else []), []
        return said

    def send(self, message: dict[str, Any]) -> None:
        line = json.dumps({"seat": 0, "formation": 0, **message}, separators=(",", ":"))
        if message["ev"] == "records":
            self.batches.append(line)
        if message["ev"] != "step" or self.loop is None:
            return
        now, before = time.process_time(), self._last
        if before is not None:
            self.took[self.loop.log is not None].append(now - before)
        if self._coin is not None:
            self.loop.log = self.log if self._coin.random() < 0.5 else None
        self._last = time.process_time()


class Counted(Clock):
    """Counts marks."""

    marks = 0

    def mark(self, phase: str) -> None:
        self.marks += 1
        super().mark(phase)


class Timed(StepLoop):
    """Adds up what its records took."""

    own_s = 0.0

    def _end_step(self) -> Cut:
        began = time.process_time()
        cut = super()._end_step()
        self.own_s += time.process_time() - began
        return cut

    def _write_down(self, *args: Any) -> None:
        began = time.process_time()
        super()._write_down(*args)
        self.own_s += time.process_time() - began


class TimedLog(StepLog):
    """Adds up what batches that leave during a step took."""

    own_s = 0.0

    def send_due(self) -> None:
        self.settle()  # which the loop counts
        began = time.process_time()
        super().send_due()
        self.own_s += time.process_time() - began


def serve(rank: Rank, clock: Clock, script: Script, requests: int, tokens: int) -> float:
    """A batch of requests, all at once; seconds that records took, batches that left during steps aside."""
    params = asdict(SamplingParams(max_tokens=tokens, ignore_eos=True))
    script.messages = [{"op": "add", "id": i, "tokens": [i + 1] * 16, "prompt_len": 16, "seed": i, "params": params, "wake": 1}
                       for i in range(requests)]
    script.loop = loop = Timed(rank, script, clock, record=True)  # type: ignore[arg-type]
    loop.log = script.log
    loop.run()
    script.log.flush()
    return loop.own_s


def repeated(clock: Clock, requests: int) -> float:
    """CPU seconds of a record of a decode step, again and again."""
    log = StepLog(json.dumps)  # type: ignore[arg-type]
    plan = StepPlan(decode=tuple(range(requests)), decode_tokens=(1,) * requests)
    segments = [Segment([1], 64, [0]) for _ in range(requests)]
    parts, spent = dict.fromkeys(PHASES_OF_A_STEP, 1e-3), 0.0
    for number in range(20_000):
        clock.mark("book")
        began = time.process_time()
        now, cpu_s = time.monotonic(), time.process_time()
        clock.take()
        log.add(now, now, cpu_s, number, parts, did(plan, segments, requests, 0.5, (), ()))
        log.send_due()
        spent += time.process_time() - began
    return spent / 20_000


def front_end(plan: Plan, model: ModelSpec, batches: list[str]) -> dict[str, float]:
    """Bytes of a row as it travels; the front end's seconds a row as it comes, and as it is read."""
    records = StepRecords()
    records.form(0, (0,), Targets(plan, layouts(plan, model), 0).targets)
    began = time.process_time()
    for line in batches:
        records.hear(json.loads(line))
    heard = time.process_time()
    rows = len(records.steps)
    return {"rows": rows, "rows_a_batch": rows / len(batches), "row_bytes": sum(map(len, batches)) / rows,
            "heard_s": (heard - began) / rows, "read_s": (time.process_time() - heard) / rows}


def on_cpu(model: ModelSpec, requests: int, tokens: int, rounds: int) -> Json:
    """CPU seconds of steps and of what records add to them."""
    plan = Plan(pools=(PoolPlan(role="mixed", max_num_seqs=requests, block_tokens=16, kv_blocks=8 * requests),))
    with tempfile.TemporaryDirectory() as folder:
        clock = Counted(Board(Path(folder) / "board", 1), 0)
        rank = build_rank(model, plan, EngineOptions(), 0, clock.mark)
        serve(rank, clock, Script(), requests, tokens)
        script, clock.marks = Script(), 0
        own_s = sum(serve(rank, clock, script, requests, tokens) for _ in range(rounds)) + script.log.own_s
        front = front_end(plan, model, script.batches)
        own, marks = own_s / front["rows"], clock.marks / front["rows"]
        script = Script(random.Random(1))
        for _ in range(2 * rounds):
            serve(rank, clock, script, requests, tokens)
        took = script.took
        began = time.process_time()
        for _ in range(50_000):
            clock.mark("attention")
            clock.mark("gate")
        mark_s = (time.process_time() - began) / 100_000
        again = repeated(clock, requests)
    on, off = statistics.median(took[True]), statistics.median(took[False])
    fast = {kind: statistics.quantiles(seconds, n=10)[0] for kind, seconds in took.items()}
    best = fast[True] / fast[False] - 1
    row = {"step_s": {"recorded": on, "not": off}, "overhead": on / off - 1, "steps": len(took[True]),
           "fastest_tenth_s": {"recorded": fast[True], "not": fast[False]}, "overhead_of_fastest": best,
           "own_s": own, "own_share": own / off, "repeated_s": again, "front_end": front,
           "marks_a_step": marks, "mark_s": mark_s, "marks_share": marks * mark_s / off, "hidden": model.hidden,
           "layers": model.layers, "requests": requests, "cores": os.cpu_count(), "torch": torch.__version__}
    click.echo(f"step {off * 1e3:.3f} ms, recorded {on * 1e3:.3f} ms: {row['overhead']:+.2%} (fastest tenth {best:+.2%})")
    click.echo(f"a record's own {own * 1e6:.1f} us: {own / off:.2%}; repeated {again * 1e6:.1f} us")
    click.echo(f"{front['row_bytes']:.0f} bytes a record; on the front end {front['heard_s'] * 1e6:.1f} us, "
               f"{front['read_s'] * 1e6:.0f} more once read")
    click.echo(f"{marks:.0f} marks a step of {mark_s * 1e9:.0f} ns: {row['marks_share']:.2%}")
    return row


def on_gpu(model: ModelSpec, options: EngineOptions, requests: Sequence[int], tokens: int, rounds: int,
           keep: Callable[[Json], None],
           clock_of: Callable[[Board, int], recording.Switched] = recording.Switched) -> Json:
    """Wall seconds of steps by what of them is recorded, for each number of requests; `keep` is given all so far as it grows."""
    began = time.monotonic()

    def say(what: str) -> None:
        click.echo(f"[{time.monotonic() - began:6.1f} s] {what}", err=True)

    most = max(requests)
    pool = PoolPlan(role="mixed", max_num_seqs=most, max_batch_tokens=max(2048, recording.PROMPT * most), chunk_tokens=None)
    record: Json = {"tokens": tokens, "rounds": rounds, "model": model.name, "layers": model.layers, "hidden": model.hidden,
                    "cores": os.cpu_count(), "torch": torch.__version__, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        clock = clock_of(Board(Path(folder) / "board", 1), 0)
        rank = build_rank(model, Plan(pools=(pool,)), options, 0, clock.mark)
        say(f"built: {model.layers} layers, " + ("steps in graphs" if rank.decode is not None else "steps without graphs"))
        record["graphs"] = rank.decode is not None
        for count in requests:
            recording.serve(rank, recording.Script(clock), count, tokens)
            say(f"{count} requests: warm")
            row: Json = {"requests": count, "mark_s": recording.mark_s(clock)}
            record["rows"].append(row)
            for way in (recording.by_step, recording.by_round):
                row[way.__name__] = way(rank, clock, count, tokens, rounds)
                keep(record)
                say(f"{count} requests: {way.__name__} done")
            for line in recording.lines(count, row):
                click.echo(line)
    return record


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--model", "name", default=None, help="A preset, a config.json or a checkpoint folder; without: a small DeepSeek.")
@click.option("--hidden", default=256, show_default=True, help="Of the small model.")
@click.option("--layers", default=None, type=int, help="Run only so many layers (small model: 4).")
@click.option("--requests", type=click.IntRange(1), multiple=True, default=(8,), show_default=True,
              help="At once; on a GPU several such numbers.")
@click.option("--tokens", type=click.IntRange(16), default=48, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True)
@click.option("--no-tune", is_flag=True, help="Without timing kernels for small steps at the start (GPU).")
@click.option("--commit", default=None)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(device: str, name: str | None, hidden: int, layers: int | None, requests: tuple[int, ...], tokens: int, rounds: int,
         no_tune: bool, commit: str | None, out: Path | None) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = (model_from_hf_config(tiny_config("deepseek_v3", hidden=hidden, layers=layers or 4), "small-deepseek") if name is None
             else shorten(load_model(name), layers))

    def keep(found: Json) -> None:
        if out is not None:
            write_text(out, json.dumps(found, indent=1) + "\n")

    if device == "cpu":
        if len(requests) > 1:
            raise click.UsageError("on a CPU one number of --requests is measured at a time")
        keep(on_cpu(model, requests[0], tokens, rounds))
        return
    from benchmarks.timing import provenance  # needs triton

    if not torch.cuda.is_available():
        raise click.ClickException("--device cuda needs a CUDA GPU")
    about = {"provenance": {**provenance(commit), "method": recording.__doc__}}
    options = EngineOptions(device="cuda", backend="triton", dtype="bf16", record=True, tune=not no_tune, start_timeout_s=400.0,
                            max_context=recording.PROMPT + tokens)
    on_gpu(model, options, requests, tokens, rounds, lambda found: keep({**found, **about}))


if __name__ == "__main__":
    main()
