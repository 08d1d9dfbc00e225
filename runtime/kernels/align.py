"""Which (token, choice) rows each expert gets, computed on the device in one launch (two for long prompts).

Shapes: T tokens, K choices a token, N = T*K rows (row = token*K + choice), E local experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_HISTOGRAM_ROWS = 8192
"""Up to here every program counts all experts itself; above, a counting launch comes first."""
_MAX_SEGMENTS = 8
"""Pieces that a long list of rows is cut into, each placed by a program of its own."""


@dataclass(frozen=True)
class Alignment:
    """Rows sorted by expert, each expert's share padded to whole blocks of `block_m` rows.

    `sorted_rows` [P] int32: row numbers; N marks padding. `expert_ids` [P / block_m] int32: the local expert of a block.
    `num_padded` [1] int32: how many of the P entries are used; entries past it are not written.
    `ends` [E] int32: where each expert's padded share ends. `direct`: block b is row b alone, whose id is expert_ids[b],
    be it local or not; the other tensors say nothing.
    """

    sorted_rows: torch.Tensor
    expert_ids: torch.Tensor
    num_padded: torch.Tensor
    ends: torch.Tensor
    block_m: int
    direct: bool = False


def align_rows_alone(topk_ids_TK: torch.Tensor, block_m: int) -> Alignment:
    """A block a row, which needs no launch: for so few rows that they seldom meet at an expert."""
    ids = topk_ids_TK.flatten()
    return Alignment(ids, ids, ids, ids, block_m, direct=True)


def align(
    topk_ids_TK: torch.Tensor, num_experts: int, block_m: int, expert_map: torch.Tensor | None = None
) -> Alignment:
    """Sort rows by expert, stable in row number, without a host sync.

    `expert_map` [any] int32 takes an id of `topk_ids_TK` to a local expert, or to -1 when it lives elsewhere; ids that
    fall outside 0..num_experts-1 (after the map) or outside the map are skipped. `block_m` is a power of two.
    """
    assert topk_ids_TK.dtype == torch.int32 and topk_ids_TK.is_contiguous()
    assert block_m & (block_m - 1) == 0
    rows, device = topk_ids_TK.numel(), topk_ids_TK.device
    padded = max_padded_rows(rows, num_experts, block_m)
    empty = lambda n: torch.empty(n, dtype=torch.int32, device=device)  # noqa: E731
    out = Alignment(empty(padded), empty(padded // block_m), empty(1), empty(num_experts), block_m)
    counted = rows > _HISTOGRAM_ROWS
    block_n = min(2048 if counted else 1024, triton.next_power_of_2(max(rows, 16)))
    segments = min(_MAX_SEGMENTS, triton.next_power_of_2(triton.cdiv(rows, block_n))) if counted else 1
    counts = empty(num_experts * segments) if counted else out.ends
    common = {"HAS_MAP": expert_map is not None, "SEGMENTS": segments, "BLOCK_N": block_n, "num_warps": 8 if counted else 4}
    map_, map_size = (expert_map, expert_map.numel()) if expert_map is not None else (topk_ids_TK, 0)
    if counted:
        _count_kernel[(num_experts, segments)](topk_ids_TK, map_, counts, rows, map_size, **common)
    _align_kernel[(num_experts, segments)](
        topk_ids_TK, map_, counts, out.sorted_rows, out.expert_ids, out.num_padded, out.ends,
        rows, map_size, num_experts,
        BLOCK_M=block_m, BLOCK_E=max(triton.next_power_of_2(num_experts), 16), COUNTED=counted, **common,
    )  # fmt: skip
    return out


def max_padded_rows(rows: int, num_experts: int, block_m: int) -> int:
    """The most entries that `align` can use: no expert pads more than block_m - 1 rows, no empty expert pads."""
    return -(-(rows + min(rows, num_experts) * (block_m - 1)) // block_m) * block_m


@triton.jit
def _local_ids(ids, map_, start, rows, map_size, HAS_MAP: tl.constexpr, BLOCK_N: tl.constexpr):
    row = start + tl.arange(0, BLOCK_N)
    local = tl.load(ids + row, mask=row < rows, other=-1)
    if HAS_MAP:
        known = (local >= 0) & (local < map_size)
        local = tl.load(map_ + local, mask=known, other=-1)
    return row, local


@triton.jit
def _segment(rows, segment, SEGMENTS: tl.constexpr, BLOCK_N: tl.constexpr):
    share = tl.cdiv(tl.cdiv(rows, SEGMENTS), BLOCK_N) * BLOCK_N
    return segment * share, tl.minimum(segment * share + share, rows)


@triton.jit(do_not_specialize=["rows"])
def _count_kernel(
    ids, map_, counts, rows, map_size, HAS_MAP: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_N: tl.constexpr
):
    expert, segment = tl.program_id(0), tl.program_id(1)
    total = tl.zeros([BLOCK_N], tl.int32)
    lo, hi = _segment(rows, segment, SEGMENTS, BLOCK_N)
    for start in range(lo, hi, BLOCK_N):
        _, local = _local_ids(ids, map_, start, rows, map_size, HAS_MAP, BLOCK_N)
        total += (local == expert).to(tl.int32)
    tl.store(counts + expert * SEGMENTS + segment, tl.sum(total))


@triton.jit(do_not_specialize=["rows"])
def _align_kernel(
    ids, map_, counts, sorted_rows, expert_ids, num_padded, ends, rows, map_size, num_experts,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MAP: tl.constexpr, COUNTED: tl.constexpr,
    SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Program (e, s) places expert e's rows of segment s: no atomics, so the order is the same every time."""
    expert, segment = tl.program_id(0), tl.program_id(1)
    experts = tl.arange(0, BLOCK_E)
    earlier = 0  # rows of this expert in earlier segments
    if COUNTED:
        s = tl.arange(0, SEGMENTS)
        part = tl.load(
            counts + experts[:, None] * SEGMENTS + s[None, :], mask=(experts < num_experts)[:, None], other=0
        )
        count = tl.sum(part, 1)
        earlier = tl.sum(tl.where((experts == expert)[:, None] & (s < segment)[None, :], part, 0))
    else:
        count = tl.zeros([BLOCK_E], tl.int32)
        for start in range(0, rows, BLOCK_N):
            _, local = _local_ids(ids, map_, start, rows, map_size, HAS_MAP, BLOCK_N)
            valid = (local >= 0) & (local < num_experts)
            count += tl.histogram(tl.where(valid, local, 0), BLOCK_E, mask=valid)
    padded = (count + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    begin = tl.sum(tl.where(experts < expert, padded, 0))
    end = begin + tl.sum(tl.where(experts == expert, padded, 0))
    if segment == 0:
        tl.store(ends + expert, end)
        if expert == 0:
            tl.store(num_padded, tl.sum(padded))
        for block in range(begin // BLOCK_M, end // BLOCK_M):
            tl.store(expert_ids + block, expert)
    filled = begin + earlier
    lo, hi = _segment(rows, segment, SEGMENTS, BLOCK_N)
    for start in range(lo, hi, BLOCK_N):
        row, local = _local_ids(ids, map_, start, rows, map_size, HAS_MAP, BLOCK_N)
        mine = (local == expert).to(tl.int32)
        tl.store(sorted_rows + filled + tl.cumsum(mine) - 1, row, mask=mine == 1)
        filled += tl.sum(mine)
    if segment == SEGMENTS - 1:
        pad = filled + tl.arange(0, BLOCK_M)
        tl.store(sorted_rows + pad, tl.zeros([BLOCK_M], tl.int32) + rows, mask=pad < end)
