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
    ("sglang", "blackwell"): {"graph_launch_s": 2.75e-06, "step_host_s": 0.000639, "eager_launch_s": 4.53e-05,
                              "frontend_s": 0.0257, "prefill_slowdown": 1.65, "products_scale": 0.965,
                              "attention_scale": 0.953, "experts_scale": 1.16, "collectives_scale": 0.831},
    ("sglang", "hopper"): {"graph_launch_s": 2.27e-06, "step_host_s": 0.000772, "eager_launch_s": 8.43e-05,
                           "frontend_s": 0.0257, "prefill_slowdown": 1.28, "products_scale": 0.892, "attention_scale": 1.22},
    ("vllm", "blackwell"): {"graph_launch_s": 1.76e-06, "eager_launch_s": 6.72e-06, "frontend_s": 0.0698,
                            "prefill_slowdown": 1.06, "products_scale": 0.895, "attention_scale": 1.23},
    ("vllm", "hopper"): {"graph_launch_s": 1.87e-06, "step_host_s": 0.000687, "prefill_slowdown": 1.06, "experts_scale": 0.953},
    ("trtllm", "blackwell"): {"graph_launch_s": 1.59e-06, "step_host_s": 0.000322, "eager_launch_s": 4e-05,
                              "frontend_s": 0.0165, "prefill_slowdown": 1.13, "products_scale": 0.799, "experts_scale": 1.16},
    ("trtllm", "hopper"): {"graph_launch_s": 1.32e-06, "step_host_s": 0.000466, "eager_launch_s": 7.1e-05,
                           "prefill_slowdown": 1.13, "products_scale": 0.83, "attention_scale": 1.11, "experts_scale": 0.859},
}
