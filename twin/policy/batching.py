"""Continuous batching: which tokens of which requests one step computes.

A `BatchScheduler` serves one rank's batch: `schedule` plans a step, the owner runs it, `complete` books what came out.
Requests are served by priority (lower first), then arrival; nobody overtakes a request that does not fit yet, so that
every accepted request ends. Blocks for all tokens known at admission are reserved at once (a prompt in progress never
lacks memory); decoding grows them token by token and pre-empts the least urgent running request when none is left.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from heapq import heappop, heappush
from math import ceil
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from twin.policy.decode_rows import DecodeRows, Sequence
from twin.policy.kv_blocks import Blocks, TokenIds
from twin.policy.steps import BatchLimits, PrefillChunk, RequestState, StepPlan, check_request
from twin.spec.errors import SpecError

__all__ = ["BatchLimits", "BatchScheduler", "PrefillChunk", "RequestState", "StepPlan"]
_order = attrgetter("order")


class BatchScheduler:
    """The batch of one rank over one block manager. One step is in flight at most."""

    def __init__(self, limits: BatchLimits, blocks: Blocks) -> None:
        self.limits = limits
        self.blocks = blocks
        self._spare_blocks = ceil(limits.watermark * blocks.num_blocks)
        self._sequences: dict[int, Sequence] = {}
        self._queue: list[tuple[tuple[int, int], Sequence]] = []  # a heap; entries no longer waiting are skipped
        self._prefilling: list[Sequence] = []  # admitted, most urgent first
        self._landed: list[Sequence] = []  # waiting, yet with blocks: KV handed over; most urgent first
        self._rows = DecodeRows(blocks)
        self._num_held = 0
        self._arrivals = 0
        self._uncomputed = 0
        self._in_flight: StepPlan | None = None

    def add(self, request_id: int, prompt_tokens: int, max_new_tokens: int, *, computed_tokens: int = 0,
            generated_tokens: int = 0, priority: int = 0, token_ids: TokenIds | None = None) -> None:
        """Queue a request. Raises SpecError for one that could never run, however long it waited.

        `computed_tokens` and `generated_tokens`: KV handed over by a prefill instance and the tokens it already gave;
        with everything but the newest token computed the request decodes in the step that admits it. Blocks reserved
        beforehand under the same id (where a transfer landed) are taken over; they may be pre-empted like a running
        request's, which costs a recompute. `token_ids` of the prompt let it use the
        prefix cache of the block manager.
        """
        if request_id in self._sequences:
            raise SpecError(f"{request_id} is already here", field="request_id", expected="a new id")
        check_request(self.limits, self.blocks, prompt_tokens, max_new_tokens, computed_tokens, generated_tokens)
        sequence = Sequence(request_id, (priority, self._arrivals), prompt_tokens, max_new_tokens, computed_tokens,
                            generated_tokens, token_ids)
        self._arrivals += 1
        self._sequences[request_id] = sequence
        self._uncomputed += sequence.known_tokens - computed_tokens
        if self.blocks.held(request_id):
            insort(self._landed, sequence, key=_order)
        self._push(sequence)

    def schedule(self, draft_tokens: int = 0) -> StepPlan:
        """Plan the next step, with up to `draft_tokens` speculated tokens beside each decode.

        Reserves all blocks that the step writes. Drafts never exceed what a request may still generate, and shrink
        before a decode has to wait. A plan that was never completed is forgotten and its work planned again. The plan
        is empty when nothing runs, or when what waits needs blocks that `release` has yet to return.
        """
        if self.limits.prefill_first:
            lost = self._unblock_head()
            _, chunks = self._fill(self.limits.max_batch_tokens, admit=True)
            plan = StepPlan(prefill=chunks) if chunks else self._decode_plan(draft_tokens)
        else:
            plan = self._decode_plan(draft_tokens)
            lost = self._unblock_head()
            budget = self.limits.max_batch_tokens - sum(plan.decode_tokens)
            joined, chunks = self._fill(budget, admit=not plan.preempted)
            if joined or chunks:
                plan = StepPlan(chunks, plan.decode + joined, plan.preempted, plan.decode_tokens + (1,) * len(joined))
        if lost:
            plan = replace(plan, preempted=plan.preempted + lost)
        self._in_flight = plan
        return plan

    def complete(self, plan: StepPlan, *, finished: Iterable[int] = (), accepted: Mapping[int, int] | None = None,
                 hold: bool | Collection[int] = False) -> list[int]:
        """Book the step: each decode and each ended prefill gave one token, or `accepted[id]` of its `decode_tokens`.

        Requests in `finished` (a stop token) or with all their tokens leave; their ids are returned, decodes first.
        Their blocks are freed, except of those in `hold` (True: all): they keep their blocks, for a KV transfer to
        read, until `release`. Requests cancelled meanwhile are skipped. Raises ValueError for a plan that is not the
        one last scheduled.
        """
        if plan is not self._in_flight:
            raise ValueError("this plan is not the one in flight")
        self._in_flight = None
        stops = set(finished)
        left = self._complete_decode(plan, stops, accepted) + self._complete_prefill(plan, stops)
        for sequence in left:
            self._end(sequence, hold is True or (hold is not False and sequence.request_id in hold))
        return [sequence.request_id for sequence in left]

    def decode_only_steps(self) -> int:
        """Steps that will run unchanged without arrivals: one token for every running request, none admitted,
        pre-empted or in prefill. The last of them may end requests. 0 when the next step is anything else.
        """
        return 0 if self._next_differs() else self._rows.steps_that_fit()

    def _next_differs(self) -> bool:
        """Whether the next step is anything but a decode of all that runs."""
        if self._prefilling or not len(self._rows):
            return True
        head = self._head()
        if head is None:
            return False
        first = self.limits.prefill_first
        budget = self.limits.max_batch_tokens - (0 if first else len(self._rows))
        promised = 0 if first else self._rows.blocks_missing(1)
        return self._may_admit(head, budget, self._chunk_budget(budget), promised)

    def advance(self, steps: int) -> list[int]:
        """Apply `steps` <= `decode_only_steps()` decode steps at once, as that many `schedule` and `complete` would.

        Counts, phases and the ids that left are the same; only which physical block holds which tokens may differ.
        """
        rows = self._rows
        if steps and (steps < 0 or self._next_differs() or steps > rows.remaining.min() or not rows.grow_all(steps)):
            raise ValueError(f"cannot advance {steps} steps, only 0..{self.decode_only_steps()}")
        self._in_flight = None
        rows.computed[:] += steps
        rows.remaining[:] -= steps
        left = rows.leave(np.flatnonzero(rows.remaining == 0).tolist()) if steps else []
        for sequence in left:
            self._end(sequence, False)
        return [sequence.request_id for sequence in left]

    def cancel(self, request_id: int) -> bool:
        """Forget a request in any phase and free its blocks. False when it is unknown (it left already)."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        if sequence.phase == "decode":
            self._rows.leave([self._rows.row_of(request_id)])
        elif sequence.phase == "prefill":
            self._prefilling.remove(sequence)
        elif sequence.phase == "held":
            self._num_held -= 1
        elif sequence in self._landed:
            self._landed.remove(sequence)
        if sequence.phase in ("waiting", "prefill"):
            self._uncomputed -= sequence.known_tokens - sequence.computed
        self._end(sequence, False)
        return True

    def release(self, request_id: int) -> None:
        """Free the blocks of a request that left under `hold`. Raises ValueError when it is not held."""
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.phase != "held":
            raise ValueError(f"request {request_id} is not held")
        self._num_held -= 1
        self._end(sequence, False)

    @property
    def num_running(self) -> int:
        """Admitted requests, in prefill or decode."""
        return len(self._rows) + len(self._prefilling)

    @property
    def num_waiting(self) -> int:
        return len(self._sequences) - self.num_running - self._num_held

    @property
    def num_held(self) -> int:
        return self._num_held

    @property
    def waiting_tokens(self) -> int:
        """Prompt (and recomputed) tokens yet to be computed, of waiting requests and of prompts in progress."""
        return self._uncomputed

    @property
    def decode_contexts(self) -> NDArray[np.int64]:
        """KV tokens stored for each decoding request, in the order of the last plan's `decode`."""
        return self._rows.computed.copy()

    @property
    def is_idle(self) -> bool:
        """Nothing waits and nothing runs; held blocks do not count."""
        return len(self._sequences) == self._num_held

    def state(self, request_id: int) -> RequestState:
        """Where a request stands. Raises KeyError for one that left or never came."""
        sequence = self._sequences[request_id]
        if sequence.phase == "decode":
            self._rows.write_back(self._rows.row_of(request_id), sequence)
        return RequestState(sequence.phase, sequence.prompt_tokens, sequence.computed, sequence.generated,
                            sequence.preemptions)

    # Decode: grow every row, pre-empt where blocks are missing.

    def _decode_plan(self, draft_tokens: int) -> StepPlan:
        rows = self._rows
        if not len(rows):
            return StepPlan()
        drafts = min(draft_tokens, self.limits.max_batch_tokens // len(rows) - 1)
        widths = np.minimum(rows.remaining, 1 + drafts) if drafts > 0 else np.ones(len(rows), dtype=np.int64)
        widths, preempted = self._make_room(widths)
        tokens = tuple(widths.tolist()) if drafts > 0 else (1,) * len(rows)
        return StepPlan((), rows.ids, preempted, tokens)

    def _make_room(self, widths: NDArray[np.int64]) -> tuple[NDArray[np.int64], tuple[int, ...]]:
        """Blocks for every row's step, the most urgent first: drafts are dropped, then the last request evicted."""
        rows, evicted, preempted = self._rows, set[int](), list[Sequence]()
        if rows.grow_all(widths):
            return widths, ()
        for row in rows.short_rows(widths):
            while row not in evicted:
                stored = int(rows.computed[row])
                if rows.grow(row, stored + int(widths[row])):
                    break
                if widths[row] > 1 and rows.grow(row, stored + 1):
                    widths[row] = 1
                    break
                preempted.append(self._evict_last(evicted))
        if evicted:
            widths = np.delete(widths, sorted(evicted))
            rows.leave(evicted)
        for sequence in preempted:
            if sequence.phase == "decode":  # rows are outside the count of uncomputed tokens
                self._uncomputed += sequence.known_tokens - sequence.computed
            self._forget_computed(sequence)
            if sequence.phase != "waiting":
                self._push(sequence)
        return widths, tuple(sequence.request_id for sequence in preempted)

    def _evict_last(self, evicted: set[int]) -> Sequence:
        """Free the blocks of the least urgent request that has any; a row is only noted in `evicted`."""
        candidates = [row for row in range(len(self._rows)) if row not in evicted]
        last = max(candidates, key=lambda row: self._rows.sequences[row].order)
        sequence = max((self._rows.sequences[last], *self._prefilling[-1:], *self._landed[-1:]), key=_order)
        if sequence.phase == "decode":
            evicted.add(last)
        else:
            (self._prefilling if sequence.phase == "prefill" else self._landed).pop()
        self.blocks.free(sequence.request_id)
        return sequence

    def _unblock_head(self) -> tuple[int, ...]:
        """When nothing runs and the first request lacks blocks, take them from the last that landed behind it.

        Without this, handed-over requests that wait could keep each other waiting for ever.
        """
        lost: list[int] = []
        head = self._head()
        while (head is not None and not self.num_running and self._landed and self._landed[-1] is not head
               and not self.blocks.can_admit(head.request_id, head.known_tokens, self._matchable_ids(head))):
            sequence = self._landed.pop()
            self.blocks.free(sequence.request_id)
            self._forget_computed(sequence)
            lost.append(sequence.request_id)
        return tuple(lost)

    def _complete_decode(self, plan: StepPlan, stops: set[int], accepted: Mapping[int, int] | None) -> list[Sequence]:
        rows = self._rows
        if not plan.decode or not len(rows):
            return []
        gained = np.array(plan.decode_tokens if accepted else 1, dtype=np.int64)
        if accepted:
            gained = np.minimum(gained, [accepted.get(request_id, 1) for request_id in plan.decode])
            assert gained.min() >= 1, "a decode gives at least one token"
        rows.gain(plan.decode, gained)
        ended = rows.remaining <= 0
        if stops:
            stopped = stops.intersection(plan.decode)
            ended |= np.fromiter((request_id in stopped for request_id in rows.ids), dtype=bool, count=len(rows))
        return rows.leave(np.flatnonzero(ended).tolist())

    # Prefill: go on with admitted prompts, then admit.

    def _fill(self, budget: int, *, admit: bool) -> tuple[tuple[int, ...], tuple[PrefillChunk, ...]]:
        """Prompt chunks for `budget` tokens, and the admitted requests that decode at once."""
        chunk_budget = self._chunk_budget(budget)
        chunks: list[PrefillChunk] = []
        joined: list[int] = []
        for sequence in self._prefilling:
            chunk_budget -= self._cut(sequence, chunk_budget, chunks)
        budget -= sum(chunk.tokens for chunk in chunks)
        while admit and (head := self._head()) is not None:
            if not self._may_admit(head, budget, min(budget, chunk_budget), 0):
                break
            heappop(self._queue)
            self._admit(head)
            if head.phase == "decode":
                joined.append(head.request_id)
                budget -= 1
            else:
                tokens = self._cut(head, min(budget, chunk_budget), chunks)
                budget -= tokens
                chunk_budget -= tokens
        return tuple(joined), tuple(chunks)

    def _chunk_budget(self, budget: int) -> int:
        return budget if self.limits.chunk_tokens is None else min(budget, self.limits.chunk_tokens)

    def _chunk_size(self, rest: int, budget: int) -> int:
        """Tokens of a prompt with `rest` tokens to go that fit `budget`; 0 for not in this step."""
        if self.limits.chunk_tokens is not None:
            return max(0, min(rest, budget))
        whole = min(rest, self.limits.max_batch_tokens)
        return whole if whole <= budget else 0

    def _cut(self, sequence: Sequence, budget: int, chunks: list[PrefillChunk]) -> int:
        rest = sequence.known_tokens - sequence.computed
        tokens = self._chunk_size(rest, budget)
        if tokens:
            chunks.append(PrefillChunk(sequence.request_id, sequence.computed, tokens, tokens == rest))
        return tokens

    def _head(self) -> Sequence | None:
        while self._queue and self._queue[0][1].phase != "waiting":
            heappop(self._queue)
        return self._queue[0][1] if self._queue else None

    def _may_admit(self, head: Sequence, budget: int, chunk_budget: int, promised_blocks: int) -> bool:
        """Whether the head of the queue can run in a step with these budgets left. Changes nothing.

        `promised_blocks` are free now but will be taken first. The watermark yields when nothing else runs.
        """
        if self.num_running >= self.limits.max_seqs:
            return False
        # A cached prefix shortens the prompt only once adopted, so an unchunked prompt must fit without it.
        rest = head.known_tokens - head.computed
        if not (budget >= 1 if head.is_decode else self._chunk_size(rest, chunk_budget)):
            return False
        spare = promised_blocks + (self._spare_blocks if self.num_running else 0)
        return self.blocks.can_admit(head.request_id, head.known_tokens, self._matchable_ids(head), spare=spare)

    def _admit(self, head: Sequence) -> None:
        cached = self.blocks.admit(head.request_id, head.known_tokens, self._matchable_ids(head))
        self._uncomputed -= cached
        head.computed += cached
        if head in self._landed:
            self._landed.remove(head)
        if head.is_decode:
            self._uncomputed -= head.known_tokens - head.computed
            self._rows.join(head)
        else:
            head.phase = "prefill"
            insort(self._prefilling, head, key=_order)

    def _matchable_ids(self, head: Sequence) -> TokenIds | None:
        return head.token_ids if head.computed == 0 else None  # handed-over KV is complete already

    def _complete_prefill(self, plan: StepPlan, stops: set[int]) -> list[Sequence]:
        left = []
        for chunk in plan.prefill:
            sequence = self._sequences.get(chunk.request_id)
            if sequence is None or sequence.phase != "prefill":
                continue  # cancelled while the step ran
            sequence.computed += chunk.tokens
            self._uncomputed -= chunk.tokens
            if sequence.token_ids is not None:
                self.blocks.commit(chunk.request_id, sequence.token_ids[:sequence.computed])
            if not chunk.is_last:
                continue
            self._prefilling.remove(sequence)
            sequence.generated += 1
            if sequence.generated == sequence.max_new_tokens or chunk.request_id in stops:
                left.append(sequence)
            else:
                self._rows.join(sequence)
        return left

    # Coming and going.

    def _forget_computed(self, sequence: Sequence) -> None:
        self._uncomputed += sequence.computed
        sequence.computed = 0
        sequence.preemptions += 1

    def _push(self, sequence: Sequence) -> None:
        sequence.phase = "waiting"
        heappush(self._queue, (sequence.order, sequence))

    def _end(self, sequence: Sequence, hold: bool) -> None:
        if hold:
            sequence.phase = "held"
            self._num_held += 1
            return
        sequence.phase = "left"
        del self._sequences[sequence.request_id]
        self.blocks.free(sequence.request_id)
