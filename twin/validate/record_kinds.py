"""How the twin answers each kind of published record, in the record's own unit.

An answerer takes the record and returns a `Found`, or a sentence that says why it cannot be answered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from twin.cost.batch import StepBatch, StepCost
from twin.cost.comm import kv_transfer_s
from twin.cost.evidence import Evidence
from twin.cost.model import CostModel
from twin.cost.network import Network
from twin.cost.protocols import TP_BASE_S, TP_EFFICIENCY
from twin.cost.routing import popularity
from twin.spec.cluster import ClusterSpec
from twin.spec.errors import SpecError
from twin.spec.load import load_cluster
from twin.spec.plan import Plan, PoolPlan, Precision
from twin.spec.scenario import Routing
from twin.validate.answer import Answers
from twin.validate.rows import Row, Unanswered, question_of
from twin.validate.words import model_of

Record = Mapping[str, Any]
_FP8 = Precision(weights="fp8_block", experts="fp8_block", kv="bf16", dispatch="fp8")
_EVEN = Routing()
# Popularity of DeepSeek-V3's experts in prefill: the most popular of 256 gets 8 times the mean (lognormal of sigma 0.89), of
# which EPLB leaves the fullest of 32 ranks 1 / 0.80 of the mean (sigma 0.32 without it).
_UNBALANCED, _AS_EPLB_LEAVES_IT = Routing(kind="lognormal", sigma=0.89), Routing(kind="lognormal", sigma=0.32)
_COMM_WIDTH, _KV_WIDTH, _SKEW_WIDTH = 0.15, 0.20, 0.12  # half widths of 80% intervals, from their own tables


@dataclass(frozen=True)
class Found:
    """A prediction in the record's unit, its 80% interval and its sources."""

    value: float
    low: float
    high: float
    sources: tuple[str, ...]

    @classmethod
    def near(cls, value: float, width: float, source: str) -> Found:
        return cls(value, value / (1 + width), value * (1 + width), (source,))


def kind_of(record: Record) -> str:
    """The kind of record, by its metric and what it is about."""
    metric, unit = record["metric"], str(record.get("unit", ""))
    if metric in ("input_throughput", "output_throughput", "throughput") and "tok/s" in unit:
        return "throughput"
    if re.fullmatch(r"(prefill|decode)_layer_time_\w+", metric):
        return "layer"
    if re.fullmatch(r"(dispatch|combine)(_p50)?_latency", metric):
        return "exchange latency"
    if re.fullmatch(r"(dispatch|combine)_bottleneck_bandwidth", metric):
        return "exchange bandwidth"
    if metric == "latency" and record.get("model") == "nccl":
        return "collective"
    names = {"kv_transfer_time": "kv transfer", "tpot": "serving", "ttft": "serving", "itl": "step",
             "balancedness_mean_over_max_gpu_load": "balance", "per_gpu_max_over_mean_random_placement": "balance"}
    return names.get(metric, "other")


# --- words of a record
def _gpu(record: Record) -> str:
    """Cluster preset of `gpu: H100-80G` and the like. Raises SpecError for one that is not known."""
    name = re.split(r"[-/ ]", str(record.get("gpu") or ""))[0].lower()
    presets = {"h100": "h100", "h200": "h200", "h800": "h800", "h20": "h20-96g", "b200": "b200", "b300": "b300", "a100": "a100",
               "gb200": "gb200-nvl72", "gb300": "gb300-nvl72"}
    if name not in presets:
        raise SpecError(f"GPU {record.get('gpu')!r} is not known", expected=", ".join(presets))
    return presets[name]


def _cluster(record: Record, ranks: int) -> ClusterSpec:
    name = _gpu(record)
    group = load_cluster(name).groups[0]
    return load_cluster(f"{name}-{-(-ranks // group.gpus_per_node)}x{group.gpus_per_node}")


def _number(value: Any) -> float:
    """The first number of `16384 tok/GPU`."""
    match = re.search(r"\d+(\.\d+)?", str(value).replace(",", ""))
    if match is None:
        raise ValueError(f"batch_per_gpu: {value}")
    return float(match[0])


def _features(record: Record) -> Mapping[str, Any]:
    """What was switched on. Wide EP that states nothing overlaps batches and balances experts, as published ones do."""
    found = record.get("features")
    if isinstance(found, Mapping):
        return found
    return {"TBO": True, "EPLB": True} if int(record.get("ep") or 1) >= 32 else {}


def _engine(record: Record) -> str:
    text = f"{record.get('backend', '')} {record.get('source', '')} {record.get('id', '')}".lower()
    return "vllm" if "vllm" in text or "llm-d" in text else "trtllm" if "trt" in text else "sglang"


@lru_cache(maxsize=1)
def _evidence() -> Evidence:
    return Evidence.load()


def _pool(record: Record) -> tuple[CostModel, StepBatch, float]:
    """The instance of a wide-EP record, its step, and the tokens a rank gains in one."""
    features, phase = _features(record), str(record["phase"])
    ep = int(record["ep"])
    tbo = bool(features.get("TBO") or features.get("DBO"))
    eplb = (features.get("EPLB") is not False and phase == "decode") or "perfect" in str(record.get("id", ""))
    drafts = 1 if (features.get("MTP") or (ep == 128 and "MTP" not in features)) and phase == "decode" else 0
    redundant = int(features.get("redundant_experts", 32 if eplb and ep % 32 == 0 else 0) if eplb else 0)
    model = model_of(str(record["model"]).split(" ")[0].split("/")[0])
    if model.moe is not None and (model.moe.experts + redundant) % ep:
        redundant = -model.moe.experts % ep
    pool = PoolPlan(role="prefill" if phase == "prefill" else "decode", dp=ep, ep=ep, tbo=tbo, redundant_experts=redundant,
                    placement="eplb_global" if eplb else "linear", mtp_draft_tokens=drafts, mtp_acceptance=0.6,
                    max_batch_tokens=32768)
    other = PoolPlan(role="decode" if phase == "prefill" else "prefill")
    plan = Plan(pools=(pool, other), precision=_FP8, engine=_engine(record))  # type: ignore[arg-type]
    words = f"{record.get('id', '')} {record.get('note', '')}"
    profile = any(word in words for word in ("profile", "infersim", "simulat"))
    routing = _EVEN if eplb or profile or model.moe is None else _AS_EPLB_LEAVES_IT
    costs = CostModel(model, _cluster(record, ep), plan, pool, routing=routing, profile=_evidence())
    long = phase == "prefill" or profile or drafts
    isl, osl = float(record.get("isl") or (4096 if long else 2000)), float(record.get("osl") or 0)
    if phase == "prefill":
        tokens = _number(record.get("batch_per_gpu") or 16384)
        return costs, StepBatch.prefill([tokens], 0, max(1.0, tokens / isl)), tokens
    if "batch_per_gpu" not in record and ep == 128:
        record = {**record, "batch_per_gpu": 128}  # DeepSeek's profile, the one deployment of this size
    seqs = _number(record["batch_per_gpu"])
    scaled = re.search(r"scaled to (\d+) tok/GPU", str(record.get("unit")))
    if scaled and drafts:
        seqs = float(scaled[1]) / (1 + drafts)
    return costs, StepBatch.decode([seqs], [seqs * (isl + osl / 2)]), seqs * costs.tokens_per_step


def _sources(step: StepCost) -> tuple[str, ...]:
    return tuple(sorted(set(map(str, step.sources.values()))))


def throughput(record: Record) -> Found | str:
    """Tokens a second of one step repeated, a GPU or a node."""
    if "ep" not in record or record.get("phase") not in ("prefill", "decode"):
        return "states no EP size or phase: a throughput without its deployment"
    costs, batch, tokens = _pool(record)
    step = costs.step(batch)
    scale = tokens * (costs.cluster.groups[0].gpus_per_node if "node" in str(record.get("unit")) else 1)
    return Found(scale / step.total_s, scale / step.high_s, scale / step.low_s, _sources(step))


def step_time(record: Record) -> Found | str:
    """Milliseconds between tokens of a decode pool."""
    costs, batch, _ = _pool(record)
    step = costs.step(batch)
    per = 1e3 / costs.tokens_per_step
    return Found(step.total_s * per, step.low_s * per, step.high_s * per, _sources(step))


_PARTS: dict[str, tuple[str, ...]] = {
    "dispatch": ("moe/dispatch/",), "dispatch_core": ("moe/dispatch/nvlink", "moe/dispatch/rdma", "moe/dispatch/latency"),
    "combine": ("moe/combine/",), "combine_core": ("moe/combine/nvlink", "moe/combine/rdma", "moe/combine/latency"),
    "moe_gemm": ("moe/experts",), "attention": ("attention/prefill", "attention/kv_read"),
    "attention_core": ("attention/kv_read", "attention/prefill"),
    "other_gemm": ("attention/projections", "attention/kv_up", "attention/absorb", "moe/shared"),
    "other": ("norm", "moe/permute", "moe/gate", "attention/kv_write"), "overall": ("",)}


def layer(record: Record) -> Found | str:
    """Milliseconds of one MoE layer's part."""
    part = re.sub(r"^(prefill|decode)_layer_time_", "", str(record["metric"]))
    if part not in _PARTS:
        return f"{part}: waiting and launching are not parts of their own in the twin"
    if "slow" in str(record.get("id", "")) or "unit_test" in str(record.get("id", "")):
        return "a kernel run apart or slowed on purpose, not a deployment"
    costs, batch, _ = _pool(record)
    step = costs.step(batch)
    chosen = {k: v for k, v in step.parts_s.items() if k.startswith(_PARTS[part]) and not k.startswith(("host", "mtp"))}
    if part == "overall":
        chosen = {k: v for k, v in chosen.items() if k not in ("head", "sampling", "embedding", "ffn/dense")}
    layers = costs.model.moe_layers if part in ("dispatch", "combine", "moe_gemm", "dispatch_core", "combine_core") \
        else costs.model.layers
    value = sum(chosen.values()) / layers * 1e3
    if part in ("moe_gemm", "dispatch", "dispatch_core") and costs.pool.placement == "linear" and costs.pool.role == "prefill":
        # traces show a usual rank: what the fullest takes longer, the others wait for in the next exchange
        even, _, _ = _pool({**record, "id": f"{record.get('id', '')} profile"})
        waits = (step.parts_s["moe/experts"] - even.step(batch).parts_s["moe/experts"]) / costs.model.moe_layers * 1e3
        value += -waits if part == "moe_gemm" else waits
    if costs.pool.tbo and costs.pool.role == "decode" and part in ("dispatch", "combine"):
        value *= costs.site.protocol.unhidden  # what the other half batch hides is not in a profile's time
    width = max(0.1, step.high_s / step.total_s - 1)
    return Found(value, value / (1 + width), value * (1 + width), tuple(sorted({str(step.sources[k]) for k in chosen})))


def _exchange(record: Record, backend: str) -> tuple[CostModel, int, float]:
    """Cost model of an all-to-all test, which phase it measures, and tokens a rank."""
    ranks = int(record.get("ep") or record["gpus"])
    model = model_of("deepseek-v3")
    assert model.moe is not None
    nodes = int(record.get("nodes") or -(-ranks // 8))
    experts = int(record.get("experts") or 256)
    groups = nodes if experts % nodes == 0 else 1
    moe = model.moe.model_copy(update={"experts": experts, "top_k": int(record.get("topk") or 8), "groups": groups,
                                       "top_k_groups": min(groups, 4)})
    model = model.model_copy(update={"moe": moe, "hidden": int(record.get("hidden") or 7168)})
    pool = PoolPlan(role="decode", dp=ranks, ep=ranks, comm=backend)  # type: ignore[arg-type]
    plan = Plan(pools=(pool, PoolPlan(role="prefill")), precision=_FP8, engine="sglang")
    cluster = _cluster(record, ranks)
    if backend == "deepep_low_latency" and str(record.get("date", "9")) < "2025-06":
        # before June 2025 low latency sent everything over RDMA, inside a node too
        cluster = cluster.model_copy(update={"network": cluster.network.model_copy(update={"nvlink_domain_gpus": 1})})
    costs = CostModel(model, cluster, plan, pool)
    return costs, 1 if str(record["metric"]).startswith("combine") else 0, _number(record["tokens_per_gpu"])


def exchange_latency(record: Record) -> Found | str:
    """Microseconds of one dispatch or combine of DeepEP."""
    text = f"{record.get('id', '')} {record.get('model', '')} {record.get('source', '')}".lower()
    if "deepep" not in text:
        return "another library's all-to-all: the twin has DeepEP's"
    normal = "normal" in text or _number(record["tokens_per_gpu"]) > 1024  # low latency keeps a slot for every token
    costs, phase, tokens = _exchange(record, "deepep_normal" if normal else "deepep_low_latency")
    nvlink_s, rdma_s = costs.exchanges[phase][1].seconds(np.array([tokens]))
    return Found.near((float(nvlink_s + rdma_s) + costs.exchanges[phase][1].fixed_s) * 1e6, _COMM_WIDTH, "calibrated")


def exchange_bandwidth(record: Record) -> Found | str:
    """DeepEP V1's bottleneck bandwidth: bytes that a rank sends (once a node) or receives (once a rank), per second."""
    costs, phase, tokens = _exchange(record, "deepep_normal")
    nvlink_s, rdma_s = costs.exchanges[phase][1].seconds(np.array([tokens]))
    seconds = float(nvlink_s + rdma_s) + costs.exchanges[phase][1].fixed_s
    moe, ranks = costs.model.moe, costs.pool.ep
    assert moe is not None
    token_bytes = costs.model.hidden * (1.0 + 4 / 128 if phase == 0 else 2.0)
    places = min(moe.top_k_groups, moe.groups) if ranks > 8 else ranks * -np.expm1(moe.top_k * np.log1p(-1.0 / ranks))
    return Found.near(tokens * token_bytes * places / seconds / 1e9, _COMM_WIDTH, "calibrated")


def collective(record: Record) -> Found | str:
    """Milliseconds of one NCCL collective inside a node."""
    name = str(record.get("op") or record.get("op_name") or record.get("id", ""))
    plain = name.replace("_", "").replace("-", "")
    kinds = ("all_gather", "reduce_scatter", "all_reduce", "alltoall")
    kind = next((k for k in kinds if k.replace("_", "") in plain), None)
    size = record.get("message_bytes") or record.get("size_bytes")
    if kind is None or size is None:
        return "states no operation or size in bytes"
    gpus = int(record.get("gpus") or 8)
    cluster = _cluster(record, gpus)
    plan = Plan(pools=(PoolPlan(role="mixed"),), engine="sglang")
    interpolator = _evidence().interpolator(cluster.groups[0].gpu, cluster.network, plan)
    curve = interpolator.curve({"alltoall": "all_to_all"}.get(kind, kind), {"gpus": float(gpus)}, {"backend": "nccl"}) \
        if interpolator is not None and gpus <= cluster.network.nvlink_domain_gpus else None
    if curve is not None:
        one = curve.estimate(float(size))
        return Found(one.seconds * 1e3, one.low_s * 1e3, one.high_s * 1e3, (str(one.source),))
    network = Network(cluster)
    ask = network.all_reduce_s if kind == "all_reduce" else network.all_gather_s
    return Found.near((ask(float(size) / TP_EFFICIENCY, np.arange(gpus)) + TP_BASE_S) * 1e3, 0.3, "calibrated")


def kv_transfer(record: Record) -> Found | str:
    """Milliseconds to hand a prompt's KV from one instance to another on the next node."""
    tp = int(record.get("tp") or 1)
    size = record.get("size_bytes") or (record["kv_mb"] * 1e6 if "kv_mb" in record else None)
    if size is None:
        if "model" not in record or "isl" not in record:
            return "states neither bytes nor a model and a prompt"
        model = model_of(str(record["model"]))
        copies = 1 if model.attention.kind == "mla" else tp  # heads are replicated where TP exceeds them
        size = float(record["isl"]) * model.kv_bytes_per_token("bf16", tp=tp) * copies
    cluster = load_cluster(f"{_gpu(record) if record.get('gpu') else 'h100'}-2x8")
    speed = re.search(r"(\d+)\s*Gb/s", str(record.get("network", "")))
    if speed and "x" not in str(record["network"]).split("Gb")[0]:
        network = cluster.network.model_copy(update={"nic_bytes_per_s": float(speed[1]) * 1e9 / 8})
        cluster = cluster.model_copy(update={"network": network})
    seconds = kv_transfer_s(Network(cluster), range(tp), range(8, 8 + tp), float(size))
    return Found.near(seconds * 1e3, _KV_WIDTH, "calibrated")


def balance(record: Record) -> Found | str:
    """How even ranks are loaded: expected over random placements of experts whose popularity is DeepSeek-V3's in prefill."""
    if _features(record).get("EPLB"):
        return "balance under EPLB depends on how the load drifted since the experts were placed, which the record does not say"
    ranks = int(record.get("ep") or record["gpus"])
    model = model_of("deepseek-v3")
    shares = popularity(model, _UNBALANCED, 0)
    rng = np.random.default_rng(np.random.SeedSequence([0, ranks]))
    loads = np.stack([rng.permutation(row).reshape(ranks, -1).sum(axis=1) for row in shares])
    excess = loads.max(axis=1) * ranks
    value = float((1 / excess).mean() if "mean_over_max" in str(record["metric"]) else excess.mean())
    return Found.near(value, _SKEW_WIDTH, "calibrated")


def serving(record: Record) -> Found | str:
    """Mean TTFT or TPOT of a closed loop, as of a row of the CSV tables."""
    backend = str(record.get("backend") or "").lower()
    engine = next((e for e in ("sglang", "vllm") if e in backend), "trtllm" if "trt" in backend else None)
    if engine is None or "isl" not in record or "osl" not in record or "concurrency" not in record:
        return "states no engine, lengths or concurrency: not a serving test the twin can repeat"
    texts = {"id": str(record.get("id", "")), "backend": engine, "backend_version": backend.split()[-1], "mode": "agg",
             "model_path": str(record["model"]).split("/")[0], "system": f"{str(record['gpu']).lower()}_sxm",
             "precision": "fp4" if "fp4" in str(record.get("precision", "")).lower() else "fp8", "gemm_quant_mode": "",
             "moe_quant_mode": "", "silicon_data_source": ""}
    numbers: dict[str, float] = {"isl": float(record["isl"]), "osl": float(record["osl"])}
    if isinstance(record.get("prefill"), Mapping):
        texts["mode"] = "disagg"
        for role in ("prefill", "decode"):
            _side(numbers, role, record[role])
        side = record["decode"]
        numbers["decode_batch_size"] = float(record["concurrency"]) / (side.get("attn_dp", 1) * side.get("workers", 1))
    else:
        tp, dp, ep = (int(record.get(k) or 1) for k in ("tp", "dp", "ep"))
        numbers |= {"tp_size": tp, "attention_dp_size": dp, "moe_ep_size": ep, "moe_tp_size": max(1, tp * dp // ep),
                    "batch_size": float(record["concurrency"]) / dp}
    question = question_of(Row(0, texts, numbers, {}))
    if isinstance(question, Unanswered):
        return question.reason
    answer = Answers().answer(question)
    seconds = (answer.tpot_s, answer.tpot_low_s, answer.tpot_high_s) if record["metric"] == "tpot" else (
        answer.ttft_s, answer.ttft_low_s, answer.ttft_high_s)
    value, low, high = (s * 1e3 for s in seconds)
    return Found(value, low, high, tuple(sorted(set(answer.sources.values()))))


def _side(numbers: dict[str, float], role: str, side: Mapping[str, Any]) -> None:
    tp, dp, ep = (int(side.get(k) or 1) for k in ("tp", "attn_dp", "ep"))
    numbers |= {f"{role}_num_workers": float(side.get("workers", 1)), f"{role}_tp_size": tp, f"{role}_attention_dp_size": dp,
                f"{role}_moe_ep_size": ep, f"{role}_moe_tp_size": max(1, tp * dp // ep), f"{role}_batch_size": 1.0}


ANSWERS: Mapping[str, Callable[[Record], Found | str]] = {
    "throughput": throughput, "step": step_time, "layer": layer, "exchange latency": exchange_latency,
    "exchange bandwidth": exchange_bandwidth, "collective": collective, "kv transfer": kv_transfer, "balance": balance,
    "serving": serving}
