"""Engines of several processes: the front end, lockstep ranks, PD separation, cancelling, failing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
from runtime_checkpoints import NEW_TOKENS, Checkpoint, Checkpoints
from runtime_worlds import draw_alone

from runtime.frontend import Frontend
from runtime.kv import kv_routes
from runtime.options import EngineOptions
from runtime.types import SamplingParams
from twin.spec.errors import RankFailed, SpecError
from twin.spec.plan import Plan, PoolPlan

POOL = {"block_tokens": 4, "kv_blocks": 64, "max_num_seqs": 4, "max_batch_tokens": 16, "chunk_tokens": 8}
GREEDY = SamplingParams(max_tokens=NEW_TOKENS)
SAMPLED = [SamplingParams(max_tokens=12, temperature=1.0, seed=5),
           SamplingParams(max_tokens=12, temperature=0.7, top_k=20, seed=6),
           SamplingParams(max_tokens=12, temperature=1.3, top_p=0.8, seed=7),
           SamplingParams(max_tokens=12, temperature=1.5, min_p=0.2, seed=8)]


def plan_of(*pools: dict[str, object]) -> Plan:
    return Plan(pools=tuple(PoolPlan(**{**POOL, **pool}) for pool in pools))


def with_engine(made: Checkpoint, plan: Plan, work: Callable[[Frontend], Awaitable[None]], **options: object) -> None:
    async def run() -> None:
        frontend = Frontend(plan, made.model, EngineOptions(checkpoint=str(made.folder), **options))
        await frontend.start()
        pids = frontend.rank_pids()
        try:
            await work(frontend)
        finally:
            await frontend.stop()
        assert not any(alive(pid) for pid in pids), "a rank outlived its engine"

    asyncio.run(run())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def tokens_of(frontend: Frontend, prompt: list[int], params: SamplingParams) -> list[int]:
    events = [event async for event in frontend.submit(prompt, params)]
    assert [e.index for e in events] == list(range(len(events)))
    assert [e.finish_reason for e in events[:-1]] == [None] * (len(events) - 1)
    return [event.token_id for event in events]


async def all_quiet(frontend: Frontend) -> None:
    """Nothing runs, waits or holds a block any more."""
    for _ in range(100):
        stats = frontend.stats()
        if not stats.running + stats.waiting and all(i.kv_usage == 0 and not i.running for i in stats.instances):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"not quiet: {frontend.stats()}")


async def sampled(frontend: Frontend, made: Checkpoint) -> list[list[int]]:
    return list(await asyncio.gather(*(tokens_of(frontend, made.prompts[i], p) for i, p in enumerate(SAMPLED))))


@torch.no_grad()
def drawn_alone(made: Checkpoint) -> list[list[int]]:
    plan = plan_of({"role": "mixed"})
    return [draw_alone(made.model, plan, str(made.folder), made.prompts[i], p) for i, p in enumerate(SAMPLED)]


@pytest.mark.parametrize("kv_send", ["engine", pytest.param("chunk", marks=pytest.mark.slow), "layer"])
def test_separated_pools_of_unlike_shape(checkpoints: Checkpoints, kv_send: str) -> None:
    """GQA prefill on TP 2 with EP 2, decode on DP 2 with EP 2: same tokens, every byte accounted for, no block lost, whatever
    of a prompt leaves before it is done."""
    made = checkpoints["qwen3_moe"]
    chunk = {} if kv_send == "engine" else {"chunk_tokens": 3}
    plan = plan_of({"role": "prefill", "tp": 2, "ep": 2, **chunk}, {"role": "decode", "dp": 2, "ep": 2})
    draws = drawn_alone(made)

    async def work(frontend: Frontend) -> None:
        asked, starts = [], frontend._handovers.starts
        frontend._handovers.starts = lambda flight, blocks: (asked.append(flight.prompt), starts(flight, blocks))
        outputs = await asyncio.gather(*(tokens_of(frontend, p, GREEDY) for p in made.prompts))
        assert list(outputs) == made.tokens
        await all_quiet(frontend)
        assert all(len(p) > 1 for p in asked) and bool(asked) == (kv_send != "engine"), "room is asked for early"
        kept = sum(len(p) for p in made.prompts)
        assert frontend.stats().kv_transfer_bytes == kept * made.model.kv_bytes_per_token("fp32")
        await cancelled_everywhere(frontend, made)
        assert await sampled(frontend, made) == draws, "sampling must not depend on cut or batch"
        await killed(frontend, made, rank=3)

    with_engine(made, plan, work, kv_send=kv_send)


async def cancelled_everywhere(frontend: Frontend, made: Checkpoint) -> None:
    """Cancel before, during and after the handover: streams end, blocks come back, others are not disturbed."""
    async def cut(after: int) -> None:
        stream = frontend.submit(made.prompts[2], SamplingParams(max_tokens=100, ignore_eos=True))
        for _ in range(after):
            await anext(stream)
        await stream.aclose()

    async def bystander() -> None:
        assert await tokens_of(frontend, made.prompts[0], GREEDY) == made.tokens[0]

    await asyncio.gather(bystander(), *(cut(n) for n in (0, 0, 1, 1, 2, 3, 9)))
    stream = frontend.submit(made.prompts[1], GREEDY)
    assert frontend.cancel(stream.request_id)
    assert not frontend.cancel(stream.request_id)
    events = [event async for event in stream]
    assert [e.finish_reason for e in events] == ["cancelled"]
    await all_quiet(frontend)


async def killed(frontend: Frontend, made: Checkpoint, rank: int) -> None:
    """SIGKILL one rank under load: every stream raises RankFailed that names it, within 10 s."""
    streams = [frontend.submit(made.prompts[i], SamplingParams(max_tokens=100, ignore_eos=True)) for i in range(4)]
    await anext(streams[0])
    began = time.monotonic()
    os.kill(frontend.rank_pids()[rank], signal.SIGKILL)
    for stream in streams:
        with pytest.raises(RankFailed, match=f"rank {rank} was killed by SIGKILL in phase [a-z]") as caught:
            async for _ in stream:
                pass
        assert caught.value.rank == rank
        assert caught.value.where
    assert time.monotonic() - began < 10
    with pytest.raises(RankFailed):
        frontend.submit(made.prompts[0], GREEDY)


def test_mixed_pool_in_lockstep(checkpoints: Checkpoints) -> None:
    """DP 2 with too few blocks for all: pre-empted requests resume from their tokens; a stopped rank is named."""
    made = checkpoints["qwen3_moe"]
    plan = plan_of({"role": "mixed", "dp": 2, "ep": 2, "kv_blocks": 16, "prefix_cache": True})
    draws = drawn_alone(made)

    async def work(frontend: Frontend) -> None:
        assert await tokens_of(frontend, made.prompts[0], GREEDY) == made.tokens[0], "one rank works, the other idles"
        for _ in range(60):  # falls asleep and wakes between any two: nobody may sleep through a request
            assert await tokens_of(frontend, made.prompts[1], SamplingParams(max_tokens=1)) == made.tokens[1][:1]
        many = [made.prompts[i % 4] for i in range(12)]
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        outputs = await asyncio.gather(*(tokens_of(frontend, p, params) for p in many))
        assert [o[:NEW_TOKENS] for o in outputs] == [made.tokens[i % 4] for i in range(12)]
        assert all(outputs[i] == outputs[i % 4] for i in range(12)), "the same prompt, the same greedy tokens"
        assert sum(f.preemptions for f in frontend.finished_flights) > 0, "the test means to pre-empt"
        await all_quiet(frontend)
        assert await sampled(frontend, made) == draws, "sampling must not depend on cut or batch"
        await refused(frontend, made)
        await stopped(frontend, made)

    with_engine(made, plan, work, record=True, timeout_s=2.0)


async def refused(frontend: Frontend, made: Checkpoint) -> None:
    """Requests that can never run are refused at once, and the engine goes on."""
    for prompt, params in (([], GREEDY), ([259], GREEDY), ([-1], GREEDY), ([3] * 60, SamplingParams(max_tokens=5))):
        with pytest.raises(SpecError):
            frontend.submit(prompt, params)
    stop = SamplingParams(max_tokens=NEW_TOKENS, stop_token_ids=(made.tokens[0][2],))
    events = [event async for event in frontend.submit(made.prompts[0], stop)]
    first = made.tokens[0].index(made.tokens[0][2])
    assert [e.token_id for e in events] == made.tokens[0][:first + 1]
    assert events[-1].finish_reason == "stop"


async def stopped(frontend: Frontend, made: Checkpoint) -> None:
    """SIGSTOP: only silence betrays it; the timeout plus a second is enough."""
    stream = frontend.submit(made.prompts[0], SamplingParams(max_tokens=30, ignore_eos=True))
    await anext(stream)
    began = time.monotonic()
    os.kill(frontend.rank_pids()[1], signal.SIGSTOP)
    with pytest.raises(RankFailed) as caught:
        async for _ in stream:
            pass
    assert caught.value.rank == 1, str(caught.value)
    assert time.monotonic() - began < 2.0 + 3.0


def test_a_checkpoint_that_lacks_a_tensor_is_bad_input(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """What a rank finds wrong with its input reaches the user as SpecError, and nothing stays behind."""
    made = checkpoints["qwen3_moe"]
    model = made.model.model_copy(update={"vocab": 300})

    async def run() -> Frontend:
        frontend = Frontend(plan_of({"role": "mixed"}), model, EngineOptions(checkpoint=str(made.folder)))
        with pytest.raises(SpecError, match=r"model\.embed_tokens\.weight.*\[259, 64\].*\[300, 64\]"):
            await frontend.start()
        return frontend

    frontend = asyncio.run(run())
    assert not any(alive(pid) for pid in frontend.rank_pids())


def test_ranks_under_torchrun(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Somebody else starts the ranks; the front end is the same."""
    made = checkpoints["deepseek_v3"]
    plan = plan_of({"role": "mixed", "tp": 2, "ep": 2})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
               "--master-port", str(_free_port()), "-m", "runtime.worker", str(tmp_path / "briefing.json")]

    async def run() -> None:
        frontend = Frontend(plan, made.model, EngineOptions(checkpoint=str(made.folder), external=str(tmp_path)))
        starting = asyncio.create_task(frontend.start())
        while not (tmp_path / "briefing.json").exists():
            await asyncio.sleep(0.01)
        ranks = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL,
                                                     env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"})
        await starting
        assert await tokens_of(frontend, made.prompts[0], GREEDY) == made.tokens[0]
        await frontend.stop()
        assert await asyncio.wait_for(ranks.wait(), 20) == 0

    asyncio.run(run())
    assert list(tmp_path.iterdir()) == []


def test_stopping_beside_ranks_that_stay_is_silent(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Ranks of somebody else may keep their connection open while the front end, and its loop, end."""
    complaints: list[dict[str, object]] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        options = EngineOptions(external=str(tmp_path), timeout_s=60.0)
        frontend = Frontend(plan_of({"role": "mixed"}), checkpoints["llama"].model, options)
        starting = asyncio.create_task(frontend.start())
        while not (tmp_path / "briefing.json").exists():
            await asyncio.sleep(0.01)
        rank.connect(str(tmp_path / "control"))
        for message in ({"ev": "hello"}, {"ev": "ready", "max_context": 8}):
            rank.send(json.dumps({"seat": 0, "formation": 0, **message}).encode() + b"\n")
        await starting
        await frontend.stop(grace_s=0.1)

    with socket.socket(socket.AF_UNIX) as rank:
        asyncio.run(run())
    assert not complaints


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


ORPHAN = """
import asyncio, sys
from runtime.frontend import Frontend
from runtime.options import EngineOptions
from twin.spec.load import load_model
from twin.spec.plan import Plan, PoolPlan
async def main():
    plan = Plan(pools=(PoolPlan(role="mixed", kv_blocks=8, block_tokens=4, max_num_seqs=2),))
    frontend = Frontend(plan, load_model(sys.argv[1]))
    await frontend.start()
    print(*frontend.rank_pids(), flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_ranks_do_not_outlive_a_killed_launcher(checkpoints: Checkpoints) -> None:
    made = checkpoints["llama"]
    with subprocess.Popen([sys.executable, "-c", ORPHAN, str(made.folder)], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        pids = [int(pid) for pid in launcher.stdout.readline().split()]
        assert pids
        assert all(alive(pid) for pid in pids)
        launcher.kill()
    until = time.monotonic() + 5
    while time.monotonic() < until and any(alive(pid) for pid in pids):
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(("source_tp", "target_tp"), [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2), (8, 2), (1, 8)])
def test_kv_routes_deliver_every_head_once(checkpoints: Checkpoints, source_tp: int, target_tp: int) -> None:
    from runtime.model.params import kv_head_slice
    model = checkpoints["qwen3_moe"].model
    for target in range(target_tp):
        need = kv_head_slice(model, target_tp, target)
        got: list[int] = []
        for route in kv_routes(model, source_tp, target_tp):
            if route.target == target:
                base = kv_head_slice(model, source_tp, route.source)[0]
                heads = [base + h for h in range(*route.source_heads)]
                assert [need[0] + h for h in range(*route.target_heads)] == heads, "heads must keep their places"
                got += heads
        assert got == list(range(*need))
    assert len(kv_routes(checkpoints["deepseek_v3"].model, source_tp, target_tp)) == target_tp


