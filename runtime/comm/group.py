"""A process group that knows its members; a group of one needs no network and no torch.distributed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the name since torch 2.13
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class PeerLost(RuntimeError):
    """A collective failed because another rank died, hung or left. `missing`: who did not come, where that is known."""

    def __init__(self, message: str, missing: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing


class TensorGroup(Protocol):
    """What makes the parts of tensor-parallel ranks whole."""

    @property
    def size(self) -> int: ...

    @property
    def index(self) -> int: ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor: ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Group:
    """Ranks that talk among themselves. `index` is this rank's place in `ranks`; `pg` None is a group of one."""

    pg: Any
    ranks: tuple[int, ...]
    index: int

    @property
    def size(self) -> int:
        return len(self.ranks)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the group, in place; returns x."""
        if self.size > 1 and x.numel():
            guarded(lambda: dist.all_reduce(x, group=self.pg))
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[size, *x.shape]; all members give the same shape, of at least one dim."""
        out = x[None] if self.size == 1 else x.new_empty((self.size, *x.shape))
        if self.size == 1 or not x.numel():
            return out
        guarded(lambda: _all_gather(out.flatten(0, 1), x.contiguous(), group=self.pg))
        return out

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of x [size * n, ...] over the group; this member's [n, ...]."""
        if self.size == 1:
            return x
        out = x.new_empty((x.shape[0] // self.size, *x.shape[1:]))
        guarded(lambda: _reduce_scatter(out, x.contiguous(), group=self.pg))
        return out

    def all_to_all(self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        """Rows of x, `send[i]` of them to member i in order; the rows received, `receive[i]` from member i."""
        if self.size == 1:
            return x
        out = x.new_empty((sum(receive), *x.shape[1:]))
        guarded(lambda: dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=self.pg))
        return out

    def begin_all_to_all(self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> Callable[[], torch.Tensor]:
        """`all_to_all` begun: the function returned waits for it. x may not change meanwhile."""
        out = x.new_empty((sum(receive), *x.shape[1:]))
        x = x.contiguous()
        work = guarded(lambda: dist.all_to_all_single(out, x, list(receive), list(send), group=self.pg, async_op=True))
        return self._waiter(work, out, x)

    def begin_all_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """`all_gather` begun."""
        out = x.new_empty((self.size, *x.shape))
        x = x.contiguous()
        work = guarded(lambda: _all_gather(out.flatten(0, 1), x, group=self.pg, async_op=True))
        return self._waiter(work, out, x)

    def begin_reduce_scatter(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """`reduce_scatter` begun."""
        out = x.new_empty((x.shape[0] // self.size, *x.shape[1:]))
        x = x.contiguous()
        work = guarded(lambda: _reduce_scatter(out, x, group=self.pg, async_op=True))
        return self._waiter(work, out, x)

    @staticmethod
    def _waiter(work: Any, out: torch.Tensor, source: torch.Tensor) -> Callable[[], torch.Tensor]:
        kept = [source]  # until it has been sent

        def wait() -> torch.Tensor:
            guarded(work.wait)
            kept.clear()
            return out

        return wait

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        """x of the member at index `source`, in place; returns x."""
        if self.size > 1:
            guarded(lambda: dist.broadcast(x, self.ranks[source], group=self.pg))
        return x

    def barrier(self, timeout_s: float) -> None:
        """Wait until all are here. Raises PeerLost naming who is not, after `timeout_s` (gloo groups)."""
        if self.size > 1:
            guarded(lambda: dist.monitored_barrier(self.pg, timeout=timedelta(seconds=timeout_s)))


def solo(rank: int = 0) -> Group:
    """The group of one rank."""
    return Group(None, (rank,), 0)


def make_group(ranks: Sequence[int], rank: int, timeout_s: float, backend: str = "gloo") -> Group:
    """Every rank of the world must call this for every group, in the same order; the group is for its members only."""
    pg = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s), backend=backend) if len(ranks) > 1 else None
    return Group(pg, tuple(ranks), ranks.index(rank) if rank in ranks else -1)


def leave_groups() -> None:
    """End every process group of this process. Peers that wait for it in a collective get an error at once: their
    connections close. NCCL's groups are aborted first, since they would wait for kernels that never end."""
    if not dist.is_initialized():
        return
    if torch.cuda.is_available() and dist.is_nccl_available():
        for pg in list(dist.distributed_c10d._world.pg_map):
            if dist.get_backend(pg) == "nccl":
                pg.abort()
    try:
        dist.destroy_process_group()
    except RuntimeError:  # a group that is broken already may say so once more
        dist.distributed_c10d._world.pg_map.clear()


def guarded(call: Callable[[], Any]) -> Any:
    """Run a collective; its failure is a lost peer, whatever words the backend finds for it."""
    main = threading.current_thread() is threading.main_thread()
    if main:
        _waiting.set()
    try:
        return call()
    except RuntimeError as err:
        raise PeerLost(str(err).strip().splitlines()[0][:300] if str(err) else "collective failed") from err
    finally:
        if main:
            _waiting.clear()


_waiting = threading.Event()


def waiting() -> bool:
    """Whether the main thread is in a collective: if nothing goes on, then it waits for another rank."""
    return _waiting.is_set()
