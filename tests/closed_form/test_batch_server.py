"""A batch server with a fixed step: every time in it is known in advance."""

from __future__ import annotations

import numpy as np
import pytest
from sim_kit import LinearCosts, cluster, lengths, pool, run, scenario, workload

from twin.sim import simulate
from twin.spec.workload import Arrivals

STEP_S = 0.125  # a power of two: sums of it are exact


def sent(question, *costs, **more):
    return run(question, *costs, **more).clients.sent


@pytest.mark.parametrize("coalesce", [True, False])
def test_a_burst_fills_the_seats_wave_after_wave(coalesce):
    """B seats, N requests of T tokens at once: wave w starts when wave w - 1 has given its last token."""
    from twin.sim.service import Switches

    seats, n, tokens = 4, 10, 7
    question = scenario(workload(Arrivals(kind="burst"), 3, tokens, requests=n), pool(max_num_seqs=seats))
    for i, request in enumerate(sent(question, LinearCosts(step_s_each=STEP_S), switches=Switches(coalesce=coalesce))):
        start = i // seats * tokens * STEP_S
        assert request.prefill_start_s == start
        assert request.first_token_s == start + STEP_S
        assert request.finish_s == start + tokens * STEP_S
        assert request.itl_max_s == STEP_S


def test_deterministic_arrivals_below_capacity_never_wait_for_a_seat():
    """One request every 3.3 steps, 5 steps each, 2 seats: it waits for the boundary of the step in flight, no more."""
    rate, tokens = 1 / (3.3 * STEP_S), 5
    question = scenario(workload(Arrivals(kind="deterministic", rate_per_s=rate), 1, tokens, requests=50), pool(max_num_seqs=2))
    boundary = 0.0
    for i, request in enumerate(sent(question, LinearCosts(step_s_each=STEP_S))):
        arrival = i / rate
        while boundary < arrival:  # steps follow one another from the first arrival on: the server never idles
            boundary += STEP_S
        assert request.prefill_start_s == pytest.approx(boundary, abs=1e-12)
        assert request.finish_s == pytest.approx(boundary + tokens * STEP_S, abs=1e-12)


def test_a_prompt_takes_its_chunks_and_decodes_keep_their_pace():
    question = scenario(workload(Arrivals(kind="burst"), 10, 4, requests=1), pool(chunk_tokens=4, max_batch_tokens=64))
    (request,) = sent(question, LinearCosts(step_s_each=1.0, prefill_s=0.5))
    assert request.first_token_s == (1 + 2) + (1 + 2) + (1 + 1)  # chunks of 4, 4, 2
    assert request.finish_s == request.first_token_s + 3


def test_context_grows_by_one_token_a_step():
    isl, osl = 5, 6
    question = scenario(workload(Arrivals(kind="burst"), isl, osl, requests=1), pool())
    (request,) = sent(question, LinearCosts(context_s=1.0))
    assert request.finish_s - request.first_token_s == sum(isl + 1 + j for j in range(osl - 1))


def test_the_slowest_rank_sets_the_pace_of_all():
    """Two ranks, three equal requests: the rank with two makes the lone one wait, and they end together."""
    question = scenario(workload(Arrivals(kind="burst"), 1, 9, requests=3), pool(dp=2), router="round_robin")
    requests = sent(question, LinearCosts(seq_s=1.0, prefill_s=1.0))
    assert [r.prefill_rank for r in requests] == [0, 1, 0]
    assert {r.finish_s for r in requests} == {2.0 + 8 * 2.0}


def test_prefill_decode_split_adds_up():
    """Prompt, then transfer (latency + bytes / rate, alone on its links), then the step in flight, then decode."""
    on = cluster(nodes=2, gpus_per_node=1, nvlink_domain_gpus=1, nics_per_node=1, nic_latency_s=0.25)
    question = scenario(workload(Arrivals(kind="burst"), 8, 5, requests=1), pool(role="prefill"), pool(role="decode"), on=on)
    (request,) = sent(question, LinearCosts(prefill_s=1.0), LinearCosts(step_s_each=STEP_S, kv_token_bytes=1.0))
    costs = LinearCosts(prefill_s=1.0, kv_token_bytes=5e4)
    (request,) = sent(question, costs, LinearCosts(step_s_each=STEP_S))
    assert request.first_token_s == 8.0
    assert request.kv_transfer_s == pytest.approx(0.25 + 8 * 5e4 / 1e5, abs=1e-12)
    assert request.finish_s == pytest.approx(8.0 + request.kv_transfer_s + 4 * STEP_S, abs=1e-12)
    assert request.itl_max_s == pytest.approx(request.kv_transfer_s + STEP_S, abs=1e-12)


def test_transfers_share_a_link_evenly_and_the_rest_speeds_up():
    """Two prefill instances of one node behind one NIC. Sizes 1 and 3 begin together: 1 ends after 2, 3 after 4."""
    from twin.cost.network import Network
    from twin.sim.clock import Clock
    from twin.sim.transfers import Transfers

    on = cluster(nodes=2, gpus_per_node=2, nvlink_domain_gpus=2, nics_per_node=1, pcie_bytes_per_s=1e9)
    clock, ends = Clock(), {}
    transfers = Transfers(clock, Network(on))
    transfers.start([0], [2], 1e5, lambda: ends.setdefault("small", clock.now))
    transfers.start([1], [3], 3e5, lambda: ends.setdefault("large", clock.now))
    clock.run()
    assert ends == {"small": pytest.approx(2.0, abs=1e-12), "large": pytest.approx(4.0, abs=1e-12)}
    nic = [i for i, link in enumerate(transfers.network.links) if link.name == "nic_up/0"]
    assert transfers.crossed_bytes()[nic] == pytest.approx(4e5, rel=1e-12)


def test_closed_loop_throughput_is_seats_over_service_time():
    users, tokens, think_s = 6, 16, 0.0
    question = scenario(workload(Arrivals(kind="closed_loop", concurrency=users, think_s=think_s), 1, tokens, requests=240),
                        pool(max_num_seqs=users))
    output = simulate(question, question.plan, cost_models=[LinearCosts(step_s_each=STEP_S)])
    assert output.result.throughput.output_tok_per_s == pytest.approx(users / STEP_S, rel=1e-9)
    assert output.result.latencies.tpot_s.max == pytest.approx(STEP_S, rel=1e-12)
    assert output.result.throughput.requests_per_s == pytest.approx(users / tokens / STEP_S, rel=1e-9)


def test_drafts_multiply_the_tokens_of_a_step():
    """Every draft accepted: 1 + d tokens a step; acceptance a: 1 + a + a^2 on average."""
    burst = workload(Arrivals(kind="burst"), 1, 301, requests=200)
    sure = scenario(burst, pool(max_num_seqs=200, mtp_draft_tokens=2, mtp_acceptance=1.0))
    assert {r.finish_s for r in sent(sure, LinearCosts(step_s_each=STEP_S))} == {STEP_S * (1 + 100)}
    half = scenario(burst, pool(max_num_seqs=200, mtp_draft_tokens=2, mtp_acceptance=0.5))
    spans = [r.finish_s - r.first_token_s for r in sent(half, LinearCosts(step_s_each=STEP_S))]
    assert np.mean(spans) / STEP_S == pytest.approx(300 / 1.75, rel=0.01)


def test_gaps_are_all_gaps_of_the_counted_requests():
    question = scenario(workload(Arrivals(kind="burst"), 1, lengths(9), requests=5, warmup_fraction=0.4), pool(max_num_seqs=2))
    itl = simulate(question, question.plan, cost_models=[LinearCosts(step_s_each=STEP_S)]).result.latencies.itl_s
    assert itl.count == 3 * 8 and itl.mean == itl.max == STEP_S
