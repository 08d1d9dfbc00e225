"""The floor that benchmarks hold steps against, on known models, by shapes alone."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.floor import Load, Rates, phase_floors
from runtime.layout import single
from runtime.model.params import rank_params
from runtime.rank_slice import slice_layout
from twin.spec.load import load_model

RATES = Rates(4.43e12, 724e12, 1400e12)


def weights(name: str, ep: int) -> tuple[dict[str, torch.Tensor], object, object]:
    model = load_model(name)
    at = slice_layout(model, ep) if ep > 1 else single(model)
    params = {}
    for p in rank_params(model, at):
        params[p.name] = torch.empty(p.shape, dtype=torch.float32 if p.kind == "fp32" else torch.bfloat16, device="meta")
    return params, model, at


@pytest.mark.parametrize(("batch", "milliseconds"), [(1, 1.39), (8, 6.0), (64, 14.9), (256, 19.5)])
def test_decode_of_qwen3_30b_needs_at_least_what_reading_it_takes(batch: int, milliseconds: float) -> None:
    """Milliseconds counted by hand from the checkpoint's sizes at 4.43 TB/s and a context of 1k."""
    params, model, at = weights("qwen3-30b-a3b", 1)
    load = Load(batch, batch * 1024.0, batch * 1024, batch, batch * 8 * 48)
    floors = phase_floors(model, at, params, load, RATES, 2)
    assert sum(floors.values()) * 1e3 == pytest.approx(milliseconds, rel=0.04)
    assert max(floors, key=floors.__getitem__) == "experts"


def test_prefill_is_bound_by_products_and_a_slice_by_its_share() -> None:
    params, model, at = weights("qwen3-30b-a3b", 1)
    tokens = 16384
    floors = phase_floors(model, at, params, Load(tokens, tokens * 2048.0, tokens, 4, tokens * 8 * 48), RATES, 2)
    assert floors["experts"] == pytest.approx(2 * tokens * 8 * 48 * 3 * 2048 * 768 / RATES.bf16_flop_per_s, rel=1e-6)
    narrow, r1, rank = weights("deepseek-r1", 128)
    sliced = phase_floors(r1, rank, narrow, Load(128, 128 * 4096.0, 128 * 4096, 128, 1024 * 58, 1024 * 58), RATES, 2)
    latents = 128 * 4096 * 576 * 2 * 61 / RATES.read_bytes_per_s
    scores = 2 * 128 * (2 * 512 + 64) * 128 * 4096 * 61 / RATES.bf16_flop_per_s
    assert sliced["attention"] > max(latents, scores) and sliced["dispatch"] == sliced["combine"] > 0
