"""An 80% interval around a sum of parts, from where each part comes."""

from __future__ import annotations

from collections.abc import Mapping

from twin.spec.base import Source

# Relative half widths of an 80% interval by source, until a comparison with measurements narrows them.
HALF_WIDTH: dict[Source, float] = {"measured": 0.05, "interpolated": 0.08, "calibrated": 0.15, "transferred": 0.20,
                                   "roofline": 0.25, "assumed": 0.40, "mixed": 0.30}
_SHARED = 0.5  # part of the variance of errors that all parts share (the same GPU, clock and engine)


def interval(parts_s: Mapping[str, float], sources: Mapping[str, Source]) -> tuple[float, float]:
    """(low, high) around the sum: errors of parts are half common, half independent."""
    total = sum(parts_s.values())
    widths = [abs(seconds) * HALF_WIDTH[sources[key]] for key, seconds in parts_s.items() if not key.startswith("overlap/")]
    half = (_SHARED * sum(widths) ** 2 + (1 - _SHARED) * sum(w * w for w in widths)) ** 0.5
    return max(total - half, 0.0), total + half
