"""Taking many decode steps at once changes nothing: not a time, not a count, not a byte of the result."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sim_kit import LinearCosts, cluster, pool, scenario, workload
from test_conservation import scenarios

from twin.sim import simulate
from twin.sim.simulate import SimOutput
from twin.spec.workload import Arrivals, Lengths


def told(output: SimOutput) -> tuple:
    """Everything but the checkout's commit, which may change while a test runs."""
    return (output.result.model_dump_json(exclude={"provenance"}), [r.model_dump_json() for r in output.requests], output.trace)


def both(question, costs, in_flight=0) -> tuple[SimOutput, SimOutput]:
    each = [simulate(question, question.plan, cost_models=costs, coalesce=coalesce, in_flight=in_flight)
            for coalesce in (True, False)]
    return each[0], each[1]


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(scenarios(), st.sampled_from([0, 0, 6]))
def test_steps_taken_at_once_are_the_steps_taken_one_by_one(case, in_flight):
    fast, slow = both(*case, in_flight)
    assert told(fast) == told(slow)


def test_long_decodes_of_many_ranks():
    """Runs of hundreds of steps, cut by arrivals, by hand-overs and by ends in other ranks."""
    traffic = workload(Arrivals(kind="poisson", rate_per_s=0.9), Lengths(kind="lognormal", mean=40.0, cv=1.0),
                       Lengths(kind="geometric", mean=150.0), requests=120)
    costs = [LinearCosts(step_s_each=0.01, seq_s=1e-4, context_s=1e-6, prefill_s=1e-4, kv_blocks_per_rank=400,
                         kv_token_bytes=1e4)]
    on = cluster(nodes=4, gpus_per_node=4, nvlink_domain_gpus=4, nics_per_node=2)
    plans = ((pool(dp=3, block_tokens=8),), (pool(role="prefill", instances=2), pool(role="decode", dp=4, block_tokens=8)))
    for pools in plans:
        question = scenario(traffic, *pools, on=on)
        fast, slow = both(question, costs * len(pools))
        assert told(fast) == told(slow)
        assert fast.result.counts.finished == 120
