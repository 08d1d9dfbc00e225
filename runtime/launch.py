"""Rank processes: started with everything on loopback, watched, and ended by their process ids.

Ranks may also be started by torchrun, once the front end has written its briefing into `options.external`:

    torchrun --nproc-per-node N --master-addr 127.0.0.1 -m runtime.worker FOLDER/briefing.json
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from torch.distributed import TCPStore

from runtime.board import Board
from runtime.formation import Formation
from runtime.nursery import Forked, nursery
from runtime.options import Briefing, EngineOptions
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan

_LOG_TAIL = 600


class RankProcesses:
    """The ranks of one engine, by seat: the rank that a process was in the first formation.

    The private folder holds the briefings, the control socket, the board and their logs.
    External ranks are not children: what is known of them is what they say, their heart beats, and their process ids.
    """

    def __init__(self, plan: Plan, model: ModelSpec, options: EngineOptions) -> None:
        self.world = plan.gpus
        self._external = options.external is not None
        self._folder = tempfile.TemporaryDirectory(prefix="eptwin-")
        self.folder = Path(options.external or self._folder.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.control_path = self.folder / "control"
        self.board = Board(self.folder / "board", self.world)
        self._briefing = Briefing(model, plan, options, self.control_path, self.folder / "board")
        self._children: dict[int, subprocess.Popen[bytes] | Forked] = {}
        threads = str(options.threads_for(self.world))
        self._env = {**os.environ, "PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": threads,
                     "GLOO_SOCKET_IFNAME": _loopback()}
        self._store: TCPStore | None = None

    def prepare(self) -> None:
        """Wait until ranks can be started fast."""
        with contextlib.suppress(OSError):
            if self._forks:
                nursery(self._env).wait()

    def start(self) -> None:
        """Start every rank; returns at once."""
        briefing = self.folder / "briefing.json"
        self._briefing.write(briefing)
        if self._external:
            return
        if self.world > 1:
            self._env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._open_store())}
        for rank in range(self.world):
            self._launch(briefing, rank, rank, self.world)

    def replace(self, formation: Formation, seats: set[int]) -> None:
        """Start new processes on seats whose old ones have ended; they are ranks of `formation` from the start."""
        briefing = self.folder / f"briefing{formation.number}.json"
        replace(self._briefing, plan=formation.plan, formation=formation.number).write(briefing)
        for rank, seat in enumerate(formation.seats):
            if seat in seats:
                self._launch(briefing, seat, rank, len(formation.seats))

    def kill(self, seats: set[int]) -> None:
        """End processes now, stopped ones too, and wait until they are gone. Also ends what they have open."""
        for seat in seats:
            self._children[seat].kill()
        for seat in seats:
            self._children[seat].wait()

    @property
    def _forks(self) -> bool:
        return not self._external and self._briefing.options.device == "cpu"

    def _launch(self, briefing: Path, seat: int, rank: int, world: int) -> None:
        env = self._env | {"RANK": str(rank), "WORLD_SIZE": str(world), "EPTWIN_SEAT": str(seat)}
        path = self.folder / f"rank{seat}.log"
        if self._forks:
            with contextlib.suppress(OSError):
                self._children[seat] = nursery(self._env).fork(str(briefing), env, str(path))
                return
        with path.open("ab") as log:
            self._children[seat] = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-m", "runtime.worker", str(briefing)], env=env, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log)

    def exited(self) -> dict[int, int]:
        """Exit codes of the ranks that ended; a negative one is the signal that killed it."""
        return {rank: code for rank, child in self._children.items() if (code := child.poll()) is not None}

    def pids(self) -> list[int]:
        return [child.pid for _, child in sorted(self._children.items())]

    def log_tail(self, rank: int) -> str:
        """The end of what a rank wrote."""
        path = self.folder / f"rank{rank}.log"
        return path.read_bytes()[-_LOG_TAIL:].decode(errors="replace").strip() if path.exists() else ""

    def end(self, grace_s: float) -> None:
        """Wait `grace_s` for the ranks to leave by themselves, then end those that have not, and tidy up."""
        self._wait(grace_s)
        for how in (signal.SIGTERM, signal.SIGKILL):
            for child in self._children.values():
                if child.poll() is None:
                    child.send_signal(signal.SIGCONT)  # a stopped process would not even die of SIGTERM
                    child.send_signal(how)
            self._wait(1.0)
        self.board.close()
        if self._external:
            for name in ("briefing.json", "control", "board"):
                (self.folder / name).unlink(missing_ok=True)
        self._store = None
        self._folder.cleanup()

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(child.poll() is None for child in self._children.values()):
            time.sleep(0.01)

    def _open_store(self) -> int:
        """The rendezvous store, in this process, on a socket bound to loopback: given an address alone, a TCPStore would
        listen on every interface."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(self.world + 8)
            port = int(listener.getsockname()[1])
            self._store = TCPStore("127.0.0.1", port, self.world, is_master=True, wait_for_workers=False,
                                   master_listen_fd=listener.detach())
        return port


def _python_path() -> str:
    """Where this process finds the packages, for children that start in another way."""
    here = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])


def _loopback() -> str:
    """Name of the loopback interface, for gloo."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name.startswith("lo")), names[0])
