"""Attention of prompts on Hopper, where the matrix units are the limit.

Same function as `attention_prefill.prompt_attention`, for bf16 heads of 64 or 128 columns (and 64 more that heads share). As many
programs as multiprocessors take 128 query rows at a time: two warpgroups hold 64 rows each, so that one's exponentials run beside
products, of its own next tile as well as of the other, and a loading warp keeps two tiles of keys and of values on their way by
TMA, of the next rows too while these are finished. Probabilities go from registers into the second product.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from runtime.kernels.splits import multiprocessors

KEYS = 128


def fits(q_THD: torch.Tensor, k_CGD: torch.Tensor, v_CGE: torch.Tensor, shared_CR: torch.Tensor | None) -> bool:
    """Whether this kernel serves these shapes: what the copy engine reads lies at multiples of 16 bytes."""
    parts = [q_THD, k_CGD, v_CGE, *([] if shared_CR is None else [shared_CR])]
    return (
        all(t.dtype == torch.bfloat16 and t.data_ptr() % 16 == 0 and t.stride(-1) == 1 for t in parts)
        and all(stride % 8 == 0 for t in parts for stride in t.stride()[:-1])
        and k_CGD.shape[2] in (64, 128) and v_CGE.shape[2] in (64, 128)
        and (shared_CR is None or shared_CR.shape[1] == 64)
    )  # fmt: skip


def launch(
    q_THD: torch.Tensor, k_CGD: torch.Tensor, v_CGE: torch.Tensor, shared_CR: torch.Tensor | None, out_THE: torch.Tensor,
    pieces_W4: torch.Tensor, window: int, sinks_H: torch.Tensor | None, scale_log2: float,
) -> None:  # fmt: skip
    """Fill `out_THE` as `attention_prefill`'s kernel does; shapes for which `fits` holds, room for at least one piece of work of
    128 rows."""
    heads, (kv_heads, dim), out = q_THD.shape[1], k_CGD.shape[1:], v_CGE.shape[2]
    items = (len(pieces_W4) - 1) * heads
    rope = k_CGD if shared_CR is None else shared_CR
    triton.set_allocator(_scratch)
    _kernel[(min(items, multiprocessors(q_THD.device.index or 0)),)](
        q_THD, k_CGD, v_CGE, rope, out_THE, pieces_W4, out_THE if sinks_H is None else sinks_H,
        *q_THD.stride()[:2], *k_CGD.stride()[:2], *v_CGE.stride()[:2], rope.stride(0), len(q_THD), len(k_CGD), window, scale_log2,
        HEADS=heads, GROUP=heads // kv_heads, DIM=dim, SHARED=shared_CR is not None, OUT=out, WINDOWED=window > 0,
        HAS_SINKS=sinks_H is not None, KEYS=KEYS, num_warps=4,
    )  # fmt: skip


def _scratch(size: int, _alignment: int, _stream: int | None) -> torch.Tensor:
    """Memory for a launch's descriptors (torch aligns to more than the 128 bytes that they ask for)."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@gluon.jit
def _item(w, pieces, window, HEADS: gl.constexpr, WINDOWED: gl.constexpr, KEYS: gl.constexpr):
    """(head, first row among all queries, rows left from there, first key among all keys, keys, position of the first row,
    first tile, tiles' end, of which there is one at least) of a piece of work. Heads fastest: those that read the same keys run
    together."""
    piece = pieces + (w // HEADS + 1) * 4
    row, left, first, keys = gl.load(piece), gl.load(piece + 1), gl.load(piece + 2), gl.load(piece + 3)
    position = keys - left
    lo = 0
    if WINDOWED:
        lo = gl.maximum(position - window + 1, 0) // KEYS
    return w % HEADS, row, left, first, keys, position, lo, gl.cdiv(gl.minimum(position + 128, keys), KEYS)


@gluon.jit
def _rows_of(base, count, row, head, HEADS: gl.constexpr, WIDTH: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Tiles of ROWS rows and COLUMNS columns of a tensor of heads laid flat: head g begins at column g * head. Made here, since
    making descriptors on the host takes longer than a short prompt's layer."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    return tma.make_tensor_descriptor(base, [count, (HEADS - 1) * head + WIDTH], [row, 1], [ROWS, COLUMNS], layout)


@gluon.jit
def _load(
    q, k, v, rope, pieces, q_row, q_head, k_row, k_head, v_row, v_head, rope_row, rows, keys, window, q_s, t_s, k_s, r_s,
    v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr,
    SHARED: gl.constexpr, OUT: gl.constexpr, WINDOWED: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """The loading warp."""
    R: gl.constexpr = 64 if SHARED else 0
    q_desc = _rows_of(q, rows, q_row, q_head, HEADS, DIM + R, 64, DIM)
    k_desc = _rows_of(k, keys, k_row, k_head, HEADS // GROUP, DIM, KEYS, DIM)
    v_desc = _rows_of(v, keys, v_row, v_head, HEADS // GROUP, OUT, KEYS, OUT)
    if SHARED:
        turned_desc = _rows_of(q, rows, q_row, q_head, HEADS, DIM + R, 64, R)
        rope_desc = _rows_of(rope, keys, rope_row, 0, 1, R, KEYS, R)
    done = 0  # pieces; Gluon knows no enumerate
    tile = 0
    for w in range(gl.program_id(0), gl.load(pieces) * HEADS, gl.num_programs(0)):
        head, row, _, first, _, _, lo, end = _item(w, pieces, window, HEADS, WINDOWED, KEYS)
        # a fresh barrier counts as having completed phase 1: the first waits pass at once
        mbarrier.wait(q_empty, done % 2 ^ 1)
        mbarrier.expect(q_full, 128 * (DIM + (64 if SHARED else 0)) * 2)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(q_desc, [row + 64 * half, head * q_head], q_full, q_s.index(half))
            if SHARED:
                tma.async_copy_global_to_shared(turned_desc, [row + 64 * half, head * q_head + DIM], q_full, t_s.index(half))
        for j in range(lo, end):
            now = tile % 2
            parity = tile // 2 % 2 ^ 1
            mbarrier.wait(k_empty.index(now), parity)
            mbarrier.expect(k_full.index(now), KEYS * (DIM + (64 if SHARED else 0)) * 2)
            tma.async_copy_global_to_shared(k_desc, [first + j * KEYS, head // GROUP * k_head], k_full.index(now),
                                            k_s.index(now))  # fmt: skip
            if SHARED:
                tma.async_copy_global_to_shared(rope_desc, [first + j * KEYS, 0], k_full.index(now), r_s.index(now))
            mbarrier.wait(v_empty.index(now), parity)
            mbarrier.expect(v_full.index(now), KEYS * OUT * 2)
            tma.async_copy_global_to_shared(v_desc, [first + j * KEYS, head // GROUP * v_head], v_full.index(now),
                                            v_s.index(now))  # fmt: skip
            tile += 1
        done += 1  # noqa: SIM113


@gluon.jit
def _zero_tail(v, valid, KEYS: gl.constexpr, OUT: gl.constexpr):
    """Zero the rows of a tile past a prompt's end: whatever lies there must not meet a zero weight as NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
    for c in gl.static_range(OUT // 64):
        part = v.slice(c * 64, 64, dim=1)
        value = part.load(layout)
        part.store(gl.where((row < valid)[:, None], value, gl.zeros_like(value)))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _ask(q_s, t_s, k_s, r_s, full, parity, KEYS: gl.constexpr, SHARED: gl.constexpr):
    """Begin q.k of 64 rows and a tile of keys."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    s = gl.zeros([64, KEYS], gl.float32, layout=layout)
    mbarrier.wait(full, parity)
    s = warpgroup_mma(q_s, k_s.permute((1, 0)), s, use_acc=False, is_async=True)
    if SHARED:
        s = warpgroup_mma(t_s, r_s.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _answer(s, empty):
    """The scores, once they are there; the tile of keys is given up."""
    s = warpgroup_mma_wait(0, deps=[s])
    gl.thread_barrier()
    mbarrier.arrive(empty, count=1)
    return s


@gluon.jit
def _masked(s, first_key, at, window, scale_log2, KEYS: gl.constexpr, WINDOWED: gl.constexpr):
    """Scaled scores, -inf where a row, at position `at`, does not see."""
    key = first_key + gl.arange(0, KEYS, layout=gl.SliceLayout(0, s.type.layout))
    seen = key[None, :] <= at[:, None]
    if WINDOWED:
        seen = seen & (key[None, :] > at[:, None] - window)
    return gl.where(seen, s * scale_log2, float("-inf"))


@gluon.jit
def _weigh(s, top, total, acc, scale_log2, OUT: gl.constexpr, MASKED: gl.constexpr):
    """Softmax step: (probabilities for the second product, new maximum, sum, sums of values as yet). MASKED: `s` is scaled."""
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OUT, 16])
    if MASKED:
        new_top = gl.maximum(top, gl.max(s, 1))
        base = gl.where(new_top == float("-inf"), 0.0, new_top)  # a row whose window begins later has seen nothing yet
        p = gl.exp2(s - base[:, None])
    else:
        new_top = gl.maximum(top, gl.max(s, 1) * scale_log2)
        base = new_top
        p = gl.exp2(s * scale_log2 - base[:, None])
    decay = gl.exp2(top - base)
    total = total * decay + gl.sum(p, 1)
    weights = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, o_layout, 2))
    return weights, new_top, total, acc * gl.convert_layout(decay, gl.SliceLayout(1, o_layout))[:, None]


@gluon.jit
def _add(weights, v_s, full, empty, parity, acc, valid, KEYS: gl.constexpr, OUT: gl.constexpr):
    """p.v of a tile, of whose rows so many are the prompt's; the tile is given up."""
    mbarrier.wait(full, parity)
    if valid < KEYS:
        _zero_tail(v_s, valid, KEYS, OUT)
    acc = warpgroup_mma(weights, v_s, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    gl.thread_barrier()
    mbarrier.arrive(empty, count=1)
    return acc


@gluon.jit
def _attend(
    out, pieces, sinks, window, scale_log2, q_s, t_s, k_s, r_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    HALF: gl.constexpr, HEADS: gl.constexpr, SHARED: gl.constexpr, OUT: gl.constexpr, WINDOWED: gl.constexpr,
    HAS_SINKS: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """A computing warpgroup: the first or second 64 rows of every piece of work."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OUT, 16])
    rows_s: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows_o: gl.constexpr = gl.SliceLayout(1, o_layout)
    q, t = q_s.index(HALF), t_s.index(HALF)
    done = 0  # pieces; Gluon knows no enumerate
    tile = 0
    for w in range(gl.program_id(0), gl.load(pieces) * HEADS, gl.num_programs(0)):
        head, row, left, _, keys, position, lo, end = _item(w, pieces, window, HEADS, WINDOWED, KEYS)
        at = position + 64 * HALF + gl.arange(0, 64, layout=rows_s)
        top = gl.full([64], float("-inf"), gl.float32, layout=rows_s)
        total = gl.zeros([64], gl.float32, layout=rows_s)
        if HAS_SINKS:  # a key without a value: it only adds to the denominator
            top = gl.zeros([64], gl.float32, layout=rows_s) + gl.load(sinks + head).to(gl.float32) * 1.4426950408889634
            total = total + 1.0
        acc = gl.zeros([64, OUT], gl.float32, layout=o_layout)
        clear = lo
        if not WINDOWED:  # up to here all rows see all keys
            clear = gl.minimum((position + 64 * HALF + 1) // KEYS, end - 1)
        mbarrier.wait(q_full, done % 2)
        s = _ask(q, t, k_s.index(tile % 2), r_s.index(tile % 2), k_full.index(tile % 2), tile // 2 % 2, KEYS, SHARED)
        s = _answer(s, k_empty.index(tile % 2))
        # the next scores are asked for before this tile's are used; with columns that heads share registers do not suffice
        for _ in range(lo, clear):
            now, after = tile % 2, (tile + 1) % 2
            if not SHARED:
                ahead = _ask(q, t, k_s.index(after), r_s.index(after), k_full.index(after), (tile + 1) // 2 % 2, KEYS, SHARED)
            weights, top, total, acc = _weigh(s, top, total, acc, scale_log2, OUT, False)
            if SHARED:
                ahead = _ask(q, t, k_s.index(after), r_s.index(after), k_full.index(after), (tile + 1) // 2 % 2, KEYS, SHARED)
            s = _answer(ahead, k_empty.index(after))
            acc = _add(weights, v_s.index(now), v_full.index(now), v_empty.index(now), tile // 2 % 2, acc, KEYS, KEYS, OUT)
            tile += 1
        for j in range(clear, end - 1):
            now, after = tile % 2, (tile + 1) % 2
            if not SHARED:
                ahead = _ask(q, t, k_s.index(after), r_s.index(after), k_full.index(after), (tile + 1) // 2 % 2, KEYS, SHARED)
            s = _masked(s, j * KEYS, at, window, scale_log2, KEYS, WINDOWED)
            weights, top, total, acc = _weigh(s, top, total, acc, scale_log2, OUT, True)
            if SHARED:
                ahead = _ask(q, t, k_s.index(after), r_s.index(after), k_full.index(after), (tile + 1) // 2 % 2, KEYS, SHARED)
            s = _answer(ahead, k_empty.index(after))
            acc = _add(weights, v_s.index(now), v_full.index(now), v_empty.index(now), tile // 2 % 2, acc, KEYS, KEYS, OUT)
            tile += 1
        mbarrier.arrive(q_empty, count=1)
        now = tile % 2
        s = _masked(s, (end - 1) * KEYS, at, window, scale_log2, KEYS, WINDOWED)
        weights, top, total, acc = _weigh(s, top, total, acc, scale_log2, OUT, True)
        valid = keys - (end - 1) * KEYS
        acc = _add(weights, v_s.index(now), v_full.index(now), v_empty.index(now), tile // 2 % 2, acc, valid, KEYS, OUT)
        tile += 1
        done += 1  # noqa: SIM113
        value = acc / gl.convert_layout(gl.where(total > 0.0, total, 1.0), rows_o)[:, None]
        mine = 64 * HALF + gl.arange(0, 64, layout=rows_o)
        place = ((row + mine).to(gl.int64) * HEADS + head) * OUT
        e = gl.arange(0, OUT, layout=gl.SliceLayout(0, o_layout))
        gl.store(out + place[:, None] + e[None, :], value.to(gl.bfloat16), mask=(mine < left)[:, None])


@gluon.jit(do_not_specialize=["rows", "keys", "window"])
def _kernel(
    q, k, v, rope, out, pieces, sinks, q_row, q_head, k_row, k_head, v_row, v_head, rope_row, rows, keys, window, scale_log2,
    HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, SHARED: gl.constexpr,
    OUT: gl.constexpr, WINDOWED: gl.constexpr, HAS_SINKS: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ROPE: gl.constexpr = KEYS if SHARED else 16
    q_s = gl.allocate_shared_memory(gl.bfloat16, [2, 64, DIM], shared)
    t_s = gl.allocate_shared_memory(gl.bfloat16, [2, 64 if SHARED else 16, 64], shared)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, DIM], shared)
    r_s = gl.allocate_shared_memory(gl.bfloat16, [2, ROPE, 64], shared)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, OUT], shared)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for i in gl.static_range(2):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    out, pieces, sinks, window, scale_log2, q_s, t_s, k_s, r_s, v_s, q_full, q_empty, k_full, k_empty,
                    v_full, v_empty, 0, HEADS, SHARED, OUT, WINDOWED, HAS_SINKS, KEYS,
                ),
            ),
            (
                _attend,
                (
                    out, pieces, sinks, window, scale_log2, q_s, t_s, k_s, r_s, v_s, q_full, q_empty, k_full, k_empty,
                    v_full, v_empty, 1, HEADS, SHARED, OUT, WINDOWED, HAS_SINKS, KEYS,
                ),
            ),
            (
                _load,
                (
                    q, k, v, rope, pieces, q_row, q_head, k_row, k_head, v_row, v_head, rope_row, rows, keys, window, q_s,
                    t_s, k_s, r_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, HEADS,
                    GROUP, DIM, SHARED, OUT, WINDOWED, KEYS,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
