"""Small models and pools that the cost tests share."""

from __future__ import annotations

from typing import Any

from twin.cost.model import CostModel
from twin.spec.cluster import ClusterSpec
from twin.spec.load import load_cluster
from twin.spec.model import Attention, ModelSpec, MoE
from twin.spec.plan import Plan, PoolPlan, Precision
from twin.spec.scenario import Routing


def gqa_model(**changes: Any) -> ModelSpec:
    """Two dense and two MoE layers of grouped-query attention."""
    fields: dict[str, Any] = {
        "name": "tiny-gqa", "model_type": "qwen3_moe", "hidden": 64, "vocab": 100, "layers": 4,
        "layer_attention": ("full",) * 4, "layer_ffn": ("dense", "dense", "moe", "moe"), "dense_intermediate": 96,
        "attention": Attention(kind="gqa", heads=8, kv_heads=2, head_dim=16, v_head_dim=16),
        "moe": MoE(experts=16, top_k=4, intermediate=32, shared_experts=1, shared_intermediate=48),
    }
    return ModelSpec(**{**fields, **changes})


def mla_model(**changes: Any) -> ModelSpec:
    """One dense and three MoE layers of latent attention, group-limited routing."""
    fields: dict[str, Any] = {
        "name": "tiny-mla", "model_type": "deepseek_v3", "hidden": 64, "vocab": 100, "layers": 4,
        "layer_attention": ("full",) * 4, "layer_ffn": ("dense", "moe", "moe", "moe"), "dense_intermediate": 96,
        "attention": Attention(kind="mla", heads=8, kv_heads=8, head_dim=24, v_head_dim=16, q_lora_rank=32, kv_lora_rank=40,
                               qk_nope_head_dim=16, qk_rope_head_dim=8),
        "moe": MoE(experts=32, top_k=4, intermediate=32, groups=4, top_k_groups=2), "mtp_layers": 1,
    }
    return ModelSpec(**{**fields, **changes})


def pool_of(**fields: Any) -> PoolPlan:
    return PoolPlan(**{"role": "mixed", "max_num_seqs": 64, "max_batch_tokens": 512, **fields})


def cost_model(model: ModelSpec, cluster: str | ClusterSpec, pool: PoolPlan, *, engine: str = "eptwin",
               precision: Precision | None = None, routing: Routing | None = None, seed: int = 0) -> CostModel:
    spec = load_cluster(cluster) if isinstance(cluster, str) else cluster
    other = {"prefill": "decode", "decode": "prefill"}.get(pool.role)
    pools = (pool,) if other is None else (pool, PoolPlan(role=other))
    plan = Plan(pools=pools, precision=precision or Precision(), engine=engine)
    return CostModel(model, spec, plan, pool, routing=routing, seed=seed)
