"""The fast closed loop: against arithmetic, and against the simulator."""

from __future__ import annotations

from dataclasses import replace

import pytest

from twin.cost.engines import engine_of
from twin.cost.serving import Serving
from twin.sim.simulate import simulate
from twin.spec.scenario import Scenario
from twin.spec.workload import Arrivals, Lengths, WorkloadSpec
from twin.validate.answer import Answers
from twin.validate.closed_loop import Worker, run_loop
from twin.validate.rows import Question, Row, question_of

TEXTS = {"id": "x", "backend": "vllm", "backend_version": "", "model_path": "qwen3-30b-a3b", "system": "h200_sxm", "mode": "agg",
         "precision": "", "gemm_quant_mode": "", "moe_quant_mode": "", "silicon_data_source": ""}


class Clockwork:
    """Step times that can be added up by hand: 10 ms a decode step, 1 ms for every 100 prompt tokens more."""

    dp = 1

    class costs:
        tokens_per_step = 1.0

    def ranks_s(self, n: list[int], context: list[float], tokens: list[float], depth: list[float]) -> float:
        return (0.010 if n[0] else 0.0) + tokens[0] / 1e5

    def decode_s(self, n: int, context: float) -> float:
        return 0.010


def loop(serving: Serving, users: int, isl: int = 1000, osl: int = 11, room: float = 1e9, waves: int = 1,
         spread: int = 0) -> tuple[float, float]:
    worker = Worker(Clockwork(), serving, "mixed", room)  # type: ignore[arg-type]
    found = run_loop([worker], [], users, lambda i: (isl, osl + spread * (i % 7)), frontend_s=0.0, handover_s=lambda _: 0.0,
                     waves=waves, simulated=4)
    return found.ttft_s, found.tpot_s


def test_one_user_waits_for_the_prompt_and_then_for_each_step() -> None:
    assert loop(Serving(True, True, 8192, 1), 1) == pytest.approx((0.010, 0.010))


def test_whole_budgets_take_prompts_together_and_small_ones_in_turn() -> None:
    assert loop(Serving(False, True, 4000, 1), 4)[0] == pytest.approx(0.040)
    assert loop(Serving(False, True, 1000, 1), 4)[0] == pytest.approx(0.025)  # 10, 20, 30, 40 ms


def test_prompts_alone_stall_decodes_and_mixed_ones_ride_along() -> None:
    alone, mixed = (loop(Serving(mix, True, 1000, 1), 2, osl=20, waves=4, spread=5) for mix in (False, True))
    assert alone[1] > 0.0102 and mixed[1] > 0.0102


def test_little_memory_makes_users_wait_for_each_other() -> None:
    free, tight = loop(Serving(True, True, 8192, 1), 4), loop(Serving(True, True, 8192, 1), 4, room=1100.0)
    assert tight[0] > free[0] + 0.1


def test_memory_is_taken_as_sequences_grow_where_outputs_are_not_reserved() -> None:
    """Room for four prompts of 100 and half their outputs of 200: reserved in full, two run at once; on demand all begin,
    and who came last is computed again."""
    whole, demand = (Serving(True, True, 8192, 1, reserved_share=share) for share in (1.0, 0.0))
    waiting, growing, free = (loop(serving, 4, isl=100, osl=200, room=room)
                              for serving, room in ((whole, 800.0), (demand, 800.0), (demand, 1e9)))
    assert waiting[0] > 0.5 and waiting[1] == pytest.approx(0.010, rel=0.01), "two wait for the others' ends"
    assert growing[0] == pytest.approx(free[0]) and growing[1] > 1.1 * free[1], "none waits to begin, some begin again"


def test_reserving_a_part_is_between_the_two() -> None:
    none, half, whole = (loop(Serving(True, True, 8192, 1, reserved_share=share), 8, isl=100, osl=200, room=1300.0)[0]
                         for share in (0.0, 0.5, 1.0))
    assert none < half < whole


def test_seldom_looking_for_requests_delays_them() -> None:
    seldom, always = (loop(Serving(False, True, 1000, poll), 3, osl=100, waves=4, spread=20)[0] for poll in (30, 1))
    assert seldom > 2 * always


def test_few_may_run_at_once_and_the_others_wait() -> None:
    free, bound = (loop(Serving(False, True, 8192, 1, running=most), 4) for most in (0, 2))
    assert bound[0] > free[0] + 0.03, "two of four wait until two have ended"


def test_prompts_wait_for_company_while_others_decode() -> None:
    """Two users out of step: whoever comes back waits 20 steps of 10 ms, unless the step would be full."""
    def ttft(serving: Serving) -> float:
        return loop(serving, 2, osl=100, waves=4, spread=20)[0]

    alone, patient = ttft(Serving(True, False, 8192, 1)), ttft(Serving(True, False, 8192, 1, wait_steps=20, wait_share=0.9))
    assert alone + 0.08 < patient < alone + 0.2
    assert ttft(Serving(True, False, 8192, 1, wait_steps=20, wait_share=0.1)) == pytest.approx(alone)


@pytest.mark.parametrize("users", [2, 12])
def test_it_agrees_with_the_simulator(users: int) -> None:
    numbers = {"isl": 1024.0, "osl": 128.0, "tp_size": 1.0, "batch_size": float(users)}
    question = question_of(Row(1, TEXTS, numbers, {}))
    assert isinstance(question, Question)
    lengths = {"isl": Lengths(kind="fixed", mean=1024.0), "osl": Lengths(kind="fixed", mean=128.0)}
    workload = WorkloadSpec(arrivals=Arrivals(kind="closed_loop", concurrency=users), requests=6 * users,
                            warmup_fraction=0.0, **lengths)
    exact = Question(question.row, question.model, question.cluster, question.plan, workload, users, 0.1, 0.1, 6)
    answers = Answers()
    pool, engine = exact.plan.pools[0], replace(engine_of("vllm"), frontend_s=0.0)
    answers.costs_of(exact.model, exact.cluster, exact.plan, pool, engine=engine)
    fast = answers.answer(exact)
    costs = answers.costs_of(exact.model, exact.cluster, exact.plan, pool)
    scenario = Scenario(name="x", model=exact.model, cluster=exact.cluster, workload=workload, plan=exact.plan, engine="vllm")
    slow = simulate(scenario, exact.plan, record_trace=False, cost_models=[costs]).result.latencies
    assert fast.tpot_s == pytest.approx(slow.tpot_s.mean, rel=0.05)
    assert fast.ttft_s == pytest.approx(slow.ttft_s.mean, rel=0.15)
