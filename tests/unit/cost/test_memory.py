"""Memory: ranks together hold the checkpoint, KV blocks are what the cache takes, and too much is said."""

from __future__ import annotations

import numpy as np
import pytest
from cost_cases import cost_model, gqa_model, mla_model, pool_of

from twin.cost.batch import StepBatch
from twin.cost.memory import dense_weight_bytes, expert_weight_bytes
from twin.cost.model import CostModel
from twin.spec.errors import Infeasible
from twin.spec.load import load_cluster, load_model
from twin.spec.plan import Plan, Precision

FP8 = Precision(weights="fp8_block", experts="fp8_block", kv="bf16", dispatch="fp8")


@pytest.mark.parametrize("name", ["deepseek-r1", "kimi-k2", "qwen3-235b-a22b", "gpt-oss-120b", "mixtral-8x7b", "qwen3-32b"])
def test_ranks_together_hold_every_parameter_once(name: str) -> None:
    """bf16 everywhere: dense of one TP=1 rank and experts over EP=8 make the model's own count."""
    model = load_model(name)
    ep = 8 if model.moe is not None else 1
    pool = pool_of(dp=ep, ep=ep)
    total = dense_weight_bytes(model, Precision(), 1, mtp=False) + ep * expert_weight_bytes(model, Precision(), pool, mtp=False)
    assert total == pytest.approx(2 * model.total_params, rel=1e-9)


def test_tp_halves_what_is_by_head_and_keeps_what_is_not() -> None:
    model = gqa_model(tie_embeddings=True)
    whole, two, eight = (dense_weight_bytes(model, Precision(), tp, mtp=False) for tp in (1, 2, 8))
    replicated = 2 * (9 * 64 + 2 * model.gate_params)
    assert two == pytest.approx((whole - replicated) / 2 + replicated)
    kv_heads = 4 * 2 * (64 * 32)  # four layers, one KV head's two projections, bf16
    assert eight == pytest.approx((whole - replicated) / 8 + replicated + kv_heads * (1 - 2 / 8))
    tied = dense_weight_bytes(gqa_model(), Precision(), 1, mtp=False) - whole
    assert tied == 2 * 64 * 100


def test_expert_weights_count_redundant_slots_and_expert_tp() -> None:
    model = gqa_model()
    one = 2 * model.expert_params * 2  # two MoE layers, bf16
    assert expert_weight_bytes(model, Precision(), pool_of(dp=4, ep=4), mtp=False) == 4 * one
    assert expert_weight_bytes(model, Precision(), pool_of(dp=4, ep=4, redundant_experts=4), mtp=False) == 5 * one
    assert expert_weight_bytes(model, Precision(), pool_of(dp=4, ep=2), mtp=False) == 8 * one / 2


def test_kv_blocks_fill_what_is_allowed_and_no_more() -> None:
    model = load_model("deepseek-r1")
    pool = pool_of(role="decode", dp=16, ep=16, max_num_seqs=128, max_batch_tokens=1024)
    cost = cost_model(model, "h200-2x8", pool, engine="sglang", precision=FP8)
    memory = cost.memory()
    used = (memory.dense_weight_bytes + memory.expert_weight_bytes + memory.kv_pool_bytes + memory.activation_bytes
            + memory.comm_buffer_bytes + memory.reserved_bytes)
    block = 64 * model.kv_bytes_per_token("bf16")
    assert used <= 0.9 * memory.hbm_bytes < used + block
    assert memory.free_bytes == pytest.approx(memory.hbm_bytes - used)
    assert cost.kv_blocks_per_rank == memory.kv_blocks == memory.kv_tokens // 64
    assert memory.kv_pool_bytes == pytest.approx(memory.kv_blocks * block)


def test_published_free_kv_memory_of_deepseek_on_h200() -> None:
    """vLLM's wide-EP report: 34 GB free a GPU at TP8, 45 GB at DP/EP16 (one constant of ours was fitted on the latter)."""
    model = load_model("deepseek-r1")
    tp8 = cost_model(model, "h200-1x8", pool_of(tp=8, ep=1, max_batch_tokens=8192), engine="vllm", precision=FP8).memory()
    assert tp8.kv_pool_bytes / 1e9 == pytest.approx(34, rel=0.25)
    ep16 = cost_model(model, "h200-2x8", pool_of(dp=16, ep=16, max_batch_tokens=8192, max_num_seqs=256,
                                                comm="deepep_low_latency"), engine="vllm", precision=FP8).memory()
    assert ep16.kv_pool_bytes / 1e9 == pytest.approx(45, rel=0.25)


def test_what_does_not_fit_says_by_how_much() -> None:
    model = load_model("deepseek-r1")
    with pytest.raises(Infeasible) as caught:
        cost_model(model, "h100-1x8", pool_of(dp=8, ep=8), precision=FP8).memory()
    error = caught.value
    assert error.constraint == "memory"
    assert error.unit == "bytes"
    assert error.needed is not None
    assert error.available is not None
    assert error.needed > error.available == pytest.approx(0.9 * 79.6 * 2**30)
    assert "too much" in str(error)
    with pytest.raises(Infeasible):
        cost_model(gqa_model(), "cpu-2rank", pool_of(kv_blocks=1 << 28)).memory()


def test_kv_transfer_counts_replicated_heads_and_the_latent_once() -> None:
    qwen = load_model("qwen3-235b-a22b")
    tp8 = cost_model(qwen, "h800-1x8", pool_of(tp=8, ep=8))
    assert tp8.kv_transfer_bytes(1000) == 2 * 1000 * qwen.kv_bytes_per_token("bf16")  # 4 heads on 8 ranks
    mla = cost_model(mla_model(), "h800-1x8", pool_of(tp=8, ep=8))
    assert mla.kv_transfer_bytes(1000) == 1000 * mla_model().kv_bytes_per_token("bf16")


def test_mtp_adds_its_module_and_its_cache() -> None:
    plain = cost_model(mla_model(), "cpu-2rank", pool_of(kv_blocks=100)).memory()
    drafting = cost_model(mla_model(), "cpu-2rank", pool_of(kv_blocks=100, mtp_draft_tokens=1)).memory()
    assert drafting.kv_pool_bytes == pytest.approx(plain.kv_pool_bytes * 5 / 4)
    assert drafting.expert_weight_bytes == pytest.approx(plain.expert_weight_bytes * 4 / 3)
    assert drafting.dense_weight_bytes > plain.dense_weight_bytes


def test_prefill_ranks_hold_what_decode_ranks_draft_with() -> None:
    """Where decode drafts with the MTP module, prefill computes the module's KV: its weights, its layer, and its bytes."""
    model = mla_model()
    prefill, decode = pool_of(role="prefill", dp=4, ep=4), pool_of(role="decode", dp=4, ep=4, mtp_draft_tokens=1)
    plain, drafting = (CostModel(model, load_cluster("h200-1x8"), Plan(pools=(prefill, other)), prefill)
                       for other in (decode.model_copy(update={"mtp_draft_tokens": 0}), decode))
    assert plain.memory().dense_weight_bytes == dense_weight_bytes(model, Precision(), 1, mtp=False)
    assert drafting.memory().dense_weight_bytes == dense_weight_bytes(model, Precision(), 1, mtp=True)
    assert drafting.memory().expert_weight_bytes > plain.memory().expert_weight_bytes
    assert drafting.kv_transfer_bytes(100) == pytest.approx(plain.kv_transfer_bytes(100) * 5 / 4)  # four layers and the module's
    batch = StepBatch.prefill(np.full(4, 256))
    parts = drafting.step(batch).parts_s
    assert 0 < parts["mtp/draft"] < plain.step(batch).total_s
    assert drafting.step_s(batch) == pytest.approx(sum(parts.values()))
    assert "mtp/draft" not in plain.step(batch).parts_s


def test_prompts_ride_along_with_the_first_draft() -> None:
    pool = pool_of(dp=1, mtp_draft_tokens=2)
    model = cost_model(mla_model(), "h200-1x8", pool)
    prompts, decodes = StepBatch.prefill(256), StepBatch.decode(8, 8 * 100)
    both = StepBatch(decodes.decode_seqs, decodes.decode_context, prompts.prefill_tokens, prompts.prefill_context,
                     prompts.prefill_seqs)
    alone, along, prompt = (model.step(batch).parts_s["mtp/draft"] for batch in (decodes, both, prompts))
    assert max(alone, prompt) < along < alone + prompt
    lookup = cost_model(mla_model(mtp_layers=0), "h200-1x8", pool)
    assert "mtp/draft" not in lookup.step(prompts).parts_s
