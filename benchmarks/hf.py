"""The same step by transformers' own implementation, random weights, to compare with in the same run.

Qwen3-MoE alone: a model of the same sizes, its experts by transformers' grouped products where it has them.
"""

from __future__ import annotations

import inspect
import statistics
import time
from typing import Any

import torch

from twin.spec.errors import SpecError
from twin.spec.model import ModelSpec


def hf_step_s(model: ModelSpec, phase: str, batch: int, context: int, *, device: str = "cuda",
              dtype: torch.dtype = torch.bfloat16, repeats: int = 3) -> float:
    """Median seconds of a step after one to warm up; a decode step starts from a cache of `context` random tokens.

    Raises SpecError for a model that is not Qwen3-MoE.
    """
    hf = _build(model, device, dtype)
    ids = torch.randint(model.vocab, (batch, context if phase == "prefill" else 1), device=device)
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    # transformers 5.2x renamed the argument; both releases are in use
    keyword = "cache" if "cache" in inspect.signature(hf.forward).parameters else "past_key_values"

    def once() -> float:
        cache = _cache(model, hf.config, batch, context, device, dtype) if phase == "decode" else None
        sync()
        began = time.perf_counter()
        out = hf(input_ids=ids, **{keyword: cache}, use_cache=True, logits_to_keep=1)
        out.logits[:, -1].argmax(-1).tolist()
        sync()
        return time.perf_counter() - began

    with torch.inference_mode():
        once()
        return statistics.median(once() for _ in range(repeats))


def _build(model: ModelSpec, device: str, dtype: torch.dtype) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    if model.model_type != "qwen3_moe" or model.moe is None:
        raise SpecError(f"{model.name} is not Qwen3-MoE", field="hf", expected="a Qwen3-MoE model")
    a, m = model.attention, model.moe
    config = Qwen3MoeConfig(
        vocab_size=model.vocab, hidden_size=model.hidden, num_hidden_layers=model.layers, num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads, head_dim=a.head_dim, num_experts=m.experts, num_experts_per_tok=m.top_k,
        moe_intermediate_size=m.intermediate, intermediate_size=m.intermediate, norm_topk_prob=m.norm_top_k,
        max_position_embeddings=model.max_context, rms_norm_eps=model.norm_eps, tie_word_embeddings=False)
    with torch.device("meta"):
        hf = Qwen3MoeForCausalLM(config).to(dtype)
    hf = hf.to_empty(device=device).eval()
    with torch.no_grad():
        for weight in hf.parameters():
            weight.normal_(0, 0.02)
        for name, buffer in hf.named_buffers():  # inverse frequencies, which no initialiser fills any more
            if name.endswith("inv_freq"):
                width = 2 * buffer.numel()
                buffer.copy_(1.0 / model.attention.rope.theta ** (torch.arange(0, width, 2, device=device) / width))
    return hf


def _cache(model: ModelSpec, config: object, batch: int, context: int, device: str, dtype: torch.dtype) -> object:
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    shape = (batch, model.attention.kv_heads, context - 1, model.attention.head_dim)
    for layer in range(model.layers):
        cache.update(torch.randn(shape, device=device, dtype=dtype), torch.randn(shape, device=device, dtype=dtype), layer)
    return cache
