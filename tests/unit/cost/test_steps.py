"""Steps calibrated as a whole: the terms, the fall-backs, and what a file may not be."""

import json

import numpy as np
import pytest

from twin.cost.batch import StepBatch
from twin.cost.choose import pool_costs
from twin.cost.steps import CalibratedSteps, load_calibration
from twin.sim import simulate
from twin.spec.errors import SpecError
from twin.spec.load import load_scenario

FIT = {
    "step": 0.01, "any_prefill": 0.002, "decode_seqs": 1e-4, "decode_context": 1e-6, "prefill_tokens": 1e-4,
    "prefill_context": 1e-8, "prefill_seqs": 1e-3, "mean_decode_seqs": 2e-4, "mean_prefill_tokens": 3e-4,
}  # fmt: skip


def write(path, **changes):
    errors = {"median": 0.05, "p90": 0.1}
    pool = {"pool": 0, "role": "mixed", "dp": 2, "tp": 1, "ep": 2, "samples": [], "fit": FIT, "fit_error": errors}
    one = {
        "format": "eptwin-steps-1", "model": "tiny-moe", "dtype": "fp32", "device": "cpu", "threads": 1, "frontend_s": 0.001,
        "pools": [{**pool, **changes}], "provenance": {"tool_version": "0"},
    }  # fmt: skip
    path.write_text(json.dumps({"format": "eptwin-steps-1", "calibrations": [one]}))
    return path


def test_a_step_is_the_sum_of_its_terms(tmp_path):
    scenario = load_scenario("tiny_cpu", [f"profile={write(tmp_path / 'steps.json')}"])
    costs = pool_costs(scenario, scenario.plan, scenario.plan.pools[0])
    assert isinstance(costs, CalibratedSteps) and costs.frontend_s == 0.001
    batch = StepBatch(*(np.array(ranks) for ranks in ([3.0, 5.0], [30.0, 50.0], [64.0, 0.0], [2048.0, 0.0], [1.0, 0.0])))
    expected = 0.01 + 0.002 + 5e-4 + 50e-6 + 64e-4 + 2048e-8 + 1e-3 + 4 * 2e-4 + 32 * 3e-4
    cost = costs.step(batch)
    assert costs.step_s(batch) == pytest.approx(expected) == pytest.approx(cost.total_s)
    assert sum(cost.parts_s.values()) == pytest.approx(cost.total_s)
    assert set(cost.sources.values()) == {"calibrated"} and cost.low_s < cost.total_s < cost.high_s
    assert costs.decode_s(np.array([4]), np.array([40]))[0] == pytest.approx(0.01 + 4e-4 + 40e-6 + 4 * 2e-4)
    idle = StepBatch(*np.zeros((5, 2)))
    assert costs.step_s(idle) == 0.0
    assert costs.memory() == costs.base.memory()


def test_other_shapes_fall_back_to_operators(tmp_path):
    scenario = load_scenario("tiny_cpu", [f"profile={write(tmp_path / 'steps.json', ep=1)}"])
    assert not isinstance(pool_costs(scenario, scenario.plan, scenario.plan.pools[0]), CalibratedSteps)


def test_a_request_misses_the_step_that_begins_while_it_is_in_the_front_end(tmp_path):
    one = ["workload.arrivals={kind: deterministic, rate_per_s: 1}", "workload.requests=3", "workload.warmup_fraction=0",
           "workload.isl={kind: fixed, mean: 8}", "workload.osl={kind: fixed, mean: 1}"]  # fmt: skip
    scenario = load_scenario("tiny_cpu", [f"profile={write(tmp_path / 'steps.json')}", *one])
    ttft = simulate(scenario, scenario.plan).result.latencies.ttft_s
    batch = StepBatch(np.zeros(2), np.zeros(2), np.array([8.0, 0.0]), np.array([32.0, 0.0]), np.array([1.0, 0.0]))
    assert ttft.mean == pytest.approx(0.001 + pool_costs(scenario, scenario.plan, scenario.plan.pools[0]).step_s(batch))


@pytest.mark.parametrize("change", [{"fit": {"steps": 1.0}}, {"role": "cook"}, {"dp": "2"}])
def test_damaged_files(tmp_path, change):
    path = write(tmp_path / "steps.json", **change)
    with pytest.raises(SpecError):
        scenario = load_scenario("tiny_cpu", [f"profile={path}"])
        load_calibration(path)
        pool_costs(scenario, scenario.plan, scenario.plan.pools[0])
