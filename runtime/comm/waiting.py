"""What waits on a device for other ranks: how long, who did not come, and how a host ends it.

`Waiting` is one end of something over symmetric memory; the functions act on every such end among what they are given (other
backends wait on the host and raise what goes wrong themselves), so that callers need not know which backend they have.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from runtime.comm.group import PeerLost

if TYPE_CHECKING:
    from runtime.kernels.symm import Patience


class Waiting:
    """Barriers of one rank among `ranks` (global numbers). A rank that does not come within `timeout_s` is lost: nobody waits
    any more, results are void, and `check` says who it was. `call_off` ends all waiting at once."""

    def __init__(self, ranks: Sequence[int], timeout_s: float, *, timed: bool = True) -> None:
        """Without `timed` patience is counted in polls, a billion a second, for kernels that run where there is no clock."""
        self.ranks, self.timeout_s, self._timed = tuple(ranks), timeout_s, timed
        self.patience: Patience | None = None
        self.memory: list[Any] = []
        self._called_off = False
        _live.add(self)

    def ready(self, device: torch.device) -> Patience:
        """What kernels obey, made at the first call."""
        if self.patience is None:
            from runtime.kernels.symm import Patience  # needs triton

            world = len(self.ranks)
            with torch.inference_mode(False):  # made in a step, changed outside
                alarm, off = (torch.zeros(n, dtype=torch.int32, pin_memory=device.type == "cuda") for n in (world, 1))
                off.fill_(int(self._called_off))
                limit = torch.tensor([int(self.timeout_s * 1e9)], device=device)
                lost = torch.zeros(world + 1, dtype=torch.int32, device=device)
            self.patience = Patience(limit, lost, alarm, off, self._timed)
        return self.patience

    def be_patient(self, timeout_s: float) -> None:
        """Wait so long for a rank from now on, in graphs captured before too."""
        self.timeout_s = timeout_s
        if self.patience is not None:
            self.patience.limit.fill_(int(timeout_s * 1e9))

    def call_off(self) -> None:
        """End all waiting, now and for good, and void what was waited for. From any thread, while the device runs."""
        self._called_off = True
        if self.patience is not None:
            self.patience.off.fill_(1)

    def check(self) -> None:
        """Raises PeerLost naming the ranks that a barrier waited for in vain, of what the device has done; or where waiting was
        called off."""
        if self._called_off:
            raise PeerLost("the exchange was called off")
        lost = [] if self.patience is None else [self.ranks[i] for i in self.patience.alarm_W.nonzero().flatten().tolist()]
        if lost:
            raise PeerLost(f"rank {', '.join(map(str, lost))} did not come to the exchange "
                           f"within {self.timeout_s:g} s", missing=tuple(lost))


_live: weakref.WeakSet[Waiting] = weakref.WeakSet()


def waiting_of(parts: Sequence[object]) -> list[Waiting]:
    """The ends over symmetric memory among expert backends and groups."""
    found = (getattr(part, "waiting", None) for part in parts)
    return [waiting for waiting in found if isinstance(waiting, Waiting)]


def check_peers(*parts: object) -> None:
    """Raise PeerLost, with who is missing by global rank, when a rank kept the others waiting in what the device has done so
    far."""
    for waiting in waiting_of(parts):
        waiting.check()


def be_patient(timeout_s: float, *parts: object) -> None:
    """How long the device waits for a rank from now on. While ranks set themselves up, some compile what others have."""
    for waiting in waiting_of(parts):
        waiting.be_patient(timeout_s)


def shared_memory(*parts: object) -> object:
    """What must not be given up while other ranks may address it; no group is kept alive with it."""
    return [memory for waiting in waiting_of(parts) for memory in waiting.memory]


def call_off() -> None:
    """End what devices of this process wait for, for good: a peer will not come. From any thread; groups of the hosts need no
    such call, since connections of a lost process close."""
    for waiting in list(_live):
        waiting.call_off()
