"""Queues with known answers, served by our own arrivals, router and instances with a cost model one can do by hand.

Two steps, because a queue at load 0.8 needs millions of customers to show its mean within 2%: a few thousand customers
through the simulator must wait exactly as the recursion for the same arrivals and services says; and that recursion,
over millions of the same arrivals, must meet the closed form. The slow test runs the simulator itself that long.
"""

from __future__ import annotations

import heapq
from math import factorial

import numpy as np
import pytest
from sim_kit import LinearCosts, lengths, pool, run, scenario, workload

from twin.policy.arrivals import sample_requests
from twin.spec.workload import Arrivals, Lengths

TOKEN_S = 1e-3
MEAN_TOKENS = 1000
SERVICES = {"exponential": Lengths(kind="geometric", mean=float(MEAN_TOKENS)), "deterministic": lengths(MEAN_TOKENS),
            "lognormal": Lengths(kind="lognormal", mean=float(MEAN_TOKENS), cv=1.5)}


def traffic(service: Lengths, rate_per_s: float, n: int, *, decode: bool = False, warmup: float = 0.0):
    """A service is a prompt computed in one step, or an output given a token a step."""
    isl, osl = (lengths(1), service) if decode else (service, lengths(1))
    return workload(Arrivals(kind="poisson", rate_per_s=rate_per_s), isl, osl, requests=n, warmup_fraction=warmup)


def one_prompt_at_a_time(**fields):
    return pool(max_num_seqs=1, max_batch_tokens=10_000_000, chunk_tokens=None, **fields)


def waits(done) -> np.ndarray:
    return np.array([r.prefill_start_s - r.arrival_s for r in done.clients.sent])


def lindley(arrival_s: np.ndarray, service_s: np.ndarray) -> np.ndarray:
    """Waits of a single first-come-first-served server: W(n+1) = max(0, W(n) + S(n) - T(n))."""
    walk = np.concatenate([[0.0], np.cumsum(service_s[:-1] - np.diff(arrival_s))])
    return walk - np.minimum.accumulate(walk)


def kiefer_wolfowitz(arrival_s: np.ndarray, service_s: np.ndarray, servers: int) -> np.ndarray:
    """Waits of `servers` servers behind one queue."""
    free = [0.0] * servers
    found = np.empty(len(arrival_s))
    for i, (arrival, service) in enumerate(zip(arrival_s.tolist(), service_s.tolist(), strict=True)):
        start = max(arrival, heapq.heappop(free))
        found[i] = start - arrival
        heapq.heappush(free, start + service)
    return found


def erlang_c(servers: int, rho: float) -> float:
    """Probability that an arrival waits in M/M/c."""
    load = servers * rho
    last = load**servers / factorial(servers) / (1 - rho)
    return last / (sum(load**k / factorial(k) for k in range(servers)) + last)


def expected_wait_s(service: str, rho: float) -> float:
    """Pollaczek-Khinchine, mean service 1 s."""
    square_cv = {"exponential": 1.0 - 1.0 / MEAN_TOKENS, "deterministic": 0.0, "lognormal": 1.5**2}[service]
    return rho / (1 - rho) * (1 + square_cv) / 2


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_one_server_waits_as_the_recursion_says(service, rho):
    question = scenario(traffic(SERVICES[service], rho, 1500), one_prompt_at_a_time(), seed=11)
    done = run(question, LinearCosts(prefill_s=TOKEN_S))
    drawn = sample_requests(question.workload, question.seed)
    np.testing.assert_allclose(waits(done), lindley(drawn.arrival_s, drawn.isl * TOKEN_S), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("service", "n", "seed"), [("exponential", 6_000_000, 1), ("deterministic", 3_000_000, 2),
                                                    ("lognormal", 8_000_000, 3)])
@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_one_server_meets_pollaczek_khinchine(service, n, seed, rho):
    drawn = sample_requests(traffic(SERVICES[service], rho, n), seed)
    mean = lindley(drawn.arrival_s, drawn.isl * TOKEN_S)[n // 20:].mean()
    assert mean == pytest.approx(expected_wait_s(service, rho), rel=0.02)


def test_several_seats_wait_as_the_recursion_says():
    """c seats of one rank, each giving a token a step: c servers, up to the step that a request waits to begin."""
    seats, rho = 4, 0.8
    question = scenario(traffic(SERVICES["exponential"], seats * rho, 1500, decode=True), pool(max_num_seqs=seats), seed=5)
    done = run(question, LinearCosts(step_s_each=TOKEN_S))
    drawn = sample_requests(question.workload, question.seed)
    exact = kiefer_wolfowitz(drawn.arrival_s, drawn.osl * TOKEN_S, seats)
    assert waits(done).mean() == pytest.approx(exact.mean(), abs=2 * TOKEN_S)


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_several_seats_meet_erlang_c(rho):
    seats = 4
    drawn = sample_requests(traffic(SERVICES["exponential"], seats * rho, 3_000_000, decode=True), 8)
    mean = kiefer_wolfowitz(drawn.arrival_s, drawn.osl * TOKEN_S, seats)[150_000:].mean()
    assert mean == pytest.approx(erlang_c(seats, rho) / (seats * (1 - rho)), rel=0.02)


def test_round_robin_splits_the_queue():
    """Two instances behind a router: each sees every other arrival (Erlang-2 gaps), and the same recursion."""
    question = scenario(traffic(SERVICES["exponential"], 1.6, 1500), one_prompt_at_a_time(instances=2), router="round_robin")
    done = run(question, LinearCosts(prefill_s=TOKEN_S))
    drawn = sample_requests(question.workload, question.seed)
    for start in (0, 1):
        exact = lindley(drawn.arrival_s[start::2], drawn.isl[start::2] * TOKEN_S)
        np.testing.assert_allclose(waits(done)[start::2], exact, rtol=1e-9, atol=1e-9)


def test_littles_law_is_exact_for_every_queue():
    """L from the integral over time, lambda and W from the requests: equal when the system starts and ends empty."""
    question = scenario(traffic(SERVICES["lognormal"], 3.0, 800, decode=True), pool(max_num_seqs=2, instances=2))
    done = run(question, LinearCosts(step_s_each=TOKEN_S))
    sent = done.clients.sent
    end_s = max(r.finish_s for r in sent)
    spans = {"system": [(r.arrival_s, r.finish_s) for r in sent], "queue": [(r.arrival_s, r.prefill_start_s) for r in sent],
             "server": [(r.prefill_start_s, r.finish_s) for r in sent]}
    for name, pairs in spans.items():
        changes = sorted([(a, 1) for a, _ in pairs] + [(b, -1) for _, b in pairs])
        area, inside, last = 0.0, 0, 0.0
        for time_s, change in changes:
            area, inside, last = area + inside * (time_s - last), inside + change, time_s
        assert inside == 0
        flow, stay = len(pairs) / end_s, np.mean([b - a for a, b in pairs])
        assert area / end_s == pytest.approx(flow * stay, rel=1e-9), name


@pytest.mark.slow
@pytest.mark.parametrize(("service", "rho", "n"), [("exponential", 0.5, 200_000), ("exponential", 0.8, 600_000),
                                                   ("deterministic", 0.8, 300_000)])
def test_the_simulator_itself_meets_the_closed_form(service, rho, n):
    done = run(scenario(traffic(SERVICES[service], rho, n), one_prompt_at_a_time(), seed=21), LinearCosts(prefill_s=TOKEN_S))
    assert waits(done)[n // 20:].mean() == pytest.approx(expected_wait_s(service, rho), rel=0.02)
