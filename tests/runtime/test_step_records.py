"""Step records: what a rank sends is what the front end reads, in few messages of few bytes, from every rank of a step."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from runtime_checkpoints import Checkpoints

from runtime.batch import Segment
from runtime.clock import Clock
from runtime.layout import layouts
from runtime.loop import Reformed, StepLoop
from runtime.measure import PARTS, group_steps
from runtime.offline import run_workload
from runtime.options import EngineOptions
from runtime.rank import build_rank
from runtime.records import BATCH_ROWS, BATCH_S, IDLE, Did, StepLog, StepRecords, did, unpack_rows
from runtime.targets import Targets
from runtime.tiny import tiny_config
from runtime.types import SamplingParams
from twin.policy.steps import PrefillChunk, StepPlan
from twin.spec.hf import model_from_hf_config
from twin.spec.plan import Plan, PoolPlan
from twin.spec.workload import Arrivals, Lengths, WorkloadSpec

POOL = {"block_tokens": 8, "kv_blocks": 128, "max_num_seqs": 8, "max_batch_tokens": 64, "chunk_tokens": 32}
PARTS_S = {"schedule": 1.23456789e-5, "attention": 0.0020000001, "experts": 0.1 + 0.2, "sample": 0.0}
DECODE: Did = (3, 120, 0, 0, 3, 3, 0.0, 0.25, (), ())


class Wire:
    """Counts messages and their bytes as the control channel has them."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def send(self, message: dict[str, Any]) -> None:
        self.lines.append(json.dumps({"seat": 0, "formation": 0, **message}, separators=(",", ":")))


def test_what_is_read_is_what_was_written() -> None:
    wire = Wire()
    log = StepLog(wire.send)
    log.add(1e5 + 1 / 3, 1e5 + 0.4, 0.01 / 3, 7, PARTS_S, DECODE)
    log.add(1e5 + 0.4, 1e5 + 0.5, 0.25, 8, {"wait": 3e-4}, (2, 9, 1, 5, 11, 4, 12.5, 0.5, (2, 1), (1, 0)))
    assert not wire.lines, "nothing leaves before its time"
    log.flush()
    log.flush()
    first, second = unpack_rows(json.loads(wire.lines[0]))
    assert len(wire.lines) == 1
    assert first == {
        "start": 1e5 + 1 / 3, "end": 1e5 + 0.4, "cpu_s": 0.01 / 3, "round": 7, "decode_seqs": 3, "decode_context": 120,
        "prefill_seqs": 0, "prefill_tokens": 0, "tokens": 3, "made": 3, "prefill_context": 0.0, "kv": 0.25, "drafts": [[], []],
        "parts": {"schedule": 1.23e-5, "attention": 0.002, "experts": 0.3, "sample": 0.0}}
    assert second["drafts"] == [[2, 1], [1, 0]]
    assert second["parts"] == {"wait": 3e-4}, "a phase that the step did not have is not there"
    assert second["prefill_context"] == 12.5
    assert all(isinstance(second[name], int) for name in ("round", "tokens", "made", "decode_context"))


def test_a_step_in_words_of_the_cost_model() -> None:
    segments = [Segment([1, 2], 10, []), Segment([3], 20, []), Segment([1] * 6, 4, [], True)]
    plan = StepPlan(prefill=(PrefillChunk(9, 4, 6, False),), decode=(1, 2), decode_tokens=(2, 1))
    assert did(plan, segments, 2, 0.5, (1,), (0,)) == (2, 32, 1, 6, 9, 2, 6 * (4 + 3.0), 0.5, (1,), (0,))
    assert did(StepPlan(decode=(1, 2), decode_tokens=(2, 1)), segments[:2], 2, 0.5, (), ())[:6] == (2, 32, 0, 0, 3, 2)


@pytest.mark.parametrize("step_s", [0.0025, 0.016])
def test_many_steps_are_few_messages_of_few_bytes(step_s: float) -> None:
    """By the steps' own times, whatever the machine does: a batch each `BATCH_ROWS` steps or `BATCH_S`."""
    wire, steps = Wire(), 1000
    log = StepLog(wire.send)
    parts = dict.fromkeys([name for name in PARTS if name != "migrate"], step_s / 15)
    for n in range(steps):
        log.send_due()
        log.add(n * step_s, (n + 1) * step_s, step_s, n, parts, DECODE)
    log.flush()
    rows = [unpack_rows(json.loads(line)) for line in wire.lines]
    assert sum(map(len, rows)) == steps
    assert len(rows) <= steps / min(BATCH_ROWS, BATCH_S / step_s) + 1
    assert all(batch[-1]["end"] - batch[0]["start"] <= BATCH_S + 2 * step_s for batch in rows), "live to that much"
    assert sum(map(len, wire.lines)) / steps < 320, "the JSON of one such record has 500 bytes"


class Told:
    """Control that says what it is to say, one list a round, and at last to take part in another formation."""

    formation = 0

    def __init__(self, *rounds: list[dict[str, Any]]) -> None:
        self._rounds, self.sent = list(rounds), list[dict[str, Any]]()

    def drain(self, *, wait: bool) -> list[dict[str, Any]]:
        return self._rounds.pop(0) if self._rounds else [{"op": "reform", "rank": 0, "world": 1}]

    def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


@pytest.mark.parametrize(("tokens", "rounds"), [(4, 6), (40, 3)])
def test_a_formations_end_and_the_last_requests_leave_nothing_untold(tokens: int, rounds: int) -> None:
    """Without work left, records leave before the news that ends it; in the middle of work, as the rank leaves it."""
    model = model_from_hf_config(tiny_config("qwen3_moe", hidden=64, layers=2, experts=8, top_k=2), "tiny")
    plan, clock = Plan(pools=(PoolPlan(role="mixed", **POOL),)), Clock(None, 0)
    add = {"op": "add", "id": 0, "tokens": [1] * 5, "prompt_len": 5, "seed": 0, "wake": 1,
           "params": asdict(SamplingParams(max_tokens=tokens, ignore_eos=True))}
    control = Told([add], *[[] for _ in range(rounds - 1)])
    loop = StepLoop(build_rank(model, plan, EngineOptions(), 0, clock.mark), control, clock, record=True)  # type: ignore[arg-type]
    with pytest.raises(Reformed):
        loop.run()
    events = [message["ev"] for message in control.sent]
    rows = [row for message in control.sent if message["ev"] == "records" for row in unpack_rows(message)]
    assert len(rows) == events.count("step") == min(tokens, rounds)
    assert [row["round"] for row in rows] == list(range(1, len(rows) + 1))
    assert sum(row["made"] for row in rows) == len(rows)
    if tokens == 4:
        assert events.index("records") < len(events) - 1 - events[::-1].index("step")
    assert not any("record" in message for message in control.sent if message["ev"] == "step"), "news carry none"


def test_the_front_end_looks_into_batches_when_asked_and_knows_whose_they_are() -> None:
    model = model_from_hf_config(tiny_config("qwen3_moe", hidden=64, layers=2, experts=8, top_k=2), "tiny")
    plan = Plan(pools=(PoolPlan(role="mixed", dp=2, tp=2, ep=4, **POOL),))
    records = StepRecords()
    records.form(0, (0, 1, 2, 3), Targets(plan, layouts(plan, model), 0).targets)
    records.form(1, (4, 3, 0, 1), Targets(plan, layouts(plan, model), 0).targets)
    for formation, seat, what in ((1, 4, DECODE), (0, 0, DECODE), (0, 1, IDLE), (0, 2, IDLE), (2, 0, DECODE), (1, 2, DECODE)):
        wire = Wire()
        log = StepLog(wire.send)
        log.add(1.0, 2.0, 0.5, 3, PARTS_S, what)
        log.flush()
        records.hear({**json.loads(wire.lines[0]), "seat": seat, "formation": formation})
    assert [(r["formation"], r["rank"], r["dp_rank"]) for r in records.steps] == [(1, 0, 0), (0, 0, 0)], \
        "an earlier formation's may still come; who is nobody is not heard"
    assert [(r["dp_rank"], r["tp_rank"]) for r in records.others] == [(0, 1), (1, 0)]
    first, second = group_steps(records.steps, 0.0, records.others)
    assert sorted(len(step.others) for step in (first, second)) == [0, 2]
    assert all(len(step.ranks) == 1 for step in (first, second)), "means are over ranks with work"
    records.clear()
    assert not records.steps
    assert not records.others


def test_followers_and_idle_ranks_are_in_the_trace(checkpoints: Checkpoints) -> None:
    """Two DP ranks of two TP ranks each and requests one at a time: one DP rank has no work, and its steps are shown."""
    model = checkpoints["qwen3_moe"].model
    plan = Plan(pools=(PoolPlan(role="mixed", dp=2, tp=2, ep=4, comm="gloo", **POOL),))
    workload = WorkloadSpec(arrivals=Arrivals(kind="closed_loop", concurrency=1), isl=Lengths(mean=6.0), osl=Lengths(mean=6.0),
                            requests=4)
    run = run_workload(plan, model, workload)
    names = {e["tid"]: e["args"]["name"] for e in run.trace if e["ph"] == "M" and e["name"] == "thread_name"}
    assert names == {0: "DP rank 0", 1: "DP rank 1", 2: "DP rank 0, TP rank 1", 3: "DP rank 1, TP rank 1"}
    steps = [e for e in run.trace if e["ph"] == "X"]
    by_thread = {tid: [e for e in steps if e["tid"] == tid] for tid in names}
    assert len({len(events) for events in by_thread.values()}) == 1, "all ranks take every step"
    assert len(by_thread[0]) == len(run.steps) == run.result.pools[0].steps
    for leader, follower in ((0, 2), (1, 3)):
        assert [e["name"] for e in by_thread[leader]] == [e["name"] for e in by_thread[follower]], "what the leader did"
    worked = [sum(e["args"]["decode_seqs"] + e["args"]["prefill_tokens"] > 0 for e in by_thread[tid]) for tid in (0, 1)]
    assert sum(worked) == len(run.steps), "one of the two has work"
    assert all({"attention", "moe/experts", "moe/dispatch"} <= e["args"].keys() for e in steps)
    assert run.result.pools[0].batch_seqs_mean == pytest.approx(1.0)
