"""A tiny checkpoint of any supported architecture: `python -m runtime.tiny OUT --arch deepseek_v3`.

Random weights from a seed as `model.safetensors`, and `config.json`; nothing else, and no other library.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from runtime.model.params import checkpoint_tensors
from runtime.weights import RandomReader
from twin.spec.errors import SpecError
from twin.spec.hf import model_from_hf_config
from twin.spec.model import ModelSpec
from twin.spec.rundir import write_text

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ARCHITECTURES = ("deepseek_v3", "deepseek_v2", "kimi_k2", "qwen3_moe", "mixtral", "gpt_oss", "glm4_moe", "llama", "qwen3")


def tiny_config(arch: str, *, hidden: int = 128, layers: int = 4, experts: int = 16, top_k: int = 4, vocab: int = 512,
                context: int = 2048, dtype: str = "float32", mtp: int = 0) -> dict[str, Any]:
    """A small config.json of an architecture: 8 heads, experts of a quarter of `hidden`, `mtp` MTP modules.

    Raises SpecError for an architecture that cannot be built or a hidden size that does not divide.
    """
    if arch not in ARCHITECTURES:
        raise SpecError(f"architecture {arch[:40]!r} is unknown", field="arch", expected=", ".join(ARCHITECTURES))
    if hidden % 32:
        raise SpecError(f"is {hidden}", field="hidden", expected="a multiple of 32")
    common = {"model_type": arch, "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocab,
              "max_position_embeddings": context, "tie_word_embeddings": False, "torch_dtype": dtype, "rms_norm_eps": 1e-6,
              "rope_theta": 10000.0, "num_attention_heads": 8, "intermediate_size": 2 * hidden}
    if mtp:
        common["num_nextn_predict_layers"] = mtp
    head, width = hidden // 8, hidden // 4
    gqa = {"num_key_value_heads": 2, "head_dim": head}
    if arch in ("deepseek_v3", "deepseek_v2", "kimi_k2"):
        can_group = experts % 4 == 0 and top_k <= experts // 2
        grouped = {"n_group": 4, "topk_group": 2} if can_group else {"n_group": 1, "topk_group": 1}
        version = {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False} \
            if arch == "deepseek_v2" else {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
        return {**common, **grouped, **version, "num_key_value_heads": 8, "kv_lora_rank": hidden // 2, "q_lora_rank": hidden // 2,
                "qk_rope_head_dim": 16, "qk_nope_head_dim": head, "v_head_dim": head, "moe_intermediate_size": width,
                "n_routed_experts": experts, "n_shared_experts": 1, "num_experts_per_tok": top_k, "first_k_dense_replace": 1,
                "routed_scaling_factor": 1.0}
    if arch == "qwen3_moe":
        return {**common, **gqa, "num_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": width,
                "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if arch == "glm4_moe":
        return {**common, **gqa, "n_routed_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": width,
                "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "partial_rotary_factor": 0.5}
    if arch in ("mixtral", "gpt_oss"):
        extra = {"sliding_window": None} if arch == "mixtral" else {"sliding_window": 128, "swiglu_limit": 7.0}
        return {**common, **gqa, **extra, "num_local_experts": experts, "num_experts_per_tok": top_k, "intermediate_size": width}
    return {**common, **gqa}


def write_checkpoint(out: Path, config: dict[str, Any], *, seed: int = 0, echo: float | None = None) -> ModelSpec:
    """Write `config.json` and `model.safetensors` into `out`, each whole; the model they describe.

    Random layers are noise that nobody could draft. With `echo` they add only that share of what they would, and the MTP
    module passes the embedding on: the next token then depends mostly on the last, and drafts are right the more often
    the smaller `echo` is.
    """
    model = model_from_hf_config(config, out.name or "tiny")
    reader, dtype = RandomReader(seed), _DTYPES[config["torch_dtype"]]
    shapes = checkpoint_tensors(model, mtp=model.mtp_layers > 0)
    tensors = {name: reader.tensor(name, shape) for name, shape in sorted(shapes.items())}
    for name, tensor in tensors.items() if echo is not None else ():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.mul_(echo)
        elif name == "model.embed_tokens.weight":
            tensor.mul_(model.hidden**0.5)  # of size one, as layers and norms expect
        elif name.endswith("eh_proj.weight"):
            tensor[:, :model.hidden] = torch.eye(model.hidden)
            tensor[:, model.hidden:] *= echo
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        save_file(tensors, Path(scratch) / "model.safetensors", metadata={"format": "pt"})
        (Path(scratch) / "model.safetensors").replace(out / "model.safetensors")
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    return model


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--arch", choices=ARCHITECTURES, default="deepseek_v3")
    for name, default in (("hidden", 128), ("layers", 4), ("experts", 16), ("top-k", 4), ("vocab", 512), ("context", 2048),
                          ("seed", 0), ("mtp", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--echo", type=float, help="share of what layers add; small: drafts are often right")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float32")
    given = parser.parse_args(arguments)
    try:
        config = tiny_config(given.arch, hidden=given.hidden, layers=given.layers, experts=given.experts, top_k=given.top_k,
                             vocab=given.vocab, context=given.context, dtype=given.dtype, mtp=given.mtp)
        model = write_checkpoint(given.out, config, seed=given.seed, echo=given.echo)
    except SpecError as err:
        parser.error(str(err))
    print(f"{given.out}: {given.arch}, {model.total_params:,} parameters, {model.active_params:,} active")


if __name__ == "__main__":
    main()
