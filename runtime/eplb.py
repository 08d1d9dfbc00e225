"""Online rebalancing on one rank: loads are read, weights travel and tables change while the rank serves.

A cycle runs in a thread beside the steps: it sums the window's loads over the ranks, decides (`runtime.rebalance`), and
fetches the experts of one layer after another into buffers, over a group of its own, no faster than the budget allows.
Whatever changes what steps see happens between steps, in the same round on every rank: a rank counts its milestones (a
layer's experts have come, the cycle is over), the counts travel with the round's agreement, and a milestone that all
have reached is acted on. Experts are still read from their old slots until then, and no slot is written while any rank
may need what it holds.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from runtime.clock import ON_DEVICE
from runtime.comm.group import PeerLost, guarded
from runtime.control import Control
from runtime.model.transformer import MoeFfn
from runtime.rebalance import Decision, Seen, decide
from twin.policy.migration import Copy
from twin.policy.placement import Placement

if TYPE_CHECKING:
    from runtime.clock import Clock
    from runtime.rank import Rank


def rebalancer(rank: Rank, control: Control, clock: Clock) -> Rebalancer | None:
    """The rank's end of online rebalancing, where its plan asks for it and experts have somewhere to go."""
    wanted = rank.pool.eplb is not None and rank.at.ep > 1 and rank.placement is not None
    return Rebalancer(rank, control, clock) if wanted else None


class Rebalancer:
    """`step` belongs to the main thread and is called once a round that works, with the milestones that all ranks have."""

    def __init__(self, rank: Rank, control: Control, clock: Clock) -> None:
        assert rank.pool.eplb is not None and rank.model.moe is not None and rank.groups.experts is not None
        self._rank, self._control, self._clock, self._group = rank, control, clock, rank.groups.experts
        self._how, self._groups = rank.pool.eplb, rank.model.moe.groups
        clock.sums = True
        self._ffns = rank.transformer.moe_layers
        self._copy_bytes = sum(part.nbytes for part in self._parts(self._ffns[0], 0)) * rank.at.expert_tp
        self._base: tuple[torch.Tensor, float] | None = None
        self._rounds = self._allowed_from = 0
        self._fastest = 0, 0.0  # bytes and seconds of the copy that went best: others waited for their turn
        self._decision: Decision | None = None
        self._staged: tuple[int, dict[int, torch.Tensor]] | None = None
        self._news: dict[str, Any] = {}
        self.milestones = self._acted = 0
        self._turn = threading.Condition()
        self._running = self._closed = False

    def step(self, agreed: int) -> None:
        """A round begins: act on what all ranks are ready for, or begin a cycle when it is time."""
        with self._turn:
            self._rounds += 1
            if self._running and agreed > self._acted:
                self._act()
                self._acted += 1
            self._turn.notify_all()
        period = self._how.period_steps
        if self._rounds % period == 0 and not self._running:
            self._begin()
        if (self._rounds + self._how.window_steps) % period == 0:
            self._base = self._loads()

    def close(self) -> None:
        """End what runs; the formation is over."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()

    def _loads(self) -> tuple[torch.Tensor, float]:
        """Counts by layer and expert, copied on the device, and seconds in experts; nothing is waited for."""
        return torch.stack([ffn.load_E for ffn in self._ffns]), experts_s(self._clock)

    def _begin(self) -> None:
        load_LE, experts_s = self._loads()
        base = self._base or (torch.zeros_like(load_LE), 0.0)
        self._running, self._allowed_from = True, self._rounds
        threading.Thread(target=self._cycle, args=(load_LE - base[0], experts_s - base[1]), daemon=True, name="eplb").start()

    def _act(self) -> None:
        """The next milestone, all ranks having reached it: a layer's new experts take their slots, or the cycle ends."""
        self._clock.mark("migrate")
        assert self._decision is not None
        if self._staged is not None:
            layer, rows = self._staged
            self._staged = None
            for slot, packed in rows.items():
                _unpack(packed, self._parts(self._ffns[layer], slot))
            self._placement()[layer] = self._decision.placement.slot_to_logical[layer].tolist()
            self._ffns[layer].replicas.place(self._placement()[layer])
            self._allowed_from = self._rounds
            return
        self._running = False
        if self._rank.at.local_rank == 0:
            self._control.send({"ev": "eplb", **self._news, "last_round": self._rounds})

    # The thread

    def _cycle(self, load_LE: torch.Tensor, experts_s: float) -> None:
        try:
            with torch.inference_mode():
                self._rebalance(load_LE, experts_s)
        except Exception as err:  # the main thread must end the rank, and with the right words
            if not self._closed:
                text = str(err) if isinstance(err, PeerLost) else f"{type(err).__name__}: {err}"
                self._control.post({"op": "lost", "formation": self._control.formation, "error": f"rebalancing: {text}"})

    def _rebalance(self, load_LE: torch.Tensor, experts_s: float) -> None:
        at, began = self._rank.at, time.monotonic()
        seen = Seen(load_LE.cpu().numpy().astype(np.float64), experts_s, self._how.window_steps, *map(float, self._fastest))
        summed = self._group.all_reduce(torch.from_numpy(seen.pack())).numpy()
        now = Placement(np.array(self._placement()), at.ep)
        made = self._decision = decide(seen.unpack(summed), now, self._rank.pool, self._groups, self._copy_bytes, at.world)
        copies = sum(len(layer) for _, layer in made.layers)
        self._news = {"imbalance_before": made.imbalance_before, "imbalance_after": made.imbalance_after, "copies": copies,
                      "bytes": copies * self._copy_bytes, "gain_s_per_step": made.gain_s_per_step, "cost_s": made.cost_s,
                      "solve_s": time.monotonic() - began, "layers": len(made.layers), "first_round": self._rounds,
                      "start": began}
        if made.layers:
            self._clock.point("migration")
        for layer, wanted in made.layers:
            self._reached((layer, self._fetch(layer, wanted)))
        self._news |= {"end": time.monotonic(), "thread_cpu_s": time.thread_time()}  # of this rank's cycle, I/O aside
        self._reached(None)

    def _fetch(self, layer: int, wanted: tuple[Copy, ...]) -> dict[int, torch.Tensor]:
        """Send and receive a layer's copies in one order on all ranks; the rows of this rank's new experts. What is larger than
        a step's budget goes in pieces, a step each."""
        at, ffn, rows, allowed = self._rank.at, self._ffns[layer], {}, 0
        first, own_bytes = at.local_slots.start, self._copy_bytes // at.expert_tp
        piece_bytes = max(1, self._how.budget_bytes // at.expert_tp)  # ranks that cut an expert move their cuts side by side
        for copy in wanted:
            sends, receives = (at.ep_rank == end for end in (copy.source, copy.target))
            packed = torch.empty(own_bytes if receives else 0, dtype=torch.uint8)
            if sends:
                packed = _pack(self._parts(ffn, copy.source_slot - first))
            for begin in range(0, own_bytes, piece_bytes):
                piece = packed[begin:begin + piece_bytes]
                allowed += min(piece_bytes, own_bytes - begin) * at.expert_tp
                self._pace(allowed)
                if sends and not receives:
                    began = time.monotonic()
                    guarded(partial(dist.send, piece, self._peer(copy.target), group=self._group.pg))
                    took = piece.numel(), time.monotonic() - began
                    self._fastest = took if not self._fastest[0] else min(self._fastest, took, key=lambda one: one[1] / one[0])
                elif receives and not sends:
                    guarded(partial(dist.recv, piece, self._peer(copy.source), group=self._group.pg))
            if receives:
                rows[copy.target_slot - first] = packed
        return rows

    def _peer(self, ep_rank: int) -> int:
        """The global rank that holds the same cut of an EP rank's experts as this one of its own."""
        at = self._rank.at
        return at.first_rank + ep_rank * at.expert_tp + at.expert_tp_rank

    def _pace(self, n_bytes: int) -> None:
        """Wait for the round in which so many bytes since the last milestone are within the budget."""
        due = self._allowed_from + -(-n_bytes // self._how.budget_bytes)
        with self._turn:
            while self._rounds < due:
                self._wait()

    def _reached(self, staged: tuple[int, dict[int, torch.Tensor]] | None) -> None:
        """A milestone; returns when all ranks have acted on it."""
        with self._turn:
            self._staged = staged
            self.milestones += 1
            while self._acted < self.milestones:
                self._wait()

    def _wait(self) -> None:
        if self._closed:
            raise PeerLost("the formation is over")
        self._turn.wait()

    def _placement(self) -> list[list[int]]:
        assert self._rank.placement is not None
        return self._rank.placement

    def _parts(self, ffn: MoeFfn, slot: int) -> list[torch.Tensor]:
        """All tensors of one local slot, as views."""
        w = ffn.weights
        return [part[slot] for part in (w.w13, w.w2, w.b13, w.b2, w.s13, w.s2) if part is not None]


def experts_s(clock: Clock) -> float:
    """Seconds in experts so far. Steps in graphs tell no phases: of theirs, the share that experts had in other steps."""
    plain_s = sum(clock.spent(phase) for phase in ON_DEVICE - {"graph", "draft"})
    share = clock.spent("experts") / plain_s if plain_s else 0.0
    return clock.spent("experts") + share * clock.spent("graph")


def _pack(parts: list[torch.Tensor]) -> torch.Tensor:
    """Tensors as one row of bytes in the host's memory, a copy."""
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts]).cpu()


def _unpack(packed: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """The inverse of `_pack`, into the tensors."""
    for part, row in zip(parts, packed.split([part.nbytes for part in parts]), strict=True):
        part.copy_(row.clone().view(part.dtype).view(part.shape))  # a copy begins where any type may
