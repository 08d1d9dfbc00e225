"""The decode runner against plain steps of the torch backend, and what a rank slice receives."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from runtime.batch import Segment, make_step
from runtime.comm.experts import Local
from runtime.comm.group import solo
from runtime.decode import DecodeRunner
from runtime.kv import make_kv
from runtime.layout import single
from runtime.model.transformer import Rig, Transformer
from runtime.ops import ops_for
from runtime.quantise import quantise, quantise_rows
from runtime.rank_slice import SliceComm, draw_arrivals, slice_layout, slice_placement
from runtime.tiny import tiny_config
from runtime.weights import load_weights
from twin.spec.errors import SpecError
from twin.spec.hf import model_from_hf_config
from twin.spec.model import ModelSpec

BLOCK = 4
LENS = (5, 9, 4)


def tiny(arch: str) -> ModelSpec:
    hidden = 256 if torch.cuda.is_available() else 64  # a GPU multiplies nothing narrower than 16
    return model_from_hf_config(tiny_config(arch, hidden=hidden, layers=2, experts=8, top_k=2, vocab=64, context=64), name=arch)


def build(model: ModelSpec, backend: str, device: torch.device, *, fp8: bool = False) -> tuple[Transformer, list[torch.Tensor]]:
    at = single(model)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    params = load_weights(model, at, checkpoint=None, seed=3, dtype=dtype, device=device)
    params = quantise(params) if fp8 else params
    rig = Rig(ops_for(backend), solo(), Local())
    return Transformer(model, at, params, rig), make_kv(model, at, 16, BLOCK, dtype, device)


def prompts() -> list[Segment]:
    return [Segment([(7 * i + j) % 60 for j in range(n)], 0, range(4 * i, 4 * i + 4), True) for i, n in enumerate(LENS)]


def plain_tokens(model: ModelSpec, device: torch.device, steps: int) -> tuple[list[list[int]], list[torch.Tensor]]:
    transformer, kv = build(model, "torch", device)
    tokens, logits = [], []
    segments = prompts()
    for _ in range(steps):
        logits.append(transformer.forward(make_step(segments, BLOCK, device), kv, 64))
        tokens.append(logits[-1].argmax(-1).tolist())
        segments = [Segment([t], len(s.token_ids) + s.start, s.blocks) for t, s in zip(tokens[-1], segments, strict=True)]
    return tokens, logits


@pytest.mark.parametrize("arch", ["qwen3_moe", "deepseek_v3", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_steps_of_the_runner_are_those_of_the_torch_backend(device: torch.device, arch: str) -> None:
    model = tiny(arch)
    want, want_logits = plain_tokens(model, device, 4)
    transformer, kv = build(model, "triton", device)
    first = transformer.forward(make_step(prompts(), BLOCK, device), kv, 64)
    close = {"atol": 1e-3, "rtol": 1e-3} if device.type == "cpu" else {"atol": 0.15, "rtol": 0.1}
    torch.testing.assert_close(first, want_logits[0], **close)
    untouched = [cache.clone() for cache in kv]
    runner = DecodeRunner(transformer, kv, BLOCK, most=4, max_context=32, sizes=[4])
    if device.type == "cuda":
        runner.capture()
    assert all(torch.equal(a, b) for a, b in zip(untouched, kv, strict=True)), "padding wrote KV"
    drawn = runner.run([Segment([t], n, range(4 * i, 4 * i + 4)) for i, (t, n) in enumerate(zip(want[0], LENS, strict=True))])
    torch.testing.assert_close(drawn.logits, want_logits[1], **close)
    if device.type == "cpu":
        assert drawn.tokens.tolist() == want[1]
        assert runner.again(3).tokens.tolist() == want[2]  # fed back on the device
        torch.testing.assert_close(runner.again(3).logits, want_logits[3], **close)
    loads = [layer.ffn.load_E.sum().item() for layer in transformer.layers if hasattr(layer.ffn, "load_E")]
    assert all(load == loads[0] for load in loads)
    assert loads[0] % model.moe.top_k == 0 and (device.type == "cuda" or loads[0] == (sum(LENS) + 9) * model.moe.top_k)


def test_steps_that_follow_stay_in_their_own_blocks(device: torch.device) -> None:
    """They pass into a block that was given, not into the first of all, and stop where what was given ends."""
    transformer, kv = build(tiny("llama"), "triton", device)
    runner = DecodeRunner(transformer, kv, BLOCK, most=1, max_context=32, sizes=[1])
    runner.run([Segment([5], 2, (3, 6))])
    for _ in range(5):
        runner.again(1)
    written = [i for i in range(len(kv[0])) if kv[0][i].any()]
    assert written == [3, 6] and all(kv[0][6, 0, row].any() for row in range(BLOCK))
    with pytest.raises(ValueError, match="outgrown its blocks"):
        runner.again(1)


def test_fp8_weights_give_nearly_the_same_logits(device: torch.device) -> None:
    model = tiny("llama")  # without routing, whose near ties a rounding may turn
    wide, kv = build(model, "torch", device)
    step = make_step(prompts(), BLOCK, device)
    want = wide.forward(step, kv, 64)
    narrow, kv = build(model, "triton", device, fp8=True)
    got = narrow.forward(step, kv, 64)
    assert ((got - want).norm() / want.norm()) < 0.15
    values = torch.randn(3, 5, 32)
    data, scale = quantise_rows(values)
    assert ((data.float() * scale[..., None] - values).norm() / values.norm()) < 0.04  # 3 bits of mantissa


@pytest.mark.parametrize(("skew", "redundant"), [(0.0, 0), (1.0, 0), (0.0, 4)])
def test_a_slice_receives_what_routing_sends(device: torch.device, skew: float, redundant: int) -> None:
    """As many rows as its share of the tokens' choices, also where its experts have replicas elsewhere."""
    model = tiny("qwen3_moe")
    at = slice_layout(model, 4, redundant)
    arrivals = draw_arrivals(model, at, 200, skew=skew, seed=1, device=device)
    assert len(arrivals) == model.moe_layers and all(a.slots_N1.max() < at.slots_per_rank for a in arrivals)
    rows = SliceComm(arrivals).rows
    expected = 200 * model.moe.top_k
    near = 2 if skew else 0.25 if redundant else 0.15
    assert all(abs(n - expected) < near * expected for n in rows)
    assert skew == 0 or max(rows) - min(rows) > 0.05 * expected
    comm, x = SliceComm(arrivals), torch.ones(200, 8, device=device)
    arrived = comm.dispatch(x, arrivals[0].back_TK, arrivals[0].weights_N1, 200)
    assert torch.equal(comm.combine(arrived.x_NH, arrived), x * model.moe.top_k)
    with pytest.raises(SpecError, match="divide"):
        slice_layout(model, 3)


def test_replicas_of_a_slice_lie_apart_and_share_their_experts_tokens(device: torch.device) -> None:
    """Every rank has one of the redundant slots, as a balancer spreads them, and all ranks together get all choices."""
    model = tiny("qwen3_moe")
    placed = slice_placement(model, slice_layout(model, 4, 4))[0]
    assert all(len({slot // 3 for slot in range(12) if placed[slot] == expert}) == 2 for expert in range(4))
    rows = [SliceComm(draw_arrivals(model, slice_layout(model, 4, 4, rank), 500, skew=0.0, seed=1, device=device)).rows
            for rank in range(4)]
    for layer in zip(*rows, strict=True):
        assert 0.93 < sum(layer) / (4 * 500 * model.moe.top_k) < 1.07 and max(layer) < 1.25 * min(layer)


def test_a_slice_takes_steps_of_its_own_tokens(device: torch.device) -> None:
    model = tiny("deepseek_v3")
    at = slice_layout(model, 4)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    params = load_weights(model, at, checkpoint=None, seed=3, dtype=dtype, device=device)
    comm = SliceComm(draw_arrivals(model, at, 2, skew=0.0, seed=1, device=device))
    transformer = Transformer(model, at, params, Rig(ops_for("triton"), solo(), comm))
    runner = DecodeRunner(transformer, make_kv(model, at, 8, BLOCK, dtype, device), BLOCK, most=2, max_context=16, sizes=[2])
    steps = [runner.run([Segment([5], 3, (1,)), Segment([6], 3, (2,))]).logits.clone() for _ in range(2)]
    assert torch.isfinite(steps[0]).all() and torch.equal(*steps)  # every layer gets its own arrivals in every step
    assert [p.shape[0] for name, p in params.items() if name.endswith("experts.w13")] == [2] * model.moe_layers
    loads = [layer.ffn.load_E.sum().item() for layer in transformer.layers if hasattr(layer.ffn, "load_E")]
    assert loads == [2 * 2 * model.moe.top_k] * model.moe_layers
