"""Constants fitted on published records, fitted again without each of them: does what is left predict it?

`python -m benchmarks.published_left_out` takes no files: the figures are those that `twin/validate/record_pools.py` and
`twin/cost/protocols.py` name with their sources.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from twin.cost.protocols import KV_BASE_S, KV_LINK, PROTOCOLS
from twin.spec.load import load_model
from twin.validate.record_kinds import ANSWERS
from twin.validate.record_pools import SPREAD, expert_loads, rank_excess
from twin.validate.record_words import Found

T = TypeVar("T")
WITHOUT_EPLB = ((8, 0.673), (16, 0.614), (32, 0.550))  # mean over fullest load of ranks, LMSYS 2025-05
WITH_EPLB = ((8, 0.944), (16, 0.902), (32, 0.800))
# bytes a GPU, bytes/s of its NIC, seconds: Mooncake on 2 x 8 H800, and UCX through NIXL (llm-d v0.5)
HAND_OVERS = (("Mooncake, 1k tokens", 18.87e6, 50e9, 1.5e-3), ("Mooncake, 4k", 75.5e6, 50e9, 4.75e-3),
              ("Mooncake, 8k", 151e6, 50e9, 8.84e-3), ("Mooncake, 32k", 604e6, 50e9, 31.65e-3),
              ("UCX, 4 GiB", 2.0**32, 25e9, 0.36))


# milliseconds a layer for 16k tokens on 32 GPUs (LMSYS 2025-05): dense products, attention, grouped experts, others
FAMILIES = ("other_gemm", "attention", "moe_gemm", "other")
EVEN_TRACES = (("DeepSeek", (8.41, 5.62, 12.37, 5.10)), ("SGLang, even load", (9.51, 6.46, 12.24, 6.59)))
REAL_TRACES = (("SGLang, 16k", (8.82, 5.68, 10.48, 6.14), 16384), ("SGLang, 8k", (10.67, 5.68, 10.20, 6.23), 8192))
# dispatch and combine: DeepEP's test on the same GPUs, and inside engines
TESTED = (7.24, 14.25)
SERVED = (("DeepSeek, overlap", (9.45, 17.24)), ("SGLang, even load, overlap", (10.81, 14.97)), ("SGLang, none", (10.48, 15.65)))


@dataclass(frozen=True)
class Left:
    """One record left out: what the others' fit says of it. `error` is signed."""

    what: str
    left_out: str
    fitted: str
    published: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def balance(ranks: int, spread: tuple[float, float], away: float | None) -> float:
    """Mean over fullest load of DeepSeek-V3's ranks; `away` is the drift since EPLB placed its experts, None without EPLB."""
    eplb = away is not None
    loads = expert_loads(load_model("deepseek-v3"), ranks, 32 * eplb, -(-ranks // 8), away or 0.0, eplb, spread)
    return float((1 / rank_excess(*loads)).mean())


def best(candidates: Sequence[T], predict: Callable[[T], Sequence[float]], truth: Sequence[float]) -> T:
    """The candidate with the least squared log error."""
    return min(candidates, key=lambda c: float(np.sum(np.log(np.array(predict(c)) / np.array(truth)) ** 2)))


def spreads() -> Iterator[Left]:
    """Popularity between and inside groups, from balance without EPLB."""
    grid = [(a, b) for a in np.arange(0.1, 0.46, 0.05).round(2).tolist() for b in np.arange(0.3, 0.81, 0.05).round(2).tolist()]
    for ranks, published in WITHOUT_EPLB:
        rest = [point for point in WITHOUT_EPLB if point[0] != ranks]
        found = best(grid, lambda s, rest=rest: [balance(r, s, None) for r, _ in rest], [b for _, b in rest])  # type: ignore[misc]
        yield Left("balance without EPLB", f"{ranks} GPUs", f"{found[0]}, {found[1]}", published, balance(ranks, found, None))


def drifts() -> Iterator[Left]:
    """Drift since the placement, from balance with EPLB."""
    grid = np.arange(0.10, 0.46, 0.01).round(2).tolist()
    for ranks, published in WITH_EPLB:
        rest = [point for point in WITH_EPLB if point[0] != ranks]
        found = best(grid, lambda d, rest=rest: [balance(r, SPREAD, d) for r, _ in rest], [b for _, b in rest])  # type: ignore[misc]
        yield Left("balance with EPLB", f"{ranks} GPUs", f"{found}", published, balance(ranks, SPREAD, found))


def gathers() -> Iterator[Left]:
    """The rate at which a GPU's KV blocks are gathered, from one transfer engine for the other."""
    def seconds(n_bytes: float, nic: float, gather: float) -> float:
        return KV_BASE_S + n_bytes / (KV_LINK * nic) + n_bytes / gather

    grid = (np.arange(15, 61) * 1e9).tolist()
    for engine in ("Mooncake", "UCX"):
        rest = [point for point in HAND_OVERS if not point[0].startswith(engine)]
        found = best(grid, lambda g, rest=rest: [seconds(n, nic, g) for _, n, nic, _ in rest], [s for *_, s in rest])  # type: ignore[misc]
        for name, n_bytes, nic, published in HAND_OVERS:
            if name.startswith(engine):
                predicted = seconds(n_bytes, nic, found)
                yield Left("KV transfer, engine left out", name, f"{found / 1e9:.0f} GB/s", published, predicted)


def exchanges() -> Iterator[Left]:
    """What an exchange of normal mode takes in an engine over its library's own test."""
    for place, phase in enumerate(("dispatch", "combine")):
        for name, published in SERVED:
            rest = [other[place] / TESTED[place] for named, other in SERVED if named != name]
            factor = float(np.exp(np.mean(np.log(rest))))
            yield Left(f"{phase} in an engine", name, f"{factor:.2f}", published[place], factor * TESTED[place])


def beside() -> Iterator[Left]:
    """What kernels take beside exchanges: of one trace with an even load from the other, of real loads from both as shipped."""
    slows = PROTOCOLS["deepep_normal"].slows
    assert slows is not None
    shipped = (slows.products, slows.attention, slows.experts, slows.others)
    for place, family in enumerate(FAMILIES):
        alone = _alone_ms(family, 8192, even=True)
        for (name, published), (_, other) in zip(EVEN_TRACES, EVEN_TRACES[::-1], strict=True):
            factor = other[place] / alone
            yield Left(f"{family} beside exchanges", name, f"{factor:.2f}", published[place], factor * alone)
        for name, published, tokens in REAL_TRACES:
            predicted = shipped[place] * _alone_ms(family, tokens // 2, even=False)
            yield Left(f"{family} beside exchanges", f"{name} (not fitted)", f"{shipped[place]}", published[place], predicted)


def _alone_ms(family: str, tokens: int, *, even: bool) -> float:
    """A layer's part without overlap, in passes of so many tokens, for 16k of them."""
    found = ANSWERS["layer"]({
        "model": "deepseek-v3", "gpu": "H100", "ep": 32, "isl": 4096, "batch_per_gpu": tokens, "phase": "prefill",
        "metric": f"prefill_layer_time_{family}", "unit": "ms/layer (scaled to 16,384 tok/GPU)",
        "features": {"TBO": False, "EPLB": True}, "note": "perfect balance" if even else ""})
    assert isinstance(found, Found), found
    return found.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    rows = [*spreads(), *drifts(), *gathers(), *exchanges(), *beside()]
    for row in rows:
        print(f"{row.what:30s} {row.left_out:20s} {row.fitted:>10s}  {row.published:.4g} {row.predicted:.4g} {row.error:+.1%}")
    if options.json:
        content = [{**asdict(row), "error": row.error} for row in rows]
        scratch = options.json.with_name(options.json.name + ".tmp")
        scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        scratch.replace(options.json)


if __name__ == "__main__":
    main()
