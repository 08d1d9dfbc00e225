"""Whatever arrives: no token, block or request is lost, limits hold, everybody ends, and leaps equal steps."""

from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twin.policy.batching import BatchLimits, BatchScheduler
from twin.policy.kv_blocks import BlockManager, CountingBlocks

KINDS = ("counting", "paged", "cached")


def make_blocks(kind, num_blocks, block_tokens):
    if kind == "counting":
        return CountingBlocks(num_blocks, block_tokens)
    return BlockManager(num_blocks, block_tokens, prefix_cache=kind == "cached")


@st.composite
def worlds(draw):
    """A scheduler with tight limits and requests that all fit it alone: (scheduler, [add() keywords])."""
    block_tokens = draw(st.integers(1, 5))
    num_blocks = draw(st.integers(3, 14))
    room = num_blocks * block_tokens
    max_seqs = draw(st.integers(1, 6))
    chunk = draw(st.one_of(st.none(), st.integers(1, 12)))
    batch_tokens = draw(st.integers(max_seqs, 14)) if chunk else draw(st.integers(max(max_seqs, room), room + 9))
    limits = BatchLimits(max_seqs, batch_tokens, chunk, prefill_first=draw(st.booleans()),
                         watermark=draw(st.sampled_from([0.0, 0.1, 0.4])))
    batch = BatchScheduler(limits, make_blocks(draw(st.sampled_from(KINDS)), num_blocks, block_tokens))
    requests = []
    for request_id in range(draw(st.integers(1, 9))):
        prompt = draw(st.integers(1, room))
        new = draw(st.integers(1, min(12, room - prompt + 1)))
        request = {"request_id": request_id, "prompt_tokens": prompt, "max_new_tokens": new,
                   "priority": draw(st.integers(0, 1))}
        if new > 1 and draw(st.booleans()):
            request |= {"computed_tokens": draw(st.sampled_from([0, prompt // 2, prompt])), "generated_tokens": 1}
        else:
            request |= {"token_ids": [i // 3 % 2 for i in range(prompt)]}
        requests.append(request)
    return batch, requests


def arrive(batch, request, data):
    """Add a request; handed-over KV has its blocks already where there were some and its transfer reserved them."""
    if request.get("computed_tokens") and data.draw(st.booleans()):
        batch.blocks.reserve(request["request_id"], request["prompt_tokens"])
    batch.add(**request)


def check(batch, requests, left):
    """Everything that must hold between two calls."""
    batch.blocks.check_integrity()
    present = [r for r in requests if r["request_id"] not in left]
    states = {r["request_id"]: batch.state(r["request_id"]) for r in present}
    phases = [state.phase for state in states.values()]
    assert batch.num_waiting == phases.count("waiting")
    assert batch.num_held == phases.count("held")
    assert batch.num_running == phases.count("prefill") + phases.count("decode") <= batch.limits.max_seqs
    assert batch.waiting_tokens == sum(s.prompt_tokens + s.generated_tokens - s.computed_tokens
                                       for s in states.values() if s.phase in ("waiting", "prefill"))
    for request_id, state in states.items():
        if state.phase in ("prefill", "decode"):
            assert batch.blocks.held(request_id) * batch.blocks.block_tokens >= state.computed_tokens
        if state.phase == "decode":
            assert state.computed_tokens == state.prompt_tokens + state.generated_tokens - 1
        if state.phase == "waiting":  # only KV that was handed over may wait with its blocks
            assert batch.blocks.held(request_id) == 0 or state.computed_tokens > 0


def check_plan(batch, plan):
    limits = batch.limits
    assert plan.total_tokens <= limits.max_batch_tokens
    assert plan.prefill_tokens <= (limits.chunk_tokens or limits.max_batch_tokens)
    ids = [*plan.decode, *(chunk.request_id for chunk in plan.prefill)]
    assert len(set(ids)) == len(ids) <= limits.max_seqs
    assert not set(ids) & set(plan.preempted)
    if limits.prefill_first:
        assert not (plan.prefill and plan.decode)
    for chunk in plan.prefill:
        assert chunk.start == batch.state(chunk.request_id).computed_tokens and chunk.tokens >= 1
    for request_id, tokens in zip(plan.decode, plan.decode_tokens, strict=True):
        state = batch.state(request_id)
        stored = state.computed_tokens + tokens
        assert batch.blocks.held(request_id) * batch.blocks.block_tokens >= stored


@settings(max_examples=150, deadline=None)
@given(worlds(), st.data())
def test_every_request_ends_once_with_all_its_tokens(world, data):
    batch, requests = world
    to_come = list(requests)
    out = {r["request_id"]: r.get("generated_tokens", 0) for r in requests}
    goal = {r["request_id"]: r["max_new_tokens"] for r in requests}
    arrived, left, held = [], [], []
    for _ in range(2000):
        while to_come and (batch.is_idle or data.draw(st.booleans())):
            arrived.append(to_come.pop(0))
            arrive(batch, arrived[-1], data)
        plan = batch.schedule(data.draw(st.integers(0, 2)))
        check_plan(batch, plan)
        accepted = {i: data.draw(st.integers(1, width))
                    for i, width in zip(plan.decode, plan.decode_tokens, strict=True) if width > 1}
        for request_id in plan.decode:
            out[request_id] += accepted.get(request_id, 1)
        for chunk in plan.prefill:
            out[chunk.request_id] += chunk.is_last
        hold = [i for i in goal if i % 4 == 3]
        gone = batch.complete(plan, accepted=accepted, hold=hold)
        assert all(out[request_id] == goal[request_id] for request_id in gone)
        held += [request_id for request_id in gone if request_id in hold]
        left += gone
        if held and (plan.is_empty or data.draw(st.booleans())):
            batch.release(held.pop(0))
        check(batch, arrived, set(left) - set(held))
        if not to_come and batch.is_idle and not held:
            break
    assert sorted(left) == sorted(goal), "somebody never ended, or ended twice"
    assert batch.blocks.num_used == 0


@settings(max_examples=150, deadline=None)
@given(worlds(), st.data())
def test_advance_equals_that_many_steps(world, data):
    batch, requests = world
    to_come = list(requests)
    arrived, left = [], set()
    for _ in range(600):
        if to_come and (batch.is_idle or data.draw(st.booleans())):
            arrived.append(to_come.pop(0))
            arrive(batch, arrived[-1], data)
        phases = {r["request_id"]: batch.state(r["request_id"]).phase for r in arrived if r["request_id"] not in left}
        steps = batch.decode_only_steps()
        if steps:
            gone = check_leap(batch, steps, phases)
            assert gone or batch.decode_only_steps() == 0, "the leap could have been longer"
        else:
            plan = batch.schedule()
            decoding = {request_id for request_id, phase in phases.items() if phase == "decode"}
            same = set(plan.decode) == decoding and not plan.prefill and not plan.preempted
            assert not same or not decoding or "prefill" in phases.values(), "a leap was missed"
            gone = batch.complete(plan)
        left |= set(gone)
        check(batch, arrived, left)
        if not to_come and batch.is_idle:
            break
    assert batch.is_idle


def check_leap(batch, steps, present):
    """`advance(steps)` on the batch against single steps on a copy of it; the ids that left."""
    walker = deepcopy(batch)
    gone, plans = [], []
    for _ in range(steps):
        assert not gone, "a request ended before the last of the promised steps"
        plans.append(walker.schedule())
        gone += walker.complete(plans[-1])
    assert all(plan == plans[0] and not plan.prefill and not plan.preempted for plan in plans)
    assert batch.advance(steps) == gone
    for request_id in present.keys() - set(gone):
        assert batch.state(request_id) == walker.state(request_id)
        assert batch.blocks.held(request_id) == walker.blocks.held(request_id)
    assert batch.blocks.num_free == walker.blocks.num_free
    assert deepcopy(batch).schedule() == deepcopy(walker).schedule()
    return gone


@settings(max_examples=60, deadline=None)
@given(worlds(), st.data())
def test_cancel_at_any_moment_leaks_nothing(world, data):
    batch, requests = world
    for request in requests:
        arrive(batch, request, data)
    gone = set()
    for _ in range(2000):
        plan = batch.schedule()
        if data.draw(st.booleans()):
            victim = data.draw(st.sampled_from([r["request_id"] for r in requests]))
            assert batch.cancel(victim) == (victim not in gone)
            gone.add(victim)
        gone |= set(batch.complete(plan))
        check(batch, requests, gone)
        if batch.is_idle:
            break
    assert gone == {r["request_id"] for r in requests} and batch.blocks.num_used == 0


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_blocks_are_conserved_after_every_call(kind, data):
    blocks = make_blocks(kind, data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4)))
    texts = {}
    for _ in range(data.draw(st.integers(1, 40))):
        request_id = data.draw(st.integers(0, 3))
        act = data.draw(st.sampled_from(["reserve", "free", "match", "commit"]))
        if act == "reserve":
            tokens = data.draw(st.integers(0, 20))
            could, before = blocks.can_hold(request_id, tokens), blocks.num_free
            held = blocks.held(request_id)
            assert blocks.reserve(request_id, tokens) == could
            grown = blocks.held(request_id) - held
            assert grown == (max(0, blocks.blocks_for(tokens) - held) if could else 0)
            assert blocks.num_free == before - grown
        elif act == "free":
            blocks.free(request_id)
            texts.pop(request_id, None)
            assert blocks.held(request_id) == 0
        elif act == "match" and not blocks.held(request_id):
            blocks.free(request_id)
            text = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=16))
            peeked = blocks.peek_prefix(text)
            assert blocks.match_prefix(request_id, text) == peeked < len(text)
            assert peeked % blocks.block_tokens == 0
            texts[request_id] = text
        elif act == "commit" and request_id in texts:
            blocks.commit(request_id, texts[request_id])
        blocks.check_integrity()
