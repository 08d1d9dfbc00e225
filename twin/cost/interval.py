"""An 80% interval around a sum of parts, from where each part comes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from twin.cost.measured import Evidence
from twin.spec.base import Source

# Relative half widths of an 80% interval by source, where nothing better is known of a part.
HALF_WIDTH: dict[Source, float] = {"measured": 0.05, "interpolated": 0.08, "calibrated": 0.15, "transferred": 0.20,
                                   "roofline": 0.25, "assumed": 0.40, "mixed": 0.30}
_SHARED = 0.5  # part of the variance of errors that all parts share (the same GPU, clock and engine)


def plain(source: Source) -> Evidence:
    """Evidence of a source with its usual interval."""
    return Evidence(source, HALF_WIDTH[source])


def joined(pairs: Iterable[tuple[str, Evidence]]) -> dict[str, Evidence]:
    """One evidence a key: unlike sources become `mixed`, the wider interval counts."""
    found: dict[str, Evidence] = {}
    for key, evidence in pairs:
        before = found.get(key, evidence)
        source = evidence.source if before.source == evidence.source else "mixed"
        found[key] = Evidence(source, max(before.half_width, evidence.half_width))
    return found


def interval(parts_s: Mapping[str, float], evidence: Mapping[str, Evidence], beside: float = 0.0) -> tuple[float, float]:
    """(low, high) around the sum: errors of parts are half common, half independent; what overlap hides hides its error.
    `beside`: relative half width of what a sum of operators leaves out."""
    total = sum(parts_s.values())
    shown = sum(seconds for seconds in parts_s.values() if seconds > 0)
    widths = [seconds * evidence[key].half_width for key, seconds in parts_s.items() if seconds > 0]
    half = (_SHARED * sum(widths) ** 2 + (1 - _SHARED) * sum(w * w for w in widths)) ** 0.5
    half *= total / shown if shown else 0.0
    half = (half * half + (beside * total) ** 2) ** 0.5
    return max(total - half, 0.0), total + half
