"""Continuous batching on timelines worked out by hand."""

import numpy as np
import pytest

from twin.policy.batching import BatchLimits, BatchScheduler, PrefillChunk
from twin.policy.kv_blocks import BlockManager, CountingBlocks
from twin.spec.errors import SpecError


def scheduler(num_blocks=100, block_tokens=4, **limits):
    return BatchScheduler(BatchLimits(**{"max_seqs": 8, "max_batch_tokens": 16, "chunk_tokens": 16, **limits}),
                          CountingBlocks(num_blocks, block_tokens))


def run(batch, steps):
    """(prefill, decode, left) of each step."""
    log = []
    for _ in range(steps):
        plan = batch.schedule()
        left = batch.complete(plan)
        log.append(([(c.request_id, c.start, c.tokens) for c in plan.prefill], list(plan.decode), left))
    return log


def test_decodes_come_first_and_prompts_fill_the_budget():
    batch = scheduler()
    batch.add(1, 3, 4)
    batch.add(2, 20, 2)
    assert run(batch, 4) == [
        ([(1, 0, 3), (2, 0, 13)], [], []),
        ([(2, 13, 7)], [1], []),
        ([], [1, 2], [2]),
        ([], [1], [1]),
    ]
    assert batch.is_idle and batch.blocks.num_used == 0 and batch.waiting_tokens == 0


def test_contexts_are_listed_as_the_plan_lists_its_decodes():
    batch = scheduler()
    batch.add(1, 3, 9)
    run(batch, 3)
    batch.add(2, 6, 9)
    run(batch, 2)
    assert batch.schedule().decode == (1, 2) and batch.decode_contexts.tolist() == [7, 7]
    batch.add(3, 5, 9, computed_tokens=5, generated_tokens=1)
    assert batch.schedule().decode == (1, 2, 3) and batch.decode_contexts.tolist() == [7, 7, 5]


def test_chunk_limit_bounds_all_prompt_tokens_of_a_step():
    batch = scheduler(chunk_tokens=5)
    batch.add(1, 3, 1)
    batch.add(2, 9, 1)
    assert [step[0] for step in run(batch, 3)] == [[(1, 0, 3), (2, 0, 2)], [(2, 2, 5)], [(2, 7, 2)]]


def test_without_chunking_a_prompt_waits_until_it_fits_whole_and_nobody_overtakes():
    batch = scheduler(chunk_tokens=None)
    batch.add(1, 2, 3)
    batch.add(2, 15, 1)
    batch.add(3, 1, 1)
    assert run(batch, 4) == [
        ([(1, 0, 2)], [], []),
        ([(2, 0, 15)], [1], [2]),
        ([(3, 0, 1)], [1], [1, 3]),
        ([], [], []),
    ]


def test_prefill_first_never_mixes():
    batch = scheduler(prefill_first=True)
    batch.add(1, 4, 3)
    assert run(batch, 2) == [([(1, 0, 4)], [], []), ([], [1], [])]
    batch.add(2, 18, 1)
    assert run(batch, 3) == [([(2, 0, 16)], [], []), ([(2, 16, 2)], [], [2]), ([], [1], [1])]


def test_lower_priority_value_goes_first():
    batch = scheduler(max_seqs=1)
    for request_id, priority in ((1, 5), (2, 0), (3, 0)):
        batch.add(request_id, 4, 1, priority=priority)
    assert [step[2] for step in run(batch, 3)] == [[2], [3], [1]]


def test_last_arrived_is_preempted_and_recomputes_what_it_generated():
    batch = scheduler(num_blocks=4, block_tokens=2)
    batch.add(1, 3, 6)
    batch.add(2, 3, 4)
    run(batch, 2)  # both hold 2 blocks with 4 tokens stored; the next token needs a third
    plan = batch.schedule()
    assert plan.preempted == (2,) and plan.decode == (1,) and not plan.prefill
    assert batch.state(2).phase == "waiting" and batch.state(2).generated_tokens == 2
    assert batch.waiting_tokens == 5 and batch.state(2).preemptions == 1
    batch.complete(plan)
    # Its 5 known tokens need 3 blocks, which are free only after request 1 has left.
    assert run(batch, 4) == [([], [1], []), ([], [1], []), ([], [1], [1]), ([(2, 0, 5)], [], [])]
    assert batch.state(2).generated_tokens == 3
    assert run(batch, 1) == [([], [2], [2])]


def test_prompt_in_progress_is_preempted_before_an_older_decode():
    batch = scheduler(num_blocks=5, block_tokens=2, max_batch_tokens=8, chunk_tokens=2)
    batch.add(1, 2, 8)
    batch.add(2, 7, 1)
    run(batch, 1)
    plan = batch.schedule()  # 1 takes block 2; 2 cannot have its 4 blocks yet: 3 are free
    assert plan.decode == (1,) and not plan.prefill
    batch.cancel(2)
    batch.complete(plan)
    batch.add(3, 6, 1)
    assert run(batch, 1) == [([(3, 0, 2)], [1], [])]  # 3 holds the last 3 blocks
    plan = batch.schedule()
    assert plan.preempted == (3,) and batch.state(3).computed_tokens == 0
    assert batch.waiting_tokens == 6


def test_watermark_keeps_blocks_for_running_decodes_but_yields_when_nothing_runs():
    batch = scheduler(num_blocks=4, block_tokens=4, watermark=0.5)
    batch.add(1, 9, 4)
    batch.add(2, 4, 1)
    assert run(batch, 1) == [([(1, 0, 9)], [], [])]
    assert run(batch, 4)[-1] == ([(2, 0, 4)], [], [2])


def test_handed_over_request_decodes_at_once_in_blocks_reserved_before():
    batch = scheduler(num_blocks=3)
    assert batch.blocks.reserve(7, 8)
    batch.add(7, 8, 3, computed_tokens=8, generated_tokens=1)
    assert batch.waiting_tokens == 1
    assert run(batch, 2) == [([], [7], []), ([], [7], [7])]
    assert batch.blocks.num_used == 0 and batch.waiting_tokens == 0


def test_resumed_request_computes_its_known_tokens_again():
    batch = scheduler()
    batch.add(1, 5, 4, generated_tokens=2)
    assert run(batch, 2) == [([(1, 0, 7)], [], []), ([], [1], [1])]


def test_held_request_keeps_its_blocks_until_release():
    batch = scheduler(num_blocks=2)
    batch.add(1, 8, 1)
    plan = batch.schedule()
    assert batch.complete(plan, hold=True) == [1]
    assert batch.is_idle and batch.num_held == 1 and batch.blocks.num_free == 0
    assert batch.state(1).phase == "held"
    batch.add(2, 4, 1)
    assert batch.schedule().is_empty and not batch.is_idle
    batch.release(1)
    assert batch.num_held == 0
    assert batch.complete(batch.schedule(), hold=frozenset([1])) == [2]
    assert batch.blocks.num_free == 2
    with pytest.raises(ValueError, match="not held"):
        batch.release(2)


def test_stop_token_ends_prefill_and_decode():
    batch = scheduler()
    batch.add(1, 4, 9)
    batch.add(2, 4, 9)
    assert batch.complete(batch.schedule(), finished=[2]) == [2]
    assert batch.complete(batch.schedule(), finished=[1, 77]) == [1]
    assert batch.blocks.num_used == 0


def test_drafts_widen_decodes_and_accepted_tokens_count():
    batch = scheduler(max_seqs=2, max_batch_tokens=8)
    batch.add(1, 4, 10)
    batch.add(2, 4, 3)
    batch.complete(batch.schedule(draft_tokens=3))
    plan = batch.schedule(draft_tokens=3)
    assert plan.decode_tokens == (4, 2) and plan.total_tokens == 6  # request 2 may only give two more
    assert batch.complete(plan, accepted={1: 3, 2: 2}) == [2]
    assert batch.state(1).generated_tokens == 4 and batch.state(1).computed_tokens == 7


def test_drafts_shrink_to_the_budget_and_are_dropped_before_pre_empting():
    batch = scheduler(max_seqs=4, max_batch_tokens=7)
    for request_id in range(3):
        batch.add(request_id, 2, 10)
    batch.complete(batch.schedule())
    assert batch.schedule(draft_tokens=5).decode_tokens == (2, 2, 2)
    tight = scheduler(num_blocks=2, block_tokens=4)
    tight.add(1, 3, 4)
    tight.add(2, 3, 2)
    tight.complete(tight.schedule())
    plan = tight.schedule(draft_tokens=2)
    assert plan.decode_tokens == (1, 1) and not plan.preempted


def test_a_joining_decode_counts_against_the_budget_after_prompts_in_progress():
    batch = scheduler()
    batch.add(1, 40, 1)
    batch.complete(batch.schedule())
    batch.add(2, 4, 3, computed_tokens=4, generated_tokens=1)
    assert run(batch, 2) == [([(1, 16, 16)], [], []), ([(1, 32, 8)], [2], [1])]


def test_a_step_that_pre_empts_admits_nobody():
    batch = scheduler(num_blocks=4, block_tokens=2)
    batch.add(1, 3, 6)
    batch.add(2, 3, 4)
    run(batch, 2)
    batch.add(3, 1, 1, priority=-1)  # one block would be left for it
    plan = batch.schedule()
    assert plan.preempted == (2,) and not plan.prefill
    batch.complete(plan)
    assert batch.schedule().prefill == (PrefillChunk(3, 0, 1, True),)


def test_an_unchunked_prompt_that_decodes_keep_out_does_not_stop_leaps():
    batch = scheduler(chunk_tokens=None)
    batch.add(1, 2, 9)
    run(batch, 1)
    batch.add(2, 16, 1)
    assert batch.decode_only_steps() == 8 and batch.advance(8) == [1]
    assert batch.schedule().prefill_tokens == 16


def test_handed_over_kv_is_not_matched_again():
    batch = BatchScheduler(BatchLimits(4, 64, 64), BlockManager(20, 4, prefix_cache=True))
    prompt = list(range(10))
    batch.add(1, 10, 1, token_ids=prompt)
    run(batch, 1)
    batch.add(2, 10, 3, computed_tokens=10, generated_tokens=1, token_ids=prompt)
    plan = batch.schedule()
    assert plan.decode == (2,) and batch.state(2).computed_tokens == 10 and batch.waiting_tokens == 0
    assert batch.blocks.prefix_hit_tokens == 0


def test_cancelling_a_held_request_returns_its_blocks():
    batch = scheduler()
    batch.add(1, 4, 1)
    batch.complete(batch.schedule(), hold=True)
    assert batch.cancel(1) and batch.num_held == 0 and batch.num_waiting == 0 and batch.blocks.num_used == 0


def test_prefill_and_decode_instances_pass_every_token_on():
    prefill, decode = scheduler(num_blocks=12), scheduler(num_blocks=9)
    for request_id in range(6):
        prefill.add(request_id, 9 + request_id, 1)
    landed, done = [], []
    for _ in range(60):
        for request_id in prefill.complete(prefill.schedule(), hold=True):
            landed.append(request_id)
        if landed and decode.blocks.reserve(landed[0], 9 + landed[0]):
            request_id = landed.pop(0)
            decode.add(request_id, 9 + request_id, 4, computed_tokens=9 + request_id, generated_tokens=1)
            prefill.release(request_id)
        done += decode.complete(decode.schedule())
    assert sorted(done) == list(range(6)) and prefill.blocks.num_used == decode.blocks.num_used == 0


def test_landed_requests_that_wait_give_way_to_the_first():
    batch = scheduler(num_blocks=4, block_tokens=4)
    for request_id in (1, 2):
        assert batch.blocks.reserve(request_id, 8)
        batch.add(request_id, 8, 3, computed_tokens=8, generated_tokens=1)  # each needs a third block
    plan = batch.schedule()
    assert plan.decode == (1,) and plan.preempted == (2,)
    assert batch.state(2).computed_tokens == 0 and batch.waiting_tokens == 9
    batch.complete(plan)
    assert run(batch, 2) == [([], [1], [1]), ([(2, 0, 9)], [], [])]


def test_cancel_in_every_phase_and_while_a_step_runs():
    batch = scheduler(max_seqs=3, max_batch_tokens=8, chunk_tokens=8)
    for request_id, prompt in ((1, 2), (2, 2), (3, 20), (4, 4)):
        batch.add(request_id, prompt, 5)
    batch.complete(batch.schedule())
    plan = batch.schedule()
    assert plan.decode == (1, 2) and plan.prefill == (PrefillChunk(3, 4, 6, False),)
    assert [batch.cancel(request_id) for request_id in (4, 3, 1, 1)] == [True, True, True, False]
    assert batch.complete(plan) == []
    assert batch.state(2).generated_tokens == 2 and batch.waiting_tokens == 0
    assert (batch.num_running, batch.num_waiting) == (1, 0)
    batch.add(1, 2, 1)  # an id may come back
    assert run(batch, 1) == [([(1, 0, 2)], [2], [1])]


def test_a_plan_is_completed_once_and_an_abandoned_one_is_planned_again():
    batch = scheduler()
    batch.add(1, 4, 2)
    lost = batch.schedule()
    again = batch.schedule()
    assert lost == again
    with pytest.raises(ValueError, match="in flight"):
        batch.complete(lost)
    batch.complete(again)
    with pytest.raises(ValueError, match="in flight"):
        batch.complete(again)


def test_prefix_cache_shortens_the_second_prompt():
    batch = BatchScheduler(BatchLimits(4, 64, 64), BlockManager(20, 4, prefix_cache=True))
    prompt = np.arange(10)
    batch.add(1, 10, 1, token_ids=prompt)
    assert run(batch, 1) == [([(1, 0, 10)], [], [1])]
    batch.add(2, 10, 2, token_ids=prompt)
    assert batch.waiting_tokens == 10
    assert run(batch, 1) == [([(2, 8, 2)], [], [])]
    assert batch.waiting_tokens == 0 and batch.blocks.table(2)[:2] == [0, 1]
    batch.blocks.check_integrity()


@pytest.mark.parametrize(("request_args", "field"), [
    ((1, 0, 1), "prompt_tokens"), ((1, 1, 0), "max_new_tokens"), ((1, 30, 3), "KV cache"), ((1, 17, 1), "chunked"),
    ((1, 10, 15), "context"), ((9, 1, 1), "already here"),
])
def test_a_request_that_can_never_run_is_refused_at_once(request_args, field):
    batch = scheduler(num_blocks=7, chunk_tokens=None, max_context_tokens=24 if field == "context" else None)
    batch.add(9, 1, 1)
    with pytest.raises(SpecError, match=field):
        batch.add(*request_args)
    assert batch.num_waiting == 1


@pytest.mark.parametrize(("computed", "generated", "field"), [
    (8, 0, "computed_tokens"), (10, 2, "computed_tokens"), (0, 4, "generated_tokens"), (-1, 0, "computed_tokens"),
])
def test_impossible_progress_is_refused(computed, generated, field):
    with pytest.raises(SpecError, match=field):
        scheduler().add(1, 8, 4, computed_tokens=computed, generated_tokens=generated)


@pytest.mark.parametrize(("limits", "field"), [
    ({"max_seqs": 0}, "max_seqs"), ({"max_batch_tokens": 7}, "max_batch_tokens"), ({"chunk_tokens": 0}, "chunk_tokens"),
    ({"watermark": 1.0}, "watermark"), ({"watermark": float("nan")}, "watermark"),
])
def test_limits_that_cannot_work_are_refused(limits, field):
    with pytest.raises(SpecError, match=field):
        BatchLimits(**{"max_seqs": 8, "max_batch_tokens": 16, **limits})


def test_decode_only_steps_end_with_the_first_request_or_the_last_block():
    batch = scheduler(num_blocks=5, block_tokens=4)
    batch.add(1, 4, 12)
    batch.add(2, 4, 5)
    assert batch.decode_only_steps() == 0  # prompts come first
    run(batch, 1)
    assert batch.decode_only_steps() == 4
    assert batch.advance(4) == [2]
    assert batch.decode_only_steps() == 7 and batch.advance(0) == []
    batch.add(3, 16, 1)
    assert batch.decode_only_steps() == 7  # the new prompt needs 4 blocks and finds 3: nothing changes
    batch.add(4, 4, 1, priority=-1)
    assert batch.decode_only_steps() == 0
    with pytest.raises(ValueError, match="cannot advance"):
        batch.advance(1)


def test_decode_only_steps_stop_before_blocks_run_out():
    batch = scheduler(num_blocks=4, block_tokens=4)
    batch.add(1, 4, 12)
    batch.add(2, 4, 12)
    run(batch, 1)
    assert batch.decode_only_steps() == 4
    batch.advance(4)
    assert batch.blocks.num_free == 0 and batch.decode_only_steps() == 0
    assert batch.schedule().preempted == (2,)
