"""The loop of one rank: hear the front end, agree on a round with the other ranks of the instance, take a step.

The ranks of an instance step together because experts belong to all of them: a rank without work runs an empty batch.
A round begins with one all_gather of [has work, newest wake-up heard, plan size, tokens, told to stop, drafting passes,
milestone of rebalancing, rows for a graph]; when nobody has work everyone goes to sleep on the control channel, and when
anybody was told to stop everyone leaves, so that nobody waits for a rank that is gone. Steps that all ranks can take from a
graph they take from the one of the same size (`twin.policy.graphs`). Every wake-up is a rising number that reaches every
rank, one of them with work. Ranks sleep only once all have heard the same number: one that is behind may have work on its
way that the others would sleep through. A number heard late, after its work was done, wakes nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from runtime.batch import Segment
from runtime.clock import Clock, Cut
from runtime.comm.group import PeerLost
from runtime.comm.waiting import check_peers
from runtime.compiles import compiles
from runtime.control import Control, Message
from runtime.eplb import rebalancer
from runtime.forward import forward
from runtime.rank import Rank
from runtime.records import IDLE, StepLog, did
from runtime.sequences import LiveRequest, pack, segments_of, unpack
from runtime.speculate import MtpDrafter, verify
from runtime.transfer import start_receive, start_send
from twin.policy.batching import BatchScheduler
from twin.policy.graphs import EAGER, agreed_size
from twin.policy.kv_blocks import BlockManager
from twin.policy.steps import BatchLimits, StepPlan
from twin.spec.errors import SpecError


class Reformed(Exception):
    """The front end told this rank to take its place in another formation."""

    def __init__(self, order: Message) -> None:
        super().__init__(f"re-form as rank {order['rank']} of {order['world']}")
        self.order = order


@dataclass
class Round:
    """What the ranks agreed on: to leave, whether anybody works, whether all have heard the same, this DP rank's plan size,
    the most tokens of any DP rank, how many tokens a rank dispatches at most, how often drafts are drafted from, which
    milestone of rebalancing all have reached, and in a graph of which size all take the step (None: without)."""

    stop: bool
    works: bool
    all_heard: bool
    plan_size: int
    tokens: int
    capacity: int
    passes: int
    milestone: int = 0
    graph: int | None = None


class StepLoop:
    """Runs until `stop`. Leaders (the first TP rank of a DP rank) schedule and sample; their TP peers follow."""

    def __init__(self, rank: Rank, control: Control, clock: Clock, *, record: bool) -> None:
        self.rank, self.control, self.clock = rank, control, clock
        self.log = StepLog(control.send) if record else None
        self._desk = Desk(rank, control) if rank.at.is_leader else None
        self._drafter = None if rank.mtp is None else MtpDrafter(rank.mtp, rank.kv[-1], rank.pool, rank.groups.tp, clock.within,
                                                                 alone=rank.at.world == 1)
        self._rebalancer = rebalancer(rank, control, clock)
        self._wake = self._slept_at = 0
        self._idle = True
        self._told_to_stop = self._stopped = False
        self._began = self._ended = self._cpu_s = self._step_cpu_s = 0.0
        self._rounds = 0
        self.working: list[int] = []  # requests that this rank deals with just now

    def run(self) -> None:
        """Take steps until told to stop. Raises PeerLost when another rank is gone."""
        try:
            while not self._stopped:
                self.working = []
                if self._idle:
                    self.clock.mark("idle")
                for message in self.control.drain(wait=self._idle):
                    self._hear(message)
                if not self._idle or self._wake > self._slept_at or self._told_to_stop:
                    self._round()
        finally:
            if self.log is not None:
                self.log.flush()  # whatever ends this formation
        self.clock.mark("done")

    def close(self) -> None:
        """End what runs beside the steps; the formation is over."""
        if self._rebalancer is not None:
            self._rebalancer.close()
        if self.rank.progress is not None:
            self.rank.progress.close()

    def _hear(self, message: Message) -> None:
        op = message["op"]
        self._wake = max(self._wake, message.get("wake", 0))
        if op == "stop":
            self._told_to_stop = True
        elif op == "send_kv":
            start_send(self.rank, message, self.control)
        elif op == "receive_kv":
            start_receive(self.rank, message, self.control)
        elif op == "reform":
            raise Reformed(message)
        elif op == "lost" and message["formation"] == self.control.formation:
            raise PeerLost(message["error"])
        elif op not in ("wake", "lost") and self._desk is not None:
            self.working = [message["id"]]
            self._desk.hear(message)

    def _round(self) -> None:
        if self._idle:
            self.clock.take()  # the time asleep is no part of a step
            self._ended = time.monotonic()
        self._idle = False
        self._began = self._ended  # steps join without a gap: booking the last one is part of the next
        scheduled_at = time.monotonic()
        self.clock.mark("schedule")
        plan, segments, owners = self._desk.plan() if self._desk else (StepPlan(), [], [])
        packed = pack(segments) if self.rank.groups.tp.size > 1 and self._desk else torch.zeros(0, dtype=torch.int64)
        agreed = self._agree(not plan.is_empty, len(packed), segments)
        if agreed.stop:
            self._stopped = True
            return
        if not agreed.works:
            if agreed.all_heard:
                self._idle, self._slept_at = True, self._wake
                if self.log is not None:
                    self.log.flush()
                if self._desk is not None:
                    self._desk.tell_load()
            return
        self._rounds += 1
        if self._rebalancer is not None:
            self.clock.take() if self.log is None else self.log.settle()  # it looks at what the last step took
            self._rebalancer.step(agreed.milestone)
        self.working = [*plan.decode, *(chunk.request_id for chunk in plan.prefill)]
        segments = self._share(segments, packed, agreed.plan_size)
        self.clock.point("prefill" if any(s.is_prefill for s in segments) else "decode")
        if self._drafter is not None:
            segments = self._drafter.extend(segments, owners, agreed.passes, agreed.capacity)
        if self._desk is not None:
            self._desk.tell_starts(plan)
        logits, greedy, states = forward(self.rank, segments, self.clock.mark, graph=agreed.graph, tokens=agreed.tokens,
                                         capacity=agreed.capacity)
        if self.log is not None:
            self.log.send_due()  # a device is busy now
        taken = None
        if self._desk is not None and not plan.is_empty:
            self.clock.mark("sample")
            found = verify(segments, owners, logits, greedy)
            check_peers(*self.rank.over_ranks)  # now that the device is done: nobody gets tokens made without a peer
            taken = self._desk.take(segments, owners, found)
        if self._drafter is not None and states is not None:
            self._drafter.follow(segments, owners, states, agreed.capacity)
        if self.rank.progress is not None:
            self.rank.progress.end()
        cut = self._end_step() if self.log is not None else None
        news: Message | None = None
        if self._desk is not None and taken is not None:
            self.clock.mark("book")
            news = self._desk.book(plan, taken, scheduled_at)
        if self.log is not None and cut is not None:
            times = (self._began, self._ended, self._step_cpu_s, self._rounds)
            self.log.owe(partial(self._write_down, self.log, times, cut, plan, segments, taken, news))
            if news is not None and not any(news["load"][:2]):
                self.log.flush()  # before the news that ends the last request
        if news is not None:
            self.control.send(news)

    def _agree(self, has_work: bool, plan_size: int, segments: list[Segment]) -> Round:
        at, group, decode = self.rank.at, self.rank.groups.control, self.rank.decode
        tokens = sum(len(s.token_ids) for s in segments)
        passes = 0 if self._drafter is None else self._drafter.passes(segments)
        graph_rows, sizes = (EAGER, ()) if decode is None else (decode.rows(segments), decode.sizes)
        if group.size == 1:
            return Round(self._told_to_stop, has_work, True, plan_size, tokens, max(1, tokens), passes,
                         graph=agreed_size([graph_rows], sizes))
        self.clock.mark("wait")
        row = [int(has_work), self._wake, plan_size, tokens, int(self._told_to_stop), passes,
               self._rebalancer.milestones if self._rebalancer else 0, graph_rows]
        rows = group.all_gather(torch.tensor(row)).tolist()
        most = max(row[3] for row in rows)
        return Round(any(row[4] for row in rows), any(row[0] for row in rows), len({row[1] for row in rows}) == 1,
                     rows[at.dp_rank * at.tp][2], most, max(1, -(-most // at.tp)), max(row[5] for row in rows),
                     min(row[6] for row in rows), agreed_size([row[7] for row in rows], sizes))

    def _share(self, segments: list[Segment], packed: torch.Tensor, size: int) -> list[Segment]:
        """The leader's segments, on all its TP ranks."""
        if self.rank.groups.tp.size == 1 or size == 0:
            return segments
        device = self.rank.device
        buffer = packed.to(device) if self._desk is not None else torch.empty(size, dtype=torch.int64, device=device)
        self.rank.groups.tp.broadcast(buffer)
        return segments if self._desk is not None else unpack(buffer.cpu())

    def _end_step(self) -> Cut:
        """A step's times end here, on the machine's monotonic clock."""
        self._ended, cpu_s = time.monotonic(), time.process_time()
        self._step_cpu_s, self._cpu_s = cpu_s - self._cpu_s, cpu_s
        return self.clock.cut()

    def _write_down(self, log: StepLog, times: tuple[float, float, float, int], cut: Cut, plan: StepPlan, segments: list[Segment],
                    taken: Taken | None, news: Message | None) -> None:
        """Add a step to the log."""
        what = IDLE
        if taken is not None and news is not None:
            what = did(plan, segments, len(taken.out), news["load"][2], taken.drafted, taken.stood)
        log.add(*times, self.clock.read(cut), what)


@dataclass
class Taken:
    """What a step gave: [request, token, why it ended] of every token; how many tokens each decode gave; drafts by place,
    how many there were and how many stood."""

    out: list[list[Any]] = field(default_factory=list)
    stopped: set[int] = field(default_factory=set)
    hold: set[int] = field(default_factory=set)
    gained: dict[int, int] = field(default_factory=dict)
    drafted: list[int] = field(default_factory=list)
    stood: list[int] = field(default_factory=list)

    def count(self, drafts: int, stood: int) -> None:
        """Book one request's drafts."""
        more = [0] * (drafts - len(self.drafted))
        self.drafted, self.stood = self.drafted + more, self.stood + more
        for place in range(drafts):
            self.drafted[place] += 1
            self.stood[place] += place < stood


class Desk:
    """A leader's scheduler, its blocks and its requests."""

    def __init__(self, rank: Rank, control: Control) -> None:
        pool = rank.pool
        self.control = control
        self.blocks = BlockManager(rank.kv_blocks, pool.block_tokens, pool.prefix_cache)
        self.scheduler = BatchScheduler(limits_of(rank), self.blocks)
        self._max_seqs = pool.max_num_seqs
        self._draft_tokens, self._by_module = pool.mtp_draft_tokens, rank.mtp is not None
        self._requests: dict[int, LiveRequest] = {}
        self._landing: dict[int, LiveRequest] = {}  # blocks reserved, KV on its way
        self._asking: dict[int, LiveRequest] = {}  # wait for blocks to land in
        self._preemptions = 0
        self._ops: dict[str, Callable[[Message], None]] = {
            "add": self._add, "cancel": self._cancel, "reserve": self._reserve, "activate": self._activate,
            "release": self._release}

    def hear(self, message: Message) -> None:
        self._ops[message["op"]](message)

    def plan(self) -> tuple[StepPlan, list[Segment], list[LiveRequest]]:
        """Schedule the next step, after letting KV in that found no blocks before."""
        self._let_in()
        plan = self.scheduler.schedule(self._draft_tokens)
        self._preemptions += len(plan.preempted)
        segments, owners = segments_of(plan, self._requests, self.blocks.table, self._drafts)
        return plan, segments, owners

    def _drafts(self, request: LiveRequest, count: int) -> list[int]:
        if not self._by_module:
            return request.lookup.propose(request.tokens, count)
        return [request.draft] + [0] * (count - 1) if request.draft >= 0 else []  # the further ones are yet to be drafted

    def tell_starts(self, plan: StepPlan) -> None:
        """Name the prompts that begin now, whose KV is to leave while the rest is computed, and their blocks."""
        for chunk in plan.prefill:
            request = self._requests[chunk.request_id]
            if request.early and not request.told and not chunk.is_last:
                request.told = True
                self.control.send({"ev": "starts", "id": chunk.request_id, "blocks": self.blocks.table(chunk.request_id)})

    def take(self, segments: list[Segment], owners: list[LiveRequest], found: list[list[int]]) -> Taken:
        """Give every request its new tokens, up to one that ends it."""
        taken = Taken()
        for segment, request, tokens in zip(segments, owners, found, strict=True):
            reason, given = None, 0
            while given < len(tokens) and reason is None:
                reason = request.append(tokens[given])
                taken.out.append([request.request_id, tokens[given], reason])
                given += 1
            if not segment.is_prefill:
                taken.gained[request.request_id] = given
                if len(segment.token_ids) > 1:
                    taken.count(len(segment.token_ids) - 1, len(tokens) - 1)
            if reason == "stop":
                taken.stopped.add(request.request_id)
            if given and request.hands_over and (reason is None or request.told):  # what was told of may be on its way
                taken.hold.add(request.request_id)
        return taken

    def book(self, plan: StepPlan, taken: Taken, began_at: float) -> Message:
        """Tell the scheduler who ended; what the front end is to hear of it."""
        began = [c.request_id for c in plan.prefill if not self._requests[c.request_id].began]
        for request_id in began:
            self._requests[request_id].began = True
        gained = taken.gained if taken.drafted else None
        left = self.scheduler.complete(plan, finished=taken.stopped, accepted=gained, hold=taken.hold)
        handover = [[i, self.blocks.table(i)] for i in left if i in taken.hold]
        for request_id in left:
            del self._requests[request_id]
        news: Message = {"ev": "step", "out": taken.out, "load": self._load(), "began": began, "began_at": began_at}
        if handover:
            news["handover"] = handover
        if taken.drafted:
            news["drafts"] = [taken.drafted, taken.stood]
        if plan.preempted:
            news["preempted"] = list(plan.preempted)
        return news

    def tell_load(self) -> None:
        """Tell the front end how things stand before going to sleep."""
        self.control.send({"ev": "load", "load": self._load()})

    def _load(self) -> list[float]:
        scheduler = self.scheduler
        waiting = scheduler.num_waiting + len(self._landing) + len(self._asking)
        return [scheduler.num_running, waiting, self.blocks.usage, len(compiles.late)]

    def _add(self, message: Message) -> None:
        try:
            request = LiveRequest.of(message)
            most = request.generated + 1 if request.hands_over else request.params.max_tokens
            self.scheduler.add(request.request_id, request.prompt_len, most, generated_tokens=request.generated,
                               token_ids=request.tokens[:request.prompt_len])
        except (SpecError, TypeError, ValueError, KeyError) as err:  # this request's trouble alone
            self.control.send({"ev": "refused", "id": message["id"], "error": str(err)})
            return
        self._requests[request.request_id] = request

    def _cancel(self, message: Message) -> None:
        request_id = message["id"]
        self.scheduler.cancel(request_id)
        self._requests.pop(request_id, None)
        self._asking.pop(request_id, None)
        if self._landing.pop(request_id, None) is not None:
            self.blocks.free(request_id)
        self._let_in()

    def _release(self, message: Message) -> None:
        self.scheduler.release(message["id"])

    def _reserve(self, message: Message) -> None:
        self._asking[message["id"]] = LiveRequest.of(message)
        self._let_in()

    def _let_in(self) -> None:
        """Reserve blocks for KV that wants to come, first come first served, while a place in the batch is in sight."""
        for request_id, request in list(self._asking.items()):
            here = self.scheduler.num_running + self.scheduler.num_waiting + len(self._landing)
            tokens = len(request.tokens) + request.early  # the next one's as well, where it is not drawn yet
            if here >= self._max_seqs or not self.blocks.reserve(request_id, tokens):
                return
            self._landing[request_id] = self._asking.pop(request_id)
            self.control.send({"ev": "reserved", "id": request_id, "blocks": self.blocks.table(request_id)})

    def _activate(self, message: Message) -> None:
        request = LiveRequest.of(message)  # by now with the newest token
        del self._landing[request.request_id]
        self.scheduler.add(request.request_id, request.prompt_len, request.params.max_tokens,
                           computed_tokens=len(request.tokens) - 1, generated_tokens=request.generated)
        self._requests[request.request_id] = request


def limits_of(rank: Rank) -> BatchLimits:
    """The batching limits that the rank's pool states."""
    pool = rank.pool
    return BatchLimits(pool.max_num_seqs, pool.max_step_tokens, pool.chunk_tokens, rank.max_context)
