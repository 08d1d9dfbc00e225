"""Dispatch and combine through peers' memory, all ranks of a world played in one process: each has a tensor, and the table
of addresses leads from one to the other. Phases run rank by rank, so that no barrier has to wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from runtime.comm.group import PeerLost
from runtime.comm.oracle import ROUTES, Traffic, apply_experts, expected, mistakes, traffic
from runtime.comm.symm import SETS, Buffers, Shape, SymmExchange
from runtime.comm.waiting import Waiting
from runtime.kernels import symm as kernels

HIDDEN, CHOICES, SLOTS = 48, 4, 8
PHASES = 2


class World:
    """Ranks that share one process: `allocate` makes everybody's memory when the first asks."""

    def __init__(self, ranks: int, device: torch.device, *, expert_tp: int = 1, **options: bool) -> None:
        self.device, self.expert_tp = device, expert_tp
        self._memories: dict[Shape, list[torch.Tensor]] = {}
        self.slots_per_rank = SLOTS // (ranks // expert_tp)
        self.ranks = [SymmExchange(self._allocate(r), r, Waiting(range(ranks), 3.0, timed=False),
                                   slots_per_rank=self.slots_per_rank, expert_tp=expert_tp, **options) for r in range(ranks)]

    def _allocate(self, rank: int) -> Callable[[Shape, torch.device], Buffers]:
        def allocate(shape: Shape, device: torch.device) -> Buffers:
            poison = [torch.full((shape.total_bytes,), 0xFF, dtype=torch.uint8, device=device) for _ in self.ranks]
            memories = self._memories.setdefault(shape, poison)
            for memory in memories:
                for which in range(SETS):
                    at = shape.places(which).flags
                    memory[at:at + 4 * shape.world] = 0
            bases = torch.tensor([m.data_ptr() for m in memories], device=device)
            return Buffers(shape, memories[rank], bases, torch.zeros(SETS, dtype=torch.int32, device=device), memories)
        return allocate

    def exchange(self, sent: list[Traffic], capacity: int, in_place: bool = True) -> list[torch.Tensor]:
        """One dispatch, experts and combine of all ranks."""
        arrivals = [r.send(t.x_TH, t.slots_TK, t.weights_TK, capacity) for r, t in zip(self.ranks, sent, strict=True)]
        arrivals = [r.widen(a) for r, a in zip(self.ranks, arrivals, strict=True)]
        made = []
        for r, a in zip(self.ranks, arrivals, strict=True):
            first = r.index // self.expert_tp * self.slots_per_rank
            y = apply_experts(a.x_NH, a.slots_NK, a.weights_NK, first, SLOTS, self.expert_tp)
            made.append(a.out_NH.copy_(y) if in_place and a.out_NH is not None else y)
        for r, a, y in zip(self.ranks, arrivals, made, strict=True):
            r.give(y, a)
        return [r.collect(a) for r, a in zip(self.ranks, arrivals, strict=True)]


def world_traffic(counts: list[int], route: str, dtype: torch.dtype, device: torch.device, ep: int,
                  seed: int = 0) -> list[Traffic]:
    return [traffic(n, HIDDEN, CHOICES, SLOTS, ep, route=route, seed=100 * seed + r, dtype=dtype, device=device)
            for r, n in enumerate(counts)]


@pytest.mark.parametrize(("ranks", "expert_tp", "route"), [
    *((2, 1, route) for route in ROUTES), (4, 1, "uniform"), (4, 2, "one rank"),
    *(pytest.param(4, 1, route, marks=pytest.mark.slow) for route in ROUTES if route != "uniform"),
    *(pytest.param(4, tp, "uniform", marks=pytest.mark.slow) for tp in (2, 4))])
def test_every_token_meets_its_experts_once(device: torch.device, ranks: int, expert_tp: int, route: str) -> None:
    world = World(ranks, device, expert_tp=expert_tp)
    for phase, counts in enumerate(([3] * 4, [0, 1, 0, 0], [5, 0, 2, 3])):
        sent = world_traffic(counts[:ranks], route, torch.bfloat16, device, ranks // expert_tp, phase)
        for rank, (got, t) in enumerate(zip(world.exchange(sent, max(1, *counts)), sent, strict=True)):
            assert not mistakes(got, t, SLOTS), f"rank {rank}, {counts}"


@pytest.mark.parametrize(("options", "dtype"), [
    ({"fp8": True}, torch.bfloat16), ({"push_back": True}, torch.float32), ({"fp8": True, "push_back": True}, torch.bfloat16),
    pytest.param({"fp8": True}, torch.float32, marks=pytest.mark.slow),
    pytest.param({"push_back": True}, torch.bfloat16, marks=pytest.mark.slow),
    pytest.param({"fp8": True, "push_back": True}, torch.float32, marks=pytest.mark.slow)])
def test_fp8_rows_and_pushed_results(device: torch.device, options: dict[str, bool], dtype: torch.dtype) -> None:
    world = World(2, device, **options)
    for phase in range(PHASES):
        sent = world_traffic([4, 3], "uniform", dtype, device, 2, phase)
        for got, t in zip(world.exchange(sent, 4), sent, strict=True):
            assert not mistakes(got, t, SLOTS)


def test_results_that_lie_elsewhere_are_fetched_all_the_same(device: torch.device) -> None:
    world = World(2, device)
    sent = world_traffic([4, 3], "uniform", torch.float32, device, 2)
    for got, t in zip(world.exchange(sent, 4, in_place=False), sent, strict=True):
        assert not mistakes(got, t, SLOTS)


def test_rows_are_sent_once_to_each_rank_and_counted(device: torch.device) -> None:
    ranks = 4
    world = World(ranks, device)
    sent = world_traffic([5, 0, 7, 1], "uniform", torch.float32, device, ranks)
    world.exchange(sent, 7)
    for rank, (exchange, t) in enumerate(zip(world.ranks, sent, strict=True)):
        owners = [{s // world.slots_per_rank for s in row} - {rank} for row in t.slots_TK.tolist()]
        away = sum(map(len, owners))
        assert exchange.moved_rows == (away, away)
        assert exchange.sent_bytes == away * (2 * HIDDEN * 4 + 8 * CHOICES)


def test_growing_keeps_what_was_sent_right(device: torch.device) -> None:
    world = World(2, device)
    for tokens in (1, 6, 3, 17):
        sent = world_traffic([tokens, tokens // 2], "uniform", torch.float32, device, 2, tokens)
        for got, t in zip(world.exchange(sent, tokens), sent, strict=True):
            assert not mistakes(got, t, SLOTS)


def meet(world: World, rank: int, polls: int) -> None:
    """One rank at the barrier of set 0, with patience counted in polls."""
    exchange = world.ranks[rank]
    buffers = exchange.reserve(1, HIDDEN, CHOICES, torch.float32, world.device)
    state = exchange._state
    assert state is not None
    patience = exchange.waiting.ready(world.device)
    patience.limit.fill_(polls)
    kernels.meet(exchange._peers(buffers), buffers.shape.places(0), buffers.turns[:1], state.present_W, patience)
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def test_barrier_names_who_did_not_come(device: torch.device) -> None:
    world = World(3, device)
    for exchange in world.ranks:
        exchange.reserve(1, HIDDEN, CHOICES, torch.float32, device)
    meet(world, 0, 5)
    with pytest.raises(PeerLost, match="rank 1, 2 did") as lost:
        world.ranks[0].waiting.check()
    assert lost.value.missing == (1, 2)
    meet(world, 1, 5)
    meet(world, 1, 5)  # once somebody is lost nobody is waited for, nor blamed: rank 0 was here once, not twice
    with pytest.raises(PeerLost, match="rank 2 did"):
        world.ranks[1].waiting.check()
    meet(world, 2, 5)  # all three flags are up now
    world.ranks[2].waiting.check()


def test_waiting_is_called_off_while_it_lasts(device: torch.device) -> None:
    """A barrier that would wait for ever ends when the host says so; nobody is blamed, later ones do not wait at all, and what
    they would have brought is void."""
    world = World(3, device)
    for exchange in world.ranks:
        exchange.reserve(1, HIDDEN, CHOICES, torch.float32, device)
    waiting = world.ranks[0].waiting
    waiting.check()
    caller = threading.Timer(0.2, waiting.call_off)
    caller.start()
    meet(world, 0, 1 << 60)
    caller.join()
    with pytest.raises(PeerLost, match="called off") as off:
        waiting.check()
    assert off.value.missing == ()
    assert waiting.patience is not None
    assert waiting.patience.lost_W1.tolist() == [0, 0, 0, 1]
    assert waiting.patience.alarm_W.tolist() == [0, 0, 0]
    waiting.patience.off.zero_()  # the device remembers by itself
    meet(world, 0, 1 << 60)


def test_called_off_before_there_was_anything_to_wait_for(device: torch.device) -> None:
    world = World(2, device)
    world.ranks[0].waiting.call_off()
    meet(world, 0, 1 << 60)
    with pytest.raises(PeerLost, match="called off"):
        world.ranks[0].waiting.check()


def test_patience_may_change_later(device: torch.device) -> None:
    """The limit lies on the device: what was captured with another one obeys."""
    world = World(2, device)
    waiting = world.ranks[0].waiting
    waiting.be_patient(7.0)
    world.ranks[0].reserve(1, HIDDEN, CHOICES, torch.float32, device)
    assert waiting.patience is not None
    limit = waiting.patience.limit
    assert limit.tolist() == [7_000_000_000]
    waiting.be_patient(0.5)
    assert waiting.patience.limit is limit and limit.tolist() == [500_000_000]


def test_what_a_step_makes_first_is_changed_between_steps(device: torch.device) -> None:
    """Steps run in inference mode, whose tensors nothing else may change; patience and who is present do change."""
    world = World(2, device)
    with torch.inference_mode():
        world.ranks[0].reserve(1, HIDDEN, CHOICES, torch.float32, device)
    one = world.ranks[0]
    one.waiting.be_patient(7.0)
    one.exclude(1)
    one.waiting.call_off()
    assert one.waiting.ready(device).limit.tolist() == [7_000_000_000]


def test_barrier_counts_on_and_forgets_who_was_excluded(device: torch.device) -> None:
    world = World(2, device)
    for exchange in world.ranks:
        exchange.reserve(1, HIDDEN, CHOICES, torch.float32, device)
    meet(world, 1, 1)
    world.ranks[1].exclude(0)
    for _ in range(3):
        meet(world, 1, 1)
    world.ranks[1].waiting.check()
    meet(world, 0, 1)  # rank 1 is far ahead, which is not lateness
    world.ranks[0].waiting.check()


def test_buffers_do_not_overlap_and_are_aligned() -> None:
    for fp8 in (False, True):
        shape = Shape(world=6, capacity=5, hidden=24, choices=3, dtype=torch.bfloat16, fp8=fp8)
        n = shape.rows
        sizes = [n * 24 * (1 if fp8 else 2), 4 * n if fp8 else 0, 4 * 3 * n, 4 * 3 * n, 2 * 24 * n, 4 * 6]
        spans = [(getattr(shape.places(w), name), size) for w in range(SETS)
                 for name, size in zip(("x", "scale", "slots", "weights", "y", "flags"), sizes, strict=True)]
        assert all(start % 256 == 0 for start, _ in spans)
        assert all(a + size <= b for (a, size), (b, _) in pairwise(spans))
        assert spans[-1][0] + sizes[-1] <= shape.total_bytes


@pytest.mark.parametrize("spoil", ["weight", "expert", "twice", "dropped", "row"])
def test_the_oracle_sees_every_kind_of_mistake(spoil: str) -> None:
    sent = traffic(6, HIDDEN, CHOICES, SLOTS, 2, route="uniform", seed=1, dtype=torch.bfloat16)
    assert mistakes(expected(sent, SLOTS), sent, SLOTS) == ""
    x, slots, weights = sent.x_TH.clone(), sent.slots_TK.clone(), sent.weights_TK.clone()
    if spoil == "weight":
        weights[4, 1] = 3 - weights[4, 1]
    elif spoil == "expert":
        slots[4, 1] = next(s for s in range(SLOTS) if s not in slots[4])
    elif spoil == "twice":
        slots[4, 1] = slots[4, 2]
    elif spoil == "dropped":
        slots[4, 1] = -1
    else:
        x[[4, 5]] = x[[5, 4]]
    assert "of 6 rows differ" in mistakes(expected(Traffic(x, slots, weights), SLOTS), sent, SLOTS)


def test_sums_are_exact_in_the_narrowest_format() -> None:
    sent = traffic(64, 512, 8, 256, 8, route="uniform", seed=3, dtype=torch.float32)
    wide = expected(sent, 256)
    assert wide.abs().max() < 256 and torch.equal(wide, wide.to(torch.bfloat16).float())
