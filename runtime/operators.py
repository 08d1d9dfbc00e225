"""Seconds of single operators on this machine, as tables of an engine profile (format eptwin-profile-1).

Each is what one rank of a pool runs, through the same operators that the model uses, on random data. A point is the
median of repeated calls after a warm-up; `spread` is the 80% half width of repeats around it, as a fraction.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F

from runtime.batch import Segment, make_step
from runtime.layout import RankLayout
from runtime.model.params import kv_head_slice
from runtime.ops import ExpertWeights, TorchOps
from twin.spec.model import ModelSpec

NO_WINDOW = 1 << 20
"""How profiles write attention that sees everything."""
_BLOCK = 16
Json = dict[str, Any]


@dataclass(frozen=True)
class Timer:
    """Repeats a call until `seconds` have passed, at least `least` times."""

    device: torch.device
    seconds: float = 0.03
    least: int = 5

    def __call__(self, call: Callable[[], object]) -> tuple[float, float]:
        """(median seconds, 80% half width as a fraction of it)."""
        call()
        samples: list[float] = []
        until = time.perf_counter() + self.seconds
        while len(samples) < self.least or (time.perf_counter() < until and len(samples) < 1000):
            self._sync()
            began = time.perf_counter()
            call()
            self._sync()
            samples.append(time.perf_counter() - began)
        middle = statistics.median(samples)
        deciles = statistics.quantiles(samples, n=10)
        return middle, (deciles[8] - deciles[0]) / 2 / middle

    def _sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@torch.inference_mode()
def operator_profile(model: ModelSpec, at: RankLayout, dtype: torch.dtype, device: torch.device | str = "cpu", *,
                     max_tokens: int = 1024, max_context: int = 1024, batches: Sequence[int] = (1, 4, 16)) -> Json:
    """The profile of one rank's operators: gemm, moe, and GQA attention (profiles know MLA in one size only, so a model
    with latents is measured by whole steps instead)."""
    device = torch.device(device)
    bench = _Bench(model, at, dtype, device, Timer(device))
    tokens = _ladder(1, max_tokens)
    tables = [bench.gemm(tokens)]
    if model.moe is not None:
        tables.append(bench.moe(tokens))
    if model.attention.kind == "gqa":
        contexts = _ladder(16, max_context)
        tables += [bench.attention_decode(batches, contexts), bench.attention_prefill(contexts)]
    return {"format": "eptwin-profile-1", "gpu": _device_name(device), "engine": "eptwin", "engine_version": _version("eptwin"),
            "peaks": bench.peaks(), "sources": [{"name": "eptwin calibrate", "version": _version("eptwin")}],
            "provenance": {"torch": torch.__version__, "threads": str(torch.get_num_threads()), "model": model.name,
                           "machine": f"{platform.machine()}, Python {platform.python_version()}"},
            "tables": tables}


@dataclass(frozen=True)
class _Bench:
    model: ModelSpec
    at: RankLayout
    dtype: torch.dtype
    device: torch.device
    timer: Timer

    @property
    def _attrs(self) -> dict[str, str]:
        return {"dtype": {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]}

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def peaks(self) -> Json:
        """What this machine reaches: a large product, and reading memory (a copy moves two bytes for one read)."""
        n = 1024 if self.device.type == "cpu" else 8192
        a, b = self._random(n, n), self._random(n, n)
        flops = 2 * n**3 / self.timer(lambda: a @ b)[0]
        big = torch.empty(1 << (26 if self.device.type == "cpu" else 30), dtype=torch.uint8, device=self.device)
        copy = torch.empty_like(big)
        bandwidth = 2 * big.numel() / self.timer(lambda: copy.copy_(big))[0]
        return {"bf16_flop_per_s": flops, "hbm_bytes_per_s": bandwidth, "nvlink_bytes_per_s": bandwidth / 2,
                "nic_bytes_per_s": bandwidth / 2}

    def gemm(self, tokens: Sequence[int]) -> Json:
        """Every dense product of the model, as sheets (n, k) over m."""
        sheets, rows, spreads = [], [], []
        for n, k in sorted(self._dense_shapes()):
            weight = self._random(n, k)
            inputs = [self._random(m, k) for m in tokens]
            found = [self.timer(lambda x=x, weight=weight: F.linear(x, weight)) for x in inputs]
            sheets.append([n, k])
            rows.append([seconds for seconds, _ in found])
            spreads += [spread for _, spread in found]
        return _table("gemm", self._attrs, ["n", "k"], sheets, {"m": list(tokens)}, rows, spreads)

    def _dense_shapes(self) -> set[tuple[int, int]]:
        a, h, tp = self.model.attention, self.model.hidden, self.at.tp
        shapes = {(-(-self.model.vocab // tp), h), (h, a.heads // tp * a.v_head_dim)}
        if a.kind == "gqa":
            first, last = kv_head_slice(self.model, tp, self.at.tp_rank)
            shapes.add(((a.heads // tp + 2 * (last - first)) * a.head_dim, h))
        else:
            assert a.kv_lora_rank and a.qk_rope_head_dim
            shapes |= {(a.kv_lora_rank + a.qk_rope_head_dim, h), (a.heads // tp * a.head_dim, a.q_lora_rank or h)}
            shapes |= {(a.q_lora_rank, h)} if a.q_lora_rank else set()
        widths = [self.model.dense_intermediate] if self.model.dense_layers else []
        widths += [self.model.moe.shared_intermediate] if self.model.moe and self.model.moe.shared_intermediate else []
        for width in widths:
            shapes |= {(2 * width // tp, h), (h, width // tp)}
        return shapes

    def moe(self, tokens: Sequence[int]) -> Json:
        """Grouped experts of one rank; `tokens` counts those of the whole EP group, routed uniformly."""
        m, at, h = self.model.moe, self.at, self.model.hidden
        assert m is not None
        inner, slots = m.intermediate // at.expert_tp, at.slots_per_rank
        w13, w2 = self._random(slots, 2 * inner, h) / math.sqrt(h), self._random(slots, h, inner) / math.sqrt(inner)
        weights = ExpertWeights(w13, w2)
        ops, row, spreads = TorchOps(), [], []
        for count in tokens:
            ids = torch.rand(count, m.experts, device=self.device).topk(m.top_k, -1)[1] - at.ep_rank * slots
            here = (ids >= 0) & (ids < slots)
            rows = here.any(1)
            x, ids = self._random(int(rows.sum()), h), torch.where(here, ids, -1)[rows]
            gate = torch.rand(ids.shape, device=self.device)
            seconds, spread = self.timer(lambda x=x, ids=ids, gate=gate: ops.experts(x, ids, gate, weights, m.swiglu_limit))
            row.append(seconds)
            spreads.append(spread)
        shape = {"hidden": h, "intermediate": m.intermediate, "top_k": m.top_k, "experts": m.experts, "moe_tp": at.expert_tp,
                 "moe_ep": at.ep}
        attrs = {**self._attrs, "layout": "fused", "distribution": "uniform", "gated": "yes"}
        return _table("moe", attrs, list(shape), [list(shape.values())], {"tokens": list(tokens)}, [row], spreads)

    def attention_decode(self, batches: Sequence[int], contexts: Sequence[int]) -> Json:
        """One layer's paged decode attention over batch x context."""
        heads, cache = self._attention(max(batches) * -(-max(contexts) // _BLOCK))
        ops, row, spreads, tables = TorchOps(), [], [], -(-max(contexts) // _BLOCK)
        for batch in batches:
            q = self._random(batch, heads, self.model.attention.head_dim)
            for context in contexts:
                segments = [Segment([0], context - 1, list(range(i * tables, (i + 1) * tables))) for i in range(batch)]
                step = make_step(segments, _BLOCK, self.device)
                seconds, spread = self.timer(lambda q=q, step=step: ops.attention(q, cache, step, scale=0.1, window=None,
                                                                                  sinks_Q=None))
                row.append(seconds)
                spreads.append(spread)
        axes = {"batch": list(batches), "context": list(contexts)}
        return _table("attention_decode", self._kv_attrs, *self._attention_shape(), axes, [row], spreads)

    def attention_prefill(self, lengths: Sequence[int]) -> Json:
        """One layer's causal attention of one prompt without past."""
        heads, cache = self._attention(-(-max(lengths) // _BLOCK))
        ops, row, spreads = TorchOps(), [], []
        for n in lengths:
            q = self._random(n, heads, self.model.attention.head_dim)
            step = make_step([Segment([0] * n, 0, list(range(-(-n // _BLOCK))), True)], _BLOCK, self.device)
            seconds, spread = self.timer(lambda q=q, step=step: ops.attention(q, cache, step, scale=0.1, window=None,
                                                                              sinks_Q=None))
            row.append(seconds)
            spreads.append(spread)
        axes = {"batch": [1], "new_tokens": list(lengths)}
        return _table("attention_prefill", self._kv_attrs, *self._attention_shape(), axes, [row], spreads)

    @property
    def _kv_attrs(self) -> dict[str, str]:
        return {**self._attrs, "kv_dtype": self._attrs["dtype"]}

    def _attention(self, blocks: int) -> tuple[int, torch.Tensor]:
        first, last = kv_head_slice(self.model, self.at.tp, self.at.tp_rank)
        cache = self._random(blocks, 2, _BLOCK, last - first, self.model.attention.head_dim)
        return self.model.attention.heads // self.at.tp, cache

    def _attention_shape(self) -> tuple[list[str], list[list[int]]]:
        a, tp = self.model.attention, self.at.tp
        first, last = kv_head_slice(self.model, tp, self.at.tp_rank)
        return ["heads", "kv_heads", "head_dim", "window"], [[a.heads // tp, last - first, a.head_dim, NO_WINDOW]]


def _table(operator: str, attrs: dict[str, str], shape: list[str], sheets: list[list[int]], axes: dict[str, list[int]],
           seconds: list[list[float]], spreads: list[float]) -> Json:
    rounded = [[float(f"{s:.3g}") for s in row] for row in seconds]
    return {"operator": operator, "attrs": attrs, "shape": shape, "sheets": sheets, "axes": axes, "seconds": rounded,
            "spread": round(min(statistics.median(spreads), 1.0), 4), "source": "measured"}


def _ladder(low: int, high: int) -> list[int]:
    """Powers of four from `low`, and `high`."""
    steps = [low]
    while steps[-1] * 4 < high:
        steps.append(steps[-1] * 4)
    return [*steps, high] if high > steps[-1] else steps


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).removeprefix("NVIDIA ").split()[0].lower()
    return "cpu"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "0"
