"""When KV leaves a prefill rank, engine by engine."""

from __future__ import annotations

import pytest
from sim_kit import LinearCosts, cluster, pool, run, scenario, workload

from twin.cost.comm import kv_transfer_s
from twin.cost.handover import HANDOVERS, handover_of
from twin.cost.network import Network
from twin.spec.errors import SpecError
from twin.spec.workload import Arrivals

TWO_NODES = cluster(nodes=2, gpus_per_node=1, nvlink_domain_gpus=1, nics_per_node=1, nic_bytes_per_s=1e6, pcie_bytes_per_s=1e9)
COSTS = LinearCosts(step_s_each=1.0, prefill_s=0.01, kv_token_bytes=1e4)


def served(engine: str, kv_send: str = "engine", requests: int = 1, isl: int = 100, **entry):
    """Prompts of 2 s, 1 s of transfer at the link's rate, three decode steps of 1 s."""
    traffic = workload(Arrivals(kind="deterministic", rate_per_s=0.4), isl, 4, requests=requests)
    question = scenario(traffic, pool(role="prefill", **entry), pool(role="decode"), on=TWO_NODES, engine=engine,
                        kv_send=kv_send)
    return run(question, COSTS).clients.sent


def test_alone_a_transfer_takes_what_the_cost_room_says():
    request = served("vllm")[0]
    alone = kv_transfer_s(Network(TWO_NODES), [0], [1], COSTS.kv_transfer_bytes(100))
    assert request.kv_transfer_s == pytest.approx(alone, rel=1e-9)
    assert served("eptwin")[0].kv_transfer_s == pytest.approx(1.0)


def test_our_ranks_hear_of_a_hand_over_between_steps():
    """Arrivals at 0 and 2.5 s, prompts done at 2 and 4.5 s. The first decodes from 3 to 6 s; the second is asked for when the
    step that ends at 5 s is over, and the rank hears that it is to receive when the next one is, at 6 s."""
    first, second = served("eptwin", requests=2)
    assert (first.first_token_s, first.transfer_start_s, first.finish_s) == pytest.approx((2.0, 2.0, 6.0))
    assert (second.first_token_s, second.transfer_start_s, second.finish_s) == pytest.approx((4.5, 6.0, 10.0))


def test_a_sender_in_a_long_step_keeps_the_receiver_waiting():
    """Prompts done at 4 and 8 s: the first one's KV waits until the second's step is over, in ours alone, and both go at
    once then: 6 s for 3 s each."""
    ours, theirs = (served(engine, "prompt", requests=2, isl=300)[0] for engine in ("eptwin", "sglang"))
    assert ours.first_token_s == theirs.first_token_s == theirs.transfer_start_s == pytest.approx(4.0)
    assert ours.finish_s == pytest.approx(8.0 + 6.0 + 3.0)
    assert ours.kv_transfer_s == pytest.approx(4.0 + 6.0), "seen by the receiver, which heard at once"


def test_a_prompt_of_one_step_leaves_whole_where_ranks_hear_between_steps():
    own, other = handover_of("eptwin", "layer"), handover_of("vllm", "layer")
    assert (own.tail(80, 80, 4), own.tail(100, 20, 4)) == (1.0, 0.25)
    assert other.tail(80, 80, 4) == 0.25


@pytest.mark.parametrize(("kv_send", "tail"), [("prompt", 1.0), ("chunk", 0.2), ("layer", 1.0)])
def test_what_can_leave_early_does(kv_send, tail):
    """The model has one layer, so that by layer nothing is early; chunks of 80 and 20 leave a fifth to the end."""
    request = served("vllm", kv_send, chunk_tokens=80)[0]
    whole = served("vllm", "prompt", chunk_tokens=80)[0]
    style = HANDOVERS["vllm"]
    base = style.base_s
    link_s = (whole.kv_transfer_s - base) * tail
    assert request.first_token_s == whole.first_token_s
    early_s = min(1.2, (whole.kv_transfer_s - base) * (1 - tail))  # the last chunk's step lasts 1.2 s
    late_s = (whole.kv_transfer_s - base) * (1 - tail) - early_s
    assert request.kv_transfer_s == pytest.approx(link_s + late_s + base, rel=1e-6)


def test_tails():
    style = handover_of("eptwin", "layer")
    assert style.tail(1000, 100, 50) == 0.02 and style.between_steps
    assert handover_of("sglang").tail(1000, 100, 50) == 0.1
    assert handover_of("eptwin").tail(1000, 100, 50) == 1.0
    with pytest.raises(SpecError, match="unknown engine"):
        handover_of("other")
