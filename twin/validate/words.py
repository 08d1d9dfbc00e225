"""What benchmark tables call models and formats, in the twin's words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

from twin.spec.base import Dtype
from twin.spec.cluster import GpuSpec
from twin.spec.errors import SpecError
from twin.spec.load import load_model, presets
from twin.spec.model import ModelSpec
from twin.spec.plan import Precision

# releases that share a shape with a preset
_SAME_SHAPE = (
    (r"deepseek-r1|deepseek-v3-0324|deepseek-v3\.1|deepseek-v3$", "deepseek-v3"),
    (r"deepseek-v3\.2", "deepseek-v3.2"),
    (r"kimi-k2\.(5|6)", "kimi-k2.5"),
    (r"kimi-k2", "kimi-k2"),
    (r"llama-3(\.[0-9])?-70b", "llama-3.1-70b"),
    (r"llama-3(\.[0-9])?-8b", "llama-3.1-8b"),
    (r"minimax-m2(\.[0-9])?", "minimax-m2.5"),
    (r"glm-5(\.[0-9])?", "glm-5"),
    (r"glm-4\.[567]-air", "glm-4.5-air"),
    (r"glm-4\.[567]", "glm-4.5"),
    (r"mixtral-8x7b", "mixtral-8x7b"),
    (r"mixtral-8x22b", "mixtral-8x22b"),
    (r"llama-4-maverick", "llama-4-maverick"),
    (r"llama-4-scout", "llama-4-scout"),
)
_SUFFIX = re.compile(r"-(fp8|nvfp4|fp4|int4|w4a16|bf16|instruct|thinking|base|chat|it|v2|hf|[0-9]{4})$")

_IN_NAME = re.compile(r"[-_](nvfp4|mxfp4|fp8|fp4|int4|w4a16|bf16)(?=[-_.]|$)")

# formats as tables of quantisation modes name them; None is the checkpoint's own
_FORMATS: dict[str, Dtype | None] = {
    "": None, "none": None, "auto": None, "bf16": "bf16", "float16": "bf16", "fp16": "bf16", "fp8": "fp8", "fp8_static": "fp8",
    "fp8_block": "fp8_block", "nvfp4": "fp4", "fp4": "fp4", "int4": "int4", "int4_wo": "int4", "w4afp8": "int4",
    "mxfp4": "mxfp4", "w4a16_mxfp4": "mxfp4", "w4a8_mxfp4_mxfp8": "mxfp4", "fp32": "fp32"}


@lru_cache(maxsize=256)
def model_of(path: str, base: Path = Path()) -> ModelSpec:
    """The model of a hub path, a preset or a file of its own. Raises SpecError naming the presets it is not like."""
    name = path.rstrip("/").rsplit("/", 1)[-1].lower().removeprefix("meta-")
    names = presets("models")
    while True:
        if name in names:
            return load_model(name)
        shorter = _SUFFIX.sub("", name)
        if shorter == name:
            break
        name = shorter
    for pattern, preset in _SAME_SHAPE:
        if re.match(pattern, name) and preset in names:
            return load_model(preset)
    given = base / path if path and len(path) < 1024 and "\x00" not in path else None
    try:
        there = given is not None and (given.is_file() or given.is_dir())
    except OSError:  # a name longer than any file's
        there = False
    if there and given is not None:
        return load_model(given)
    raise SpecError(f"{path[:80]!r} is no preset and no file", hint="put a Hugging Face config.json there: " + ", ".join(names))


def precision_of(texts: Mapping[str, str], model: ModelSpec) -> Precision:
    """Formats of a row. What deployments of those names really hold:

    "fp8" of a mixture of experts is block-scaled, as its publisher released it (dense models: a scale a tensor). "nvfp4" and
    "int4" of a mixture of experts hold narrow experts and bf16 attention. gpt-oss stores mxfp4 experts whatever the
    table calls them.
    """
    overall = texts.get("precision", "").lower() or _named_format(texts.get("model_path", ""))
    dense = _format(texts.get("gemm_quant_mode", "") or overall, model.weight_dtype)
    experts = _format(texts.get("moe_quant_mode", "") or overall, model.expert_dtype)
    if model.moe is None:
        return Precision(weights=dense, experts=dense, dispatch="bf16")
    if model.expert_dtype == "mxfp4":
        return Precision(weights=model.weight_dtype, experts="mxfp4", dispatch="bf16")
    if dense == "fp8":
        dense = "fp8_block"
    if experts == "fp8":
        experts = "fp8_block"
    if experts in ("fp4", "int4", "mxfp4"):
        dense = "bf16" if dense == experts else dense
    return Precision(weights=dense, experts=experts, dispatch="fp8" if experts in ("fp8_block", "fp4") else "bf16")


def _named_format(path: str) -> str:
    """The format that a checkpoint's name ends in or holds, empty where it says none."""
    found = _IN_NAME.search(path.rstrip("/").rsplit("/", 1)[-1].lower())
    return {"w4a16": "int4"}.get(found.group(1), found.group(1)) if found else ""


def _format(text: str, native: Dtype) -> Dtype:
    name = text.strip().lower()
    if name not in _FORMATS:
        raise SpecError(f"format {text[:40]!r} is not known", expected=", ".join(n for n in _FORMATS if n))
    return _FORMATS[name] or native


def kv_dtype(engine: str, precision: Precision, gpu: GpuSpec, model: ModelSpec) -> Literal["bf16", "fp8"]:
    """The cache's format where a row does not say: fp8 with quantised weights under TensorRT-LLM and on Blackwell, as
    recipes set it; bf16 elsewhere."""
    quantised = precision.experts not in ("bf16", "fp32", "int4") if model.moe is not None else precision.weights != "bf16"
    blackwell = gpu.fp4_flop_per_s is not None
    if not quantised or (precision.experts == "mxfp4" and not blackwell):
        return "bf16"
    return "fp8" if engine == "trtllm" or blackwell else "bf16"
