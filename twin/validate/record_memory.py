"""Records of memory: a token's KV, what is left for KV, what weights take."""

from __future__ import annotations

from twin.cost.engines import engine_of
from twin.cost.memory import memory_of
from twin.spec.load import load_cluster
from twin.spec.plan import PoolPlan
from twin.validate.record_pools import redundant_slots
from twin.validate.record_units import unit_bytes
from twin.validate.record_words import (
    Found,
    Record,
    engine_of_record,
    model_named,
    precision_of_record,
    preset_of,
    ranks_of,
    stated,
    text_of,
)

_WIDTH = 0.30  # half width of the 80% interval: three published figures of vLLM are 4, 24 and 41% off


def kv_bytes(record: Record) -> Found | str:
    """Bytes of one token's KV, all layers."""
    text = f"{record['metric']} {record.get('precision', '')}".lower()
    value = model_named(record).kv_bytes_per_token("fp8" if "fp8" in text else "bf16", tp=1) / unit_bytes(record, "bytes")
    return Found(float(value), float(value), float(value), ("measured",))


def gpu_memory(record: Record) -> Found | str:
    """Bytes of one GPU that weights take, or that remain for KV."""
    model = model_named(record)
    named = _layout(text_of(record)) if not any(record.get(word) for word in ("ep", "gpus", "dp", "tp")) else None
    dp, tp, ep = named or ranks_of(record)
    said = stated(record, "decode", ep)
    ep = ep if model.moe is not None else 1
    slots = redundant_slots(model.moe.experts, ep, said.redundant) if model.moe is not None else 0
    pool = PoolPlan(role="decode", dp=dp, tp=tp, ep=ep, redundant_experts=slots)
    engine, gpu = engine_of(engine_of_record(record)), load_cluster(preset_of(record)).groups[0].gpu
    backend = "deepep_low_latency" if dp > 1 else "none"
    found = memory_of(model, precision_of_record(record), pool, engine, gpu.hbm_bytes, backend, mtp=said.drafts > 0)
    weights = found.dense_weight_bytes + found.expert_weight_bytes
    value = weights if "weight" in str(record["metric"]).lower() else found.kv_pool_bytes
    return Found.near(value / unit_bytes(record, "gb"), _WIDTH, "assumed")


def _layout(text: str) -> tuple[int, int, int] | None:
    """Parallel sizes that only a name tells: `tp8`, `dpep16`."""
    for tag, size in ((f"{kind}{n}", n) for n in (128, 96, 72, 64, 48, 32, 24, 16, 8, 4, 2) for kind in ("dpep", "tp", "ep")):
        if tag in text:
            return (1, size, 1) if tag.startswith("tp") else (size, 1, size)
    return None
