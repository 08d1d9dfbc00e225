"""Made-up tables with a known truth: seconds = launch + max(compute, memory) / efficiency."""

from __future__ import annotations

import numpy as np

from twin.cost.profile import GpuPeaks, Profile, Source, Table

PEAKS = GpuPeaks(bf16_flop_per_s=1e15, fp8_flop_per_s=2e15, hbm_bytes_per_s=4e12, nvlink_bytes_per_s=4.5e11, nic_bytes_per_s=5e10)
LAUNCH_S, REACHED = 4e-6, 0.7
M = tuple(float(2**i) for i in range(14))
NK = (1024.0, 2048.0, 4096.0, 8192.0)


def truth_s(operator: str, values: dict[str, object], attrs: dict[str, str], peaks: GpuPeaks = PEAKS) -> np.ndarray:
    return LAUNCH_S + peaks.roofline_s(operator, values, attrs) / REACHED


def table(operator: str, axes: dict[str, tuple[float, ...]], attrs: dict[str, str], *, shape: tuple[str, ...] = (),
          sheets: tuple[tuple[float, ...], ...] = ((),), noise: float = 0.0, seed: int = 0, peaks: GpuPeaks = PEAKS,
          slower: float = 1.0, **more: object) -> Table:
    blank = Table(operator=operator, attrs=attrs, shape=shape, sheets=sheets, axes=axes,
                  seconds=tuple(tuple([1.0] * int(np.prod([len(v) for v in axes.values()]))) for _ in sheets))
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(len(sheets)):
        seconds = np.broadcast_to(truth_s(operator, blank.values(i), attrs, peaks), blank.grid(i).shape) * slower
        rows.append(tuple((seconds * np.exp(noise * rng.standard_normal(seconds.shape))).ravel().tolist()))
    return blank.model_copy(update={"seconds": tuple(rows), **more})


def gemm(**more: object) -> Table:
    return table("gemm", {"m": M, "n": NK, "k": NK}, {"dtype": "bf16"}, **more)  # type: ignore[arg-type]


def profile(*tables: Table, gpu: str = "h200", engine: str = "vllm", version: str = "1.0", peaks: GpuPeaks = PEAKS) -> Profile:
    return Profile(gpu=gpu, engine=engine, engine_version=version, peaks=peaks, sources=(Source(name="made up"),), tables=tables)
