"""Seconds of the engine's operators on a CUDA GPU, on a grid of shapes, as an engine profile (format eptwin-profile-1).

    python -m runtime.gpu_operators OUT.json --budget 300
    python -m runtime.gpu_operators OUT.json --only router --only replica_split

Each point is a CUDA graph of calls on inputs that together exceed the L2 cache, all random; its seconds are the median
over replays, its spread half the distance of the 10th and 90th percentile. Points are kept in OUT.json as they are
found: a run that was cut short goes on where it stopped. Largest sizes come last within a table, tables of wider use first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

from runtime.gpu_calls import Call, calls_of, fp8_product, read_kernel
from runtime.operators import NO_WINDOW

Json = dict[str, Any]
_REPLAYS = 10
_LEAST_S, _MOST_S, _POINT_S = 1e-3, 5e-3, 50e-3
_SHORT_S, _SHORT_CALLS = 2e-4, 96
"""A replay lasts about so long at least, and at most where calls are short; so long all replays of a point."""


@dataclass(frozen=True)
class Grid:
    """One table to be: every sheet of `shape` at every point of `axes`; `most` bounds the elements of its largest input."""

    operator: str
    attrs: dict[str, str]
    shape: tuple[str, ...]
    sheets: tuple[tuple[int, ...], ...]
    axes: dict[str, tuple[int, ...]]
    most: Callable[[dict[str, int]], float] = field(default=lambda values: 0.0)

    def points(self) -> Iterator[tuple[int, int, dict[str, int]]]:
        """(sheet, place in the sheet's C order, all values)."""
        for s, sheet in enumerate(self.sheets):
            fixed = dict(zip(self.shape, sheet, strict=True))
            for i, levels in enumerate(product(*self.axes.values())):
                yield s, i, {**fixed, **dict(zip(self.axes, levels, strict=True))}


_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_PRODUCT_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 384, 512, 1024, 2048, 4096, 8192, 16384)
_PRODUCTS = (  # (n, k) of Qwen3-30B-A3B and 235B, DeepSeek-V3/R1, Kimi K2, GLM-4.5, on one rank
    (5120, 2048), (2048, 4096), (9216, 4096), (4096, 8192), (2112, 7168), (24576, 1536), (12288, 1536), (7168, 16384),
    (7168, 8192), (4096, 7168), (7168, 2048), (36864, 7168), (7168, 18432), (32768, 512), (14336, 5120), (5120, 12288),
)
_PRODUCTS_BF16 = (  # of gpt-oss and DeepSeek-V2-Lite, down projections one by one, routers: what nobody serves in fp8
    (5120, 2880), (2880, 4096), (576, 2048), (3072, 2048), (2048, 2048), (4096, 512),
    (1536, 7168), (576, 7168), (128, 2048), (128, 4096), (256, 7168), (384, 7168),
)
_HEADS = ((151936, 2048), (151936, 4096), (129280, 7168))
_MOE = ("hidden", "intermediate", "top_k", "experts", "moe_tp", "moe_ep")
_MODELS = ((2048, 768, 8, 128), (4096, 1536, 8, 128), (7168, 2048, 8, 256), (7168, 2048, 8, 384), (4096, 14336, 2, 8))
_FAR_MODELS = (  # and an EP size: DeepSeek-V2-Lite, gpt-oss-20b, MiniMax-M2, GLM-4.5, Qwen3-Coder, Mixtral 8x22B
    (2048, 1408, 6, 64, 1), (2880, 2880, 4, 32, 1), (3072, 1536, 8, 256, 8), (5120, 1536, 8, 160, 16), (6144, 2560, 8, 160, 16),
    (6144, 16384, 2, 8, 4),
)
_SKEWED_TOKENS = (8, 64, 512, 4096, 32768)
"""What of them is measured under skew, whose table is as fine elsewhere as that of an even load."""
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_GQA = ("heads", "kv_heads", "head_dim", "window")
_WIDTHS = ((1536,), (2048,), (4096,), (7168,), (16384,))
_INNER = ((768,), (2048,), (18432,))
_MANY_ROWS = (*_ROWS, 32768, 65536, 131072)
_GATES = ((128, 8), (256, 8), (384, 8))
_LATENT_HEADS = ((16,), (32,), (64,), (128,))
_ROUTERS = ((128, 8, 2048), (128, 8, 4096), (256, 8, 7168), (384, 8, 7168))
_SPLITS = ((256, 288, 8, 8), (256, 288, 32, 8), (256, 288, 72, 8), (256, 288, 144, 8), (384, 416, 32, 8), (128, 144, 8, 8))


def grids() -> list[Grid]:
    """What an engine profile of this GPU holds."""
    bf16 = {"dtype": "bf16"}
    kv = {**bf16, "kv_dtype": "bf16"}
    latent = {**kv, "scope": "kernel"}
    narrow = tuple(shape for shape in _PRODUCTS if shape[0] < 30000)
    moe = [(*m, 1, ep) for m in _MODELS for ep in (1, 8, 32, 128) if _whole(m, ep)]
    moe += [(*m, 1, ep) for *m, ep in _FAR_MODELS]
    heads = tuple((*heads, 128, NO_WINDOW) for heads in ((32, 4), (64, 4), (64, 8), (16, 2), (8, 1)))
    decode = {"batch": (1, 4, 16, 32, 64, 128, 256, 512), "context": (16, 128, 512, 1024, 2048, 4096, 16384, 65536)}
    prefill = {"batch": (1, 2, 4, 8), "new_tokens": (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384)}
    stored: Callable[[dict[str, int]], float] = lambda v: v["batch"] * v["context"] / 3e6  # noqa: E731
    asked: Callable[[dict[str, int]], float] = lambda v: v["batch"] * v["new_tokens"] / 33000  # noqa: E731
    wanted: Callable[[dict[str, int]], float] = lambda v: v["m"] / 512 if (v["n"], v["k"]) in _HEADS else 0.0  # noqa: E731
    sent: Callable[[dict[str, int]], float] = lambda v: v["tokens"] * v["top_k"] / v["moe_ep"] / 140000  # noqa: E731
    known = {m[:2] for m in _MODELS}
    skewed: Callable[[dict[str, int]], float] = lambda v: (  # noqa: E731
        sent(v) if (v["hidden"], v["intermediate"]) in known or v["tokens"] in _SKEWED_TOKENS else 2.0)

    def experts(distribution: str, dtype: str) -> Grid:
        attrs = {"dtype": dtype, "layout": "fused", "distribution": distribution, "gated": "yes"}
        return Grid("moe", attrs, _MOE, tuple(moe), {"tokens": _TOKENS}, sent if distribution == "balanced" else skewed)

    return [
        Grid("gemm", bf16, ("n", "k"), (*_PRODUCTS, *_PRODUCTS_BF16, *_HEADS), {"m": _PRODUCT_ROWS}, wanted),
        Grid("attention_decode", kv, _GQA, heads, decode, stored),
        Grid("attention_prefill", kv, _GQA, heads[:3], prefill, asked),
        experts("balanced", "bf16"),
        experts("balanced", "fp8"),
        Grid("mla_decode", latent, ("heads",), _LATENT_HEADS, decode, stored),
        Grid("mla_bmm", {**bf16, "side": "pre"}, ("heads",), _LATENT_HEADS, {"tokens": _PRODUCT_ROWS[:-4]}),
        Grid("mla_bmm", {**bf16, "side": "post"}, ("heads",), _LATENT_HEADS, {"tokens": _PRODUCT_ROWS[:-4]}),
        Grid("gemm", {"dtype": "fp8"}, ("n", "k"), narrow, {"m": _PRODUCT_ROWS}),
        Grid("mla_prefill", latent, ("heads",), ((16,), (64,), (128,)), prefill, asked),
        experts("power_law_1.01", "bf16"),
        experts("power_law_1.01", "fp8"),
        Grid("norm", bf16, ("width",), _WIDTHS, {"tokens": _ROWS}),
        Grid("quant", bf16, ("width",), _WIDTHS, {"tokens": _ROWS}),
        Grid("silu", bf16, ("width",), _INNER, {"tokens": _MANY_ROWS}, lambda v: v["tokens"] * v["width"] / 3e8),
        Grid("rope", bf16, _GQA[:3], tuple(shape[:3] for shape in heads), {"tokens": _ROWS}),
        Grid("latent", bf16, ("heads",), ((16,), (64,), (128,)), {"tokens": _ROWS}),
        Grid("gate", bf16, ("experts", "top_k"), _GATES, {"tokens": _ROWS}),
        Grid("router", bf16, ("experts", "top_k", "hidden"), _ROUTERS, {"tokens": _ROWS}),
        Grid("replica_split", bf16, ("experts", "slots", "ranks", "top_k"), _SPLITS, {"tokens": _ROWS}),
    ]


def _whole(model: tuple[int, ...], ep: int) -> bool:
    """Whether the experts divide over `ep` ranks, and are not too many for one."""
    hidden, width, _, experts = model
    return experts % ep == 0 and ep <= experts and 6 * hidden * width * experts / ep < 60e9


def time_calls(calls: Sequence[Call]) -> tuple[float, float]:
    """(median seconds of one call, 80% half width as a fraction of it). Long calls are repeated less often."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
        once_s = max(_elapsed_s(calls[0]), 1e-6)
        calls = calls[: max(1, min(len(calls), round(_MOST_S / once_s)))]
        # a short call's time is that of its launch here, far above what it takes in a graph
        least = _SHORT_CALLS if once_s < _SHORT_S else 1
        rounds = -(-max(least, round(_LEAST_S / once_s)) // len(calls))
        graph = torch.cuda.CUDAGraph()  # not torch.cuda.graph, which collects garbage and empties the cache at every capture
        graph.capture_begin()
        try:
            for _ in range(rounds):
                for call in calls:
                    call()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # a capture left open would fail every later one too
                graph.capture_end()
            raise
        graph.capture_end()
    graph.replay()
    count = rounds * len(calls)
    replays = max(3, min(_REPLAYS, round(_POINT_S / once_s / count)))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    for mark in marks[:-1]:
        mark.record()
        graph.replay()
    marks[-1].record()
    marks[-1].synchronize()
    found = sorted(a.elapsed_time(b) / 1e3 / count for a, b in pairwise(marks))
    middle, cut = statistics.median(found), len(found) // 10
    return middle, (found[-1 - cut] - found[cut]) / 2 / middle


def _elapsed_s(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Measured:
    """Points found so far, in a file of their own beside the profile; written whole every few seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.points: dict[str, list[float] | None] = json.loads(path.read_text()) if path.exists() else {}
        self._written = time.monotonic()

    def put(self, key: str, value: tuple[float, float] | None) -> None:
        self.points[key] = None if value is None else [float(f"{value[0]:.4g}"), round(value[1], 4)]
        if time.monotonic() - self._written > 5:
            self.write()

    def write(self) -> None:
        _write(self.path, json.dumps(self.points))
        self._written = time.monotonic()


@torch.inference_mode()
def measure(out: Path, budget_s: float, progress: Callable[[str], None] = print, only: Sequence[str] = ()) -> Json:
    """Measure what `out` does not hold yet, of all operators or `only` some, for at most `budget_s` seconds; write and return
    the profile."""
    found = Measured(out.with_suffix(".points.json"))
    until = time.monotonic() + budget_s
    peaks = _peaks()
    for grid in [grid for grid in grids() if not only or grid.operator in only]:
        began, missed = time.monotonic(), 0
        for key, values in _missing(grid, found):
            if time.monotonic() > until:
                missed += 1
                continue
            try:
                found.put(key, _point(grid, values))
            except (RuntimeError, ValueError, AssertionError, TritonError) as error:  # told, and asked again by the next run
                progress(f"{key}: {str(error).splitlines()[0][:160]}")
        progress(f"{grid.operator:18} {' '.join(grid.attrs.values()):36} {time.monotonic() - began:6.1f} s, {missed} left out")
    found.write()
    profile = _profile(found, peaks)
    _write(out, json.dumps(profile, indent=1, allow_nan=False) + "\n")
    return profile


def _missing(grid: Grid, found: Measured) -> list[tuple[str, dict[str, int]]]:
    return [(key, values) for s, i, values in grid.points()
            if grid.most(values) <= 1 and (key := key_of(grid, values)) not in found.points]


def key_of(grid: Grid, values: dict[str, int]) -> str:
    """What a point is kept under."""
    return json.dumps([grid.operator, sorted(grid.attrs.items()), sorted(values.items())])


def _point(grid: Grid, values: dict[str, int]) -> tuple[float, float] | None:
    held = torch.cuda.memory_reserved()
    if held and held > torch.cuda.get_device_properties(0).total_memory / 4:
        torch.cuda.empty_cache()  # nothing can be given back inside a capture, where memory would then run out
    try:
        return time_calls(calls_of(grid.operator, grid.attrs, values))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def _peaks() -> Json:
    """Rates that this machine reaches: reading memory, large products in bf16 and fp8. One GPU has no links to measure."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bf16 = 2 * n**3 / time_calls([lambda: a @ b])[0]
    fp8 = 2 * n**3 / time_calls([fp8_product(n, n, n)])[0]
    call, moved = read_kernel()
    return {"bf16_flop_per_s": bf16, "fp8_flop_per_s": fp8, "hbm_bytes_per_s": moved / time_calls([call])[0],
            "nvlink_bytes_per_s": 450e9, "nic_bytes_per_s": 50e9}


def tables_of(found: Measured) -> list[Json]:
    """The tables of an engine profile that these points fill."""
    return [table for grid in grids() if (table := _table(grid, found)) is not None]


def _profile(found: Measured, peaks: Json) -> Json:
    name = torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower()
    return {"format": "eptwin-profile-1", "gpu": name, "engine": "eptwin", "engine_version": metadata_version("eptwin"),
            "peaks": peaks, "sources": [{"name": "eptwin calibrate", "version": metadata_version("eptwin")}],
            "provenance": {"torch": torch.__version__, "triton": metadata_version("triton"),
                           "device": torch.cuda.get_device_name(),
                           "method": "CUDA graphs of calls on random inputs larger than L2; median of 10 replays",
                           "links": "nvlink and nic rates are data-sheet values: one GPU measures neither"},
            "tables": tables_of(found)}


def _table(grid: Grid, found: Measured) -> Json | None:
    sheets, rows, spreads = [], [], []
    size = math.prod(map(len, grid.axes.values()))
    by_sheet: dict[int, list[float | None]] = {s: [None] * size for s in range(len(grid.sheets))}
    for s, i, values in grid.points():
        point = found.points.get(key_of(grid, values))
        if point is not None:
            by_sheet[s][i] = point[0]
            spreads.append(point[1])
    for s, row in by_sheet.items():
        if any(x is not None for x in row):
            sheets.append(list(grid.sheets[s]))
            rows.append(row)
    if not rows:
        return None
    return {"operator": grid.operator, "attrs": grid.attrs, "shape": list(grid.shape), "sheets": sheets,
            "axes": {name: list(levels) for name, levels in grid.axes.items()}, "seconds": rows,
            "spread": round(min(statistics.median(spreads), 1.0), 4), "source": "measured"}


def metadata_version(package: str) -> str:
    """An installed package's version, 0 without one."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "0"


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="profile to write; points found before are read from beside it")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds")
    parser.add_argument("--only", action="append", default=[], choices=sorted({grid.operator for grid in grids()}),
                        metavar="OPERATOR", help="this operator alone; repeatable")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU; `eptwin calibrate` measures a CPU")
    measure(given.out, given.budget, only=given.only)


if __name__ == "__main__":
    main()
