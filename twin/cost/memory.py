"""What fills a GPU: weights by rank, KV pool, activations, communication buffers, and what the runtime keeps."""

from __future__ import annotations

import math

from twin.cost.engines import Engine
from twin.cost.roofline import activation_bytes, bytes_of
from twin.spec.errors import Infeasible
from twin.spec.model import ModelSpec
from twin.spec.plan import PoolPlan, Precision
from twin.spec.results import Memory
from twin.spec.units import format_bytes


def dense_weight_bytes(model: ModelSpec, precision: Precision, tp: int, *, mtp: bool) -> float:
    """Weights of one rank that are not routed experts: heads, inner widths and vocabulary divided by TP (KV heads at
    least one a rank), norms and the router whole. Embeddings, head, norms and router stay in bf16 (fp32 models: fp32)."""
    plain = activation_bytes(precision.weights)
    linear = model.layer_attention.count("linear")
    attention = (model.layers - linear) * attention_elements(model, tp) + linear * model.linear_attention_params / tp
    ffn = (model.dense_layers * model.dense_ffn_params + model.moe_layers * model.shared_params) / tp
    vocab = (model.embedding_params + model.head_params) / tp
    whole = (2 * model.layers + 1) * model.hidden + model.moe_layers * model.gate_params
    extra = _mtp_elements(model, tp) if mtp else 0.0
    return (attention + ffn + extra) * bytes_of(precision.weights) + (vocab + whole) * plain


def attention_elements(model: ModelSpec, tp: int) -> float:
    """Elements of one softmax attention block on one rank: what is by head divides over TP, the rest is whole."""
    a, h = model.attention, model.hidden
    if a.kind == "mla":
        assert a.kv_lora_rank and a.qk_nope_head_dim and a.qk_rope_head_dim
        by_head = (a.q_lora_rank or h) * a.heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
        by_head += a.kv_lora_rank * a.heads * (a.qk_nope_head_dim + a.v_head_dim) + a.heads * a.v_head_dim * h
        return by_head / tp + (model.attention_params - by_head)
    kv_each = h * (a.head_dim + a.v_head_dim)
    kv_held = -(-a.kv_heads // tp)
    return (model.attention_params - a.kv_heads * kv_each) / tp + kv_held * kv_each


def _mtp_elements(model: ModelSpec, tp: int) -> float:
    """An MTP module: a projection of two hidden vectors to one, one attention block and the shared expert; its routed
    experts are counted with the experts."""
    one = 2 * model.hidden**2 / tp + attention_elements(model, tp) + (model.shared_params or model.dense_ffn_params) / tp
    return model.mtp_layers * one


def expert_weight_bytes(model: ModelSpec, precision: Precision, pool: PoolPlan, *, mtp: bool) -> float:
    """Routed experts of one rank, redundant slots included: slots / EP experts a layer, each cut over expert TP."""
    if model.moe is None:
        return 0.0
    slots = math.ceil((model.moe.experts + pool.redundant_experts) / pool.ep)
    layers = model.moe_layers + (model.mtp_layers if mtp else 0)
    return layers * slots * model.expert_params / pool.expert_tp * bytes_of(precision.experts)


def activation_bytes_of(model: ModelSpec, precision: Precision, pool: PoolPlan, engine: Engine) -> float:
    """Live activations of the largest step: `activation_factor` hidden vectors a token, the expert side's copies of
    gathered tokens, and fp32 logits of every running sequence."""
    a = activation_bytes(precision.weights)
    tokens = max(pool.max_batch_tokens, pool.max_num_seqs * (1 + pool.mtp_draft_tokens))
    hidden = tokens * model.hidden * engine.activation_factor * a / max(1.0, math.sqrt(pool.tp))
    logits = pool.max_num_seqs * (1 + pool.mtp_draft_tokens) * model.vocab / pool.tp * 4.0 * 2
    received = 0.0
    if model.moe is not None:
        pairs = tokens * model.moe.top_k * min(pool.dp, pool.ep) / pool.ep if pool.ep > 1 else tokens * model.moe.top_k
        received = pairs * (2 * model.hidden + 3 * model.moe.intermediate / pool.expert_tp) * a
    return hidden + logits + received


def comm_buffer_bytes(model: ModelSpec, precision: Precision, pool: PoolPlan, backend: str) -> float:
    """Registered buffers of the all-to-all: none for one rank. Low latency keeps a slot for every (expert, token) in both
    phases, doubled, and works on as many; normal and ring buffers are about 2 GiB and 1 GiB; one-sided pushes keep two
    receive buffers."""
    if model.moe is None or pool.world <= 1:
        return 0.0 if pool.world <= 1 else 256.0 * 2**20
    slots = model.moe.experts + pool.redundant_experts
    tokens = pool.max_num_seqs * (1 + pool.mtp_draft_tokens)
    if backend == "deepep_low_latency":
        workspace = 3 * model.hidden + 5 * model.moe.intermediate  # received fp8, both GEMMs' outputs, fp8 between
        return slots * min(tokens, 256.0) * (2 * 2 * (model.hidden * 2 + 16) + workspace)
    if backend == "symm":
        return 2.0 * min(tokens, 4096) * min(pool.ep, model.moe.top_k) * model.hidden * activation_bytes(precision.weights)
    return {"deepep_normal": 2.0, "nccl": 1.0, "ag_rs": 1.0}.get(backend, 0.0) * 2**30


def kv_block_bytes(model: ModelSpec, precision: Precision, pool: PoolPlan, *, mtp: bool) -> float:
    """Bytes of one KV block on one rank. MTP modules cache their own layer, where ranks hold them (`mtp`)."""
    more = (model.kv_layers + model.mtp_layers) / model.kv_layers if mtp and model.kv_layers else 1.0
    return pool.block_tokens * model.kv_bytes_per_token(precision.kv, tp=pool.tp) * more


def memory_of(model: ModelSpec, precision: Precision, pool: PoolPlan, engine: Engine, hbm_bytes: float, backend: str, *,
              mtp: bool) -> Memory:
    """The fullest rank of a pool (with the MTP modules where `mtp`). Everything together stays within `memory_fraction`
    of the GPU; what is left over is the KV pool, unless `kv_blocks` states it. Raises Infeasible("memory") saying what
    was needed and what there was."""
    dense = dense_weight_bytes(model, precision, pool.tp, mtp=mtp)
    experts = expert_weight_bytes(model, precision, pool, mtp=mtp)
    live = activation_bytes_of(model, precision, pool, engine)
    buffers = comm_buffer_bytes(model, precision, pool, backend)
    state = pool.max_num_seqs * model.state_elements / pool.tp * 4.0
    reserved = engine.reserved_bytes + (engine.ep_reserved_bytes if pool.ep > 1 and pool.dp > 1 else 0.0)
    fixed = dense + experts + live + buffers + reserved + state
    allowed = pool.memory_fraction * hbm_bytes
    block = kv_block_bytes(model, precision, pool, mtp=mtp)
    blocks = pool.kv_blocks if pool.kv_blocks is not None else int((allowed - fixed) // block) if block else 1 << 20
    needed = fixed + max(blocks, 1) * block
    if needed > allowed:
        raise Infeasible(
            f"{pool.role} pool (dp {pool.dp}, tp {pool.tp}, ep {pool.ep}) needs {format_bytes(needed)} a GPU, "
            f"{format_bytes(allowed)} allowed ({format_bytes(needed - allowed)} too much): dense weights "
            f"{format_bytes(dense)}, experts {format_bytes(experts)}, activations {format_bytes(live)}",
            constraint="memory", needed=needed, available=allowed, unit="bytes")
    return Memory(hbm_bytes=hbm_bytes, dense_weight_bytes=dense, expert_weight_bytes=experts,
                  kv_pool_bytes=blocks * block + state, activation_bytes=live, comm_buffer_bytes=buffers,
                  reserved_bytes=reserved, free_bytes=hbm_bytes - needed,
                  kv_tokens=blocks * pool.block_tokens, kv_blocks=blocks)
