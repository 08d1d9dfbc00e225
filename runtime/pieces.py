"""Prompts' attention as a list of pieces of work, which kernels read on the device: what changes from step to step is data, and
a captured launch serves any prompts whose list fits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

PIECE_ROWS = 128
"""Query rows of a piece: a kernel's tile."""


def pieces(lens: Sequence[int], keys: Sequence[int], rows: int = PIECE_ROWS) -> npt.NDArray[np.int32]:
    """Int32 [1 + W, 4] of sequences of `lens` query rows, the last of their `keys` positions: how many pieces there are, then a
    line for each piece of up to `rows` rows: its first row among all queries, its sequence's rows from there on, that
    sequence's first key among all keys, and its keys. Those that see most keys come first."""
    len_S, keys_S = np.asarray(lens, dtype=np.int64), np.asarray(keys, dtype=np.int64)
    count_S = -(-len_S // rows)
    seq_W = np.repeat(np.arange(len(len_S)), count_S)
    before_W = rows * (np.arange(len(seq_W)) - (np.cumsum(count_S) - count_S)[seq_W])
    left_W, keys_W = len_S[seq_W] - before_W, keys_S[seq_W]
    found = np.zeros((1 + len(seq_W), 4), dtype=np.int32)
    found[0, 0] = len(seq_W)
    columns = ((np.cumsum(len_S) - len_S)[seq_W] + before_W, left_W, (np.cumsum(keys_S) - keys_S)[seq_W], keys_W)
    order = np.argsort(-np.minimum(keys_W - left_W + rows, keys_W), kind="stable")
    found[1:] = np.stack(columns, -1)[order]
    return found


def most_pieces(rows: int, sequences: int) -> int:
    """Pieces that `sequences` sequences of `rows` query rows in all can have."""
    whole = max(0, rows - min(sequences, rows))
    return min(sequences, rows) + whole // PIECE_ROWS
