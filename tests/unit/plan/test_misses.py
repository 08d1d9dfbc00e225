"""A simulation that has missed its objectives for certain ends there, and the answer is the one it would have had."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twin.cost.model import CostModel
from twin.plan import search as room
from twin.plan.evaluate import Evaluation, Job, percentile, run
from twin.plan.misses import Misses
from twin.plan.search import search
from twin.plan.space import enumerate_plans
from twin.sim.clock import Clock
from twin.sim.request import Request
from twin.spec.load import load_scenario
from twin.spec.plan import Plan
from twin.spec.results import Summary
from twin.spec.scenario import Scenario
from twin.spec.workload import Slo, WorkloadSpec

CHAT = load_scenario("r1_chat")


def traffic(slo: Slo, warmup: float = 0.0) -> WorkloadSpec:
    return CHAT.workload.model_copy(update={"slo": slo, "warmup_fraction": warmup})


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([0.5, 1.0, 1.0 + 1e-12, 2.0]), min_size=1, max_size=60), st.integers(1, 100), st.integers(0, 5))
def test_says_so_for_certain_and_in_the_end(values_s: list[float], percent: int, missing: int) -> None:
    """`missing`: requests of one token, which have no TPOT."""
    misses = Misses(traffic(Slo(tpot_s=1.0, percentile=percent)), len(values_s) + missing)
    said = False
    for number, value_s in enumerate(values_s):
        said |= misses("finish", Request(number, 0.0, 8, 3, first_token_s=1.0, finish_s=1.0 + 2 * value_s))
    met = (percentile(Summary.of(values_s), percent) or 0.0) <= 1.0
    assert not (said and met), "given up, though it met the objective"
    if all(value_s > 1.5 for value_s in values_s) and not missing:
        assert said, "all of them missed"


def test_warm_up_and_background_do_not_count() -> None:
    misses = Misses(traffic(Slo(ttft_s=1.0, percentile=50), warmup=0.5), 4)
    late = [misses("first_token", Request(number, 0.0, 8, 3, first_token_s=2.0)) for number in (-1, 0, 1, 2, 3)]
    assert late == [False, False, False, False, True]


def test_a_refusal_is_enough() -> None:
    assert Misses(traffic(Slo()), 100)("reject", Request(0, 0.0, 8, 3))


FAST = ["search.tp=[1,8]", "search.dp=[8,16]", "search.max_num_seqs=[64]", "search.max_batch_tokens=[8192]",
        "search.redundant_experts=[0]", "search.simulate_top=2", "workload.requests=60"]


def job(scenario: Scenario, load: float) -> Job:
    plan = next(plan for plan in enumerate_plans(scenario) if isinstance(plan, Plan) and plan.separated)
    return Job(scenario.model_dump_json(), plan.model_dump_json(), load, 60)


@pytest.fixture()
def events(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Events of simulations, and steps that were taken apart."""
    seen: Counter[str] = Counter()
    for owner in (Clock, CostModel):
        monkeypatch.setattr(owner, "step", counted(owner.step, owner.__name__, seen))
    return seen


def counted(step: Callable[..., object], key: str, seen: Counter[str]) -> Callable[..., object]:
    def wrapped(*given: object) -> object:
        seen[key] += 1
        return step(*given)
    return wrapped


def test_ends_early_with_the_same_verdict(events: Counter[str]) -> None:
    asked = job(load_scenario("r1_chat", FAST), 20.0)
    whole, counts = [], []
    for load in (20.0, 400.0):
        for only_if_ok in (False, True):
            events.clear()
            whole.append(run(replace(asked, load=load, only_if_ok=only_if_ok)))
            counts.append(events["Clock"])
    low, low_too, high, high_too = whole
    assert low.ok and low_too == low and counts[1] == counts[0], "a run that meets its objectives goes on to its end"
    assert not high.ok and not high_too.ok and counts[3] < 0.8 * counts[2]
    assert events["CostModel"] == 0, "nobody asked for the parts of steps"


def test_search_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = list[bool]()
    scenario = load_scenario("r1_chat", [*FAST[2:], "search.tp=[1]", "search.dp=[16]", "workload.requests=300",
                                         "workload.slo.ttft_s=1.1 s"])
    monkeypatch.setattr(room, "CAPACITY_ROUNDS", 2)

    def noted(wanted: bool, asked: Job) -> Evaluation:
        found = run(asked if wanted else replace(asked, only_if_ok=False))
        given_up.append(not found.metrics)
        return found

    told = []
    for wanted in (True, False):
        given_up.clear()
        monkeypatch.setattr(room, "run", partial(noted, wanted))
        told.append((search(scenario, min_requests=60).model_dump_json(exclude={"provenance"}), any(given_up)))
    assert told[0][0] == told[1][0]
    assert (told[0][1], told[1][1]) == (True, False), "some simulation was given up, and only where it may be"
