"""The least work an operator can do, and so the least time it can take: flops, HBM bytes and link bytes.

One function an operator, each arithmetic line a term. They serve as the yardstick against which measured tables are
read (`interpolate.py`): what matters is that both ends of an interpolation are measured with the same stick.

Legend for the names in a call: `m, n, k` GEMM sizes; `batch` sequences; `new_tokens` and `past_tokens` of each
sequence; `context` KV length in decode; `window` 0 or NO_WINDOW where attention sees everything; `tokens` are
counted over the whole EP group for `moe` and per rank for `dispatch` and `combine`; `bytes` is the size as
nccl-tests counts it (the whole buffer). All values may be numpy arrays and broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from twin.spec.base import BYTES_PER_ELEMENT

Values = Mapping[str, Any]
Attrs = Mapping[str, str]
NO_WINDOW = 1 << 20  # longer than any measured sequence: the same as no window

# Bytes of one weight, scales included, are the spec's; `mxfp4_mxfp8` is mxfp4 weights times mxfp8 inputs.
_WEIGHT_BYTES = {**BYTES_PER_ELEMENT, "mxfp4_mxfp8": BYTES_PER_ELEMENT["mxfp4"], "fp16": 2.0}
_INPUT_BYTES = {"fp8": 1.0, "fp8_block": 1.0, "fp4": BYTES_PER_ELEMENT["fp4"], "mxfp4_mxfp8": 1.0}
_RATE = {"fp8": "fp8", "fp8_block": "fp8", "fp4": "fp4", "mxfp4_mxfp8": "fp8"}  # others multiply in bf16
_SKEWED_TOUCH = 0.75  # popular experts take what others lack: measured tables touch up to a quarter fewer than uniform

# DeepSeek-V3's latent attention, the only shape that the MLA tables were measured on (config.json of the model).
_MLA_HIDDEN, _MLA_Q_RANK, _MLA_KV_RANK, _MLA_NOPE, _MLA_ROPE, _MLA_V = 7168, 1536, 512, 128, 64, 128


@dataclass(frozen=True)
class Work:
    """What one rank must do: `flops` at tensor-core rate `rate`, bytes over HBM, bytes over NVLink and over the NIC."""

    flops: Any = 0.0
    hbm_bytes: Any = 0.0
    rate: str = "bf16"
    link_bytes: Any = 0.0
    nic_bytes: Any = 0.0


def weight_bytes(dtype: str) -> float:
    """Bytes of one stored weight (or KV element) of `dtype`, scales included."""
    return _WEIGHT_BYTES.get(dtype, 2.0)


def _gemm(v: Values, a: Attrs) -> Work:
    dtype = a.get("dtype", "bf16")
    read = v["m"] * v["k"] * _INPUT_BYTES.get(dtype, 2.0) + v["k"] * v["n"] * weight_bytes(dtype)
    return Work(2.0 * v["m"] * v["n"] * v["k"], read + 2.0 * v["m"] * v["n"], _RATE.get(dtype, "bf16"))


def causal_pairs(new: Any, past: Any, window: Any) -> Any:
    """Query-key pairs of one causal sequence: sum over i in 1..new of min(past + i, window)."""
    window = np.where(np.asarray(window) == 0, NO_WINDOW, window)
    growing = np.clip(window - past, 0, new)  # queries that still see everything before them
    return growing * past + growing * (growing + 1.0) / 2 + (new - growing) * window


def equivalent_tokens(new: Any, past: Any, window: Any = 0) -> Any:
    """The length of a sequence without past that has as many query-key pairs as (`new`, `past`).

    The attention tables have no past: this is how a chunk of a prefill finds its row.
    """
    window = np.where(np.asarray(window) == 0, NO_WINDOW, window)
    pairs = causal_pairs(new, past, window)
    below = (np.sqrt(8.0 * pairs + 1.0) - 1.0) / 2
    return np.where(below <= window, below, pairs / window + (window - 1.0) / 2)


def _attention_prefill(v: Values, a: Attrs) -> Work:
    past, window = v.get("past_tokens", 0), v.get("window", 0)
    pairs = causal_pairs(v["new_tokens"], past, window)
    rate = "fp8" if a.get("dtype") == "fp8" else "bf16"
    query = 2.0 * v["new_tokens"] * v["heads"] * v["head_dim"] * 2
    keys = 2.0 * (v["new_tokens"] + past) * v["kv_heads"] * v["head_dim"] * weight_bytes(a.get("kv_dtype", "bf16"))
    return Work(4.0 * v["batch"] * v["heads"] * v["head_dim"] * pairs, v["batch"] * (query + keys), rate)


def _attention_decode(v: Values, a: Attrs) -> Work:
    window = np.asarray(v.get("window", 0))
    seen = np.minimum(v["context"], np.where(window == 0, NO_WINDOW, window))
    keys = 2.0 * seen * v["kv_heads"] * v["head_dim"] * weight_bytes(a.get("kv_dtype", "bf16"))
    query = 4.0 * v["heads"] * v["head_dim"]
    return Work(4.0 * v["batch"] * v["heads"] * v["head_dim"] * seen, v["batch"] * (keys + query))


def _projections(tokens: Any, heads: Any, a: Attrs) -> tuple[Any, Any]:
    """flops and weight bytes of the projections that a `scope: module` row of the MLA tables includes."""
    weights = (_MLA_HIDDEN * (_MLA_Q_RANK + _MLA_KV_RANK + _MLA_ROPE)
               + heads * (_MLA_Q_RANK * (_MLA_NOPE + _MLA_ROPE) + _MLA_KV_RANK * (_MLA_NOPE + _MLA_V)
                          + _MLA_V * _MLA_HIDDEN))
    moved = weights * weight_bytes(a.get("gemm_dtype", "bf16")) + 4.0 * tokens * _MLA_HIDDEN
    return 2.0 * tokens * weights, moved


def _mla(flops: Any, moved: Any, tokens: Any, heads: Any, a: Attrs) -> Work:
    if a.get("scope") != "module":
        return Work(flops, moved)
    more_flops, more_bytes = _projections(tokens, heads, a)
    if _RATE.get(a.get("gemm_dtype", ""), "bf16") != "bf16":
        more_flops = more_flops / 2  # fp8 runs at twice the rate that `flops` is counted at; fp4's more is ignored
    return Work(flops + more_flops, moved + more_bytes)


def _mla_prefill(v: Values, a: Attrs) -> Work:
    pairs = causal_pairs(v["new_tokens"], v.get("past_tokens", 0), 0)
    per_pair = _MLA_NOPE + _MLA_ROPE + _MLA_V
    moved = 2.0 * v["batch"] * v["new_tokens"] * v["heads"] * 2 * per_pair
    return _mla(2.0 * v["batch"] * v["heads"] * pairs * per_pair, moved, v["batch"] * v["new_tokens"], v["heads"], a)


def _mla_decode(v: Values, a: Attrs) -> Work:
    latent = _MLA_KV_RANK + _MLA_ROPE
    keys = v["context"] * latent * weight_bytes(a.get("kv_dtype", "bf16"))
    query = 2.0 * v["heads"] * (latent + _MLA_KV_RANK)
    flops = 2.0 * v["batch"] * v["heads"] * v["context"] * (latent + _MLA_KV_RANK)
    return _mla(flops, v["batch"] * (keys + query), v["batch"], v["heads"], a)


def _mla_bmm(v: Values, a: Attrs) -> Work:
    dtype = a.get("dtype", "bf16")
    weights = v["heads"] * _MLA_NOPE * _MLA_KV_RANK
    moved = weights * weight_bytes(dtype) + 2.0 * v["tokens"] * v["heads"] * (_MLA_NOPE + _MLA_KV_RANK)
    return Work(2.0 * v["tokens"] * weights, moved, _RATE.get(dtype, "bf16"))


def _moe(v: Values, a: Attrs) -> Work:
    dtype = a.get("dtype", "bf16")
    matrices = 2 if a.get("gated") == "no" else 3
    pairs = v["tokens"] * v["top_k"] / v["moe_ep"]
    local = np.maximum(v["experts"] / v["moe_ep"], 1.0)
    touched = local * -np.expm1(-pairs / local)  # experts that got a token, routing at random
    if a.get("distribution", "balanced") not in ("balanced", "uniform"):
        touched = np.maximum(touched * _SKEWED_TOUCH, np.minimum(touched, 1.0))
    inner = v["intermediate"] / v["moe_tp"]
    weights = touched * matrices * v["hidden"] * inner * weight_bytes(dtype)
    moved = weights + pairs * v["hidden"] * (_INPUT_BYTES.get(dtype, 2.0) + 2.0)
    return Work(2.0 * pairs * matrices * v["hidden"] * inner, moved, _RATE.get(dtype, "bf16"))


def _norm(v: Values, _: Attrs) -> Work:
    """Addition to the residual stream and RMS norm: two rows read, two written."""
    return Work(hbm_bytes=8.0 * v["tokens"] * v["width"])


def _rope(v: Values, _: Attrs) -> Work:
    """Norms of queries and keys, rotary embedding, and keys and values into the cache."""
    row = (v["heads"] + 2.0 * v["kv_heads"]) * v["head_dim"]
    return Work(hbm_bytes=v["tokens"] * (4.0 * row + 4.0 * v["kv_heads"] * v["head_dim"]))


def _latent(v: Values, _: Attrs) -> Work:
    """Latent attention: rotary embedding of every head's queries in place, norm of the latent, and both into the cache."""
    return Work(hbm_bytes=4.0 * v["tokens"] * (v["heads"] * _MLA_ROPE + _MLA_KV_RANK + _MLA_ROPE))


def _quant(v: Values, _: Attrs) -> Work:
    return Work(hbm_bytes=3.0 * v["tokens"] * v["width"])


def _silu(v: Values, _: Attrs) -> Work:
    return Work(hbm_bytes=6.0 * v["tokens"] * v["width"])


def _gate(v: Values, _: Attrs) -> Work:
    """Top-k of fp32 scores that lie in memory."""
    return Work(hbm_bytes=v["tokens"] * (4.0 * v["experts"] + 8.0 * v["top_k"]))


def _router(v: Values, _: Attrs) -> Work:
    """Scores of tokens in half precision, and their top-k."""
    read = 2.0 * v["hidden"] * (v["tokens"] + v["experts"])
    return Work(flops=2.0 * v["tokens"] * v["hidden"] * v["experts"], hbm_bytes=read + 8.0 * v["tokens"] * v["top_k"])


def _replica_split(v: Values, _: Attrs) -> Work:
    """A slot for each of the tokens' choices, of experts that have several."""
    return Work(hbm_bytes=12.0 * v["tokens"] * v["top_k"])


def _collective(factor: float) -> Callable[[Values, Attrs], Work]:
    def work(v: Values, _: Attrs) -> Work:
        return Work(link_bytes=factor * v["bytes"] * (v["gpus"] - 1.0) / v["gpus"])
    return work


def _exchange(v: Values, a: Attrs) -> Work:
    """dispatch and combine, per rank: one copy a rank inside the node, one copy a node over the NIC (normal mode).

    In low-latency mode every one of the top-k copies travels on its own.
    """
    ranks, nodes = v["ep"], v["nodes"]
    token_bytes = v["tokens"] * v["hidden"] * _INPUT_BYTES.get(a.get("dtype", ""), 2.0)
    reached = ranks * -np.expm1(v["top_k"] * np.log1p(-1.0 / ranks))
    copies = v["top_k"] if a.get("mode") == "low_latency" else reached
    nodes_reached = nodes * (1.0 - (1.0 - 1.0 / nodes) ** v["top_k"])
    remote = v["top_k"] if a.get("mode") == "low_latency" else nodes_reached
    return Work(link_bytes=token_bytes * copies * (1.0 / nodes) * (1.0 - nodes / ranks),
                nic_bytes=token_bytes * remote * (1.0 - 1.0 / nodes))


_WORK: dict[str, Callable[[Values, Attrs], Work]] = {
    "gemm": _gemm, "attention_prefill": _attention_prefill, "attention_decode": _attention_decode,
    "mla_prefill": _mla_prefill, "mla_decode": _mla_decode, "mla_bmm": _mla_bmm, "moe": _moe,
    "all_reduce": _collective(2.0), "all_gather": _collective(1.0), "reduce_scatter": _collective(1.0),
    "all_to_all": _collective(1.0), "dispatch": _exchange, "combine": _exchange,
    "norm": _norm, "rope": _rope, "latent": _latent, "quant": _quant, "silu": _silu, "gate": _gate,
    "router": _router, "replica_split": _replica_split,
}
OPERATORS = tuple(_WORK)
ENGINE_KERNELS = ("norm", "rope", "latent", "quant", "silu", "gate", "router", "replica_split")
"""Small kernels that every engine fuses its own way: what one engine's take says nothing of another's."""


def work_of(operator: str, values: Values, attrs: Attrs) -> Work:
    """The least work of one call. Raises KeyError for an operator or a value that is missing."""
    return _WORK[operator](values, attrs)
