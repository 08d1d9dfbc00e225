"""The rank processes of a standing lab: one a namespace, told what to do over pipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.netlab.lab import Lab, LabError, in_namespace, rank_namespace

_ROOT = Path(__file__).resolve().parents[2]
_HEAD_START_S = 0.02
Json = dict[str, Any]


class Crew:
    """Ranks that wait for commands."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "nic0", "PYTHONPATH": str(_ROOT)}
        self._log = (folder / "log").open("w+b")
        self._ranks = [subprocess.Popen(
            in_namespace(rank_namespace(rank), [sys.executable, "-m", "benchmarks.netlab.rank", str(rank),
                                                str(lab.spec.ranks), str(folder / "store")]),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=env, cwd=_ROOT)
            for rank in range(lab.spec.ranks)]

    def meet(self) -> None:
        """Wait until all ranks have met."""
        for rank in range(len(self._ranks)):
            self._hear(rank)

    def do(self, command: Json) -> list[Json]:
        """Every rank's answer to a command, which all begin at the same moment."""
        told = json.dumps({**command, "start": time.monotonic() + _HEAD_START_S + 2 * self.lab.spec.nic_delay_s})
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(told.encode() + b"\n")
            rank.stdin.flush()
        return [self._hear(rank) for rank in range(len(self._ranks))]

    def end(self) -> None:
        """Let the ranks go, and make sure."""
        for rank in self._ranks:
            rank.kill()
        for rank in self._ranks:
            with suppress(BrokenPipeError):  # closes both pipes
                rank.communicate(timeout=10)
        self._log.close()

    def _hear(self, rank: int) -> Json:
        out = self._ranks[rank].stdout
        assert out is not None
        while line := out.readline():
            if line.startswith(b"{"):  # libraries may write to stdout as well
                answer: Json = json.loads(line)
                return answer
        self._log.seek(0)
        raise LabError(f"rank {rank} ended: {self._log.read()[-800:].decode(errors='replace')}")


@contextmanager
def crew(lab: Lab) -> Iterator[Crew]:
    """The lab's ranks, met and waiting; they are ended whatever happens."""
    with tempfile.TemporaryDirectory(prefix="eptwin-netlab-") as folder:
        hands = Crew(lab, Path(folder))
        try:
            hands.meet()
            yield hands
        finally:
            hands.end()
