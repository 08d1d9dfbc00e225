"""Kernels for small steps are chosen by timing, never unless they give the plain kernels' numbers, and serve whole steps."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from test_decode_runner import BLOCK, LENS, build, plain_tokens, prompts, tiny

from runtime import few_rows, tune
from runtime.batch import Segment, make_step
from runtime.decode import DecodeRunner
from runtime.few_rows import FewRows, FewRowsOps
from runtime.kernels.skinny import Cut
from runtime.model.transformer import Transformer

SMALL = {"LANES": (Cut(16, 64, 1),), "TENSOR": (Cut(32, 64, 4, dot=True),), "ROUTER": (Cut(8, 0, 1),), "UP": (Cut(16, 64, 1),),
         "DOWN": (Cut(32, 32, 1), Cut(64, 32, 1))}


@pytest.fixture(autouse=True)
def small_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles as small as the models."""
    for name, cuts in SMALL.items():
        monkeypatch.setattr(tune, name, cuts)
    if not torch.cuda.is_available():
        monkeypatch.setattr(tune, "_ROUNDING", 1e-4)  # everything is fp32 here


def clock(transformer: Transformer, fused: float) -> tune.Timer:
    """A timer that gives plain operators a second and fused ones so much: entries that are not settled are being tried."""
    table = few(transformer)
    return lambda calls: fused if set(table.cuts) - set(table.seconds) else 1.0


def few(transformer: Transformer) -> FewRows:
    assert isinstance(transformer.rig.ops, FewRowsOps)
    return transformer.rig.ops.few


PARTS = {"qwen3_moe": ["experts", "out", "qkv", "router"], "gpt_oss": ["experts", "out", "qkv", "router"],
         "deepseek_v3": ["out", "router"], "llama": ["out", "qkv"]}


@pytest.mark.parametrize("arch", [pytest.param("qwen3_moe", marks=pytest.mark.slow), "gpt_oss", "deepseek_v3", "llama"])
def test_whole_steps_of_fused_kernels(arch: str, device: torch.device) -> None:
    """A runner whose every part is fused gives the torch backend's logits and tokens, padding included."""
    model = tiny(arch)
    want, want_logits = plain_tokens(model, device, 3)
    transformer, kv = build(model, "triton", device)
    transformer.forward(make_step(prompts(), BLOCK, device), kv, 64)
    tune.tune(transformer, [4, 32], clock(transformer, 0.5), pdl=False)
    assert sorted(key[0] for key in few(transformer).cuts) == PARTS[arch] and {key[1] for key in few(transformer).cuts} == {4}
    loads = [layer.ffn.load_E.clone() for layer in transformer.layers if hasattr(layer.ffn, "load_E")]
    runner = DecodeRunner(transformer, kv, BLOCK, most=4, max_context=32, sizes=[4])
    if device.type == "cuda":
        runner.capture()
    launched = []
    plain = few_rows.skinny_linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "skinny_linear", lambda *a, **k: launched.append(1) or plain(*a, **k))
        drawn = runner.run([Segment([t], n, range(4 * i, 4 * i + 4)) for i, (t, n) in enumerate(zip(want[0], LENS, strict=True))])
    close = {"atol": 1e-3, "rtol": 1e-3} if device.type == "cpu" else {"atol": 0.15, "rtol": 0.1}
    torch.testing.assert_close(drawn.logits, want_logits[1], **close)
    if device.type == "cpu":
        # after a dense layer something is yet to be added, which a norm alone does
        assert len(launched) == {"llama": 3, "deepseek_v3": 2}.get(arch, 4)
        torch.testing.assert_close(runner.again(3).logits, want_logits[2], **close)
        after = [layer.ffn.load_E for layer in transformer.layers if hasattr(layer.ffn, "load_E")]
        assert all(int((b - a).sum()) == 2 * 3 * model.moe.top_k for a, b in zip(loads, after, strict=True))


def test_what_is_not_faster_or_not_the_same_is_not_taken(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, _ = build(tiny("llama"), "triton", device)
    tune.tune(transformer, [2], clock(transformer, 0.99), pdl=False)
    table = few(transformer)
    assert not table.cuts and len(table.seconds) == 2
    assert {line["serves"] for line in table.report()} == {"plain"} and table.report()[0]["plain_s"] == 1.0
    plain = few_rows.skinny_linear
    monkeypatch.setattr(few_rows, "skinny_linear", lambda *a, **k: plain(*a, **k) * 1.5)
    table.seconds.clear()
    tune.tune(transformer, [2], clock(transformer, 0.1), pdl=False)
    assert not table.cuts and not table.seconds


def test_an_entry_serves_its_own_number_of_tokens_alone(device: torch.device) -> None:
    transformer, _ = build(tiny("llama"), "triton", device)
    tune.tune(transformer, [2], clock(transformer, 0.5), pdl=False)
    table = few(transformer)
    weight = transformer.layers[0].attention.out
    assert table.find("out", 2, weight) and not table.find("out", 3, weight) and not table.find("qkv", 2, weight)
    taken = table.forget(2)
    assert len(taken) == 2 and not table.cuts


class Rehearsed:
    """A runner as `confirm` sees it: what steps take and give with and without entries in the table."""

    sizes = (1, 2, 64)

    def __init__(self, transformer: Transformer, fused_s: float, logits: torch.Tensor) -> None:
        self.transformer, self.graphs = transformer, {1: "plain", 2: "fused", 64: "plain"}
        self._fused_s, self._logits = fused_s, logits

    def rehearse(self, size: int) -> tuple[float, torch.Tensor]:
        return (self._fused_s, self._logits) if self.graphs[size] == "fused" else (1.0, torch.ones(2, 8))

    def capture_one(self, size: int) -> None:
        self.graphs[size] = "fused" if any(key[1] == size for key in few(self.transformer).cuts) else "plain"


@pytest.mark.parametrize(("fused_s", "logits", "serves"), [
    (0.9, torch.ones(2, 8) * 1.01, "fused"), (1.1, torch.ones(2, 8), "plain"), (0.5, torch.ones(2, 8) * 2, "plain"),
    (0.5, torch.full((2, 8), float("nan")), "plain")])
def test_whole_steps_decide(device: torch.device, fused_s: float, logits: torch.Tensor, serves: str) -> None:
    """Neither a size whose step is slower nor one whose logits differ keeps fused kernels."""
    transformer, _ = build(tiny("llama"), "triton", device)
    few(transformer).cuts[("out", 2, (64, 64))] = (Cut(16, 64, 1),)
    runner = Rehearsed(transformer, fused_s, logits)
    assert tune.confirm(runner) == {2: (1.0, fused_s)}  # type: ignore[arg-type]
    assert runner.graphs == {1: "plain", 2: serves, 64: "plain"} and bool(few(transformer).cuts) == (serves == "fused")


def test_cuts_fit_the_depth() -> None:
    assert tune.fit(Cut(8, 512, 4), 2048).k == 512 and tune.fit(Cut(8, 512, 4), 100).k == 128
    assert tune.fit(Cut(8, 256, 4), 14336).k == 1024 and tune.fit(Cut(16, 256, 4, dot=True), 14336).k == 256
