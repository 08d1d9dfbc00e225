"""Drafts without a model: a text often repeats itself (prompt lookup)."""

from __future__ import annotations

from collections.abc import Sequence


class Ngram:
    """Drafts for one request by looking its last tokens up in what came before (prompt lookup)."""

    SIZES = (3, 2)

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._seen = 0

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """`count` tokens that followed the last occurrence of the longest known ending, or none. `tokens` only grow."""
        for end in range(self._seen, len(tokens) - 1):
            for size in self.SIZES:
                if end + 1 >= size:
                    self._after[tuple(tokens[end + 1 - size:end + 1])] = end + 1
        self._seen = max(self._seen, len(tokens) - 1)
        for size in self.SIZES:
            start = self._after.get(tuple(tokens[-size:])) if len(tokens) >= size else None
            if start is not None:
                text = list(tokens[start:start + count])
                while len(text) < count:  # the ending overlaps itself: go on in the same rhythm
                    text.append(text[len(text) - (len(tokens) - start)])
                return text
        return []
