"""Same question and seed, same bytes: in another process, under another hash seed, with recorders on or off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sim_kit import LinearCosts, cluster, pool, scenario, workload

from twin.policy.arrivals import named_stream
from twin.sim import simulate
from twin.spec.workload import Arrivals, Lengths

ROOT = Path(__file__).parents[3]
SCRIPT = """
import hashlib
from twin.sim import simulate
from twin.spec.load import load_scenario
question = load_scenario("tiny_cpu", ["routing.kind=zipf", "routing.alpha=0.8"])
output = simulate(question, question.plan)
text = output.result.model_dump_json(exclude={"provenance"}) + repr(output.trace)
text += "".join(r.model_dump_json() for r in output.requests)
print(hashlib.sha256(text.encode()).hexdigest(), len(output.trace), output.result.pools[0].expert_load is not None)
"""


def digest(hash_seed: str) -> str:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=100, check=True,
                          env={**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"})
    return done.stdout


def question(seed: int = 0):
    traffic = workload(Arrivals(kind="poisson", rate_per_s=3.0), Lengths(kind="lognormal", mean=20.0, cv=1.0),
                       Lengths(kind="geometric", mean=10.0), requests=60)
    return scenario(traffic, pool(role="prefill"), pool(role="decode", dp=2, mtp_draft_tokens=1), seed=seed,
                    on=cluster(nodes=2), router="power_of_two")


COSTS = LinearCosts(step_s_each=0.05, seq_s=0.01, prefill_s=0.002)


def answer(seed: int = 0, **more) -> str:
    output = simulate(question(seed), question().plan, cost_models=[COSTS, COSTS], **more)
    return output.result.model_dump_json(exclude={"provenance"}) + "".join(r.model_dump_json() for r in output.requests)


def test_another_hash_seed_gives_the_same_bytes():
    first = digest("1")
    assert first == digest("4242")
    assert first.split()[2] == "True"


def test_recorders_change_nothing_and_seeds_do():
    assert answer() == answer(record_trace=False)
    assert answer() != answer(seed=1)


def test_drawing_from_another_stream_changes_nothing():
    before = answer()
    named_stream(0, "a stream nobody has thought of yet").random(1000)
    assert answer() == before
    assert (named_stream(0, "isl").random(8) == named_stream(0, "isl").random(8)).all()


def test_fewer_requests_are_the_first_ones():
    whole = simulate(question(), question().plan, cost_models=[COSTS, COSTS]).requests
    part = simulate(question(), question().plan, cost_models=[COSTS, COSTS], max_requests=20).requests
    assert [(r.arrival_s, r.isl, r.osl) for r in part] == [(r.arrival_s, r.isl, r.osl) for r in whole[:20]]
