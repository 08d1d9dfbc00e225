"""The benchmark of what recording costs on a GPU, on a CPU whose device events are made up."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import measuring, recording
from benchmarks.recording import KINDS, Script, Switched, apart, by_round, by_step
from runtime.board import Board
from runtime.options import EngineOptions
from runtime.rank import build_rank
from runtime.tiny import tiny_config
from twin.spec.hf import model_from_hf_config
from twin.spec.plan import Plan, PoolPlan


class Event:
    """Done at once; counts how many are recorded."""

    recorded = 0

    def record(self) -> None:
        Event.recorded += 1
        self.at = time.monotonic()

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: Event) -> float:
        return (later.at - self.at) * 1e3


def clock_of(board: Board | None, seat: int) -> Switched:
    return Switched(board, seat, make_event=Event)


MODEL = model_from_hf_config(tiny_config("deepseek_v3", hidden=32, layers=2, vocab=64, context=128), "tiny")


def test_every_kind_of_step_is_served_and_kept(tmp_path: Path) -> None:
    kept: list[Any] = []
    found = measuring.on_gpu(MODEL, EngineOptions(max_context=64), (1, 3), 12, 3,
                             lambda record: kept.append(json.loads(json.dumps(record))), clock_of)
    assert [len(record["rows"]) for record in kept] == [1, 1, 2, 2], "kept after each part"
    assert not found["graphs"] and [row["requests"] for row in found["rows"]] == [1, 3]
    for row in found["rows"]:
        steps, rounds = row["by_step"], row["by_round"]
        assert sum(steps[kind]["steps"] for kind in KINDS) == 3 * 11, "all steps but those of prompts"
        assert [rounds[kind]["steps"] for kind in KINDS] == 3 * [3 * 11]
        for told in (steps, rounds):
            for kind in KINDS[1:]:
                gap = told["over_plain"][kind]["median"]
                assert gap["low_s"] <= gap["high_s"] and gap["share"] * gap["more_s"] >= 0
        assert set(steps["own_s"]) == {"timed", "recorded"} and min(row["mark_s"].values()) > 0
        assert recording.lines(row["requests"], row)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_what_it_says(kind: str) -> None:
    """Plain steps touch no device, those timed write nothing down, and those recorded do both."""
    clock = clock_of(None, 0)
    pool = PoolPlan(role="mixed", max_num_seqs=2, chunk_tokens=None, kv_blocks=8)
    rank = build_rank(MODEL, Plan(pools=(pool,)), EngineOptions(max_context=64), 0, clock.mark)
    script, Event.recorded = Script(clock), 0
    script.choose = lambda: kind
    recording.serve(rank, script, 2, 8)
    assert (Event.recorded > 0) == (kind != "plain")
    assert (script.records > 0) == (kind == "recorded")
    assert list(script.took) == [kind] and len(script.took[kind]) == 7
    assert len(script.own.get(kind, ())) == (0 if kind == "plain" else 7)


def test_gaps_are_found_with_their_interval() -> None:
    stream = np.random.default_rng(0)
    plain, slow = (base + stream.exponential(1e-5, 400) for base in (1e-3, 1.02e-3))
    found = apart(slow.tolist(), plain.tolist(), stream)
    assert all(gap["low"] < gap["share"] < gap["high"] for gap in found.values())
    assert all(gap["share"] == pytest.approx(0.02, abs=0.004) for gap in found.values())
    assert abs(apart(plain.tolist(), plain.tolist(), stream)["median"]["share"]) < 1e-9


def test_parts_are_named_as_they_are_kept() -> None:
    assert [way.__name__ for way in (by_step, by_round)] == ["by_step", "by_round"]
    several = CliRunner().invoke(measuring.main, ["--requests", "1", "--requests", "2"])
    assert several.exit_code == 2 and "one number of --requests" in several.output
