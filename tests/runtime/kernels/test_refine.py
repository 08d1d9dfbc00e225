"""Kernels of one token's steps are chosen by whole steps: what is faster stays, what gives other numbers is never timed."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from test_decode_runner import BLOCK, LENS, build, plain_tokens, prompts, tiny
from test_tune import few

from runtime import few_rows, refine
from runtime.batch import Segment, make_step
from runtime.decode import DecodeRunner
from runtime.kernels.skinny import Cut
from runtime.model.transformer import Transformer

HIDDEN = 256 if torch.cuda.is_available() else 64
"""Of `tiny`; a program that stays reads whole rows."""
SMALL = {"ROWS": (Cut(16, 64, 1),), "ROUTER": (Cut(8, 0, 4),), "STREAMS": (Cut(4, HIDDEN, 1, per_sm=1),),
         "SIDE_BY_SIDE": (Cut(8, 32, 1, stages=2),)}


@pytest.fixture(autouse=True)
def small_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles as small as the models, and no graphs where there is no GPU."""
    for name, cuts in SMALL.items():
        monkeypatch.setattr(refine, name, cuts)


class Rehearsed(DecodeRunner):
    """A runner whose steps take the seconds that `price` gives for the table; no graphs."""

    price = staticmethod(lambda table: 1.0)

    def capture_one(self, size: int) -> None:
        self.graphs[size] = (len(few(self.transformer).cuts), None)  # type: ignore[assignment]

    def rehearse(self, size: int, replays: int = 15) -> tuple[float, torch.Tensor]:
        return self.price(few(self.transformer)), torch.ones(1, 8)


def runner_of(transformer: Transformer, kv: list[torch.Tensor], price) -> Rehearsed:
    runner = Rehearsed(transformer, kv, BLOCK, most=1, max_context=32, sizes=[1])
    runner.price = price
    runner.capture_one(1)
    return runner


@pytest.mark.parametrize("arch", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_every_part_may_change_and_gives_the_same_step(arch: str, device: torch.device) -> None:
    """Each entry makes a step faster here, so all stay; tokens are the torch backend's."""
    model = tiny(arch)
    want, want_logits = plain_tokens(model, device, 3)
    transformer, kv = build(model, "triton", device)
    runner = runner_of(transformer, kv, lambda table: 1.0 / (1 + len(table.cuts) + sum(
        cut.stages > 1 or cut.per_sm > 0 for cuts in table.cuts.values() for cut in cuts)))
    tried = refine.refine(runner, 1, pdl=False)
    cuts = few(transformer).cuts
    assert {key[0] for key in cuts} == {"out", "qkv", "router", "experts"} and len(tried) == 7
    (experts,) = [cuts for key, cuts in cuts.items() if key[0] == "experts"]
    assert experts == (SMALL["STREAMS"][0], SMALL["SIDE_BY_SIDE"][0])
    transformer.forward(make_step(prompts()[:1], BLOCK, device), kv, 64)
    plain = DecodeRunner(transformer, kv, BLOCK, most=1, max_context=32, sizes=[1])
    launched = []
    kernel = few_rows.norm_gate_topk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "norm_gate_topk", lambda *a, **k: launched.append(1) or kernel(*a, **k))
        drawn = plain.run([Segment([want[0][0]], LENS[0], range(4))])
    assert len(launched) == model.layers
    close = {"atol": 1e-3, "rtol": 1e-3} if device.type == "cpu" else {"atol": 0.15, "rtol": 0.1}
    torch.testing.assert_close(drawn.logits[0], want_logits[1][0], **close)
    if device.type == "cpu":
        torch.testing.assert_close(plain.again(1).logits[0], want_logits[2][0], **close)


def test_what_is_not_faster_or_not_the_same_does_not_stay(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, kv = build(tiny("qwen3_moe"), "triton", device)
    runner = runner_of(transformer, kv, lambda table: 1.0)
    graph = runner.graphs[1]
    tried = refine.refine(runner, 1, pdl=False)
    assert len(tried) > 5 and not few(transformer).cuts and not transformer.rig.ops.ahead and runner.graphs[1] is graph
    kernel = few_rows.skinny_linear
    monkeypatch.setattr(few_rows, "skinny_linear", lambda *a, **k: kernel(*a, **k) * 1.5)
    runner.price = lambda table: 1.0 / (1 + len(table.cuts))
    assert refine.refine(runner, 1, pdl=False) == [], "it was chosen for before"
    few(transformer).refined.clear()
    tried = refine.refine(runner, 1, pdl=False)
    assert not any(name.startswith(("out", "qkv")) for name, _ in tried), "those parts' numbers are others now"
    assert {key[0] for key in few(transformer).cuts} == {"router", "experts"}


def test_larger_steps_only_start_early(device: torch.device) -> None:
    transformer, kv = build(tiny("qwen3_moe"), "triton", device)
    few(transformer).cuts[("out", 4, (64, 64))] = (Cut(16, 64, 1),)
    runner = runner_of(transformer, kv, lambda table: 0.5 if any(c.early for cuts in table.cuts.values() for c in cuts) else 1.0)
    runner.graphs[4] = runner.graphs[1]
    assert [seconds for _, seconds in refine.refine(runner, 4, pdl=True)] == [1.0, 0.5]
    assert few(transformer).cuts[("out", 4, (64, 64))] == (Cut(16, 64, 1, pdl=True, early=True),)
