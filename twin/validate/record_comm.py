"""Records of single exchanges, collectives, hand-overs and products: what one kernel or library call takes."""

from __future__ import annotations

import re

import numpy as np

from twin.cost.comm import kv_transfer_s
from twin.cost.model import CostModel
from twin.cost.network import Network
from twin.cost.protocols import PROTOCOLS, TP_BASE_S, TP_EFFICIENCY
from twin.cost.routing import touch_probability
from twin.spec.load import load_cluster
from twin.spec.plan import Plan, PoolPlan, Precision
from twin.validate.record_pools import evidence
from twin.validate.record_words import Found, Record, cluster_of, model_named, number, preset_of, text_of
from twin.validate.words import model_of

_FP8 = Precision(weights="fp8_block", experts="fp8_block", kv="bf16", dispatch="fp8")
_COMM_WIDTH, _KV_WIDTH = 0.15, 0.20  # half widths of 80% intervals, from their own tables
# Before April 2025 DeepEP's kernels across nodes reached so much of what they reach since: 44 and 46 of 58 and 51 GB/s.
_FIRST_ACROSS = 0.85
# A call of normal mode as a host times it: layout, exchange of counts and the host's wait for them, before anything moves.
_CALL_S = 1.5e-3


def _exchange(record: Record, backend: str) -> tuple[CostModel, float]:
    """Cost model of an all-to-all test, and tokens a rank."""
    ranks = int(record.get("ep") or record["gpus"])
    model = model_of("deepseek-v3")
    assert model.moe is not None
    cluster = cluster_of(record, ranks)
    nodes = int(record.get("nodes") or -(-ranks // cluster.groups[0].gpus_per_node))
    experts = int(record.get("experts") or 256)
    experts += -experts % ranks
    groups = nodes if experts % nodes == 0 else 1
    moe = model.moe.model_copy(update={"experts": experts, "top_k": int(record.get("topk") or 8), "groups": groups,
                                       "top_k_groups": min(groups, 4)})
    model = model.model_copy(update={"moe": moe, "hidden": int(record.get("hidden") or 7168)})
    pool = PoolPlan(role="decode", dp=ranks, ep=ranks, comm=backend)  # type: ignore[arg-type]
    plan = Plan(pools=(pool, PoolPlan(role="prefill")), precision=_FP8, engine="sglang")
    if backend == "deepep_low_latency" and _before(record, "2025-06"):
        # before June 2025 low latency sent everything over RDMA, inside a node too
        cluster = cluster.model_copy(update={"network": cluster.network.model_copy(update={"nvlink_domain_gpus": 1})})
    if backend == "deepep_normal" and _before(record, "2025-04"):
        slow = cluster.network.nic_bytes_per_s * _FIRST_ACROSS
        cluster = cluster.model_copy(update={"network": cluster.network.model_copy(update={"nic_bytes_per_s": slow})})
    return CostModel(model, cluster, plan, pool), number(record["tokens_per_gpu"])


def _before(record: Record, month: str) -> bool:
    """Whether a record says that it is older than a month; a year alone says nothing."""
    date = str(record.get("date", ""))
    return len(date) >= len(month) and date < month


def exchange_latency(record: Record) -> Found | str:
    """Microseconds of one dispatch or combine of DeepEP, or of both."""
    text, metric = f"{text_of(record)} {record.get('model', '')}".lower(), str(record["metric"])
    if "deepep" not in text:
        return "another library's all-to-all: the twin has DeepEP's"
    tokens = number(record["tokens_per_gpu"])
    normal = "normal" in text or tokens > 1024  # low latency keeps a slot for every token
    costs, tokens = _exchange(record, "deepep_normal" if normal else "deepep_low_latency")
    seconds = 0.0
    for name, exchange in costs.exchanges:
        if name in metric:
            nvlink_s, rdma_s = exchange.seconds(np.array([tokens]))
            called = _CALL_S if normal and name == "dispatch" and "p50" in metric else 0.0
            seconds += float(nvlink_s + rdma_s) + exchange.fixed_s + called
    return Found.near(seconds * 1e6, _COMM_WIDTH, "calibrated")


def exchange_bandwidth(record: Record) -> Found | str:
    """DeepEP V1's bottleneck bandwidth: bytes a second that a rank sends to nodes (its own counted) or, inside one, to ranks."""
    costs, tokens = _exchange(record, "deepep_normal")
    phase = 1 if str(record["metric"]).startswith("combine") else 0
    nvlink_s, rdma_s = costs.exchanges[phase][1].seconds(np.array([tokens]))
    seconds = float(nvlink_s + rdma_s) + costs.exchanges[phase][1].fixed_s
    moe, ranks = costs.model.moe, costs.pool.ep
    assert moe is not None
    domains = costs.network.domain_of[:ranks]
    owners = domains if domains.max() > 0 else np.arange(ranks)
    slots = np.arange(moe.experts)
    places = touch_probability(moe, np.full(moe.experts, 1 / moe.experts), slots, owners[slots * ranks // moe.experts],
                               int(owners.max()) + 1).sum()
    token_bytes = costs.model.hidden * (1.0 + 4 / 128 if phase == 0 else 2.0)
    return Found.near(tokens * token_bytes * float(places) / seconds / 1e9, _COMM_WIDTH, "calibrated")


def logical_bandwidth(record: Record) -> Found | str:
    """DeepEP V2's bandwidth: bytes a second that a rank sends to nodes or, inside one, to ranks, its own counted: what the NIC
    or NVLink reaches and as much more as never leaves."""
    ranks = int(record.get("ep") or record["gpus"])
    cluster = cluster_of(record, ranks)
    protocol = PROTOCOLS["deepep_normal"]
    phase = protocol.combine if str(record["metric"]).startswith("combine") else protocol.dispatch
    network = Network(cluster)
    places = len(np.unique(network.domain_of[:ranks]))
    rate = phase.nvlink * cluster.network.nvlink_bytes_per_s if places == 1 else phase.rdma * cluster.network.nic_bytes_per_s
    places = places if places > 1 else ranks
    return Found.near(rate * places / (places - 1) / 1e9, _COMM_WIDTH, "calibrated")


def bus_bandwidth(record: Record) -> Found | str:
    """GB/s that nccl-tests calls the bus bandwidth of an all-to-all: what leaves a GPU, per second."""
    size = re.search(r"(\d+)\s*(k|m|g)ib", str(record["metric"]).lower())
    if size is None:
        return "states no message size"
    n_bytes = float(size[1]) * {"k": 2.0**10, "m": 2.0**20, "g": 2.0**30}[size[2]]
    ranks = int(record["gpus"])
    cluster, phase = cluster_of(record, ranks), PROTOCOLS["nccl"].dispatch
    network = Network(cluster)
    traffic = np.full((ranks, ranks), n_bytes / ranks)
    links = network.link_bytes(traffic, range(ranks))
    rate = network.capacity * np.where(network.nvlink_links, phase.nvlink, phase.rdma)
    seconds = float((links / rate).max()) + phase.base_s + (phase.remote_s if links[~network.nvlink_links].any() else 0.0)
    return Found.near(n_bytes * (ranks - 1) / ranks / seconds / 1e9, 0.25, "calibrated")


def collective(record: Record) -> Found | str:
    """Milliseconds of one NCCL collective."""
    name = str(record.get("op") or record.get("op_name") or record.get("id", ""))
    plain = name.replace("_", "").replace("-", "")
    kinds = ("all_gather", "reduce_scatter", "all_reduce", "alltoall")
    kind = next((k for k in kinds if k.replace("_", "") in plain), None)
    size = record.get("message_bytes") or record.get("size_bytes")
    if kind is None or size is None:
        return "states no operation or size in bytes"
    gpus = int(record.get("gpus") or 8)
    cluster = cluster_of({**record, "network": ""}, gpus)
    plan = Plan(pools=(PoolPlan(role="mixed"),), engine="sglang")
    interpolator = evidence().interpolator(cluster.groups[0].gpu, cluster.network, plan)
    curve = interpolator.curve({"alltoall": "all_to_all"}.get(kind, kind), {"gpus": float(gpus)}, {"backend": "nccl"}) \
        if interpolator is not None and gpus <= cluster.network.nvlink_domain_gpus else None
    if curve is not None:
        one = curve.estimate(float(size))
        return Found(one.seconds * 1e3, one.low_s * 1e3, one.high_s * 1e3, (str(one.source),))
    network = Network(cluster)
    ask = network.all_reduce_s if kind == "all_reduce" else network.all_gather_s
    return Found.near((ask(float(size) / TP_EFFICIENCY, np.arange(gpus)) + TP_BASE_S) * 1e3, 0.3, "calibrated")


def kv_transfer(record: Record) -> Found | str:
    """Milliseconds to hand a prompt's KV from one instance to another on the next node. A model and a prompt say the bytes better
    than a rounded size of unknown unit; heads are replicated where TP exceeds them."""
    tp = int(record.get("tp") or 1)
    if record.get("model") and record.get("isl"):
        model = model_named(record)
        copies = 1 if model.attention.kind == "mla" else tp
        kv = "fp8" if "fp8 kv" in str(record.get("precision", "")).lower() else "bf16"
        size = float(record["isl"]) * model.kv_bytes_per_token(kv, tp=tp) * copies  # type: ignore[arg-type]
    elif record.get("size_bytes") or "kv_mb" in record:
        size = float(record.get("size_bytes") or record["kv_mb"] * 2.0**20)
    else:
        return "states neither bytes nor a model and a prompt"
    name = preset_of(record) if record.get("gpu") else "h100"
    per_node = load_cluster(name).groups[0].gpus_per_node
    wide = max(per_node, tp)
    cluster = cluster_of({**record, "gpu": record.get("gpu") or "h100"}, 2 * wide)
    network = Network(cluster)
    seconds = kv_transfer_s(network, range(tp), range(wide, wide + tp), size)
    return Found.near(seconds * 1e3, _KV_WIDTH, "calibrated")


def kv_bytes(record: Record) -> Found | str:
    """Bytes of one token's KV."""
    kv = "fp8" if "fp8" in str(record["metric"]) else "bf16"
    value = model_named(record).kv_bytes_per_token(kv, tp=1)  # type: ignore[arg-type]
    return Found(float(value), float(value), float(value), ("measured",))


def product_rate(record: Record) -> Found | str:
    """TFLOP/s of one dense fp8 product, from the profile's tables."""
    sides = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", str(record.get("NK", "")))
    if sides is None or "M" not in record:
        return "not one dense product of stated sizes"
    m, n, k = float(record["M"]), float(sides[1]), float(sides[2])
    cluster = cluster_of(record, 1)
    plan = Plan(pools=(PoolPlan(role="mixed"),), engine="sglang")
    interpolator = evidence().interpolator(cluster.groups[0].gpu, cluster.network, plan)
    curve = interpolator.curve("gemm", {"k": k, "n": n}, {"dtype": "fp8_block"}) if interpolator is not None else None
    if curve is None:
        return "no table of products covers this GPU"
    one, flops = curve.estimate(m), 2 * m * n * k / 1e12
    return Found(flops / one.seconds, flops / one.high_s, flops / one.low_s, (str(one.source),))
