"""Kernels for steps of 1 to 16 tokens against float64: odd sizes, poisoned outputs, every fused neighbour on and off."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from kernel_checks import FP8_STEP, HALF, normal, poisoned, relative_error

from runtime.kernels import reference
from runtime.kernels.gate import norm_gate_topk
from runtime.kernels.moe_rows import moe_rows
from runtime.kernels.skinny import Cut, skinny_linear
from runtime.quantise import quantise_rows

VECTOR, TENSOR = Cut(4, 32, 1), Cut(16, 16, 4, dot=True)


def product(x, weight, norm, bias, residual):
    wide = x.double()
    if norm is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm[1]) * norm[0].double()
    y = wide @ weight.double().T
    y = y if bias is None else y + bias.double()
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("tokens", range(1, 17))
@pytest.mark.parametrize("cut", [VECTOR, TENSOR], ids=["lanes", "tensor cores"])
def test_linear(cut: Cut, tokens: int, device, rng, monkeypatch) -> None:
    """The sizes fit no tile; which neighbours are fused changes with the number of tokens."""
    depth, width = 50, 21
    x, weight = normal(rng, tokens, depth, dtype=HALF).to(device), normal(rng, width, depth, dtype=HALF, scale=0.2).to(device)
    norm = (normal(rng, depth, dtype=HALF).to(device), 1e-6) if tokens % 2 else None
    bias = normal(rng, width, dtype=HALF).to(device) if tokens % 3 else None
    residual = normal(rng, tokens, width, dtype=HALF).to(device) if tokens % 4 else None
    want = product(x, weight, norm, bias, residual)
    with poisoned(monkeypatch):
        got = skinny_linear(x, weight, cut, norm=norm, bias_N=bias, residual_TN=residual)
    assert got.dtype == HALF and relative_error(got, want) < 4e-3


@pytest.mark.parametrize("cut", [Cut(8, 16, 2), Cut(16, 32, 4, stages=2, dot=True)], ids=["lanes", "tensor cores"])
def test_linear_whose_tiles_are_even(cut: Cut, device, rng, monkeypatch) -> None:
    x, weight = normal(rng, 3, 64, dtype=HALF).to(device), normal(rng, 32, 64, dtype=HALF).to(device)
    norm = (normal(rng, 64, dtype=HALF).to(device), 1e-5)
    with poisoned(monkeypatch):
        got = skinny_linear(x, weight, cut, norm=norm)
    assert relative_error(got, product(x, weight, norm, None, None)) < 4e-3


@pytest.mark.parametrize("cut", [VECTOR, Cut(16, 32, 4, dot=True)], ids=["lanes", "tensor cores"])
def test_fp8_weights(cut: Cut, device, rng, monkeypatch) -> None:
    x, wide = normal(rng, 5, 48, dtype=HALF).to(device), normal(rng, 19, 48)
    data, scale = quantise_rows(wide)
    residual = normal(rng, 5, 19, dtype=HALF).to(device)
    want = product(x.cpu(), data.float() * scale[:, None], None, None, residual.cpu())
    with poisoned(monkeypatch):
        got = skinny_linear(x, data.to(device), cut, scale_N=scale.to(device), residual_TN=residual)
    assert relative_error(got, want) < 4e-3


def routed(rng, tokens: int, experts: int, choices: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.stack([torch.randperm(experts, generator=rng)[:choices] for _ in range(tokens)]).int()
    return torch.rand(tokens, choices, generator=rng).to(device), ids.to(device)


@pytest.mark.parametrize(("kind", "tokens"), [
    *(("plain", tokens) for tokens in (1, 2, 3, 16)), *((kind, tokens) for kind in ("biased", "fp8") for tokens in (1, 2, 3)),
    *(pytest.param(kind, 16, marks=pytest.mark.slow) for kind in ("biased", "fp8"))])
def test_moe(kind: str, tokens: int, device, rng, monkeypatch) -> None:
    """Odd sizes; some choices are absent (-1) or elsewhere, and a whole token is a graph's padding."""
    experts, choices, hidden, width = 5, 2, 44, 20
    x = normal(rng, tokens, hidden, dtype=HALF).to(device)
    w13, w2 = normal(rng, experts, 2 * width, hidden, scale=0.2), normal(rng, experts, hidden, width, scale=0.2)
    weights, ids = routed(rng, tokens, experts, choices, device)
    if tokens > 2:
        ids[0, 1], ids[1] = experts + 3, -1
    residual = normal(rng, tokens, hidden, dtype=HALF).to(device) if tokens != 3 else None
    more: dict[str, object] = {}
    if kind == "fp8":
        (w13, s13), (w2, s2) = quantise_rows(w13), quantise_rows(w2)
        more = {"w13_scale_E2I": s13.to(device), "w2_scale_EH": s2.to(device)}
    else:
        w13, w2 = w13.to(HALF), w2.to(HALF)
    if kind == "biased":
        more = {"w13_bias_E2I": normal(rng, experts, 2 * width, dtype=HALF).to(device), "activation": "swiglu_clamped",
                "w2_bias_EH": normal(rng, experts, hidden, dtype=HALF).to(device), "alpha": 1.702, "limit": 0.8}
    w13, w2 = w13.to(device), w2.to(device)
    want = reference.fused_moe(x, w13, w2, weights, ids, compute=torch.float64, **more)
    want = want.double() + (0 if residual is None else residual.double())
    for up, down in ((Cut(16, 32, 1), Cut(32, 16, 1)), (Cut(2, 64, 1, per_sm=1), Cut(4, 16, 1, stages=2 + tokens % 2)),
                     *([(Cut(4, 64, 1), Cut(8, 32, 1))] if tokens == 2 else [])):
        with poisoned(monkeypatch):
            got = moe_rows(x, w13, w2, weights, ids, up, down, residual_TH=residual, **more)
        assert relative_error(got, want) < (FP8_STEP if kind == "fp8" and FP8_STEP > 0.1 else 6e-3)
    if tokens > 2 and residual is not None:
        assert torch.equal(got[1], residual[1]), "padding adds nothing"


@pytest.mark.parametrize("options", [
    {"scoring": "softmax", "k": 3}, {"scoring": "softmax", "k": 2, "renormalize": False, "scale": 1.5},
    {"scoring": "sigmoid", "k": 4, "groups": 4, "topk_groups": 2, "scale": 2.5, "bias": True, "group_score": "top2"}])
@pytest.mark.parametrize("tokens", [1, 6, 16])
def test_router(options: dict, tokens: int, device, rng, monkeypatch) -> None:
    options = dict(options)
    experts, hidden, k = 20, 36, options.pop("k")
    x, gain = normal(rng, tokens, hidden, dtype=HALF).to(device), normal(rng, hidden, dtype=HALF).to(device)
    weight = normal(rng, experts, hidden, dtype=HALF).to(device)
    logit_bias = normal(rng, experts).to(device) if tokens > 1 else None
    bias = normal(rng, experts).to(device) if options.pop("bias", False) else None
    slots = torch.arange(tokens, device=device)
    slots[-1] = -1 if tokens > 1 else 0
    normed = (x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * gain.double()).to(HALF)
    logits = normed.double() @ weight.double().T + (0 if logit_bias is None else logit_bias.double())
    want, want_ids = reference.gate_topk(logits.float(), k, bias_E=bias, compute=torch.float64, **options)
    cut = Cut(8, 0, 1 if tokens == 6 else 4)  # of four warps and more a program compares all experts with all
    arrived, load = torch.zeros(16, dtype=torch.int32, device=device), torch.zeros(experts, dtype=torch.int64, device=device)
    for _ in range(2):  # the second call finds the counters as the first left them
        with poisoned(monkeypatch):
            got_x, weights, ids = norm_gate_topk(x, gain, 1e-6, weight, k, cut, arrived, logit_bias_E=logit_bias,
                                                 bias_E=bias, slots_T=slots, load_E=load, **options)
        real = slots >= 0
        assert relative_error(got_x, normed) < 2e-3
        assert torch.equal(ids[real].cpu().long(), want_ids[real].cpu().long()) and (ids[~real] == -1).all()
        assert relative_error(weights[real], want[real]) < 1e-3
        assert not arrived.any()
    assert load.sum() == 2 * k * int(real.sum())


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9, reason="needs sm_90")
@pytest.mark.parametrize("early", [False, True])
def test_kernels_that_start_while_their_forerunner_ends(early: bool, device, rng) -> None:
    """A chain of every fused kernel in a CUDA graph, replayed: each waits for what it reads and for what it overwrites."""
    tokens, hidden, experts, width, k = 4, 256, 16, 64, 4
    q, o = (normal(rng, hidden, hidden, dtype=HALF, scale=0.06).to(device) for _ in range(2))
    w13 = normal(rng, experts, 2 * width, hidden, dtype=HALF, scale=0.06).to(device)
    w2 = normal(rng, experts, hidden, width, dtype=HALF, scale=0.1).to(device)
    gate, gain = normal(rng, experts, hidden, dtype=HALF).to(device), normal(rng, hidden, dtype=HALF).to(device)
    x = normal(rng, tokens, hidden, dtype=HALF).to(device)
    arrived = torch.zeros(16, dtype=torch.int32, device=device)

    def chain(**start: bool) -> torch.Tensor:
        stream = x
        for i in range(24):
            y = skinny_linear(stream, q, Cut(8, 256, 4, **start), norm=(gain, 1e-6))
            stream = skinny_linear(y, o, Cut(16, 64, 4, 3, dot=True, **start), residual_TN=stream)
            normed, weights, ids = norm_gate_topk(stream, gain, 1e-6, gate, k, Cut(4, 0, 2, **start), arrived,
                                                  ahead=q if start.get("early") else None)
            up = Cut(8, 256, 4, **start) if i % 2 else Cut(2, 256, 4, per_sm=1, **start)
            down = Cut(8, 64, 2, **start) if i % 3 else Cut(4, 32, 4, stages=2, **start)
            stream = moe_rows(normed, w13, w2, weights, ids, up, down, residual_TH=stream)
        return stream

    start = {"pdl": True, "early": early}
    want = chain()
    chain(**start)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(**start)
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got, want)
