"""What end-to-end measurements of serving engines say beyond their operators, by engine and GPU generation.

Fitted by `benchmarks/fit_silicon.py` on a seeded half of the configurations of a table of public deployments (see
docs/accuracy.md); everything else of an engine is in `engines.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from twin.spec.cluster import GpuSpec

Generation = Literal["hopper", "blackwell", "other"]


def generation(gpu: GpuSpec) -> Generation:
    """The GPU's generation by what it computes natively: fp4 since Blackwell, fp8 since Hopper."""
    if gpu.fp4_flop_per_s:
        return "blackwell"
    return "hopper" if gpu.fp8_flop_per_s else "other"


FITS: Mapping[tuple[str, Generation], Mapping[str, float]] = {
    ("sglang", "blackwell"): {"graph_launch_s": 2.25e-06, "step_host_s": 0.000531, "eager_launch_s": 5.16e-05,
                              "frontend_s": 0.0212, "prefill_slowdown": 1.45, "attention_scale": 0.953, "experts_scale": 1.28},
    ("sglang", "hopper"): {"step_host_s": 0.000567, "eager_launch_s": 9.5e-05, "frontend_s": 0.0212,
                           "prefill_slowdown": 1.13, "attention_scale": 1.16, "experts_scale": 1.05},
    ("vllm", "blackwell"): {"graph_launch_s": 1.88e-06, "eager_launch_s": 7.04e-06, "frontend_s": 0.033,
                            "prefill_slowdown": 1.21, "attention_scale": 1.05, "experts_scale": 0.953,
                            "collectives_scale": 1.06},
    ("vllm", "hopper"): {"graph_launch_s": 1.87e-06, "step_host_s": 0.000779, "prefill_slowdown": 1.06,
                         "experts_scale": 0.953, "collectives_scale": 0.942},
    ("trtllm", "blackwell"): {"graph_launch_s": 1.69e-06, "step_host_s": 0.000413, "eager_launch_s": 4e-05,
                              "frontend_s": 0.0176, "prefill_slowdown": 1.06, "products_scale": 0.861, "experts_scale": 1.11},
    ("trtllm", "hopper"): {"graph_launch_s": 1.49e-06, "step_host_s": 0.000531, "eager_launch_s": 7.02e-05,
                           "prefill_slowdown": 1.07, "products_scale": 0.861, "attention_scale": 1.05, "experts_scale": 0.905},
}
