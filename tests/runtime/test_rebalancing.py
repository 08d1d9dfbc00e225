"""Moving experts while serving: decisions, and the same tokens whatever moves when."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from runtime_checkpoints import NEW_TOKENS, Checkpoints

from runtime.clock import Clock
from runtime.eplb import _pack, _unpack, experts_s
from runtime.frontend import Frontend
from runtime.options import EngineOptions
from runtime.rebalance import Seen, decide
from runtime.types import SamplingParams
from twin.policy.migration import copies
from twin.policy.placement import Placement, linear, max_over_mean, slots_to_ranks
from twin.policy.replica_split import split_over_replicas
from twin.spec.plan import Eplb, Plan, PoolPlan

POOL = {"role": "mixed", "block_tokens": 4, "kv_blocks": 64, "max_num_seqs": 4, "max_batch_tokens": 16, "chunk_tokens": 8}


def skewed(layers: int, experts: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(4.0, 1.2, (layers, experts)).round()


def pool_of(**more: object) -> PoolPlan:
    return PoolPlan(**{**POOL, "dp": 4, "ep": 4, "redundant_experts": 4, "eplb": Eplb(window_steps=10, period_steps=100), **more})


def test_a_better_placement_pays_or_it_does_not() -> None:
    """The decision moves when steps ahead win more than copies cost, and says what it did."""
    load, now = skewed(3, 16), linear(3, 16, 4, 4)
    seen = Seen(load, experts_s=4.0, steps=10, moved_bytes=0.0, moving_s=0.0)
    made = decide(seen, now, pool_of(), 1, 1 << 20, ranks=4)
    assert made.layers
    assert made.imbalance_after < 1.1 < made.imbalance_before
    assert made.gain_s_per_step == pytest.approx(0.1 * (made.imbalance_before - made.imbalance_after))
    ranks_LR = slots_to_ranks(split_over_replicas(load, made.placement), made.placement)
    assert max_over_mean(ranks_LR).mean() == pytest.approx(made.imbalance_after)
    slow = Seen(load, experts_s=4.0, steps=10, moved_bytes=1e3, moving_s=1e3)
    stays = decide(slow, now, pool_of(), 1, 1 << 20, ranks=4)
    assert not stays.layers
    assert stays.placement == now
    assert stays.cost_s > stays.gain_s_per_step * 100
    again = decide(seen, made.placement, pool_of(), 1, 1 << 20, ranks=4)
    assert not again.layers, "nothing is left to gain"


def test_steps_in_graphs_count_by_the_share_that_others_saw() -> None:
    clock = Clock(None, 0)
    assert experts_s(clock) == 0.0
    clock._spent = {"graph": 5.0, "sample": 9.0}
    assert experts_s(clock) == 0.0, "nothing tells how much of it were experts"
    clock._spent |= {"experts": 1.0, "attention": 2.0, "dispatch": 1.0}
    assert experts_s(clock) == pytest.approx(1.0 + 5.0 / 4)


def test_copies_come_from_where_the_expert_is() -> None:
    old = Placement(np.array([[0, 1, 2, 3, 0, 1]]), 3)
    found = copies(old, 0, ((1, 3), (2, 0), (5, 1)))
    assert (found[0].source_slot, found[0].source, found[0].target_slot, found[0].target) == (3, 1, 1, 0)
    assert all(old.slot_to_logical[0, c.source_slot] == c.expert for c in found)
    assert found[2].source_slot == 5, "the rank itself has it"


@pytest.mark.parametrize("shape", [pytest.param({"dp": 2, "ep": 2}, id="dp2"),
                                   pytest.param({"dp": 2, "tp": 2, "ep": 2, "comm": "ag_rs"}, id="tp2", marks=pytest.mark.slow)])
def test_the_same_tokens_while_experts_move(checkpoints: Checkpoints, shape: dict[str, object]) -> None:
    """Many cycles, each spread over many steps by a small budget, while requests come and go: no token changes."""
    made = checkpoints["deepseek_v3"]
    eplb = Eplb(window_steps=4, period_steps=4, budget_bytes=9000)
    plan = Plan(pools=(PoolPlan(**{**POOL, "redundant_experts": 2, "eplb": eplb, **shape}),))

    async def run() -> list[dict[str, object]]:
        frontend = Frontend(plan, made.model, EngineOptions(checkpoint=str(made.folder)))
        await frontend.start()
        try:
            for _ in range(6):
                asked = [frontend.submit(p, SamplingParams(max_tokens=NEW_TOKENS)) for p in made.prompts]
                assert [[e.token_id async for e in stream] for stream in asked] == made.tokens
        finally:
            await frontend.stop()
        return frontend.rebalances

    cycles = asyncio.run(run())
    moved = [c for c in cycles if c["copies"]]
    assert moved, "the test means experts to move"
    assert any(c["last_round"] - c["first_round"] > 4 for c in moved), "and requests to be served meanwhile"
    assert all(c["imbalance_after"] < c["imbalance_before"] for c in moved)


def test_rows_of_bytes_come_back(checkpoints: Checkpoints) -> None:
    parts = [torch.randn(3, 5), torch.randn(4).bfloat16(), torch.randint(0, 9, (2, 2))]
    empty = [torch.zeros_like(part) for part in parts]
    _unpack(_pack(parts), empty)
    assert all(torch.equal(a, b) for a, b in zip(parts, empty, strict=True))
