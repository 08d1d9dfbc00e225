"""ModelSpec from a Hugging Face `config.json`. Only the JSON is read; no code of a checkpoint ever runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from twin.spec.base import Dtype
from twin.spec.errors import Problem, SpecError
from twin.spec.model import Attention, LinearAttention, ModelSpec, MoE, Rope

Config = Mapping[str, Any]


def model_from_hf_config(config: Config, name: str = "model", *, file: str | None = None) -> ModelSpec:
    """Read a config dictionary. Multi-modal configs use their `text_config`.

    Raises SpecError naming the missing or unsupported field.
    """
    text: Config = config
    if isinstance(config.get("text_config"), Mapping):
        text = {
            "quantization_config": config.get("quantization_config"),
            "tie_word_embeddings": config.get("tie_word_embeddings", False),
            **config["text_config"],
        }
        if text["quantization_config"] is None:
            text = {**text, "quantization_config": config.get("quantization_config")}
    model_type = text.get("model_type") or config.get("model_type")
    reader = _READERS.get(str(model_type))
    if reader is None:
        raise SpecError(
            f"model_type {str(model_type)[:60]!r} is not supported",
            file=file,
            field="model_type",
            expected="one of " + ", ".join(sorted(_READERS)),
        )
    try:
        return reader({**text, "model_type": str(model_type)}, name)
    except KeyError as error:
        raise SpecError(
            f"missing field {error.args[0]!r}", file=file, field=str(error.args[0]), hint=f"a {model_type} config.json states it"
        ) from error
    except ValidationError as error:
        problems = [
            Problem(item["msg"].removeprefix("Value error, "), field=".".join(map(str, item["loc"]))) for item in error.errors()
        ]
        raise SpecError(problems, file=file) from error
    except (TypeError, AttributeError, ValueError) as error:
        raise SpecError(f"cannot read this {model_type} config: {error}", file=file) from error


def _rope(config: Config, *, interleaved: bool = False) -> Rope:
    scaling = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind: Any = scaling.get("rope_type") or scaling.get("type") or "none"
    kind = {"default": "none", "dynamic": "none", "mrope": "none"}.get(kind, kind)
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10_000.0
    partial = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if config.get("rotary_dim") and config.get("head_dim"):
        partial = config["rotary_dim"] / config["head_dim"]
    known = {
        key: scaling[key]
        for key in (
            "factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "attention_factor",
            "low_freq_factor",
            "high_freq_factor",
        )
        if scaling.get(key) is not None
    }
    known = {key: float(value) for key, value in known.items()}
    original = scaling.get("original_max_position_embeddings")
    return Rope(
        theta=float(theta),
        scaling=kind,
        original_max_position=original,
        interleaved=interleaved,
        partial=float(partial),
        truncate=bool(scaling.get("truncate", True)),
        **known,
    )


def _dtypes(config: Config) -> tuple[Dtype, Dtype]:
    """Formats of (dense weights, routed experts) as the checkpoint stores them."""
    quant = config.get("quantization_config") or {}
    method = quant.get("quant_method")
    native: Dtype = "fp32" if (config.get("torch_dtype") or config.get("dtype")) == "float32" else "bf16"
    if method == "fp8":
        kind: Dtype = "fp8_block" if quant.get("weight_block_size") else "fp8"
        return kind, "mxfp4" if config.get("expert_dtype") == "fp4" else kind
    if method == "mxfp4":
        return native, "mxfp4"
    if method == "modelopt" or str(quant.get("quant_algo", "")).upper() in ("NVFP4", "FP8"):
        return ("fp8", "fp8") if str(quant.get("quant_algo", "")).upper() == "FP8" else ("fp4", "fp4")
    if method == "compressed-tensors":
        return native, "int4"
    return native, native


def _common(config: Config, name: str) -> dict[str, Any]:
    weights, experts = _dtypes(config)
    return {
        "name": name,
        "model_type": config["model_type"],
        "hidden": config["hidden_size"],
        "vocab": config["vocab_size"],
        "layers": config["num_hidden_layers"],
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "max_context": config.get("max_position_embeddings", 131_072),
        "weight_dtype": weights,
        "expert_dtype": experts,
    }


def _gqa(config: Config, **changes: Any) -> Attention:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    fields: dict[str, Any] = {
        "kind": "gqa",
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "v_head_dim": head_dim,
        "rope": _rope(config),
    }
    return Attention(**{**fields, **changes})


def _mla(config: Config, *, interleaved: bool = True) -> Attention:
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    sparse = (
        {"index_heads": config["index_n_heads"], "index_head_dim": config["index_head_dim"], "index_top_k": config["index_topk"]}
        if config.get("index_topk")
        else {}
    )
    return Attention(
        kind="mla",
        heads=config["num_attention_heads"],
        kv_heads=config["num_attention_heads"],
        head_dim=nope + rope,
        v_head_dim=config["v_head_dim"],
        q_lora_rank=config.get("q_lora_rank"),
        kv_lora_rank=config["kv_lora_rank"],
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        qkv_bias=bool(config.get("attention_bias", False)),
        rope=_rope(config, interleaved=bool(config.get("rope_interleave", interleaved))),
        **sparse,
    )


def _full(config: Config) -> tuple[Any, ...]:
    return ("full",) * int(config["num_hidden_layers"])


def _first_dense(config: Config, dense: int) -> tuple[Any, ...]:
    return tuple("dense" if i < dense else "moe" for i in range(config["num_hidden_layers"]))


def _shared_expert_moe(config: Config, *, sigmoid: bool, grouped: bool) -> MoE:
    """Experts of the DeepSeek and GLM families: shared ones beside the routed, chosen within groups."""
    shared = config.get("n_shared_experts") or 0
    return MoE(
        experts=config["n_routed_experts"], top_k=config["num_experts_per_tok"], intermediate=config["moe_intermediate_size"],
        shared_experts=shared, shared_intermediate=shared * config["moe_intermediate_size"],
        groups=(config.get("n_group") or 1) if grouped else 1,
        top_k_groups=(config.get("topk_group") or 1) if grouped else 1,
        scoring="sigmoid" if sigmoid else "softmax", score_bias=sigmoid, norm_top_k=bool(config.get("norm_topk_prob", sigmoid)),
        routed_scaling=float(config.get("routed_scaling_factor", 1.0)),
    )  # fmt: skip


def _first_layers_dense(config: Config, name: str, attention: Attention, moe: MoE) -> ModelSpec:
    return ModelSpec(
        **_common(config, name), layer_attention=_full(config), attention=attention, moe=moe,
        layer_ffn=_first_dense(config, config.get("first_k_dense_replace", 0)),
        dense_intermediate=config.get("intermediate_size") or 0, mtp_layers=config.get("num_nextn_predict_layers") or 0,
    )  # fmt: skip


def _deepseek(config: Config, name: str) -> ModelSpec:
    """deepseek_v2, deepseek_v3, deepseek_v32, kimi_k2, glm_moe_dsa: MLA, shared experts, first layers dense."""
    sigmoid = config.get("scoring_func", "softmax" if config["model_type"] == "deepseek_v2" else "sigmoid") == "sigmoid"
    grouped = config.get("topk_method", "noaux_tc") in ("noaux_tc", "group_limited_greedy")
    return _first_layers_dense(config, name, _mla(config), _shared_expert_moe(config, sigmoid=sigmoid, grouped=grouped))


def _glm4_moe(config: Config, name: str) -> ModelSpec:
    attention = _gqa(config, qk_norm=bool(config.get("use_qk_norm", False)), qkv_bias=bool(config.get("attention_bias", False)))
    return _first_layers_dense(config, name, attention, _shared_expert_moe(config, sigmoid=True, grouped=True))


def _count_experts(config: Config) -> int:
    """`num_experts`, which transformers 5 writes as `num_local_experts`."""
    return int(
        config["num_local_experts"] if "num_experts" not in config and "num_local_experts" in config else config["num_experts"]
    )


def _qwen_ffn(config: Config) -> tuple[Any, ...]:
    only_dense, every = set(config.get("mlp_only_layers") or ()), config.get("decoder_sparse_step") or 1
    return tuple("dense" if i in only_dense or (i + 1) % every else "moe" for i in range(config["num_hidden_layers"]))


def _qwen3_moe(config: Config, name: str) -> ModelSpec:
    moe = MoE(
        experts=_count_experts(config),
        top_k=config["num_experts_per_tok"],
        intermediate=config["moe_intermediate_size"],
        norm_top_k=bool(config.get("norm_topk_prob", False)),
    )
    layer_ffn = _qwen_ffn(config)
    return ModelSpec(
        **_common(config, name),
        layer_attention=_full(config),
        layer_ffn=layer_ffn,
        attention=_gqa(config, qk_norm=True, qkv_bias=bool(config.get("attention_bias", False))),
        dense_intermediate=config.get("intermediate_size") or 0,
        moe=moe,
    )


def _qwen3_hybrid(config: Config, name: str) -> ModelSpec:
    """qwen3_next and qwen3_5_moe: gated delta-rule layers with a softmax layer every few."""
    every = config.get("full_attention_interval") or 4
    types: Any = config.get("layer_types") or [
        "full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(config["num_hidden_layers"])
    ]
    linear = LinearAttention(
        key_heads=config["linear_num_key_heads"],
        value_heads=config["linear_num_value_heads"],
        key_dim=config["linear_key_head_dim"],
        value_dim=config["linear_value_head_dim"],
        conv_kernel=config.get("linear_conv_kernel_dim", 4),
    )
    shared = config.get("shared_expert_intermediate_size") or 0
    moe = MoE(
        experts=_count_experts(config),
        top_k=config["num_experts_per_tok"],
        intermediate=config["moe_intermediate_size"],
        shared_experts=int(shared > 0),
        shared_intermediate=shared,
        shared_gate=shared > 0,
        norm_top_k=bool(config.get("norm_topk_prob", True)),
    )
    return ModelSpec(
        **_common(config, name),
        layer_ffn=_qwen_ffn(config),
        layer_attention=tuple("full" if kind == "full_attention" else "linear" for kind in types),
        attention=_gqa(config, qk_norm=True, output_gate=bool(config.get("attn_output_gate", True))),
        linear_attention=linear,
        dense_intermediate=config.get("intermediate_size") or 0,
        moe=moe,
        mtp_layers=config.get("mtp_num_hidden_layers") or 0,
    )


def _mixtral(config: Config, name: str) -> ModelSpec:
    moe = MoE(experts=config["num_local_experts"], top_k=config["num_experts_per_tok"], intermediate=config["intermediate_size"])
    window = config.get("sliding_window")
    return ModelSpec(
        **_common(config, name),
        layer_attention=("sliding" if window else "full",) * config["num_hidden_layers"],
        layer_ffn=_first_dense(config, 0),
        attention=_gqa(config, sliding_window=window),
        moe=moe,
    )


def _gpt_oss(config: Config, name: str) -> ModelSpec:
    moe = MoE(
        experts=config["num_local_experts"],
        top_k=config.get("num_experts_per_tok") or config["experts_per_token"],
        intermediate=config["intermediate_size"],
        router_bias=True,
        expert_bias=True,
        swiglu_limit=float(config.get("swiglu_limit", 7.0)),
    )
    types: Any = config.get("layer_types") or [
        "sliding_attention" if i % 2 == 0 else "full_attention" for i in range(config["num_hidden_layers"])
    ]
    attention = _gqa(
        config,
        qkv_bias=bool(config.get("attention_bias", True)),
        out_bias=bool(config.get("attention_bias", True)),
        sinks=True,
        sliding_window=config.get("sliding_window", 128),
    )
    return ModelSpec(
        **_common(config, name),
        layer_ffn=_first_dense(config, 0),
        attention=attention,
        moe=moe,
        layer_attention=tuple("sliding" if kind == "sliding_attention" else "full" for kind in types),
    )


def _minimax(config: Config, name: str) -> ModelSpec:
    """minimax_m2 and minimax_m3: GQA with partial rotary, sigmoid routing with bias."""
    layers = config["num_hidden_layers"]
    frequency = config.get("moe_layer_freq")
    ffn: Any = (
        tuple("moe" if flag else "dense" for flag in frequency) if isinstance(frequency, (list, tuple)) else ("moe",) * layers
    )
    shared = config.get("shared_intermediate_size") or 0
    moe = MoE(
        experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate=config.get("moe_intermediate_size") or config["intermediate_size"],
        shared_experts=int(shared > 0),
        shared_intermediate=shared,
        scoring="sigmoid",
        score_bias=bool(config.get("use_routing_bias", True)),
        routed_scaling=float(config.get("routed_scaling_factor", 1.0)),
    )
    return ModelSpec(
        **_common(config, name),
        layer_attention=_full(config),
        layer_ffn=ffn,
        attention=_gqa(config, qk_norm=bool(config.get("use_qk_norm", True))),
        dense_intermediate=config.get("dense_intermediate_size") or 0,
        moe=moe,
        mtp_layers=config.get("num_mtp_modules") or 0,
    )


def _llama4(config: Config, name: str) -> ModelSpec:
    every = config.get("interleave_moe_layer_step") or 1
    ffn: Any = tuple("moe" if (i + 1) % every == 0 else "dense" for i in range(config["num_hidden_layers"]))
    inner = config["intermediate_size"]
    moe = MoE(
        experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate=inner,
        shared_experts=1,
        shared_intermediate=inner,
        scoring="sigmoid",
        norm_top_k=False,
    )
    window = config.get("attention_chunk_size") or None
    types: Any = tuple("full" if (i + 1) % 4 == 0 or not window else "sliding" for i in range(config["num_hidden_layers"]))
    return ModelSpec(
        **_common(config, name),
        layer_attention=types,
        layer_ffn=ffn,
        attention=_gqa(config, sliding_window=window),
        dense_intermediate=config["intermediate_size_mlp"],
        moe=moe,
    )


def _dense(config: Config, name: str) -> ModelSpec:
    """llama and qwen3."""
    bias = bool(config.get("attention_bias", config["model_type"] == "qwen2"))
    return ModelSpec(
        **_common(config, name),
        layer_attention=_full(config),
        layer_ffn=("dense",) * config["num_hidden_layers"],
        attention=_gqa(config, qk_norm=config["model_type"] == "qwen3", qkv_bias=bias),
        dense_intermediate=config["intermediate_size"],
    )


_READERS: dict[str, Callable[[Config, str], ModelSpec]] = {
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "deepseek_v32": _deepseek,
    "kimi_k2": _deepseek,
    "glm_moe_dsa": _deepseek,
    "glm4_moe": _glm4_moe,
    "qwen3_moe": _qwen3_moe,
    "qwen3_next": _qwen3_hybrid,
    "qwen3_5_moe": _qwen3_hybrid,
    "qwen3_5_moe_text": _qwen3_hybrid,
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
    "minimax_m2": _minimax,
    "minimax_m3": _minimax,
    "llama4": _llama4,
    "llama4_text": _llama4,
    "llama": _dense,
    "qwen2": _dense,
    "qwen3": _dense,
}
