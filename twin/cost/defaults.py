"""What part of peak operators reach where no profile answers."""

from __future__ import annotations

from collections.abc import Mapping

from twin.cost.roofline import Efficiency
from twin.spec.cluster import GpuSpec

# Large-size efficiencies on Hopper from published kernels: DeepGEMM 1125 of 1979 TFLOP/s dense and 70% of bandwidth in
# small batches; FlashMLA 660 of 989 TFLOP/s and 3000 of 3350 GB/s; cuDNN prefill 614 TFLOP/s; grouped GEMM 1214 to 1346
# TFLOP/s for few large groups, 1042 for the eight of a rank of 32 with 16k tokens a GPU (LMSYS, 11.07 ms a layer).
_GPU: dict[str, Efficiency] = {
    "default": Efficiency(0.60, 0.75),
    "gemm": Efficiency(0.60, 0.80),
    "bmm": Efficiency(0.50, 0.70),
    "experts": Efficiency(0.55, 0.75),
    "gate": Efficiency(0.40, 0.60),
    "attention_decode": Efficiency(0.50, 0.85),
    "mla_decode": Efficiency(0.67, 0.85),
    "attention_prefill": Efficiency(0.55, 0.80),
    "mla_prefill": Efficiency(0.62, 0.80),
    "indexer": Efficiency(0.40, 0.70),
    "elementwise": Efficiency(0.50, 0.60),
}
_CPU: dict[str, Efficiency] = {"default": Efficiency(0.30, 0.50, "assumed")}


def default_efficiency(gpu: GpuSpec) -> Mapping[str, Efficiency]:
    """Efficiency by operator kind."""
    return _CPU if gpu.kind == "cpu" else _GPU
