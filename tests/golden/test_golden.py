"""The exact event log, and the number of kernel events, of small services. A change here is a change of behaviour.

`python tests/golden/test_golden.py` writes the logs anew; read the difference before committing it.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [] if "pytest" in sys.modules else [str(HERE.parent), str(HERE.parents[1])]

import pytest  # noqa: E402
from sim_kit import LinearCosts, cluster, pool, scenario, workload, world  # noqa: E402

from twin.sim.service import Switches  # noqa: E402
from twin.spec.workload import Arrivals, Lengths  # noqa: E402

SPREAD = Lengths(kind="uniform", low=2, high=14)
TWO_NODES = cluster(nodes=4, gpus_per_node=2, nvlink_domain_gpus=2, nics_per_node=1, nic_latency_s=0.01)
STEPS = LinearCosts(step_s_each=0.1, seq_s=0.01, prefill_s=0.005, kv_token_bytes=2e3)
POISSON = Arrivals(kind="poisson", rate_per_s=2.0)


def cases() -> dict:
    return {
        "mixed_chunked": (scenario(workload(POISSON, SPREAD, SPREAD, requests=12), pool(dp=2, max_num_seqs=3, chunk_tokens=8)),
                          [STEPS]),
        "preempted": (scenario(workload(Arrivals(kind="burst"), 6, 12, requests=4), pool(max_num_seqs=4, block_tokens=4)),
                      [LinearCosts(step_s_each=0.1, prefill_s=0.01, kv_blocks_per_rank=10)]),
        "separated": (scenario(workload(POISSON, SPREAD, SPREAD, requests=12), pool(role="prefill", instances=2),
                               pool(role="decode", dp=2, tp=2, max_num_seqs=2), on=TWO_NODES), [STEPS, STEPS]),
        "closed_loop_mtp": (scenario(workload(Arrivals(kind="closed_loop", concurrency=3, think_s=0.25), 4, SPREAD, requests=9),
                                     pool(mtp_draft_tokens=2, mtp_acceptance=0.5)), [STEPS]),
        "refused": (scenario(workload(Arrivals(kind="burst"), 4, 6, requests=5), pool(instances=2), max_outstanding=3,
                             router="round_robin"), [STEPS]),
    }


def log_of(name: str) -> str:
    question, costs = cases()[name]
    lines: list[str] = []
    at = world(question, *costs, switches=Switches(
        observer=lambda time_s, what, request, instance, rank: lines.append(
            f"{time_s:.12g} {what} r{request}" + (f" i{instance}" if instance >= 0 else "") + (f".{rank}" if rank >= 0 else ""))))
    events = 0
    while not at.is_over:
        at.step()
        events += 1
    return "\n".join([*lines, f"{events} events", ""])


@pytest.mark.parametrize("name", cases())
def test_event_log(name):
    assert log_of(name) == (HERE / f"{name}.log").read_text()


def test_the_logs_show_what_they_are_for():
    """Each case exercises what it is named after, so that a golden file cannot go stale unnoticed."""
    for name, word in (("preempted", "preempt"), ("separated", "landed"), ("refused", "reject")):
        assert f" {word} " in (HERE / f"{name}.log").read_text()


if __name__ == "__main__":
    for case in cases():
        (HERE / f"{case}.log").write_text(log_of(case))
