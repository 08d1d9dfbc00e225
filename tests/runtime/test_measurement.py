"""A workload on ranks of our own: its Measurement, its trace, calibration files, and a tiny checkpoint to do it with."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from runtime_checkpoints import Checkpoints
from torch.utils.flop_counter import FlopCounterMode

from runtime.batch import Segment, make_step
from runtime.calibrate import TERMS, calibrate, fit
from runtime.kv import make_kv
from runtime.layout import layouts, single
from runtime.measure import PARTS
from runtime.offline import run_workload
from runtime.options import EngineOptions
from runtime.rank import build_rank
from runtime.tiny import ARCHITECTURES, main, tiny_config, write_checkpoint
from twin.cost.batch import Extents, StepBatch, features
from twin.cost.operators import Slice, rank_ops
from twin.cost.profile import load_profile
from twin.cost.roofline import Efficiency, OpTable
from twin.policy.arrivals import sample_requests
from twin.spec.cluster import GpuSpec
from twin.spec.hf import model_from_hf_config
from twin.spec.load import load_model
from twin.spec.plan import Plan, PoolPlan, Precision
from twin.spec.rundir import read_run, write_run
from twin.spec.workload import Arrivals, Lengths, Slo, WorkloadSpec

POOL = {"block_tokens": 8, "kv_blocks": 128, "max_num_seqs": 8, "max_batch_tokens": 64, "chunk_tokens": 32}
WORKLOAD = WorkloadSpec(arrivals=Arrivals(kind="poisson", rate_per_s=40.0), isl=Lengths(kind="uniform", low=4, high=50),
                        osl=Lengths(kind="uniform", low=2, high=12), requests=50, slo=Slo(ttft_s=2.0))


def test_a_measurement_tells_what_happened(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "tiny", tiny_config("deepseek_v3", hidden=64, layers=3, experts=8, top_k=2))
    plan = Plan(pools=(PoolPlan(role="prefill", **POOL), PoolPlan(role="decode", **POOL)))
    seen: list[tuple[int, int]] = []
    ports: set[str] = set()
    watcher = threading.Thread(target=_watch_listeners, args=(ports, done := threading.Event()))
    watcher.start()
    run = run_workload(plan, model, WORKLOAD, EngineOptions(checkpoint=str(tmp_path / "tiny")), seed=3,
                       progress=lambda *n: seen.append(n))
    done.set()
    watcher.join()
    assert ports <= {"127.0.0.1", "::1"}, "ranks must listen on loopback only"
    traffic = sample_requests(WORKLOAD, 3)
    assert [(r.isl, r.osl, r.output_tokens) for r in sorted(run.requests, key=lambda r: r.id)] == \
        list(zip(traffic.isl, traffic.osl, traffic.osl, strict=True)), "the simulator's own requests"
    assert seen[-1] == (50, 50)
    for record in run.requests:
        assert record.prefill_start_s is not None and record.first_token_s is not None and record.finish_s is not None
        assert record.arrival_s <= record.prefill_start_s <= record.first_token_s <= record.finish_s
        assert (record.kv_transfer_s is not None) == (record.osl > 1)
    prefill, decode = run.result.pools
    assert prefill.kv_transfer_bytes == sum(r.isl for r in run.requests) * model.kv_bytes_per_token("fp32")
    for pool in (prefill, decode):
        assert 0 < pool.utilisation <= 1
        assert sum(pool.breakdown_s.values()) == pytest.approx(pool.step_s.mean, rel=0.25), "the parts make the step"
    assert decode.memory is not None
    assert decode.memory.kv_pool_bytes == decode.memory.kv_tokens * model.kv_bytes_per_token("fp32")
    assert decode.memory.dense_weight_bytes + decode.memory.expert_weight_bytes == 4 * model.total_params
    assert run.result.counts.finished == 50
    write_run(tmp_path / "run", plan=plan, result=run.result, requests=run.requests, trace=run.trace)
    back = read_run(tmp_path / "run")
    assert back.result == run.result
    assert {e["ph"] for e in back.trace} >= {"M", "X", "b", "e", "s", "f"}


def test_every_rank_tells_where_its_steps_went() -> None:
    """In the trace, by rank: what it computed, what it exchanged, and how long it waited for the slowest."""
    model = model_from_hf_config(tiny_config("qwen3_moe", hidden=64, layers=2, experts=8, top_k=2), "tiny")
    plan = Plan(pools=(PoolPlan(role="mixed", dp=2, ep=2, comm="gloo", **POOL),))
    few = WORKLOAD.model_copy(update={"requests": 12, "arrivals": Arrivals(kind="burst")})
    steps = [e for e in run_workload(plan, model, few).trace if e["ph"] == "X"]
    assert {(e["pid"], e["tid"]) for e in steps} == {(0, 0), (0, 1)}
    phases = {"attention", "moe/gate", "moe/dispatch", "moe/experts", "moe/combine", "head", "host/wait"}
    for step in steps:
        parts = {name: value for name, value in step["args"].items() if name in PARTS.values()}
        assert phases <= parts.keys()
        assert all(parts[name] > 0 for name in phases)
    parts_us = sum(value for step in steps for name, value in step["args"].items() if name in PARTS.values())
    assert parts_us == pytest.approx(sum(step["dur"] for step in steps), rel=0.25), "no time is lost"


def _watch_listeners(found: set[str], done: threading.Event) -> None:
    """Collect the addresses that new TCP sockets listen on, until done."""
    before = _listeners()
    while not done.wait(0.05):
        found.update(address for address, _ in _listeners() - before)


def _listeners() -> set[tuple[str, str]]:
    """(address, socket inode) of TCP sockets of this user that listen."""
    sockets = set()
    for family, path in ((socket.AF_INET, "/proc/net/tcp"), (socket.AF_INET6, "/proc/net/tcp6")):
        for line in Path(path).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[7]) == os.getuid():
                raw = bytes.fromhex(fields[1].partition(":")[0])
                words = struct.unpack(f"<{len(raw) // 4}I", raw)
                sockets.add((socket.inet_ntop(family, struct.pack(f">{len(words)}I", *words)), fields[9]))
    return sockets


RUN = """
import sys
from pathlib import Path
from runtime.offline import run_workload
from twin.spec.load import load_model
from twin.spec.plan import Plan, PoolPlan
from twin.spec.rundir import write_run
from twin.spec.workload import Arrivals, Lengths, WorkloadSpec
workload = WorkloadSpec(arrivals=Arrivals(kind="closed_loop", concurrency=4), isl=Lengths(mean=8.0), osl=Lengths(mean=40.0),
                        requests=100000)
plan = Plan(pools=(PoolPlan(role="mixed", kv_blocks=64, block_tokens=8, max_num_seqs=4),))
run = run_workload(plan, load_model(sys.argv[1]), workload, progress=lambda done, total: print(done, flush=True))
write_run(Path(sys.argv[2]), plan=plan, result=run.result, requests=run.requests)
"""


def test_sigterm_drains_and_keeps_what_was_measured(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny", tiny_config("qwen3_moe", hidden=64, layers=2, experts=4, top_k=2))
    with subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path / "tiny"), str(tmp_path / "run")],
                          stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == 1
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 0
    assert time.monotonic() - began < 10
    result = read_run(tmp_path / "run").result
    assert result is not None
    assert 4 <= result.counts.finished < 100000
    assert result.counts.unfinished == 0


def test_calibration_files_are_what_the_twin_reads(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "tiny", tiny_config("qwen3_moe", hidden=64, layers=2, experts=8, top_k=2, context=128))
    plan = Plan(pools=(PoolPlan(role="mixed", **{**POOL, "max_num_seqs": 4}),))
    said: list[str] = []
    profile_path, steps_path = calibrate(model, plan, budget_s=6.0, progress=said.append).write(tmp_path / "out")
    profile = load_profile(profile_path)
    assert {t.operator for t in profile.tables} == {"gemm", "moe", "attention_decode", "attention_prefill"}
    steps = json.loads(steps_path.read_text())
    pool = steps["pools"][0]
    assert set(pool["fit"]) == set(TERMS)
    assert min(pool["fit"].values()) >= 0
    assert {max(s["decode_seqs"]) for s in pool["samples"]} >= {0, 1, 2}
    assert steps["frontend_s"] < 0.5
    assert said


def test_the_fitted_line_finds_a_known_law() -> None:
    law = [0.003, 0.001, 2e-4, 1e-6, 3e-5, 1e-7, 0.0, 0.0, 0.0]
    samples = []
    for n, (seqs, tokens) in enumerate((s, t) for s in (0, 1, 4, 9) for t in (0, 16, 100, 240) if s + t):
        row = {"decode_seqs": [seqs], "decode_context": [seqs * 37.0 * (n % 3 + 1)], "prefill_tokens": [tokens],
               "prefill_context": [tokens**2 / 2.0], "prefill_seqs": [int(tokens > 0)]}
        terms = [1.0, float(tokens > 0), *(row[f.removeprefix("mean_")][0] for f in TERMS[2:])]
        samples.append({**row, "seconds": sum(c * t for c, t in zip(law, terms, strict=True)), "count": 1})
    _, errors = fit(samples)
    assert errors.max() < 1e-6


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiny_checkpoints_of_every_architecture_run(tmp_path: Path, arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path / "m"), "--arch", arch, "--hidden", "64", "--layers", "2", "--experts", "8", "--top-k", "2"])
    assert "parameters" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    model = load_model(tmp_path / "m")
    plan = Plan(pools=(PoolPlan(role="mixed", kv_blocks=4, block_tokens=8),))
    stored = build_rank(model, plan, EngineOptions(checkpoint=str(tmp_path / "m")), 0, lambda phase: None)
    drawn = build_rank(model, plan, EngineOptions(), 0, lambda phase: None)
    step = make_step([Segment([5, 6, 7], 0, [2], True)], 8)
    with torch.no_grad():
        logits = stored.transformer.forward(step, stored.kv, 3)
        assert torch.equal(logits, drawn.transformer.forward(step, drawn.kv, 3)), "random weights are the stored ones"
    assert logits.isfinite().all()
    assert logits.std() > 0.1


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe", "mixtral", "llama"])
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_flops_of_the_cost_model_are_those_that_torch_counts(checkpoints: Checkpoints, name: str, kind: str) -> None:
    """One process; experts are counted by the choices that were made, and torch counts the square of a causal prefill."""
    model = checkpoints[name].model
    plan = Plan(pools=(PoolPlan(role="mixed", kv_blocks=16, block_tokens=16, max_num_seqs=4),))
    rank = build_rank(model, plan, EngineOptions(), 0, lambda phase: None)
    if kind == "decode":  # contexts alike, because the plain decode pads to the longest
        step = make_step([Segment([1], 32, list(range(3 * i, 3 * i + 3))) for i in range(3)], 16)
        batch = StepBatch.decode([3.0], [99.0])
    else:
        step, batch = make_step([Segment(list(range(40)), 0, [0, 1, 2], True)], 16), StepBatch.prefill([40.0])
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        rank.transformer.forward(step, rank.kv, step.num_tokens)
    ops = rank_ops(Slice(model, Precision(weights="fp32", experts="fp32", kv="fp32"), 1))
    gpu = GpuSpec(name="any", hbm_bytes=1e9, hbm_bytes_per_s=1e9, bf16_flop_per_s=1e9)
    table = OpTable.of(ops, gpu, {"default": Efficiency(1.0, 1.0)}, 0.0)
    flops, _ = table.totals(features(batch, Extents.of(model, 0))[0])
    want = sum(flops.values()) + flops.get("attention/prefill", 0.0) * (kind == "prefill")
    if model.moe is not None:
        want += 2 * step.num_tokens * model.moe.top_k * 3 * model.hidden * model.moe.intermediate * model.moe_layers
    assert counter.get_total_flops() == pytest.approx(want, rel=1e-3)


def _sdpa_flops(q: list[int], k: list[int], v: list[int], *_: object, **__: object) -> int:
    return int(2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3]))


def _grouped_flops(x: list[int], w: list[int], *_: object, **__: object) -> int:
    return 2 * x[0] * x[1] * w[2]


UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops, torch.ops.aten._grouped_mm: _grouped_flops}
"""Operators that torch's counter does not know."""


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_kv_bytes_are_those_allocated(checkpoints: Checkpoints, name: str, tp: int) -> None:
    model = checkpoints[name].model
    at = layouts(Plan(pools=(PoolPlan(role="mixed", tp=tp),)), model)[tp - 1] if tp > 1 else single(model)
    cache = make_kv(model, at, 5, 16, torch.float32)
    assert sum(c.numel() * 4 for c in cache) == 5 * 16 * model.kv_bytes_per_token("fp32", tp=tp)
