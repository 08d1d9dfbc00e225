"""Which kernels serve steps of few tokens, by timing them on this device, with this model's own weights.

For every part of a layer that `runtime.few_rows` can fuse and every such graph size: the plain operators and each way to
cut the fused kernel run as a CUDA graph over the weights of many layers, so that none stays in the cache. A fused kernel is
taken only if what it gives is what the plain ones give, up to rounding, and if it is faster. Then whole steps decide: a size
whose graph with fused kernels is not faster than without keeps the plain ones (`confirm`).
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import triton
from triton.errors import TritonError

from runtime.few_rows import Cuts, FewRowsOps, Key
from runtime.kernels.skinny import MOST_ROWS, Cut
from runtime.model.attention import Gqa
from runtime.model.transformer import Layer, MoeFfn, Transformer
from runtime.ops import Fp8Weight, Norm, Weight
from runtime.tune_products import tune_products

if TYPE_CHECKING:
    from runtime.decode import DecodeRunner

log = logging.getLogger("eptwin.tune")
_LAYERS = 12
"""Layers whose weights a timing rotates over."""
_MOST_STEPS = 16
_GAIN = 0.98
"""A fused kernel must take at most this share of the plain operators' time."""
_ROUNDING, _ROUNDING_FP8 = 0.02, 0.06
"""Relative error in norm that roundings to bf16 explain; with fp8 weights the plain product rounds its rows to fp8 too."""
_STEP_ROUNDING = 0.7
"""The same of logits after all layers, where roundings have added up and routers' near ties gone other ways; logits that have
nothing to do with each other are 1.4 apart."""
Outputs = tuple[torch.Tensor, ...]
Call = Callable[[], tuple[torch.Tensor | None, ...]]
Timer = Callable[[Sequence[Callable[[], object]]], float]

# Lane by lane, a tile 256 columns deep for each warp lies in registers as the row that it meets does: nothing passes through
# shared memory before the sum, and the loads of several steps are on their way together (so the compiled kernels show).
LANES = (Cut(4, 1024, 4), Cut(8, 1024, 4), Cut(8, 2048, 8))
TENSOR = (Cut(16, 256, 4, 4, dot=True), Cut(32, 256, 4, 3, dot=True), Cut(16, 512, 4, 3, dot=True))
ROUTER = (Cut(2, 0, 1), Cut(4, 0, 2), Cut(4, 0, 4), Cut(2, 0, 4))
UP = (Cut(8, 1024, 4), Cut(4, 1024, 4), Cut(4, 2048, 4))
DOWN = (Cut(4, 1024, 4), Cut(8, 512, 4), Cut(4, 512, 2))


@dataclass(frozen=True)
class Trial:
    """A part at a number of tokens: calls on the weights of several layers, and ways to cut it. `followed`: of cuts of two
    kernels, the second's, tried once the first's is settled. `adds`: calls give what is yet to be added, and the stream.
    `narrow`: weights are fp8."""

    key: Key
    calls: list[Call]
    cuts: tuple[Cuts, ...]
    followed: tuple[Cut, ...] = ()
    adds: bool = False
    narrow: bool = False

    def outputs(self) -> Outputs:
        """What the first call gives, however it was computed. The sum is no part of what is timed: the next norm makes it."""
        given = self.calls[0]()
        if self.adds:
            y, stream = given
            assert stream is not None
            return (stream if y is None else stream + y,)
        return tuple(one for one in given if one is not None)


def tune(transformer: Transformer, sizes: Sequence[int], timer: Timer | None = None, *, pdl: bool | None = None) -> None:
    """Fill the table of the transformer's operators for those of `sizes` that are small enough.

    `pdl`: whether kernels may also be launched while their forerunner ends (None: what the device can).
    """
    ops = transformer.rig.ops
    if not isinstance(ops, FewRowsOps):
        return
    timer = timer or graph_seconds
    pdl = chains() if pdl is None else pdl
    with torch.inference_mode():
        tune_products(transformer, sizes, timer, pdl=pdl)
        for tokens in [size for size in sizes if size <= MOST_ROWS]:
            for trial in trials(transformer, ops, tokens):
                if trial.key not in ops.few.seconds:  # a former formation of this process may have timed it
                    _decide(ops, trial, timer, pdl)


def chains() -> bool:
    """Whether this device can launch a kernel while its forerunner ends."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


def _decide(ops: FewRowsOps, trial: Trial, timer: Timer, pdl: bool) -> None:
    table, key = ops.few, trial.key
    table.cuts.pop(key, None)
    want, plain_s = trial.outputs(), timer(trial.calls)
    best: Cuts | None = None
    best_s = float("inf")

    def attempt(cuts: Cuts) -> None:
        nonlocal best, best_s
        table.cuts[key] = cuts
        try:
            if not alike(trial.outputs(), want, rounding(trial)):
                log.warning("%s of %d tokens cut as %s gives other numbers than the plain kernels", key[0], key[1], cuts)
                return
            seconds = timer(trial.calls)
        except (RuntimeError, ValueError, TritonError) as err:  # a cut that this device or shape does not take
            log.warning("%s of %d tokens cut as %s: %s", key[0], key[1], cuts, str(err)[:200])
            return
        if seconds < best_s:
            best, best_s = cuts, seconds

    for cuts in trial.cuts:
        attempt(cuts)
    for second in trial.followed:
        if best is not None:
            attempt((best[0], second))
    if pdl and best is not None:
        attempt(tuple(replace(cut, pdl=True) for cut in best))
    table.cuts.pop(key)
    if best is not None:
        table.seconds[key] = plain_s, best_s
        if best_s <= _GAIN * plain_s:
            table.cuts[key] = best


def alike(got: Outputs, want: Outputs, rounding: float) -> bool:
    """Floats equal up to rounding, integers nearly all (near ties of a router may turn)."""
    for a, b in zip(got, want, strict=True):
        if not a.dtype.is_floating_point:
            if (a == b).double().mean() < 0.9:
                return False
        elif not float((a.double() - b.double()).norm()) <= rounding * float(b.double().norm()):
            return False
    return True


def rounding(trial: Trial) -> float:
    """The relative error that a part may have."""
    return _ROUNDING_FP8 if trial.narrow else _ROUNDING


def trials(transformer: Transformer, ops: FewRowsOps, tokens: int) -> Iterator[Trial]:
    """What there is to decide for steps of so many tokens."""
    table = transformer.params["embed"]
    stream = torch.Generator(table.device).manual_seed(3)
    draw = lambda width: torch.randn(tokens, width, generator=stream, device=table.device).to(table.dtype)  # noqa: E731
    x = draw(transformer.model.hidden)
    layers = transformer.layers
    gqa = _spread([layer for layer in layers if isinstance(layer.attention, Gqa) and layer.attention.alone])
    if gqa:
        yield Trial(_key("qkv", tokens, gqa[0].attention.qkv), [_qkv(ops, layer, x) for layer in gqa],
                    _products(tokens, gqa[0].attention.qkv), narrow=isinstance(gqa[0].attention.qkv, Fp8Weight))
    alone = _spread([layer for layer in layers if layer.attention.alone])
    if alone:
        y = draw(data_of(alone[0].attention.out).shape[1])
        yield Trial(_key("out", tokens, alone[0].attention.out), [_out(ops, layer, y, x) for layer in alone],
                    _products(tokens, alone[0].attention.out),
                    adds=True, narrow=isinstance(alone[0].attention.out, Fp8Weight))
    moe = _spread([layer for layer in layers if isinstance(layer.ffn, MoeFfn) and transformer.at.tp == 1])
    if not moe or not isinstance(moe[0].ffn, MoeFfn):
        return
    router = moe[0].ffn.router
    weight = router.narrow_EH if router.narrow_EH is not None else router.weight_EH
    yield Trial(_key("router", tokens, weight), [_route(ops, layer, x) for layer in moe], tuple((cut,) for cut in ROUTER))
    if moe[0].ffn.alone:
        spec, (_, hidden, width) = moe[0].ffn.moe, moe[0].ffn.weights.w2.shape
        order = torch.rand(len(moe), tokens, spec.experts, generator=stream, device=table.device)
        ids = order.topk(spec.top_k, -1)[1].int()
        weights = torch.rand(tokens, spec.top_k, generator=stream, device=table.device)
        yield Trial(_key("experts", tokens, moe[0].ffn.weights.w13),
                    [_experts(ops, layer, x, ids[i].contiguous(), weights) for i, layer in enumerate(moe)],
                    tuple((fit(cut, hidden), fit(DOWN[0], width)) for cut in UP), tuple(fit(cut, width) for cut in DOWN[1:]),
                    adds=True,
                    narrow=moe[0].ffn.weights.s13 is not None)


def _qkv(ops: FewRowsOps, layer: Layer, x: torch.Tensor) -> Call:
    a = layer.attention
    assert isinstance(a, Gqa)
    return lambda: (ops.norm_linear(None, x, Norm(layer.attn_norm, layer.eps), a.qkv, a.qkv_bias)[0],)


def _out(ops: FewRowsOps, layer: Layer, y: torch.Tensor, x: torch.Tensor) -> Call:
    a = layer.attention
    return lambda: ops.linear_add(y, a.out, a.out_bias, x)


def _route(ops: FewRowsOps, layer: Layer, x: torch.Tensor) -> Call:
    ffn = layer.ffn
    assert isinstance(ffn, MoeFfn)
    slots, load = torch.zeros(len(x), dtype=torch.int64, device=x.device), torch.zeros_like(ffn.load_E)

    def call() -> tuple[torch.Tensor | None, ...]:
        normed, _, ids, weights = ops.norm_route(None, x, Norm(layer.ffn_norm, layer.eps), ffn.router, ffn.moe, slots, load)
        return normed, ids, weights

    return call


def _experts(ops: FewRowsOps, layer: Layer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Call:
    ffn = layer.ffn
    assert isinstance(ffn, MoeFfn)
    return lambda: ops.experts_add(x, ids, weights, ffn.weights, ffn.moe.swiglu_limit, x)


def _spread(layers: list[Layer]) -> list[Layer]:
    """Some of them, over the whole depth, of the first's shapes."""
    return layers[::max(1, len(layers) // _LAYERS)][:_LAYERS]


def _products(tokens: int, weight: Weight) -> tuple[Cuts, ...]:
    """Ways to cut a product: two rows may still do without the tensor cores."""
    depth = data_of(weight).shape[1]
    return tuple((fit(cut, depth),) for cut in (*(LANES if tokens <= 2 else ()), *(TENSOR if tokens > 1 else ())))


def fit(cut: Cut, depth: int) -> Cut:
    """The cut for a product of this depth: no deeper than it, and lane by lane, where every step is unrolled, in few steps."""
    k = min(cut.k, triton.next_power_of_2(depth))
    return replace(cut, k=k if cut.dot else max(k, triton.next_power_of_2(triton.cdiv(depth, _MOST_STEPS))))


def _key(part: str, tokens: int, weight: Weight) -> Key:
    return part, tokens, tuple(data_of(weight).shape)


def data_of(weight: Weight) -> torch.Tensor:
    return weight.data if isinstance(weight, Fp8Weight) else weight


def confirm(runner: DecodeRunner) -> dict[int, tuple[float, float]]:
    """Seconds of whole steps (plain, fused) by size, on a runner that has captured and shares its step with no other rank;
    sizes whose steps are no faster get a graph of plain kernels, the others what `runtime.refine` finds yet."""
    from runtime.refine import refine

    pdl = chains()
    ops = runner.transformer.rig.ops
    found: dict[int, tuple[float, float]] = {}
    if not isinstance(ops, FewRowsOps):
        return found
    for size in runner.sizes:
        if not any(key[1] == size for key in ops.few.cuts):
            continue
        fused_s, logits = runner.rehearse(size)
        fused, cuts = runner.graphs[size], ops.few.forget(size)
        runner.capture_one(size)
        plain_s, want = runner.rehearse(size)
        same = same_step(logits, want)
        if not same:
            log.warning("steps of %d tokens by fused kernels give other logits than by plain ones, which serve", size)
        if fused_s < plain_s and same:
            ops.few.cuts.update(cuts)
            runner.graphs[size] = fused
            fused_s = min((seconds for _, seconds in refine(runner, size, pdl=True)), default=fused_s) if pdl else fused_s
        found[size] = plain_s, fused_s
    for ffn in runner.transformer.moe_layers:
        ffn.load_E.zero_()  # rehearsals are no load
    return found


def same_step(got_BV: torch.Tensor, want_BV: torch.Tensor) -> bool:
    """Whether logits are alike in most rows: those of a router's near tie may go another way."""
    wrong = (got_BV - want_BV).double().norm(dim=-1) / want_BV.double().norm(dim=-1)
    return bool((wrong < _STEP_ROUNDING).double().mean() >= 0.5)


def graph_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of a call, as a CUDA graph runs them one after another: the median of some replays."""
    rounds = max(1, 48 // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    return replay_seconds(graph, 9) / (rounds * len(calls))


def replay_seconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Median seconds of a replay, after two to warm up."""
    seconds = []
    for i in range(replays + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i > 1:
            seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)
