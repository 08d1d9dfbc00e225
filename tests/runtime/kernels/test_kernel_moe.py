"""The MoE layers against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_checks import FP8_STEP, HALF, normal, poisoned, relative_error

from runtime.kernels import moe, moe_layer, moe_prefill, reference
from runtime.kernels.moe import Tile, Tiles
from runtime.kernels.moe_fp8 import Fp8Tiles, Grouped

FP32_BOUND = 4e-3 if torch.cuda.is_available() else 1e-5  # the GPU multiplies fp32 in tf32
SMALL = Tiles(Tile(16, 16, 32, 4, 2), Tile(16, 32, 32, 4, 2))


def layer(rng, tokens, choices, experts, hidden, width, dtype):
    return {
        "x_TH": normal(rng, tokens, hidden, dtype=dtype),
        "w13_E2IH": normal(rng, experts, 2 * width, hidden, dtype=dtype, scale=hidden**-0.5),
        "w2_EHI": normal(rng, experts, hidden, width, dtype=dtype, scale=width**-0.5),
        "topk_weights_TK": torch.rand(tokens, choices, generator=rng),
        "topk_ids_TK": torch.stack([torch.randperm(experts, generator=rng)[:choices] for _ in range(tokens)]).int(),
    }


def check(case, bound, device, monkeypatch, run=moe.fused_moe, fp8_rows=False, **options):
    case = {k: v.to(device) for k, v in case.items()}
    tensors = {k: v for k, v in options.items() if k != "tiles"}
    want = reference.fused_moe(**case, **tensors, fp8_rows=fp8_rows, compute=torch.float64)
    with poisoned(monkeypatch):
        got = run(**case, **options)
    assert relative_error(got, want) < bound


@pytest.mark.parametrize("dtype, bound", [(torch.float32, FP32_BOUND), (HALF, 1e-2)])
@pytest.mark.parametrize("shape", [(7, 2, 5, 64, 48), (1, 4, 8, 96, 32), (33, 3, 4, 40, 24)], ids=str)
def test_layer(shape, dtype, bound, device, rng, monkeypatch) -> None:
    check(layer(rng, *shape, dtype), bound, device, monkeypatch, tiles=SMALL)


def test_one_expert_takes_all(device, rng, monkeypatch) -> None:
    case = layer(rng, 40, 1, 4, 64, 32, torch.float32)
    case["topk_ids_TK"] = torch.full((40, 1), 2, dtype=torch.int32)
    check(case, FP32_BOUND, device, monkeypatch, tiles=SMALL)


def test_experts_of_other_ranks_add_nothing(device, rng, monkeypatch) -> None:
    case = layer(rng, 19, 3, 6, 64, 32, torch.float32)
    case["w13_E2IH"], case["w2_EHI"] = case["w13_E2IH"][:2].clone(), case["w2_EHI"][:2].clone()
    expert_map = torch.tensor([-1, 1, -1, -1, 0, -1], dtype=torch.int32, device=device)
    check(case, FP32_BOUND, device, monkeypatch, tiles=SMALL, expert_map=expert_map)


def test_rows_are_sorted_where_each_alone_would_read_experts_again(device, rng, monkeypatch) -> None:
    """Sizes of Qwen3-30B, a rank of R1's EP 128 in fp8, and Mixtral; then the same numbers from either path."""
    assert moe.rows_alone(2, 8, 128, 9.4e6) and not moe.rows_alone(3, 8, 128, 9.4e6)
    assert moe.rows_alone(2, 1, 2, 44e6) and not moe.rows_alone(16, 1, 2, 44e6)
    assert moe.rows_alone(1, 2, 8, 352e6) and not moe.rows_alone(8, 2, 8, 352e6)
    sorts = []
    monkeypatch.setattr(moe, "align", lambda *given, align=moe.align: sorts.append(given) or align(*given))
    case = layer(rng, 5, 2, 3, 64, 32, torch.float32)
    for limit in (1e9, 0.0):
        monkeypatch.setattr(moe, "_SORT_BYTES", limit)
        check(case, FP32_BOUND, device, monkeypatch, tiles=SMALL)
    assert len(sorts) == 1


def test_few_rows_need_no_sorting(device, rng, monkeypatch) -> None:
    """Two tokens of one expert, and an id that is nobody's."""
    case = layer(rng, 3, 2, 4, 64, 32, torch.float32)
    case["topk_ids_TK"] = torch.tensor([[1, 3], [1, -1], [0, 7]], dtype=torch.int32)
    monkeypatch.setattr(moe, "align", None)
    check(case, FP32_BOUND, device, monkeypatch, tiles=SMALL)


def test_no_local_expert_gives_zeros(device, rng) -> None:
    case = {k: v.to(device) for k, v in layer(rng, 5, 2, 4, 64, 32, torch.float32).items()}
    case["expert_map"] = torch.full((4,), -1, dtype=torch.int32, device=device)
    assert moe.fused_moe(**case, tiles=SMALL).abs().max() == 0


def test_clamped_swiglu_with_biases(device, rng, monkeypatch) -> None:
    case = layer(rng, 9, 2, 4, 64, 48, HALF)
    case["x_TH"] = case["x_TH"] * 8  # so that the clamps act
    check(
        case, 1e-2, device, monkeypatch, tiles=SMALL, activation="swiglu_clamped",
        w13_bias_E2I=normal(rng, 4, 96, dtype=HALF).to(device),
        w2_bias_EH=normal(rng, 4, 64, dtype=HALF).to(device),
    )  # fmt: skip


def fp8_layer(rng, device, *shape):
    case = layer(rng, *shape, HALF)
    scales = {}
    for name, scale in (("w13_E2IH", "w13_scale_E2I"), ("w2_EHI", "w2_scale_EH")):
        w = case[name]
        case[name], s = (t.unflatten(0, w.shape[:2]) for t in reference.quant_fp8_rows(w.flatten(0, 1)))
        scales[scale] = s.to(device)
    return case, scales


def test_fp8_weights(device, rng, monkeypatch) -> None:
    case, scales = fp8_layer(rng, device, 7, 2, 5, 64, 48)
    check(case, 1e-2, device, monkeypatch, tiles=SMALL, **scales)


def test_fp8_products(device, rng, monkeypatch) -> None:
    """Against the same rounding in float64: h a bf16 step apart may round to the next fp8 number, hence 2e-2 more."""
    case, scales = fp8_layer(rng, device, 24, 2, 3, 64, 32)

    def both_fp8(x_TH, w13_E2IH, w2_EHI, topk_weights_TK, topk_ids_TK, **scales):
        return moe.fused_moe_fp8(x_TH, w13_E2IH, w2_EHI, topk_weights_TK, topk_ids_TK, tiles=SMALL, **scales)

    check(case, 0.02 + FP8_STEP, device, monkeypatch, run=both_fp8, fp8_rows=True, **scales)


@pytest.mark.parametrize("rows, experts", [(8, 128), (512, 128), (2048, 128), (4096, 128), (131072, 128), (64, 32)])
@pytest.mark.parametrize("weight_bytes", [1, 2])
def test_tile_ladder_fits_shared_memory(rows: int, experts: int, weight_bytes: int) -> None:
    tiles = moe.choose_tiles(rows, experts, weight_bytes)
    for tile, columns in ((tiles.up, 2 * tiles.up.n), (tiles.down, tiles.down.n)):
        buffers = tile.stages if tile.m >= 64 else tile.stages - 1
        assert buffers * tile.k * (2 * tile.m + weight_bytes * columns) <= 227 * 1024


@pytest.mark.parametrize("with_map", [False, True])
def test_prefill_layer(with_map: bool, device, rng, monkeypatch) -> None:
    case = layer(rng, 31, 3, 5, 64, 32, HALF)
    options = {}
    if with_map:
        options["expert_map"] = torch.tensor([4, -1, 0, 1, -1, 3], dtype=torch.int32, device=device)
    check(case, 1e-2, device, monkeypatch, run=moe_prefill.prefill_moe, **options)


def test_prefill_layer_fp8(device, rng, monkeypatch) -> None:
    if device.type != "cuda":
        pytest.skip("torch has no CPU kernel for scaled_grouped_mm")
    case, scales = fp8_layer(rng, device, 64, 2, 4, 128, 64)
    check(case, 0.02 + FP8_STEP, device, monkeypatch, run=moe_prefill.prefill_moe, fp8_rows=True, **scales)


@pytest.mark.parametrize(("shape", "tma"), [
    ((64, 2, 4, 64, 48), False), ((9, 3, 6, 48, 96), False), ((9, 3, 6, 48, 96), True), ((33, 2, 3, 80, 32), True),
    pytest.param((64, 2, 4, 64, 48), True, marks=pytest.mark.slow),
    pytest.param((33, 2, 3, 80, 32), False, marks=pytest.mark.slow)])
def test_prefill_layer_wholly_in_fp8(shape, tma, device, rng, monkeypatch) -> None:
    """Activations are rounded tile by tile to powers of two and levelled after; some choices are absent, tiles uneven."""
    case, scales = fp8_layer(rng, device, *shape)
    case["topk_ids_TK"][::5, 0] = -1
    tiles = Fp8Tiles(Grouped(16, 32, 32, 4, 2, group=3 if tma else 1, tma=tma), Grouped(16, 16, 32, 4, 2, group=2))
    for options in ({}, {"fp8_rows": True}):  # activations are rounded by other scales than the reference's: near it, not on it
        bound = 0.06 if FP8_STEP < 0.1 else 0.2
        check(case, bound, device, monkeypatch, run=partial(moe_prefill.prefill_moe, tiles=tiles), **options, **scales)


@pytest.mark.parametrize("tokens, chosen", [(8, "fused_moe"), (60, "fused_moe_fp8"), (1600, "prefill_moe")])
def test_layer_chooses_by_rows_an_expert(tokens, chosen, device, rng, monkeypatch) -> None:
    case, scales = fp8_layer(rng, device, tokens, 1, 2, 64, 32)
    called = []
    for name in ("fused_moe", "fused_moe_fp8", "prefill_moe"):
        monkeypatch.setattr(moe_layer, name, lambda *a, name=name, **k: called.append(name))
    moe_layer.moe_layer(**{k: v.to(device) for k, v in case.items()}, **scales)
    assert called == [chosen]


def test_biases_stay_with_the_kernel_that_has_them(device, rng, monkeypatch) -> None:
    case = layer(rng, 900, 1, 2, 16, 16, HALF)
    seen = {}
    monkeypatch.setattr(moe_layer, "fused_moe", lambda *a, **k: seen.update(k))
    moe_layer.moe_layer(**case, activation="swiglu_clamped", w2_bias_EH=torch.ones(2, 16))
    assert seen["activation"] == "swiglu_clamped" and seen["w2_bias_EH"] is not None
