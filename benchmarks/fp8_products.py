"""Seconds of fp8 products of decode steps and of the fp8 MoE layer, by every candidate the engine may choose, on one GPU.

    python -m benchmarks.fp8_products --json out.json            # all of it, about a minute
    python -m benchmarks.fp8_products --part moe --seconds 40

Shapes are those of DeepSeek-R1, Kimi K2 and Qwen3-235B. Each figure is a CUDA-graph replay over inputs that together exceed the
L2 cache; torch's own product is timed in the same run. Every candidate is checked against float64 first. Kernels are compiled
by processes of their own before; what does not fit in `--seconds` is left out, and said to be.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.fp8_moe import compile_moe, measure_moe, show_moe
from benchmarks.timing import measure_ceilings, provenance, time_graph
from runtime.kernels.fused import FP8, quant_fp8_rows
from runtime.kernels.products import Rows8, Share, fp8_product_gated, fp8_product_normed, row_fits
from runtime.ops import Fp8Weight
from runtime.products import cut_product, torch_product
from runtime.quantise import quantise_rows
from runtime.tune_products import CANDIDATES, candidates

Json = dict[str, Any]
_ROTATED_BYTES = 150e6
_PROCESSES = 15
_ROUNDING = 0.01
ROWS = (128, 64, 16, 256)


@dataclass(frozen=True)
class Product:
    """A weight [n, k] of a model's layer. `after`: what follows it."""

    model: str
    part: str
    n: int
    k: int
    after: str = ""


PRODUCTS = (
    Product("r1", "q_a + kv_a", 2112, 7168, "norm"), Product("r1", "q_b", 24576, 1536), Product("r1", "o", 7168, 16384),
    Product("r1", "shared gate, up", 4096, 7168, "gate"), Product("r1", "shared down", 7168, 2048),
    Product("kimi", "q_b", 12288, 1536), Product("kimi", "o", 7168, 8192), Product("qwen3-235b", "qkv", 9216, 4096),
    Product("qwen3-235b", "o", 4096, 8192), Product("r1", "dense gate, up", 36864, 7168),
    Product("r1", "dense down", 7168, 18432))


class Clock:
    """What is left of the time given."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def over(self) -> bool:
        return time.monotonic() > self._end


@click.command(help=__doc__)
@click.option("--part", type=click.Choice(["all", "products", "moe"]), default="all", show_default=True)
@click.option("--seconds", default=75.0, show_default=True, help="in all; what is not reached is left out")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="write figures here, not out")
@click.option("--commit", default=None, help="git commit to record (else $GIT_COMMIT)")
@click.option("--compile", "compiles", default=None, hidden=True, help="i/n: compile a share of the kernels and leave")
def main(part: str, seconds: float, json_path: Path | None, commit: str | None, compiles: str | None) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("needs a CUDA GPU")
    if compiles:
        compile_share(*(int(number) for number in compiles.split("/")), part)
        return
    clock = Clock(seconds)
    torch.manual_seed(0)
    began = time.monotonic()
    compile_all(part)
    found: Json = {"provenance": provenance(commit), "compile_s": time.monotonic() - began}
    ceilings = measure_ceilings()
    found["read_bytes_per_s"], found["bf16_flop_per_s"] = ceilings.read_bytes_per_s, ceilings.bf16_flop_per_s
    print(f"{torch.cuda.get_device_name(0)}: read {ceilings.read_bytes_per_s / 1e12:.2f} TB/s, bf16 product "
          f"{ceilings.bf16_flop_per_s / 1e12:.0f} TFLOP/s; compiled in {found['compile_s']:.0f} s", flush=True)
    if part != "products":
        found["moe"] = measure_moe(clock)
        show_moe(found["moe"])
    if part != "moe":
        found["products"] = [row for rows, product in itertools.product(ROWS, PRODUCTS)
                             if (row := measure_product(product, rows, ceilings.read_bytes_per_s, clock)) is not None]
        found["left_out"] = len(ROWS) * len(PRODUCTS) - len(found["products"])
        _layers(found["products"])
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(found, indent=1) + "\n")
    else:
        print(json.dumps(found))


def compile_all(part: str) -> None:
    """Fill triton's cache by processes side by side."""
    works = [subprocess.Popen([sys.executable, "-m", "benchmarks.fp8_products", "--part", part, "--compile", f"{i}/{_PROCESSES}"],
                              stdout=subprocess.DEVNULL) for i in range(_PROCESSES)]
    for work in works:
        work.wait()


def compile_share(index: int, count: int, part: str) -> None:
    """Run what this process compiles for the others, once."""
    if part != "products":
        compile_moe(index, count)
    jobs = [(rows, share) for rows in ROWS for share in _candidates(rows)] if part != "moe" else []
    for rows, share in jobs[index::count]:
        for product in PRODUCTS:
            x = Rows8(torch.empty(rows, product.k, dtype=FP8, device="cuda"), torch.ones(rows, device="cuda"))
            try:
                for call in _calls(product, x, _weight(torch.empty(product.n, product.k, dtype=FP8, device="cuda")), share):
                    call()
            except (RuntimeError, ValueError) as err:  # too much shared memory, say: measured as failing
                print(share, str(err)[:200], file=sys.stderr)


def _weight(data: torch.Tensor) -> Fp8Weight:
    return Fp8Weight(data, torch.ones(len(data), device=data.device))


def _candidates(rows: int) -> Iterator[Share]:
    """The tuner's, launched early; and its first without, and without asking for weights ahead."""
    yield from candidates(rows, pdl=True)
    yield replace(CANDIDATES[rows][0], pdl=True)
    yield CANDIDATES[rows][0]


def _calls(product: Product, x: Rows8, weight: Fp8Weight, share: Share) -> list[Any]:
    """The product alone, then with what follows it."""
    calls = [lambda: cut_product(x, weight, share)]
    normed = 1536
    if product.after == "norm" and row_fits(normed, share):
        gain = torch.ones(normed, dtype=torch.bfloat16, device="cuda")
        calls.append(lambda: fp8_product_normed(x, weight.data, weight.scale, share, (gain, 1e-6)))
    if product.after == "gate" and row_fits(product.n // 2, share):
        calls.append(lambda: fp8_product_gated(x, weight.data, weight.scale, share))
    return calls


def measure_product(product: Product, rows: int, read_bytes_per_s: float, clock: Clock) -> Json | None:
    """Torch's time and every candidate's; None where time is over."""
    if clock.over:
        return None
    count = max(1, min(16, -(-int(_ROTATED_BYTES) // (product.n * product.k))))
    wide = torch.randn(product.n, product.k, device="cuda") * product.k**-0.5
    first = Fp8Weight(*quantise_rows(wide))
    weights = [first, *(Fp8Weight(first.data.clone(), first.scale) for _ in range(count - 1))]
    x = Rows8(*quant_fp8_rows(torch.randn(rows, product.k, dtype=torch.bfloat16, device="cuda")))
    want = (x.data.double() * x.scale.double()[:, None]) @ (first.data.double() * first.scale.double()[:, None]).T
    plain_s, floor_s = _seconds([lambda w=w: torch_product(x, w) for w in weights]), product.n * product.k / read_bytes_per_s
    row: Json = {"model": product.model, "part": product.part, "n": product.n, "k": product.k, "rows": rows, "torch_s": plain_s,
                 "floor_s": floor_s, "torch_error": _error(torch_product(x, first), want), "candidates": []}
    for share in _candidates(rows):
        row["candidates"].append({"share": vars(share), **_candidate(product, x, weights, share, want)})
    timed = [c for c in row["candidates"] if "seconds" in c]
    best = min(timed, key=lambda c: c["seconds"]) if timed else None
    row["best"] = best
    print(f"{product.model:11} {product.part:16} {rows:4} rows: floor {floor_s * 1e6:6.1f}, torch {plain_s * 1e6:6.1f} us;",
          " ".join(f"{_name(c['share'])} {c['seconds'] * 1e6:.1f}" + (f"(+{c['after_s'] * 1e6:.1f})" if "after_s" in c else "")
                   for c in timed), *(c["failed"][:80] for c in row["candidates"] if "failed" in c), flush=True)
    return row


def _candidate(product: Product, x: Rows8, weights: list[Fp8Weight], share: Share, want: torch.Tensor) -> Json:
    try:
        error = _error(cut_product(x, weights[0], share), want)
        same = torch.equal(cut_product(x, weights[0], share), cut_product(x, weights[0], share))
        if not error < _ROUNDING or not same:
            return {"failed": f"error {error:.3g}, {'same' if same else 'other'} numbers again"}
        per_weight = [_calls(product, x, w, share) for w in weights]
        seconds = [_seconds([calls[i] for calls in per_weight]) for i in range(len(per_weight[0]))]
        return {"error": error, "seconds": seconds[0], **({"after_s": seconds[1] - seconds[0]} if seconds[1:] else {})}
    except (RuntimeError, ValueError) as err:
        return {"failed": str(err)}


def _seconds(calls: list[Any]) -> float:
    return time_graph(calls, replays=9, least_s=0.001).median_s


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def _name(share: Json) -> str:
    flags = "".join(letter for letter, name in (("W", "whole"), ("T", "tma"), ("P", "pdl"), ("A", "ahead")) if share[name])
    return f"{share['m']}x{share['n']}x{share['k']}/{share['warps']}w{share['stages']}s{share['resident']}{flags}"


def _layers(products: list[Json]) -> None:
    """What a layer's products take in all, by torch and by the best candidates."""
    for model, rows in itertools.product(("r1", "kimi", "qwen3-235b"), ROWS):
        of = [p for p in products if p["rows"] == rows and p["best"] and "dense" not in p["part"]
              and (p["model"] == model or (model == "kimi" and p["part"] in ("q_a + kv_a", "shared gate, up", "shared down")))]
        if of:
            torch_us, best_us, floor_us = (1e6 * sum(each) for each in zip(*(
                (p["torch_s"], min(p["torch_s"], p["best"]["seconds"]), p["floor_s"]) for p in of), strict=True))
            print(f"a layer of {model} at {rows} rows ({len(of)} products): floor {floor_us:.1f}, torch {torch_us:.1f}, best "
                  f"{best_us:.1f} us", flush=True)


if __name__ == "__main__":
    main()
