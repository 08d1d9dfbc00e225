"""One process a rank: `python -m runtime.worker BRIEFING`, with RANK and WORLD_SIZE in the environment.

The launcher starts it with MASTER_ADDR and MASTER_PORT of a store that listens on loopback; torchrun sets the same names.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.board import Board
from runtime.comm.group import PeerLost, guarded
from runtime.control import Control
from runtime.loop import Clock, StepLoop
from runtime.options import Briefing
from runtime.rank import build_rank, expert_load


def main() -> None:
    """Serve one rank until told to stop; whatever goes wrong is told to the front end before the process ends."""
    briefing = Briefing.read(Path(sys.argv[1]))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the front end decides
    board = Board(briefing.board, world)
    control = Control(briefing.control, rank, board)
    clock = Clock(board, rank)
    code = 0
    try:
        _serve(briefing, rank, world, control, clock)
        control.closing = True  # from here on the front end may hang up
        control.send({"ev": "bye"})
    except BaseException as err:
        traceback.print_exc()
        control.closing = True
        kind = "peer" if isinstance(err, PeerLost) else "error"
        control.send({"ev": "failed", "kind": kind, "phase": board.read(rank)[0], "type": type(err).__name__,
                      "error": str(err)[:2000] or type(err).__name__})
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # destroying process groups may wait for ranks that are gone


def _serve(briefing: Briefing, rank: int, world: int, control: Control, clock: Clock) -> None:
    options = briefing.options
    torch.set_num_threads(options.threads_for(world))
    torch.set_grad_enabled(False)
    patience = timedelta(seconds=options.start_timeout_s)
    if world > 1 and options.external is not None:
        guarded(lambda: dist.init_process_group("gloo", timeout=patience))  # the environment says where to meet
    elif world > 1:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=False,
                              timeout=patience)
        guarded(lambda: dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience))
    built = build_rank(briefing.model, briefing.plan, options, rank, clock.mark)
    if world > 1:
        guarded(lambda: dist.monitored_barrier(timeout=patience))
    control.send({"ev": "ready", "kv_blocks": built.kv_blocks, "kv_bytes": built.kv_bytes, "max_context": built.max_context,
                  "dense_bytes": built.dense_bytes, "expert_bytes": built.expert_bytes})
    StepLoop(built, control, clock, record=options.record).run()
    control.send({"ev": "totals", "sent_bytes": built.experts.sent_bytes, "expert_load": expert_load(built)})


if __name__ == "__main__":
    main()
