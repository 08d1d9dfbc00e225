"""The list of shapes: every line is a step that the benchmark takes, shares part it, and what was measured is not run again."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

pytest.importorskip("triton")

from benchmarks import step
from benchmarks.shapes import LIST, done, lines_of, name_of


def test_every_line_is_understood() -> None:
    lines = lines_of(LIST, "1/1")
    assert len({name_of(line) for line in lines}) == len(lines) > 15, "a file each"
    for line in lines:
        asked = step.main.make_context("step", list(line))  # raises for an option that there is not
        assert asked.params["sliced"] == (asked.params["ep"] > 1)


def test_shares_part_the_list(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("# a comment\n--model a --batch 1\n\n--model b\n--model c --ep 2 --rank-slice\n")
    both = [name_of(line) for share in ("1/2", "2/2") for line in lines_of(path, share)]
    assert both == ["a_batch1", "c_ep2_rank-slice", "b"]
    for share in ("0/2", "3/2", "half"):
        with pytest.raises(click.BadParameter):
            lines_of(path, share)


def test_a_line_is_done_with_all_its_points(tmp_path: Path) -> None:
    options, path = ["--batch", "1", "--batch", "2", "--context", "9", "--context", "8"], tmp_path / "a.json"
    assert not done(path, options)
    for rows, whole in ((3, False), (4, True)):
        path.write_text(json.dumps({"rows": [{}] * rows}))
        assert done(path, options) == whole
