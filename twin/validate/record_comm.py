"""Records of single exchanges, collectives and hand-overs: what one library call takes."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from twin.cost.build import exchanges
from twin.cost.comm import Exchange, kv_transfer_s
from twin.cost.model import CostModel
from twin.cost.network import Network
from twin.cost.protocols import LIBRARIES, PROTOCOLS, TP_BASE_S, TP_EFFICIENCY, Protocol
from twin.cost.routing import touch_probability
from twin.spec.load import load_cluster
from twin.spec.plan import Plan, PoolPlan, Precision
from twin.validate.record_pools import evidence
from twin.validate.record_units import per_second, unit_bytes
from twin.validate.record_words import (
    Found,
    Record,
    before,
    cluster_of,
    model_named,
    number,
    on_first_kernels,
    preset_of,
    text_of,
)
from twin.validate.words import model_of

_FP8 = Precision(weights="fp8_block", experts="fp8_block", kv="bf16", dispatch="fp8")
_COMM_WIDTH, _OTHER_WIDTH, _KV_WIDTH = 0.15, 0.35, 0.20  # half widths of 80% intervals, from their own tables
_NCCL_GPUS = 8  # the most that tables of NCCL have
_SECOND_KERNELS = {"deepep_normal": "2025-04", "deepep_low_latency": "2025-06"}  # months from which its own tests time them
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
    sent = _FP8.model_copy(update={"dispatch": _dispatch_format(record)})
    plan = Plan(pools=(pool, PoolPlan(role="prefill")), precision=sent, engine="sglang")
    if backend.startswith("deepep") and before(record, _SECOND_KERNELS[backend]):
        cluster = on_first_kernels(cluster, normal=backend == "deepep_normal")
    return CostModel(model, cluster, plan, pool), number(record["tokens_per_gpu"])


def _library(record: Record, tokens: float) -> str:
    """Which all-to-all a record is about: a protocol's name. Raises ValueError for one that the twin has not."""
    text = f"{text_of(record)} {record.get('model', '')} {record.get('library', '')}".lower()
    metric = str(record["metric"]).lower()
    if "deepep" in text:
        return "deepep_normal" if "normal" in text or "high throughput" in text or tokens > 1024 else "deepep_low_latency"
    if "pplx-garden" in text or "pplxgarden" in text or "fabric-lib" in text or "pplxefa" in text or "pplx-efa" in text:
        return "pplx_efa" if "efa" in f"{record.get('network', '')} {record.get('id', '')}".lower() else "pplx"
    if re.search(r"pplx[- ]kernels", text):
        raise ValueError("library: kernels that its own authors replaced, slower on fewer ranks")
    if re.search(r"mnnvl|one[- ]sided|trt|tensorrt|flashinfer", text):
        return "symm"
    if re.search(r"mooncake|nixl|uccl|mori", text):
        return "deepep_low_latency"  # they keep its interface and send the same copies
    if metric.startswith("torch"):
        raise ValueError("library: a host's all_to_all with split sizes, mostly the host's own time")
    if re.search(r"nccl|rccl", text):
        return "nccl"
    return "deepep_low_latency" if tokens <= 1024 else "deepep_normal"


def exchange_latency(record: Record) -> Found | str:
    """Time of one dispatch or combine, or of both."""
    metric, tokens = str(record["metric"]).lower(), number(record["tokens_per_gpu"])
    library = _library(record, tokens)
    costs, tokens = _exchange(record, library if library in PROTOCOLS else "deepep_low_latency")
    made = _made(costs, PROTOCOLS.get(library) or LIBRARIES[library])
    if not made:
        return "one rank exchanges nothing"
    seconds = 0.0
    for name, exchange in made:
        if name in metric or not re.search("dispatch|combine", metric):
            nvlink_s, rdma_s = exchange.seconds(np.array([tokens]))
            called = _CALL_S if library == "deepep_normal" and name == "dispatch" and "p50" in metric else 0.0
            seconds += float(nvlink_s + rdma_s) + exchange.fixed_s + called
    known = library in ("deepep_normal", "deepep_low_latency", *LIBRARIES) and "gb" not in str(record.get("gpu", "")).lower()
    return Found.near(seconds * per_second(record, "us"), _COMM_WIDTH if known else _OTHER_WIDTH, "calibrated")


def _made(costs: CostModel, protocol: Protocol) -> tuple[tuple[str, Exchange], ...]:
    """Dispatch and combine of a library by itself, named."""
    found = exchanges(replace(costs.site, protocol=protocol.tested))
    return tuple((name, exchange) for name, exchange in zip(("dispatch", "combine"), found, strict=True) if exchange is not None)


def copies_bandwidth(record: Record) -> Found | str:
    """GB/s of a low-latency exchange: bytes of all copies, a rank's own counted, over its time."""
    tokens = number(record["tokens_per_gpu"])
    seconds = exchange_latency({**record, "metric": re.sub(r"(_rdma|_nvlink)?_bandwidth", "_latency", str(record["metric"])),
                                "unit": "s"})
    if isinstance(seconds, str):
        return seconds
    dispatch = "dispatch" in str(record["metric"])
    element = 2.0 if not dispatch or _dispatch_format(record) == "bf16" else 1.0 + 4 / 128
    n_bytes = tokens * int(record.get("topk") or 8) * int(record.get("hidden") or 7168) * element
    return Found(n_bytes / seconds.value / 1e9, n_bytes / seconds.high / 1e9, n_bytes / seconds.low / 1e9, seconds.sources)


def _dispatch_format(record: Record) -> str:
    return "bf16" if re.search(r"bf16[ _-]*dispatch|dispatch[ _:-]*bf16", f"{record.get('precision', '')}".lower()) or \
        str(record.get("precision", "")).strip().lower() == "bf16" else "fp8"


def exchange_bandwidth(record: Record) -> Found | str:
    """DeepEP V1's bottleneck bandwidth: bytes a second that a rank sends to nodes (its own counted) or, inside one, to ranks."""
    costs, tokens = _exchange(record, "deepep_normal")
    phase = 1 if str(record["metric"]).startswith("combine") else 0
    exchange = _made(costs, costs.site.protocol)[phase][1]
    nvlink_s, rdma_s = exchange.seconds(np.array([tokens]))
    seconds = float(nvlink_s + rdma_s) + exchange.fixed_s
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
    """GB/s that nccl-tests call the bus bandwidth of a collective (what a GPU sends, whatever the algorithm), or its size over
    its time where the record says algbw."""
    metric = str(record["metric"]).lower()
    size = re.search(r"(\d+)\s*(k|m|g)i?b", metric)
    n_bytes = float(size[1]) * {"k": 2.0**10, "m": 2.0**20, "g": 2.0**30}[size[2]] if size else _size(record)
    ranks = int(record["gpus"])
    kind = _operation(metric) or _operation(str(record.get("op") or record.get("id", "")))
    if n_bytes is None or kind is None:
        return "states no operation or size in bytes"
    found = _collective_s(record, kind, n_bytes, ranks)
    sent = {"all_reduce": 2.0}.get(kind, 1.0) * (ranks - 1) / ranks if "alg" not in metric else 1.0
    return Found(*(n_bytes * sent / s / 1e9 for s in (found.value, found.high, found.low)), found.sources)


def _operation(text: str) -> str | None:
    plain = re.sub(r"[^a-z0-9]", "", text.lower())
    kinds = {"allgather": "all_gather", "reducescatter": "reduce_scatter", "allreduce": "all_reduce", "alltoall": "all_to_all"}
    return next((kind for word, kind in kinds.items() if word in plain), None)


def _size(record: Record) -> float | None:
    size = record.get("message_bytes") or record.get("size_bytes")
    return None if size is None else float(size)


def collective(record: Record) -> Found | str:
    """Time of one NCCL collective; the unit is ms where none is stated."""
    named = str(record.get("op") or record.get("op_name") or "")
    kind = _operation(named) or _operation(f"{record.get('id', '')} {record['metric']}")
    size = _size(record)
    if kind is None or size is None:
        return "states no operation or size in bytes"
    found, scale = _collective_s(record, kind, size, int(record.get("gpus") or 8)), per_second(record, "ms")
    return Found(found.value * scale, found.low * scale, found.high * scale, found.sources)


def _collective_s(record: Record, kind: str, size: float, gpus: int) -> Found:
    """Seconds: from the tables of one domain, else the graph's at the rate that collectives reach."""
    cluster = cluster_of(record if gpus > 8 else {**record, "network": ""}, gpus)
    plan = Plan(pools=(PoolPlan(role="mixed"),), engine="sglang")
    interpolator = evidence().interpolator(cluster.groups[0].gpu, cluster.network, plan)
    near = interpolator is not None and gpus <= min(cluster.network.nvlink_domain_gpus, _NCCL_GPUS)
    curve = interpolator.curve(kind, {"gpus": float(gpus)}, {"backend": "nccl"}) if interpolator is not None and near else None
    if curve is not None:
        one = curve.estimate(size)
        return Found(one.seconds, one.low_s, one.high_s, (str(one.source),))
    network, ranks = Network(cluster), np.arange(gpus)
    if kind == "all_to_all":
        phase = PROTOCOLS["nccl"].dispatch
        links = network.link_bytes(np.full((gpus, gpus), size / gpus), ranks)
        rate = network.capacity * np.where(network.nvlink_links, phase.nvlink, phase.rdma)
        fixed_s = phase.base_s + (phase.remote_s if links[~network.nvlink_links].any() else 0.0)
        return Found.near(float((links / rate).max()) + fixed_s, 0.3, "calibrated")
    ask = network.all_reduce_s if kind == "all_reduce" else network.all_gather_s
    return Found.near(ask(size / TP_EFFICIENCY, ranks) + TP_BASE_S, 0.3, "calibrated")


def kv_transfer(record: Record) -> Found | str:
    """Time to hand a prompt's KV from one instance to another on the next node."""
    found = _hand_over(record)
    if isinstance(found, str):
        return found
    return Found.near(found[1] * per_second(record, "ms"), _KV_WIDTH, "calibrated")


def kv_bandwidth(record: Record) -> Found | str:
    """GB/s of a hand-over: its bytes over its time."""
    found = _hand_over(record)
    if isinstance(found, str):
        return found
    return Found.near(found[0] / found[1] / unit_bytes(record, "gb"), _KV_WIDTH, "calibrated")


def _hand_over(record: Record) -> tuple[float, float] | str:
    """(bytes, seconds). A model and a prompt say the bytes better than a rounded size of unknown unit; heads are replicated
    where TP exceeds them."""
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
    return size, kv_transfer_s(network, range(tp), range(wide, wide + tp), size)
