"""Paged KV memory: which request holds which blocks, and what a prompt finds already computed.

Two managers share one set of rules. `BlockManager` deals in physical block ids, as a runtime needs them, and can keep
a prefix cache. `CountingBlocks` only counts, for simulations that ask millions of times.
A block holds the KV of `block_tokens` tokens. Tokens are counted from the start of a request; tables only grow until
`free`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from twin.spec.errors import SpecError

TokenIds = Sequence[int] | NDArray[np.int64]


class Blocks(ABC):
    """What every block manager does. `num_used` counts blocks of live requests; the rest are free."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        for field, value in (("num_blocks", num_blocks), ("block_tokens", block_tokens)):
            if value < 1:
                raise SpecError(f"is {value}", field=field, expected="at least 1")
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens

    @property
    @abstractmethod
    def num_free(self) -> int:
        """Blocks that a request could be given now."""

    @property
    def num_used(self) -> int:
        """Blocks that live requests hold; a shared block counts once."""
        return self.num_blocks - self.num_free

    @property
    def usage(self) -> float:
        """`num_used` as a fraction of all blocks, 0..1."""
        return self.num_used / self.num_blocks

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens fill, the last one perhaps in part."""
        return -(-tokens // self.block_tokens)

    @abstractmethod
    def held(self, request_id: int) -> int:
        """Length of the request's table, in blocks; 0 for a stranger."""

    def can_hold(self, request_id: int, tokens: int) -> bool:
        """Whether `reserve(request_id, tokens)` would succeed now."""
        return self.blocks_for(tokens) - self.held(request_id) <= self.num_free

    def reserve(self, request_id: int, tokens: int) -> bool:
        """Grow the request's table to hold `tokens` tokens. False, and nothing changed, when blocks are missing."""
        more = -(-tokens // self.block_tokens) - self.held(request_id)
        if more > self.num_free:
            return False
        if more > 0:
            self._take(request_id, more)
        return True

    def extend(self, request_ids: Iterable[int], more: Iterable[int]) -> None:
        """Append `more[i]` > 0 blocks to the table of each request; the caller knows that all of them are free."""
        for request_id, count in zip(request_ids, more, strict=True):
            self._take(request_id, count)

    def can_admit(self, request_id: int, tokens: int, token_ids: TokenIds | None = None, *, spare: int = 0) -> bool:
        """Whether `admit` would find its blocks now and leave `spare` blocks free. Changes nothing."""
        return self.blocks_for(tokens) - self.held(request_id) + spare <= self.num_free

    def admit(self, request_id: int, tokens: int, token_ids: TokenIds | None = None) -> int:
        """`match_prefix` and `reserve` as one act; the tokens found in the prefix cache.

        The caller has asked `can_admit`. `token_ids` may be shorter than `tokens`: a recompute knows its prompt's ids.
        """
        reserved = self.reserve(request_id, tokens)
        assert reserved, "admit without can_admit"
        return 0

    @abstractmethod
    def table(self, request_id: int) -> list[int]:
        """Physical block ids in the order of the tokens."""

    @abstractmethod
    def free(self, request_id: int) -> None:
        """Take all blocks from the request. A stranger holds none, so freeing it is no error."""

    def match_prefix(self, request_id: int, token_ids: TokenIds) -> int:
        """Adopt cached blocks at the start of a prompt; 0 where there is no prefix cache."""
        return 0

    def peek_prefix(self, token_ids: TokenIds) -> int:
        """Tokens that `match_prefix` would adopt, without adopting them."""
        return 0

    def commit(self, request_id: int, token_ids: TokenIds) -> None:  # noqa: B027 (optional: most managers cache nothing)
        """Offer the full blocks of computed tokens to later prompts; nothing where there is no prefix cache."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError where blocks were lost, dealt twice or miscounted. O(num_blocks)."""

    @abstractmethod
    def _take(self, request_id: int, more: int) -> None:
        """Append `more` blocks to the table; the caller has checked that they are free."""


class CountingBlocks(Blocks):
    """The same rules without block ids: every call is O(1). `table` raises TypeError."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        super().__init__(num_blocks, block_tokens)
        self._num_free = num_blocks
        self._held: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return self._num_free

    def held(self, request_id: int) -> int:
        return self._held.get(request_id, 0)

    def table(self, request_id: int) -> list[int]:
        raise TypeError("CountingBlocks keeps counts, not block ids; use BlockManager where ids are needed")

    def free(self, request_id: int) -> None:
        self._num_free += self._held.pop(request_id, 0)

    def check_integrity(self) -> None:
        used = sum(self._held.values())
        assert used + self._num_free == self.num_blocks, f"{used} used + {self._num_free} free != {self.num_blocks}"
        assert self._num_free >= 0 and all(count > 0 for count in self._held.values()), "a negative or empty holding"

    def _take(self, request_id: int, more: int) -> None:
        self._held[request_id] = self._held.get(request_id, 0) + more
        self._num_free -= more


class BlockManager(Blocks):
    """Physical blocks, dealt lowest id first from fresh. Without prefix cache each call is O(blocks it moves).

    With `prefix_cache`, full blocks are known by a hash chained from the start of the text, so that equal hashes mean
    equal prefixes. A cached block that nobody holds counts as free; it keeps its content until it is dealt again, least
    recently held first, the tail of a text before its head.
    """

    def __init__(self, num_blocks: int, block_tokens: int, prefix_cache: bool = False) -> None:
        super().__init__(num_blocks, block_tokens)
        self.prefix_cache = prefix_cache
        self.prefix_queried_tokens = 0
        self.prefix_hit_tokens = 0
        self._tables: dict[int, list[int]] = {}
        self._fresh = list(range(num_blocks - 1, -1, -1))
        self._refs = [0] * num_blocks if prefix_cache else []
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()  # cached blocks without holder, oldest first
        self._keys: dict[int, list[bytes]] = {}  # per request: chained hashes of its full blocks, as far as asked
        self._committed: dict[int, int] = {}  # per request: blocks already offered

    @property
    def num_free(self) -> int:
        return len(self._fresh) + len(self._unheld)

    def held(self, request_id: int) -> int:
        table = self._tables.get(request_id)
        return 0 if table is None else len(table)

    def table(self, request_id: int) -> list[int]:
        return list(self._tables.get(request_id, ()))

    def free(self, request_id: int) -> None:
        table = self._tables.pop(request_id, None)
        if self.prefix_cache:
            self._keys.pop(request_id, None)
            self._committed.pop(request_id, None)
        if table is None:
            return
        table.reverse()
        if not self.prefix_cache:
            self._fresh.extend(table)
            return
        for block in table:
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if block in self._key_of:
                    self._unheld[block] = None
                else:
                    self._fresh.append(block)

    def match_prefix(self, request_id: int, token_ids: TokenIds) -> int:
        """Adopt the cached blocks that start `token_ids`; the number of tokens they hold.

        Whole blocks only, and never the whole prompt: a model must compute at least one token to say the next one.
        The request must not hold blocks yet.
        """
        assert request_id not in self._tables, f"request {request_id} already holds blocks"
        if not self.prefix_cache:
            return 0
        found = self._cached_blocks(self._prompt_keys(request_id, token_ids))
        self._adopt(request_id, found, len(token_ids))
        return len(found) * self.block_tokens

    def peek_prefix(self, token_ids: TokenIds) -> int:
        if not self.prefix_cache:
            return 0
        keys = self._extend_keys([], token_ids, self._matchable(token_ids))
        return len(self._cached_blocks(keys)) * self.block_tokens

    def can_admit(self, request_id: int, tokens: int, token_ids: TokenIds | None = None, *, spare: int = 0) -> bool:
        if not self._may_match(request_id, token_ids):
            return super().can_admit(request_id, tokens, token_ids, spare=spare)
        assert token_ids is not None
        found = self._cached_blocks(self._prompt_keys(request_id, token_ids))
        revived = sum(1 for block in found if self._refs[block] == 0)
        return self.blocks_for(tokens) - len(found) + revived + spare <= self.num_free

    def admit(self, request_id: int, tokens: int, token_ids: TokenIds | None = None) -> int:
        cached = 0
        if self._may_match(request_id, token_ids):
            assert token_ids is not None
            cached = self.match_prefix(request_id, token_ids)
        super().admit(request_id, tokens)
        return cached

    def commit(self, request_id: int, token_ids: TokenIds) -> None:
        """Offer the full blocks of `token_ids` (all tokens computed so far, from the start) to later prompts.

        Of two equal blocks the first one offered serves; the other stays private. Costs O(blocks not yet offered).
        """
        table = self._tables.get(request_id)
        if not self.prefix_cache or table is None:
            return
        full = min(len(token_ids) // self.block_tokens, len(table))
        keys = self._extend_keys(self._keys.setdefault(request_id, []), token_ids, full)
        for i in range(self._committed.get(request_id, 0), full):
            block, key = table[i], keys[i]
            if key not in self._block_of and block not in self._key_of:
                self._block_of[key] = block
                self._key_of[block] = key
        self._committed[request_id] = max(full, self._committed.get(request_id, 0))

    def check_integrity(self) -> None:
        holders: dict[int, int] = {}
        for request_id, table in self._tables.items():
            assert table and len(set(table)) == len(table), f"request {request_id} has no block or one twice: {table}"
            for block in table:
                holders[block] = holders.get(block, 0) + 1
        free = [*self._fresh, *self._unheld]
        assert len(set(free)) == len(free), "a block is free twice"
        assert not holders.keys() & set(free), "a block is both free and held"
        assert len(holders) + len(free) == self.num_blocks, f"{len(holders)} held + {len(free)} free != all"
        if not self.prefix_cache:
            assert all(count == 1 for count in holders.values()), "a block has two holders without prefix cache"
            return
        assert all(self._refs[block] == holders.get(block, 0) for block in range(self.num_blocks)), "wrong ref count"
        assert all(block in self._key_of for block in self._unheld), "an unheld block without content"
        assert not any(block in self._key_of for block in self._fresh), "a fresh block with content"
        assert {block: key for key, block in self._block_of.items()} == self._key_of, "hash tables disagree"

    def _take(self, request_id: int, more: int) -> None:
        fresh = self._fresh
        while len(fresh) < more:
            block, _ = self._unheld.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
            fresh.insert(0, block)  # evicted blocks are dealt after the truly fresh ones
        new = fresh[-more:]
        del fresh[-more:]
        new.reverse()
        if self.prefix_cache:
            for block in new:
                self._refs[block] = 1
        self._tables.setdefault(request_id, []).extend(new)

    def _may_match(self, request_id: int, token_ids: TokenIds | None) -> bool:
        return self.prefix_cache and token_ids is not None and request_id not in self._tables

    def _matchable(self, token_ids: TokenIds) -> int:
        return max(0, len(token_ids) - 1) // self.block_tokens

    def _prompt_keys(self, request_id: int, token_ids: TokenIds) -> list[bytes]:
        """Kept with the request until it is freed, so that a prompt that waits long is hashed once."""
        full = self._matchable(token_ids)
        return self._extend_keys(self._keys.setdefault(request_id, []), token_ids, full)[:full]

    def _extend_keys(self, keys: list[bytes], token_ids: TokenIds, full: int) -> list[bytes]:
        if len(keys) < full:
            step = self.block_tokens
            ids = np.asarray(token_ids, dtype=np.int64)
            for i in range(len(keys), full):
                parent = keys[-1] if keys else b""
                keys.append(blake2b(parent + ids[i * step:(i + 1) * step].tobytes(), digest_size=16).digest())
        return keys

    def _cached_blocks(self, keys: list[bytes]) -> list[int]:
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def _adopt(self, request_id: int, found: list[int], asked_tokens: int) -> None:
        self.prefix_queried_tokens += asked_tokens
        self.prefix_hit_tokens += len(found) * self.block_tokens
        for block in found:
            self._refs[block] += 1
            self._unheld.pop(block, None)
        if found:
            self._tables[request_id] = list(found)
            self._committed[request_id] = len(found)
