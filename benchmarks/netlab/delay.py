"""A delay line: packets of one tunnel device come out of its partner some time later, in order, in both directions.

    python -m benchmarks.netlab.delay NEAR_NS:NEAR_DEV:FAR_NS:FAR_DEV:SECONDS ...

Makes the devices in the named namespaces, says `ready`, and works until it is terminated; the devices go with it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass, field

from benchmarks.netlab.lab import go_first

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_MAX_PACKET = 65536
_BATCH = 32


@dataclass
class Direction:
    """Packets read from `source` leave through `target` after `delay_s`."""

    source: int
    target: int
    delay_s: float
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)

    def take(self, now: float) -> None:
        """Read what is there."""
        for _ in range(_BATCH):
            try:
                packet = os.read(self.source, _MAX_PACKET)
            except BlockingIOError:
                return
            self.waiting.append((now + self.delay_s, packet))

    def give(self, now: float) -> None:
        """Write what is due."""
        while self.waiting and self.waiting[0][0] <= now:
            os.write(self.target, self.waiting.popleft()[1])


def main(ends: list[str]) -> None:
    """Forward for ever."""
    go_first()
    directions: dict[int, Direction] = {}
    for end in ends:
        near_ns, near_dev, far_ns, far_dev, delay_s = end.split(":")
        near, far = _tunnel(near_ns, near_dev), _tunnel(far_ns, far_dev)
        directions[near] = Direction(near, far, float(delay_s))
        directions[far] = Direction(far, near, float(delay_s))
    print("ready", flush=True)
    while True:
        due = min((d.waiting[0][0] for d in directions.values() if d.waiting), default=None)
        patience = None if due is None else max(0.0, due - time.monotonic())
        readable, _, _ = select.select(list(directions), [], [], patience)
        for source in readable:
            directions[source].take(time.monotonic())
        for direction in directions.values():
            direction.give(time.monotonic())


def _tunnel(namespace: str, device: str) -> int:
    """A tunnel device in a namespace, which the file outlives; its file, which does not block."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        _enter(libc, there)
        file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
    finally:
        _enter(libc, home)
        os.close(home)
        os.close(there)
    return file


def _enter(libc: ctypes.CDLL, namespace: int) -> None:
    if libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns failed")


if __name__ == "__main__":
    main(sys.argv[1:])
