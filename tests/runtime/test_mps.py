"""The sharing service is started on a directory of its own and always ended; a stand-in records what it was told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import mps

STAND_IN = """#!/bin/sh
read -r word
echo "$1|$word|$CUDA_MPS_PIPE_DIRECTORY|$([ -d "$CUDA_MPS_LOG_DIRECTORY" ] && echo logs)" >> {log}
exit {code}
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return stand_in(tmp_path, monkeypatch)


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int = 0) -> Path:
    log, control = folder / "told", folder / "nvidia-cuda-mps-control"
    control.write_text(STAND_IN.format(log=log, code=code))
    control.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return log


def lines(told: Path) -> list[list[str]]:
    return [line.split("|") for line in told.read_text().splitlines()]


def test_the_service_lives_as_long_as_the_run(told: Path) -> None:
    with mps.share_gpu() as env:
        assert lines(told) == [["-d", "", env["CUDA_MPS_PIPE_DIRECTORY"], "logs"]]
        assert Path(env["CUDA_MPS_PIPE_DIRECTORY"]).is_dir()
        assert env["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] == "1"
    assert lines(told)[1:] == [["", "quit", env["CUDA_MPS_PIPE_DIRECTORY"], "logs"]]
    assert not Path(env["CUDA_MPS_PIPE_DIRECTORY"]).exists()


def test_the_service_ends_when_the_run_fails(told: Path) -> None:
    with pytest.raises(ZeroDivisionError), mps.share_gpu():
        raise ZeroDivisionError
    assert [line[1] for line in lines(told)] == ["", "quit"]


def test_a_service_that_does_not_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = stand_in(tmp_path, monkeypatch, code=3)
    with pytest.raises(mps.MpsUnavailable, match="ended with 3"), mps.share_gpu():
        raise AssertionError("ran all the same")
    assert len(lines(told)) == 1


def test_no_driver_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mps, "find_control", lambda: None)
    with pytest.raises(mps.MpsUnavailable, match="not found"), mps.share_gpu():
        raise AssertionError("ran all the same")


def test_as_a_command_it_hands_on_environment_and_exit_code(told: Path) -> None:
    inside = "import os, sys; sys.exit(7 if os.path.isdir(os.environ['CUDA_MPS_PIPE_DIRECTORY']) else 1)"
    done = subprocess.run([sys.executable, "-m", "runtime.mps", sys.executable, "-c", inside],
                          cwd=Path(__file__).parents[2], timeout=60)
    assert done.returncode == 7
    assert [line[1] for line in lines(told)] == ["", "quit"]


@pytest.mark.parametrize(("shown", "numbered"), [(None, None), ("3", "0"), ("GPU-aa,GPU-bb", "0,1")])
def test_clients_name_gpus_as_the_service_does(told: Path, monkeypatch: pytest.MonkeyPatch, shown: str | None,
                                               numbered: str | None) -> None:
    """The service counts the GPUs that it was shown from zero."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    with mps.share_gpu() as env:
        assert env.get("CUDA_VISIBLE_DEVICES") == numbered
    assert lines(told)[-1][1] == "quit"
