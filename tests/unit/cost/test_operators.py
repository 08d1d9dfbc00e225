"""Work of operators against counts made by hand and against the model's own parameter counts."""

from __future__ import annotations

import numpy as np
import pytest
from cost_cases import gqa_model, mla_model

from twin.cost.batch import INDEX, Extents, StepBatch, features
from twin.cost.defaults import default_efficiency
from twin.cost.operators import Slice, rank_ops
from twin.cost.roofline import OpTable, peak_flop_per_s
from twin.spec.load import load_gpu, load_model
from twin.spec.model import ModelSpec
from twin.spec.plan import Precision

GPU = load_gpu("h200-sxm")


def table_of(model: ModelSpec, tp: int = 1, precision: Precision | None = None) -> OpTable:
    return OpTable.of(rank_ops(Slice(model, precision or Precision(), tp)), GPU, default_efficiency(GPU), 2e-6)


def work(model: ModelSpec, batch: StepBatch, tp: int = 1, drafts: int = 0) -> tuple[dict[str, float], dict[str, float]]:
    return table_of(model, tp).totals(features(batch, Extents.of(model, drafts))[0])


def test_gqa_decode_by_hand() -> None:
    """3 sequences of contexts 10, 20, 33: 4 layers, 8 heads of 16 over 2 KV heads."""
    flops, moved = work(gqa_model(), StepBatch.decode([3], [63]))
    assert flops["attention/kv_read"] == 4 * sum(2 * 8 * (16 + 16) * context for context in (10, 20, 33))
    assert moved["attention/kv_read"] == 4 * (63 * 2 * (16 + 16) * 2 + 3 * 8 * (16 + 16) * 2)
    qkv, out = 64 * (8 * 16 + 2 * 32), 8 * 16 * 64
    assert flops["attention/projections"] == 4 * 3 * 2 * (qkv + out)
    assert flops["ffn/dense"] == 2 * 3 * 2 * (3 * 64 * 96)
    assert flops["moe/gate"] == 2 * 3 * 2 * 64 * 16
    assert flops["moe/shared"] == 2 * 3 * 2 * (3 * 64 * 48)
    assert flops["head"] == 3 * 2 * 64 * 100


def test_gqa_prefill_counts_pairs_token_by_token() -> None:
    """A chunk of 6 tokens after 5: token i sees 5 + i + 1/2 keys on average of the causal triangle."""
    flops, _ = work(gqa_model(), StepBatch.prefill([6], [5]))
    pairs = sum(5 + i + 0.5 for i in range(6))
    assert flops["attention/prefill"] == pytest.approx(4 * 2 * 8 * 32 * pairs)
    assert flops["head"] == 2 * 64 * 100  # one row a chunk


def test_mla_decode_is_absorbed_and_prefill_naive() -> None:
    flops, moved = work(mla_model(), StepBatch.decode([2], [50]))
    assert flops["attention/kv_read"] == 4 * 50 * 2 * 8 * (40 + 8 + 40)
    assert moved["attention/kv_read"] == 4 * (50 * 48 * 2 + 2 * 8 * 88 * 2)
    assert flops["attention/absorb"] == 4 * 2 * 2 * 8 * 40 * (16 + 16)
    flops, _ = work(mla_model(), StepBatch.prefill([7], [3]))
    assert flops["attention/prefill"] == pytest.approx(4 * 2 * 8 * (16 + 8 + 16) * sum(3 + i + 0.5 for i in range(7)))
    assert flops["attention/kv_up"] == pytest.approx(4 * 2 * (7 + 3) * 40 * 8 * 32)  # the past is expanded again
    assert "attention/absorb" not in flops or flops["attention/absorb"] == 0


@pytest.mark.parametrize("name", ["deepseek-r1", "qwen3-30b-a3b", "mixtral-8x7b", "llama-3.1-8b", "glm-5", "minimax-m2.5"])
def test_dense_products_multiply_every_active_parameter_once(name: str) -> None:
    """2 flops a token for every matrix element that the model's own count says is active (routed experts apart)."""
    model = load_model(name)
    # decode computes everything of MLA but the expansion of the cache, which absorption does per query
    flops, _ = work(model, StepBatch.decode([1], [0]))
    scores = {"attention/kv_read", "attention/prefill"}
    counted = sum(f for key, f in flops.items() if key not in scores) / 2
    active = model.active_params - model.moe_layers * (model.moe.top_k * model.expert_params if model.moe else 0)
    assert counted == pytest.approx(active, rel=2e-3)  # norms, biases and sinks multiply nothing


@pytest.mark.parametrize("model", [gqa_model(), mla_model()], ids=["gqa", "mla"])
def test_tp_divides_flops_and_replicates_kv_heads(model: ModelSpec) -> None:
    batch = StepBatch.decode([4], [100])
    whole, _ = work(model, batch)
    part, moved = work(model, batch, tp=8)
    assert part["attention/kv_read"] == pytest.approx(whole["attention/kv_read"] / 8)
    assert part["moe/gate"] == whole["moe/gate"]  # every rank routes
    if model.attention.kind == "gqa":  # 2 KV heads over 8 ranks: one each
        assert moved["attention/kv_read"] == 4 * (100 * 1 * 32 * 2 + 4 * 1 * 32 * 2)


def test_sliding_window_and_sparse_attention_bound_what_is_read() -> None:
    attention = gqa_model().attention.model_copy(update={"sliding_window": 16})
    model = gqa_model(attention=attention, layer_attention=("sliding", "full", "sliding", "full"))
    flops, _ = work(model, StepBatch.decode([2], [200]))
    assert flops["attention/kv_read"] == 2 * 2 * 8 * 32 * (200 + 2 * 16)
    x = features(StepBatch.prefill([40], [10]), Extents(16, None, 0))[0]
    exact = sum(min(10 + i + 0.5, 16) for i in range(40))
    assert x[INDEX["prefill_pairs_window"]] == pytest.approx(exact, rel=1e-3)
    sparse = mla_model(attention=mla_model().attention.model_copy(update={"index_heads": 4, "index_head_dim": 8,
                                                                          "index_top_k": 32}))
    flops, _ = work(sparse, StepBatch.decode([1], [1000]))
    assert flops["attention/kv_read"] == 4 * 32 * 2 * 8 * 88
    assert flops["attention/indexer"] > 4 * 1000 * 2 * 4 * 8  # every key is scored by the small heads


def test_narrow_formats_fall_back_where_the_gpu_lacks_them() -> None:
    a100, b200 = load_gpu("a100-sxm-80g"), load_gpu("b200-sxm")
    assert peak_flop_per_s(a100, "fp8_block") == a100.bf16_flop_per_s
    assert peak_flop_per_s(GPU, "fp4") == GPU.fp8_flop_per_s
    assert peak_flop_per_s(b200, "fp4") == b200.fp4_flop_per_s
    assert peak_flop_per_s(b200, "mxfp4") == b200.bf16_flop_per_s
    half = work_bytes("fp8") / work_bytes("bf16")
    assert 0.4 < half < 0.75  # weights shrink, activations do not


def work_bytes(dtype: str) -> float:
    model = load_model("qwen3-30b-a3b")
    table = table_of(model, precision=Precision(weights=dtype))
    return table.totals(features(StepBatch.decode([1], [1]), Extents.of(model, 0))[0])[1]["attention/projections"]


def test_verification_of_drafts_widens_the_step() -> None:
    flops, moved = work(mla_model(), StepBatch.decode([2], [50]), drafts=2)
    base_flops, base_moved = work(mla_model(), StepBatch.decode([2], [50]))
    assert flops["attention/kv_read"] == 3 * base_flops["attention/kv_read"]
    kv = 4 * 50 * 48 * 2
    assert moved["attention/kv_read"] - kv == 3 * (base_moved["attention/kv_read"] - kv)  # the cache is read once


def test_features_of_an_idle_rank_are_zero() -> None:
    x = features(StepBatch.decode([0, 3], [0, 30]), Extents(None, None, 1))
    assert not x[0].any()
    assert x[1, INDEX["decode_tokens"]] == 6
    assert np.isfinite(table_of(gqa_model()).seconds(x)).all()
    assert table_of(gqa_model()).seconds(x)[0].sum() == 0
