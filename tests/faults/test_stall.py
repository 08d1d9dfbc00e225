"""Ranks that live but get no further: who is to blame, and that the others go on without them."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from chaos_kit import plan_of, run_with_faults
from runtime_checkpoints import NEW_TOKENS, Checkpoints

from runtime.board import Board
from runtime.comm.group import guarded, waiting
from runtime.options import EngineOptions
from runtime.watch import Loss, Watch

STALL_S = 1.0


def test_the_others_go_on_without_a_rank_that_hangs(checkpoints: Checkpoints) -> None:
    """Its heart beats on; the ranks that wait for it in collectives are not taken for stuck."""
    made = checkpoints["qwen3_moe"]
    plan = plan_of({"role": "mixed", "dp": 3, "ep": 3, "redundant_experts": 2})
    story = run_with_faults(made, plan, "1:attention:hang:9", timeout_s=STALL_S, stall_timeout_s=STALL_S + 1.0)
    assert story.fired == [0, 1, 0]
    assert [r.lost for r in story.recoveries] == [(1,)]
    assert "is alive but got no further" in story.recoveries[0].cause and "attention" in story.recoveries[0].cause
    assert [t[:NEW_TOKENS] for t in story.tokens[:4]] == made.tokens


class Watched:
    """Three ranks that were never started, of which the board says what the test wants."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.board = Board(folder / "board", 3)
        processes = SimpleNamespace(world=3, board=self.board, exited=dict, log_tail=lambda seat: "")
        self.losses: list[Loss] = []
        settings = EngineOptions(timeout_s=STALL_S, stall_timeout_s=STALL_S, recover=True, **options)
        self.watch = Watch(processes, settings, self.losses.append)  # type: ignore[arg-type]
        for seat in range(3):
            self.watch.ready(seat)

    async def until_lost(self, working: dict[int, str], waits: tuple[int, ...] = ()) -> Loss:
        """All hearts beat; those in `working` are in one phase for ever, the others begin one after another."""
        running = asyncio.create_task(self.watch.run())
        until = time.monotonic() + 20
        for seat, phase in working.items():
            self.board.mark(seat, phase)
        while not self.losses:
            assert time.monotonic() < until, "nobody was found"
            for seat in range(3):
                self.board.beat(seat, waits=seat in waits)
                if seat not in working:
                    self.board.mark(seat, "attention")
            await asyncio.sleep(0.02)
        self.watch.stop()
        await running
        return self.losses[0]


def test_who_waits_or_rests_is_not_stuck(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    loss = asyncio.run(watched.until_lost({0: "dispatch", 1: "experts", 2: "idle"}, waits=(0,)))
    assert loss.lost == {1}
    assert "rank 1 is alive but got no further in phase experts" in str(loss.cause)


def test_beside_a_gpu_the_host_may_wait_for_the_device(tmp_path: Path) -> None:
    """Only what the host does alone counts against it there; of the rest, those speak whose devices waited in vain."""
    loss = asyncio.run(Watched(tmp_path, device="cuda").until_lost({0: "graph", 1: "book", 2: "sample"}))
    assert loss.lost == {1}


def test_ranks_that_devices_waited_for_in_vain_are_lost(tmp_path: Path) -> None:
    """Two ranks say that they were left waiting; one of them is named by the other, but has spoken."""
    watched = Watched(tmp_path, device="cuda")
    told = {"kind": "peer", "type": "PeerLost", "error": "did not come", "phase": "sample"}
    watched.watch.report(0, {**told, "missing": [1, 2]})
    watched.watch.report(2, {**told, "missing": [1]})
    loss = asyncio.run(watched.until_lost({}))
    assert loss.lost == {1}
    assert loss.suspects == ()


def test_a_rank_knows_that_it_waits() -> None:
    assert not waiting()
    assert guarded(waiting)
    assert not waiting()
    with pytest.raises(ValueError, match="no collective"):
        guarded(_raise)
    assert not waiting()


def _raise() -> None:
    raise ValueError("no collective")
