"""Records of what a feature adds: two-batch overlap, expert balancing, drafting."""

from __future__ import annotations

from typing import Any

from twin.validate.record_pools import asked, phase_of
from twin.validate.record_units import as_gain
from twin.validate.record_words import Found, Record, ranks_of, stated

_WIDTH = 1.05  # times the ratio of throughputs
_BALANCE_WIDTH, _DRAFT_WIDTH = 1.10, 1.15


def _with(record: Record, **features: Any) -> Record:
    given = record.get("features")
    if isinstance(given, dict):
        return {**record, "features": {**given, **features}}
    said = stated(record, phase_of(record), ranks_of(record)[2])
    return {**record, "features": {"TBO": said.tbo, "EPLB": said.eplb, "MTP": said.drafts, **features}}


def _rate(record: Record) -> float:
    ask = asked(record)
    return ask.tokens / ask.step().total_s


def tbo_gain(record: Record) -> Found | str:
    """How much two-batch overlap adds to throughput: a ratio, or per cent where the unit says so."""
    with_s, without_s = (asked(record, tbo=tbo).step().total_s for tbo in (True, False))
    return as_gain(record, without_s / with_s, _WIDTH, "calibrated")


def eplb_gain(record: Record) -> Found | str:
    """How much balanced experts add to throughput, redundant ones included."""
    wanted = {k: v for k, v in (record.get("features") or {}).items() if str(k).lower() == "redundant_experts"} \
        if isinstance(record.get("features"), dict) else {}
    on = _rate(_with(record, EPLB=True, **(wanted or {"redundant_experts": 32})))
    return as_gain(record, on / _rate(_with(record, EPLB=False, redundant_experts=0)), _BALANCE_WIDTH, "calibrated")


def draft_gain(record: Record) -> Found | str:
    """How much drafting with the model's MTP module adds to throughput at the same batch."""
    features = record.get("features")
    said = features.get("MTP", features.get("EAGLE", 1)) if isinstance(features, dict) else 1
    on, off = _rate(_with(record, MTP=said or 1)), _rate(_with(record, MTP=False, EAGLE=False))
    return as_gain(record, on / off, _DRAFT_WIDTH, "mixed")
