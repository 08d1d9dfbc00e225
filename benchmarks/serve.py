"""Output tokens a second of the whole engine: many requests at once through the front end, continuous batching.

    python -m benchmarks.serve --model qwen3-30b-a3b --requests 128 --isl 512 1536 --osl 128 --json out.json

One GPU, random weights, random prompts, greedy. A first round of a few requests compiles what graphs did not; the clock
runs from the first submission to the last token.
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


async def serve(name: str, pool: PoolPlan, options: EngineOptions, prompts: list[list[int]], osl: int, warm: int) -> Json:
    """Start the engine, warm it up, send everything at once and wait for the end."""
    model = load_model(name)
    frontend = Frontend(Plan(pools=(pool,)), model, options)
    began = time.monotonic()
    await frontend.start()
    ready_s = time.monotonic() - began
    try:
        params = SamplingParams(max_tokens=osl, ignore_eos=True)
        for _ in range(2):
            await _all([frontend.submit(p, SamplingParams(max_tokens=min(8, osl), ignore_eos=True)) for p in prompts[:warm]])
        frontend.forget()
        start = time.monotonic()
        times = await _all([frontend.submit(p, params) for p in prompts])
        return _figures(start, times, prompts, frontend.steps, ready_s)
    finally:
        await frontend.stop()


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
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda")
@click.option("--commit", default=None)
@click.option("--json", "out", type=click.Path(path_type=Path), default=None)
def main(name: str, requests: int, isl: tuple[int, int], osl: int, max_num_seqs: int, max_batch_tokens: int, precision: str,
         eager: bool, device: str, commit: str | None, out: Path | None) -> None:
    gpu = device == "cuda"
    rng = np.random.default_rng(0)
    vocab = load_model(name).vocab
    prompts = [rng.integers(0, vocab, n).tolist() for n in rng.integers(isl[0], isl[1] + 1, requests)]
    pool = PoolPlan(role="mixed", max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens, chunk_tokens=None)
    options = EngineOptions(dtype="bf16" if gpu else "fp32", device=device, backend="triton" if gpu else "torch", record=True,
                            weights="fp8" if precision == "fp8" else "same", graphs=not eager, timeout_s=60.0,
                            start_timeout_s=400.0, max_context=isl[1] + osl)
    figures = asyncio.run(serve(name, pool, options, prompts, osl, min(requests, 16)))
    for key, value in figures.items():
        click.echo(f"{key:24} {value if not isinstance(value, float) else round(value, 4)}")
    if out is not None:
        from benchmarks.timing import provenance

        record = {"model": name, "precision": precision, "requests": requests, "isl": isl, "osl": osl,
                  "pool": pool.model_dump(mode="json"), "figures": figures,
                  "provenance": {**(provenance(commit) if gpu else {}), "method": __doc__}}
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
