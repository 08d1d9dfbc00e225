"""Which kernels serve a decode step of one token, and how near the step comes to what memory allows.

    python -m benchmarks.few_rows --json out.json            # 16 layers of Qwen3-30B-A3B; --layers 48 for all

First every kernel variant that `runtime.refine` may choose is held against float64 at the model's shapes and timed alone, as
the median of graph replays over the weights of many layers (early ones overlap with themselves there, so that this says what
they can read a second, not what they take in a chain). Then whole steps: plain kernels, those that `runtime.tune` chooses by
timing parts, and those that `runtime.refine` chooses by timing steps, every attempt with its step's median. The share of the
roofline is the floor of `benchmarks.floor` over the step, from the read bandwidth of this run. What one layer takes is
the step without its head over the layers, and `whole_model_s` that times the model's layers plus the head.

Weights are random; each step reads other experts. One line a finding is printed as it is made, and the JSON is written
after each stage, so that a run that is cut off leaves what it had.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.floor import Load, Rates
from benchmarks.step import Bench, between, kernel_seconds, row_of
from benchmarks.timing import measure_ceilings, provenance, time_graph
from runtime import refine, tune
from runtime.batch import Segment
from runtime.comm.experts import Local
from runtime.decode import DecodeRunner
from runtime.few_rows import FewRowsOps
from runtime.kernels import reference
from runtime.kernels.gate import norm_gate_topk
from runtime.kernels.moe_rows import moe_rows
from runtime.kernels.skinny import Cut, skinny_linear
from runtime.layout import single
from runtime.model.attention import Gqa
from runtime.model.transformer import MoeFfn, Transformer
from twin.spec.load import load_model
from twin.validate.step import shorten

Json = dict[str, Any]
_BOUND = 6e-3
"""Relative error in norm that roundings to bf16 explain."""


class Findings:
    """What was found so far, printed and written."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.began, self.record = out, time.monotonic(), {}

    def say(self, text: str) -> None:
        click.echo(f"[{time.monotonic() - self.began:5.1f} s] {text}")

    def write(self, **found: Any) -> None:
        self.record.update(found)
        if self.out is not None:
            self.out.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")


def early(cut: Cut) -> Cut:
    return replace(cut, pdl=True, early=True)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def checks(transformer: Transformer) -> list[tuple[str, Callable[[], float]]]:
    """(variant, its error against float64 with the first layer's weights)."""
    layer, hidden = transformer.layers[0], transformer.model.hidden
    a, ffn = layer.attention, layer.ffn
    assert isinstance(a, Gqa) and isinstance(ffn, MoeFfn) and isinstance(a.qkv, torch.Tensor) and isinstance(a.out, torch.Tensor)
    qkv, out, moe, w = a.qkv, a.out, ffn.moe, ffn.weights
    stream = torch.Generator("cuda").manual_seed(1)
    draw = lambda width: torch.randn(1, width, generator=stream, device="cuda").bfloat16()  # noqa: E731
    x, y = draw(hidden), draw(out.shape[1])
    normed = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + layer.eps)
    normed_qkv, narrow = normed * layer.attn_norm.double(), (normed * layer.ffn_norm.double()).bfloat16()
    wants = {"qkv": normed_qkv @ qkv.double().T, "out": y.double() @ out.double().T + x.double()}
    router = ffn.router.narrow_EH if ffn.router.narrow_EH is not None else ffn.router.weight_EH
    choice = reference.gate_topk((narrow.double() @ router.double().T).float(), moe.top_k, renormalize=moe.norm_top_k,
                                 compute=torch.float64)
    ids = torch.arange(0, moe.experts, moe.experts // moe.top_k, device="cuda", dtype=torch.int32)[None, :moe.top_k].contiguous()
    weights = torch.rand(1, moe.top_k, generator=stream, device="cuda")
    few = [t.index_select(0, ids[0]) for t in (w.w13, w.w2)]
    expert_want = reference.fused_moe(x, *few, weights, torch.arange(moe.top_k, device="cuda", dtype=torch.int32)[None],
                                      compute=torch.float64).double() + x.double()
    arrived = torch.zeros(16, dtype=torch.int32, device="cuda")

    def gate(cut: Cut) -> float:
        got_x, got, got_ids = norm_gate_topk(x, layer.ffn_norm, layer.eps, router, moe.top_k, cut, arrived,
                                             renormalize=moe.norm_top_k)
        same = torch.equal(got_ids.long(), choice[1].long())
        return max(relative(got_x, narrow), relative(got, choice[0])) if same else float("inf")

    def experts(up: Cut, down: Cut) -> float:
        return relative(moe_rows(x, w.w13, w.w2, weights, ids, up, down, residual_TH=x), expert_want)

    found: list[tuple[str, Callable[[], float]]] = []
    for cut in refine.ROWS:
        for part, weight, row, more in (("qkv", qkv, x, {"norm": (layer.attn_norm, layer.eps)}),
                                        ("out", out, y, {"residual_TN": x})):
            fitted = early(tune.fit(cut, weight.shape[1]))
            found.append((f"{part} {refine.name_of(fitted)}", lambda c=fitted, w=weight, r=row, m=more, p=part:
                          relative(skinny_linear(r, w, c, **m), wants[p])))
    found += [(f"router {refine.name_of(cut)}", lambda c=cut: gate(c)) for cut in map(early, refine.ROUTER)]
    down = Cut(4, 512, 2)
    found += [(f"up {refine.name_of(cut)}", lambda c=cut: experts(c, down)) for cut in map(early, refine.STREAMS)]
    found += [(f"down {refine.name_of(cut)}", lambda c=cut: experts(tune.UP[0], c)) for cut in map(early, refine.SIDE_BY_SIDE)]
    return found


def check(findings: Findings, transformer: Transformer) -> bool:
    errors = {}
    for name, error in checks(transformer):
        try:
            errors[name] = error()
        except Exception as err:  # one that does not run is a finding; the others go on
            errors[name] = float("nan")
            findings.say(f"{name}: {type(err).__name__}: {str(err)[:160]}")
        if not errors[name] < _BOUND:
            findings.say(f"{name}: relative error {errors[name]:.2e}")
    real = [error for error in errors.values() if not math.isnan(error)]
    findings.say(f"{len(errors)} variants against float64, {len(real)} ran, the largest error {max(real, default=0.0):.2e}")
    findings.write(errors=errors)
    return all(error < _BOUND for error in errors.values())


def alone(findings: Findings, transformer: Transformer, ops: FewRowsOps) -> None:
    """Every variant by itself, and the plain operators."""
    table, found = ops.few, {}
    for trial in refine.chained(transformer, ops):
        key = trial.key
        table.cuts.pop(key, None)
        bytes_ = 2 * key[2][0] * key[2][1]
        if key[0] == "experts":
            bytes_ = transformer.model.moe.top_k * key[2][1] * key[2][2] * 3  # gate, up and down in bf16
        choices = [(), *trial.cuts, *[(trial.cuts[0][0], second) for second in trial.followed]]
        for cuts in choices:
            table.cuts.pop(key, None)
            name = f"{key[0]} plain"
            if cuts:
                table.cuts[key] = tuple(early(cut) for cut in cuts)
                name = f"{key[0]} {' '.join(refine.name_of(cut) for cut in table.cuts[key])}"
            try:
                found[name] = tune.graph_seconds(trial.calls)
            except Exception as err:
                findings.say(f"{name}: {type(err).__name__}: {str(err)[:160]}")
                continue
            findings.say(f"alone {name:44} {found[name] * 1e6:7.2f} us, {bytes_ / found[name] / 1e12:.2f} TB/s")
        table.cuts.pop(key, None)
    findings.write(alone_s=found)


def steps(findings: Findings, bench: Bench, rates: Rates, context: int, replays: int) -> None:
    """Whole steps: plain, by parts, by steps."""
    each = bench.room(1, context + replays)
    transformer = bench.transformer(Local())
    ops = transformer.rig.ops
    assert isinstance(ops, FewRowsOps)
    runner = DecodeRunner(transformer, bench.kv, bench.block, most=1, max_context=context + replays, sizes=[1])
    segments = [Segment([17], context - replays // 2 - 3, torch.randperm(each).tolist())]
    found: Json = {"all_right": check(findings, transformer)}
    runner.capture()

    def measured(name: str) -> None:
        runner.run(segments)
        seconds = between(lambda: runner.again(1), replays)
        rows = bench.model.moe.top_k * bench.model.moe_layers
        row = row_of(bench, "decode", 1, context, 1, seconds, {}, Load(1, float(context), context, 1, rows), rates)
        runner.run(segments)
        row["kernels_s"] = kernel_seconds(lambda: runner.again(1))
        found[name] = row
        findings.write(steps=found)
        findings.say(f"step {name}: {row['step_s'] * 1e3:.3f} ms ({row['p10_s'] * 1e3:.3f} .. {row['p90_s'] * 1e3:.3f}), "
                     f"{row['roofline_share']:.1%} of the floor {row['floor_s'] * 1e3:.3f} ms")

    measured("plain")
    alone(findings, transformer, ops)
    tune.tune(transformer, [1])
    findings.write(parts=ops.few.report())
    runner.capture_one(1)
    measured("tuned")
    tried = refine.refine(runner, 1, pdl=True)
    for name, seconds in tried:
        findings.say(f"refine {name:48} {seconds * 1e3:.4f} ms")
    findings.write(tried=tried, chosen={key[0]: [refine.name_of(cut) for cut in cuts] for key, cuts in ops.few.cuts.items()},
                   brings_next=bool(ops.ahead))
    findings.say(f"chosen: {findings.record['chosen']}, next projections brought in: {bool(ops.ahead)}")
    runner.capture_one(1)
    measured("refined")
    for name, (seconds, launches) in found["refined"]["kernels_s"].items():
        findings.say(f"    {seconds * 1e3:8.3f} ms {launches:5.0f} x {seconds / launches * 1e6:7.2f} us  {name}")


def project(findings: Findings, bench: Bench, layers: int, rates: Rates) -> None:
    """One layer's seconds, and a whole model's."""
    head = bench.params["head"] if "head" in bench.params else bench.params["embed"]
    copies = [head, head.clone()]
    row = torch.randn(1, head.shape[1], device="cuda", dtype=head.dtype)
    head_s = time_graph([lambda w=w: torch.nn.functional.linear(row, w).float().argmax(-1) for w in copies], 10).median_s
    found = findings.record["steps"]
    summary = {}
    for name in ("plain", "tuned", "refined"):
        step, floor = found[name]["step_s"], found[name]["floor_s"]
        layer_s = (step - head_s) / bench.model.layers
        floor_head = found[name]["floors_s"]["head"]
        whole_floor = (floor - floor_head) / bench.model.layers * layers + floor_head
        summary[name] = {"layer_s": layer_s, "whole_model_s": layer_s * layers + head_s,
                         "whole_floor_s": whole_floor, "whole_share": whole_floor / (layer_s * layers + head_s)}
        findings.say(f"{name:8} {layer_s * 1e6:6.2f} us a layer; {layers} layers and head: "
                     f"{summary[name]['whole_model_s'] * 1e3:.3f} ms, {summary[name]['whole_share']:.1%} of the roofline")
    findings.write(head_s=head_s, summary=summary)


@click.command(help=__doc__)
@click.option("--model", "name", default="qwen3-30b-a3b")
@click.option("--layers", type=int, default=16, help="Layers that are run; the whole model's step follows from them.")
@click.option("--context", type=int, default=1024)
@click.option("--replays", type=int, default=60)
@click.option("--commit", default=None)
@click.option("--json", "out", type=click.Path(path_type=Path), default=None)
def main(name: str, layers: int, context: int, replays: int, commit: str | None, out: Path | None) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("this benchmark needs a CUDA GPU")
    torch.set_grad_enabled(False)
    findings = Findings(out)
    whole = load_model(name)
    model = shorten(whole, layers)
    ceilings = measure_ceilings()
    rates = Rates(ceilings.read_bytes_per_s, ceilings.bf16_flop_per_s, ceilings.bf16_flop_per_s)
    findings.write(model=name, layers=model.layers, context=context, rates=asdict(rates),
                   provenance={**provenance(commit), "method": __doc__})
    findings.say(f"{torch.cuda.get_device_name(0)}, reads {rates.read_bytes_per_s / 1e12:.2f} TB/s")
    bench = Bench(model, single(model), "bf16", 64)
    findings.say("weights are there")
    steps(findings, bench, rates, context, replays)
    project(findings, bench, whole.layers, rates)


if __name__ == "__main__":
    main()
