"""The benchmark of steps: a rank slice prefills whole prompts, and rows outlive what shows them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import step as benchmark
from benchmarks.step import expert_rows, own_tokens, points, show_variants, tell_apart
from runtime import rank_slice
from runtime.batch import Segment, make_step
from runtime.comm.experts import Local
from runtime.comm.group import solo
from runtime.kernels.moe_fp8 import FP8_TILES
from runtime.kernels.products import Share
from runtime.kv import make_kv
from runtime.layout import single
from runtime.model.transformer import Rig, Transformer
from runtime.ops import ops_for
from runtime.products import Products
from runtime.rank_slice import SliceComm, draw_arrivals, slice_layout
from runtime.tiny import tiny_config
from runtime.weights import load_weights
from twin.spec.hf import model_from_hf_config
from twin.spec.model import ModelSpec

BLOCK, PROMPTS, LENGTH = 4, 2, 6


def tiny() -> ModelSpec:
    hidden = 256 if torch.cuda.is_available() else 64  # a GPU multiplies nothing narrower than 16
    return model_from_hf_config(tiny_config("deepseek_v3", hidden=hidden, layers=2, experts=8, top_k=2, vocab=64, context=64))


def test_a_slice_prefills_whole_prompts(device: torch.device) -> None:
    """Every token of every prompt gets rows back, and experts get what prompts of all ranks send."""
    model = tiny()
    at = slice_layout(model, 4)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    params = load_weights(model, at, checkpoint=None, seed=3, dtype=dtype, device=device)
    tokens = own_tokens("prefill", PROMPTS, LENGTH)
    assert tokens == PROMPTS * LENGTH and own_tokens("decode", PROMPTS, LENGTH) == PROMPTS
    comm = SliceComm(draw_arrivals(model, at, tokens, skew=0.0, seed=1, device=device))
    transformer = Transformer(model, at, params, Rig(ops_for("triton"), solo(), comm))
    prompts = [Segment([5 + i] * LENGTH, 0, range(2 * i, 2 * i + 2), True) for i in range(PROMPTS)]
    kv = make_kv(model, at, 2 * PROMPTS, BLOCK, dtype, device)
    logits = transformer.forward(make_step(prompts, BLOCK, device), kv, tokens)
    assert logits.shape == (PROMPTS, model.vocab) and torch.isfinite(logits).all()
    assert model.moe is not None and all(rows > PROMPTS * model.moe.top_k for rows in comm.rows)
    assert expert_rows(model, comm, tokens) == (sum(comm.rows), sum(comm.rows))
    assert expert_rows(model, Local(), tokens) == (tokens * model.moe.top_k * model.moe_layers, 0)
    with pytest.raises(ValueError, match="drawn for 12 tokens"):
        transformer.forward(make_step(prompts[:1], BLOCK, device), kv, tokens)


def test_prompts_of_random_weights_reach_all_experts() -> None:
    """As they do not by themselves: their tokens become alike."""
    model = model_from_hf_config(tiny_config("qwen3_moe", hidden=64, layers=8, experts=64, top_k=4, vocab=4000, context=256))
    at = single(model)
    reached = []
    for apart in (False, True):
        params = load_weights(model, at, checkpoint=None, seed=3, dtype=torch.float32, device="cpu")
        if apart:
            tell_apart(params)
        transformer = Transformer(model, at, params, Rig(ops_for("torch"), solo(), Local()))
        prompt = Segment([37 * i for i in range(100)], 0, range(50), True)
        transformer.forward(make_step([prompt], BLOCK), make_kv(model, at, 50, BLOCK, torch.float32, "cpu"), 100)
        reached.append([int((ffn.load_E > 0).sum()) for ffn in transformer.moe_layers])
    assert min(reached[1]) > 60 and max(reached[0][4:]) < 50, reached


def test_choices_drawn_in_parts_are_as_many(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny(), 300
    at = slice_layout(model, 4)
    monkeypatch.setattr(rank_slice, "_DRAWN", 7 * tokens // 2)  # one part, and a half
    assert model.moe is not None
    for arrival in draw_arrivals(model, at, tokens, skew=0.0, seed=1, device=device):
        assert len(arrival.slots_N1) == pytest.approx(tokens * model.moe.top_k, rel=0.15)
        assert arrival.slots_N1.max() < at.slots_per_rank and arrival.source_N.max() < tokens


def test_what_was_timed_is_shown_whatever_it_serves(capsys: pytest.CaptureFixture[str]) -> None:
    table = Products(seconds={(16, 64, 32): (3e-6, 2e-6)}, shares={(16, 64, 32): Share(16, 64, 128, 4, 3)},
                     prefill={(2, 8, 4): FP8_TILES}, prefill_seconds={(2, 8, 4): (2e-3, 1e-3), (4, 8, 4): (1e-3, float("inf"))})
    show_variants({"plain_s": 2e-3, "fused_s": 1e-3, "serves": "fused", "parts": table.report()})
    told = capsys.readouterr().out
    assert "fp8 MoE prefill long steps" in told and " 16 tokens" in told and "m16n64k128w4s3" in told


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_rows_outlive_what_shows_them(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a slice's arrivals are drawn for the tokens of the step."""
    drawn: list[int] = []

    def draw(model: ModelSpec, at: object, tokens: int, **rest: Any) -> list[Any]:
        drawn.append(tokens)
        return []

    def broken(row: dict[str, Any]) -> None:
        raise TypeError("unsupported format string")

    monkeypatch.setattr(benchmark, "draw_arrivals", draw)
    monkeypatch.setattr(benchmark, phase, lambda bench, comm, batch, *rest: {"batch": batch})
    monkeypatch.setattr(benchmark, "show", broken)
    rows = points(SimpleNamespace(model=None, at=None), phase, (3,), (5,), sliced=True, skew=0.0,  # type: ignore[arg-type]
                  replays=1, rates=None, variants=False, eager=False)  # type: ignore[arg-type]
    assert next(rows) == {"batch": 3} and drawn == [3 if phase == "decode" else 15]
    with pytest.raises(TypeError):
        next(rows)
