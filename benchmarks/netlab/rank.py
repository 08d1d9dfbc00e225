"""One rank of the lab: `python -m benchmarks.netlab.rank RANK WORLD STORE`, inside its namespace.

Reads one JSON command a line (see `Command`), does it with the runtime's own communication code at the moment it names,
and answers with one JSON line: seconds from that moment until each of its parts had ended here.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.netlab.lab import MARK, go_first
from runtime.comm.group import Group, make_group
from runtime.transfer import start_receive, start_send

ROW_BYTES = 1024
BLOCK_TOKENS = 16
Json = dict[str, Any]


class _Listener:
    """What `runtime.transfer` reports to: keeps when each transfer ended."""

    formation = 0

    def __init__(self, expected: int) -> None:
        self.ends: dict[int, float] = {}
        self.errors: list[str] = []
        self._expected, self._over = expected, threading.Event()
        if not expected:
            self._over.set()

    def send(self, message: Json) -> None:
        self.ends[message["id"]] = message["end"]
        if len(self.ends) == self._expected:
            self._over.set()

    def post(self, message: Json) -> None:
        self.errors.append(message["error"])
        self._over.set()

    def wait(self) -> None:
        if not self._over.wait(60) or self.errors:
            raise RuntimeError("; ".join(self.errors) or "a KV transfer did not end")


def main(rank: int, world: int, store: str) -> None:
    """Serve commands until stdin ends."""
    torch.set_num_threads(1)
    go_first()
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world,
                            timeout=timedelta(seconds=60))
    dist.monitored_barrier()
    _mark_connections()  # the world carries KV, as in the runtime; the group of an instance has connections of its own
    group = make_group(range(world), rank, 60.0)
    group.all_reduce(torch.zeros(world))
    print(json.dumps({"ready": rank}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_do(json.loads(line), rank, group)), flush=True)


def _mark_connections() -> None:
    """Mark all TCP connections that this process has, so that links tell them from later ones."""
    for entry in list(Path("/proc/self/fd").iterdir()):
        try:
            if not entry.readlink().name.startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as found:
                if found.family == socket.AF_INET and found.type == socket.SOCK_STREAM:
                    found.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, MARK)
        except OSError:  # a file that is gone, or no socket
            continue


def _do(command: Json, rank: int, group: Group) -> Json:
    """`command`: op ("all_to_all", "all_reduce", "all_gather" or "none"), `traffic_rows` [R, R] or `rows` (a rank), `kv`
    (a list of [source, target, layers, tokens, width]) which runs at the same time, and `start`, on the machine's clock."""
    moves = [(i, move) for i, move in enumerate(command.get("kv", ())) if rank in move[:2]]
    listener = _Listener(len(moves))
    jobs = [_transfer_job(number, move, rank, listener) for number, move in moves]
    call = _collective(command, rank, group)
    start = command["start"]
    _sleep_until(start)
    for job in jobs:
        job()
    if call is not None:
        call()
    collective_s = time.monotonic() - start if call is not None else None
    listener.wait()
    received = {i: end - start for i, end in listener.ends.items() if command["kv"][i][1] == rank}
    return {"collective_s": collective_s, "kv_s": received}


def _collective(command: Json, rank: int, group: Group) -> Any:
    op = command["op"]
    if op == "none":
        return None
    if op == "all_to_all":
        traffic = np.array(command["traffic_rows"])
        x = torch.zeros(int(traffic[rank].sum()), ROW_BYTES, dtype=torch.uint8)
        send, receive = traffic[rank].tolist(), traffic[:, rank].tolist()
        return lambda: group.all_to_all(x, send, receive)
    x = torch.zeros(command["rows"] * ROW_BYTES // 4)
    return (lambda: group.all_reduce(x)) if op == "all_reduce" else (lambda: group.all_gather(x))


def _transfer_job(number: int, move: list[int], rank: int, listener: _Listener) -> Any:
    """A transfer by the runtime's own code, of latents: `layers` caches of [blocks, block_tokens, width] bytes."""
    source, target, layers, tokens, width = move
    blocks = -(-tokens // BLOCK_TOKENS)
    caches = [torch.zeros(blocks, BLOCK_TOKENS, width, dtype=torch.uint8) for _ in range(layers)]
    peer = target if rank == source else source
    message = {"id": number, "tag": 100 + number, "blocks": list(range(blocks)), "tokens": tokens, "routes": [[peer, 0, 1]],
               "early": False}
    begin = start_send if rank == source else start_receive
    holder: Any = SimpleNamespace(kv=caches, progress=None)
    heard: Any = listener
    return lambda: begin(holder, message, heard)


def _sleep_until(moment: float) -> None:
    """Sleep, then spin for the last millisecond."""
    while (left := moment - time.monotonic()) > 0:
        if left > 1e-3:
            time.sleep(left - 1e-3)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
