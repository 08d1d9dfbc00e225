"""Faults on purpose: their notation, when they strike, and that they leave proof."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runtime.board import PHASES, Board
from runtime.faults import Fault, InjectedFault, Injector, parse
from runtime.options import EngineOptions
from twin.spec.errors import SpecError


def test_notation() -> None:
    assert parse("1:dispatch:kill:3, 0:idle:stop") == [Fault(1, "dispatch", "kill", 3), Fault(0, "idle", "stop", 1)]
    assert parse("") == []


@pytest.mark.parametrize("text", ["1:dispatch", "x:dispatch:kill", "1:nowhere:kill", "1:dispatch:maim", "1:dispatch:kill:-1",
                                  "1:dispatch:kill:2:3"])
def test_what_is_no_fault(text: str) -> None:
    with pytest.raises(SpecError, match="RANK:POINT:HOW"):
        EngineOptions(faults=text)


def test_it_strikes_once_at_its_time_and_is_counted(tmp_path: Path) -> None:
    board = Board(tmp_path / "board", 2)
    injector = Injector(parse("1:dispatch:raise:3,0:dispatch:raise,1:combine:raise"), 1, board)
    for point in ("dispatch", "combine", "dispatch"):
        injector.at(point)
    assert board.fired(1) == 0
    with pytest.raises(InjectedFault, match="dispatch"):
        injector.at("dispatch")
    assert (board.fired(0), board.fired(1)) == (0, 1)
    with pytest.raises(InjectedFault, match="combine"):  # the next one, whenever its point has been passed often enough
        injector.at("combine")
    injector.at("combine")
    assert Board(tmp_path / "board").fired(1) == 2, "the proof is in the file"
    Injector(parse("1:dispatch:raise:1,1:combine:raise"), 1, board).at("dispatch")  # a new process on the seat: both are spent


def test_every_phase_that_is_marked_has_its_place_on_the_board() -> None:
    """Also those that only a GPU's ranks come to."""
    room = Path(__file__).parents[2] / "runtime"
    call = re.compile(r"""(?:mark|within)\("([a-z_-]+)"\)""")
    marked = {name for path in room.rglob("*.py") for name in call.findall(path.read_text())}
    assert {"warm-up", "graph", "draft"} <= marked
    assert marked <= set(PHASES)
