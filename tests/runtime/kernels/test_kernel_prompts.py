"""Attention of prompts against float64: lengths at and around tiles' edges, pasts, windows, sinks, NaN wherever nobody looks."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_checks import HALF, normal, poisoned, relative_error

from runtime.kernels.attention_prefill import PromptTile, prompt_attention
from runtime.pieces import PIECE_ROWS, most_pieces, pieces

TILE = PromptTile(16, 16, 4, 2)


def wanted(q, k, v, lens, contexts, scale, shared, window, sinks):
    """By whole matrices in float64, sequence by sequence."""
    q, k, v = (t.double().cpu() for t in (q, k, v))
    if shared is not None:
        k = torch.cat([k, shared.double().cpu()[:, None].expand(-1, k.shape[1], -1)], -1)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    parts, row, first = [], 0, 0
    for length, context in zip(lens, contexts, strict=True):
        a, b, c = q[row:row + length], k[first:first + context], v[first:first + context]
        s = torch.einsum("thd,chd->htc", a, b) * scale
        t, j = torch.arange(length)[:, None] + context - length, torch.arange(context)[None]
        s = s.masked_fill((j > t) | ((j <= t - window) if window else False), -math.inf)
        if sinks is not None:
            sink = sinks.double().cpu()[:, None, None].expand(-1, length, 1)
            p = torch.softmax(torch.cat([s, sink], -1), -1)[..., :-1]
        else:
            p = torch.softmax(s, -1)
        parts.append(torch.einsum("htc,che->the", p, c))
        row, first = row + length, first + context
    return torch.cat(parts)


def run(rng, device, monkeypatch, lens, contexts=None, *, heads=4, kv_heads=2, dim=16, width=16, rope=0, window=0, sinks=False,
        tile=TILE, bound=1e-2):
    contexts = contexts or lens
    rows, keys = sum(lens), sum(contexts)
    # rows lie apart, with NaN between and behind them: whoever reads beyond a sequence or a head is found out
    qkv = torch.full((rows + 40, heads, dim + rope + 8), float("nan"), dtype=HALF)
    kv = torch.full((keys + 40, kv_heads, dim + width + 8), float("nan"), dtype=HALF)
    qkv[:rows, :, :dim + rope] = normal(rng, rows, heads, dim + rope, dtype=HALF)
    kv[:keys, :, :dim + width] = normal(rng, keys, kv_heads, dim + width, dtype=HALF)
    qkv, kv = qkv.to(device), kv.to(device)
    q, k, v = qkv[:rows, :, :dim + rope], kv[:keys, :, :dim], kv[:keys, :, dim:dim + width]
    shared = normal(rng, keys, rope, dtype=HALF).to(device) if rope else None
    logits = normal(rng, heads).to(device) if sinks else None
    # a launch may have room for more pieces than there are: what stands behind them is nobody's
    work = torch.full((50, 4), 7, dtype=torch.int32)
    found = torch.from_numpy(pieces(lens, contexts, tile.rows if tile else PIECE_ROWS))
    work[:len(found)] = found
    scale = (dim + rope) ** -0.5
    want = wanted(q, k, v, lens, contexts, scale, shared, window, logits)
    with poisoned(monkeypatch):
        got = prompt_attention(q, k, v, work.to(device), scale=scale, shared_CR=shared, window=window, sinks_H=logits,
                               tile=tile)
    assert relative_error(got, want) < bound


@pytest.mark.parametrize("tile", [TILE, PromptTile(32, 16, 4, 2), PromptTile(16, 32, 4, 2)])
def test_prompts_of_many_lengths(tile, device, rng, monkeypatch) -> None:
    run(rng, device, monkeypatch, [1, 15, 16, 17, 33, 50], tile=tile)


def test_prompts_that_go_on(device, rng, monkeypatch) -> None:
    run(rng, device, monkeypatch, [5, 16, 1, 20], [5, 40, 33, 36])


def test_values_of_another_width_and_columns_that_heads_share(device, rng, monkeypatch) -> None:
    run(rng, device, monkeypatch, [19, 7], [19, 40], heads=3, kv_heads=3, dim=24, width=16, rope=8)


@pytest.mark.parametrize("window", [1, 7, 16, 40])
def test_windows_and_sinks(window, device, rng, monkeypatch) -> None:
    run(rng, device, monkeypatch, [37, 4, 18], [37, 50, 18], window=window, sinks=True)


def test_sinks_alone_and_odd_groups(device, rng, monkeypatch) -> None:
    run(rng, device, monkeypatch, [21], heads=6, kv_heads=2, dim=24, width=24, sinks=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dim", "rope"), [(128, 0), (64, 0), (128, 64)])
@pytest.mark.parametrize(("window", "sinks"), [(0, False), (0, True), (100, True), (300, False)])
def test_at_full_width(dim, rope, window, sinks, device, rng, monkeypatch) -> None:
    """Shapes that Hopper's own kernel takes."""
    run(rng, device, monkeypatch, [1, 63, 64, 65, 127, 128, 129, 300, 700], [200, 63, 191, 65, 127, 500, 129, 300, 900],
        heads=8, kv_heads=8 if rope else 2, dim=dim, width=dim, rope=rope, window=0 if rope else window, sinks=sinks, tile=None)


def test_no_prompts(device) -> None:
    empty = torch.zeros(0, 4, 16, dtype=HALF, device=device)
    none = torch.from_numpy(pieces([], [])).to(device)
    assert prompt_attention(empty, empty, empty, none, scale=1.0).shape == (0, 4, 16)


def test_pieces_see_most_first_and_fit_where_there_is_room() -> None:
    found = pieces([300, 1, 130], [300, 500, 130])
    assert found[0].tolist() == [6, 0, 0, 0]
    assert sorted(found[1:].tolist()) == [[0, 300, 0, 300], [128, 172, 0, 300], [256, 44, 0, 300], [300, 1, 300, 500],
                                          [301, 130, 800, 130], [429, 2, 800, 130]]
    seen = [min(keys - left + 128, keys) for _, left, _, keys in found[1:].tolist()]
    assert seen == sorted(seen, reverse=True)
    for lens in ([1] * 9, [129] * 3, [128, 1], [385], [1, 1, 511]):
        assert len(pieces(lens, lens)) - 1 <= most_pieces(sum(lens), len(lens))
    assert most_pieces(513, 3) == len(pieces([1, 1, 511], [1, 1, 511])) - 1
