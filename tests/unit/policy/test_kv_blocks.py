"""Block managers on layouts worked out by hand."""

import numpy as np
import pytest

from twin.policy.kv_blocks import BlockManager, CountingBlocks
from twin.spec.errors import SpecError


@pytest.fixture(params=[BlockManager, CountingBlocks])
def blocks(request):
    return request.param(num_blocks=10, block_tokens=4)


def test_reserve_grows_by_whole_blocks_and_free_returns_them(blocks):
    assert [blocks.blocks_for(tokens) for tokens in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    assert blocks.reserve(7, 5) and blocks.held(7) == 2 and blocks.num_free == 8
    assert blocks.reserve(7, 8) and blocks.held(7) == 2
    assert blocks.reserve(7, 9) and blocks.held(7) == 3 and blocks.usage == 0.3
    blocks.check_integrity()
    blocks.free(7)
    blocks.free(7)
    assert blocks.num_used == 0
    blocks.check_integrity()


def test_reserve_is_all_or_nothing(blocks):
    assert blocks.reserve(1, 24)
    assert not blocks.can_hold(2, 17) and not blocks.reserve(2, 17)
    assert blocks.held(2) == 0 and blocks.num_free == 4
    assert blocks.can_hold(1, 40) and blocks.reserve(1, 40) and blocks.num_free == 0
    blocks.check_integrity()


def test_physical_ids_come_in_order_and_are_never_shared_without_a_prefix_cache():
    blocks = BlockManager(6, 2)
    blocks.reserve(1, 4)
    blocks.reserve(2, 2)
    blocks.reserve(1, 6)
    assert blocks.table(1) == [0, 1, 3] and blocks.table(2) == [2]
    blocks.free(1)
    assert blocks.table(1) == []
    blocks.reserve(3, 12)
    assert blocks.held(3) == 0  # five free, six asked
    blocks.reserve(3, 10)
    assert sorted(blocks.table(3)) == [0, 1, 3, 4, 5]


def test_counting_blocks_have_no_ids():
    with pytest.raises(TypeError, match="BlockManager"):
        CountingBlocks(4, 4).table(1)


@pytest.mark.parametrize("kind", [BlockManager, CountingBlocks])
@pytest.mark.parametrize(("num_blocks", "block_tokens", "field"), [(0, 4, "num_blocks"), (4, 0, "block_tokens")])
def test_sizes_below_one_are_refused(kind, num_blocks, block_tokens, field):
    with pytest.raises(SpecError, match=field):
        kind(num_blocks, block_tokens)


def test_prefix_is_shared_by_whole_blocks_and_never_the_whole_prompt():
    blocks = BlockManager(10, 4, prefix_cache=True)
    prompt = list(range(8))
    assert blocks.match_prefix(1, prompt) == 0
    blocks.reserve(1, 8)
    blocks.commit(1, prompt)
    # Both blocks are known, yet the last token must be computed: only the first is adopted.
    assert blocks.peek_prefix(prompt) == 4
    assert blocks.match_prefix(2, prompt) == 4
    assert blocks.match_prefix(3, [*prompt, 99]) == 8
    assert blocks.table(2) == blocks.table(1)[:1] and blocks.table(3) == blocks.table(1)
    assert blocks.num_used == 2
    blocks.check_integrity()
    blocks.free(1)
    assert blocks.num_used == 2
    blocks.free(2)
    blocks.free(3)
    assert blocks.num_used == 0 and blocks.peek_prefix([*prompt, 99]) == 8
    assert (blocks.prefix_queried_tokens, blocks.prefix_hit_tokens) == (8 + 8 + 9, 12)
    blocks.check_integrity()


def test_equal_block_after_another_text_is_no_match():
    blocks = BlockManager(10, 2, prefix_cache=True)
    blocks.reserve(1, 4)
    blocks.commit(1, [1, 2, 3, 4])
    assert blocks.peek_prefix([9, 9, 3, 4, 5]) == 0
    assert blocks.peek_prefix(np.array([1, 2, 9, 9, 5])) == 2


def test_the_longest_unused_tail_is_evicted_first():
    blocks = BlockManager(4, 2, prefix_cache=True)
    for request_id, text in ((1, [1, 1, 2, 2]), (2, [3, 3])):
        blocks.reserve(request_id, len(text))
        blocks.commit(request_id, text)
    blocks.free(1)
    blocks.free(2)
    assert blocks.num_free == 4
    blocks.reserve(3, 4)  # one fresh block is left, so one cached block goes: the tail of the first text
    assert blocks.peek_prefix([1, 1, 2, 2, 0]) == 2 and blocks.peek_prefix([3, 3, 0]) == 2
    blocks.check_integrity()
    blocks.reserve(3, 6)
    assert blocks.peek_prefix([1, 1, 2, 2, 0]) == 0 and blocks.peek_prefix([3, 3, 0]) == 2
    blocks.check_integrity()


def test_equal_texts_computed_at_the_same_time_keep_private_blocks():
    blocks = BlockManager(4, 2, prefix_cache=True)
    for request_id in (1, 2):
        blocks.reserve(request_id, 2)
        blocks.commit(request_id, [5, 5])
    assert blocks.table(1) != blocks.table(2)
    blocks.free(2)
    blocks.check_integrity()
    blocks.free(1)
    blocks.check_integrity()
    assert blocks.peek_prefix([5, 5, 5]) == 2


def test_an_id_that_comes_back_starts_afresh():
    blocks = BlockManager(6, 2, prefix_cache=True)
    for text in ([1, 1, 2, 2], [3, 3, 4, 4]):
        blocks.match_prefix(1, text)
        blocks.reserve(1, 4)
        blocks.commit(1, text)
        blocks.free(1)
        assert blocks.peek_prefix([*text, 0]) == 4


def test_admission_counts_revived_blocks_as_taken():
    blocks = BlockManager(3, 2, prefix_cache=True)
    blocks.reserve(1, 4)
    blocks.commit(1, [1, 1, 2, 2])
    blocks.free(1)
    ids = [1, 1, 2, 2, 3]
    assert blocks.can_admit(2, 6, ids) and not blocks.can_admit(2, 6, ids, spare=1) and not blocks.can_admit(2, 7, ids)
    assert blocks.num_free == 3
    assert blocks.admit(2, 6, ids) == 4 and blocks.num_free == 0
    blocks.check_integrity()
