"""What a run records of its routing is what its gates chose, and the twin reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from runtime_checkpoints import Checkpoints

from runtime.comm.group import solo
from runtime.model.transformer import add_pairs
from runtime.offline import run_workload
from runtime.options import EngineOptions
from runtime.routing_record import summarise_pairs, write_routing
from twin.cost.routing import popularity
from twin.sim import simulate
from twin.spec.errors import SpecError
from twin.spec.load import load_scenario
from twin.spec.plan import Plan, PoolPlan
from twin.spec.scenario import Routing
from twin.spec.workload import Arrivals, Lengths, WorkloadSpec

LOAD = WorkloadSpec(name="short", requests=6, arrivals=Arrivals(kind="closed_loop", concurrency=3),
                    isl=Lengths(kind="fixed", mean=20.0), osl=Lengths(kind="fixed", mean=6.0))


def test_a_run_is_recorded_and_simulated(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Every token that was computed chose top-k experts in every layer; the simulation of the same plan reads the file."""
    made = checkpoints["qwen3_moe"]
    assert made.model.moe is not None
    file, table = tmp_path / "routing.json", tmp_path / "routing.csv"
    pool = PoolPlan(role="mixed", dp=2, ep=2, block_tokens=4, kv_blocks=64, max_num_seqs=4, max_batch_tokens=32, chunk_tokens=16)
    plan = Plan(pools=(pool,))
    run_workload(plan, made.model, LOAD, EngineOptions(checkpoint=str(made.folder), record_routing=str(file)), seed=3)
    found = json.loads(file.read_text())
    load_LE = np.array(found["loads"])
    assert load_LE.shape == (made.model.moe_layers, made.model.moe.experts)
    warm_up = 2 * 4 * (20 + 6 - 1)
    computed = 6 * (20 + 6 - 1)  # the last token of a request is not computed any further
    assert (load_LE.sum(axis=1) == (computed + warm_up) * made.model.moe.top_k).all()
    write_routing(str(table), [{"expert_load": found["loads"]}], made.model.name)
    routing = Routing(kind="matrix", file=str(file))
    for one in (routing, Routing(kind="matrix", file=str(table))):
        assert np.allclose(popularity(made.model, one), load_LE / load_LE.sum(axis=1, keepdims=True))
    asked = {"model": made.model, "workload": LOAD, "routing": routing, "plan": plan}
    question = load_scenario("tiny_cpu").model_copy(update=asked)
    seen = simulate(question, plan).result.pools[0].expert_load
    halves_LR = load_LE.reshape(len(load_LE), 2, -1).sum(axis=2)
    assert seen is not None
    assert np.allclose(np.array(seen), halves_LR / halves_LR.mean(axis=1, keepdims=True), rtol=0.2)
    for layer, row in zip(found["pairs"], load_LE, strict=True):
        assert layer
        assert all(a < b and 0 < n <= min(row[a], row[b]) and lift > 1 for a, b, n, lift in layer)


def test_pairs_beyond_chance() -> None:
    """Two experts that are always chosen together come first, with the lift that counting by hand gives."""
    ids_TK = torch.tensor([[0, 1], [0, 1], [2, 3], [3, 4], [4, 2], [-1, -1]])
    pairs_EE = torch.zeros(5, 5, dtype=torch.int64)
    add_pairs(pairs_EE, ids_TK)
    assert pairs_EE.diagonal().tolist() == [2, 2, 2, 2, 2]
    assert (pairs_EE == pairs_EE.T).all()
    first = summarise_pairs(pairs_EE[None], solo())[0][0]
    assert first[:3] == [0, 1, 2]
    assert first[3] == pytest.approx(2 / (10 / 20), rel=1e-3), "10 ordered pairs over 20 equally likely ones"


def test_files_that_cannot_be() -> None:
    with pytest.raises(SpecError, match=r"\.csv or \.json"):
        EngineOptions(record_routing="loads.txt")


@pytest.mark.parametrize("text", ["{", '{"loads": 3}', '{"loads": [[1, "x"]]}', '{"other": []}', "[]"])
def test_bad_records_are_bad_input(checkpoints: Checkpoints, tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(SpecError):
        popularity(checkpoints["qwen3_moe"].model, Routing(kind="matrix", file=str(file)))
