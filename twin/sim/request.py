"""One request on its way through the simulated service."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from twin.spec.results import RequestRecord

Status = Literal["ok", "rejected", "failed", "unfinished"]


@dataclass(slots=True, eq=False)
class Request:
    """Times in seconds from the start; None: not there yet.

    `last_token_s` is when its newest token came out, `segment` the step (index in its instance's log) that gives the next
    one while it decodes; both exist to measure gaps. `gaps_s` holds the gaps that are not simply one step of an instance:
    the hand-over from prefill to decode, and what a pre-emption cost.
    `shared_tokens` of its prompt are common to many requests, `cached_tokens` of them were found computed.
    """

    id: int
    arrival_s: float
    isl: int
    osl: int
    counted: bool = True
    shared_tokens: int = 0
    cached_tokens: int = 0
    prefill_start_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    finish_s: float | None = None
    itl_max_s: float | None = None
    prefill_instance: int | None = None
    decode_instance: int | None = None
    prefill_rank: int = 0
    decode_rank: int = 0
    transfer_start_s: float | None = None
    kv_transfer_s: float | None = None
    preemptions: int = 0
    status: Status = "unfinished"
    segment: int | None = None
    gaps_s: tuple[float, ...] = ()

    def saw_gap(self, gap_s: float) -> None:
        self.gaps_s += (gap_s,)
        self.saw_steps(gap_s)

    def saw_steps(self, longest_s: float) -> None:
        self.itl_max_s = longest_s if self.itl_max_s is None else max(self.itl_max_s, longest_s)

    def record(self) -> RequestRecord:
        """What the run remembers of it. A run ends when every request has, so all of an `ok` one's tokens came out."""
        return RequestRecord(
            id=self.id, arrival_s=self.arrival_s, isl=self.isl, osl=self.osl,
            output_tokens=self.osl if self.status == "ok" else 0,
            prefill_start_s=self.prefill_start_s, first_token_s=self.first_token_s, finish_s=self.finish_s,
            itl_max_s=self.itl_max_s, prefill_instance=self.prefill_instance, decode_instance=self.decode_instance,
            kv_transfer_s=self.kv_transfer_s, cached_tokens=self.cached_tokens, preemptions=self.preemptions,
            counted=self.counted, status=self.status)
