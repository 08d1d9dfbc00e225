"""Records of serving tests: mean TTFT, TPOT and throughput of users in a closed loop, as a row of a CSV table would have it."""

from __future__ import annotations

from collections.abc import Mapping

from twin.validate.answer import Answers
from twin.validate.record_units import metric_of, per_second
from twin.validate.record_words import Found, Record, engine_of_record, engine_stated, preset_of
from twin.validate.rows import SYSTEMS, Row, Unanswered, question_of

_OSL = 128.0  # outputs of a test that states none: all there is to TTFT is the prompt
_ASSUMED_WIDTH = 1.15  # times wider where engine or lengths are not stated
_FORMATS = ("mxfp4", "fp4", "int4", "fp8", "bf16")


def loop(record: Record) -> tuple[Found, Found] | str:
    """(TTFT, TPOT) in seconds of a closed loop of `concurrency` users."""
    metric = metric_of(record)
    assumed = not engine_stated(record)
    if record.get("concurrency") is None and not metric.startswith("ttft"):
        return "states no concurrency: not a serving test the twin can repeat"
    if "isl" not in record or ("osl" not in record and not metric.startswith("ttft")):
        return "states no lengths: not a serving test the twin can repeat"
    assumed |= record.get("concurrency") is None
    users, backend = float(record.get("concurrency") or 1), str(record.get("backend") or "").lower()
    system = next(name for name, preset in SYSTEMS.items() if preset == preset_of(record).replace("h20-141g", "h20-96g"))
    text = str(record.get("precision") or "fp8").lower()
    texts = {"id": str(record.get("id", "")), "backend": engine_of_record(record),
             "backend_version": backend.split()[-1] if backend else "", "mode": "agg", "system": system,
             "model_path": str(record["model"]).split("/")[-1 if "/r1" not in str(record["model"]) else 0],
             "precision": next((f for f in _FORMATS if f in text.replace("int4-fp8", "int4")), "fp8"),
             "gemm_quant_mode": "", "moe_quant_mode": "", "silicon_data_source": ""}
    numbers: dict[str, float] = {"isl": float(record["isl"]), "osl": max(float(record.get("osl") or _OSL), 2.0)}
    if isinstance(record.get("prefill"), Mapping):
        texts["mode"] = "disagg"
        for role in ("prefill", "decode"):
            _side(numbers, role, record[role])
        side = record["decode"]
        numbers["decode_batch_size"] = users / (side.get("attn_dp", 1) * side.get("workers", 1))
    else:
        tp, dp, ep = (int(record.get(k) or 1) for k in ("tp", "dp", "ep"))
        if not any(record.get(word) for word in ("tp", "dp")):  # GPUs alone: attention by DP where experts are spread, else TP
            gpus = int(record.get("gpus") or ep)
            tp, dp = (1, gpus) if ep > 1 else (gpus, 1)
        numbers |= {"tp_size": tp, "attention_dp_size": dp, "moe_ep_size": ep, "moe_tp_size": max(1, tp * dp // ep),
                    "batch_size": users / dp}
    question = question_of(Row(0, texts, numbers, {}))
    if isinstance(question, Unanswered):
        return question.reason
    answer = Answers().answer(question)
    sources = tuple(sorted({*answer.sources.values(), *(["assumed"] if assumed else [])}))
    more = _ASSUMED_WIDTH if assumed else 1.0
    return (Found(answer.ttft_s, answer.ttft_low_s / more, answer.ttft_high_s * more, sources),
            Found(answer.tpot_s, answer.tpot_low_s / more, answer.tpot_high_s * more, sources))


def _side(numbers: dict[str, float], role: str, side: Mapping[str, object]) -> None:
    tp, dp, ep = (int(str(side.get(k) or 1)) for k in ("tp", "attn_dp", "ep"))
    numbers |= {f"{role}_num_workers": float(str(side.get("workers", 1))), f"{role}_tp_size": tp, f"{role}_attention_dp_size": dp,
                f"{role}_moe_ep_size": ep, f"{role}_moe_tp_size": max(1, tp * dp // ep), f"{role}_batch_size": 1.0}


def serving(record: Record) -> Found | str:
    """Mean TTFT, TPOT or time of a whole request of a closed loop, in the record's unit."""
    ends = loop(record)
    if isinstance(ends, str):
        return ends
    first, rest = ends
    metric, scale = metric_of(record), per_second(record, "ms")
    if metric.startswith(("ttft", "time_to_first")):
        return Found(first.value * scale, first.low * scale, first.high * scale, first.sources)
    if metric.startswith(("tpot", "itl", "time_per_output", "inter_token")):
        return Found(rest.value * scale, rest.low * scale, rest.high * scale, rest.sources)
    more = float(record["osl"]) - 1
    return Found(*((t + more * each) * scale for t, each in _pairs(first, rest)), first.sources)


def served(record: Record, unit: str) -> Found | str:
    """Tokens (or requests) a second of a whole closed loop: every user's output over its time to the first token and those
    between the rest."""
    ends = loop(record)
    if isinstance(ends, str):
        return ends
    first, rest = ends
    users, osl, metric = float(record["concurrency"]), float(record["osl"]), metric_of(record)
    counted = osl + (float(record["isl"]) if "total" in metric else 0.0)
    counted = float(record["isl"]) if "input" in metric else 1.0 if "req" in unit or "request" in metric else counted
    gpus = float(record.get("gpus") or 8)
    shares = {"gpu": gpus, "node": gpus / 8, "user": users}
    share = next((part for word, part in shares.items() if word in unit), 1.0)
    value, high, low = (users * counted / (t + (osl - 1) * each) / share for t, each in _pairs(first, rest))
    return Found(value, low, high, first.sources)


def _pairs(first: Found, rest: Found) -> tuple[tuple[float, float], ...]:
    return (first.value, rest.value), (first.low, rest.low), (first.high, rest.high)
