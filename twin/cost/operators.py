"""The work of each operator on one rank: one function an operator, one arithmetic line a term.

A dense product of t tokens with a matrix of `w` elements costs 2 t w flops and moves the matrix once and its inputs
and outputs once a token. TP divides heads and inner widths; KV heads are replicated when TP exceeds them.
Names: h hidden, n query heads on this rank, kv KV heads on this rank, a bytes of an activation, w bytes of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from twin.cost.roofline import Op, activation_bytes, bytes_of
from twin.spec.model import ModelSpec
from twin.spec.plan import Precision


@dataclass(frozen=True)
class Slice:
    """What one rank holds of a model: formats, and TP of the attention and dense parts."""

    model: ModelSpec
    precision: Precision
    tp: int

    @property
    def a(self) -> float:
        return activation_bytes(self.precision.weights)

    @property
    def w(self) -> float:
        return bytes_of(self.precision.weights)

    @property
    def kv_bytes(self) -> float:
        return bytes_of(self.precision.kv)

    @property
    def core_dtype(self) -> str:
        """Attention scores are computed in bf16 (fp32 for fp32 models), also over an fp8 cache."""
        return "fp32" if self.precision.weights == "fp32" else "bf16"


def gemm(key: str, s: Slice, k: float, n: float, layers: int, *, feature: str = "tokens", gate: str = "any") -> Op:
    """A dense product of one row a unit of `feature` with a k x n matrix."""
    return Op(key, "gemm", s.precision.weights, flops={feature: 2 * k * n}, bytes={gate: k * n * s.w, feature: (k + n) * s.a},
              gate=gate, layers=layers, matrix=(k, n))


def attention_ops(s: Slice) -> list[Op]:
    """Operators of all softmax and linear attention layers of one rank."""
    model = s.model
    ops: list[Op] = []
    for kind in ("full", "sliding"):
        layers = model.layer_attention.count(kind)
        if layers:
            ops += _mla(s, layers) if model.attention.kind == "mla" else _gqa(s, layers, window=kind == "sliding")
            if model.attention.index_heads:
                ops += _indexer(s, layers)
    linear = model.layer_attention.count("linear")
    return ops + (_linear(s, linear) if linear else [])


def _gqa(s: Slice, layers: int, *, window: bool) -> list[Op]:
    a, h = s.model.attention, s.model.hidden
    n, kv = a.heads / s.tp, -(-a.kv_heads // s.tp)
    q_width = n * a.head_dim * (2 if a.output_gate else 1)
    kv_width = kv * (a.head_dim + a.v_head_dim)
    seen = "_window" if window else "_sparse" if a.index_top_k else ""
    per_pair = 2 * n * (a.head_dim + a.v_head_dim)
    per_query = n * (a.head_dim + a.v_head_dim) * s.a
    stored = kv_width * s.kv_bytes
    qkv = gemm("attention/projections", s, h, q_width + kv_width, layers)
    out = gemm("attention/projections", s, n * a.v_head_dim, h, layers)
    decode = Op("attention/kv_read", "attention_decode", s.core_dtype, flops={f"decode_pairs{seen}": per_pair},
                bytes={f"decode_kv{seen}": stored, "decode_tokens": per_query}, gate="any_decode", layers=layers,
                window=a.sliding_window if window else None)
    prefill_kv = "prefill_kv_window" if window else "prefill_kv"
    prefill = Op("attention/prefill", "attention_prefill", s.core_dtype, flops={f"prefill_pairs{seen}": per_pair},
                 bytes={prefill_kv: stored, "prefill_tokens": per_query}, gate="any_prefill", layers=layers,
                 window=a.sliding_window if window else None)
    return [qkv, decode, prefill, out, _kv_write(s, layers, kv_width)]


def _kv_write(s: Slice, layers: int, width: float) -> Op:
    return Op("attention/kv_write", "elementwise", s.core_dtype, bytes={"tokens": width * (s.a + s.kv_bytes)}, layers=layers)


def _mla(s: Slice, layers: int) -> list[Op]:
    """Latent attention: absorbed in decode (scores on the latent), naive in prefill (latent expanded to keys and values)."""
    a, h = s.model.attention, s.model.hidden
    assert a.kv_lora_rank and a.qk_nope_head_dim and a.qk_rope_head_dim
    n, rank, nope, rope, v = a.heads / s.tp, a.kv_lora_rank, a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim
    q_in = a.q_lora_rank or h
    down = (a.q_lora_rank or 0) + rank + rope
    up = n * (nope + rope)
    seen = "_sparse" if a.index_top_k else ""
    absorb = n * rank * (nope + v)
    ops = [
        gemm("attention/projections", s, h, down, layers),
        gemm("attention/projections", s, q_in, up, layers),
        gemm("attention/projections", s, n * v, h, layers),
        # W_UK on queries and W_UV on outputs, kept in bf16 by every engine we know
        Op("attention/absorb", "bmm", s.core_dtype, flops={"decode_tokens": 2 * absorb},
           bytes={"any_decode": absorb * s.a, "decode_tokens": n * (nope + v + 2 * rank) * s.a}, gate="any_decode",
           launches=2, layers=layers),
        Op("attention/kv_read", "mla_decode", s.core_dtype, flops={f"decode_pairs{seen}": 2 * n * (2 * rank + rope)},
           bytes={f"decode_kv{seen}": (rank + rope) * s.kv_bytes, "decode_tokens": n * (2 * rank + rope) * s.a},
           gate="any_decode", layers=layers),
        _kv_write(s, layers, rank + rope),
    ]
    if a.index_top_k:  # sparse prefill scores latents, as decode does
        return [*ops, Op("attention/prefill", "attention_prefill", s.core_dtype,
                         flops={"prefill_pairs_sparse": 2 * n * (2 * rank + rope), "prefill_tokens": 2 * absorb},
                         bytes={"prefill_kv": (rank + rope) * s.kv_bytes, "prefill_tokens": n * (2 * rank + rope) * s.a},
                         gate="any_prefill", layers=layers)]
    expand = gemm("attention/kv_up", s, rank, n * (nope + v), layers, feature="prefill_kv", gate="any_prefill")
    core = Op("attention/prefill", "mla_prefill", s.core_dtype, flops={"prefill_pairs": 2 * n * (nope + rope + v)},
              bytes={"prefill_kv": n * (nope + rope + v) * s.a, "prefill_tokens": n * (nope + rope + v) * s.a},
              gate="any_prefill", layers=layers)
    return [*ops, expand, core]


def _indexer(s: Slice, layers: int) -> list[Op]:
    """Lightning indexer of sparse attention: every query scores every cached key with small fp8 heads, then top-k."""
    a, h = s.model.attention, s.model.hidden
    assert a.index_heads and a.index_head_dim
    width = a.index_heads * a.index_head_dim
    per_pair = 2 * width + 2 * a.index_heads
    return [
        gemm("attention/indexer", s, a.q_lora_rank or h, width, layers),
        gemm("attention/indexer", s, h, a.index_head_dim + a.index_heads, layers),
        Op("attention/indexer", "indexer", "fp8", flops={"decode_pairs": per_pair, "prefill_pairs": per_pair},
           bytes={"decode_kv": float(a.index_head_dim), "prefill_kv": float(a.index_head_dim),
                  "decode_pairs": 4.0, "prefill_pairs": 4.0},  # scores written and read in fp32
           # norm, rotary, Hadamard transform and quantisation of query and key, head weights, scores, top-k, block numbers
           launches=12, layers=layers),
    ]


def _linear(s: Slice, layers: int) -> list[Op]:
    """Gated delta-rule layers: a state of key_dim x value_dim a value head, read and written once a sequence."""
    lin, h = s.model.linear_attention, s.model.hidden
    assert lin is not None
    k, v = lin.key_heads * lin.key_dim / s.tp, lin.value_heads * lin.value_dim / s.tp
    state = lin.value_heads / s.tp * lin.key_dim * lin.value_dim
    width = 2 * k + 2 * v + 2 * lin.value_heads / s.tp
    chunk = 64  # tokens that the chunked scan multiplies at once
    step = 6 * state  # decay, k S, outer product, q S
    scan = step + 2 * chunk * lin.value_heads / s.tp * (lin.key_dim + lin.value_dim)
    return [
        gemm("attention/projections", s, h, width, layers),
        gemm("attention/projections", s, v, h, layers),
        Op("attention/state", "elementwise", s.core_dtype, flops={"decode_tokens": step},
           bytes={"decode_seqs": 2 * state * 4.0, "decode_tokens": (2 * k + 2 * v) * s.a}, gate="any_decode", layers=layers),
        Op("attention/scan", "attention_prefill", s.core_dtype, flops={"prefill_tokens": scan},
           bytes={"prefill_tokens": (2 * k + 2 * v) * s.a + 2 * state * 4.0 / chunk}, gate="any_prefill", launches=3,
           layers=layers),
        Op("attention/conv", "elementwise", s.core_dtype, bytes={"tokens": 2 * (2 * k + v) * s.a}, layers=layers),
    ]


def ffn_ops(s: Slice) -> list[Op]:
    """Operators of the FFN layers that work on a rank's own tokens: dense FFN, gate, shared experts."""
    model = s.model
    h, ops = model.hidden, []
    if model.dense_layers:
        inner = model.dense_intermediate / s.tp
        ops += _gated_ffn("ffn/dense", s, inner, model.dense_layers)
    if model.moe is not None and model.moe_layers:
        layers = model.moe_layers
        # the router multiplies in fp32 or bf16 whatever the weights' format
        ops.append(Op("moe/gate", "gate", s.core_dtype, flops={"tokens": 2.0 * h * model.moe.experts},
                      bytes={"any": h * model.moe.experts * s.a, "tokens": h * s.a + model.moe.experts * 4.0 * 2},
                      launches=2, layers=layers))
        if model.moe.shared_intermediate:
            ops += _gated_ffn("moe/shared", s, model.moe.shared_intermediate / s.tp, layers)
    return ops


def _gated_ffn(key: str, s: Slice, inner: float, layers: int) -> list[Op]:
    h = s.model.hidden
    return [
        gemm(key, s, h, 2 * inner, layers),
        Op(key, "elementwise", s.core_dtype, bytes={"tokens": 3 * inner * s.a}, layers=layers),
        gemm(key, s, inner, h, layers),
    ]


def other_ops(s: Slice) -> list[Op]:
    """Norms with their residuals, rotary embedding, input quantisation, embedding, LM head and sampling."""
    model, h = s.model, s.model.hidden
    vocab = model.vocab / s.tp
    quantised = s.precision.weights not in ("bf16", "fp32")
    widths = 2 * 4.0 * h * s.a  # two norms a layer: hidden and residual read and written
    casts = 2 * h * (s.a + s.w) if quantised else 0.0
    return [
        Op("norm", "elementwise", s.core_dtype, bytes={"tokens": widths + casts}, launches=4 if quantised else 2,
           layers=model.layers),
        Op("embedding", "elementwise", s.core_dtype, bytes={"tokens": 2 * h * s.a}),
        Op("head", "gemm", s.core_dtype, flops={"rows": 2 * vocab * h},
           bytes={"any": vocab * h * s.a, "rows": (h + vocab) * s.a}, matrix=(h, vocab)),
        Op("sampling", "elementwise", s.core_dtype, bytes={"rows": 3 * vocab * 4.0}, launches=3),
    ]


def copies(s: Slice) -> list[Op]:
    """What a rank that runs alone does in place of its exchanges: rows gathered as they would arrive (as many as its own
    tokens send, none for padding), and summed as they would return, one for each choice."""
    model = s.model
    if model.moe is None or not model.moe_layers:
        return []
    k, row = model.moe.top_k, model.hidden * s.a
    return [Op(f"moe/{name}/copy", "elementwise", s.core_dtype, bytes={"tokens": rows * row, "padding": -rows * row},
               layers=model.moe_layers) for name, rows in (("dispatch", 2 * k), ("combine", k + 1))]


def joined(s: Slice) -> list[Op]:
    """The sum of routed and shared experts' rows, in an engine that has a kernel of its own for it."""
    model = s.model
    if model.moe is None or not model.moe.shared_intermediate or not model.moe_layers:
        return []
    return [Op("moe/sum", "elementwise", s.core_dtype, bytes={"tokens": 3 * model.hidden * s.a}, layers=model.moe_layers)]


def rank_ops(s: Slice) -> list[Op]:
    """All operators that a rank runs on its own tokens; grouped experts and communication are counted apart."""
    return [*attention_ops(s), *ffn_ops(s), *other_ops(s)]
