"""Sums and gathers of TP ranks through peers' memory: forked ranks that map the same memory at the same addresses, so that the
kernels' barriers are the real ones, in Triton's interpreter."""

from __future__ import annotations

import mmap
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_worlds import fork_world
from triton.runtime.interpreter import InterpreterBuilder

from runtime.comm.group import Group, PeerLost, make_group
from runtime.comm.reduce import Room, SymmetricGroup
from runtime.comm.waiting import Waiting, check_peers
from runtime.kernels import reduce as kernels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forked ranks cannot share a CUDA context")
WIDTH = 24
_FOREVER_S = 1e9


def shared_bytes(ranks: int, size: int = 1 << 16) -> list[mmap.mmap]:
    """Memory of every rank that all processes forked from here have at the same addresses."""
    return [mmap.mmap(-1, size) for _ in range(ranks)]


def allocator(maps: list[mmap.mmap], index: int) -> Callable[[int], tuple[torch.Tensor, torch.Tensor, Any]]:
    memories = [torch.frombuffer(one, dtype=torch.uint8) for one in maps]

    def allocate(size: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
        assert size <= len(memories[index])
        return memories[index], torch.tensor([m.data_ptr() for m in memories]), maps

    return allocate


def poll_gently() -> None:
    """Ranks that poll in the interpreter leave the cores to those that compute."""
    load = InterpreterBuilder.create_masked_load

    def gentle(self: Any, ptrs: Any, mask: Any, other: Any, cache: Any, eviction: Any, is_volatile: bool) -> Any:
        if is_volatile:
            time.sleep(2e-4)
        return load(self, ptrs, mask, other, cache, eviction, is_volatile)

    InterpreterBuilder.create_masked_load = gentle


def end(group: Group, maps: list[mmap.mmap], rows: int, timeout_s: float = _FOREVER_S, sharers: int = 1) -> SymmetricGroup:
    """A rank's end with room for `rows` rows of WIDTH fp32 numbers; patience is counted in polls."""
    return SymmetricGroup(group, allocator(maps, group.index), Room(rows, WIDTH * 4), torch.device("cpu"),
                          Waiting(group.ranks, timeout_s, timed=False), sharers)


def tensor(rank: int, call: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    stream = torch.Generator().manual_seed(1000 * call + rank)
    return torch.randn(rows, WIDTH, generator=stream).to(dtype)


def sums(rank: int, world: int, maps: list[mmap.mmap], half: torch.dtype) -> list[str]:
    """Calls of all sizes and both kinds one after another, ranks at paces of their own; what differs from a sum in the order of
    ranks, to the last bit."""
    poll_gently()
    group = end(make_group(range(world), rank, 20), maps, rows=100, sharers=32)  # two programs, which have several parts each
    pace, wrong = torch.Generator().manual_seed(rank), []
    # programs pause before they wait and before they read: a peer that is ahead must not have overwritten what they read
    InterpreterBuilder.create_barrier = lambda self: time.sleep(float(torch.rand(1, generator=pace)) * 0.02)
    for call, rows in enumerate([1, 90, 3, 3, 100, 2, 64, 1, 7, 100, 100, 5]):
        dtype = half if call % 3 == 1 else torch.float32
        parts = [tensor(r, call, rows, dtype) for r in range(world)]
        x = parts[rank].clone()
        if call % 4 == 3:
            good = torch.equal(group.all_gather(x), torch.stack(parts))
        else:
            total = torch.zeros(rows, WIDTH)
            for part in parts:
                total += part.float()
            good = group.all_reduce(x) is x and torch.equal(x, total.to(dtype))
        wrong += [] if good else [f"call {call}, {rows} rows of {dtype}"]
    check_peers(group)
    return wrong


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_get_the_sum_in_the_order_of_ranks(tmp_path: Path, world: int) -> None:
    for rank, wrong in enumerate(fork_world(world, tmp_path, sums, world, shared_bytes(world), torch.float16)):
        assert not wrong, f"rank {rank}: {wrong}"


def too_large(rank: int, maps: list[mmap.mmap]) -> list[bool]:
    group = end(make_group((0, 1), rank, 20), maps, rows=2)
    calls = int(group._counters[0])
    x = torch.full((3, WIDTH), rank + 1.0)
    gathered = group.all_gather(x)
    fell_back = torch.equal(gathered[1], torch.full((3, WIDTH), 2.0)) and bool((group.all_reduce(x) == 3).all())
    empty = group.all_reduce(torch.empty(0, WIDTH)).shape == (0, WIDTH)
    scattered = bool((group.all_reduce(torch.ones(WIDTH, 2).T) == 2).all())  # rows that do not lie one behind another
    return [fell_back, empty, scattered, int(group._counters[0]) == calls, group.room.held_rows == 2]


def test_what_does_not_fit_goes_by_the_group(tmp_path: Path) -> None:
    for right in fork_world(2, tmp_path, too_large, shared_bytes(2)):
        assert all(right), right


def test_a_rank_that_stays_away_is_named_by_its_global_number() -> None:
    maps = shared_bytes(3)
    first = end(Group(None, (4, 5, 6), 0), maps, rows=4, timeout_s=5e-9)
    x = tensor(0, 0, 4, torch.float32)
    first.all_reduce(x)
    with pytest.raises(PeerLost, match="rank 5, 6 did") as lost:
        check_peers(first)
    assert lost.value.missing == (5, 6)
    first.waiting.be_patient(_FOREVER_S)
    first.all_reduce(x)  # once somebody is lost nobody is waited for
    assert first.waiting.patience is not None and first.waiting.patience.alarm_W.tolist() == [0, 1, 1]


def test_waiting_is_called_off() -> None:
    first = end(Group(None, (0, 1), 0), shared_bytes(2), rows=4)
    first.waiting.call_off()
    first.all_reduce(tensor(0, 0, 4, torch.float32))
    with pytest.raises(PeerLost, match="called off"):
        check_peers(first)


def test_room_is_bounded() -> None:
    assert Room(512, 129280).held_rows == 512
    assert Room(4096, 129280).held_rows == 519


def test_ranks_that_share_a_gpu_leave_room_on_it() -> None:
    """What waits there must not be everywhere: kernels that want multiprocessors set up otherwise come between."""
    assert kernels.programs_for(1) == kernels.MOST_PROGRAMS
    assert all(1 <= sharers * kernels.programs_for(sharers) <= 64 for sharers in range(2, 65))
    group = end(Group(None, (0, 1), 0), shared_bytes(2), rows=4, sharers=8)
    asked: list[tuple[int, ...]] = []

    class Asked:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            asked.append(grid)
            return lambda *args, **kwargs: None

    kernel, kernels._share_kernel = kernels._share_kernel, Asked()
    try:
        large = torch.zeros(1 << 16)
        kernels.share(large, large, replace(group._shared, set_bytes=1 << 18), group._counters, group._patience, gather=False)
    finally:
        kernels._share_kernel = kernel
    assert asked == [(8,)]
