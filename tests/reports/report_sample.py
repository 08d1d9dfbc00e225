"""A run directory like those that the tool writes: a searched plan for a large model, and a small one run for real.
Numbers are drawn from a seeded generator; they need to be plausible, not true."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from report_results import DECODE_PARTS, Namer, pool, requests, result

from twin.spec.cluster import ClusterSpec, GpuSpec, NetworkSpec, NodeGroup
from twin.spec.model import Attention, ModelSpec, MoE
from twin.spec.plan import Plan, PoolPlan, Precision
from twin.spec.results import Candidate, ComparedMetric, Comparison, RunResult, SearchResult
from twin.spec.rundir import write_run
from twin.spec.scenario import Scenario
from twin.spec.workload import Arrivals, Lengths, Slo, WorkloadSpec


def model(name: str) -> ModelSpec:
    attention = Attention(
        kind="mla",
        heads=128,
        kv_heads=128,
        head_dim=192,
        v_head_dim=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
    )
    return ModelSpec(
        name=name,
        model_type="deepseek_v3",
        hidden=7168,
        vocab=129280,
        layers=61,
        layer_attention=("full",) * 61,
        layer_ffn=("dense",) * 3 + ("moe",) * 58,
        attention=attention,
        dense_intermediate=18432,
        moe=MoE(experts=256, top_k=8, intermediate=2048, shared_experts=1, shared_intermediate=2048),
    )


def cluster(name: str, gpu: str, nodes: int = 4, gpus_per_node: int = 8, note: str = "NIC latency: assumed") -> ClusterSpec:
    spec = GpuSpec(name=gpu, hbm_bytes=141e9, hbm_bytes_per_s=4.8e12, bf16_flop_per_s=989e12, source="vendor data sheet")
    network = NetworkSpec(nvlink_bytes_per_s=450e9, nic_bytes_per_s=50e9)
    return ClusterSpec(
        name=name,
        groups=(NodeGroup(nodes=nodes, gpus_per_node=gpus_per_node, gpu=spec, price_usd_per_gpu_h=2.6),),
        network=network,
        notes=(note,),
    )


def scenario(named: Namer, name: str, cluster_: ClusterSpec, rate_per_s: float, slo: Slo) -> Scenario:
    work = WorkloadSpec(
        name=named("chat"),
        arrivals=Arrivals(kind="poisson", rate_per_s=rate_per_s),
        isl=Lengths(kind="lognormal", mean=2048, cv=0.8),
        osl=Lengths(kind="lognormal", mean=512, cv=0.6),
        requests=2000,
        slo=slo,
    )
    return Scenario(
        name=named("question"),
        description=named("Serve chat within the objectives."),
        model=model(named(name)),
        cluster=cluster_,
        workload=work,
    )


def plan(named: Namer, prefill: int = 2, decode: int = 1, ep: int = 16, seqs: int = 128) -> Plan:
    return Plan(
        name=named("chosen"),
        router="predicted_ttft",
        precision=Precision(weights="fp8_block", experts="fp8_block"),
        pools=(
            PoolPlan(role="prefill", instances=prefill, dp=8, tp=1, ep=8, max_num_seqs=16, max_batch_tokens=8192),
            PoolPlan(
                role="decode",
                instances=decode,
                dp=ep,
                tp=1,
                ep=ep,
                max_num_seqs=seqs,
                redundant_experts=32,
                placement="eplb_hierarchical",
                tbo=True,
                mtp_draft_tokens=1,
            ),
        ),
    )


def search(named: Namer, question: Scenario, best: Plan, count: int = 60) -> SearchResult:
    rng = random.Random(5)
    candidates = []
    for i in range(count):
        ep, seqs = rng.choice((8, 16, 32)), rng.choice((32, 64, 128, 256))
        users = rng.uniform(14, 62)
        rate = 2600 * (1 - users / 80) * rng.uniform(0.7, 1)
        feasible = users > 25
        candidates.append(
            Candidate(
                plan=best if i == 0 else plan(named, decode=rng.choice((1, 2)), ep=ep, seqs=seqs),
                stage="simulated",
                feasible=feasible,
                reason="" if i == 0 else named(f"TPOT p95 {1000 / users:.0f} ms" if not feasible else "fewer tokens per GPU"),
                rank=i + 1,
                metrics={
                    "capacity_tok_per_s_per_gpu": 2300.5 if i == 0 else rate,
                    "capacity_tok_per_s_per_user": 41.25 if i == 0 else users,
                    "ttft_s_p50": rng.uniform(0.2, 1),
                    "ttft_s_p99": rng.uniform(1, 3),
                    "tpot_s_p50": 0.9 / users,
                    "tpot_s_p99": 1.3 / users,
                    "goodput_per_s": rng.uniform(5, 20),
                    "decode_free_bytes": rng.uniform(2e9, 3e10),
                    "capacity_usd_per_million_output_tokens": 2.6 / (rate * 3600) * 1e6,
                },
            )
        )
    front = [
        c
        for c in candidates
        if not any(
            o.metrics["capacity_tok_per_s_per_user"] > c.metrics["capacity_tok_per_s_per_user"]
            and o.metrics["capacity_tok_per_s_per_gpu"] > c.metrics["capacity_tok_per_s_per_gpu"]
            for o in candidates
        )
    ]
    candidates = [c.model_copy(update={"pareto": c in front}) for c in candidates]
    return SearchResult(
        name=named("search"),
        model=question.model.name,
        cluster=question.cluster.name,
        considered=1284,
        pruned={"memory": 312, "bound": 700, named("illegal"): 212},
        candidates=tuple(candidates),
        best=candidates[0],
        explanation=(
            named("Decode at EP16 reads each expert for 128 sequences instead of 64."),
            named("The runner-up has EP8: 9% fewer tokens per GPU at the same TPOT."),
        ),
    )


def trace(named: Namer, steps: int = 120) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    for node in range(4):
        events.append({"ph": "M", "name": "process_name", "pid": node, "tid": 0, "args": {"name": named(f"node {node}")}})
        for rank in range(2):
            role = "prefill" if node < 2 else "decode"
            length = 220_000 if node < 2 else 31_000
            at = 1_000.0 * rank
            for step in range(steps // (7 if node < 2 else 1)):
                events.append(
                    {
                        "ph": "X",
                        "name": named(f"{role} step {step}"),
                        "cat": role,
                        "pid": node,
                        "tid": rank,
                        "ts": at,
                        "dur": length * 0.93,
                    }
                )
                at += length
        if node < 2:
            for i in range(16):
                sent = {"name": named(f"KV of request {16 * node + i}"), "cat": "kv", "id": 16 * node + i, "pid": node, "tid": 0}
                events += [{**sent, "ph": "b", "ts": i * 230_000.0}, {**sent, "ph": "e", "ts": i * 230_000.0 + 9_000}]
    return events


def comparison(named: Namer, predicted: RunResult, measured: RunResult) -> Comparison:
    metrics = []
    for name in ("ttft_s_mean", "ttft_s_p50", "ttft_s_p99", "tpot_s_mean", "tpot_s_p50", "e2e_s_p50"):
        latency, statistic = name.rsplit("_", 1)
        p, m = (getattr(getattr(r.latencies, latency), statistic) for r in (predicted, measured))
        metrics.append(
            ComparedMetric(
                name=named(name),
                unit="s",
                predicted=p,
                measured=m,
                error=p / m - 1,
                low=p * 0.85,
                high=p * 1.15,
                inside=p * 0.85 <= m <= p * 1.15,
            )
        )
    return Comparison(
        name=named("truth"),
        metrics=tuple(metrics),
        median_abs_error=0.061,
        max_abs_error=0.17,
        band=0.2,
        within_band=True,
        predicted=predicted.provenance,
        measured=measured.provenance,
        notes=(named("p99 over 400"),),
    )


def write_sample(path: Path, named: Namer = lambda text: text) -> Path:
    """plan/ (a search and its winner's prediction), predicted/ and measured/ of a small model, comparison.json."""
    large = scenario(named, "deepseek-r1", cluster(named("4 nodes of 8 H200"), named("H200")), 20, Slo(ttft_s=2.0, tpot_s=0.05))
    chosen = plan(named)
    records = requests(1, 1500, 0.5, 0.024)
    write_run(
        path / "plan",
        scenario=large,
        plan=chosen,
        result=result(named, "prediction", large, chosen, records, 1),
        requests=records,
        trace=trace(named),
        search=search(named, large, chosen),
    )
    small = scenario(
        named, "tiny-moe", cluster(named("this machine"), named("CPU"), nodes=1, gpus_per_node=2), 4, Slo(ttft_s=0.5, tpot_s=0.02)
    )
    pair = Plan(name=named("pair"), pools=(PoolPlan(role="mixed", dp=2, tp=1, ep=2, max_num_seqs=8),))
    results = []
    for kind, folder, seed, ttft, tpot in (
        ("prediction", "predicted", 3, 0.11, 0.0161),
        ("measurement", "measured", 4, 0.12, 0.0172),
    ):
        records = requests(seed, 400, ttft, tpot)
        made = result(named, kind, small, pair, records, seed)
        parts = {k: v * (1 if kind == "prediction" else 1.08) for k, v in DECODE_PARTS.items()}
        made = made.model_copy(update={"pools": (pool(named, "mixed", parts, 2, seed),)})
        results.append(made)
        write_run(path / folder, scenario=small, plan=pair, result=made, requests=records)
    write_run(path, comparison=comparison(named, *results))
    return path
