"""How the twin answers each kind of published record, in the record's own unit.

An answerer takes the record and returns a `Found`, or a sentence that says why it cannot be answered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

from twin.cost.batch import StepCost
from twin.cost.routing import popularity
from twin.spec.model import ModelSpec
from twin.spec.scenario import Routing
from twin.validate.answer import Answers
from twin.validate.record_comm import (
    bus_bandwidth,
    collective,
    exchange_bandwidth,
    exchange_latency,
    kv_bytes,
    kv_transfer,
    logical_bandwidth,
    product_rate,
)
from twin.validate.record_pools import DRIFT, Asked, asked, expert_loads, rank_excess, redundant_slots, usual_share
from twin.validate.record_words import Found, Record, model_named, stated, text_of
from twin.validate.rows import Row, Unanswered, question_of
from twin.validate.words import model_of

# Popularity in the load matrix of DeepSeek-V3's prefill, which "random placement" records read: the most popular of 256 gets 8
# times the mean.
_MATRIX = Routing(kind="lognormal", sigma=0.89)
_GAIN_WIDTH = 1.05  # times the ratio of throughputs
_SKEW_WIDTH = 0.12  # half width of the 80% interval, from its own records

_KINDS = (
    (r"(prefill|decode)_layer_time_\w+", "layer"),
    (r"(dispatch|combine|dispatch\+combine)(_p50)?_latency", "exchange latency"),
    (r"(dispatch|combine)_bottleneck_bandwidth", "exchange bandwidth"),
    (r"(dispatch|combine)_logical_bandwidth", "logical bandwidth"),
    (r"nccl_alltoall_busbw\w*", "bus bandwidth"),
    (r"kv_transfer_time\w*", "kv transfer"),
    (r"kv_cache_bytes_per_token\w*", "kv bytes"),
    (r"(tpot|ttft)\w*", "serving"),
    (r"itl\w*|(decode_)?step_time\w*", "step"),
    (r"(tbo|dbo|two_batch_overlap)_(gain|speedup)\w*", "tbo gain"),
    (r"balancedness\w*|per_gpu_max_over_mean\w*|imbalance_ratio.*", "balance"),
    (r"fp8_tflops", "product"),
)


def kind_of(record: Record) -> str:
    """The kind of record, by its metric and what it is about."""
    metric, unit = record["metric"].lower(), str(record.get("unit", "")).lower()
    if "throughput" in metric and re.search(r"tok\w*\s*/\s*s|tok\w* per s|tps", unit):
        return "throughput"
    if metric == "latency" and record.get("model") == "nccl":
        return "collective"
    return next((kind for pattern, kind in _KINDS if re.fullmatch(pattern, metric)), "other")


def _sources(step: StepCost, ask: Asked) -> tuple[str, ...]:
    return tuple(sorted({*map(str, step.sources.values()), *(["assumed"] if ask.assumed else [])}))


def throughput(record: Record) -> Found | str:
    """Tokens a second of one step repeated: a GPU, a node, an instance or a user, as the unit says."""
    if not any(record.get(word) for word in ("ep", "gpus", "dp", "tp")):
        return "states no EP size and no number of GPUs: a throughput without its deployment"
    unit = str(record.get("unit", "")).lower()
    if record.get("concurrency") and record.get("isl") and record.get("osl") and record.get("phase") not in ("prefill", "decode"):
        return _served(record, unit)
    ask = asked(record)
    step = ask.step()
    tokens, pool = ask.tokens, ask.costs.pool
    if "node" in unit:
        tokens *= ask.costs.cluster.groups[0].gpus_per_node
    elif "user" in unit:
        tokens = ask.costs.tokens_per_step
    elif "gpu" not in unit:
        tokens *= max(pool.world, int(record.get("gpus") or 0))
    return Found(tokens / step.total_s, tokens / step.high_s, tokens / step.low_s, _sources(step, ask))


def _served(record: Record, unit: str) -> Found | str:
    """Tokens a second of a whole closed loop: every user's output over its time to the first token and those between the rest."""
    ends = [serving({**record, "metric": metric}) for metric in ("ttft", "tpot")]
    wrong = next((end for end in ends if isinstance(end, str)), None)
    if wrong is not None:
        return wrong
    first, rest = (end for end in ends if isinstance(end, Found))
    users, osl = float(record["concurrency"]), float(record["osl"])
    counted = osl + (float(record["isl"]) if "total" in str(record["metric"]) else 0.0)
    counted = float(record["isl"]) if "input" in str(record["metric"]) else counted
    gpus = float(record.get("gpus") or 8)
    shares = {"gpu": gpus, "node": gpus / 8, "user": users}
    share = next((part for word, part in shares.items() if word in unit), 1.0)
    value, low, high = (users * counted / (t * 1e-3 + (osl - 1) * each * 1e-3) / share for t, each in (
        (first.value, rest.value), (first.high, rest.high), (first.low, rest.low)))
    return Found(value, low, high, tuple(sorted({*first.sources, *rest.sources})))


def step_time(record: Record) -> Found | str:
    """Milliseconds between tokens of a decode pool."""
    ask = asked(record)
    step = ask.step()
    per = 1e3 / ask.costs.tokens_per_step
    return Found(step.total_s * per, step.low_s * per, step.high_s * per, _sources(step, ask))


def tbo_gain(record: Record) -> Found | str:
    """How much two-batch overlap adds to throughput: a ratio, or per cent where the unit says so."""
    with_s, without_s = (asked(record, tbo=tbo).step().total_s for tbo in (True, False))
    ratio = without_s / with_s
    unit = str(record.get("unit", "")).lower()
    scale = 100.0 if "%" in unit or "percent" in unit else 1.0
    base = 1.0 if scale > 1.0 or "fraction" in unit else 0.0
    value, low, high = ((ratio * f - base) * scale for f in (1.0, 1 / _GAIN_WIDTH, _GAIN_WIDTH))
    return Found(value, low, high, ("calibrated",))


_PARTS: dict[str, tuple[str, ...]] = {
    "moe_gemm": ("moe/experts",), "attention": ("attention/prefill", "attention/kv_read"),
    "attention_core": ("attention/kv_read", "attention/prefill"),
    "other_gemm": ("attention/projections", "attention/kv_up", "attention/absorb", "moe/shared"),
    "other": ("norm", "small", "moe/permute", "moe/gate", "attention/kv_write")}
_ONCE = ("host", "mtp", "head", "sampling", "embedding", "ffn/dense")
# What fp8 products of 64 and 128 rows take longer in the tables than DeepGEMM says of them (its README): median of twelve.
_QUANTISE_S = 4.3e-6


def _products(model: ModelSpec) -> int:
    """Dense fp8 products of one MoE layer."""
    return (3 if model.attention.kind == "mla" else 2) + (2 if model.moe and model.moe.shared_intermediate else 0)


def layer(record: Record) -> Found | str:
    """Milliseconds of one MoE layer's part on a usual rank."""
    part = re.sub(r"^(prefill|decode)_layer_time_", "", str(record["metric"]))
    if "slow" in str(record.get("id", "")) or "unit_test" in str(record.get("id", "")):
        return "a kernel run apart or slowed on purpose, not a deployment"
    ask = asked(record)
    step, model = ask.step(), ask.costs.model

    def per_layer(key: str, seconds: float) -> float:
        return seconds / (model.moe_layers if key.startswith(("moe/", "overlap")) else model.layers)

    parts = {key: per_layer(key, s) for key, s in step.parts_s.items() if not key.startswith(_ONCE)}
    usual = asked(record, even=True)
    even = usual.step()
    hot_s = (step.parts_s["moe/experts"] - even.parts_s["moe/experts"]
             + step.parts_s.get("moe/permute", 0.0) - even.parts_s.get("moe/permute", 0.0)) / max(model.moe_layers, 1)
    if part == "overall":
        value = sum(parts.values())
    elif part in _PARTS:
        source = {k: per_layer(k, s) for k, s in even.parts_s.items()} if ask.phase == "prefill" else parts
        value = sum(s for k, s in source.items() if k.startswith(_PARTS[part]))
        value *= usual_share(ask.costs.site) if part == "moe_gemm" and ask.phase == "prefill" else 1.0
        # a product's table times the quantisation of its input too, which traces show as a kernel of its own
        quantised = _QUANTISE_S * _products(model) * (2 if ask.costs.pool.tbo else 1) * (ask.phase == "decode")
        value += {"other_gemm": -quantised, "other": quantised}.get(part, 0.0)
    else:
        seen = usual if part.startswith("dispatch") and ask.phase == "decode" else ask  # a usual rank receives what is usual
        shown = _exchange_part(part, seen, parts, hot_s, (step.total_s - even.total_s) / max(model.moe_layers, 1))
        if shown is None:
            return f"{part}: bubbles and launching are not parts of their own in the twin"
        value = shown
    scaled = re.search(r"scaled to ([\d,]+) tok/GPU", str(record.get("unit")))
    if scaled and ask.phase == "prefill":
        value *= float(scaled[1].replace(",", "")) / ask.tokens
    width = max(0.1, step.high_s / step.total_s - 1)
    return Found.near(value * 1e3, width, "calibrated" if part not in _PARTS else "mixed")


def _exchange_part(part: str, ask: Asked, parts: Mapping[str, float], hot_s: float, later_s: float) -> float | None:
    """Seconds a layer of a dispatch or combine. `hot_s`: what the fullest rank's experts take longer than a usual rank's;
    `later_s`: what the layer takes longer for it. In prefill, kernels that exchange run until what they wait for has come: under
    overlap the two share the fullest rank's delay, else the combine's barrier has it."""
    name, _, piece = part.partition("_")
    if name not in ("dispatch", "combine") or piece not in ("", "core", "barrier"):
        return None
    if ask.phase == "decode":
        return ask.costs.shown_exchanges_s(ask.batch)[name == "combine"] / max(ask.costs.model.moe_layers, 1)
    tbo = ask.costs.pool.tbo
    moved = sum(parts.get(f"moe/{name}/{kind}", 0.0) for kind in ("nvlink", "rdma", "latency")) + (later_s / 2 if tbo else 0.0)
    waited = parts.get(f"moe/{name}/wait", 0.0) + (hot_s if name == "combine" and not tbo else 0.0)
    return {"core": moved, "barrier": waited, "": moved + waited}[piece]


def balance(record: Record) -> Found | str:
    """How even ranks are loaded, expected over layers: of experts in their order, or as EPLB placed them some time ago."""
    metric = str(record["metric"]).lower()
    model = model_named(record) if record.get("model") else model_of("deepseek-v3")
    ranks = int(record.get("ep") or record["gpus"])
    assert model.moe is not None
    if "random_placement" in metric:
        shares = popularity(model, _MATRIX, 0)
        rng = np.random.default_rng(np.random.SeedSequence([0, ranks]))
        loads = np.stack([rng.permutation(row).reshape(ranks, -1).sum(axis=1) for row in shares])
        excess = loads.max(axis=1) * ranks
    else:
        decode = "decode" in f"{record.get('phase', '')} {text_of(record)}" or record.get("batch_per_gpu") is not None
        phase = "decode" if decode and record.get("phase") != "prefill" else "prefill"
        features = record.get("features")
        eplb = bool(features.get("EPLB")) if isinstance(features, Mapping) else "eplb" in text_of(record).replace("noeplb", "")
        slots = re.search(r"(\d{3})\s*slots", text_of(record))
        wanted = int(slots[1]) - model.moe.experts if slots else stated(record, "decode", ranks).redundant or 32 * eplb
        redundant = redundant_slots(model.moe.experts, ranks, wanted)
        nodes = max(1, ranks // 72) if "gb" in str(record.get("gpu", "")).lower() else -(-ranks // 8)
        excess = rank_excess(*expert_loads(model, ranks, redundant, nodes, DRIFT[phase] if eplb else 0.0, eplb))
    value = float(excess.mean() - 1 if "(max-mean)" in metric or "imbalance" in metric else
                  (1 / excess).mean() if "balancedness" in metric else excess.mean())
    return Found.near(value, _SKEW_WIDTH, "calibrated")


def serving(record: Record) -> Found | str:
    """Mean TTFT or TPOT of a closed loop, as of a row of the CSV tables; of a decode pool with a known batch, its step."""
    backend = str(record.get("backend") or "").lower()
    engine = next((e for e in ("sglang", "vllm") if e in backend), "trtllm" if "trt" in backend else None)
    if record["metric"].startswith("tpot") and record.get("batch_per_gpu") and "ep" in record and "concurrency" not in record:
        return step_time(record)
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


def _side(numbers: dict[str, float], role: str, side: Mapping[str, object]) -> None:
    tp, dp, ep = (int(str(side.get(k) or 1)) for k in ("tp", "attn_dp", "ep"))
    numbers |= {f"{role}_num_workers": float(str(side.get("workers", 1))), f"{role}_tp_size": tp, f"{role}_attention_dp_size": dp,
                f"{role}_moe_ep_size": ep, f"{role}_moe_tp_size": max(1, tp * dp // ep), f"{role}_batch_size": 1.0}


ANSWERS: Mapping[str, Callable[[Record], Found | str]] = {
    "throughput": throughput, "step": step_time, "layer": layer, "tbo gain": tbo_gain, "exchange latency": exchange_latency,
    "exchange bandwidth": exchange_bandwidth, "logical bandwidth": logical_bandwidth, "bus bandwidth": bus_bandwidth,
    "collective": collective,
    "kv transfer": kv_transfer, "kv bytes": kv_bytes, "product": product_rate, "balance": balance, "serving": serving}
