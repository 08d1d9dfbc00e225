"""Products of fp8 rows whose tiles are cut along K, against float64: odd sizes, poisoned parts and outputs, every cut."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from kernel_checks import FP8_STEP, HALF, normal, poisoned, relative_error
from test_decode_runner import BLOCK, build, prompts, tiny

from runtime import tune_prefill, tune_products
from runtime.batch import make_step
from runtime.kernels import moe_layer, moe_prefill, products
from runtime.kernels.moe_fp8 import FP8_TILES, Fp8Tiles, Grouped
from runtime.kernels.products import Rows8, Share, cuts_of, fp8_product, fp8_product_gated, fp8_product_normed
from runtime.ops import Down, ExpertWeights, Fp8Weight, Norm, TorchOps
from runtime.products import Products, bucket_of
from runtime.quantise import join, quantise_rows, weight_of
from runtime.triton_ops import TritonOps
from runtime.tune_products import decide

PROCESSORS = 5
SHARES = [Share(16, 16, 32, 4, 2), Share(16, 32, 32, 4, 2, resident=3), Share(16, 16, 32, 4, 2, whole=True),
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


def wide(weight: Fp8Weight) -> torch.Tensor:
    return weight.data.cpu().double() * weight.scale.cpu().double()[:, None]


def entry(ops: TritonOps, rows: int, weight: Fp8Weight, share: Share) -> None:
    ops.products.shares[(bucket_of(rows), *weight.data.shape)] = share


@pytest.mark.parametrize("rows", [5, 21])
def test_operators_take_entries_of_the_table(rows: int, device, rng) -> None:
    """A gated FFN and MLA's projections down, each of whole chains of kernels, near the same in float64."""
    ops, plain = TritonOps(), TorchOps()
    x, stream = (normal(rng, rows, 64, dtype=HALF).to(device) for _ in range(2))
    gain = normal(rng, 64, dtype=HALF).to(device)
    params = {}
    for name, shape in {"a": (32, 64), "b": (24, 64), "w13": (96, 64), "w2": (64, 48), "up": (80, 32)}.items():
        data, scale = quantise_rows(normal(rng, *shape, scale=0.2))
        params[name], params[f"{name}.scale"] = data.to(device), scale.to(device)
    before = wide(weight_of(params, "a")), wide(weight_of(params, "b"))
    both = join(params, "a", "b")
    assert both is not None and all(torch.equal(wide(weight_of(params, n)), w) for n, w in zip("ab", before, strict=True))
    a, b, w13, w2, up = (weight_of(params, name) for name in ("a", "b", "w13", "w2", "up"))
    down = Down(a, None, Norm(gain[:32].contiguous(), 1e-6), b, None, both)
    share = Share(16 if rows < 16 else 32, 16, 32, 4, 2)
    for weight in (both, w13, w2, up):
        entry(ops, rows, weight, share)
    low, latent, total = ops.norm_down(x.clone(), stream.clone(), Norm(gain, 1e-6), down)
    assert isinstance(low, Rows8)
    want_low, want_latent, want_total = plain.norm_down(
        *(t.cpu().double() for t in (x, stream)), Norm(gain.cpu().double(), 1e-6),
        Down(wide(a), None, Norm(gain[:32].cpu().double(), 1e-6), wide(b), None))
    assert relative_error(total, want_total) < 2e-3 and relative_error(latent, want_latent) < max(FP8_STEP, 0.05)
    assert relative_error(ops.linear(low, up), want_low @ wide(up).T) < max(FP8_STEP, 0.08)
    got = ops.gated_ffn(x, w13, w2)
    assert got.dtype == HALF
    assert relative_error(got, plain.gated_ffn(x.cpu().double(), wide(w13), wide(w2))) < max(1.3 * FP8_STEP, 0.08)


def test_only_entries_change_what_serves(device, rng) -> None:
    weight = Fp8Weight(*(t.to(device) for t in quantise_rows(normal(rng, 32, 64))))
    table = Products({(32, 32, 64): SHARES[0]})
    assert [table.find(rows, weight) is not None for rows in (0, 16, 17, 32, 33, 300)] == [False, False, True, True, False, False]
    assert Products().find(20, weight) is None


def test_tuning_takes_the_fastest_that_is_right(device, rng, monkeypatch) -> None:
    """One candidate gives other numbers, one fails, one is slower than torch; the fastest of the rest gets the entry."""
    weights = [Fp8Weight(*(t.to(device) for t in quantise_rows(normal(rng, 48, 64)))) for _ in range(2)]
    shares = [Share(16, 16, 32, 4, stages) for stages in (1, 2, 3, 4, 5)]
    seconds = {1: 0.1, 3: 0.7, 4: 0.5, 5: 2.0}
    timed, cut = [], tune_products.cut_product

    def product(x, weight, share):
        timed.append(share.stages)
        if share.stages == 2:
            raise RuntimeError("too much shared memory")
        return cut(x, weight, share) * (3 if share.stages == 1 else 1)

    def plain(x, weight):
        timed.append(0)
        return cut(x, weight, shares[2])

    def timer(calls):
        calls[1]()
        return seconds.get(timed[-1], 1.0)

    monkeypatch.setattr(tune_products, "CANDIDATES", {16: tuple(shares)})
    monkeypatch.setattr(tune_products, "cut_product", product)
    monkeypatch.setattr(tune_products, "torch_product", plain)
    table = Products()
    decide(table, (16, 48, 64), weights, timer)
    assert table.shares == {(16, 48, 64): shares[3]} and table.seconds == {(16, 48, 64): (1.0, 0.5)}
    assert table.report()[0]["serves"] == "cut"
    monkeypatch.setattr(tune_products, "CANDIDATES", {16: tuple(shares[:2] + shares[4:])})
    table = Products()
    decide(table, (16, 48, 64), weights, timer)
    assert not table.shares and table.report()[0]["serves"] == "plain"


def test_candidates_fit_a_multiprocessor() -> None:
    """Shared memory of all programs that share one, and rows whose number of tiles does not change within a bucket."""
    for bucket, shares in tune_products.CANDIDATES.items():
        for share in shares:
            assert share.resident * share.stages * share.k * (share.m + share.n) <= 227 * 1024, share
            assert share.m in (bucket, bucket // 2) and share.m * share.n // (32 * share.warps) <= 128, share


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # padding rows hold whatever lay in memory
def test_products_of_long_prefills_are_timed_too(device, rng, monkeypatch) -> None:
    """Tiles that do not fit are passed over; those that are faster serve layers of many rows an expert."""
    (w13, s13), (w2, s2) = (quantise_rows(normal(rng, 2, *shape, scale=0.2)) for shape in ((64, 48), (48, 32)))
    w = ExpertWeights(*(t.to(device) for t in (w13, w2)), s13=s13.to(device), s2=s2.to(device))
    fast = Fp8Tiles(Grouped(16, 16, 32, 4, 2), Grouped(16, 16, 32, 4, 2))
    monkeypatch.setattr(tune_prefill, "CANDIDATES", (Fp8Tiles(fast.up, Grouped(16, 32, 32, 4, 2)), fast))
    monkeypatch.setattr(tune_prefill, "_ROUNDING", 0.06 + FP8_STEP)
    monkeypatch.setattr(moe_prefill, "_scaled_grouped_mm", grouped)

    def decided(seconds: float) -> Products:
        table = Products()
        tune_prefill.decide(table, w, 1, lambda calls: 1.0 if calls[0].keywords["tiles"] is FP8_TILES else seconds, rows=6)
        return table

    table = decided(0.5)
    assert table.prefill == {(2, 64, 48): fast} and table.prefill_seconds == {(2, 64, 48): (1.0, 0.5)}
    assert "Grouped" in str(table.report()[0]["serves"]) and not decided(1.1).prefill
    ops = TritonOps()
    ops.products = table
    seen = []
    for name in ("_TILED_ROWS_FP8", "_GROUPED_ROWS_FP8"):
        monkeypatch.setattr(moe_layer, name, 2)
    monkeypatch.setattr(moe_layer, "prefill_moe", lambda *a, **k: seen.append(k["tiles"]))
    ops.experts(normal(rng, 8, 48, dtype=HALF).to(device), torch.zeros(8, 1, device=device).int(), torch.ones(8, 1), w, None)
    ops.products = Products()
    ops.experts(normal(rng, 8, 48, dtype=HALF).to(device), torch.zeros(8, 1, device=device).int(), torch.ones(8, 1), w, None)
    assert seen == [fast, None]  # the default's tiles do not fit 48 columns


def grouped(a, w, a_scale, w_scale, offs):
    """Torch's grouped product, which a CPU does not have."""
    out, begin = torch.zeros(len(a), w.shape[1], dtype=HALF, device=a.device), 0
    for expert, end in enumerate(offs.tolist()):
        rows = a[begin:end].float() * a_scale[begin:end, None]
        out[begin:end] = (rows @ (w[expert].float() * w_scale[expert][:, None]).T).to(HALF)
        begin = end
    return out


@pytest.mark.parametrize("arch", ["deepseek_v3", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_whole_steps_of_cut_products(arch: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fp8 product of a step by an entry: logits move by no more than what the rounding of activations explains."""
    transformer, kv = build(tiny(arch), "triton", device, fp8=True)
    ops, step = transformer.rig.ops, make_step(prompts(), BLOCK, device)
    assert isinstance(ops, TritonOps)
    want = transformer.forward(step, kv, 64)
    shapes = {weights[0].data.shape for weights in tune_products.fp8_weights(transformer.layers)}
    ops.products = Products({(bucket, *shape): Share(16, 16, 32, 4, 2) for shape in shapes for bucket in (16, 32)})
    asked = []
    plain = Products.find
    monkeypatch.setattr(Products, "find", lambda *a: asked.append(plain(*a)) or asked[-1])
    got = transformer.forward(step, kv, 64)
    assert all(asked) and len(asked) >= {"deepseek_v3": 2 * 3 + 2 * 2, "qwen3_moe": 2 * 2}[arch]
    assert len(shapes) == {"deepseek_v3": 7, "qwen3_moe": 2}[arch]
    assert relative_error(got, want) < (0.25 if device.type == "cuda" else 0.6)
    assert device.type == "cuda" or not torch.equal(got, want)  # a CPU's plain products round no activations
