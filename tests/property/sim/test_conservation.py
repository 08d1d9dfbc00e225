"""Nothing is lost or made up: requests, tokens, KV blocks and bytes on links, looked at after every single event."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sim_kit import LinearCosts, cluster, pool, scenario, workload, world

from twin.sim.world import World
from twin.spec.scenario import Scenario
from twin.spec.workload import Arrivals, Lengths

LENGTHS = st.builds(lambda low, more: Lengths(kind="uniform", low=low, high=low + more), st.integers(1, 12), st.integers(0, 12))
ARRIVALS = st.one_of(
    st.just(Arrivals(kind="burst")),
    st.builds(lambda rate: Arrivals(kind="poisson", rate_per_s=rate), st.floats(0.05, 20)),
    st.builds(lambda rate: Arrivals(kind="deterministic", rate_per_s=rate), st.sampled_from([0.5, 1.0, 4.0])),
    st.builds(lambda users, think: Arrivals(kind="closed_loop", concurrency=users, think_s=think), st.integers(1, 12),
              st.sampled_from([0.0, 0.5, 1.7])))
# Steps of one second tie with arrivals and with each other as often as can be; odd ones never do.
COSTS = st.builds(LinearCosts, step_s_each=st.sampled_from([1.0, 0.37]), seq_s=st.sampled_from([0.0, 0.1]),
                  context_s=st.sampled_from([0.0, 0.003]), prefill_s=st.sampled_from([0.0, 0.05]),
                  kv_blocks_per_rank=st.integers(8, 60), kv_token_bytes=st.sampled_from([0.0, 1e3, 1e5]))


@st.composite
def scenarios(draw) -> tuple[Scenario, list[LinearCosts]]:
    def some_pool(role: str):
        return pool(role=role, instances=draw(st.integers(1, 2)), dp=draw(st.integers(1, 3)), tp=draw(st.integers(1, 2)),
                    max_num_seqs=draw(st.integers(1, 6)), max_batch_tokens=draw(st.sampled_from([8, 32])),
                    chunk_tokens=draw(st.sampled_from([3, 8, 32])), block_tokens=draw(st.sampled_from([1, 4])),
                    mtp_draft_tokens=draw(st.sampled_from([0, 0, 2])), mtp_acceptance=0.6,
                    prefix_cache=draw(st.booleans()))
    roles = draw(st.sampled_from([("mixed",), ("prefill", "decode")]))
    traffic = workload(draw(ARRIVALS), draw(LENGTHS), draw(LENGTHS), requests=draw(st.integers(1, 30)),
                       prefix_share=draw(st.sampled_from([0.0, 0.5])))
    question = scenario(traffic, *(some_pool(role) for role in roles), seed=draw(st.integers(0, 5)),
                        on=cluster(nodes=8, gpus_per_node=4, nvlink_domain_gpus=4, nics_per_node=2),
                        kv_send=draw(st.sampled_from(["engine", "engine", "chunk", "layer"])),
                        engine=draw(st.sampled_from(["eptwin", "sglang"])),
                        router=draw(st.sampled_from(["round_robin", "least_loaded", "power_of_two", "predicted_ttft",
                                                     "prefix_affinity"])),
                        max_outstanding=draw(st.sampled_from([None, None, 5])))
    return question, [draw(COSTS) for _ in roles]


def check(at: World) -> None:
    """What must hold between any two events."""
    sent = at.clients.sent
    ended = [r for r in sent if r.status in ("ok", "rejected")]
    assert all((r.finish_s is not None) == (r.status == "ok") for r in sent)
    inside = len(sent) - len(ended)
    known: dict[int, int] = {}
    for instance in at.service.instances:
        for rank in instance.ranks:
            rank.blocks.check_integrity()
            held = {r.id for r in sent if rank.blocks.held(r.id)}
            assert rank.incoming <= held, "KV under way has no memory to land in"
            for request_id in held:
                known[request_id] = known.get(request_id, 0) + 1
            assert rank.num_running <= rank.limits.max_seqs
            for request_id in rank.incoming | {h.request.id for h in rank.handovers}:
                assert at.service.requests[request_id].status == "unfinished"
        assert float(instance.log.column("step_s").sum()) <= at.clock.now + 1e-9, "busier than time allows"
    under_way = set() if at.service.sendings is None else set(at.service.sendings.under_way)
    for request in sent:
        copies = known.get(request.id, 0)
        assert copies <= (2 if request.id in under_way else 1), "a request holds memory in two places"
        assert request.status == "unfinished" or copies == 0, "memory outlived its request"
    for targets in {id(t): t for t in (at.service.entry, at.service.decode)}.values():
        assert (targets.requests >= 0).all() and (targets.prompt_tokens >= 0).all() and (targets.output_tokens >= 0).all()
    held_back = sum(len(rank.handovers) for i in at.service.instances for rank in i.ranks)
    outstanding = sum(int(t.requests.sum()) for t in {id(t): t for t in (at.service.entry, at.service.decode)}.values())
    twice = 0 if at.service.sendings is None else sum(not s.prompt_done for s in at.service.sendings.under_way.values())
    assert outstanding - twice == inside and held_back <= inside


def check_end(at: World, question: Scenario) -> None:
    """What must hold once everyone has gone home."""
    sent = at.clients.sent
    assert len(sent) == question.workload.requests and all(r.status in ("ok", "rejected") for r in sent)
    served = [r for r in sent if r.status == "ok"]
    made = sum(float(i.log.column("output_tokens").sum()) for i in at.service.instances)
    recomputed = sum(r.preemptions for r in sent)
    # A recompute ends with a token that would have come out of a decode: no token is given twice.
    assert made == sum(r.osl for r in served), (made, recomputed)
    prefilled = sum(float(i.log.column("prefill_tokens").sum()) for i in at.service.instances)
    asked = sum(r.isl - r.cached_tokens for r in served)
    assert prefilled == asked if not recomputed else prefilled > asked
    for instance in at.service.instances:
        assert all(rank.is_idle and not rank.num_held and rank.blocks.num_used == 0 for rank in instance.ranks)
        assert float(instance.log.column("kv_tokens_fullest").max(initial=0.0)) <= instance.ranks[0].capacity_tokens
    for r in served:
        assert r.arrival_s <= r.prefill_start_s < r.first_token_s <= r.finish_s
        assert (r.itl_max_s is None) == (r.osl == 1)
        assert r.kv_transfer_s is not None if question.plan.separated and r.osl > 1 else r.kv_transfer_s is None
    if at.service.transfers is not None:
        check_links(at, [r for r in served if r.osl > 1])


def check_links(at: World, moved: list) -> None:
    """Each link carried exactly the bytes of the transfers that cross it."""
    network, expected = at.service.transfers.network, np.zeros(len(at.service.transfers.network.links))
    by_number = {i.number: i for i in at.service.instances}
    for r in moved:
        source, target = by_number[r.prefill_instance], by_number[r.decode_instance]
        tp = source.pool.tp, target.pool.tp
        pairs = max(tp)
        for i in range(pairs):
            src = source.gpus[r.prefill_rank * tp[0] + i * tp[0] // pairs]
            dst = target.gpus[r.decode_rank * tp[1] + i * tp[1] // pairs]
            expected[list(network.route(src, dst))] += source.costs.kv_transfer_bytes(r.isl) / pairs
    np.testing.assert_allclose(at.service.transfers.crossed_bytes(), expected, rtol=1e-9, atol=1e-6)


def live(at: World, question: Scenario, look) -> None:
    for _ in range(200_000):
        if at.is_over:
            check_end(at, question)
            return
        at.step()
        look(at)
    raise AssertionError("requests do not end")


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(scenarios())
def test_nothing_is_lost_between_any_two_events(case):
    question, costs = case
    live(world(question, *costs), question, check)
