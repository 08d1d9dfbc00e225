"""Seconds of one step of a model on one GPU, held against the floor that the same run measured.

    python -m benchmarks.step --model qwen3-30b-a3b --batch 1 --batch 64 --context 1024 --json out.json
    python -m benchmarks.step --model qwen3-30b-a3b --phase prefill --batch 4 --context 4096
    python -m benchmarks.step --model deepseek-r1 --ep 128 --rank-slice --precision fp8 --batch 128 --context 4096

Weights are random. A decode step is one replay of its CUDA graph, replays following one another without the host; its
time is the median over replays after three to warm up, its spread the 10th and 90th percentile. `--rank-slice` runs
what one rank of an instance of `--ep` ranks runs; see `runtime.rank_slice`. Prompts of up to 4,096 tokens are replays too, of the
graph that an engine of one rank has for them, and their head behind it; longer ones are launched kernel by kernel. `--variants`
chooses kernels for few rows and how fp8 products are cut, as an engine does at its start (`runtime.tune`), and measures the step
both ways.
"""

from __future__ import annotations

import functools
import gc
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.floor import Load, Rates, phase_floors
from benchmarks.hf import hf_step_s
from benchmarks.timing import measure_ceilings, provenance, time_graph
from runtime.batch import Segment, make_step
from runtime.comm.experts import ExpertComm, Local
from runtime.comm.group import solo
from runtime.decode import DecodeRunner
from runtime.few_rows import FewRowsOps
from runtime.kernels.fused import quant_fp8_rows
from runtime.kernels.skinny import Cut
from runtime.kv import make_kv
from runtime.layout import RankLayout, single
from runtime.model.transformer import Rig, Transformer
from runtime.ops import ops_for
from runtime.prompts import PromptRunner
from runtime.quantise import quantise
from runtime.rank_slice import SliceComm, draw_arrivals, slice_layout, slice_placement
from runtime.refine import name_of, refine
from runtime.tune import chains, tune
from runtime.weights import load_weights
from twin.policy.graphs import PROMPT_GRAPH_TOKENS, prompt_ladder
from twin.spec.load import load_model
from twin.spec.model import ModelSpec
from twin.spec.rundir import write_text
from twin.validate.step import shorten

_WARM = 3
Json = dict[str, Any]


@dataclass
class Phases:
    """A mark that, while `listening`, records an event at every phase's beginning, in a graph too."""

    listening: bool = False
    events: list[tuple[str, torch.cuda.Event]] = field(default_factory=list)

    def __call__(self, phase: str) -> None:
        if not self.listening:
            return
        if phase == "embed":
            self.events.clear()
        event = torch.cuda.Event(enable_timing=True, external=True)
        event.record()
        self.events.append((phase, event))

    def seconds(self) -> dict[str, float]:
        """By phase, of the last replay."""
        found: dict[str, float] = {}
        for (phase, begin), (_, end) in pairwise(self.events):
            found[phase] = found.get(phase, 0.0) + begin.elapsed_time(end) / 1e3
        return found


def tell_apart(params: dict[str, torch.Tensor]) -> None:
    """Make embeddings so large that what a token is prevails. With random weights a prompt's tokens otherwise become alike from
    layer to layer and choose the same experts, where floors and predictions state even routing."""
    params["embed"] *= 1024


class Bench:
    """A model with random weights on this GPU."""

    def __init__(self, model: ModelSpec, at: RankLayout, precision: str, block_tokens: int) -> None:
        self.model, self.at, self.block = model, at, block_tokens
        params = load_weights(model, at, checkpoint=None, seed=0, dtype=torch.bfloat16, device="cuda")
        tell_apart(params)
        self.params = quantise(params) if precision == "fp8" else params
        self.phases = Phases()
        self.kv: list[torch.Tensor] = []

    def transformer(self, experts: ExpertComm) -> Transformer:
        placed = slice_placement(self.model, self.at) if self.at.ep > 1 else None
        return Transformer(self.model, self.at, self.params, Rig(ops_for("triton"), solo(), experts, self.phases), placed)

    def room(self, sequences: int, context: int) -> int:
        """Make caches, filled at random, for so many sequences; blocks of each."""
        each = -(-context // self.block)
        self.kv.clear()
        self.kv += make_kv(self.model, self.at, sequences * each, self.block, torch.bfloat16, "cuda")
        for cache in self.kv:
            cache.normal_()
        return each


def decode(bench: Bench, comm: ExpertComm, batch: int, context: int, replays: int, rates: Rates, variants: bool) -> Json:
    """One point: `batch` sequences whose context passes `context` in the middle of the replays."""
    each = bench.room(batch, context + replays)
    transformer = bench.transformer(comm)
    if variants:
        tune(transformer, [batch])
    runner = DecodeRunner(transformer, bench.kv, bench.block, most=batch, max_context=context + replays, sizes=[batch])
    order = torch.randperm(batch * each).tolist()
    start = context - replays // 2 - _WARM
    segments = [Segment([17 + i], start, order[i * each:(i + 1) * each]) for i in range(batch)]

    def replayed() -> list[float]:
        runner.capture()
        runner.run(segments)
        return between(lambda: runner.again(batch), replays)

    seconds, tried = _faster(transformer, batch, replayed)
    if tried.get("variants", {}).get("serves") == "fused" and chains():
        tried["variants"]["steps_s"] = refine(runner, batch, pdl=True)
        tried["variants"]["parts"] = transformer.rig.ops.few.report()
        seconds = min(seconds, replayed(), key=statistics.median)
    runner.run(segments)
    kernels = kernel_seconds(lambda: runner.again(batch))
    parts = _parts(bench, runner, segments)
    load = Load(batch, float(batch * context), batch * context, batch, *expert_rows(bench.model, comm, batch))
    return {**row_of(bench, "decode", batch, context, batch, seconds, parts, load, rates), "kernels_s": kernels, **tried}


def _faster(transformer: Transformer, batch: int, replayed: Callable[[], list[float]]) -> tuple[list[float], Json]:
    """Seconds of replays with whichever kernels are faster, which serve from now on; both, and what was timed to choose."""
    seconds = replayed()
    ops = transformer.rig.ops
    if not isinstance(ops, FewRowsOps) or not (ops.few.seconds or ops.products.seconds):
        return seconds, {}
    parts, both = [*ops.few.report(), *ops.products.report()], {"fused_s": statistics.median(seconds)}
    cuts, shares = ops.few.forget(batch), dict(ops.products.shares)
    ops.products.shares.clear()
    if cuts or shares:
        plain = replayed()
        if statistics.median(plain) < statistics.median(seconds):
            seconds = plain
        else:
            ops.few.cuts.update(cuts)
            ops.products.shares.update(shares)
            seconds = replayed()
        both["plain_s"] = statistics.median(plain)
    serves = "fused" if ops.few.cuts or ops.products.shares else "plain"
    return seconds, {"variants": {**both, "serves": serves, "parts": parts}}


def prefill(bench: Bench, comm: ExpertComm, batch: int, length: int, replays: int, rates: Rates, eager: bool) -> Json:
    """One point: `batch` whole prompts of `length` tokens in one step, from a graph where the engine has one."""
    each, tokens = bench.room(batch, length), batch * length
    model = bench.transformer(comm)
    prompts = [Segment(torch.randint(bench.model.vocab, (length,)).tolist(), 0, range(i * each, (i + 1) * each), True)
               for i in range(batch)]
    size = None if eager else next((size for size in prompt_ladder(PROMPT_GRAPH_TOKENS) if size >= tokens), None)
    once, captured = _prompts_once(bench, model, prompts, size)
    seconds = between(once, replays)
    if captured is not None:  # a second graph, with events in it
        bench.phases.listening = True
        captured.capture()
        captured.run(prompts)
    bench.phases.listening = True
    once()
    bench.phases("end")
    torch.cuda.synchronize()
    parts = bench.phases.seconds()
    bench.phases.listening = False
    kernels = kernel_seconds(once)
    load = Load(tokens, batch * length * (length + 1) / 2, tokens, batch, *expert_rows(bench.model, comm, tokens))
    return {**row_of(bench, "prefill", batch, length, tokens, seconds, parts, load, rates), "graph_tokens": size or 0,
            "kernels_s": kernels}


def _prompts_once(bench: Bench, model: Transformer, prompts: list[Segment],
                  size: int | None) -> tuple[Callable[[], object], PromptRunner | None]:
    """What computes prompts once, its input on the device; the captured step of so many tokens, where there is one."""
    tokens = sum(len(s.token_ids) for s in prompts)
    if size is None:
        step = make_step(prompts, bench.block, "cuda")
        return lambda: model.forward(step, bench.kv, tokens), None
    runner = PromptRunner(model, bench.kv, bench.block, most=tokens, sequences=len(prompts), decodes=0, max_context=tokens,
                          sizes=[size])
    runner.capture()
    runner.run(prompts)
    rows = torch.tensor(list(accumulate(len(s.token_ids) for s in prompts)), device="cuda") - 1

    def once() -> None:
        runner.again((size, 0))
        bench.phases("head")
        runner.head(rows)

    return once, runner


def expert_rows(model: ModelSpec, comm: ExpertComm, tokens: int) -> tuple[int, int]:
    """Rows that the experts of all layers here get in a step of `tokens` own tokens, and how many of them are copied: those that
    came to a slice, else every choice where it lies."""
    if isinstance(comm, SliceComm):
        return sum(comm.rows), sum(comm.rows)
    return tokens * (model.moe.top_k if model.moe else 0) * model.moe_layers, 0


def between(call: Callable[[], object], replays: int) -> list[float]:
    """Seconds from one call's beginning to the next's, calls queued one behind the other."""
    for _ in range(_WARM):
        call()
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    for mark in marks[:-1]:
        mark.record()
        call()
    marks[-1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def _parts(bench: Bench, runner: DecodeRunner, segments: list[Segment]) -> dict[str, float]:
    """Seconds by phase of a second graph with events in it."""
    bench.phases.listening = True
    runner.capture()
    bench.phases.listening = False
    found = []
    runner.run(segments)
    for _ in range(5):
        runner.again(len(segments))
        torch.cuda.synchronize()
        found.append(bench.phases.seconds())
    return {name: statistics.median(parts[name] for parts in found) for name in found[0]}


def kernel_seconds(call: Callable[[], object]) -> dict[str, list[float]]:
    """(seconds, launches) by kernel of one step, as the profiler saw them, longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    rows = {event.key[:70]: [event.self_device_time_total / 1e6, event.count] for event in profile.key_averages()}
    return dict(sorted(rows.items(), key=lambda item: -item[1][0])[:24])


def row_of(bench: Bench, phase: str, batch: int, context: int, made: int, seconds: list[float], parts: dict[str, float],
         load: Load, rates: Rates) -> Json:
    floors = phase_floors(bench.model, bench.at, bench.params, load, rates, 2)
    ordered, middle = sorted(seconds), statistics.median(seconds)
    at = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
    return {"phase": phase, "batch": batch, "context": context, "step_s": middle, "p10_s": at(0.1), "p90_s": at(0.9),
            "replays": len(seconds), "warm_up": _WARM, "tokens_per_s": made / middle, "floor_s": sum(floors.values()),
            "roofline_share": sum(floors.values()) / middle, "parts_s": parts, "floors_s": floors,
            "expert_rows": load.expert_rows, "memory_bytes": torch.cuda.max_memory_allocated()}


@functools.cache
def measure_rates() -> Rates:
    """The ceilings of `benchmarks.timing`, and a row-wise scaled fp8 product of the same size."""
    ceilings = measure_ceilings()
    n = 8192
    (a, a_scale), (b, b_scale) = (quant_fp8_rows(torch.randn(n, n, dtype=torch.bfloat16, device="cuda")) for _ in range(2))
    product = time_graph([lambda: torch._scaled_mm(a, b.t(), scale_a=a_scale[:, None], scale_b=b_scale[None],
                                                   out_dtype=torch.bfloat16, use_fast_accum=True)], replays=10)
    return Rates(ceilings.read_bytes_per_s, ceilings.bf16_flop_per_s, 2 * n**3 / product.median_s)


def show(row: Json) -> None:
    """A line and its breakdown."""
    click.echo(f"{row['phase']:8} batch {row['batch']:4} context {row['context']:6}  {row['step_s'] * 1e3:8.3f} ms "
               f"({row['p10_s'] * 1e3:.3f} .. {row['p90_s'] * 1e3:.3f})  {row['tokens_per_s']:9.0f} tok/s  "
               f"{row['roofline_share']:6.1%} of the floor {row['floor_s'] * 1e3:.3f} ms")
    for name, seconds in sorted(row["parts_s"].items(), key=lambda item: -item[1]):
        floor = row["floors_s"].get(name)
        click.echo(f"    {name:16}{seconds * 1e3:9.3f} ms" + (f"   floor {floor * 1e3:.3f}" if floor else ""))
    for name, (seconds, launches) in row.get("kernels_s", {}).items():
        click.echo(f"        {seconds * 1e3:8.3f} ms {launches:5.0f} x {seconds / launches * 1e6:7.1f} us  {name}")
    if "variants" in row:
        show_variants(row["variants"])


def show_variants(found: Json) -> None:
    """Both whole steps, and the parts that were timed to choose kernels."""
    whole = ", ".join(f"{name[:-2]} {found[name] * 1e3:.3f} ms" for name in ("plain_s", "fused_s") if name in found)
    for name, seconds in found.get("steps_s", []):
        click.echo(f"        {seconds * 1e3:8.4f} ms  {name}")
    click.echo(f"    kernels for few rows: {whole}; {found['serves']} serves")
    for part in found["parts"]:
        cuts = " ".join(map(_cut_word, part["cuts"]))
        seconds = [f"{name[:-2]} {part[name] * 1e6:6.1f} us, " for name in ("plain_s", "fused_s") if part[name] is not None]
        rows = "long steps" if part["tokens"] is None else f"{part['tokens']:3} tokens"  # tiles serve prefills of any length
        click.echo(f"        {part['part']:9} {rows}: {''.join(seconds)}{part['serves']} {cuts}")


def _cut_word(cut: Json) -> str:
    """A cut in a word: of a product of few rows, or of one in tiles (which has rows, `m`)."""
    return "m{m}n{n}k{k}w{warps}s{stages}".format(**cut) if "m" in cut else name_of(Cut(**cut))


def points(bench: Bench, phase: str, batches: tuple[int, ...], contexts: tuple[int, ...], *, sliced: bool, skew: float,
           replays: int, rates: Rates, variants: bool, eager: bool) -> Iterator[Json]:
    """Every batch at every context. A row is given before it is shown: whatever showing it does, it is kept."""
    for batch in batches:
        for context in contexts:
            comm: ExpertComm = Local()
            if sliced:
                tokens = own_tokens(phase, batch, context)
                comm = SliceComm(draw_arrivals(bench.model, bench.at, tokens, skew=skew, seed=1, device="cuda"),
                                 padded=phase == "prefill")
            row = (decode(bench, comm, batch, context, replays, rates, variants) if phase == "decode"
                   else prefill(bench, comm, batch, context, replays, rates, eager))
            yield row
            show(row)


def own_tokens(phase: str, batch: int, context: int) -> int:
    """Tokens of one step of a rank: one of each sequence in decode, all of each prompt in prefill."""
    return batch if phase == "decode" else batch * context


def keep(out: Path | None, record: Json) -> None:
    if out is not None:
        write_text(out, json.dumps(record, indent=1) + "\n")


@click.command(help=__doc__)
@click.option("--model", "name", default="qwen3-30b-a3b", help="A preset, a config.json or a checkpoint folder.")
@click.option("--batch", "batches", type=int, multiple=True, default=(64,))
@click.option("--context", "contexts", type=int, multiple=True, default=(1024,), help="Context, or prompt length in prefill.")
@click.option("--ep", type=int, default=1, help="EP size of the instance whose rank is run.")
@click.option("--redundant", type=int, default=0, help="Redundant experts of the instance.")
@click.option("--rank-slice", "sliced", is_flag=True, help="Run one rank of --ep ranks.")
@click.option("--skew", type=float, default=0.0, help="Spread of the experts' log popularity; 0: uniform.")
@click.option("--precision", type=click.Choice(["bf16", "fp8"]), default="bf16")
@click.option("--phase", type=click.Choice(["decode", "prefill"]), default="decode")
@click.option("--layers", type=int, default=None, help="Run only so many layers.")
@click.option("--block-tokens", type=int, default=64)
@click.option("--replays", type=int, default=30)
@click.option("--variants", is_flag=True, help="Choose kernels for up to 16 rows by timing; print both (decode).")
@click.option("--eager", is_flag=True, help="Launch prompts kernel by kernel, where an engine has a graph too.")
@click.option("--hf", is_flag=True, help="Then the same steps by transformers, in the same run (Qwen3-MoE).")
@click.option("--commit", default=None)
@click.option("--json", "out", type=click.Path(path_type=Path), default=None, help="Write figures and provenance here.")
def main(name: str, batches: tuple[int, ...], contexts: tuple[int, ...], ep: int, redundant: int, sliced: bool, skew: float,
         precision: str, phase: str, layers: int | None, block_tokens: int, replays: int, variants: bool, eager: bool,
         hf: bool, commit: str | None, out: Path | None) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("this benchmark needs a CUDA GPU")
    if ep > 1 and not sliced:
        raise click.UsageError("one GPU runs EP sizes above 1 as --rank-slice alone")
    torch.set_grad_enabled(False)
    model = shorten(load_model(name), layers)
    rates = measure_rates()
    bench = Bench(model, slice_layout(model, ep, redundant) if sliced else single(model), precision, block_tokens)
    rows: list[Json] = []
    record = {"model": name, "layers": model.layers, "ep": ep, "redundant": redundant, "rank_slice": sliced, "skew": skew,
              "precision": precision, "block_tokens": block_tokens, "rates": asdict(rates), "rows": rows,
              "provenance": {**provenance(commit), "method": __doc__}}
    for row in points(bench, phase, batches, contexts, sliced=sliced, skew=skew, replays=replays, rates=rates,
                      variants=variants, eager=eager):
        rows.append(row)
        keep(out, record)  # a run that is cut off leaves what it had
    if hf:
        del bench
        gc.collect()
        torch.cuda.empty_cache()
        for row in rows:
            row["hf_step_s"] = hf_step_s(model, phase, row["batch"], row["context"])
            torch.cuda.empty_cache()
            click.echo(f"transformers, batch {row['batch']}: {row['hf_step_s'] * 1e3:.1f} ms, "
                       f"{row['hf_step_s'] / row['step_s']:.1f} times as long")
        keep(out, record)


if __name__ == "__main__":
    main()
