"""Decode attention against float64: lengths at and around block edges, empty sequences, NaN wherever nobody looks."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import HALF, normal, paged_cache, poisoned, relative_error

from runtime.kernels import attention_gqa, attention_mla, reference
from runtime.kernels.attention_gqa import GqaTile
from runtime.kernels.attention_mla import MlaTile
from runtime.kernels.splits import choose_splits

LENGTHS = [1, 15, 16, 17, 0, 32, 47]


def run_gqa(rng, device, monkeypatch, bound=1e-2, block_tokens=16, lengths=LENGTHS, group=3, dim=16, **options):
    cache_dtype = options.pop("cache_dtype", HALF)
    cache, table, seq_lens = paged_cache(rng, lengths, block_tokens, (2, dim), cache_dtype, pair=True)
    q = normal(rng, len(lengths), 2 * group, dim, dtype=HALF)
    q, cache, table, seq_lens = (t.to(device) for t in (q, cache, table, seq_lens))
    plain = {k: v for k, v in options.items() if k not in ("splits", "tile")}
    args = {"scale": dim**-0.5}
    want = reference.gqa_decode(q, cache, table, seq_lens, **args, **plain, compute=torch.float64)
    with poisoned(monkeypatch):
        got = attention_gqa.gqa_decode(q, cache, table, seq_lens, **args, **options)
    assert relative_error(got, want) < bound
    for b, length in enumerate(lengths):
        assert length or not got[b].any()


@pytest.mark.parametrize("tokens", [16, 32])
@pytest.mark.parametrize("splits", [1, 2, 5, None])
def test_gqa(tokens, splits, device, rng, monkeypatch) -> None:
    run_gqa(rng, device, monkeypatch, splits=splits, tile=GqaTile(tokens, 4, 2, 2))


def test_gqa_batch_1_at_a_block_edge(device, rng, monkeypatch) -> None:
    run_gqa(rng, device, monkeypatch, lengths=[64], block_tokens=64, tile=GqaTile(16, 4, 2, 2))


def test_gqa_odd_group_and_width(device, rng, monkeypatch) -> None:
    run_gqa(rng, device, monkeypatch, group=7, dim=24, lengths=[33, 2], splits=2, tile=GqaTile(16, 4, 2, 2))


@pytest.mark.parametrize("window", [1, 7, 16, 40])
@pytest.mark.parametrize("splits", [1, 3])
def test_gqa_window_and_sinks(window, splits, device, rng, monkeypatch) -> None:
    sinks = normal(rng, 6).to(device)
    tile = GqaTile(16, 4, 2, 2)
    run_gqa(rng, device, monkeypatch, window=window, sinks_H=sinks, splits=splits, tile=tile)


def test_gqa_fp8_cache(device, rng, monkeypatch) -> None:
    run_gqa(
        rng, device, monkeypatch, cache_dtype=reference.FP8, k_scale=0.5, v_scale=2.0, splits=2,
        lengths=[17, 5], tile=GqaTile(16, 4, 2, 2),
    )  # fmt: skip


def run_mla(rng, device, monkeypatch, heads, tile, splits, lengths=LENGTHS, block_tokens=16):
    cache, table, seq_lens = paged_cache(rng, lengths, block_tokens, (80,), HALF, pair=False)
    q = normal(rng, len(lengths), heads, 80, dtype=HALF)
    q, cache, table, seq_lens = (t.to(device) for t in (q, cache, table, seq_lens))
    args = {"scale": 80**-0.5, "latent": 64}
    want = reference.mla_decode(q, cache, table, seq_lens, **args, compute=torch.float64)
    with poisoned(monkeypatch):
        got = attention_mla.mla_decode(q, cache, table, seq_lens, **args, tile=tile, splits=splits)
    assert relative_error(got, want) < 1e-2
    for b, length in enumerate(lengths):
        assert length or not got[b].any()


@pytest.mark.parametrize("splits", [1, 3, None])
@pytest.mark.parametrize(
    "heads, tile",
    [(16, MlaTile(16, 16, 4, 2, 2)), (5, MlaTile(16, 32, 4, 2, 2)), (40, MlaTile(32, 16, 4, 2, 1))],
)
def test_mla(heads, tile, splits, device, rng, monkeypatch) -> None:
    run_mla(rng, device, monkeypatch, heads, tile, splits, lengths=[1, 16, 17, 0, 47])


def test_mla_batch_1_at_a_block_edge(device, rng, monkeypatch) -> None:
    run_mla(rng, device, monkeypatch, 16, MlaTile(16, 16, 4, 2, 2), None, lengths=[64], block_tokens=64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("splits", [1, 2, None])
@pytest.mark.parametrize("block_tokens", [16, 64, 128])
def test_mla_at_full_width(heads, splits, block_tokens, device, rng, monkeypatch) -> None:
    lengths = [1, 63, 64, 65, 0, 300, 128]
    cache, table, seq_lens = paged_cache(rng, lengths, block_tokens, (576,), HALF, pair=False)
    q = normal(rng, len(lengths), heads, 576, dtype=HALF)
    q, cache, table, seq_lens = (t.to(device) for t in (q, cache, table, seq_lens))
    want = reference.mla_decode(q, cache, table, seq_lens, scale=192**-0.5, compute=torch.float64)
    with poisoned(monkeypatch):
        got = attention_mla.mla_decode(q, cache, table, seq_lens, scale=192**-0.5, splits=splits)
    assert relative_error(got, want) < 1e-2
    assert not got[4].any()


@pytest.mark.parametrize(
    "programs, context, tile, resident, want",
    [(256, 4096, 64, 264, 1), (4, 1024, 64, 264, 16), (4, 1 << 20, 64, 264, 64), (64, 4096, 32, 264, 4), (999, 64, 64, 1, 1)],
)
def test_splits_fill_the_device_once(programs, context, tile, resident, want) -> None:
    assert choose_splits(programs, context, tile, resident) == want
