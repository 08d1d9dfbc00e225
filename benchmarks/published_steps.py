"""Steps and exchanges that others published, beside what the cost model says: `python -m benchmarks.published_steps`.

Each row names its source. Nothing here is fitted by this script; which constants of the model were fitted on which rows is
said in `twin/cost/protocols.py` and `twin/cost/engines.py`, and marked `fitted` below.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from twin.cost.batch import StepBatch
from twin.cost.comm import kv_transfer_s
from twin.cost.evidence import Evidence
from twin.cost.model import CostModel
from twin.cost.network import Network
from twin.spec.load import load_cluster, load_model
from twin.spec.plan import Plan, PoolPlan, Precision
from twin.spec.scenario import Routing

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


def cost(cluster: str, engine: str, evidence: Evidence | None, routing: Routing | None = None, groups: int | None = None,
         **pool: Any) -> CostModel:
    """DeepSeek-R1 in fp8; `groups` replaces its routing groups (DeepEP's tests have one a node, four of them kept)."""
    model = load_model("deepseek-r1")
    if groups is not None and model.moe is not None:
        moe = model.moe.model_copy(update={"groups": groups, "top_k_groups": min(groups, 4)})
        model = model.model_copy(update={"moe": moe})
    made = PoolPlan(**pool)
    other = PoolPlan(role="decode" if made.role == "prefill" else "prefill")
    plan = Plan(pools=(made, other), precision=FP8, engine=engine)
    return CostModel(model, load_cluster(cluster), plan, made, routing=routing, profile=evidence)


def throughput(name: str, model: CostModel, batch: StepBatch, tokens: float, published: float, source: str,
               fitted: bool = False) -> Row:
    """Tokens a second a GPU of one step repeated."""
    step = model.step(batch)
    return Row(name, "tok/s/GPU", published, tokens / step.total_s, tokens / step.high_s, tokens / step.low_s, fitted, source)


def steps(evidence: Evidence | None) -> Iterator[Row]:
    """Prefill and decode throughput of whole deployments."""
    wide = {"role": "decode", "dp": 72, "ep": 72, "redundant_experts": 32, "placement": "eplb_global", "max_num_seqs": 256}
    for seqs, tbo, published in ((256, True, 22310), (256, False, 17800), (128, True, 17200), (128, False, 15000)):
        batch = StepBatch.decode([seqs], [seqs * 2050])
        yield throughput(f"SGLang EP72 decode, {seqs} seqs a GPU, {'TBO' if tbo else 'no TBO'}",
                         cost("h100-9x8", "sglang", evidence, **wide, tbo=tbo), batch, seqs, published / 8, LMSYS, fitted=True)
    yield throughput("SGLang EP72 decode, 128 seqs, MTP of 1 at 60%", cost(
        "h100-9x8", "sglang", evidence, **wide, tbo=True, mtp_draft_tokens=1), StepBatch.decode([128], [128 * 4050]),
        128 * 1.6, 17373 / 8, LMSYS)
    prefill = {"role": "prefill", "dp": 32, "ep": 32, "max_batch_tokens": 16384}
    even = {**prefill, "redundant_experts": 32, "placement": "eplb_global"}
    # a popularity under which the fullest of 32 ranks has 1 / 0.80 of the mean, the balancedness that the blog reports
    uneven = Routing(kind="lognormal", sigma=0.32)
    yield throughput("SGLang EP32 prefill, 16k tokens, TBO, perfect balance", cost(
        "h100-4x8", "sglang", evidence, **even, tbo=True), StepBatch.prefill([16384], 0, 4), 16384, 59337 / 8, LMSYS, fitted=True)
    yield throughput("SGLang EP32 prefill, 16k tokens, TBO, balancedness 0.80", cost(
        "h100-4x8", "sglang", evidence, uneven, **prefill, tbo=True), StepBatch.prefill([16384], 0, 4), 16384, 50302 / 8, LMSYS,
        fitted=True)
    yield throughput("SGLang EP32 prefill, 8k tokens, no TBO, balancedness 0.80", cost(
        "h100-4x8", "sglang", evidence, uneven, **prefill), StepBatch.prefill([8192], 0, 2), 8192, 36100 / 8, LMSYS)
    yield throughput("DeepSeek profile EP32 prefill, 16k tokens, TBO", cost("h800-4x8", "sglang", evidence, **prefill, tbo=True),
                     StepBatch.prefill([16384], 0, 4), 16384, 62713 / 8, LMSYS + " (DeepSeek profile-data)")
    yield throughput("DeepSeek profile EP128 decode, 128 seqs, MTP of 1 at 60%", cost(
        "h800-16x8", "sglang", evidence, role="decode", dp=128, ep=128, tbo=True, mtp_draft_tokens=1),
        StepBatch.decode([128], [128 * 4096]), 128 * 1.6, 18598 / 8, LMSYS + " (DeepSeek profile-data)")
    yield throughput("vLLM EP32 decode, 256 seqs, DBO", cost(
        "h200-4x8", "vllm", evidence, role="decode", dp=32, ep=32, redundant_experts=32, placement="eplb_global", tbo=True),
        StepBatch.decode([256], [256 * 3000]), 256, 2184, VLLM)
    yield throughput("vLLM EP16 prefill, DBO", cost(
        "h200-2x8", "vllm", evidence, role="prefill", dp=16, ep=16, redundant_experts=32, placement="eplb_global", tbo=True),
        StepBatch.prefill([16384], 0, 8), 16384, 7024, VLLM)


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
            model = cost(f"{gpu}-{nodes}x8", "sglang", None, role="decode", dp=8 * nodes, ep=8 * nodes, comm=comm, groups=nodes)
            for (phase, exchange), truth in zip(model.exchanges, published, strict=True):
                nvlink_s, rdma_s = exchange.seconds(np.array([float(tokens)]))
                microseconds = (float(nvlink_s + rdma_s) + exchange.fixed_s) * 1e6
                yield Row(f"{comm} {phase}, {gpu} EP{8 * nodes}, {tokens} tokens", "us", truth, microseconds,
                          microseconds / 1.15, microseconds * 1.15, gpu == "h200", DEEPEP)


def hand_overs() -> Iterator[Row]:
    """KV of one prompt from node to node: milliseconds."""
    source = "Mooncake documentation, Qwen3-8B TP8 on 2 x 8 H800, 8 x 400G RoCE"
    network = Network(load_cluster("h800-2x8"))
    for megabytes, published in ((146, 1.5), (578, 4.75), (1130, 8.84), (4500, 31.65)):
        ms = kv_transfer_s(network, range(8), range(8, 16), megabytes * 1e6) * 1e3
        yield Row(f"KV hand-over of {megabytes} MB, 8 GPUs to 8", "ms", published, ms, ms / 1.2, ms * 1.2, True, source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--roofline", action="store_true", help="leave the engine profiles out")
    options = parser.parse_args()
    evidence = None if options.roofline else Evidence.load()
    rows = [*steps(evidence), *exchanges(), *hand_overs()]
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
