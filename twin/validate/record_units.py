"""Units and metrics as published records write them."""

from __future__ import annotations

import re

from twin.validate.record_words import Found, Record

_TIMES = ((r"(u|\u00b5|\u03bc|micro)s(ec\w*)?", 1e6), (r"(ms|millis)(ec\w*)?", 1e3), (r"s(ec\w*)?", 1.0),
          (r"min(ute)?s?", 1 / 60))
_BYTES = {"tb": 1e12, "gb": 1e9, "mb": 1e6, "kb": 1e3, "tib": 2.0**40, "gib": 2.0**30, "mib": 2.0**20, "kib": 2.0**10,
          "b": 1.0, "byte": 1.0, "bytes": 1.0}
_STATISTIC = re.compile(r"^(mean|avg|average|median|p\d\d|peak)_|_(mean|avg|average|median|p\d\d)$")


def metric_of(record: Record) -> str:
    """The metric in small letters, words joined by _, without the statistic taken of it (`mean_tpot`, `itl_p50`): the twin
    has one number for each."""
    name = re.sub(r"[\s-]+", "_", str(record["metric"]).strip().lower())
    while (shorter := _STATISTIC.sub("", name)) != name:
        name = shorter
    return name


def per_second(record: Record, default: str) -> float:
    """How many of the record's unit of time a second has; `default` where it names none."""
    for text in (str(record.get("unit", "")).strip().lower(), default):
        word = re.match(r"[a-z\u00b5\u03bc]+", text)
        for pattern, scale in _TIMES:
            if word and re.fullmatch(pattern, word[0]):
                return scale
    raise ValueError(f"unit {default}")


def unit_bytes(record: Record, default: str) -> float:
    """Bytes of the record's unit, `default` where it names none."""
    word = re.match(r"[a-z]+", str(record.get("unit", "")).strip().lower())
    return _BYTES.get(word[0] if word else default, _BYTES[default])


def as_gain(record: Record, ratio: float, width: float, source: str) -> Found:
    """A ratio of throughputs in the record's words: 1.25, 25 (per cent) or 0.25 (a fraction). `width` is of the ratio."""
    unit = f"{record.get('unit', '')} {record['metric']}".lower()
    scale = 100.0 if "%" in unit or "percent" in unit else 1.0
    base = 1.0 if scale > 1.0 or "fraction" in unit else 0.0
    value, low, high = ((ratio * f - base) * scale for f in (1.0, 1 / width, width))
    return Found(value, low, high, (source,))
