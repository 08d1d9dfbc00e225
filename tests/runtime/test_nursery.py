"""Where ranks are born: children whose ends are told truly, and that nothing outlives its process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runtime_checkpoints import NEW_TOKENS, Checkpoint, Checkpoints

from runtime import launch
from runtime.frontend import Frontend
from runtime.nursery import UNKNOWN, Nursery
from runtime.options import EngineOptions
from runtime.types import SamplingParams
from twin.spec.plan import Plan, PoolPlan

ROOT = Path(__file__).resolve().parents[2]
PLAN = Plan(pools=(PoolPlan(role="mixed", block_tokens=4, kv_blocks=16, max_num_seqs=4, max_batch_tokens=16),))


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def gone(pid: int) -> bool:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def born() -> Iterator[Nursery]:
    nursery = Nursery(dict(os.environ))
    yield nursery
    nursery.close()


def fifo(folder: Path) -> str:
    """A briefing that never comes: whoever reads it waits."""
    path = folder / "fifo"
    os.mkfifo(path)
    return str(path)


def test_ends_are_told_truly(born: Nursery, tmp_path: Path) -> None:
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "1"}
    failed = born.fork(str(tmp_path / "nothing.json"), env, str(tmp_path / "log"))
    assert failed.wait() == 1
    assert failed.poll() == 1
    assert "FileNotFoundError" in (tmp_path / "log").read_text(), "what it says goes to its log"
    stopped = born.fork(fifo(tmp_path), env, str(tmp_path / "log"))
    assert stopped.poll() is None
    stopped.send_signal(signal.SIGSTOP)
    stopped.kill()
    assert stopped.wait() == -signal.SIGKILL
    stopped.kill()  # its process id may be another's by now: nothing is sent


def test_children_live_on_when_their_nursery_ends(born: Nursery, tmp_path: Path) -> None:
    child = born.fork(fifo(tmp_path), {**os.environ, "RANK": "0", "WORLD_SIZE": "1"}, str(tmp_path / "log"))
    born.close()
    assert not born.lives
    assert child.poll() is None
    child.kill()
    assert child.wait() == UNKNOWN
    with pytest.raises(OSError, match="ended"):
        born.fork("nothing", {}, str(tmp_path / "log"))


def test_it_ends_with_its_process() -> None:
    code = ("import os; from runtime.nursery import nursery; one = nursery(dict(os.environ)); one.wait(); "
            "assert nursery(dict(os.environ, RANK='1')) is one and nursery(dict(os.environ, OMP_NUM_THREADS='3')) is not one; "
            "print(one._process.pid, flush=True); os._exit(0)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=60)
    assert gone(int(done.stdout))


async def _served(made: Checkpoint) -> int:
    """The parent of an engine's rank; it gave the right tokens."""
    frontend = Frontend(PLAN, made.model, EngineOptions(checkpoint=str(made.folder)))
    await frontend.start()
    try:
        (pid,) = frontend.rank_pids()
        born_of = parent(pid)
        stream = frontend.submit(made.prompts[0], SamplingParams(max_tokens=NEW_TOKENS))
        assert [event.token_id async for event in stream] == made.tokens[0]
    finally:
        await frontend.stop()
    return born_of


def test_engines_share_one_and_can_do_without(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was killed is followed by another; where none can be had, ranks start afresh."""
    made = checkpoints["qwen3_moe"]
    first = asyncio.run(_served(made))
    assert asyncio.run(_served(made)) == first != os.getpid()
    os.kill(first, signal.SIGKILL)
    assert gone(first)
    assert asyncio.run(_served(made)) not in (first, os.getpid())

    def none(env: dict[str, str]) -> Nursery:
        raise OSError("no nursery here")

    monkeypatch.setattr(launch, "nursery", none)
    assert asyncio.run(_served(made)) == os.getpid()
