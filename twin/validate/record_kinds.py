"""How the twin answers each kind of published record, in the record's own unit.

An answerer takes the record and returns a `Found`, or a sentence that says why it cannot be answered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

from twin.cost.batch import StepCost
from twin.cost.routing import popularity
from twin.spec.scenario import Routing
from twin.validate.record_comm import (
    bus_bandwidth,
    collective,
    copies_bandwidth,
    exchange_bandwidth,
    exchange_latency,
    kv_bandwidth,
    kv_transfer,
    logical_bandwidth,
)
from twin.validate.record_gains import draft_gain, eplb_gain, tbo_gain
from twin.validate.record_kernels import QUANTISE_S, product_rate
from twin.validate.record_memory import gpu_memory, kv_bytes
from twin.validate.record_pools import DRIFT, Asked, asked, expert_loads, rank_excess, redundant_slots, usual_share
from twin.validate.record_serving import served, serving
from twin.validate.record_units import metric_of, per_second
from twin.validate.record_words import Found, Record, model_named, stated, text_of
from twin.validate.words import model_of

# Popularity in the load matrix of DeepSeek-V3's prefill, which "random placement" records read: the most popular of 256 gets 8
# times the mean.
_MATRIX = Routing(kind="lognormal", sigma=0.89)
_SKEW_WIDTH = 0.12  # half width of the 80% interval, from its own records

_KINDS = (
    (r"(prefill|decode)_layer_time_\w+", "layer"),
    (r"(torch_)?((dispatch|combine)(\+|_and_)?(combine)?|all_?to_?all|a2a)(_p50)?_(latency|time)", "exchange latency"),
    (r"(dispatch|combine)_bottleneck_bandwidth", "exchange bandwidth"),
    (r"(dispatch|combine)_logical_bandwidth", "logical bandwidth"),
    (r"(dispatch|combine)(_rdma|_nvlink)?_bandwidth", "copies bandwidth"),
    (r"(nccl_|rccl_)?(all_?to_?all|all_?reduce|all_?gather|reduce_?scatter)_(bus|alg)_?(bw|bandwidth)\w*", "bus bandwidth"),
    (r"(nccl_|rccl_)?(all_?reduce|all_?gather|reduce_?scatter)_(latency|time)", "collective"),
    (r"kv(_cache)?_transfer_(time|latency|duration)\w*", "kv transfer"),
    (r"kv(_cache)?_transfer_(bandwidth|throughput|rate)\w*", "kv bandwidth"),
    (r"kv_?(cache)?_(bytes|size)_per_token\w*", "kv bytes"),
    (r"(free|available)_kv_\w*|kv(_cache)?_(memory|capacity)\w*|weights?_(memory|per_gpu|bytes)\w*", "memory"),
    (r"(tpot|ttft|time_to_first_token|time_per_output_token|e2e_latency|end_to_end_latency)\w*", "serving"),
    (r"(itl|inter_token_latency)\w*|((decode|prefill)_)?(step|iteration|forward|iter)(_(time|latency))\w*", "step"),
    (r"(tbo|dbo|two_batch_overlap|dual_batch_overlap)_\w*(gain|speedup|improvement)\w*", "tbo gain"),
    (r"eplb_\w*(gain|speedup|improvement)\w*", "eplb gain"),
    (r"mtp_\w*(gain|speedup|improvement)\w*", "mtp gain"),
    (r"(?!per_expert).*(balancedness|max_over_mean|imbalance).*", "balance"),
    (r"per_expert_max_over_mean\w*", "popularity"),
    (r"(fp8|bf16|fp4|gemm)_tflops", "product"),
)
_THROUGHPUT = r"(?!.*(gain|speedup|improvement)).*(throughput|tokens?_per_s|tok_s|tps|tgs)"


def kind_of(record: Record) -> str:
    """The kind of record, by its metric and what it is about."""
    metric, unit = metric_of(record), str(record.get("unit", "")).lower()
    if re.match(_THROUGHPUT, metric) and re.search(r"tok\w*\s*/\s*s|tok\w* per s|tps|req\w*\s*/\s*s", unit):
        return "throughput"
    if metric in ("latency", "time") and record.get("model") in ("nccl", "rccl"):
        return "collective"
    return next((kind for pattern, kind in _KINDS if re.fullmatch(pattern, metric)), "other")


def _sources(step: StepCost, ask: Asked) -> tuple[str, ...]:
    return tuple(sorted({*map(str, step.sources.values()), *(["assumed"] if ask.assumed else [])}))


def throughput(record: Record) -> Found | str:
    """Tokens a second of one step repeated: a GPU, a node, an instance or a user, as the unit says."""
    if not any(record.get(word) for word in ("ep", "gpus", "dp", "tp")):
        return "states no EP size and no number of GPUs: a throughput without its deployment"
    unit = f"{record.get('unit', '')} {metric_of(record)}".lower()
    if record.get("concurrency") and record.get("isl") and record.get("osl") and record.get("phase") not in ("prefill", "decode"):
        return served(record, unit)
    if "req" in unit:
        return "requests a second of one pool: states no users or lengths"
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


def step_time(record: Record) -> Found | str:
    """Time of a step, or between the tokens of a sequence of a decode pool."""
    ask = asked(record)
    step = ask.step()
    a_token = ask.phase == "decode" and not re.search("step|iter|forward", metric_of(record))
    per = per_second(record, "ms") / (ask.costs.tokens_per_step if a_token else 1.0)
    return Found(step.total_s * per, step.low_s * per, step.high_s * per, _sources(step, ask))


_PARTS: dict[str, tuple[str, ...]] = {
    "moe_gemm": ("moe/experts",), "attention": ("attention/prefill", "attention/kv_read"),
    "attention_core": ("attention/kv_read", "attention/prefill"),
    "other_gemm": ("attention/projections", "attention/kv_up", "attention/absorb", "moe/shared"),
    "other": ("norm", "small", "moe/permute", "moe/gate", "attention/kv_write")}
_ONCE = ("host", "mtp", "head", "sampling", "embedding", "ffn/dense")


def _quantised_s(ask: Asked) -> float:
    """Seconds a layer that tables of fp8 products spend on quantising their inputs: kernels of their own in a trace."""
    model = ask.costs.model
    a, shared = model.attention, model.moe.shared_intermediate if model.moe else 0
    wide = a.heads * a.v_head_dim
    inputs = [model.hidden, a.q_lora_rank or 0, a.kv_lora_rank or 0, wide] if a.kind == "mla" else [model.hidden, wide]
    inputs += [model.hidden, shared] if shared else []
    rows = float(ask.batch.decode_seqs.max() * (1 + ask.costs.pool.mtp_draft_tokens) + ask.batch.prefill_tokens.max())
    kernels = sum(1 for width in inputs if width and (ask.phase == "prefill" or width != a.kv_lora_rank))  # decode absorbs kv_b
    return (QUANTISE_S * kernels * (2 if ask.costs.pool.tbo else 1)
            + 3.0 * rows * sum(inputs) / ask.costs.cluster.groups[0].gpu.hbm_bytes_per_s)


def layer(record: Record) -> Found | str:
    """Milliseconds of one MoE layer's part on a usual rank."""
    part = re.sub(r"^(prefill|decode)_layer_time_", "", metric_of(record))
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
        quantised = _quantised_s(ask)
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
    return Found.near(value * per_second(record, "ms"), width, "calibrated" if part not in _PARTS else "mixed")


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
    metric = metric_of(record)
    model = model_named(record) if record.get("model") else model_of("deepseek-v3")
    ranks = int(record.get("ep") or record["gpus"])
    if model.moe is None:
        return f"{model.name} has no experts to balance"
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
        away = DRIFT[phase] if eplb else 0.0
        excess = rank_excess(*expert_loads(model, ranks, redundant, nodes, away, eplb, nodes=phase == "prefill"))
    value = float(excess.mean() - 1 if "(max-mean)" in metric or "imbalance" in metric else
                  (1 / excess).mean() if "balancedness" in metric else excess.mean())
    return Found.near(value, _SKEW_WIDTH, "calibrated")


def popular(record: Record) -> Found | str:
    """The most popular expert's load over the mean, averaged over layers."""
    model = model_named(record) if record.get("model") else model_of("deepseek-v3")
    if model.moe is None:
        return f"{model.name} has no experts"
    shares = popularity(model, _MATRIX, 0)
    return Found.near(float(shares.max(axis=1).mean() * model.moe.experts), 3 * _SKEW_WIDTH, "calibrated")


def latency(record: Record) -> Found | str:
    """TTFT or TPOT: of a pool whose batch is stated, its step; else of a closed loop."""
    metric = metric_of(record)
    alone = "concurrency" not in record and not isinstance(record.get("prefill"), Mapping)
    if metric.startswith(("tpot", "time_per_output")) and alone and (record.get("batch_per_gpu") or record.get("batch")):
        return step_time(record)
    if metric.startswith(("ttft", "time_to_first")) and alone and record.get("phase") == "prefill" \
            and (record.get("batch_per_gpu") or int(record.get("ep") or 1) > 8):
        return step_time(record)
    return serving(record)


ANSWERS: Mapping[str, Callable[[Record], Found | str]] = {
    "throughput": throughput, "step": step_time, "layer": layer, "tbo gain": tbo_gain, "eplb gain": eplb_gain,
    "mtp gain": draft_gain, "exchange latency": exchange_latency, "exchange bandwidth": exchange_bandwidth,
    "copies bandwidth": copies_bandwidth, "logical bandwidth": logical_bandwidth, "bus bandwidth": bus_bandwidth,
    "collective": collective, "kv transfer": kv_transfer, "kv bandwidth": kv_bandwidth, "kv bytes": kv_bytes,
    "memory": gpu_memory, "product": product_rate, "balance": balance, "popularity": popular, "serving": latency}
