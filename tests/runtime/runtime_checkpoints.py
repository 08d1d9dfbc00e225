"""Tiny random checkpoints of every architecture, made offline by transformers, with the logits it computes itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from twin.spec.hf import model_from_hf_config
from twin.spec.model import ModelSpec

NEW_TOKENS = 6
COMMON = {"vocab_size": 259, "hidden_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 256, "pad_token_id": 0,
          "tie_word_embeddings": False, "initializer_range": 0.08}
MLA = {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
       "qk_nope_head_dim": 24, "intermediate_size": 128, "moe_intermediate_size": 32, "n_routed_experts": 16,
       "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "n_shared_experts": 1}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
        "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.8}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GQA = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
ARCHITECTURES = {
    "deepseek_v3": {**COMMON, **MLA, "q_lora_rank": 48, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
                    "rope_parameters": YARN},
    "deepseek_v2": {**COMMON, **MLA, "q_lora_rank": None, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5,
                    "norm_topk_prob": False},
    "qwen3_moe": {**COMMON, **GQA, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 16,
                  "num_experts_per_tok": 4, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [1]},
    "mixtral": {**COMMON, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 96, "num_local_experts": 8,
                "num_experts_per_tok": 2, "sliding_window": None},
    "gpt_oss": {**COMMON, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 64,
                "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 16,
                "rope_parameters": {**{k: YARN[k] for k in ("rope_type", "rope_theta", "factor",
                                                            "original_max_position_embeddings")}, "truncate": False}},
    "glm4_moe": {**COMMON, **GQA, "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 8, "n_group": 1,
                 "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
                 "use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 1.2},
    "llama": {**COMMON, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 96,
              "rope_parameters": LLAMA3},
    "qwen3": {**COMMON, **GQA, "intermediate_size": 96, "tie_word_embeddings": True},
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder; `prompts` and what transformers continues them with: greedy tokens and logits [new, vocab]."""

    folder: Path
    model: ModelSpec
    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: list[torch.Tensor]


class Checkpoints:
    """Makes a checkpoint when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: dict[str, Checkpoint] = {}

    def __getitem__(self, name: str) -> Checkpoint:
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def _make(self, name: str) -> Checkpoint:
        from transformers import AutoConfig, AutoModelForCausalLM, logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        folder = self.root / name
        torch.manual_seed(11)
        config = AutoConfig.for_model(name, **ARCHITECTURES[name])
        hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        stream = torch.Generator().manual_seed(12)
        with torch.no_grad():
            for key, tensor in [*hf.named_parameters(), *hf.named_buffers()]:
                # what initialises to zero or one would hide mistakes
                if key.endswith(("bias", "sinks")) and tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, generator=stream) * 0.1)
                elif key.endswith("norm.weight"):
                    tensor.copy_(1 + 0.1 * torch.randn(tensor.shape, generator=stream))
        hf.save_pretrained(folder)
        model = model_from_hf_config(json.loads((folder / "config.json").read_text()), name)
        lengths = (23, 1, 40, 9)
        prompts = [torch.randint(3, 259, (n,), generator=stream).tolist() for n in lengths]
        tokens, logits = zip(*(_continue(hf, prompt) for prompt in prompts), strict=True)
        return Checkpoint(folder, model, prompts, list(tokens), list(logits))


@torch.no_grad()
def _continue(hf: torch.nn.Module, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        tokens.append(int(hf(torch.tensor([tokens])).logits[0, -1].argmax()))
    logits = hf(torch.tensor([tokens[:-1]])).logits[0, len(prompt) - 1:]
    return tokens[len(prompt):], logits.float()
