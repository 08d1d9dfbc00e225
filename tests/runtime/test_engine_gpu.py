"""Engines of two ranks with symmetric memory: decode steps of both in graphs of one size, experts that move meanwhile, and going
on without a rank that is lost while others' devices wait for it."""

from __future__ import annotations

import asyncio

import pytest
import torch

from runtime.frontend import Frontend
from runtime.mps import MpsUnavailable, share_gpu
from runtime.options import EngineOptions
from runtime.tiny import tiny_config
from runtime.types import SamplingParams
from twin.spec.hf import model_from_hf_config
from twin.spec.plan import Eplb, Plan, PoolPlan

LONG = 24
MODEL = model_from_hf_config(tiny_config("deepseek_v3", hidden=256, layers=3, experts=16, top_k=4, vocab=64, context=256), "tiny")
PROMPTS = [[(17 * i + 5 * j) % 60 for j in range(4 + 3 * i)] for i in range(4)]
POOL = {"role": "mixed", "dp": 2, "ep": 2, "comm": "symm", "redundant_experts": 2, "block_tokens": 16, "kv_blocks": 64,
        "max_num_seqs": 4, "max_batch_tokens": 64, "chunk_tokens": 32}


def run(plan: Plan, requests: int, **options: object) -> tuple[Frontend, list[list[int]]]:
    """Serve prompts, over and over, by a model of random weights; the engine as it was, and the tokens."""

    async def serve() -> tuple[Frontend, list[list[int]]]:
        frontend = Frontend(plan, MODEL, EngineOptions(device="cuda", record=True, **options))
        await frontend.start()
        try:
            async def ask(i: int) -> list[int]:
                params = SamplingParams(max_tokens=LONG, ignore_eos=True)
                return [event.token_id async for event in frontend.submit(PROMPTS[i % len(PROMPTS)], params)]

            return frontend, list(await asyncio.wait_for(asyncio.gather(*(ask(i) for i in range(requests))), 90))
        finally:
            await frontend.stop()

    return asyncio.run(serve())


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> object:
    """Both ranks on the GPU there is; a rank each where there are more."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if torch.cuda.device_count() > 1:
        yield
        return
    try:
        with share_gpu() as env:
            for name, value in env.items():
                monkeypatch.setenv(name, value)
            yield
    except MpsUnavailable as err:
        pytest.skip(str(err))


@pytest.mark.gpu
@pytest.mark.timeout(400)
@pytest.mark.parametrize("cut", [{}, {"dp": 1, "tp": 2}, {"tbo": True, "tbo_min_tokens": 2}], ids=str)
def test_two_ranks_decode_in_graphs(shared: object, cut: dict[str, object]) -> None:
    """Five requests over two ranks: sizes differ, one rank is idle in the end; or two TP ranks; or steps in halves. Rows are
    padded in graphs, which in bf16 may turn a near tie, after which all differs: first tokens are the same, and many others."""
    options = {"backend": "triton", "dtype": "bf16"}
    plan = Plan(pools=(PoolPlan(**{**POOL, **cut}),))
    captured, tokens = run(plan, 5, **options)
    plain, wanted = run(plan, 5, graphs=False, **options)
    assert any("graph" in step["parts"] for step in captured.records.steps)
    assert not any("graph" in step["parts"] for step in plain.records.steps)
    assert all(len(one) == LONG for one in tokens)
    same = sum(a == b for one, other in zip(tokens, wanted, strict=True) for a, b in zip(one, other, strict=True))
    assert same >= 0.25 * 5 * LONG
    assert all(one[0] == other[0] for one, other in zip(tokens, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.timeout(400)
def test_experts_move_under_captured_graphs(shared: object) -> None:
    """Graphs that were captured before look at where experts are by then: the answers to a prompt stay nearly the same. A step
    of this model is so short that only many of them win what a migration costs."""
    plan = Plan(pools=(PoolPlan(**{**POOL, "eplb": Eplb(window_steps=60, period_steps=120, budget_bytes=1 << 20)}),))
    engine, tokens = run(plan, 240, backend="triton", dtype="bf16")
    assert any(cycle["copies"] for cycle in engine.rebalances), engine.rebalances
    assert any("graph" in step["parts"] for step in engine.records.steps)
    firsts = [[one[:2] for one in tokens[i::len(PROMPTS)]] for i in range(len(PROMPTS))]
    agree = sum(max(map(one.count, one)) for one in firsts)
    assert agree >= 0.9 * len(tokens)


@pytest.mark.gpu
@pytest.mark.timeout(400)
@pytest.mark.parametrize("how", ["kill", "hang"])
def test_a_lost_rank_frees_the_device_of_the_other(shared: object, how: str) -> None:
    """fp32, so that tokens are those of one process. The survivor's device waits for the lost rank until it is called off (kill)
    or says who is missing (hang): long before its collectives' patience of a minute ends."""
    if torch.cuda.device_count() < 2:
        pytest.skip("a rank that is killed may take the others of a shared GPU along: needs two GPUs")
    one = PoolPlan(**{**POOL, "dp": 1, "ep": 1, "comm": "auto", "redundant_experts": 0})
    _, alone = run(Plan(pools=(one,)), 4)
    engine, tokens = run(Plan(pools=(PoolPlan(**POOL),)), 4, recover=True, faults=f"1:dispatch:{how}:40", timeout_s=3.0,
                         stall_timeout_s=5.0)
    assert tokens == alone
    assert [r.lost for r in engine.recoveries] == [(1,)]
    assert engine.recoveries[0].heard - engine.recoveries[0].noticed < 20
