"""Whole runs of the real engine with separate prefill and decode pools in the lab, against the simulator.

The engine's own seconds come from one run in a lab of another shape: what its steps took beyond what the network model says
of their messages, as a line. The prediction for the other labs adds the network's part for their shape and simulates the
same requests; KV crosses the simulator's links. Nothing of a reported run enters its prediction.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.netlab.lab import Lab, LabSpec, in_namespace, lab, rank_address, rank_namespace
from benchmarks.netlab.schedule import Constants, all_gather, all_to_all, ends_s, one_way_s
from runtime.measure import Run, Step
from runtime.offline import run_workload
from runtime.options import EngineOptions
from twin.cost.network import Network
from twin.cost.steps import PoolSteps, StepCalibration, merge
from twin.sim import simulate
from twin.spec.load import load_scenario
from twin.spec.plan import Plan, PoolPlan
from twin.spec.provenance import provenance
from twin.spec.rundir import write_text
from twin.spec.scenario import Scenario
from twin.spec.workload import Arrivals, Lengths, WorkloadSpec

_ROOT = Path(__file__).resolve().parents[2]
_PORT = 29511
_SHAPED = LabSpec("PD", hosts=4, leaf_ports=2, nic_delay_s=2e-3)
REFERENCE = (replace(_SHAPED, nic_bit_per_s=200e6), 2)
RUNS = ((replace(_SHAPED, nic_bit_per_s=50e6), 1), (replace(_SHAPED, nic_bit_per_s=100e6, oversubscription=4.0), 1),
        (replace(_SHAPED, nic_bit_per_s=60e6, oversubscription=2.0), 2),
        (replace(_SHAPED, nic_bit_per_s=100e6, nic_delay_s=6e-3), 1))
"""Shapes and users. Two hosts of prefill are under one leaf, two of decode under the other."""
TERMS = ("step", "decode_seqs", "prefill_tokens", "mean_decode_seqs", "mean_prefill_tokens")
Json = dict[str, Any]


def study_pd(constants: Constants, seed: int, progress: Callable[[str], None],
             runs: Sequence[tuple[LabSpec, int]] = RUNS) -> list[Json]:
    """One comparison a run: predicted and measured numbers."""
    lines: list[dict[str, float]] = []
    away = 1.0
    results: list[Json] = []
    for _, group in groupby((REFERENCE, *runs), key=lambda run: (run[0].nic_delay_s, run[0].hop_delay_s)):
        places = list(group)
        with lab(places[0][0]) as standing:
            for shape, users in places:
                standing.shape(shape)
                scenario = make_scenario(shape, users, seed)
                measured = _run(standing, scenario)
                if not lines:
                    away = away_share(scenario, measured.result.pools[0].expert_load)
                    lines = [fit_steps(measured.steps, pool, exchange_s(scenario, standing.network, 2 * pool, constants, away))
                             for pool in range(2)]
                    progress("PD run for the engine's own seconds")
                    continue
                name = f"{shape.nic_bit_per_s / 1e6:g} Mbit/s, {shape.oversubscription:g}:1, " \
                       f"{shape.nic_delay_s * 1e3:g} ms, {users} user{'s' * (users > 1)}"
                compared = compare(predict(make_scenario(shape, users, seed), lines, away, constants),
                                   measured.result)
                results.append({"name": name, "shape": asdict(shape), "users": users, "engine_lines": lines,
                                "away_share": round(away, 4), "compared": compared})
                progress(f"PD run at {name}")
    return results


def make_scenario(shape: LabSpec, users: int, seed: int) -> Scenario:
    """A small MoE, two prefill ranks and two decode ranks with expert parallelism, users who ask again when answered."""
    base = load_scenario("tiny_cpu")
    assert base.model.moe is not None
    moe = base.model.moe.model_copy(update={"intermediate": 64})
    model = base.model.model_copy(update={"name": "netlab-moe", "hidden": 1024, "moe": moe})
    common: Json = {"dp": 2, "tp": 1, "ep": 2, "block_tokens": 16, "kv_blocks": 256, "comm": "gloo", "chunk_tokens": 256,
                    "max_batch_tokens": 256, "max_num_seqs": 8}
    fp32: Json = {"weights": "fp32", "experts": "fp32", "kv": "fp32", "dispatch": "fp32"}
    plan = Plan.model_validate({"name": "1P+1D dp2 ep2", "precision": fp32, "router": "round_robin",
                                "pools": ({"role": "prefill", **common}, {"role": "decode", **common})})
    workload = WorkloadSpec(name="netlab", arrivals=Arrivals(kind="closed_loop", concurrency=users), requests=6,
                            isl=Lengths(kind="uniform", low=64, high=160), osl=Lengths(kind="fixed", mean=12.0))
    return base.model_copy(update={"name": "netlab", "model": model, "cluster": shape.cluster(), "workload": workload,
                                   "plan": plan, "seed": seed})


def predict(scenario: Scenario, lines: Sequence[dict[str, float]], away: float, constants: Constants) -> Any:
    """The simulator's RunResult."""
    assert scenario.plan is not None
    network = Network(scenario.cluster)
    pools = tuple(_pool_steps(scenario, network, index, pool, lines[index], away, constants)
                  for index, pool in enumerate(scenario.plan.pools))
    source = provenance(scenario, scenario.plan, seed=scenario.seed)
    calibration = StepCalibration(format="eptwin-steps-1", model=scenario.model.name, dtype="fp32", device="cpu", threads=1,
                                  frontend_s=0.0, pools=pools, provenance=source)
    # the simulator sends a hand-over as one message; gloo sends one a layer, each after a note there and back
    handover_s = 2 * scenario.model.layers * one_way_s(network, 0, 2, constants)
    links = scenario.cluster.network.model_copy(update={"nic_latency_s": handover_s, "switch_latency_s": 0.0})
    cluster = scenario.cluster.model_copy(update={"network": links})
    with tempfile.TemporaryDirectory(prefix="eptwin-netlab-") as folder:
        path = Path(folder) / "steps.json"
        write_text(path, merge([calibration]).model_dump_json())
        scenario = scenario.model_copy(update={"cluster": cluster, "profile": str(path)})
        return simulate(scenario, scenario.plan).result


def _pool_steps(scenario: Scenario, network: Network, index: int, pool: PoolPlan, line: dict[str, float],
                away: float, constants: Constants) -> PoolSteps:
    """The engine's line plus the network's part of a step: fixed seconds, and seconds a token of the busiest rank."""
    first = index * pool.world
    fixed_s, token_s = exchange_s(scenario, network, first, constants, away)
    terms = dict.fromkeys(TERMS, 0.0) | line
    terms["step"] += fixed_s
    terms["decode_seqs"] += token_s
    terms["prefill_tokens"] += token_s
    return PoolSteps(pool=index, role=pool.role, dp=pool.dp, tp=pool.tp, ep=pool.ep, samples=(), fit=terms)


def away_share(scenario: Scenario, load_LR: Sequence[Sequence[float]] | None) -> float:
    """Chance that any of a token's top-k of E experts is on the other of two ranks, mean over layers and ranks, when that
    rank gets the share f of choices: 1 - prod over i < k of (E (1 - f) - i) / (E - i). `load_LR` is the measured load of
    ranks, 1.0 where they are even."""
    moe = scenario.model.moe
    assert moe is not None and load_LR is not None
    rest = moe.experts * (1.0 - np.asarray(load_LR) / 2)
    stays = np.prod([np.maximum(rest - i, 0.0) / (moe.experts - i) for i in range(moe.top_k)], axis=0)
    return float(1.0 - stays.mean())


def exchange_s(scenario: Scenario, network: Network, first: int, constants: Constants, away: float) -> tuple[float, float]:
    """(fixed, a token) seconds of a step's exchanges between ranks `first` and `first` + 1.

    A step agrees (all-gather) and, in every layer, exchanges counts, rows and results. The share `away` of rows goes to the
    other rank, with their slots and weights; their results come back.
    """
    model = scenario.model
    assert model.moe is not None
    there_bytes, back_bytes = away * (4 * model.hidden + 8 * model.moe.top_k), away * 4 * model.hidden

    def between(n_bytes: float) -> float:
        messages = [replace(m, source=first + m.source, target=first + m.target)
                    for m in all_to_all(np.array([[0.0, n_bytes], [n_bytes, 0.0]]))]
        return float(ends_s(messages, network, constants).max())

    agree = [replace(m, source=first + m.source, target=first + m.target) for m in all_gather(48.0, 2)]
    fixed_s = float(ends_s(agree, network, constants).max()) + model.layers * 3 * between(0.0)
    tokens = 256.0
    moved_s = between(tokens * there_bytes) + between(tokens * back_bytes) - 2 * between(0.0)
    return fixed_s, model.layers * moved_s / tokens


def fit_steps(steps: Sequence[Step], pool: int, exchange: tuple[float, float]) -> dict[str, float]:
    """The line through what a pool's steps took beyond their `exchange_s`, by least squares relative to whole steps; terms are
    those of `twin.cost.steps`. The engine's own work grows with the mean over ranks: they share this machine's cores."""
    mine = [step for step in steps if step.pool == pool]
    busiest = np.array([max(r["decode_seqs"] + r["prefill_tokens"] for r in step.ranks) for step in mine])
    seconds = np.array([step.end_s - step.start_s for step in mine])
    mean = np.array([step.total("decode_seqs") + step.total("prefill_tokens") for step in mine]) / 2
    own = seconds - exchange[0] - exchange[1] * busiest
    terms = np.stack([np.ones(len(mine)), mean], axis=1)
    (fixed, each), *_ = np.linalg.lstsq(terms / seconds[:, None], own / seconds, rcond=None)
    return {"step": float(fixed), "mean_prefill_tokens" if pool == 0 else "mean_decode_seqs": float(each)}


def predict_again(runs: Sequence[Json], constants: Constants, seed: int) -> list[Json]:
    """Results of `study_pd` with what the simulator says now in the place of what it said then."""
    return [{**run, "compared": _errors(
        _pick(predict(make_scenario(LabSpec(**run["shape"]), run["users"], seed), run["engine_lines"], run["away_share"],
                      constants)),
        {name: pair["measured"] for name, pair in run["compared"].items()})} for run in runs]


def compare(predicted: Any, measured: Any) -> dict[str, Json]:
    """Predicted against measured numbers of a run."""
    return _errors(_pick(predicted), _pick(measured))


def _pick(result: Any) -> dict[str, float]:
    moved = next(pool.kv_transfer_s for pool in result.pools if pool.role == "prefill")
    return {"output_tok_per_s": result.throughput.output_tok_per_s, "ttft_mean_s": result.latencies.ttft_s.mean,
            "tpot_mean_s": result.latencies.tpot_s.mean, "e2e_mean_s": result.latencies.e2e_s.mean,
            "kv_transfer_mean_s": moved.mean if moved is not None else float("nan"),
            "prefill_step_s": result.pools[0].step_s.mean, "decode_step_s": result.pools[1].step_s.mean}


def _errors(mine: dict[str, float], theirs: dict[str, float]) -> dict[str, Json]:
    return {name: {"predicted": round(mine[name], 6), "measured": round(theirs[name], 6),
                   "error": round(mine[name] / theirs[name] - 1, 4)} for name in mine}


def _run(standing: Lab, scenario: Scenario) -> Run:
    """The real engine, a rank a namespace, under the scenario's load."""
    assert scenario.plan is not None
    with tempfile.TemporaryDirectory(prefix="eptwin-netlab-") as folder, _ranks(standing, Path(folder)):
        options = EngineOptions(external=folder, timeout_s=30.0, threads=1, record=True)
        return run_workload(scenario.plan, scenario.model, scenario.workload, options, seed=scenario.seed,
                            cluster=scenario.cluster.name)


@contextmanager
def _ranks(standing: Lab, folder: Path) -> Iterator[None]:
    """Rank processes that start when the front end has written their briefing, and are ended whatever happens."""
    children: list[subprocess.Popen[bytes]] = []
    over = threading.Event()

    def start() -> None:
        briefing = folder / "briefing.json"
        while not briefing.exists():
            if over.wait(0.02):
                return
        world = standing.spec.ranks
        for rank in range(world):
            env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "nic0", "PYTHONPATH": str(_ROOT),
                   "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": rank_address(0), "MASTER_PORT": str(_PORT)}
            command = in_namespace(rank_namespace(rank), ["nice", "-n", "-15", sys.executable, "-m", "runtime.worker",
                                                             str(briefing)])
            children.append(subprocess.Popen(command, env=env, cwd=_ROOT, stdin=subprocess.DEVNULL))

    starter = threading.Thread(target=start)
    starter.start()
    try:
        yield
    finally:
        over.set()
        starter.join()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and any(child.poll() is None for child in children):
            time.sleep(0.02)
        for child in children:
            child.kill()
            child.wait()


def main() -> None:
    """PD runs alone, with constants given as LATE_S BEGIN_S."""
    constants = Constants(float(sys.argv[1]), float(sys.argv[2]))
    print(json.dumps(study_pd(constants, 0, lambda text: print(text, file=sys.stderr)), indent=1))


if __name__ == "__main__":
    main()
