"""Two-batch overlap: what of the exchanges of one half batch still shows when the other half computes meanwhile.

Engines issue stages of the two halves in a fixed order, so an exchange hides behind the stage that runs between its sending
and its receiving, and not behind the whole layer:
- staggered (SGLang's decode, two stages apart): a dispatch behind the other half's attention projections and the shared
  experts, a combine behind its attention and gate;
- alternating (prefill everywhere, and decode under vLLM): each half's dispatch and combine meet once the other half's
  experts and once all of its own layer that is not experts.
- waiting (vLLM's normal mode until March 2026): an exchange begins when all compute issued before it has ended, the other
  half's too, so that one of four hides: a combine, behind the other half's layer but for its experts.
Packing, unpacking and waiting for ranks that come late are on the rank's own SMs and hide nothing.
Arrays are [n] steps; every number is of one half batch and all MoE layers together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from twin.cost.batch import Array
from twin.cost.protocols import Protocol

Order = Literal["staggered", "alternating", "waiting"]


@dataclass(frozen=True)
class Half:
    """Seconds of one half batch. `compute` holds all of its own work; `experts`, `early` (projections before attention, shared
    experts) and `late` (attention, its output projection, the gate) are the parts of it, in MoE layers alone, that stand
    beside exchanges. `dispatch` and `combine` are the exchanges, of which `local` each is packing; `wait` is for late ranks."""

    compute: Array
    experts: Array
    early: Array
    late: Array
    dispatch: Array
    combine: Array
    dispatch_local: Array
    combine_local: Array
    wait: Array


def shown_s(half: Half, protocol: Protocol, slower: float, order: Order) -> tuple[Array, Array]:
    """What dispatch and combine of both halves add to the step: packing, waiting (once a half, at its dispatch) and what the
    stages beside them do not cover, kernels taking `slower` times and exchanges `protocol.beside` times as long."""
    local = (half.dispatch_local, half.combine_local)
    rest, none = half.early + half.late, np.zeros_like(half.early)
    behind = {"staggered": ((half.early,), (half.late,)), "alternating": ((rest, half.experts),) * 2,
              "waiting": ((none, none), (rest, none))}[order]
    shown = []
    for exchange, own, stages in zip((half.dispatch, half.combine), local, behind, strict=True):
        sent = np.maximum(exchange * protocol.beside - own, 0.0)
        shows = sum(np.maximum(sent - slower * stage, 0.0) for stage in stages) * (2 / len(stages))
        shown.append(np.asarray(2 * own + shows))
    return shown[0] + 2 * slower * half.wait, shown[1]


def overlapped_s(half: Half, protocol: Protocol, slower: float, order: Order) -> Array:
    """Seconds of both halves side by side."""
    return np.asarray(2 * slower * half.compute + np.sum(shown_s(half, protocol, slower, order), axis=0))
