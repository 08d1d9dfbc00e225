"""Products of fp8 rows whose tiles are cut along K, against float64: odd sizes, poisoned parts and outputs, every cut."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from kernel_checks import FP8_STEP, HALF, normal, poisoned, relative_error

from runtime.kernels import products
from runtime.kernels.products import Rows8, Share, cuts_of, fp8_product, fp8_product_gated, fp8_product_normed
from runtime.quantise import quantise_rows

PROCESSORS = 5
SHARES = [Share(16, 16, 32, 4, 2), Share(16, 32, 16, 4, 2, resident=3), Share(16, 16, 32, 4, 2, whole=True),
          Share(32, 16, 32, 4, 2, tma=True)]


@pytest.fixture(autouse=True)
def few_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that programs take parts of several tiles."""
    monkeypatch.setattr(products, "multiprocessors", lambda index: PROCESSORS)


def operands(rng, rows: int, width: int, depth: int, device) -> tuple[Rows8, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, w, its scales, and the product in float64."""
    x, w = quantise_rows(normal(rng, rows, depth)), quantise_rows(normal(rng, width, depth, scale=0.3))
    want = (x[0].double() * x[1].double()[:, None]) @ (w[0].double() * w[1].double()[:, None]).T
    return Rows8(x[0].to(device), x[1].to(device), HALF), w[0].to(device), w[1].to(device), want


@pytest.mark.parametrize("share", SHARES, ids=["one", "three a processor", "whole", "tma"])
@pytest.mark.parametrize(("rows", "width", "depth"), [(1, 21, 48), (7, 70, 208), (16, 64, 128), (33, 40, 176), (19, 300, 32)])
def test_product(share: Share, rows: int, width: int, depth: int, device, rng, monkeypatch) -> None:
    x, w, scale, want = operands(rng, rows, width, depth, device)
    bias = normal(rng, width, dtype=HALF).to(device) if rows % 2 else None
    residual = normal(rng, rows, width, dtype=HALF).to(device) if rows % 3 else None
    want = want if bias is None else want + bias.double().cpu()
    want = want if residual is None else want + residual.double().cpu()
    with poisoned(monkeypatch):
        got = fp8_product(x, w, scale, share, bias_N=bias, residual_MN=residual)
        again = fp8_product(x, w, scale, share, bias_N=bias, residual_MN=residual)
    assert got.dtype == HALF and relative_error(got, want) < 4e-3
    assert torch.equal(got, again)


@pytest.mark.parametrize("share", SHARES, ids=["one", "three a processor", "whole", "tma"])
def test_product_with_activation(share: Share, device, rng, monkeypatch) -> None:
    x, w, scale, both = operands(rng, 9, 192, 112, device)
    gate, up = both.chunk(2, -1)
    with poisoned(monkeypatch):
        got = fp8_product_gated(x, w, scale, share)
    want = torch.nn.functional.silu(gate) * up
    assert got.data.shape == (9, 96)
    assert relative_error(got.data.double() * got.scale.double()[:, None], want) < max(FP8_STEP, 0.04)
    assert relative_error(got.scale, want.abs().amax(-1) / 448) < 1e-3


@pytest.mark.parametrize("normed", [96, 32])
def test_product_with_norm(normed: int, device, rng, monkeypatch) -> None:
    """The other columns keep their width; without any, there is nothing of them."""
    x, w, scale, y = operands(rng, 9, 96, 112, device)
    gain, bias = normal(rng, normed, dtype=HALF), normal(rng, 96, dtype=HALF) if normed == 32 else None
    y = y if bias is None else y + bias.double()
    with poisoned(monkeypatch):
        got, rest = fp8_product_normed(x, w, scale, SHARES[1], (gain.to(device), 1e-6),
                                       None if bias is None else bias.to(device))
    head = y[:, :normed]
    want = head * torch.rsqrt(head.square().mean(-1, keepdim=True) + 1e-6) * gain.double()
    assert relative_error(got.data.double() * got.scale.double()[:, None], want) < max(FP8_STEP, 0.04)
    assert rest.shape == (9, 96 - normed) and (normed == 96 or relative_error(rest, y[:, normed:]) < 4e-3)


def test_shares_fill_the_device_and_miss_nothing() -> None:
    for share in (Share(128, 128, 128, 8, 4), Share(128, 64, 128, 4, 3, resident=3), Share(64, 256, 128, 8, 3, whole=True)):
        for width, depth in ((2112, 7168), (24576, 1536), (7168, 16384), (576, 7168), (7168, 2048)):
            c = cuts_of(share, 128, width, depth, 132)
            assert c.programs * c.share >= c.tiles * c.steps > (c.programs - 1) * c.share
            for tile in range(c.tiles):
                first, last = tile * c.steps // c.share, (tile * c.steps + c.steps - 1) // c.share
                assert last - first < c.most and tile - last * c.share // c.steps < c.slots
    c = cuts_of(Share(128, 128, 128, 8, 4), 128, 7168, 16384, 132)
    assert c.programs > 128 and c.most == 4
