"""A search gives the same bytes, and refuses in the same words, on any number of processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor

import pytest

from twin.plan import search as room
from twin.plan.bounds import PoolJob
from twin.plan.search import search
from twin.spec.errors import EptwinError, Infeasible, Overloaded, RankFailed
from twin.spec.load import load_scenario
from twin.spec.scenario import Scenario

FAST = ["search.tp=[1,8]", "search.dp=[8,16]", "search.max_num_seqs=[64]", "search.max_batch_tokens=[8192]",
        "search.redundant_experts=[0]", "search.simulate_top=2", "workload.requests=40"]


class Counted:
    """An executor that remembers the first of the work it was given."""

    def __init__(self, inner: Executor) -> None:
        self._inner, self.jobs = inner, list[object]()

    def map(self, work: object, jobs: Iterable[object]) -> Iterator[object]:
        jobs = list(jobs)
        self.jobs += jobs
        return self._inner.map(work, jobs)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


def answer(scenario: Scenario, executor: object) -> str:
    found = search(scenario, executor=executor, min_requests=20)  # type: ignore[arg-type]
    return found.model_dump_json(exclude={"provenance"})


def test_same_bytes(processes: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "POOLS", 3)
    monkeypatch.setattr(room, "CAPACITY_ROUNDS", 1)
    scenario = load_scenario("r1_chat", FAST)
    counted = Counted(processes)
    assert answer(scenario, counted) == answer(scenario, None)
    bounded = [job for job in counted.jobs if isinstance(job, PoolJob)]
    assert len(bounded) > 2, "pools are bounded by the workers, not all at once"
    assert len({pool for job in bounded for pool in job.pools}) == sum(len(job.pools) for job in bounded), "each once"


@pytest.mark.parametrize("objective", ["tpot_s=1 ms", "ttft_s=1 ms"])
def test_same_refusals(processes: Executor, objective: str) -> None:
    lenient = ["workload.slo.tpot_s=10 s"] if objective.startswith("ttft") else []
    scenario = load_scenario("r1_chat", [*FAST, *lenient, f"workload.slo.{objective}"])
    told = []
    for executor in (processes, None):
        with pytest.raises(Infeasible) as refused:
            search(scenario, executor=executor, min_requests=20)
        told.append((str(refused.value), vars(refused.value)))
    assert told[0] == told[1]
    assert told[0][1]["constraint"] == objective.partition("=")[0]


@pytest.mark.parametrize("error", [Infeasible("no", constraint="c", needed=2.0), RankFailed("gone", rank=3, where="x"),
                                   Overloaded("busy", retry_after_s=2.0)], ids=lambda error: type(error).__name__)
def test_errors_come_back_whole(processes: Executor, error: EptwinError) -> None:
    back = processes.submit(same, error).result()
    assert type(back) is type(error)
    assert (str(back), vars(back)) == (str(error), vars(error))


def same(value: object) -> object:
    return value
