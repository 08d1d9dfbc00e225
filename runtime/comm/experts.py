"""Dispatch and combine: tokens go to the ranks that hold their experts, weighted sums come back.

One interface; three backends need only torch.distributed, `symm` CUDA devices and triton. Every rank brings tokens that
no other rank brings. `dispatch` gives rows to compute with their local slots (-1: not here); `combine` takes one partial
sum a row and returns each token's total. Rows may be padding (all slots -1): a backend with fixed buffers fits as well.

Legend: T own tokens, N received rows, H hidden, K choices, R ranks of the instance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from runtime.comm.group import Group
from runtime.comm.waiting import Waiting
from runtime.layout import RankLayout
from twin.spec.errors import SpecError
from twin.spec.plan import CommBackend

if TYPE_CHECKING:
    from runtime.comm.symm import Allocate


@dataclass(frozen=True)
class Dispatched:
    """Rows that arrived, and what the backend needs to send their results back."""

    x_NH: torch.Tensor
    slots_NK: torch.Tensor
    weights_NK: torch.Tensor
    handle: Any = None
    out_NH: torch.Tensor | None = None
    """Where results [N, H] may be written so that `combine` need not move them."""
    scale_N: torch.Tensor | None = None
    """Of rows that came in fp8, the scale of each: they are widened by who multiplies them."""


class ExpertComm(Protocol):
    """`sent_bytes` counts payload that left this rank for others, in both directions of its life."""

    sent_bytes: int

    def dispatch(self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor, capacity: int) -> Dispatched:
        """Send tokens to the ranks of their slots (numbered over the instance). `capacity` is the most tokens that any
        rank brings to this step, the same number on every rank."""
        ...

    def combine(self, y_NH: torch.Tensor, arrived: Dispatched) -> torch.Tensor:
        """Sum the partial results of every token, [T, H]."""
        ...


class Local:
    """All experts are here: nothing moves."""

    sent_bytes = 0
    moves = False

    def dispatch(self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor, capacity: int) -> Dispatched:
        return Dispatched(x_TH, slots_TK, weights_TK)

    def combine(self, y_NH: torch.Tensor, arrived: Dispatched) -> torch.Tensor:
        return y_NH


class AllToAll:
    """Uneven all_to_all_single. A token travels once to each rank that holds any of its experts (with expert TP: to each
    rank that holds a cut of one), with its slots and weights in the same message, and is fanned out there."""

    def __init__(self, group: Group, at: RankLayout) -> None:
        self.group, self.at = group, at
        self.sent_bytes = 0

    def dispatch(self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor, capacity: int) -> Dispatched:
        return self.begin_dispatch(x_TH, slots_TK, weights_TK, capacity)()

    def begin_dispatch(self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor,
                       capacity: int) -> Callable[[], Dispatched]:
        """`dispatch`, begun (counts are exchanged at once): the function returned waits for the rows."""
        at = self.at
        owner_TK = slots_TK // at.slots_per_rank
        wanted_TE = torch.zeros(len(x_TH), at.ep, dtype=torch.bool, device=x_TH.device).scatter_(1, owner_TK, True)
        wanted_RT = wanted_TE.repeat_interleave(at.expert_tp, 1).T
        send = wanted_RT.sum(1)
        receive = self.group.all_to_all(send, [1] * at.world, [1] * at.world).tolist()
        rows = wanted_RT.nonzero()[:, 1]
        packed = _pack(x_TH[rows], slots_TK[rows], weights_TK[rows])
        counts = send.tolist()
        self._count(counts, packed)
        coming = self.group.begin_all_to_all(packed, counts, receive)

        def wait() -> Dispatched:
            x, slots, weights = _unpack(coming(), x_TH, slots_TK.shape[1])
            return Dispatched(x, _localise(slots, at), weights, (rows, counts, receive, x_TH))

        return wait

    def combine(self, y_NH: torch.Tensor, arrived: Dispatched) -> torch.Tensor:
        return self.begin_combine(y_NH, arrived)()

    def begin_combine(self, y_NH: torch.Tensor, arrived: Dispatched) -> Callable[[], torch.Tensor]:
        """`combine`, begun."""
        rows, counts, receive, x_TH = arrived.handle
        self._count(receive, y_NH)
        coming = self.group.begin_all_to_all(y_NH, receive, counts)

        def wait() -> torch.Tensor:
            total = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
            return total.index_add_(0, rows, coming().float()).to(x_TH.dtype)

        return wait

    def _count(self, rows_to: list[int], payload: torch.Tensor) -> None:
        away = sum(rows_to) - rows_to[self.group.index]
        self.sent_bytes += away * payload.shape[1] * payload.element_size()


class AllGather:
    """Every token goes everywhere and partial sums are reduce-scattered: no counts, no uneven splits."""

    def __init__(self, group: Group, at: RankLayout) -> None:
        self.group, self.at = group, at
        self.sent_bytes = 0

    def dispatch(self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor, capacity: int) -> Dispatched:
        return self.begin_dispatch(x_TH, slots_TK, weights_TK, capacity)()

    def begin_dispatch(self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor,
                       capacity: int) -> Callable[[], Dispatched]:
        """`dispatch`, begun."""
        def padded(t: torch.Tensor, value: float) -> torch.Tensor:
            return torch.cat([t, t.new_full((capacity - len(t), t.shape[1]), value)])

        packed = _pack(padded(x_TH, 0), padded(slots_TK, -1), padded(weights_TK, 0))
        self.sent_bytes += packed.numel() * (self.group.size - 1)
        coming = self.group.begin_all_gather(packed)

        def wait() -> Dispatched:
            x, slots, weights = _unpack(coming().flatten(0, 1), x_TH, slots_TK.shape[1])
            return Dispatched(x, _localise(slots, self.at), weights, (len(x_TH), capacity))

        return wait

    def combine(self, y_NH: torch.Tensor, arrived: Dispatched) -> torch.Tensor:
        return self.begin_combine(y_NH, arrived)()

    def begin_combine(self, y_NH: torch.Tensor, arrived: Dispatched) -> Callable[[], torch.Tensor]:
        """`combine`, begun."""
        n, capacity = arrived.handle
        self.sent_bytes += capacity * (self.group.size - 1) * y_NH.shape[1] * y_NH.element_size()
        coming = self.group.begin_reduce_scatter(y_NH)
        return lambda: coming()[:n]


class Symmetric:
    """Through symmetric memory (`runtime.comm.symm`), which a CUDA graph can hold. Steps in which a rank may bring more
    than `most` tokens go by `AllToAll`: buffers of fixed size would be large and mostly padding."""

    def __init__(self, group: Group, at: RankLayout, waiting: Waiting, *, fp8: bool, most: int = 512,
                 allocate: Allocate | None = None) -> None:
        """`allocate` shares memory (None: symmetric memory of CUDA devices over the group)."""
        from runtime.comm.symm import SymmExchange, over  # needs triton

        self.waiting = waiting
        self.exchange = SymmExchange(allocate or over(group.pg), group.index, waiting, slots_per_rank=at.slots_per_rank,
                                     expert_tp=at.expert_tp, fp8=fp8)
        self._large, self.most = AllToAll(group, at), most

    @property
    def sent_bytes(self) -> int:
        return self.exchange.sent_bytes + self._large.sent_bytes

    def dispatch(self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor, capacity: int) -> Dispatched:
        if capacity > self.most:
            return self._large.dispatch(x_TH, slots_TK, weights_TK, capacity)
        came = self.exchange.dispatch(x_TH, slots_TK, weights_TK, capacity)
        return Dispatched(came.x_NH, came.slots_NK, came.weights_NK, came, came.out_NH, came.scale_N)

    def combine(self, y_NH: torch.Tensor, arrived: Dispatched) -> torch.Tensor:
        if isinstance(arrived.handle, tuple):
            return self._large.combine(y_NH, arrived)
        return self.exchange.combine(y_NH, arrived.handle)


def make_expert_comm(backend: CommBackend, group: Group, at: RankLayout, *, device: str = "cpu",
                     fp8: bool = False, timeout_s: float = 60.0) -> ExpertComm:
    """The backend a plan names. `auto` moves tokens only where experts are spread, else gathers; between CUDA devices it
    moves them through symmetric memory. With `fp8` rows travel to experts in fp8 where the backend can do so (symm), where
    a rank that keeps the others waiting for `timeout_s` is lost.

    Raises SpecError for a backend that this build does not have.
    """
    if group.size == 1:
        return Local()
    if backend == "auto":
        backend = ("symm" if device == "cuda" else "gloo") if at.ep > 1 else "ag_rs"
    if backend == "symm" and device != "cuda":
        raise SpecError("symmetric memory needs CUDA devices", field="comm", expected="auto, gloo or ag_rs on CPUs")
    if backend == "symm":
        return Symmetric(group, at, Waiting(group.ranks, timeout_s), fp8=fp8)
    if backend in ("gloo", "nccl"):
        return AllToAll(group, at)
    if backend == "ag_rs":
        return AllGather(group, at)
    raise SpecError(f"comm backend {backend} is not in this build", field="comm", expected="auto, symm, gloo, nccl or ag_rs")


def graph_rows(comm: ExpertComm, most: int) -> int:
    """Of steps of up to `most` tokens a rank, how many tokens one may have that a CUDA graph holds; 0 where the backend asks
    the host."""
    if isinstance(comm, Symmetric):
        return min(most, comm.most)
    return most if isinstance(comm, Local) else 0


def _pack(x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """One message a token: hidden row, int32 slots, fp32 weights, as bytes [N, row]."""
    parts = (x_NH.contiguous(), slots_NK.int().contiguous(), weights_NK.float().contiguous())
    return torch.cat([part.view(torch.uint8) for part in parts], 1)


def _unpack(packed: torch.Tensor, like_TH: torch.Tensor, choices: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = like_TH.shape[1] * like_TH.element_size()
    x, slots, weights = packed.split([width, 4 * choices, 4 * choices], 1)
    return (x.contiguous().view(like_TH.dtype), slots.contiguous().view(torch.int32).long(),
            weights.contiguous().view(torch.float32))


def _localise(slots_NK: torch.Tensor, at: RankLayout) -> torch.Tensor:
    """Slots numbered from this rank's first; -1 for those of other ranks."""
    local = slots_NK - at.ep_rank * at.slots_per_rank
    return local.masked_fill((local < 0) | (local >= at.slots_per_rank), -1)
