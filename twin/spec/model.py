"""ModelSpec: the shape of a transformer, and the parameter and KV sizes that follow from it.

A spec is made from a Hugging Face `config.json` by `twin.spec.hf`. Counts are checked against checkpoints we build
(exactly) and against published totals (DeepSeek-R1 671 B / 37 B active, Kimi K2 1.04 T / 32.6 B active).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from twin.spec.base import BYTES_PER_ELEMENT, Dtype, Spec

Size = Annotated[int, Field(ge=1, le=1 << 24)]
Count = Annotated[int, Field(ge=0, le=1 << 24)]
AttentionLayer = Literal["full", "sliding", "linear"]
FfnLayer = Literal["dense", "moe"]


class Rope(Spec):
    """Rotary embedding. `scaling` is none, linear, llama3 or yarn; its numbers are the config's own."""

    theta: Annotated[float, Field(gt=0, le=1e12)] = 10_000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_max_position: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    truncate: bool = True
    interleaved: bool = False
    partial: Annotated[float, Field(gt=0, le=1)] = 1.0


class Attention(Spec):
    """Softmax attention of every full and sliding layer.

    gqa: `heads` query and `kv_heads` key/value heads of `head_dim` (values of `v_head_dim`).
    mla: one latent of `kv_lora_rank` plus `qk_rope_head_dim` rotary channels is cached for all heads; queries of
    `qk_nope_head_dim + qk_rope_head_dim`, values of `v_head_dim`; `q_lora_rank` None projects queries directly.
    `index_*` describe sparse attention's lightning indexer (None: dense attention).
    """

    kind: Literal["gqa", "mla"]
    heads: Size
    kv_heads: Size
    head_dim: Size
    v_head_dim: Size
    q_lora_rank: Size | None = None
    kv_lora_rank: Size | None = None
    qk_nope_head_dim: Size | None = None
    qk_rope_head_dim: Size | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False
    output_gate: bool = False
    sliding_window: Size | None = None
    index_heads: Size | None = None
    index_head_dim: Size | None = None
    index_top_k: Size | None = None
    rope: Rope = Rope()

    @model_validator(mode="after")
    def _consistent(self) -> Attention:
        if self.kind == "mla" and None in (self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim):
            raise ValueError("mla needs kv_lora_rank, qk_nope_head_dim and qk_rope_head_dim")
        if self.kind == "gqa" and self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self


class LinearAttention(Spec):
    """Gated delta-rule layers (Qwen3.5): a state of key_dim x value_dim a value head instead of a KV cache."""

    key_heads: Size
    value_heads: Size
    key_dim: Size
    value_dim: Size
    conv_kernel: Size = 4


class MoE(Spec):
    """Routed and shared experts of the MoE layers. Expert sizes are gated (gate, up, down) projections."""

    experts: Size
    top_k: Size
    intermediate: Size
    shared_experts: Count = 0
    shared_intermediate: Count = 0
    shared_gate: bool = False
    groups: Size = 1
    top_k_groups: Size = 1
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    score_bias: bool = False
    norm_top_k: bool = True
    routed_scaling: float = 1.0
    router_bias: bool = False
    expert_bias: bool = False
    swiglu_limit: float | None = None

    @model_validator(mode="after")
    def _consistent(self) -> MoE:
        if self.top_k > self.experts:
            raise ValueError(f"top_k ({self.top_k}) exceeds experts ({self.experts})")
        if self.experts % self.groups or self.top_k_groups > self.groups:
            raise ValueError(f"groups ({self.groups}) must divide experts ({self.experts}) and top_k_groups be at most groups")
        return self


class ModelSpec(Spec):
    """One decoder-only transformer. `layer_attention[i]` and `layer_ffn[i]` say what layer i is made of."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    model_type: str
    hidden: Size
    vocab: Size
    layers: Annotated[int, Field(ge=1, le=4096)]
    layer_attention: tuple[AttentionLayer, ...]
    layer_ffn: tuple[FfnLayer, ...]
    attention: Attention
    linear_attention: LinearAttention | None = None
    dense_intermediate: Count = 0
    moe: MoE | None = None
    mtp_layers: Count = 0
    tie_embeddings: bool = False
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    max_context: Annotated[int, Field(ge=1, le=1 << 28)] = 131_072
    weight_dtype: Dtype = "bf16"
    expert_dtype: Dtype = "bf16"
    source: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        if len(self.layer_attention) != self.layers or len(self.layer_ffn) != self.layers:
            raise ValueError(f"layer_attention and layer_ffn must have one entry for each of the {self.layers} layers")
        if "moe" in self.layer_ffn and self.moe is None:
            raise ValueError("layer_ffn has moe layers but moe is not given")
        if "linear" in self.layer_attention and self.linear_attention is None:
            raise ValueError("layer_attention has linear layers but linear_attention is not given")
        if "dense" in self.layer_ffn and not self.dense_intermediate:
            raise ValueError("layer_ffn has dense layers but dense_intermediate is 0")
        return self

    # --- layers
    @property
    def moe_layers(self) -> int:
        """How many layers route to experts (MTP modules not counted)."""
        return self.layer_ffn.count("moe")

    @property
    def dense_layers(self) -> int:
        return self.layer_ffn.count("dense")

    @property
    def kv_layers(self) -> int:
        """How many layers keep a KV cache."""
        return self.layers - self.layer_attention.count("linear")

    # --- parameters, in elements
    @property
    def attention_params(self) -> int:
        """Parameters of one softmax attention block, its norms on q/k/latents included, the layer norm not."""
        a, h = self.attention, self.hidden
        if a.kind == "mla":
            assert a.kv_lora_rank and a.qk_nope_head_dim and a.qk_rope_head_dim
            qk = a.qk_nope_head_dim + a.qk_rope_head_dim
            q_down = h * a.q_lora_rank + a.q_lora_rank if a.q_lora_rank else 0
            q_up = (a.q_lora_rank or h) * a.heads * qk
            kv_down = h * (a.kv_lora_rank + a.qk_rope_head_dim) + a.kv_lora_rank
            kv_up = a.kv_lora_rank * a.heads * (a.qk_nope_head_dim + a.v_head_dim)
            out = a.heads * a.v_head_dim * h
            bias = (a.q_lora_rank or 0) + a.kv_lora_rank + a.qk_rope_head_dim if a.qkv_bias else 0
            return q_down + q_up + kv_down + kv_up + out + bias + self._indexer_params + (h if a.out_bias else 0)
        q_width = a.heads * a.head_dim * (2 if a.output_gate else 1)
        kv_width = a.kv_heads * (a.head_dim + a.v_head_dim)
        total = h * (q_width + kv_width) + a.heads * a.v_head_dim * h
        total += (q_width + kv_width if a.qkv_bias else 0) + (h if a.out_bias else 0)
        total += (2 * a.head_dim if a.qk_norm else 0) + (a.heads if a.sinks else 0)
        return total + self._indexer_params

    @property
    def _indexer_params(self) -> int:
        """Lightning indexer of sparse attention: queries from the q latent, one key a token, head weights, key norm."""
        a = self.attention
        if not (a.index_heads and a.index_head_dim):
            return 0
        q_in = a.q_lora_rank or self.hidden
        return q_in * a.index_heads * a.index_head_dim + self.hidden * (a.index_head_dim + a.index_heads) + 2 * a.index_head_dim

    @property
    def linear_attention_params(self) -> int:
        """Parameters of one gated delta-rule block: q, k, v, gate, decay and beta projections, conv, norm, output."""
        lin = self.linear_attention
        if lin is None:
            return 0
        k, v = lin.key_heads * lin.key_dim, lin.value_heads * lin.value_dim
        projections = self.hidden * (2 * k + 2 * v + 2 * lin.value_heads) + v * self.hidden
        return projections + lin.conv_kernel * (2 * k + v) + 2 * lin.value_heads + lin.value_dim

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert."""
        if self.moe is None:
            return 0
        m = self.moe
        return 3 * self.hidden * m.intermediate + (2 * m.intermediate + self.hidden if m.expert_bias else 0)

    @property
    def shared_params(self) -> int:
        """Parameters of the shared experts of one MoE layer."""
        if self.moe is None or not self.moe.shared_intermediate:
            return 0
        return 3 * self.hidden * self.moe.shared_intermediate + (self.hidden if self.moe.shared_gate else 0)

    @property
    def gate_params(self) -> int:
        """Parameters of one MoE layer's router, its correction bias included."""
        if self.moe is None:
            return 0
        m = self.moe
        return m.experts * (self.hidden + int(m.score_bias) + int(m.router_bias))

    @property
    def dense_ffn_params(self) -> int:
        return 3 * self.hidden * self.dense_intermediate

    @property
    def embedding_params(self) -> int:
        return self.vocab * self.hidden

    @property
    def head_params(self) -> int:
        return 0 if self.tie_embeddings else self.vocab * self.hidden

    @property
    def params(self) -> dict[str, int]:
        """Parameter count by part; MTP modules are not counted, as published totals do not count them."""
        linear = self.layer_attention.count("linear")
        moe_layers = self.moe_layers
        return {
            "embedding": self.embedding_params,
            "attention": (self.layers - linear) * self.attention_params + linear * self.linear_attention_params,
            "norm": (2 * self.layers + 1) * self.hidden,
            "dense_ffn": self.dense_layers * self.dense_ffn_params,
            "gate": moe_layers * self.gate_params,
            "shared_experts": moe_layers * self.shared_params,
            "routed_experts": moe_layers * (self.moe.experts if self.moe else 0) * self.expert_params,
            "head": self.head_params,
        }

    @property
    def total_params(self) -> int:
        return sum(self.params.values())

    @property
    def active_params(self) -> int:
        """Parameters that one token's forward pass multiplies with: top-k of the routed experts; the embedding is a
        look-up and not counted unless the head shares it."""
        parts = dict(self.params)
        if self.moe is not None:
            parts["routed_experts"] = self.moe_layers * self.moe.top_k * self.expert_params
        if not self.tie_embeddings:
            del parts["embedding"]
        return sum(parts.values())

    # --- KV cache
    @property
    def kv_elements_per_token_layer(self) -> int:
        """Cached elements of one token in one softmax layer (before any replication over TP ranks)."""
        a = self.attention
        indexer = a.index_head_dim or 0
        if a.kind == "mla":
            assert a.kv_lora_rank and a.qk_rope_head_dim
            return a.kv_lora_rank + a.qk_rope_head_dim + indexer
        return a.kv_heads * (a.head_dim + a.v_head_dim) + indexer

    def kv_bytes_per_token(self, kv_dtype: Dtype = "bf16", *, tp: int = 1) -> float:
        """Bytes that one token of context takes on ONE rank of a TP group, over all layers.

        GQA heads divide over TP and are replicated when TP exceeds them (each rank holds at least one);
        MLA's latent is the same for every head, so each rank holds all of it.
        """
        a = self.attention
        elements = float(self.kv_elements_per_token_layer)
        if a.kind == "gqa":
            heads_per_rank = -(-a.kv_heads // tp)
            elements = heads_per_rank * (a.head_dim + a.v_head_dim) + (a.index_head_dim or 0)
        return self.kv_layers * elements * BYTES_PER_ELEMENT[kv_dtype]

    @property
    def state_elements(self) -> int:
        """Elements of recurrent state a sequence keeps over all linear-attention layers."""
        lin = self.linear_attention
        if lin is None:
            return 0
        conv = (lin.conv_kernel - 1) * (2 * lin.key_heads * lin.key_dim + lin.value_heads * lin.value_dim)
        return self.layer_attention.count("linear") * (lin.value_heads * lin.key_dim * lin.value_dim + conv)
