"""How engines hand a prompt's KV from prefill to decode, as data: what `engines.py` is to seconds, this is to transfers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from twin.cost.protocols import KV_BASE_S, KV_GATHER_BYTES_PER_S, KV_LINK
from twin.spec.base import Source
from twin.spec.errors import SpecError
from twin.spec.scenario import KvSend


@dataclass(frozen=True)
class HandoverStyle:
    """One engine's way.

    between_steps: ranks hear of a hand-over only between their steps, so bytes flow when both sides have ended the one they
    were in; otherwise they flow as soon as the decode rank has given memory.
    sends: what leaves while the rest of the prompt is computed. prompt: nothing; chunk: all but the last chunk; layer: all
    but the last layer of it. Both go on their way while the last chunk is computed, if the decode rank has memory by then.
    link_share: part of the links' rate that the transfer engine reaches; gather_bytes_per_s: at which a GPU gathers blocks
    before it sends them; base_s: what each transfer takes at least.
    """

    between_steps: bool
    sends: Literal["prompt", "chunk", "layer"]
    source: Source
    link_share: float = KV_LINK
    gather_bytes_per_s: float = KV_GATHER_BYTES_PER_S
    base_s: float = KV_BASE_S

    def tail(self, tokens: int, last_chunk: int, layers: int) -> float:
        """The part of a prompt's bytes that can only leave when the prompt is done: all where it is computed in one step and
        ranks hear of nothing within."""
        if self.between_steps and last_chunk >= tokens:
            return 1.0
        return {"prompt": 1.0, "chunk": last_chunk / max(tokens, 1), "layer": 1.0 / max(layers, 1)}[self.sends]


HANDOVERS: dict[str, HandoverStyle] = {
    # netlab: a message a layer fills links of 50 to 200 Mbit/s; not measured on faster ones
    "eptwin": HandoverStyle(True, "prompt", "calibrated", link_share=1.0, gather_bytes_per_s=math.inf, base_s=0.0),
    # its NIXL connector: decode reads a prompt that is done
    "vllm": HandoverStyle(False, "prompt", "calibrated"),
    # decode gives memory first, and every chunk is sent when it is computed
    "sglang": HandoverStyle(False, "chunk", "calibrated"),
    # its cache transceiver, after the context phase
    "trtllm": HandoverStyle(False, "prompt", "assumed"),
}


def handover_of(engine: str, sends: KvSend = "engine") -> HandoverStyle:
    """The engine's way, or with another unit of sending. Raises SpecError for an engine we do not know."""
    if engine not in HANDOVERS:
        raise SpecError(f"unknown engine {engine[:40]!r}", field="plan.engine", expected=", ".join(HANDOVERS))
    style = HANDOVERS[engine]
    return style if sends == "engine" else replace(style, sends=sends)
