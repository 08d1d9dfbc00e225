"""Which kernels serve a step of few tokens, by timing whole steps: what a kernel alone cannot tell.

Kernels of a chain that start early read their weights while others still compute, so that what one gains another may lose,
and how much depends on all of them. Beginning with what `runtime.tune` found, one thing is changed after another, and a
change stays if the whole captured step is faster by it. A kernel is only tried if what it gives is what the plain operators
give, and a change only stays if the step's logits are the same up to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from triton.errors import TritonError

from runtime.few_rows import Cuts, FewRowsOps
from runtime.kernels.skinny import Cut
from runtime.model.attention import Gqa
from runtime.model.transformer import MoeFfn, Transformer
from runtime.tune import DOWN, UP, Trial, alike, data_of, fit, rounding, same_step, trials

if TYPE_CHECKING:
    from runtime.decode import DecodeRunner

log = logging.getLogger("eptwin.refine")
_GAIN = 0.997
"""A change must leave at most this share of a step's time."""

# A whole row's weights lie in registers before the forerunner's results are there.
ROWS = (Cut(8, 2048, 4), Cut(4, 2048, 4), Cut(8, 4096, 8), Cut(4, 4096, 4), Cut(4, 4096, 8), Cut(16, 2048, 8))
ROUTER = (Cut(2, 0, 4), Cut(1, 0, 4), Cut(2, 0, 8))
STREAMS = (Cut(2, 2048, 4, per_sm=4), Cut(4, 2048, 8, per_sm=2), Cut(1, 2048, 4, per_sm=8), Cut(2, 2048, 4))
SIDE_BY_SIDE = (Cut(4, 256, 4, stages=3), Cut(4, 256, 4, stages=2), Cut(2, 256, 4, stages=3), Cut(8, 256, 8, stages=3),
                Cut(4, 256, 8, stages=3))
Attempt = Callable[[str, Callable[[], None]], None]


def refine(runner: DecodeRunner, size: int, *, pdl: bool) -> list[tuple[str, float]]:
    """Change the table's entries for steps of `size` tokens, whose graph is captured, for faster ones; what was tried and
    the seconds of its step, the first without a change. `pdl`: whether kernels may start early. What a former formation of
    this process found is taken as it is."""
    ops = runner.transformer.rig.ops
    assert isinstance(ops, FewRowsOps)
    table = ops.few
    if size in table.refined:
        if table.refined[size]:
            ops.ahead = _followers(runner.transformer)
            runner.capture_one(size)
        return []
    best_s, want = runner.rehearse(size)
    tried = [("as tuned", best_s)]

    def attempt(name: str, change: Callable[[], None]) -> None:
        nonlocal best_s
        cuts, ahead, graph = dict(table.cuts), ops.ahead, runner.graphs[size]
        change()
        runner.capture_one(size)
        seconds, logits = runner.rehearse(size)
        tried.append((name, seconds))
        if seconds <= _GAIN * best_s and same_step(logits, want):
            best_s = seconds
            return
        table.cuts, ops.ahead, runner.graphs[size] = cuts, ahead, graph

    if pdl:
        attempt("early", lambda: table.cuts.update({key: _early(cuts) for key, cuts in table.cuts.items() if key[1] == size}))
    if size == 1:
        with torch.inference_mode():
            for trial in chained(runner.transformer, ops):
                _try_all(ops, trial, attempt, pdl)
        attempt("bring the next projections in", lambda: setattr(ops, "ahead", _followers(runner.transformer)))
    table.refined[size] = size == 1 and bool(ops.ahead)
    return tried


def _try_all(ops: FewRowsOps, trial: Trial, attempt: Attempt, pdl: bool) -> None:
    """Every cut of a part that gives the plain operators' numbers; of the experts' two kernels one after the other."""
    table, key = ops.few, trial.key

    def one(cuts: Cuts) -> None:
        cuts = _early(cuts) if pdl else cuts
        before = table.cuts.pop(key, None)
        if cuts == before:
            table.cuts[key] = cuts
            return
        try:
            want = trial.outputs()
            table.cuts[key] = cuts
            right = alike(trial.outputs(), want, rounding(trial))
        except (RuntimeError, ValueError, TritonError) as err:  # a cut that this device or shape does not take
            log.warning("%s cut as %s: %s", key[0], cuts, str(err)[:200])
            right = False
        table.cuts.pop(key, None)
        if before is not None:
            table.cuts[key] = before
        if right:
            attempt(f"{key[0]} {' '.join(map(name_of, cuts))}", lambda: table.cuts.update({key: cuts}))
        else:
            log.warning("%s cut as %s gives other numbers than the plain kernels", key[0], cuts)

    for cuts in trial.cuts:
        one(cuts)
    for second in trial.followed:
        if served := table.cuts.get(key):
            one((served[0], second))


def _early(cuts: Cuts) -> Cuts:
    return tuple(replace(cut, pdl=True, early=True) for cut in cuts)


def name_of(cut: Cut) -> str:
    """A cut in a word, for records."""
    more = f"r{cut.per_sm}" * (cut.per_sm > 0) + f"s{cut.stages}" * (cut.stages > 1)
    return f"n{cut.n}k{cut.k}w{cut.warps}{more}{'d' * cut.dot}{'p' * cut.pdl}{'e' * cut.early}"


def chained(transformer: Transformer, ops: FewRowsOps) -> Iterator[Trial]:
    """The parts of a step of one token in the order of a layer, each with the cuts that a chain asks for."""
    found = {trial.key[0]: trial for trial in trials(transformer, ops, 1)}
    for part in ("out", "qkv"):
        if trial := found.get(part):
            depth = trial.key[2][1]
            yield replace(trial, cuts=tuple(dict.fromkeys((fit(cut, depth),) for cut in ROWS)))
    if trial := found.get("router"):
        yield replace(trial, cuts=tuple((cut,) for cut in ROUTER))
    if trial := found.get("experts"):
        hidden, experts = trial.key[2][2], trial.key
        served = ops.few.cuts.get(experts) or (fit(UP[0], hidden), fit(DOWN[0], trial.key[2][1] // 2))
        yield replace(trial, cuts=tuple((fit(cut, hidden), served[1]) for cut in STREAMS), followed=SIDE_BY_SIDE)


def _followers(transformer: Transformer) -> dict[int, torch.Tensor]:
    """For each router, the projections of the layer after, which nothing else needs to be known for."""
    found = {}
    for layer, after in zip(transformer.layers, transformer.layers[1:], strict=False):
        if isinstance(layer.ffn, MoeFfn) and isinstance(after.attention, Gqa):
            router = layer.ffn.router
            weight = router.narrow_EH if router.narrow_EH is not None else router.weight_EH
            found[weight.data_ptr()] = data_of(after.attention.qkv)
    return found
