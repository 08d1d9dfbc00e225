"""Small worlds of forked ranks over gloo, and a fixed schedule to drive models with: decode after chunked prefill."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from runtime import forward
from runtime.batch import Segment, halve, make_step
from runtime.clock import Clock
from runtime.loop import StepLoop
from runtime.options import EngineOptions
from runtime.rank import Rank, build_rank
from runtime.records import unpack_rows
from runtime.sampling import sample, uniform
from runtime.types import SamplingParams
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan

BLOCK = 4
CHUNK = 7


def fork_world(n: int, folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Run work(rank, *args) on n forked ranks with torch.distributed up; their results in order. Re-raises a failure."""
    context = multiprocessing.get_context("fork")
    store = folder / f"store-{len(list(folder.iterdir()))}"
    pipes, children = [], []
    for rank in range(n):
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(rank, n, store, send, work, args))
        child.start()
        send.close()
        pipes.append(receive)
        children.append(child)
    results = []
    try:
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(60), f"rank {rank} of {work.__name__} is silent"
            good, value = pipe.recv()
            assert good, f"rank {rank}: {value}"
            results.append(value)
    finally:
        for child in children:
            child.join(5)
            if child.is_alive():
                child.kill()
                child.join()
    return results


def _child(rank: int, n: int, store: Path, send: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(str(store), n), rank=rank, world_size=n,
                                timeout=timedelta(seconds=20))
        send.send((True, work(rank, *args)))
    except BaseException:
        send.send((False, traceback.format_exc()))
    finally:
        send.close()


def generate(rank_no: int, model: ModelSpec, plan: Plan, checkpoint: str | None, prompts: list[list[int]],
             new_tokens: int) -> tuple[dict[int, list[int]], dict[int, np.ndarray], int]:
    """Greedy tokens and per-token logits of this rank's prompts (DP ranks deal them out), and bytes sent to experts.

    Prompts are computed in chunks beside decodes, so that steps are mixed; ranks that are done run empty batches.
    """
    rank = build_rank(model, plan, EngineOptions(checkpoint=checkpoint), rank_no, lambda phase: None)
    dp, tp = rank.at.dp, rank.at.tp
    shares = [dict(list(enumerate(prompts))[d::dp]) for d in range(dp)]
    runs = [_Schedule(share, new_tokens) for share in shares]
    mine = runs[rank.at.dp_rank]
    logits: dict[int, list[torch.Tensor]] = {i: [] for i in mine.tokens}
    while any(run.left() for run in runs):
        plans = [run.step() for run in runs]
        capacity = max(1, *(-(-sum(len(s.token_ids) for _, s in p) // tp) for p in plans))
        here = plans[rank.at.dp_rank]
        out = rank.transformer.forward(make_step([s for _, s in here], BLOCK), rank.kv, capacity)
        asked = [i for i, s in here if s.wants_logits]
        for i, row in zip(asked, out, strict=True):
            logits[i].append(row)
        # every rank follows all schedules, so only lengths of other ranks' outputs are known: that is enough
        for d, run in enumerate(runs):
            wanted = [i for i, s in plans[d] if s.wants_logits]
            run.take({i: int(logits[i][-1].argmax()) if d == rank.at.dp_rank else 0 for i in wanted})
    return mine.output(), {i: torch.stack(rows).numpy() for i, rows in logits.items()}, rank.experts.sent_bytes


class _Schedule:
    """Sequence k starts k steps late; prompts go in chunks of CHUNK."""

    def __init__(self, prompts: dict[int, list[int]], new_tokens: int) -> None:
        self.tokens = {i: list(p) for i, p in prompts.items()}
        self._prompt = {i: len(p) for i, p in prompts.items()}
        self._done = dict.fromkeys(prompts, 0)
        self._new, self._clock = new_tokens, 0
        width = max((len(p) + new_tokens for p in prompts.values()), default=0) // BLOCK + 1
        # blocks interleaved over sequences, so that no table is contiguous
        self._tables = {i: [k * len(prompts) + n for k in range(width)] for n, i in enumerate(prompts)}

    def left(self) -> bool:
        return any(len(t) < self._prompt[i] + self._new for i, t in self.tokens.items())

    def step(self) -> list[tuple[int, Segment]]:
        decodes, prefills = [], []
        for n, (i, tokens) in enumerate(self.tokens.items()):
            done, prompt = self._done[i], self._prompt[i]
            if n > self._clock or len(tokens) >= prompt + self._new:
                continue
            if done < prompt:
                ids = tokens[done:min(done + CHUNK, prompt)]
                prefills.append((i, Segment(ids, done, self._tables[i], True, done + len(ids) == prompt)))
            else:
                decodes.append((i, Segment(tokens[-1:], len(tokens) - 1, self._tables[i])))
            self._done[i] = min(done + CHUNK, prompt) if done < prompt else done + 1
        self._clock += 1
        return decodes + prefills

    def take(self, tokens: dict[int, int]) -> None:
        for i, token in tokens.items():
            self.tokens[i].append(token)

    def output(self) -> dict[int, list[int]]:
        return {i: t[self._prompt[i]:] for i, t in self.tokens.items()}


@dataclass
class Served:
    """What one rank saw of requests served by its loop: outputs by request, drafts by place [made, stood], ids that lost
    their blocks, steps taken in two halves, step records."""

    outputs: dict[int, list[int]]
    drafts: list[list[int]]
    preempted: list[int]
    halved: int
    records: list[dict[str, Any]]


class _Script:
    """Stands in for the control channel: everything is said at once, and `stop` when the rank falls asleep."""

    formation = 0

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self._messages, self.sent = messages, list[dict[str, Any]]()

    def drain(self, *, wait: bool) -> list[dict[str, Any]]:
        said, self._messages = self._messages or ([{"op": "stop"}] if wait else []), []
        return said

    def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


def serve(rank_no: int, model: ModelSpec, plan: Plan, checkpoint: str | None,
          requests: list[tuple[list[int], SamplingParams]], fit: Callable[[Rank], Rank] = lambda rank: rank) -> Served:
    """Serve requests, dealt to the DP ranks, by the loop that engines run; seeds are the requests' numbers. `fit` may change
    the rank's equipment."""
    clock = Clock(None, rank_no)
    rank = fit(build_rank(model, plan, EngineOptions(checkpoint=checkpoint), rank_no, clock.mark))
    messages: list[dict[str, Any]] = [{"op": "wake", "wake": 1}]
    for i, (prompt, params) in enumerate(requests):
        if rank.at.is_leader and i % rank.at.dp == rank.at.dp_rank:
            messages.append({"op": "add", "id": i, "tokens": list(prompt), "prompt_len": len(prompt), "seed": i,
                             "params": asdict(params)})
    script, halved = _Script(messages), []
    forward.halve = lambda segments: halved.append(1) or halve(segments)  # type: ignore[func-returns-value]
    StepLoop(rank, script, clock, record=True).run()  # type: ignore[arg-type]
    served = Served({}, [[], []], [], len(halved), [])
    for message in script.sent:
        for request, token, _ in message.get("out", ()):
            served.outputs.setdefault(request, []).append(token)
        for total, step in zip(served.drafts, message.get("drafts", ()), strict=False):
            total.extend([0] * (len(step) - len(total)))
            for place, count in enumerate(step):
                total[place] += count
        served.preempted += message.get("preempted", ())
        served.records += [step for step in unpack_rows(message) if step["tokens"]] if message["ev"] == "records" else []
    return served


def draw_alone(model: ModelSpec, plan: Plan, checkpoint: str, prompt: list[int], params: SamplingParams) -> list[int]:
    """What a request draws in a world of one, its whole text computed anew for every token."""
    rank = build_rank(model, plan, EngineOptions(checkpoint=checkpoint), 0, lambda phase: None)
    tokens, table = list(prompt), list(range(len(prompt) + params.max_tokens))
    while len(tokens) < len(prompt) + params.max_tokens:
        step = make_step([Segment(tokens, 0, table, True)], plan.pools[0].block_tokens)
        logits = rank.transformer.forward(step, rank.kv, len(tokens))
        assert params.seed is not None
        tokens.append(int(sample(logits, [params], [uniform(params.seed, len(tokens) - len(prompt))])))
    return tokens[len(prompt):]
