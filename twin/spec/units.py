"""Quantities: one parser at the edge in, one formatter at the edge out; SI base units between.

A bare number is already in the field's base unit. A string needs its unit: "450 GB/s", "80 GiB", "20 ms".
GB = 1e9 bytes, GiB = 2**30 bytes, Gb = 1e9 bits.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_SI = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_IEC = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_TIME = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}


def _byte_units(per: str) -> dict[str, float]:
    units = {f"{p}B{per}": f for p, f in {**_SI, **_IEC}.items()}
    units.update({f"{p}b{per}": f / 8 for p, f in _SI.items()})
    units.update({f"{p}bit{per}": f / 8 for p, f in _SI.items()})
    return units


UNITS: dict[str, dict[str, float]] = {
    "bytes": _byte_units(""),
    "bytes_per_s": {**_byte_units("/s"), **{f"{p}bps": f / 8 for p, f in _SI.items()}},
    "flop_per_s": {**{f"{p}FLOP/s": f for p, f in _SI.items()}, **{f"{p}FLOPS": f for p, f in _SI.items()}},
    "s": _TIME,
    "per_s": {"/s": 1.0, "/min": 1 / 60, "/h": 1 / 3600, "req/s": 1.0, "rps": 1.0, "tok/s": 1.0},
    "usd_per_h": {"$/h": 1.0, "USD/h": 1.0, "usd/h": 1.0},
    "w": {"W": 1.0, "kW": 1e3},
}
_EXAMPLE = {
    "bytes": "80 GiB",
    "bytes_per_s": "450 GB/s",
    "flop_per_s": "989 TFLOP/s",
    "s": "20 ms",
    "per_s": "12 req/s",
    "usd_per_h": "2.5 $/h",
    "w": "700 W",
}
_QUANTITY = re.compile(r"^([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\S+)$")


def parse_quantity(value: Any, dimension: str) -> Any:
    """Turn "450 GB/s" into 4.5e11. Numbers pass through, already in base units.

    Raises ValueError naming the unit it expected. Booleans are not numbers.
    """
    if isinstance(value, bool):
        raise ValueError(f"expected a quantity such as {_EXAMPLE[dimension]!r}, not a boolean")
    if not isinstance(value, str):
        return float(value) if isinstance(value, int) and abs(value) < 2**1000 else value
    match = _QUANTITY.match(value.strip()) if len(value) < 64 else None
    if match is None:
        raise ValueError(f"cannot read {value[:40]!r} as a quantity; write a number and a unit, such as {_EXAMPLE[dimension]!r}")
    number, unit = match.groups()
    if unit not in UNITS[dimension]:
        raise ValueError(f"unit {unit[:20]!r} does not fit here; expected one like {_EXAMPLE[dimension]!r}")
    return float(number) * UNITS[dimension][unit]


Bytes = Annotated[float, BeforeValidator(lambda v: parse_quantity(v, "bytes")), Field(ge=0, le=1e18)]
BytesPerS = Annotated[float, BeforeValidator(lambda v: parse_quantity(v, "bytes_per_s")), Field(gt=0, le=1e18)]
FlopPerS = Annotated[float, BeforeValidator(lambda v: parse_quantity(v, "flop_per_s")), Field(gt=0, le=1e20)]
Seconds = Annotated[float, BeforeValidator(lambda v: parse_quantity(v, "s")), Field(ge=0, le=1e9)]
PerSecond = Annotated[float, BeforeValidator(lambda v: parse_quantity(v, "per_s")), Field(gt=0, le=1e9)]
UsdPerHour = Annotated[float, BeforeValidator(lambda v: parse_quantity(v, "usd_per_h")), Field(ge=0, le=1e6)]
Watts = Annotated[float, BeforeValidator(lambda v: parse_quantity(v, "w")), Field(ge=0, le=1e6)]


def format_bytes(n_bytes: float) -> str:
    """Bytes for a person: "81.6 GiB"."""
    for unit, factor in (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if abs(n_bytes) >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes:.0f} B"


def format_si(value: float, unit: str) -> str:
    """A rate for a person: "450 GB/s"."""
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def format_s(seconds: float | None) -> str:
    """A duration for a person: "1.24 s", "18.3 ms", "27 µs"."""
    if seconds is None or math.isnan(seconds):
        return "–"
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= factor or unit == "µs":
            return f"{seconds / factor:.3g} {unit}"
    raise AssertionError("unreachable")
