"""Causal attention of prompts of any lengths in one launch: whole prompts, chunks that go on, windows and sinks.

Shapes: T query rows and C keys of S sequences that lie behind one another, H query heads, G key heads, D width of a key, E of a
value, R columns of keys that all heads share (DeepSeek's rotary part). The last `lens` of a sequence's `contexts` positions
ask. Lengths are told by a list of pieces of work on the device, of which a launch computes as many as are live: no new length
needs a compilation, and a launch that was captured serves any prompts whose list fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from runtime.pieces import PIECE_ROWS

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class PromptTile:
    """Query rows and keys a tile, warps, and loads in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


DEFAULT_TILE = PromptTile(PIECE_ROWS, 64, 8, 3)


def prompt_attention(
    q_THD: torch.Tensor,
    k_CGD: torch.Tensor,
    v_CGE: torch.Tensor,
    pieces_W4: torch.Tensor,
    *,
    scale: float,
    shared_CR: torch.Tensor | None = None,
    window: int = 0,
    sinks_H: torch.Tensor | None = None,
    tile: PromptTile | None = None,
    out_THE: torch.Tensor | None = None,
) -> torch.Tensor:
    """out_THE. `pieces_W4`: `runtime.pieces.pieces` of `tile.rows` rows, on the device, maybe with more lines, which mean
    nothing. Row i of a sequence sees its keys up to (keys - rows + i), of those the last `window` if > 0. Rows of no sequence are
    left as they are.

    `shared_CR`: the last R columns of every head's keys; a query then has D + R. `sinks_H` adds exp(sink) to each head's
    denominator. Columns must be next to one another, rows and heads may be apart. On Hopper, shapes that
    `attention_prefill_hopper` takes go there unless `tile` is given.
    """
    rows, heads, width = q_THD.shape
    kv_heads, dim = k_CGD.shape[1:]
    shared = 0 if shared_CR is None else shared_CR.shape[1]
    assert width == dim + shared and heads % kv_heads == 0 and v_CGE.shape[:2] == k_CGD.shape[:2]
    assert all(t.stride(-1) == 1 for t in (q_THD, k_CGD, v_CGE)) and pieces_W4.dtype == torch.int32
    if out_THE is None:
        out_THE = torch.empty(rows, heads, v_CGE.shape[2], dtype=q_THD.dtype, device=q_THD.device)
    assert out_THE.is_contiguous() and pieces_W4.is_contiguous()
    items = (len(pieces_W4) - 1) * heads
    if not items:
        return out_THE
    special = None if tile else _hopper(q_THD, k_CGD, v_CGE, shared_CR)
    if special is not None:
        special(q_THD, k_CGD, v_CGE, shared_CR, out_THE, pieces_W4, window, sinks_H, scale * _LOG2_E)
        return out_THE
    tile = tile or DEFAULT_TILE
    rope = k_CGD if shared_CR is None else shared_CR
    _prompt_kernel[(items,)](
        q_THD, k_CGD, v_CGE, rope, out_THE, pieces_W4, out_THE if sinks_H is None else sinks_H,
        *q_THD.stride()[:2], *k_CGD.stride()[:2], *v_CGE.stride()[:2], rope.stride(0), window, scale * _LOG2_E,
        HEADS=heads, GROUP=heads // kv_heads, DIM=dim, SHARED=shared, OUT=v_CGE.shape[2], WINDOWED=window > 0,
        HAS_SINKS=sinks_H is not None, BLOCK_D=triton.next_power_of_2(dim), BLOCK_R=triton.next_power_of_2(max(shared, 16)),
        BLOCK_E=triton.next_power_of_2(v_CGE.shape[2]), BLOCK_M=tile.rows, BLOCK_N=tile.keys, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return out_THE


def _hopper(
    q_THD: torch.Tensor, k_CGD: torch.Tensor, v_CGE: torch.Tensor, shared_CR: torch.Tensor | None
) -> Callable[..., None] | None:
    """The launcher of the kernel for Hopper's matrix units where it serves; imported only there, as Gluon needs it."""
    if not q_THD.is_cuda or not _is_hopper(q_THD.device.index or 0):
        return None
    from runtime.kernels import attention_prefill_hopper

    return attention_prefill_hopper.launch if attention_prefill_hopper.fits(q_THD, k_CGD, v_CGE, shared_CR) else None


@cache
def _is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index)[0] == 9


@triton.jit
def _tile(
    start, query, turned, k, v, rope, k_row, v_row, rope_row, keys, position, window, scale_log2, top, total, acc,
    DIM: tl.constexpr, SHARED: tl.constexpr, OUT: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys, from `start` on: (maximum, sum, sums of values). Not MASKED: all rows see all of it."""
    d, r, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_E)
    key = start + tl.arange(0, BLOCK_N)
    at, there = key.to(tl.int64)[:, None], key < keys
    k_in, r_in, v_in = (d < DIM)[None, :], (r < SHARED)[None, :], (e < OUT)[None, :]
    if MASKED:
        k_in, r_in, v_in = there[:, None] & k_in, there[:, None] & r_in, there[:, None] & v_in
    s = tl.dot(query, tl.trans(tl.load(k + at * k_row + d[None, :], mask=k_in, other=0.0)))
    if SHARED:
        s = tl.dot(turned, tl.trans(tl.load(rope + at * rope_row + r[None, :], mask=r_in, other=0.0)), s)
    s *= scale_log2
    if MASKED:
        seen = key[None, :] <= position[:, None]
        if WINDOWED:
            seen &= key[None, :] > position[:, None] - window
        s = tl.where(seen, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row whose window begins later has seen nothing yet
    p = tl.exp2(s - base[:, None])
    decay = tl.exp2(top - base)
    v_tile = tl.load(v + at * v_row + e[None, :], mask=v_in, other=0.0)
    return new_top, total * decay + tl.sum(p, 1), tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None])


@triton.jit(do_not_specialize=["window"])
def _prompt_kernel(
    q, k, v, rope, out, pieces, sinks, q_row, q_head, k_row, k_head, v_row, v_head, rope_row, window, scale_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SHARED: tl.constexpr, OUT: tl.constexpr,
    WINDOWED: tl.constexpr, HAS_SINKS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # heads fastest, so that those which read the same keys run together
    pid = tl.program_id(0)
    head = pid % HEADS
    if pid // HEADS >= tl.load(pieces):
        return
    piece = pieces + (pid // HEADS + 1) * 4
    begin, left, first_key, keys = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2), tl.load(piece + 3)
    row = tl.arange(0, BLOCK_M)
    past = keys - left
    d, r, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_E)
    q_rows = q + (begin + row).to(tl.int64)[:, None] * q_row + head * q_head
    asks = row < left
    query = tl.load(q_rows + d[None, :], mask=asks[:, None] & (d < DIM)[None, :], other=0.0)
    k_base = k + first_key.to(tl.int64) * k_row + head // GROUP * k_head
    v_base = v + first_key.to(tl.int64) * v_row + head // GROUP * v_head
    rope_base = rope + first_key.to(tl.int64) * rope_row
    turned = query
    if SHARED:
        turned = tl.load(q_rows + DIM + r[None, :], mask=asks[:, None] & (r < SHARED)[None, :], other=0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:  # a key without a value: it only adds to the denominator
        top = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        total += 1.0
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    end = tl.minimum(past + BLOCK_M, keys)  # keys that the last row sees
    # up to here all rows see all keys
    clear = (past + 1) // BLOCK_N * BLOCK_N
    low = 0
    if WINDOWED:
        low = tl.maximum(past - window + 1, 0) // BLOCK_N * BLOCK_N
        clear = low
    for start in range(low, clear, BLOCK_N):
        top, total, acc = _tile(
            start, query, turned, k_base, v_base, rope_base, k_row, v_row, rope_row, keys, past + row, window, scale_log2, top,
            total, acc, DIM, SHARED, OUT, WINDOWED, BLOCK_D, BLOCK_R, BLOCK_E, BLOCK_N, False,
        )  # fmt: skip
    for start in range(tl.maximum(clear, low), end, BLOCK_N):
        top, total, acc = _tile(
            start, query, turned, k_base, v_base, rope_base, k_row, v_row, rope_row, keys, past + row, window, scale_log2, top,
            total, acc, DIM, SHARED, OUT, WINDOWED, BLOCK_D, BLOCK_R, BLOCK_E, BLOCK_N, True,
        )  # fmt: skip
    value = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    place = out + ((begin + row).to(tl.int64) * HEADS + head)[:, None] * OUT + e[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=asks[:, None] & (e < OUT)[None, :])
