"""An engine under load while faults strike it, with the clock running."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from runtime_checkpoints import Checkpoint

from runtime.frontend import Frontend
from runtime.options import EngineOptions
from runtime.recovery import Recovered
from runtime.types import SamplingParams
from twin.spec.errors import Overloaded
from twin.spec.plan import Plan, PoolPlan

POOL = {"block_tokens": 4, "kv_blocks": 64, "max_num_seqs": 4, "max_batch_tokens": 16, "chunk_tokens": 8}
REQUESTS, OUTPUT = 8, 24


def plan_of(*pools: dict[str, object]) -> Plan:
    return Plan(pools=tuple(PoolPlan(**{**POOL, **pool}) for pool in pools))


@dataclass(frozen=True)
class Story:
    """What came of a run: tokens by request, faults fired by seat, when each struck, recoveries, requests refused meanwhile,
    rebalancing cycles."""

    tokens: list[list[int]]
    fired: list[int]
    struck: dict[int, float]
    recoveries: list[Recovered]
    refused: int
    rebalances: list[dict[str, object]]


def run_with_faults(made: Checkpoint, plan: Plan, faults: str, **options: object) -> Story:
    """REQUESTS requests, begun shortly after one another, through whatever strikes; then one more, which must be right."""
    return asyncio.run(_run(made, plan, EngineOptions(checkpoint=str(made.folder), recover=True, faults=faults, **options)))


async def _run(made: Checkpoint, plan: Plan, options: EngineOptions) -> Story:
    frontend = Frontend(plan, made.model, options)
    await frontend.start()
    struck: dict[int, float] = {}
    watching = asyncio.create_task(_watch(frontend, plan.gpus, struck))
    refused = [0]

    async def ask(i: int) -> list[int]:
        await asyncio.sleep(0.02 * i)
        while True:
            try:
                params = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)
                return [event.token_id async for event in frontend.submit(made.prompts[i % 4], params)]
            except Overloaded as busy:
                assert busy.status == 503 and busy.retry_after_s > 0
                refused[0] += 1
                await asyncio.sleep(0.02)

    try:
        tokens = await asyncio.wait_for(asyncio.gather(*(ask(i) for i in range(REQUESTS))), 60)
        await asyncio.sleep(0.1)  # a fault at rest strikes now
        while frontend.stats().recovering:
            await asyncio.sleep(0.01)
        again = await asyncio.wait_for(ask(0), 30)
        assert again == tokens[0], "the engine must serve as before"
        fired = [frontend.faults_fired(seat) for seat in range(plan.gpus)]
        return Story(list(tokens), fired, struck, list(frontend.recoveries), refused[0], list(frontend.rebalances))
    finally:
        watching.cancel()
        await frontend.stop()


async def _watch(frontend: Frontend, seats: int, struck: dict[int, float]) -> None:
    """Note when each seat's first fault struck."""
    while True:
        for seat in range(seats):
            if seat not in struck and frontend.faults_fired(seat):
                struck[seat] = time.monotonic()
        await asyncio.sleep(0.002)
