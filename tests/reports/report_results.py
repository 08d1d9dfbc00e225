"""Results as a run leaves them, with plausible numbers from a seeded generator. `named` changes every name and text, so
that a test can put hostile ones everywhere."""

from __future__ import annotations

import random
from collections.abc import Callable

from twin.spec.plan import Plan
from twin.spec.results import (
    Cost,
    Counts,
    Interval,
    Latencies,
    Memory,
    PoolResult,
    Provenance,
    RequestRecord,
    RunResult,
    Series,
    Steady,
    Summary,
    Throughput,
)
from twin.spec.scenario import Scenario

Namer = Callable[[str], str]
DECODE_PARTS = {
    "attention/qkv": 3.1e-3,
    "attention/kv_read": 6.4e-3,
    "attention/out": 1.2e-3,
    "moe/gate": 0.6e-3,
    "moe/dispatch/rdma": 4.3e-3,
    "moe/experts": 7.9e-3,
    "moe/combine/rdma": 4.9e-3,
    "moe/shared": 1.1e-3,
    "norms": 0.5e-3,
    "lm_head": 0.7e-3,
    "launch": 0.9e-3,
}
PREFILL_PARTS = {
    "attention/qkv": 21e-3,
    "attention/scores": 34e-3,
    "attention/out": 9e-3,
    "moe/gate": 2e-3,
    "moe/dispatch/nvlink": 17e-3,
    "moe/experts": 96e-3,
    "moe/combine/nvlink": 24e-3,
    "moe/shared": 13e-3,
    "norms": 3e-3,
    "lm_head": 1e-3,
}
SOURCES = {
    "moe/experts": "measured",
    "moe/dispatch/rdma": "interpolated",
    "moe/combine/rdma": "interpolated",
    "attention/kv_read": "measured",
    "attention/scores": "transferred",
    "norms": "roofline",
    "launch": "assumed",
    "lm_head": "roofline",
    "moe/gate": "roofline",
}


def requests(seed: int, count: int, ttft_s: float, tpot_s: float) -> list[RequestRecord]:
    rng = random.Random(seed)
    records, now = [], 0.0
    for i in range(count):
        now += rng.expovariate(20)
        isl, osl = int(rng.lognormvariate(7.3, 0.6)) + 1, int(rng.lognormvariate(6, 0.5)) + 2
        first = now + ttft_s * (0.4 + 0.3 * isl / 2048 + rng.expovariate(3.0))
        records.append(
            RequestRecord(
                id=i,
                arrival_s=now,
                isl=isl,
                osl=osl,
                output_tokens=osl,
                prefill_start_s=now + 0.01,
                first_token_s=first,
                finish_s=first + (osl - 1) * tpot_s * rng.uniform(0.82, 1.25),
                counted=i >= count // 5,
            )
        )
    return records


def pool(named: Namer, role: str, parts: dict[str, float], ranks: int, seed: int) -> PoolResult:
    rng = random.Random(seed)
    step = sum(parts.values())
    load = tuple(
        tuple(max(0.05, rng.gauss(1, 0.13) + (0.7 if rng.random() < 0.02 else 0)) for _ in range(ranks)) for _ in range(58)
    )
    memory = Memory(
        hbm_bytes=141e9,
        dense_weight_bytes=17.4e9,
        expert_weight_bytes=44.1e9,
        kv_pool_bytes=52.0e9,
        activation_bytes=4e9,
        comm_buffer_bytes=2.1e9,
        reserved_bytes=3e9,
        free_bytes=18.4e9,
        kv_tokens=757_760,
        kv_blocks=11_840,
    )
    return PoolResult(
        role=role,
        instances=2 if role == "prefill" else 1,
        gpus=16,
        dp=ranks,
        tp=1,
        ep=ranks,
        utilisation=0.87,
        steps=4210,
        step_s=Summary.of([step * rng.uniform(0.8, 1.3) for _ in range(200)]),
        batch_seqs_mean=91.4,
        batch_tokens_mean=93.2,
        kv_usage_mean=0.41,
        kv_usage_max=0.77,
        preemptions=0,
        breakdown_s={named(k): v for k, v in parts.items()},
        sources={named(k): SOURCES.get(k, "interpolated") for k in parts},
        memory=memory,
        expert_load=load,
        kv_transfer_s=Summary.of([0.004, 0.006, 0.011]),
        kv_transfer_bytes=2.1e11,
    )


def result(named: Namer, kind: str, question: Scenario, plan_: Plan, records: list[RequestRecord], seed: int) -> RunResult:
    counted = [r for r in records if r.counted]
    rng = random.Random(seed)
    tpot = [r.tpot_s for r in counted if r.tpot_s is not None]
    end = records[-1].arrival_s
    output = sum(r.output_tokens for r in counted) / end
    times = tuple(end * i / 120 for i in range(121))
    waves = (
        ("queued requests", "requests", 12),
        ("running sequences", "sequences", 900),
        ("KV cache used", "share", 0.7),
        ("utilisation", "share", 0.9),
    )
    series = tuple(
        Series(
            name=named(name),
            unit=unit,
            time_s=times,
            value=tuple(top * min(1, t / 12 + 0.02) * rng.uniform(0.8, 1) for t in times),
        )
        for name, unit, top in waves
    )
    return RunResult(
        kind=kind,
        name=named(f"run of {seed}"),
        model=question.model.name,
        cluster=question.cluster.name,
        plan=plan_,
        provenance=Provenance(
            tool_version="0.1.0",
            git_commit="0123abc",
            seed=seed,
            spec_sha256="9f" * 32,
            profiles=(named("h200-eptwin"),),
            libraries={"numpy": "2.4.6"},
            host=named("8 cores, 64 GiB"),
            command=named("eptwin plan r1_chat"),
        ),
        latencies=Latencies(
            ttft_s=Summary.of([r.ttft_s for r in counted]),
            tpot_s=Summary.of(tpot),
            itl_s=Summary.of(tpot),
            e2e_s=Summary.of([r.e2e_s for r in counted]),
        ),
        throughput=Throughput(
            window_s=end,
            requests_per_s=len(counted) / end,
            input_tok_per_s=40_000.0,
            output_tok_per_s=output,
            output_tok_per_s_per_gpu=output / plan_.gpus,
            total_tok_per_s_per_gpu=output / 9,
            tok_per_s_per_user=len(tpot) / sum(tpot),
            goodput_per_s=19.1,
            slo_attainment=0.968,
        ),
        counts=Counts(
            submitted=len(records), finished=len(records), counted=len(counted), input_tokens=9_000_000, output_tokens=900_000
        ),
        steady=Steady(verdict="steady", warmup_s=records[len(records) // 5].arrival_s, drift=0.013, queue_slope_per_s=0.002),
        pools=(pool(named, "prefill", PREFILL_PARTS, 8, seed), pool(named, "decode", DECODE_PARTS, plan_.pools[-1].ep, seed + 1)),
        cost=Cost(usd_per_h=83.2, usd_per_million_output_tokens=2.345678901234, usd_per_million_tokens=0.47),
        intervals={"ttft_s_p50": Interval(low=0.3, high=0.6)},
        series=series,
        source="mixed" if kind == "prediction" else "measured",
        assumptions=(named("prompts share no prefix"),),
        warnings=(named("3 points lay outside the profile"),),
    )
