"""Steps and exchanges that others published, beside what the cost model says: `python -m benchmarks.published_steps`.

Each row names its source. Nothing here is fitted by this script; which constants of the model were fitted on which rows is
said in `twin/cost/protocols.py`, `twin/cost/engines.py` and `twin/validate/record_pools.py`, and marked `fitted` below.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from twin.cost.build import exchanges as exchanges_of
from twin.cost.comm import kv_transfer_s
from twin.cost.model import CostModel
from twin.cost.network import Network
from twin.spec.load import load_cluster, load_model
from twin.spec.plan import Plan, PoolPlan, Precision
from twin.validate.record_kinds import ANSWERS
from twin.validate.record_words import Found

FP8 = Precision(weights="fp8_block", experts="fp8_block", kv="bf16", dispatch="fp8")
LMSYS = "LMSYS blog 2025-05-05, DeepSeek with PD and large-scale EP on 96 H100"
VLLM = "vLLM blog 2025-12-17, DeepSeek at 2.2k tok/s/H200 with wide EP"
DEEPEP = "DeepEP tests on Hopper + CX7 400G (aiconfigurator tables; README 2025-06)"


@dataclass(frozen=True)
class Row:
    """One published number and ours. `error` is signed: predicted / published - 1."""

    name: str
    unit: str
    published: float
    predicted: float
    low: float
    high: float
    fitted: bool
    source: str

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def cost(cluster: str, groups: int, **pool: Any) -> CostModel:
    """DeepSeek-R1 in fp8 with so many routing groups (DeepEP's tests have one a node, four of them kept)."""
    model = load_model("deepseek-r1")
    assert model.moe is not None
    moe = model.moe.model_copy(update={"groups": groups, "top_k_groups": min(groups, 4)})
    made = PoolPlan(**pool)
    plan = Plan(pools=(made, PoolPlan(role="prefill")), precision=FP8, engine="sglang")
    return CostModel(model.model_copy(update={"moe": moe}), load_cluster(cluster), plan, made)


def steps() -> Iterator[Row]:
    """Prefill and decode throughput of whole deployments, asked as `eptwin validate against` asks published records."""
    r1: dict[str, Any] = {"model": "deepseek-r1", "unit": "tok/s/GPU", "date": "2025-05-05"}
    decode = {**r1, "gpu": "H100", "ep": 72, "metric": "output_throughput", "isl": 2000, "osl": 100}
    prefill = {**r1, "gpu": "H100", "ep": 32, "metric": "input_throughput", "isl": 4096, "batch_per_gpu": 16384}
    overlap = {"TBO": True, "EPLB": True, "redundant_experts": 32}
    alone = {**overlap, "TBO": False}
    profile = {"note": "profile", "gpu": "H800"}
    wide = {**r1, "date": "2025-12-17", "gpu": "H200", "backend": "vllm", "isl": 2000, "features": {"DBO": True, "EPLB": True}}
    for seqs, features, published in ((256, overlap, 22310), (256, alone, 17800), (128, overlap, 17200), (128, alone, 15000)):
        yield throughput(f"SGLang EP72 decode, {seqs} seqs a GPU, {'TBO' if features['TBO'] else 'no TBO'}", published / 8, LMSYS,
                         {**decode, "batch_per_gpu": seqs, "features": features}, fitted=seqs == 256)
    for isl, osl, published in ((512, 1536, 21900), (1024, 1024, 21700)):
        yield throughput(f"SGLang EP72 decode, 256 seqs, {isl} in, {osl} out", published / 8, LMSYS,
                         {**decode, "isl": isl, "osl": osl, "batch_per_gpu": 256, "features": overlap})
    yield throughput("SGLang EP72 decode, 128 seqs, simulated MTP of 1 at 60%", 17373 / 8, LMSYS,
                     {**decode, "isl": 4000, "batch_per_gpu": 128, "features": {**overlap, "MTP": "simulated, accept 60%"}})
    yield throughput("SGLang EP32 prefill, 16k tokens, TBO, perfect balance", 59337 / 8, LMSYS,
                     {**prefill, "note": "perfect balance", "features": overlap}, fitted=True)
    for isl, published in ((1024, 57674), (2048, 54543), (4096, 50302)):
        yield throughput(f"SGLang EP32 prefill, 16k tokens of prompts of {isl}, TBO", published / 8, LMSYS,
                         {**prefill, "isl": isl, "features": overlap})
    yield throughput("SGLang EP32 prefill, 8k tokens, TBO", 47800 / 8, LMSYS,
                     {**prefill, "batch_per_gpu": 8192, "features": overlap})
    yield throughput("SGLang EP32 prefill, 8k tokens, no TBO", 36100 / 8, LMSYS,
                     {**prefill, "batch_per_gpu": 8192, "features": alone}, fitted=True)
    yield throughput("DeepSeek profile EP32 prefill, 16k tokens, TBO", 62713 / 8, LMSYS + " (DeepSeek profile-data)",
                     {**prefill, **profile, "features": overlap})
    yield throughput("DeepSeek profile EP128 decode, 128 seqs, MTP of 1 at 60%", 18598 / 8, LMSYS + " (DeepSeek profile-data)",
                     {**decode, **profile, "ep": 128, "isl": 4096, "osl": 0, "features": {**overlap, "MTP": "2 tokens/req"}})
    yield throughput("vLLM EP32 decode, 256 seqs, DBO", 2184, VLLM,
                     {**wide, "ep": 32, "metric": "output_throughput", "osl": 2000, "batch_per_gpu": 256})
    yield throughput("vLLM EP16 prefill, DBO", 7024, VLLM, {**wide, "ep": 16, "metric": "input_throughput"})


def throughput(name: str, published: float, source: str, record: dict[str, Any], fitted: bool = False) -> Row:
    """Tokens a second a GPU of one step repeated."""
    found = ANSWERS["throughput"](record)
    assert isinstance(found, Found), found
    return Row(name, "tok/s/GPU", published, found.value, found.low, found.high, fitted, source)


def exchanges() -> Iterator[Row]:
    """DeepEP microbenchmarks: microseconds of one dispatch or combine."""
    tables = {
        1: ((8, (16.05, 14.37)), (32, (20.5, 24.64)), (128, (39.83, 72.38)), (256, (67.02, 136.08))),
        2: ((8, (23.6, 36.23)), (32, (40.07, 60.93)), (128, (102.1, 186.17)), (256, (183.03, 337.47))),
        4: ((8, (32.0, 41.77)), (32, (55.23, 85.57)), (128, (142.97, 263.27)), (256, (264.47, 500.2))),
        8: ((8, (35.23, 42.8)), (32, (62.77, 95.57)), (128, (166.77, 304.73)), (256, (301.13, 579.53)))}
    low_latency = [("h200", nodes, tokens, us) for nodes, rows in tables.items() for tokens, us in rows]
    low_latency += [("h800", 1, 128, (77, 114)), ("h800", 2, 128, (118, 195)), ("h800", 4, 128, (155, 273)),
                    ("h800", 8, 128, (173, 314)), ("h800", 16, 128, (192, 369)), ("h800", 32, 128, (194, 360))]
    normal = [("h200", 1, 4096, (491, 973)), ("h200", 2, 4096, (749, 1777)), ("h200", 4, 4096, (1791, 3522))]
    for comm, table in (("deepep_low_latency", low_latency), ("deepep_normal", normal)):
        for gpu, nodes, tokens, published in table:
            model = cost(f"{gpu}-{nodes}x8", nodes, role="decode", dp=8 * nodes, ep=8 * nodes, comm=comm)
            made = exchanges_of(replace(model.site, protocol=model.site.protocol.tested))
            for phase, exchange, truth in zip(("dispatch", "combine"), made, published, strict=True):
                assert exchange is not None
                nvlink_s, rdma_s = exchange.seconds(np.array([float(tokens)]))
                microseconds = (float(nvlink_s + rdma_s) + exchange.fixed_s) * 1e6
                yield Row(f"{comm} {phase}, {gpu} EP{8 * nodes}, {tokens} tokens", "us", truth, microseconds,
                          microseconds / 1.15, microseconds * 1.15, gpu == "h200", DEEPEP)


def hand_overs() -> Iterator[Row]:
    """KV of one prompt from node to node: milliseconds."""
    source = "Mooncake documentation, Qwen3-8B TP8 on 2 x 8 H800, 8 x 400G RoCE"
    network = Network(load_cluster("h800-2x8"))
    token_bytes = load_model("qwen3-8b").kv_bytes_per_token("bf16")
    for prompt, published in ((1024, 1.5), (4096, 4.75), (8192, 8.84), (32768, 31.65)):
        ms = kv_transfer_s(network, range(8), range(8, 16), prompt * token_bytes) * 1e3
        yield Row(f"KV of {prompt} tokens, 8 GPUs to 8", "ms", published, ms, ms / 1.2, ms * 1.2, True, source)
    slow = load_cluster("h100-2x8")
    slow = slow.model_copy(update={"network": slow.network.model_copy(update={"nic_bytes_per_s": 25e9})})
    ms = kv_transfer_s(Network(slow), [0], [8], 2.0**32) * 1e3
    yield Row("KV of 4 GiB, one GPU to one over 200 Gb/s", "ms", 360, ms, ms / 1.2, ms * 1.2, True, "llm-d v0.5, UCX over NIXL")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    rows = [*steps(), *exchanges(), *hand_overs()]
    print(f"{'':62s} {'published':>10s} {'predicted':>10s} {'error':>7s}  80% interval")
    for row in rows:
        mark = " (fitted)" if row.fitted else ""
        print(f"{row.name:62s} {row.published:10.1f} {row.predicted:10.1f} {row.error:+7.1%}  "
              f"[{row.low:.0f}, {row.high:.0f}] {row.unit}{mark}")
    for kind in ("tok/s/GPU", "us", "ms"):
        errors = [abs(row.error) for row in rows if row.unit == kind]
        print(f"{kind}: {len(errors)} rows, median {median(errors):.1%}, worst {max(errors):.1%}")
    if options.json:
        content = [{**asdict(row), "error": row.error} for row in rows]
        scratch = options.json.with_name(options.json.name + ".tmp")
        scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        scratch.replace(options.json)


if __name__ == "__main__":
    main()
