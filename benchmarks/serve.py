"""Output tokens a second of the whole engine: many requests at once through the front end, continuous batching.

    python -m benchmarks.serve --model qwen3-30b-a3b --requests 128 --isl 512 1536 --osl 128 --json out.json

One GPU, random weights, random prompts, greedy. Two rounds that fill a whole step come first; the clock runs from the first
submission to the last token. `compiles_after_start` counts kernels that any request waited for (it should be 0),
`device_allocs` how often memory was asked of the device meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from runtime.flight import Stream
from runtime.frontend import Frontend
from runtime.options import EngineOptions
from runtime.types import SamplingParams
from twin.spec.load import load_model
from twin.spec.plan import Plan, PoolPlan

Json = dict[str, Any]


async def serve(name: str, pool: PoolPlan, options: EngineOptions, prompts: list[list[int]], osl: list[int]) -> Json:
    """Start the engine, warm it up, send everything at once and wait for the end."""
    model = load_model(name)
    frontend = Frontend(Plan(pools=(pool,)), model, options)
    began = time.monotonic()
    await frontend.start()
    ready_s = time.monotonic() - began
    try:
        few = SamplingParams(max_tokens=min(8, *osl), ignore_eos=True)
        for _ in range(2):
            await _all([frontend.submit(p, few) for p in fill(prompts, pool.max_batch_tokens)])
        frontend.forget()
        start = time.monotonic()
        times = await _all([frontend.submit(p, SamplingParams(max_tokens=n, ignore_eos=True))
                            for p, n in zip(prompts, osl, strict=True)])
        figures = _figures(start, times, prompts, frontend.records.steps, ready_s)
        figures["compiles_after_start"] = sum(each.compiles_after_start for each in frontend.stats().instances)
    finally:
        await frontend.stop()
    prepared = {rank: message.get("prepared", {}) for rank, message in frontend.ready.items()}
    figures["device_allocs"] = sum(totals.get("device_allocs", 0) - prepared[rank].get("device_allocs", 0)
                                   for rank, totals in frontend.totals.items())
    return {**figures, "prepared": prepared}


def fill(prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Prompts enough for a step of so many tokens and part of another."""
    found, sum_ = [], 0
    for prompt in prompts:
        if sum_ > 1.25 * tokens:
            break
        found.append(prompt)
        sum_ += len(prompt)
    return found


SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
AZURE_ISL, AZURE_OSL = (64, 181, 396, 1020, 1189, 2735, 4083, 4142), (16, 41, 85, 129, 395, 424, 451, 601)
"""Quantiles of prompt and output lengths of Azure's LLM inference trace of 2023, conversations (19,366 requests, CC-BY 4.0);
the least are rounded."""


def azure_like(rng: np.random.Generator, requests: int) -> tuple[list[int], list[int]]:
    """Prompt and output lengths between the trace's quantiles up to its 99th percentile, drawn apart from each other."""
    isl, osl = (np.interp(rng.uniform(0, SHARES[-1], requests), SHARES, marks).astype(int).tolist()
                for marks in (AZURE_ISL, AZURE_OSL))
    return isl, osl


async def _all(streams: list[Stream]) -> list[list[float]]:
    async def one(stream: Stream) -> list[float]:
        return [event.time async for event in stream]

    return await asyncio.gather(*map(one, streams))


def _figures(start: float, times: list[list[float]], prompts: list[list[int]], steps: list[Json], ready_s: float) -> Json:
    wall = max(t[-1] for t in times) - start
    made, read = sum(map(len, times)), sum(map(len, prompts))
    tpot = [(t[-1] - t[0]) / (len(t) - 1) for t in times if len(t) > 1]
    decode = [s for s in steps if not s["prefill_tokens"]]
    parts: dict[str, float] = {}
    for step in steps:
        for part, seconds in step["parts"].items():
            parts[part] = parts.get(part, 0.0) + seconds
    return {"wall_s": wall, "output_tokens_per_s": made / wall, "total_tokens_per_s": (made + read) / wall,
            "output_tokens": made, "prompt_tokens": read, "ttft_s_p50": float(np.median([t[0] - start for t in times])),
            "tpot_s_p50": float(np.median(tpot)), "ready_s": ready_s, "steps": len(steps), "decode_steps": len(decode),
            "decode_step_s_p50": float(np.median([s["end"] - s["start"] for s in decode])) if decode else None,
            "prefill_steps_s": sum(s["end"] - s["start"] for s in steps if s["prefill_tokens"]), "parts_s": parts}


@click.command(help=__doc__)
@click.option("--model", "name", default="qwen3-30b-a3b")
@click.option("--requests", type=int, default=128)
@click.option("--isl", type=int, nargs=2, default=(512, 1536), help="Prompt lengths, uniform in this range.")
@click.option("--osl", type=int, default=128)
@click.option("--max-num-seqs", type=int, default=128)
@click.option("--max-batch-tokens", type=int, default=8192)
@click.option("--precision", type=click.Choice(["bf16", "fp8"]), default="bf16")
@click.option("--eager", is_flag=True, help="Without CUDA graphs.")
@click.option("--lengths", type=click.Choice(["uniform", "azure-conv"]), default="uniform", help="azure-conv: see `azure_like`.")
@click.option("--no-warm-up", is_flag=True, help="Without the engine's own warm-up, for comparison.")
@click.option("--no-tune", is_flag=True, help="Without timing kernels for small steps at the start.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda")
@click.option("--commit", default=None)
@click.option("--json", "out", type=click.Path(path_type=Path), default=None)
def main(name: str, requests: int, isl: tuple[int, int], osl: int, max_num_seqs: int, max_batch_tokens: int, precision: str,
         eager: bool, lengths: str, no_warm_up: bool, no_tune: bool, device: str, commit: str | None, out: Path | None) -> None:
    gpu = device == "cuda"
    rng = np.random.default_rng(0)
    vocab = load_model(name).vocab
    if lengths == "azure-conv":
        sizes, made = azure_like(rng, requests)
    else:
        sizes, made = rng.integers(isl[0], isl[1] + 1, requests).tolist(), [osl] * requests
    prompts = [rng.integers(0, vocab, n).tolist() for n in sizes]
    pool = PoolPlan(role="mixed", max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens, chunk_tokens=None)
    options = EngineOptions(dtype="bf16" if gpu else "fp32", device=device, backend="triton" if gpu else "torch", record=True,
                            weights="fp8" if precision == "fp8" else "same", graphs=not eager, timeout_s=60.0,
                            start_timeout_s=400.0, max_context=max(sizes) + max(made), warm_up=not no_warm_up,
                            tune=not no_tune)
    figures = asyncio.run(serve(name, pool, options, prompts, made))
    for key, value in figures.items():
        if key == "prepared":
            continue
        click.echo(f"{key:24} {value if not isinstance(value, float) else round(value, 4)}")
    if out is not None:
        from benchmarks.timing import provenance

        record = {"model": name, "precision": precision, "requests": requests, "isl": isl, "osl": osl, "lengths": lengths,
                  "pool": pool.model_dump(mode="json"), "figures": figures,
                  "provenance": {**(provenance(commit) if gpu else {}), "method": __doc__}}
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
