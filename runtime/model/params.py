"""Every parameter of a rank: its shape, and which rectangle of which checkpoint tensor fills which part of it.

Written down once, the list serves to load checkpoints, to make random weights, to count parameters and to find missing
or extra tensors. Tensor names are those that Hugging Face checkpoints use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runtime.layout import RankLayout
from twin.spec.model import ModelSpec

Range = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """`take` [start, stop) of every dim of `source`, whose full shape is `shape`, goes to `into` of the parameter's
    leading dims. `stride` keeps every second element of the last dim, from 0 or 1; `transpose` then swaps the last two
    dims; dims of size one vanish where the parameter lacks them."""

    source: str
    shape: tuple[int, ...]
    take: tuple[Range, ...]
    into: tuple[int | Range, ...] = ()
    stride: int | None = None
    transpose: bool = False


@dataclass(frozen=True)
class Param:
    """`kind`: weight, expert (formats of their own), or fp32 (router and sinks keep full precision)."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    kind: str = "weight"


Placement = Sequence[Sequence[int]]
"""Logical expert of every slot [moe layers][slots]."""


def linear_placement(model: ModelSpec, slots: int) -> list[list[int]]:
    """Slots in expert order; redundant slots repeat the first experts."""
    experts = model.moe.experts if model.moe else 1
    return [[slot % experts for slot in range(slots)] for _ in range(model.moe_layers)]


def with_mtp(model: ModelSpec) -> ModelSpec:
    """The model with one layer more, like its last: as checkpoints number the layer of the first MTP module."""
    return model.model_copy(update={"layers": model.layers + 1, "layer_attention": (*model.layer_attention, "full"),
                                    "layer_ffn": (*model.layer_ffn, model.layer_ffn[-1])})


def mtp_placement(model: ModelSpec, slots: int, placement: Placement | None) -> Placement:
    """Placement of a model `with_mtp`: as given for the layers before, linear in the module's own."""
    linear = linear_placement(model, slots)
    return linear if placement is None else [*placement, *linear[len(placement):]]


def rank_params(model: ModelSpec, at: RankLayout, placement: Placement | None = None, *, mtp: bool = False) -> list[Param]:
    """All parameters of a rank, in the order of the layers; with `mtp`, those of the first MTP module as well."""
    if mtp:
        longer = with_mtp(model)
        return [*rank_params(longer, at, mtp_placement(longer, at.slots, placement)), *_mtp(model)]
    placement = placement or linear_placement(model, at.slots)
    h, vocab = model.hidden, vocab_slice(model.vocab, at)
    params = [_cut("embed", "model.embed_tokens.weight", (model.vocab, h), 0, vocab),
              _whole("norm", "model.norm.weight", (h,))]
    if not model.tie_embeddings:
        params.append(_cut("head", "lm_head.weight", (model.vocab, h), 0, vocab))
    moe_layer = 0
    for i in range(model.layers):
        src = f"model.layers.{i}."
        params += [_whole(f"{i}.attn_norm", src + "input_layernorm.weight", (h,)),
                   _whole(f"{i}.ffn_norm", src + "post_attention_layernorm.weight", (h,))]
        params += _mla(model, at, i) if model.attention.kind == "mla" else _gqa(model, at, i)
        if model.layer_ffn[i] == "dense":
            params += _gated_ffn(f"{i}.ffn", src + "mlp.", h, model.dense_intermediate, at)
        else:
            params += _moe(model, at, i, placement[moe_layer])
            moe_layer += 1
    return params


def checkpoint_tensors(model: ModelSpec, *, mtp: bool = False) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that is read from a checkpoint of this model."""
    slots = model.moe.experts if model.moe else 0
    whole = RankLayout(0, 0, "mixed", 0, 0, 1, 1, 1, 0, 0, slots)
    return {piece.source: piece.shape for param in rank_params(model, whole, mtp=mtp) for piece in param.pieces}


def vocab_slice(vocab: int, at: RankLayout) -> Range:
    """This rank's vocabulary rows; the last ranks may hold fewer, even none."""
    each = -(-vocab // at.tp)
    start = min(at.tp_rank * each, vocab)
    return start, min(start + each, vocab)


def kv_head_slice(model: ModelSpec, tp: int, tp_rank: int) -> Range:
    """KV heads [start, stop) of a TP rank; with more ranks than heads, neighbours hold the same head."""
    heads = model.attention.kv_heads
    if tp > heads:
        start = tp_rank * heads // tp
        return start, start + 1
    return tp_rank * heads // tp, (tp_rank + 1) * heads // tp


def _mtp(model: ModelSpec) -> Iterator[Param]:
    """What the module has beside its decoder layer."""
    i, h = model.layers, model.hidden
    src = f"model.layers.{i}."
    yield _whole(f"{i}.enorm", src + "enorm.weight", (h,))
    yield _whole(f"{i}.hnorm", src + "hnorm.weight", (h,))
    yield _whole(f"{i}.eh_proj", src + "eh_proj.weight", (h, 2 * h))
    yield _whole(f"{i}.head_norm", src + "shared_head.norm.weight", (h,))


def _even(size: int, parts: int, part: int) -> Range:
    return size // parts * part, size // parts * (part + 1)


def _full(shape: tuple[int, ...]) -> tuple[Range, ...]:
    return tuple((0, n) for n in shape)


def _whole(name: str, source: str, shape: tuple[int, ...], kind: str = "weight") -> Param:
    return Param(name, shape, (Piece(source, shape, _full(shape)),), kind)


def _cut(name: str, source: str, shape: tuple[int, ...], dim: int, part: Range, kind: str = "weight") -> Param:
    take = tuple(part if d == dim else (0, n) for d, n in enumerate(shape))
    return Param(name, tuple(stop - start for start, stop in take), (Piece(source, shape, take),), kind)


def _only_first(param: Param, at_zero: bool) -> Param:
    """A bias that is added once: ranks of a sum other than the first hold zeros."""
    return param if at_zero else Param(param.name, param.shape, (), param.kind)


def _gqa(model: ModelSpec, at: RankLayout, i: int) -> Iterator[Param]:
    a, h, src = model.attention, model.hidden, f"model.layers.{i}.self_attn."
    q = _even(a.heads, at.tp, at.tp_rank)
    kv = kv_head_slice(model, at.tp, at.tp_rank)
    rows = [("q_proj", a.heads, q), ("k_proj", a.kv_heads, kv), ("v_proj", a.kv_heads, kv)]
    weights, biases, start = [], [], 0
    for name, heads, (first, last) in rows:
        take, into = (first * a.head_dim, last * a.head_dim), (start, start + (last - first) * a.head_dim)
        weights.append(Piece(f"{src}{name}.weight", (heads * a.head_dim, h), (take, (0, h)), (into,)))
        biases.append(Piece(f"{src}{name}.bias", (heads * a.head_dim,), (take,), (into,)))
        start = into[1]
    yield Param(f"{i}.qkv", (start, h), tuple(weights))
    if a.qkv_bias:
        yield Param(f"{i}.qkv_bias", (start,), tuple(biases))
    if a.qk_norm:
        yield _whole(f"{i}.q_norm", src + "q_norm.weight", (a.head_dim,))
        yield _whole(f"{i}.k_norm", src + "k_norm.weight", (a.head_dim,))
    if a.sinks:
        yield _cut(f"{i}.sinks", src + "sinks", (a.heads,), 0, q, "fp32")
    yield from _attention_out(model, at, i)


def _mla(model: ModelSpec, at: RankLayout, i: int) -> Iterator[Param]:
    a, h, src = model.attention, model.hidden, f"model.layers.{i}.self_attn."
    assert a.kv_lora_rank and a.qk_nope_head_dim and a.qk_rope_head_dim
    first, last = _even(a.heads, at.tp, at.tp_rank)
    qk, kv = a.qk_nope_head_dim + a.qk_rope_head_dim, a.qk_nope_head_dim + a.v_head_dim
    latent = a.kv_lora_rank + a.qk_rope_head_dim
    if a.q_lora_rank:
        yield _whole(f"{i}.q_down", src + "q_a_proj.weight", (a.q_lora_rank, h))
        yield _whole(f"{i}.q_norm", src + "q_a_layernorm.weight", (a.q_lora_rank,))
        yield _cut(f"{i}.q_up", src + "q_b_proj.weight", (a.heads * qk, a.q_lora_rank), 0, (first * qk, last * qk))
    else:
        yield _cut(f"{i}.q_up", src + "q_proj.weight", (a.heads * qk, h), 0, (first * qk, last * qk))
    yield _whole(f"{i}.kv_down", src + "kv_a_proj_with_mqa.weight", (latent, h))
    yield _whole(f"{i}.kv_norm", src + "kv_a_layernorm.weight", (a.kv_lora_rank,))
    yield _cut(f"{i}.kv_up", src + "kv_b_proj.weight", (a.heads * kv, a.kv_lora_rank), 0, (first * kv, last * kv))
    if a.qkv_bias:
        if a.q_lora_rank:
            yield _whole(f"{i}.q_down_bias", src + "q_a_proj.bias", (a.q_lora_rank,))
        yield _whole(f"{i}.kv_down_bias", src + "kv_a_proj_with_mqa.bias", (latent,))
    yield from _attention_out(model, at, i)


def _attention_out(model: ModelSpec, at: RankLayout, i: int) -> Iterator[Param]:
    a, h, src = model.attention, model.hidden, f"model.layers.{i}.self_attn.o_proj."
    first, last = _even(a.heads, at.tp, at.tp_rank)
    yield _cut(f"{i}.out", src + "weight", (h, a.heads * a.v_head_dim), 1, (first * a.v_head_dim, last * a.v_head_dim))
    if a.out_bias:
        yield _only_first(_whole(f"{i}.out_bias", src + "bias", (h,)), at.tp_rank == 0)


def _gated_ffn(name: str, src: str, h: int, width: int, at: RankLayout) -> Iterator[Param]:
    part = _even(width, at.tp, at.tp_rank)
    n = part[1] - part[0]
    pieces = tuple(Piece(f"{src}{which}_proj.weight", (width, h), (part, (0, h)), ((j * n, (j + 1) * n),))
                   for j, which in enumerate(("gate", "up")))
    yield Param(f"{name}.w13", (2 * n, h), pieces)
    yield _cut(f"{name}.w2", src + "down_proj.weight", (h, width), 1, part)


def _moe(model: ModelSpec, at: RankLayout, i: int, slot_experts: Sequence[int]) -> Iterator[Param]:
    m, h = model.moe, model.hidden
    assert m is not None
    mlp = f"model.layers.{i}." + ("block_sparse_moe." if model.model_type == "mixtral" else "mlp.")
    router = mlp + ("router." if model.model_type == "gpt_oss" else "gate.")
    yield _whole(f"{i}.router", router + "weight", (m.experts, h), "fp32")
    if m.router_bias:
        yield _whole(f"{i}.router_bias", router + "bias", (m.experts,), "fp32")
    if m.score_bias:
        yield _whole(f"{i}.score_bias", router + "e_score_correction_bias", (m.experts,), "fp32")
    if m.shared_intermediate:
        yield from _gated_ffn(f"{i}.shared", mlp + "shared_experts.", h, m.shared_intermediate, at)
    local = [slot_experts[slot] for slot in at.local_slots]
    part = _even(m.intermediate, at.expert_tp, at.expert_tp_rank)
    if model.model_type == "gpt_oss":
        yield from _fused_experts(model, at, i, local, part)
        return
    gate, up, down = ("w1", "w3", "w2") if model.model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    n = part[1] - part[0]
    w13, w2 = [], []
    for slot, expert in enumerate(local):
        src = f"{mlp}experts.{expert}."
        for j, which in enumerate((gate, up)):
            w13.append(Piece(f"{src}{which}.weight", (m.intermediate, h), (part, (0, h)), (slot, (j * n, (j + 1) * n))))
        w2.append(Piece(f"{src}{down}.weight", (h, m.intermediate), ((0, h), part), (slot,)))
    yield Param(f"{i}.experts.w13", (len(local), 2 * n, h), tuple(w13), "expert")
    yield Param(f"{i}.experts.w2", (len(local), h, n), tuple(w2), "expert")


def _fused_experts(model: ModelSpec, at: RankLayout, i: int, local: Sequence[int], part: Range) -> Iterator[Param]:
    """gpt-oss: all experts in one tensor, input-major, gate and up columns interleaved; biases on both projections."""
    m, h, src = model.moe, model.hidden, f"model.layers.{i}.mlp.experts."
    assert m is not None
    width, n, columns = m.intermediate, part[1] - part[0], (2 * part[0], 2 * part[1])
    w13, b13, w2, b2 = [], [], [], []
    for slot, e in enumerate(local):
        one = (e, e + 1)
        for j in (0, 1):
            into = (slot, (j * n, (j + 1) * n))
            w13.append(Piece(src + "gate_up_proj", (m.experts, h, 2 * width), (one, (0, h), columns), into, j, True))
            b13.append(Piece(src + "gate_up_proj_bias", (m.experts, 2 * width), (one, columns), into, j))
        w2.append(Piece(src + "down_proj", (m.experts, width, h), (one, part, (0, h)), (slot,), None, True))
        b2.append(Piece(src + "down_proj_bias", (m.experts, h), (one, (0, h)), (slot,)))
    yield Param(f"{i}.experts.w13", (len(local), 2 * n, h), tuple(w13), "expert")
    yield Param(f"{i}.experts.b13", (len(local), 2 * n), tuple(b13))
    yield Param(f"{i}.experts.w2", (len(local), h, n), tuple(w2), "expert")
    yield _only_first(Param(f"{i}.experts.b2", (len(local), h), tuple(b2)), at.expert_tp_rank == 0)
