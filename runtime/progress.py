"""How far prompts are computed, told by the steps to transfers that send KV early.

A request is known by the last block of its table, which no other request holds (a cached prefix may be shared, the last block
never is). On a GPU a transfer reads on the stream that computes, behind what was queued by then.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from runtime.batch import Segment
from runtime.comm.group import PeerLost


class Progress:
    """Of one prefill rank. Steps call `begin`, `layer` where KV leaves layer by layer, and `end`; transfers wait in threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._computed: dict[int, int] = {}  # tokens, by a table's last block
        self._going: dict[int, int] = {}  # the same at the end of the step under way
        self._parts, self._passed = 1, list[int]()
        self._closed = False

    def begin(self, segments: Sequence[Segment], parts: int = 1) -> None:
        """A step begins, in so many halves."""
        with self._changed:
            prompts = [s for s in segments if s.is_prefill]
            self._computed |= {int(s.blocks[-1]): s.start for s in prompts}
            self._going = {int(s.blocks[-1]): s.start + len(s.token_ids) for s in prompts}
            self._parts, self._passed = parts, []

    def layer(self, index: int) -> None:
        """One of the step's halves has stored the KV of a layer."""
        with self._changed:
            if not self._going:
                return
            self._passed += [0] * (index + 1 - len(self._passed))
            self._passed[index] += 1
            self._changed.notify_all()

    def end(self) -> None:
        """The step has stored all that it stores."""
        with self._changed:
            self._computed |= self._going
            self._going = {}
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing will be computed any more: who waits gets PeerLost."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait_for(self, blocks: Sequence[int], layer: int, more_than: int) -> int:
        """How many tokens' KV of a layer there is, as soon as it is more than so many."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._stored(blocks[-1], layer) > more_than)
            if self._closed:
                raise PeerLost("the formation is over")
            return self._stored(blocks[-1], layer)

    def _stored(self, last_block: int, layer: int) -> int:
        passed = layer < len(self._passed) and self._passed[layer] >= self._parts
        return (self._going if passed and last_block in self._going else self._computed).get(last_block, 0)
