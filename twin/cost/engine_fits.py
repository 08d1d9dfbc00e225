"""What end-to-end measurements of serving engines say beyond their operators, by engine and GPU generation.

Fitted by `benchmarks/fit_silicon.py` on a seeded half of the configurations of a table of public deployments (see
docs/accuracy.md); everything else of an engine is in `engines.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from twin.spec.cluster import GpuSpec

Generation = Literal["hopper", "blackwell", "other"]


def generation(gpu: GpuSpec) -> Generation:
    """The GPU's generation by what it computes natively: fp4 since Blackwell, fp8 since Hopper."""
    if gpu.fp4_flop_per_s:
        return "blackwell"
    return "hopper" if gpu.fp8_flop_per_s else "other"


FITS: Mapping[tuple[str, Generation], Mapping[str, Any]] = {
}
