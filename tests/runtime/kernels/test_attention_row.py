"""Attention of one row in one launch, with its norm, rotation and cache write, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from kernel_checks import HALF, normal, paged_cache, poisoned, relative_error

from runtime.kernels import reference
from runtime.kernels.attention_row import attention_row
from runtime.kernels.skinny import Cut


def turned(rows, gain, cos_sin, interleaved):
    """Norm, then rotation, of heads [H, D], rounded after each as kernels do."""
    wide = rows.double()
    if gain is not None:
        wide = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * gain.double()).to(rows.dtype).double()
    cos, sin = cos_sin.double().chunk(2)
    width = 2 * len(cos)
    head, rest = wide[:, :width], wide[:, width:]
    a, b = (head[:, ::2], head[:, 1::2]) if interleaved else head.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat([torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), rest], -1).to(rows.dtype)


@pytest.mark.parametrize(("length", "cut"), [
    (1, Cut(16, 4, 4)), (2, Cut(16, 1, 4)), (16, Cut(16, 2, 4)), (17, Cut(16, 1, 4)), (33, Cut(16, 4, 4)), (64, Cut(32, 2, 4)),
    (65, Cut(16, 16, 4)), (0, Cut(16, 2, 4))])
@pytest.mark.parametrize("options", [
    {}, {"norms": True, "interleaved": True, "rotary": 8}, {"window": 1, "sinks": True, "group": 7, "dim": 24},
    {"window": 20, "norms": True}, {"sinks": True, "group": 8, "block": 8}], ids=str)
def test_row(length: int, cut: Cut, options: dict, device, rng, monkeypatch) -> None:
    dim, group, kv_heads, block = options.get("dim", 16), options.get("group", 3), 2, options.get("block", 32)
    heads, rotary, window = group * kv_heads, options.get("rotary", dim), options.get("window", 0)
    cache, table, lens = (t.to(device) for t in paged_cache(rng, [length], block, (kv_heads, dim), HALF, pair=True))
    qkv = normal(rng, heads + 2 * kv_heads, dim, dtype=HALF).to(device)
    q_norm, k_norm = (normal(rng, dim, dtype=HALF).to(device) if options.get("norms") else None for _ in range(2))
    sinks = normal(rng, heads).to(device) if options.get("sinks") else None
    cos_sin = normal(rng, 80, rotary).to(device)
    interleaved = options.get("interleaved", False)
    at = max(length - 1, 0)
    q, k = (turned(rows, gain, cos_sin[at], interleaved) for rows, gain in
            ((qkv[:heads], q_norm), (qkv[heads:heads + kv_heads], k_norm)))
    want_cache = cache.clone()
    if length:
        where = table[0, at // block].long(), at % block
        cache[where[0], :, where[1]] = float("nan")  # the new token's place holds anything
        want_cache[where[0], 0, where[1]], want_cache[where[0], 1, where[1]] = k, qkv[heads + kv_heads:]
    want = reference.gqa_decode(q[None], want_cache, table, lens, scale=dim**-0.5, window=window, sinks_H=sinks,
                                compute=torch.float64)[0]
    arrived = torch.zeros(4, dtype=torch.int32, device=device)
    for _ in range(2):  # the second call finds the counters as the first left them
        with poisoned(monkeypatch):
            got = attention_row(qkv.flatten(), lens, table[0], cos_sin, cache, cut, arrived, heads=heads, scale=dim**-0.5,
                                interleaved=interleaved, q_norm_D=q_norm, k_norm_D=k_norm, window=window, sinks_H=sinks)
        assert not arrived.any()
        if not length:
            assert not got.any()
            continue
        assert relative_error(got, want) < 1e-2
        assert torch.equal(cache.isnan(), want_cache.isnan())
        assert relative_error(cache.nan_to_num(), want_cache.nan_to_num()) < 2e-3
