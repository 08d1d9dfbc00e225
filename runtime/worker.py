"""One process a rank: `python -m runtime.worker BRIEFING`, with RANK and WORLD_SIZE in the environment.

The launcher starts it with MASTER_ADDR and MASTER_PORT of a store that listens on loopback; torchrun sets the same names.
EPTWIN_SEAT is the process's number for the front end, by default its rank. A process may be a rank of one formation after
another: see `runtime.formation`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.board import Board
from runtime.clock import Clock, DeviceClock
from runtime.comm.group import PeerLost, guarded, leave_groups
from runtime.comm.waiting import be_patient, call_off, shared_memory
from runtime.control import Control, Message
from runtime.faults import Injector, parse
from runtime.loop import Reformed, StepLoop
from runtime.options import Briefing
from runtime.rank import Rank, build_rank, device_allocs, expert_load
from runtime.routing_record import summarise_pairs
from runtime.weights import Kept
from twin.spec.errors import SpecError
from twin.spec.plan import Plan

_MEET_S = 5.0
"""How long ranks that re-form, all of them there, wait for one another before they say that one is missing."""


def main() -> None:
    """Serve one rank until told to stop; whatever goes wrong is told to the front end before the process ends."""
    briefing = Briefing.read(Path(sys.argv[1]))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    seat = int(os.environ.get("EPTWIN_SEAT", rank))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the front end decides
    board = Board(briefing.board)
    control = Control(briefing.control, seat, board, call_off)
    control.formation = briefing.formation
    timed = briefing.options.record or any(pool.eplb is not None for pool in briefing.plan.pools)
    clock = (DeviceClock if briefing.options.device == "cuda" and timed else Clock)
    worker = Worker(briefing, control, clock(board, seat, Injector(parse(briefing.options.faults), seat, board)))
    code = 0
    try:
        worker.serve(Place(briefing.formation, briefing.plan, rank, world))
        control.closing = True  # from here on the front end may hang up
        control.send({"ev": "bye"})
    except BaseException as err:
        traceback.print_exc()
        control.closing = True
        worker.complain(err)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # destroying process groups may wait for ranks that are gone


@dataclass(frozen=True)
class Place:
    """What this process is in a formation."""

    formation: int
    plan: Plan
    rank: int
    world: int

    @classmethod
    def of(cls, order: Message) -> Place:
        """From an order to re-form."""
        return cls(order["formation"], Plan.model_validate_json(order["plan"]), order["rank"], order["world"])


class Worker:
    """A process that is a rank of one formation after another, and keeps what weights it can."""

    def __init__(self, briefing: Briefing, control: Control, clock: Clock) -> None:
        self.model, self.options = briefing.model, briefing.options
        self.control, self.clock = control, clock
        self._store: dist.Store | None = None
        self._loop: StepLoop | None = None
        self._heard_at = 0.0

    def serve(self, place: Place) -> None:
        """Take part until told to stop. Raises what ends this rank for good."""
        torch.set_num_threads(self.options.threads_for(place.world))
        torch.set_grad_enabled(False)
        kept: Kept | None = None
        former: object = None  # memory that peers may address until all have come to re-form
        while True:
            built: Rank | None = None
            try:
                place = self._gather(place)
                former = None
                built = self._build(place, kept)
                self._loop = StepLoop(built, self.control, self.clock, record=self.options.record)
                self._loop.run()
                self._tell_totals(built)
                return
            except Reformed as told:
                order: Message | None = told.order
            except SpecError:
                raise
            except Exception as err:
                if not self.options.recover:
                    raise
                traceback.print_exc()
                self.complain(err)
                self.clock.mark("reform")
                call_off()  # the device too gives up
                leave_groups()  # whoever waits for this rank hears so at once
                order = self.control.order(self.options.start_timeout_s)
                if order is None:
                    raise
            if self._loop is not None:
                self._loop.close()
            self.clock.mark("reform")
            self._heard_at = time.monotonic()
            leave_groups()
            if self.options.device == "cuda":
                torch.cuda.synchronize()  # nothing of the former formation runs on, on anybody's memory, once all are there
            former = shared_memory(*built.over_ranks) if built is not None else former
            kept = built.keep() if built is not None else kept
            place = Place.of(order)
            self._loop = built = None

    def _gather(self, place: Place) -> Place:
        """Wait until everybody is there who re-forms; the place in a later formation if there is one by then."""
        while place.formation:
            self.control.formation = place.formation
            self.control.send({"ev": "here"})
            order = self.control.order(self.options.start_timeout_s)
            if order is None:
                raise PeerLost("the other ranks did not come to re-form")
            if order["op"] == "meet":
                break
            place = Place.of(order)
        return place

    def complain(self, err: BaseException) -> None:
        """Tell the front end what went wrong here."""
        kind = "peer" if isinstance(err, PeerLost) else "error"
        self.control.send({"ev": "failed", "kind": kind, "phase": self.clock.phase, "type": type(err).__name__,
                           "error": str(err)[:2000] or type(err).__name__, "missing": getattr(err, "missing", ()),
                           "requests": self._loop.working if self._loop is not None else []})

    def _build(self, place: Place, kept: Kept | None) -> Rank:
        options = self.options
        patience = timedelta(seconds=_MEET_S if place.formation else options.start_timeout_s)
        if place.world > 1:
            self._meet(place, patience)
        built = build_rank(self.model, place.plan, options, place.rank, self.clock.mark, kept)
        if place.world > 1:
            guarded(lambda: dist.monitored_barrier(timeout=patience))
        be_patient(options.stall_s, *built.over_ranks)
        self.control.send({"ev": "ready", "kv_blocks": built.kv_blocks, "kv_bytes": built.kv_bytes,
                           "max_context": built.max_context, "dense_bytes": built.dense_bytes,
                           "expert_bytes": built.expert_bytes, "heard_at": self._heard_at, "prepared": built.prepared})
        return built

    def _meet(self, place: Place, patience: timedelta) -> None:
        """Join the formation's world: each meets under a prefix of its own in the same store."""
        if self.options.external is not None:
            guarded(lambda: dist.init_process_group("gloo", timeout=patience))  # the environment says where to meet
            return
        if self._store is None:
            self._store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                                        timeout=timedelta(seconds=self.options.start_timeout_s))
        store = dist.PrefixStore(f"formation{place.formation}", self._store)
        guarded(lambda: dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world,
                                                timeout=patience))

    def _tell_totals(self, built: Rank) -> None:
        totals: Message = {"ev": "totals", "sent_bytes": built.experts.sent_bytes, "expert_load": expert_load(built),
                           "device_allocs": device_allocs(built.device)}
        if built.pool.eplb is not None:
            totals["placement"] = built.placement
        counted = [ffn.pairs_EE for ffn in built.transformer.moe_layers if ffn.pairs_EE is not None]
        if counted:
            pairs = summarise_pairs(torch.stack(counted), built.groups.control)
            totals |= {"pairs": pairs} if built.at.local_rank == 0 else {}
        self.control.send(totals)


if __name__ == "__main__":
    main()
