"""Operators as a table: the work of each is a line of coefficients over the features of a step.

`seconds = max(flops / (peak x efficiency), bytes / (bandwidth x efficiency)) + launches x launch_s`, times the layers
that have the operator. All operators of all ranks of any number of steps are three matrix products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from twin.cost.batch import FEATURES, INDEX, Array
from twin.spec.base import BYTES_PER_ELEMENT, Dtype, Source
from twin.spec.cluster import GpuSpec

Rate = Literal["bf16", "fp8", "fp4", "fp32"]
_RATE_OF: dict[str, Rate] = {"fp32": "fp32", "bf16": "bf16", "fp8": "fp8", "fp8_block": "fp8", "fp4": "fp4",
                             "mxfp4": "bf16", "int4": "bf16"}  # weight-only formats are multiplied in bf16


def bytes_of(dtype: Dtype | str) -> float:
    """Bytes of one element, its share of the scales included."""
    return BYTES_PER_ELEMENT[dtype]


def peak_flop_per_s(gpu: GpuSpec, dtype: str) -> float:
    """Dense peak rate that a product of this format runs at. A GPU without the narrow rate computes in bf16 from
    weights that stay stored narrow (so bytes shrink and flops do not)."""
    rate = _RATE_OF[dtype]
    if rate == "fp4":
        return gpu.fp4_flop_per_s or gpu.fp8_flop_per_s or gpu.bf16_flop_per_s
    if rate == "fp8":
        return gpu.fp8_flop_per_s or gpu.bf16_flop_per_s
    if rate == "fp32":
        return gpu.fp32_flop_per_s or gpu.bf16_flop_per_s / (1 if gpu.kind == "cpu" else 2)
    return gpu.bf16_flop_per_s


def product_dtype(dtype: str, gpu: GpuSpec) -> str:
    """The name tables have for a product with such weights: GPUs that multiply fp4 take mxfp4 weights with fp8 inputs."""
    return "mxfp4_mxfp8" if dtype == "mxfp4" and gpu.fp4_flop_per_s else dtype


def activation_bytes(dtype: Dtype) -> float:
    """Bytes of one element that flows between operators: fp32 models compute in fp32, all others in bf16."""
    return 4.0 if dtype == "fp32" else 2.0


@dataclass(frozen=True)
class Op:
    """One kernel (or fused group) of a rank's step. `flops` and `bytes` map a feature to what one unit of it adds;
    `gate` is the feature that says whether the kernel runs at all; `kind` names its efficiency; `matrix` is (k, n) of a
    dense product, `window` what a sliding layer sees: what a measured table is asked with."""

    key: str
    kind: str
    dtype: str
    flops: Mapping[str, float] = field(default_factory=dict)
    bytes: Mapping[str, float] = field(default_factory=dict)
    gate: str = "any"
    launches: int = 1
    layers: int = 1
    matrix: tuple[float, float] | None = None
    window: int | None = None


@dataclass(frozen=True)
class Efficiency:
    """What part of peak an operator kind reaches at large size: of compute and of bandwidth."""

    compute: float
    memory: float
    source: Source = "roofline"


@dataclass(frozen=True)
class OpTable:
    """Operators compiled to coefficient matrices [f, o], seconds a unit, layers multiplied in."""

    ops: tuple[Op, ...]
    compute: Array
    memory: Array
    launch: Array
    launch_counts: Array  # [f]

    @classmethod
    def of(cls, ops: list[Op], gpu: GpuSpec, efficiency: Mapping[str, Efficiency], launch_s: float,
           compute_share: float = 1.0) -> OpTable:
        """Compile. `compute_share` is the part of the SMs left to compute while communication kernels hold the rest."""
        shape = (len(FEATURES), len(ops))
        compute, memory, launch = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        for j, op in enumerate(ops):
            reached = efficiency.get(op.kind, efficiency["default"])
            flop_s = op.layers / (peak_flop_per_s(gpu, op.dtype) * reached.compute * compute_share)
            byte_s = op.layers / (gpu.hbm_bytes_per_s * reached.memory)
            for name, amount in op.flops.items():
                compute[INDEX[name], j] += amount * flop_s
            for name, amount in op.bytes.items():
                memory[INDEX[name], j] += amount * byte_s
            launch[INDEX[op.gate], j] = op.launches * op.layers * launch_s
        counts = np.zeros(len(FEATURES))
        for op in ops:
            counts[INDEX[op.gate]] += op.launches * op.layers
        return cls(tuple(ops), compute, memory, launch, counts)

    def seconds(self, x: Array) -> Array:
        """Seconds of every operator, all its layers together: [..., f] -> [..., o]."""
        return np.asarray(np.maximum(x @ self.compute, x @ self.memory) + x @ self.launch)

    def launches(self, x: Array) -> Array:
        """Kernels launched by a rank: [..., f] -> [...]."""
        return np.asarray(x @ self.launch_counts)

    def totals(self, x: Array) -> tuple[dict[str, float], dict[str, float]]:
        """FLOPs and bytes by key of one rank's step ([f]), layers multiplied in: for reading and for checks."""
        flops: dict[str, float] = {}
        moved: dict[str, float] = {}
        for op in self.ops:
            at = {name: float(x[INDEX[name]]) for name in (*op.flops, *op.bytes)}
            flops[op.key] = flops.get(op.key, 0.0) + op.layers * sum(c * at[n] for n, c in op.flops.items())
            moved[op.key] = moved.get(op.key, 0.0) + op.layers * sum(c * at[n] for n, c in op.bytes.items())
        return flops, moved
