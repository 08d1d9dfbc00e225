"""Which (token, choice) rows each expert gets, computed on the device in one launch (two for long prompts).

Shapes: T tokens, K choices a token, N = T*K rows (row = token*K + choice), E local experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_HISTOGRAM_ROWS = 8192
"""Up to here every program counts all experts' rows itself; above, a launch before counts those of chunks."""
_CHUNKS = 128
"""Chunks of a long list of rows, at most, while each is as long as a program takes at once."""


@dataclass(frozen=True)
class Alignment:
    """Rows sorted by expert, each expert's share padded to whole blocks of `block_m` rows.

    `sorted_rows` [P] int32: row numbers; N marks padding. `expert_ids` [P / block_m] int32: the local expert of a block.
    `num_padded` [1] int32: how many of the P entries are used; entries past it are not written.
    `ends` [E] int32: where each expert's padded share ends. `direct`: block b is row b alone, whose id is expert_ids[b],
    be it local or not; the other tensors say nothing. `places` [N] int32, if asked for: where each row went, or -1.
    """

    sorted_rows: torch.Tensor
    expert_ids: torch.Tensor
    num_padded: torch.Tensor
    ends: torch.Tensor
    block_m: int
    direct: bool = False
    places: torch.Tensor | None = None


def align_rows_alone(topk_ids_TK: torch.Tensor, block_m: int) -> Alignment:
    """A block a row, which needs no launch: for so few rows that they seldom meet at an expert."""
    ids = topk_ids_TK.flatten()
    return Alignment(ids, ids, ids, ids, block_m, direct=True)


def align(
    topk_ids_TK: torch.Tensor, num_experts: int, block_m: int, expert_map: torch.Tensor | None = None, *, places: bool = False
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
    out = Alignment(empty(padded), empty(padded // block_m), empty(1), empty(num_experts), block_m,
                    places=empty(rows) if places else None)
    map_, map_size = (expert_map, expert_map.numel()) if expert_map is not None else (topk_ids_TK, 0)
    block_e = max(triton.next_power_of_2(num_experts), 16)
    results = (out.sorted_rows, out.expert_ids, out.num_padded, out.ends, out.places if places else out.ends)
    common = {"HAS_MAP": expert_map is not None, "BLOCK_E": block_e}
    if rows <= _HISTOGRAM_ROWS:
        block_n = min(1024, triton.next_power_of_2(max(rows, 16)))
        _align_kernel[(num_experts,)](
            topk_ids_TK, map_, *results, rows, map_size, num_experts, BLOCK_M=block_m, BLOCK_N=block_n, PLACES=places,
            num_warps=4, **common,
        )  # fmt: skip
        return out
    chunk_rows = triton.cdiv(triton.cdiv(rows, _CHUNKS), 1024) * 1024
    chunks = triton.cdiv(rows, chunk_rows)
    counts = empty(chunks * block_e)
    _count_kernel[(chunks,)](
        topk_ids_TK, map_, counts, rows, map_size, num_experts, chunk_rows, BLOCK_N=1024, num_warps=4, **common
    )
    _place_kernel[(chunks,)](
        topk_ids_TK, map_, counts, *results, rows, map_size, num_experts, chunk_rows, chunks, BLOCK_M=block_m, BLOCK_N=128,
        BLOCK_C=16, PLACES=places, num_warps=8, **common,
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
def _begin_of(padded, experts, expert):
    """Where an expert's padded share begins and ends."""
    begin = tl.sum(tl.where(experts < expert, padded, 0))
    return begin, begin + tl.sum(tl.where(experts == expert, padded, 0))


@triton.jit
def _fill_blocks(expert_ids, expert, begin, end, BLOCK_M: tl.constexpr):
    for block in range(begin // BLOCK_M, end // BLOCK_M):
        tl.store(expert_ids + block, expert)


@triton.jit(do_not_specialize=["rows"])
def _align_kernel(
    ids, map_, sorted_rows, expert_ids, num_padded, ends, places, rows, map_size, num_experts,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MAP: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Program e counts all experts' rows and places expert e's: no atomics, so the order is the same every time."""
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    count = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, rows, BLOCK_N):
        _, local = _local_ids(ids, map_, start, rows, map_size, HAS_MAP, BLOCK_N)
        valid = (local >= 0) & (local < num_experts)
        count += tl.histogram(tl.where(valid, local, 0), BLOCK_E, mask=valid)
    padded = (count + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    begin, end = _begin_of(padded, experts, expert)
    tl.store(ends + expert, end)
    if expert == 0:
        tl.store(num_padded, tl.sum(padded))
    _fill_blocks(expert_ids, expert, begin, end, BLOCK_M)
    filled = begin
    for start in range(0, rows, BLOCK_N):
        row, local = _local_ids(ids, map_, start, rows, map_size, HAS_MAP, BLOCK_N)
        mine = (local == expert).to(tl.int32)
        place = filled + tl.cumsum(mine) - 1
        tl.store(sorted_rows + place, row, mask=mine == 1)
        if PLACES:
            tl.store(places + row, place, mask=mine == 1)
            absent = (row < rows) & ((local < 0) | (local >= num_experts)) & (expert == 0)
            tl.store(places + row, tl.full([BLOCK_N], -1, tl.int32), mask=absent)
        filled += tl.sum(mine)
    pad = filled + tl.arange(0, BLOCK_M)
    tl.store(sorted_rows + pad, tl.zeros([BLOCK_M], tl.int32) + rows, mask=pad < end)


@triton.jit(do_not_specialize=["rows", "chunk_rows"])
def _count_kernel(
    ids, map_, counts, rows, map_size, num_experts, chunk_rows, HAS_MAP: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """counts [chunks, BLOCK_E]: how many rows of a chunk each expert gets."""
    chunk = tl.program_id(0)
    count = tl.zeros([BLOCK_E], tl.int32)
    for start in range(chunk * chunk_rows, (chunk + 1) * chunk_rows, BLOCK_N):
        _, local = _local_ids(ids, map_, start, rows, map_size, HAS_MAP, BLOCK_N)
        valid = (local >= 0) & (local < num_experts)
        count += tl.histogram(tl.where(valid, local, 0), BLOCK_E, mask=valid)
    tl.store(counts + chunk * BLOCK_E + tl.arange(0, BLOCK_E), count)


@triton.jit(do_not_specialize=["rows", "chunk_rows", "chunks"])
def _place_kernel(
    ids, map_, counts, sorted_rows, expert_ids, num_padded, ends, places, rows, map_size, num_experts, chunk_rows, chunks,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, HAS_MAP: tl.constexpr,
    PLACES: tl.constexpr,
):  # fmt: skip
    """Program c places the rows of chunk c behind those of the chunks before, and fills what experts c, c + chunks, ... pad."""
    chunk, experts = tl.program_id(0), tl.arange(0, BLOCK_E)
    count, filled = tl.zeros([BLOCK_E], tl.int32), tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, chunks, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        part = tl.load(counts + c[:, None] * BLOCK_E + experts[None, :], mask=(c < chunks)[:, None], other=0)
        count += tl.sum(part, 0)
        filled += tl.sum(tl.where((c < chunk)[:, None], part, 0), 0)
    padded = (count + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    end_E = tl.cumsum(padded)
    filled += end_E - padded
    if chunk == 0:
        tl.store(num_padded, tl.sum(padded))
        tl.store(ends + experts, end_E, mask=experts < num_experts)
    at = tl.arange(0, BLOCK_N)
    for start in range(chunk * chunk_rows, (chunk + 1) * chunk_rows, BLOCK_N):
        row, local = _local_ids(ids, map_, start, rows, map_size, HAS_MAP, BLOCK_N)
        _, other = _local_ids(ids, map_, start, rows, map_size, HAS_MAP, BLOCK_N)
        valid = (local >= 0) & (local < num_experts)
        safe = tl.where(valid, local, 0)
        before = (local[:, None] == other[None, :]) & (at[None, :] < at[:, None])
        place = tl.gather(filled, safe, 0) + tl.sum(before.to(tl.int32), 1)
        tl.store(sorted_rows + place, row, mask=valid)
        if PLACES:
            tl.store(places + row, tl.where(valid, place, -1), mask=row < rows)
        filled += tl.histogram(safe, BLOCK_E, mask=valid)
    for expert in range(chunk, num_experts, chunks):
        begin, end = _begin_of(padded, experts, expert)
        _fill_blocks(expert_ids, expert, begin, end, BLOCK_M)
        pad = begin + tl.sum(tl.where(experts == expert, count, 0)) + tl.arange(0, BLOCK_M)
        tl.store(sorted_rows + pad, tl.zeros([BLOCK_M], tl.int32) + rows, mask=pad < end)
