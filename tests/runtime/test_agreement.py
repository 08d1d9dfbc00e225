"""The engine in bf16 against transformers, token by token: both are told the true text so far and name the next token.

Random models name tokens by a hair, which any rounding turns. So a tiny model of each architecture first learns some texts
by heart, in fp32 and with transformers alone; what it then says it says clearly, and only if every layer does its part.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from runtime_checkpoints import ARCHITECTURES
from safetensors.torch import load_file, save_file

from runtime.batch import Segment, make_step
from runtime.options import EngineOptions
from runtime.rank import Rank, build_rank
from twin.spec.hf import model_from_hf_config
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan

LEAST = 0.99
TEXTS, LENGTH, PROMPT = 8, 96, 48
BLOCK = 16
LETTERS = 6
"""So few that the last token alone says little of the next."""
WIDE = {"hidden_size": 256, "initializer_range": 0.06}
"""A GPU multiplies nothing narrower than 16."""
WIDE_MLA = {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "v_head_dim": 32, "qk_nope_head_dim": 32, "moe_intermediate_size": 64}
WIDE_GQA = {"head_dim": 32, "moe_intermediate_size": 64}


@dataclass(frozen=True)
class Learned:
    """A checkpoint that knows `texts` [TEXTS, LENGTH], and what transformers names after every token of them, in bf16."""

    folder: Path
    model: ModelSpec
    texts: torch.Tensor
    named: torch.Tensor
    known: float


def learn(folder: Path, name: str, device: str, steps: int, *, wide: bool) -> Learned:
    """Teach a model, save it, and ask transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(5)
    more = {**WIDE, **(WIDE_MLA if name.startswith("deepseek") else WIDE_GQA)} if wide else {}
    more = {key: value for key, value in more.items() if key in ARCHITECTURES[name] or key in WIDE}
    config = AutoConfig.for_model(name, **{**ARCHITECTURES[name], **more})
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(device)
    texts = torch.randint(3, 3 + LETTERS, (TEXTS, LENGTH), device=device)
    optimizer = torch.optim.Adam(hf.parameters(), lr=2e-3)
    with torch.enable_grad():
        for _ in range(steps):
            loss = hf(texts, labels=texts).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
            optimizer.step()
    hf.eval().to(torch.bfloat16).save_pretrained(folder)
    with torch.no_grad():
        named = hf(texts).logits[:, :-1].argmax(-1).cpu()
    model = model_from_hf_config(json.loads((folder / "config.json").read_text()), name)
    known = float((named == texts[:, 1:].cpu()).double().mean())
    return Learned(folder, model, texts.cpu(), named, known)


@torch.no_grad()
def named_by_engine(rank: Rank, texts: torch.Tensor) -> torch.Tensor:
    """The engine's next token after every token but the last [TEXTS, LENGTH - 1]: prompts in one step, the rest by decode steps
    of all texts together, from graphs where the rank has them."""
    each = -(-LENGTH // BLOCK)
    tables = [range(i * each, (i + 1) * each) for i in range(TEXTS)]
    prompts = [Segment(text[:PROMPT].tolist(), 0, table, True) for text, table in zip(texts, tables, strict=True)]
    states = rank.transformer.hidden([make_step(prompts, BLOCK, rank.device)], rank.kv, TEXTS * PROMPT)
    named = [rank.transformer.head(states).argmax(-1).view(TEXTS, PROMPT).cpu()]
    for at in range(PROMPT, LENGTH - 1):
        segments = [Segment([int(text[at])], at, table) for text, table in zip(texts, tables, strict=True)]
        if rank.decode is not None:
            tokens = rank.decode.run(segments).tokens
        else:
            tokens = rank.transformer.forward(make_step(segments, BLOCK, rank.device), rank.kv, TEXTS).argmax(-1)
        named.append(tokens[:, None].cpu())
    return torch.cat(named, 1)


def agreement(learned: Learned, options: EngineOptions) -> float:
    pool = PoolPlan(role="mixed", block_tokens=BLOCK, kv_blocks=TEXTS * -(-LENGTH // BLOCK), max_num_seqs=TEXTS)
    rank = build_rank(learned.model, Plan(pools=(pool,)), options, 0, lambda phase: None)
    assert (options.device == "cuda") == (rank.decode is not None)
    return float((named_by_engine(rank, learned.texts) == learned.named).double().mean())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("tuned", [False, True], ids=["plain", "tuned"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_engine_names_the_tokens_that_transformers_names(name: str, tuned: bool, tmp_path: Path) -> None:
    if tuned and name not in ("qwen3_moe", "gpt_oss"):
        pytest.skip("tuning takes long; two architectures have every part that it chooses")
    learned = learn(tmp_path, name, "cuda", 160, wide=True)
    assert learned.known > 0.9, "the model did not learn its texts, so that agreement would say little"
    share = agreement(learned, EngineOptions(checkpoint=str(tmp_path), dtype="bf16", device="cuda", backend="triton", tune=tuned))
    print(f"{name}: {share:.4%} of {learned.named.numel()} tokens")
    assert share >= LEAST


@pytest.mark.slow
def test_agreement_without_a_gpu(tmp_path: Path) -> None:
    """The same by the torch backend in bf16; and one expert of 16 in one layer that is wrong shows."""
    learned = learn(tmp_path, "qwen3_moe", "cpu", 160, wide=False)
    assert learned.known > 0.9
    options = EngineOptions(checkpoint=str(tmp_path), dtype="bf16")
    assert agreement(learned, options) >= LEAST
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    tensors[name] = -tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert agreement(learned, options) < LEAST
