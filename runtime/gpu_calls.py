"""One operator at one shape as calls to time: the engine's own kernels on random inputs, several sets of them.

Sets rotate so that together they exceed the L2 cache; where one set does, there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from runtime.batch import Segment, make_step
from runtime.kernels.attention_gqa import gqa_decode
from runtime.kernels.attention_mla import mla_decode
from runtime.kernels.fused import add_rmsnorm, quant_fp8_rows, silu_mul
from runtime.kernels.gate import gate_topk, router_logits
from runtime.kernels.moe_layer import moe_layer
from runtime.kernels.rope import mla_rope_norm_cache, rope_norm_cache
from runtime.ops import Fp8Weight
from runtime.products import bucket_of, cut_product, narrow, torch_product
from runtime.quantise import quantise_rows
from runtime.replicas import Replicas
from runtime.triton_ops import TritonOps
from runtime.tune import chains, graph_seconds
from runtime.tune_products import decide, process_table
from twin.policy.placement import place_global

Call = Callable[[], object]
Values = dict[str, int]
_BLOCK = 64
_LATENT, _ROPE, _NOPE, _V = 512, 64, 128, 128
"""DeepSeek's latent attention, the one shape that profiles know."""
_SETS_BYTES = 150e6  # two and a half times an H200's L2


def calls_of(operator: str, attrs: dict[str, str], v: Values) -> list[Call]:
    """Calls of an operator of a profile. Raises KeyError for one that the engine does not have."""
    return _MAKERS[operator](attrs, v)


def _gemm(attrs: dict[str, str], v: Values) -> list[Call]:
    m, n, k = v["m"], v["n"], v["k"]
    sets = _sets(2 * (n * k + m * k))
    if attrs["dtype"] == "fp8":
        return _as_served(m, n, k, _sets(n * k + m * k))
    pairs = [(_randn(m, k), _randn(n, k)) for _ in range(sets)]
    return [lambda x=x, w=w: F.linear(x, w) for x, w in pairs]


def _as_served(m: int, n: int, k: int, sets: int) -> list[Call]:
    """Row-wise scaled products of rows in fp8 with fp8 weights, by the kernel that an engine would choose at its start."""
    weights = [Fp8Weight(*quant_fp8_rows(_randn(n, k))) for _ in range(sets)]
    share = None
    if (bucket := bucket_of(m)) is not None:
        table = process_table()
        if (bucket, n, k) not in table.seconds:
            decide(table, (bucket, n, k), weights[:16], graph_seconds, pdl=chains())
        share = table.find(m, weights[0])
    x = narrow(_randn(m, k))
    if share is not None:
        return [lambda w=w: cut_product(x, w, share) for w in weights]
    return [lambda w=w: torch_product(x, w) for w in weights]


def fp8_product(m: int, n: int, k: int) -> Call:
    """A row-wise scaled product of fp8 with fp8, inputs quantised before."""
    (a, a_scale), (b, b_scale) = quant_fp8_rows(_randn(m, k)), quant_fp8_rows(_randn(n, k))
    return lambda: torch._scaled_mm(a, b.t(), scale_a=a_scale[:, None], scale_b=b_scale[None], out_dtype=torch.bfloat16,
                                    use_fast_accum=True)


def _moe(attrs: dict[str, str], v: Values) -> list[Call]:
    """One rank's experts with what `tokens` of the whole EP group send them: a row for each (token, expert). Routes rotate,
    and so do the weights of a rank that holds few experts: each set reads what the sets before it pushed out of L2."""
    local, choices, width = v["experts"] // v["moe_ep"], v["top_k"], v["intermediate"] // v["moe_tp"]
    each = 3 * v["hidden"] * width * (1 if attrs["dtype"] == "fp8" else 2)
    copies = _sets(local * each)
    weights = _weights(attrs["dtype"], copies * local, v["hidden"], width)
    calls = []
    # four draws at least: whether an expert's rows fill one tile more is chance
    for seed in range(max(4, _sets(min(local, max(1, v["tokens"] * choices // v["moe_ep"])) * each))):
        ids = _route(v["tokens"], v["experts"], choices, attrs["distribution"], seed)
        if v["moe_ep"] > 1:
            ids = ids[ids < local][:, None]
        if not ids.numel():
            ids = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
        first = seed % copies * local
        w13, w2, s13, s2 = (None if w is None else w[first:first + local] for w in weights)
        x, gate, ids = _randn(len(ids), v["hidden"]), torch.rand(ids.shape, device="cuda"), ids.contiguous()
        calls.append(lambda x=x, gate=gate, ids=ids, w13=w13, w2=w2, s13=s13, s2=s2: moe_layer(
            x, w13, w2, gate, ids, w13_scale_E2I=s13, w2_scale_EH=s2))
    return calls


def _route(tokens: int, experts: int, choices: int, distribution: str, seed: int) -> torch.Tensor:
    """int32 [T, K]. balanced: uniform at random. power_law_1.01: popularities whose density falls as its 1.01st power
    between a tenth of a token and 0.8 of all: nearly even on a logarithmic scale."""
    stream = torch.Generator("cuda").manual_seed(seed)
    odds = torch.zeros(experts, device="cuda")
    if distribution != "balanced":
        odds = torch.rand(experts, generator=stream, device="cuda") * math.log(max(8.0 * tokens, 2.0))
    noise = torch.rand(tokens, experts, generator=stream, device="cuda").clamp(1e-12, 1 - 1e-7)
    return (odds - noise.log().neg().log()).topk(choices, -1)[1].int()


@lru_cache(maxsize=1)
def _weights(dtype: str, experts: int, hidden: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None,
                                                                        torch.Tensor | None]:
    """Experts of one rank, with the scales of fp8 ones."""
    w13 = torch.empty(experts, 2 * width, hidden, dtype=torch.bfloat16, device="cuda").normal_(0, hidden**-0.5)
    w2 = torch.empty(experts, hidden, width, dtype=torch.bfloat16, device="cuda").normal_(0, width**-0.5)
    if dtype == "bf16":
        return w13, w2, None, None
    (n13, s13), (n2, s2) = quantise_rows(w13), quantise_rows(w2)
    return n13, n2, s13, s2


def _attention_decode(attrs: dict[str, str], v: Values) -> list[Call]:
    pages = -(-v["context"] // _BLOCK)
    shape = (v["batch"] * pages, 2, _BLOCK, v["kv_heads"], v["head_dim"])
    lens = torch.full((v["batch"],), v["context"], dtype=torch.int32, device="cuda")
    calls = []
    for _ in range(_sets(4 * math.prod(shape) // 2)):
        cache, q = _randn(*shape), _randn(v["batch"], v["heads"], v["head_dim"])
        table = torch.randperm(shape[0], device="cuda").int().view(v["batch"], -1).contiguous()
        calls.append(lambda q=q, cache=cache, table=table: gqa_decode(q, cache, table, lens, scale=0.1, max_context=v["context"]))
    return calls


def _attention_prefill(attrs: dict[str, str], v: Values) -> list[Call]:
    count, length = v["batch"], v["new_tokens"]
    q, k, x = (_randn(count * length, heads, v["head_dim"]) for heads in (v["heads"], v["kv_heads"], v["kv_heads"]))
    step = make_step([Segment([0] * length, 0, range(-(-length // _BLOCK)), True)] * count, _BLOCK, "cuda")
    cache = torch.empty(0, 2, _BLOCK, v["kv_heads"], v["head_dim"], dtype=torch.bfloat16, device="cuda")
    ops = TritonOps()
    return [lambda: ops.prefill_attention(q, cache, step, scale=0.1, window=None, sinks_Q=None, fresh=(k, x))]


def _mla_decode(attrs: dict[str, str], v: Values) -> list[Call]:
    pages = -(-v["context"] // _BLOCK)
    shape = (v["batch"] * pages, _BLOCK, _LATENT + _ROPE)
    lens = torch.full((v["batch"],), v["context"], dtype=torch.int32, device="cuda")
    calls = []
    for _ in range(_sets(2 * math.prod(shape))):
        cache, q = _randn(*shape), _randn(v["batch"], v["heads"], _LATENT + _ROPE)
        table = torch.randperm(shape[0], device="cuda").int().view(v["batch"], -1).contiguous()
        calls.append(lambda q=q, cache=cache, table=table: mla_decode(q, cache, table, lens, scale=0.1, latent=_LATENT,
                                                                      max_context=v["context"]))
    return calls


def _mla_bmm(attrs: dict[str, str], v: Values) -> list[Call]:
    """What decode runs before and behind its attention over latents (`runtime.model.attention.Mla`). pre: queries times the
    heads' key projections, their rotary columns copied beside; post: attended latents times the value projections."""
    tokens, heads = v["tokens"], v["heads"]
    q, y = _randn(tokens, heads, _LATENT + _ROPE), _randn(tokens, heads, _V)
    sets = [(_randn(heads, _NOPE + _V, _LATENT), _randn(tokens, heads, _NOPE + _ROPE), _randn(tokens, heads, _LATENT))
            for _ in range(_sets(2 * heads * (_NOPE * _LATENT + tokens * (_NOPE + _LATENT))))]

    def pre(up: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        torch.bmm(query[..., :_NOPE].transpose(0, 1), up[:, :_NOPE], out=q[..., :_LATENT].transpose(0, 1))
        q[..., _LATENT:] = query[..., _NOPE:]
        return q

    def post(up: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return torch.bmm(latents.transpose(0, 1), up[:, _NOPE:].transpose(1, 2), out=y.transpose(0, 1))

    if attrs["side"] == "pre":
        return [lambda up=up, query=query: pre(up, query) for up, query, _ in sets]
    return [lambda up=up, latents=latents: post(up, latents) for up, _, latents in sets]


def _mla_prefill(attrs: dict[str, str], v: Values) -> list[Call]:
    count, length, heads = v["batch"], v["new_tokens"], v["heads"]
    q = _randn(count * length, heads, _NOPE + _ROPE)
    k, x = _randn(count * length, heads, _NOPE + _V).tensor_split((_NOPE,), -1)  # as one product leaves them
    rope, ops = _randn(count * length, _ROPE), TritonOps()
    step = make_step([Segment([0] * length, 0, range(-(-length // _BLOCK)), True)] * count, _BLOCK, "cuda")
    return [lambda: ops.expanded_attention(q, k, x, rope, step, scale=0.1)]


def _norm(attrs: dict[str, str], v: Values) -> list[Call]:
    weight, rows = _randn(v["width"]), (v["tokens"], v["width"])
    pairs = [(_randn(*rows), _randn(*rows)) for _ in range(_sets(8 * math.prod(rows)))]
    return [lambda x=x, stream=stream: add_rmsnorm(x, weight, 1e-6, stream) for x, stream in pairs]


def _quant(attrs: dict[str, str], v: Values) -> list[Call]:
    inputs = [_randn(v["tokens"], v["width"]) for _ in range(_sets(3 * v["tokens"] * v["width"]))]
    return [lambda x=x: quant_fp8_rows(x) for x in inputs]


def _silu(attrs: dict[str, str], v: Values) -> list[Call]:
    inputs = [_randn(v["tokens"], 2 * v["width"]) for _ in range(_sets(6 * v["tokens"] * v["width"]))]
    return [lambda x=x: silu_mul(x) for x in inputs]


def _gate(attrs: dict[str, str], v: Values) -> list[Call]:
    logits = torch.randn(v["tokens"], v["experts"], device="cuda")
    return [lambda: gate_topk(logits, v["top_k"])]


def _router(attrs: dict[str, str], v: Values) -> list[Call]:
    """Scores and the choice of experts, as the models of so many experts choose (groups: DeepSeek-V3)."""
    bias = torch.rand(v["experts"], device="cuda") if v["experts"] >= 256 else None
    how = {"bias_E": bias, "scoring": "softmax" if bias is None else "sigmoid", "groups": 8 if v["experts"] == 256 else 1,
           "topk_groups": 4 if v["experts"] == 256 else 1}
    row = 2 * v["hidden"]
    pairs = [(_randn(v["tokens"], v["hidden"]), _randn(v["experts"], v["hidden"]))
             for _ in range(_sets(row * (v["tokens"] + v["experts"])))]
    return [lambda x=x, w=w: gate_topk(router_logits(x, w), v["top_k"], **how) for x, w in pairs]


def _replica_split(attrs: dict[str, str], v: Values) -> list[Call]:
    """A rank's tokens over the replicas of a placement that an even load has."""
    placement = place_global(np.ones((1, v["experts"])), v["slots"], v["ranks"]).slot_to_logical[0].tolist()
    replicas = Replicas(v["experts"], v["slots"], v["ranks"], 0, torch.device("cuda"), kernels=True)
    replicas.place(placement)
    ids = torch.rand(v["tokens"], v["experts"], device="cuda").topk(v["top_k"], -1)[1]
    return [lambda: replicas.slots(ids)]


def _rope(attrs: dict[str, str], v: Values) -> list[Call]:
    """Queries and keys of whole prompts behind one another, with norms, into a cache in order."""
    tokens, width = v["tokens"], v["head_dim"]
    columns = (v["heads"] + 2 * v["kv_heads"]) * width
    cache = torch.empty(-(-tokens // _BLOCK), 2, _BLOCK, v["kv_heads"], width, dtype=torch.bfloat16, device="cuda")
    at, angles, norm = torch.arange(tokens, device="cuda"), torch.randn(tokens, width, device="cuda"), _randn(width)
    inputs = [_randn(tokens, columns) for _ in range(_sets(4 * tokens * columns))]
    return [lambda x=x: rope_norm_cache(x, at, at, angles, cache, heads=v["heads"], q_norm_D=norm, k_norm_D=norm)
            for x in inputs]


def _latent(attrs: dict[str, str], v: Values) -> list[Call]:
    """Queries and latents of whole prompts behind one another, into a cache in order."""
    tokens, row = v["tokens"], v["heads"] * (_NOPE + _ROPE) + _LATENT + _ROPE
    cache = torch.empty(-(-tokens // _BLOCK), _BLOCK, _LATENT + _ROPE, dtype=torch.bfloat16, device="cuda")
    at, angles, norm = torch.arange(tokens, device="cuda"), torch.randn(tokens, _ROPE, device="cuda"), _randn(_LATENT)
    inputs = [(_randn(tokens, v["heads"], _NOPE + _ROPE), _randn(tokens, _LATENT + _ROPE))
              for _ in range(_sets(2 * tokens * row))]
    return [lambda q=q, x=x: mla_rope_norm_cache(q, x, norm, at, at, angles, cache, interleaved=True) for q, x in inputs]


_MAKERS: dict[str, Callable[[dict[str, str], Values], list[Call]]] = {
    "gemm": _gemm, "moe": _moe, "attention_decode": _attention_decode, "attention_prefill": _attention_prefill,
    "mla_decode": _mla_decode, "mla_bmm": _mla_bmm, "mla_prefill": _mla_prefill, "norm": _norm, "quant": _quant,
    "silu": _silu, "gate": _gate, "rope": _rope, "latent": _latent, "router": _router, "replica_split": _replica_split,
}


def read_kernel() -> tuple[Call, int]:
    """A call that reads 2 GiB of random words and nothing else, and its bytes."""
    words, programs = 1 << 29, torch.cuda.get_device_properties(0).multi_processor_count * 8
    data = torch.randint(0, 1 << 30, (words,), dtype=torch.int32, device="cuda")
    out = torch.empty(programs, dtype=torch.int32, device="cuda")
    return lambda: _read[(programs,)](data, out, words, programs, BLOCK=4096, num_warps=8), 4 * words


@triton.jit
def _read(data, out, words, programs, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.int32)
    for start in range(pid * BLOCK * 2, words, programs * BLOCK * 2):
        acc += tl.load(data + start + lane)
        acc ^= tl.load(data + start + BLOCK + lane)
    tl.store(out + pid, tl.sum(acc))


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def _sets(set_bytes: float) -> int:
    return max(1, min(16, math.ceil(_SETS_BYTES / max(set_bytes, 1))))
