"""How one decode step of latent attention is cut into programs: the runtime launches what `choose_cut` says, the cost model
counts the same rounds.

A program covers one block of heads of one sequence, or of one split of it, and has a multiprocessor to itself. Programs run in
rounds of as many as there are multiprocessors, and a last round takes as long as a full one however few are in it. So the
sequences that fill whole rounds are left whole, and only those that remain are cut along their context: they lie in a round of
short programs, and they alone are merged. Where nothing fills a round, all are cut.

Words: a tile is 64 tokens of context, a block the heads that a program serves. Seconds are those of an H200
(benchmarks/results/h200-eptwin.points.json, `mla_decode`): least squares of the relative error over the points that are not
split, 16 to 38 a kernel, 0.6, 0.5 and 2.7% off in the median. Ratios of them are what matters, so they serve other GPUs too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike

Array = npt.NDArray[np.float64]

TILE_TOKENS = 64
LATENT = 512  # columns of a program's result


@dataclass(frozen=True)
class Kernel:
    """Seconds of a launch, of a program beside its tiles (query, first tile, result), and of a tile."""

    launch_s: float
    program_s: float
    tile_s: float


KERNELS = {16: Kernel(3.3e-6, 4.8e-6, 2.35e-6), 32: Kernel(2.3e-6, 7.5e-6, 3.27e-6), 64: Kernel(6.3e-6, 10.4e-6, 2.32e-6)}
"""By the heads of a block. Tiles take as long alone as among 132 (1 and 4 sequences of 65,536 tokens: 2.3 to 2.6 us)."""

# Splits add parts in fp32 that are written and read again. Same file, what a split batch takes over its rounds: 512 rows (4
# sequences of 128 heads) 2.2 us, 4,096 rows 9.4 us, of as many bytes, which stay in L2; what does not goes at the rate that
# h200_operators.json reads with. Of the merge before this one, so that the whole is told too long:
# by 4% in the median of twelve shapes, by 17 and 21% where few sequences are split (h200_mla_splits.json).
_MERGE_LAUNCH_S = 2.2e-6
_MERGE_ROW_S = 1.8e-9
_L2_BYTES, _BYTES_PER_S = 50e6, 4.5e12
_FEW, _MOST = 16, 64
_WORTH = 0.97  # of the seconds: a smaller gain is within what these constants are off
_LEAST_CONTEXT = 1024  # of the contexts that a choice is made for


@dataclass(frozen=True)
class Cut:
    """The first `whole` sequences are not cut, the others into `splits` each. 1 split: all are whole."""

    whole: int
    splits: int


@dataclass(frozen=True)
class Shape:
    """Heads of a rank, and programs that run at a time (multiprocessors)."""

    heads: int
    slots: int

    @property
    def block_heads(self) -> int:
        return block_heads(self.heads)

    @property
    def blocks(self) -> int:
        """Programs of a whole sequence."""
        return -(-self.heads // self.block_heads)


def block_heads(heads: int) -> int:
    """Heads of a program: 16 or 32 where that is all, else 64."""
    return next((block for block in (16, 32) if heads <= block), 64)


def seconds(shape: Shape, sequences: ArrayLike, tokens: ArrayLike, whole: ArrayLike, splits: ArrayLike) -> Array:
    """What a cut takes: whole rounds, rounds of splits, merge. Sequences of `tokens` each; arrays broadcast."""
    kernel, splits = KERNELS[shape.block_heads], np.asarray(splits)
    rest, tiles = np.asarray(sequences, float) - whole, np.ceil(np.asarray(tokens) / TILE_TOKENS)
    rounds = _rounds(shape, np.asarray(whole))
    short = _rounds(shape, rest * splits)
    rows = rest * shape.heads
    beyond_l2 = rows * LATENT * (8.0 * splits + 2.0) - _L2_BYTES
    merge = _MERGE_LAUNCH_S + np.maximum(rows * _MERGE_ROW_S, beyond_l2 / _BYTES_PER_S)
    merge = np.where((splits > 1) & (rest > 0), merge, 0.0)
    return np.asarray(kernel.launch_s + rounds * (kernel.program_s + tiles * kernel.tile_s) +
                      short * (kernel.program_s + np.ceil(tiles / splits) * kernel.tile_s) + merge)


def filling(shape: Shape, sequences: ArrayLike, tokens: ArrayLike) -> npt.NDArray[np.int64]:
    """Splits with which programs fill the multiprocessors once."""
    fits = shape.slots // np.maximum(np.asarray(sequences, float) * shape.blocks, 1.0)
    return np.asarray(np.clip(np.minimum(fits, np.ceil(np.asarray(tokens) / TILE_TOKENS)), 1, _MOST), np.int64)


def in_full_rounds(shape: Shape, sequences: ArrayLike) -> Array:
    """Sequences in rounds that are full."""
    programs = np.asarray(sequences, float) * shape.blocks
    return np.asarray(np.floor(programs / shape.slots) * shape.slots // shape.blocks, float)


@lru_cache(maxsize=4096)
def choose_cut(sequences: int, heads: int, max_context: int, slots: int) -> Cut:
    """The cut of the least seconds, as the mean over contexts of `max_context`, half, a quarter, ... down to 1,024 tokens; the
    one that fills the device once unless another gains more than 3%.

    Reads no device value: a graph is captured for the longest context that it can have, and what comes is shorter. A split is
    a share of a sequence's own length, so sequences of other lengths, or padding of none, are right with any cut.
    """
    shape = Shape(heads, slots)
    contexts = [float(max_context)]
    while contexts[-1] >= 2 * _LEAST_CONTEXT:
        contexts.append(contexts[-1] / 2)
    whole = int(in_full_rounds(shape, sequences))
    choices = np.unique(np.minimum(_choices(shape, sequences - whole, max_context), max(1, -(-max_context // TILE_TOKENS))))
    today = int(filling(shape, sequences, max_context))
    each = _mean_log_s(shape, sequences, contexts, whole, choices)
    now = _mean_log_s(shape, sequences, contexts, whole, np.array([today]))[0]
    best = int(choices[each.argmin()]) if each.min() < now + np.log(_WORTH) else today
    return Cut(sequences, 1) if best == 1 or whole == sequences else Cut(whole, best)


def chosen_over_measured(shape: Shape, sequences: Array, tokens: Array) -> Array:
    """Seconds of what is chosen for exactly these contexts, over those that a table tells which was measured with batches of
    powers of two, cut as they are chosen: beyond one round those batches fill theirs but for a few multiprocessors, and what lies
    between them follows in proportion to programs. Elementwise."""
    whole, now = in_full_rounds(shape, sequences), filling(shape, sequences, tokens)[None]
    each = seconds(shape, sequences, tokens, whole, np.concatenate([now, _choices(shape, sequences - whole, tokens)]))
    least, today = each.min(axis=0), each[0]
    chosen = np.where(least < today * _WORTH, least, today)
    kernel, tiles = KERNELS[shape.block_heads], np.ceil(tokens / TILE_TOKENS)
    programs, power = sequences * shape.blocks, 2.0 ** np.floor(np.log2(shape.slots))
    beyond = kernel.launch_s + programs / power * (kernel.program_s + tiles * kernel.tile_s)
    return np.asarray(np.where(programs > shape.slots, chosen / beyond, 1.0))


def _mean_log_s(shape: Shape, sequences: int, contexts: list[float], whole: int, splits: npt.NDArray[np.int64]) -> Array:
    """[choice] -> [choice]"""
    return np.asarray(np.log(seconds(shape, sequences, contexts, whole, splits[:, None])).mean(axis=1))


def _choices(shape: Shape, rest: ArrayLike, tokens: ArrayLike) -> npt.NDArray[np.int64]:
    """Splits worth a look [choice, ...]: few, and those that make one round of the remaining sequences."""
    once = filling(shape, rest, tokens)
    few = np.arange(1, _FEW + 1).reshape(-1, *[1] * once.ndim)
    return np.concatenate([np.broadcast_to(few, (_FEW, *once.shape)), once[None]])


def _rounds(shape: Shape, sequences: Array) -> Array:
    return np.asarray(np.ceil(sequences * shape.blocks / shape.slots - 1e-9))
