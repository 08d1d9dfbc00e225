"""Norm, activation, quantisation, rotary, router and sampling against plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import FP8_STEP, HALF, normal, poisoned, relative_error

from runtime.kernels import fused, gate, reference, rope


@pytest.mark.parametrize("with_residual", [False, True])
def test_add_rmsnorm(with_residual, device, rng, monkeypatch) -> None:
    x, weight = normal(rng, 5, 96, dtype=HALF).to(device), normal(rng, 96, dtype=HALF).to(device)
    residual = normal(rng, 5, 96, dtype=HALF).to(device) if with_residual else None
    kept = residual.clone() if with_residual else None
    want = reference.add_rmsnorm(x, weight, 1e-6, kept, compute=torch.float64)
    with poisoned(monkeypatch):
        got = fused.add_rmsnorm(x, weight, 1e-6, residual)
    assert relative_error(got, want) < 5e-3
    if with_residual:
        assert torch.equal(residual, kept)


def test_rmsnorm_of_strided_rows(device, rng) -> None:
    x, weight = normal(rng, 4, 96).to(device), normal(rng, 40).to(device)
    want = reference.add_rmsnorm(x[:, :40], weight, 1e-6, compute=torch.float64)
    assert relative_error(fused.add_rmsnorm(x[:, :40], weight, 1e-6), want) < 1e-6


def test_silu_mul(device, rng, monkeypatch) -> None:
    x = normal(rng, 7, 2 * 72, dtype=HALF).to(device)
    with poisoned(monkeypatch):
        got = fused.silu_mul(x)
    assert relative_error(got, reference.silu_mul(x, compute=torch.float64)) < 5e-3


@pytest.mark.parametrize("name, width", [("quant_fp8_rows", 72), ("silu_mul_quant", 144)])
def test_fp8_rows(name, width, device, rng, monkeypatch) -> None:
    x = normal(rng, 6, width, dtype=HALF).to(device)
    x[3] = 0  # a row of zeros has a scale, and comes back as zeros
    x[4] *= 100
    with poisoned(monkeypatch):
        got, scale = getattr(fused, name)(x)
    want, want_scale = getattr(reference, name)(x)
    assert relative_error(scale, want_scale) < 1e-6
    back, exact = got.float() * scale[:, None], want.float() * want_scale[:, None]
    assert relative_error(back, exact) < FP8_STEP  # a tie may round either way
    assert not back[3].any() and back.isfinite().all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rotary", [32, 16])
def test_rope_norm_cache(interleaved, norm, rotary, device, rng, monkeypatch) -> None:
    heads, kv_heads, dim, tokens = 20, 2, 32, 5
    qkv = normal(rng, tokens, (heads + 2 * kv_heads) * dim, dtype=HALF).to(device)
    case = {
        "qkv_TC": qkv, "positions_T": torch.tensor([0, 5, 99, 3, 7], device=device),
        "slots_T": torch.tensor([3, 16, -1, 47, 15], device=device), "cos_sin": angles(rotary, device),
    }  # fmt: skip
    weights = {"q_norm_D": normal(rng, dim).to(device), "k_norm_D": normal(rng, dim).to(device)} if norm else {}
    ours, theirs = (torch.zeros(3, 2, 16, kv_heads, dim, dtype=HALF, device=device) for _ in range(2))
    options = dict(heads=heads, interleaved=interleaved, **weights)
    want = reference.rope_norm_cache(**case, kv_cache=theirs, **options, compute=torch.float64)
    with poisoned(monkeypatch):
        got = rope.rope_norm_cache(**case, kv_cache=ours, **options)
    for a, b in zip((*got, ours), (*want, theirs), strict=True):
        assert relative_error(a, b) < 5e-3
    assert torch.equal(ours == 0, theirs == 0)  # the same slots, and no other


def test_rope_writes_fp8_cache(device, rng) -> None:
    qkv = normal(rng, 2, 3 * 32, dtype=HALF).to(device)
    ours, theirs = (torch.zeros(2, 2, 16, 1, 32, device=device).to(reference.FP8) for _ in range(2))
    for run, cache in ((rope.rope_norm_cache, ours), (reference.rope_norm_cache, theirs)):
        run(
            qkv, torch.tensor([4, 8], device=device), torch.tensor([0, 31], device=device), angles(32, device), cache,
            heads=1, k_scale=0.25, v_scale=0.5,
        )  # fmt: skip
    assert relative_error(ours.float(), theirs.float()) < FP8_STEP


@pytest.mark.parametrize("few", [0, 1 << 15])
@pytest.mark.parametrize("interleaved", [False, True])
def test_mla_rope_norm_cache(interleaved, few, device, rng, monkeypatch) -> None:
    monkeypatch.setattr(rope, "_FEW_HEADS", few)  # several heads a program, or one
    q, latent = normal(rng, 4, 3, 48, dtype=HALF).to(device), normal(rng, 4, 64 + 16, dtype=HALF).to(device)
    norm, slots = normal(rng, 64).to(device), torch.tensor([1, -1, 20, 17], device=device)
    positions, table = torch.tensor([9, 0, 3, 50], device=device), angles(16, device)
    ours, theirs = (torch.zeros(2, 16, 80, dtype=HALF, device=device) for _ in range(2))
    q_theirs = q.clone()
    want = reference.mla_rope_norm_cache(
        q_theirs, latent, norm, positions, slots, table, theirs, interleaved=interleaved, compute=torch.float64
    )
    with poisoned(monkeypatch):
        got = rope.mla_rope_norm_cache(q, latent, norm, positions, slots, table, ours, interleaved=interleaved)
    for a, b in ((got, want), (q, q_theirs), (ours, theirs)):
        assert relative_error(a, b) < 5e-3
    assert not ours.view(-1, 80)[[0, 2, 16, 18]].any()


def angles(rotary: int, device: torch.device) -> torch.Tensor:
    turn = torch.arange(128)[:, None] * 10000.0 ** -(torch.arange(rotary // 2) * 2 / rotary)
    return torch.cat([turn.cos(), turn.sin()], 1).float().to(device)


ROUTERS = {
    "qwen": (128, {"k": 8}),
    "mixtral": (8, {"k": 2}),
    "no renormalisation": (60, {"k": 4, "renormalize": False, "scale": 1.5}),
    "deepseek v2": (160, {"k": 6, "renormalize": False, "scale": 16.0, "groups": 8, "topk_groups": 3, "group_score": "max"}),
    "deepseek v3": (256, {"k": 8, "scoring": "sigmoid", "scale": 2.5, "groups": 8, "topk_groups": 4, "biased": True}),
    "kimi k2": (384, {"k": 8, "scoring": "sigmoid", "scale": 2.827, "biased": True}),
    "one expert": (1, {"k": 1}),
    "groups of one": (4, {"k": 2, "scoring": "sigmoid", "groups": 4, "topk_groups": 2, "biased": True}),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_gate(name, device, rng, monkeypatch) -> None:
    experts, options = ROUTERS[name]
    options = dict(options)
    logits = normal(rng, 6, experts, scale=2.0).to(device)
    if options.pop("biased", False):
        options["bias_E"] = normal(rng, experts, scale=0.1).to(device)
    want, want_ids = reference.gate_topk(logits, **options, compute=torch.float64)
    with poisoned(monkeypatch):
        got, ids = gate.gate_topk(logits, **options)
    assert torch.equal(ids.cpu(), want_ids.cpu())
    assert relative_error(got, want) < 1e-5


def test_gate_equal_scores_go_to_the_lower_id(device) -> None:
    weights, ids = gate.gate_topk(torch.zeros(2, 12, device=device), 3)
    assert ids.tolist() == [[0, 1, 2]] * 2
    assert torch.allclose(weights, torch.full_like(weights, 1 / 3))
