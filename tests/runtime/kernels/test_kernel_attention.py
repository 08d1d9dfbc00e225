"""Decode attention against float64: lengths at and around block edges, empty sequences, NaN wherever nobody looks."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import HALF, normal, paged_cache, poisoned, relative_error

from runtime.kernels import attention_gqa, attention_mla, reference
from runtime.kernels.attention_gqa import GqaTile
from runtime.kernels.attention_mla import MlaTile
from runtime.kernels.splits import choose_splits, merge
from twin.policy.latent_cuts import Cut

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


def run_mla(rng, device, monkeypatch, heads, tile, cut, lengths=LENGTHS, block_tokens=16):
    cache, table, seq_lens = paged_cache(rng, lengths, block_tokens, (80,), HALF, pair=False)
    q = normal(rng, len(lengths), heads, 80, dtype=HALF)
    q, cache, table, seq_lens = (t.to(device) for t in (q, cache, table, seq_lens))
    args = {"scale": 80**-0.5, "latent": 64}
    want = reference.mla_decode(q, cache, table, seq_lens, **args, compute=torch.float64)
    with poisoned(monkeypatch):
        got = attention_mla.mla_decode(q, cache, table, seq_lens, **args, tile=tile, cut=cut)
    assert relative_error(got, want) < 1e-2
    for b, length in enumerate(lengths):
        assert length or not got[b].any()


@pytest.mark.parametrize("cut", [Cut(0, 1), Cut(0, 3), Cut(2, 4), Cut(4, 16), Cut(3, 2), None], ids=str)
@pytest.mark.parametrize(
    "heads, tile",
    [(16, MlaTile(16, 16, 4, 2, 2)), (5, MlaTile(16, 32, 4, 2, 2)), (40, MlaTile(32, 16, 4, 2, 1))],
)
def test_mla(heads, tile, cut, device, rng, monkeypatch) -> None:
    """Whole and cut sequences in one launch; the empty one is a graph's padding, among the whole ones or the cut."""
    run_mla(rng, device, monkeypatch, heads, tile, cut, lengths=[1, 16, 17, 0, 47])


def test_mla_batch_1_at_a_block_edge(device, rng, monkeypatch) -> None:
    run_mla(rng, device, monkeypatch, 16, MlaTile(16, 16, 4, 2, 2), None, lengths=[64], block_tokens=64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("cut", [Cut(0, 1), Cut(0, 2), Cut(3, 4), Cut(6, 16), None], ids=str)
@pytest.mark.parametrize("block_tokens", [16, 64, 128])
def test_mla_at_full_width(heads, cut, block_tokens, device, rng, monkeypatch) -> None:
    lengths = [1, 63, 64, 65, 0, 300, 128]
    cache, table, seq_lens = paged_cache(rng, lengths, block_tokens, (576,), HALF, pair=False)
    q = normal(rng, len(lengths), heads, 576, dtype=HALF)
    q, cache, table, seq_lens = (t.to(device) for t in (q, cache, table, seq_lens))
    want = reference.mla_decode(q, cache, table, seq_lens, scale=192**-0.5, compute=torch.float64)
    with poisoned(monkeypatch):
        got = attention_mla.mla_decode(q, cache, table, seq_lens, scale=192**-0.5, cut=cut)
    assert relative_error(got, want) < 1e-2
    assert not got[4].any()


@pytest.mark.parametrize(
    "programs, context, tile, resident, want",
    [(256, 4096, 64, 264, 1), (4, 1024, 64, 264, 16), (4, 1 << 20, 64, 264, 64), (64, 4096, 32, 264, 4), (999, 64, 64, 1, 1)],
)
def test_splits_fill_the_device_once(programs, context, tile, resident, want) -> None:
    assert choose_splits(programs, context, tile, resident) == want


@pytest.mark.parametrize("splits", [2, 5, 16, 17])
@pytest.mark.parametrize("dim", [64, 512])
def test_merge_weighs_parts_by_their_share(dim, splits, device, rng) -> None:
    """Rows of 512 columns of up to 16 splits go in one program, others in pieces."""
    parts = normal(rng, 3, 2, splits, dim, dtype=torch.float32).to(device)
    lse = 4 * normal(rng, 3, 2, splits, dtype=torch.float32).to(device)
    lse[1, :, 1:] = float("-inf")
    lse[2] = float("-inf")
    parts[lse == float("-inf")] = float("nan")  # what a split that saw nothing left is not looked at
    out = torch.empty(3, 2, dim, dtype=torch.bfloat16, device=device)
    merge(parts, lse, out)
    weight = torch.softmax(lse[:2].double() * 0.6931471805599453, -1)
    want = (torch.nan_to_num(parts[:2].double()) * weight[..., None]).sum(2)
    assert relative_error(out[:2], want) < 4e-3
    assert not out[2].any()
