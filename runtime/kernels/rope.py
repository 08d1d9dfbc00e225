"""Rotary embedding, query-key norm and the write of new keys and values into the paged cache, in one launch a layer.

Shapes: T tokens, D head width, R rotary columns (the first R of D, R even), L latent columns. `cos_sin` [positions, R]
fp32 holds R/2 cosines, then R/2 sines. Pairs are (i, i + R/2) ("neox", half-split) or (2i, 2i + 1) (interleaved).
`slots` [T] int64: block * block_tokens + offset of each new token; negative slots (a graph's padding) are not written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE_HEADS = 16  # heads a program handles at once
_FEW_HEADS = 1 << 13  # up to here a program for each head of each token; beyond, starting them takes longest


def rope_norm_cache(
    qkv_TC: torch.Tensor,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    cos_sin: torch.Tensor,
    kv_cache: torch.Tensor,
    *,
    heads: int,
    interleaved: bool = False,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    eps: float = 1e-6,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split fused projections [T, (heads + 2 kv_heads) * D], norm and rotate q and k, write k and v to the cache.

    Returns contiguous (q_THD, k, v [T, kv_heads, D]), k normed and rotated, for prefill's attention. `kv_cache` is
    [num_blocks, 2, block_tokens, kv_heads, D] in the model's dtype or float8_e4m3fn (holding key / k_scale, value / v_scale).
    """
    tokens = qkv_TC.shape[0]
    block_tokens, kv_heads, dim = kv_cache.shape[2:]
    assert qkv_TC.shape[1] == (heads + 2 * kv_heads) * dim and qkv_TC.stride(1) == 1
    assert slots_T.dtype == torch.int64 and kv_cache.is_contiguous() and cos_sin.is_contiguous()
    q, k, v = (
        torch.empty(tokens, n, dim, dtype=qkv_TC.dtype, device=qkv_TC.device) for n in (heads, kv_heads, kv_heads)
    )
    tiles = triton.cdiv(heads, _TILE_HEADS) + 2 * triton.cdiv(kv_heads, _TILE_HEADS)
    _qkv_kernel[(tokens, tiles)](
        qkv_TC, positions_T, slots_T, cos_sin, kv_cache, q, k, v,
        q_norm_D if q_norm_D is not None else qkv_TC, k_norm_D if k_norm_D is not None else qkv_TC,
        qkv_TC.stride(0), eps, 1.0 / k_scale, 1.0 / v_scale,
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, ROTARY=cos_sin.shape[1], BLOCK_TOKENS=block_tokens,
        INTERLEAVED=interleaved, Q_NORM=q_norm_D is not None, K_NORM=k_norm_D is not None,
        TILE=min(_TILE_HEADS, triton.next_power_of_2(max(heads, kv_heads))), BLOCK_D=triton.next_power_of_2(dim),
        num_warps=4,
    )  # fmt: skip
    return q, k, v


def mla_rope_norm_cache(
    q_THD: torch.Tensor,
    latent_TC: torch.Tensor,
    norm_L: torch.Tensor,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    cos_sin: torch.Tensor,
    cache: torch.Tensor,
    *,
    interleaved: bool = True,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Rotate the last R columns of each q head in place; norm the first L columns of `latent_TC` [T, L + R], rotate the
    rest, write the row to `cache` [num_blocks, block_tokens, L + R]. Returns the finished rows [T, L + R].

    Rotated interleaved pairs are left as two halves (all first elements, then all second), for q and k alike.
    """
    tokens, heads, dim = q_THD.shape
    width = cache.shape[2]
    rotary = cos_sin.shape[1]
    assert latent_TC.stride(1) == 1 and latent_TC.shape[1] == width and q_THD.stride(2) == 1
    out_TC = torch.empty(tokens, width, dtype=latent_TC.dtype, device=latent_TC.device)
    tile = 1 if tokens * heads < _FEW_HEADS else min(_TILE_HEADS, triton.next_power_of_2(heads))
    _latent_kernel[(tokens, triton.cdiv(heads, tile) + 1)](
        q_THD, latent_TC, norm_L, positions_T, slots_T, cos_sin, cache, out_TC,
        q_THD.stride(0), q_THD.stride(1), latent_TC.stride(0), eps, heads,
        DIM=dim, LATENT=width - rotary, ROTARY=rotary, INTERLEAVED=interleaved,
        TILE=tile, BLOCK_L=triton.next_power_of_2(width - rotary), num_warps=1 if width <= 1024 and tile == 1 else 4,
    )  # fmt: skip
    return out_TC


@triton.jit
def _partner(column, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """For each column of the rotary part: its pair's other column, its angle's index, and the sine's sign."""
    if INTERLEAVED:
        return column ^ 1, column // 2, tl.where(column % 2 == 0, -1.0, 1.0)
    half: tl.constexpr = ROTARY // 2
    low = column < half
    return tl.where(low, column + half, column - half), column % half, tl.where(low, -1.0, 1.0)


@triton.jit
def _qkv_kernel(
    qkv, positions, slots, cos_sin, cache, q, k, v, q_norm, k_norm, stride, eps, k_inverse, v_inverse,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    INTERLEAVED: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token's tile of up to TILE heads: query tiles first, then key tiles, then value tiles."""
    Q_TILES: tl.constexpr = (HEADS + TILE - 1) // TILE
    KV_TILES: tl.constexpr = (KV_HEADS + TILE - 1) // TILE
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    h, d = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    slot = tl.load(slots + token)
    place = (slot + slot // BLOCK_TOKENS * BLOCK_TOKENS) * KV_HEADS * DIM
    if part < Q_TILES:
        head = part * TILE + h
        inside = (head < HEADS)[:, None] & (d < DIM)[None, :]
        value = _normed_rotated(
            qkv + token * stride + head[:, None] * DIM, positions + token, cos_sin, q_norm, eps, d, inside,
            head < HEADS, DIM, ROTARY, INTERLEAVED, Q_NORM,
        )  # fmt: skip
        tl.store(q + (token * HEADS + head)[:, None] * DIM + d[None, :], value.to(q.dtype.element_ty), mask=inside)
    elif part < Q_TILES + KV_TILES:
        k_head = (part - Q_TILES) * TILE + h
        k_in = (k_head < KV_HEADS)[:, None] & (d < DIM)[None, :]
        k_value = _normed_rotated(
            qkv + token * stride + (HEADS + k_head)[:, None] * DIM, positions + token, cos_sin, k_norm, eps, d, k_in,
            k_head < KV_HEADS, DIM, ROTARY, INTERLEAVED, K_NORM,
        )  # fmt: skip
        rounded = k_value.to(k.dtype.element_ty)
        k_at = k_head[:, None] * DIM + d[None, :]
        tl.store(k + token * KV_HEADS * DIM + k_at, rounded, mask=k_in)
        k_kept = (rounded.to(tl.float32) * k_inverse).to(cache.dtype.element_ty)
        tl.store(cache + place + k_at, k_kept, mask=k_in & (slot >= 0))
    else:
        v_head = (part - Q_TILES - KV_TILES) * TILE + h
        v_in = (v_head < KV_HEADS)[:, None] & (d < DIM)[None, :]
        v_at = v_head[:, None] * DIM + d[None, :]
        plain = tl.load(qkv + token * stride + (HEADS + KV_HEADS) * DIM + v_at, mask=v_in, other=0.0)
        tl.store(v + token * KV_HEADS * DIM + v_at, plain, mask=v_in)
        v_kept = (plain.to(tl.float32) * v_inverse).to(cache.dtype.element_ty)
        tl.store(cache + place + BLOCK_TOKENS * KV_HEADS * DIM + v_at, v_kept, mask=v_in & (slot >= 0))


@triton.jit
def _normed_rotated(
    rows, position, cos_sin, norm, eps, d, inside, row_ok,
    DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Heads' rows in fp32, normed where a weight is given (rounded as a separate norm would), then rotated.

    `rows` [heads, 1] points at row starts. A column's partner in its pair is loaded beside it.
    """
    rotated = d < ROTARY
    other, angle, sign = _partner(d, ROTARY, INTERLEAVED)
    paired = row_ok[:, None] & rotated[None, :]
    dtype: tl.constexpr = rows.dtype.element_ty
    value = tl.load(rows + d[None, :], mask=inside, other=0.0).to(tl.float32)
    mate = tl.load(rows + other[None, :], mask=paired, other=0.0).to(tl.float32)
    if NORM:
        inverse = tl.rsqrt(tl.sum(value * value, 1) / DIM + eps)[:, None]
        gain = tl.load(norm + d, mask=d < DIM, other=0.0).to(tl.float32)[None, :]
        mate_gain = tl.load(norm + other, mask=rotated, other=0.0).to(tl.float32)[None, :]
        value = (value * inverse * gain).to(dtype).to(tl.float32)
        mate = (mate * inverse * mate_gain).to(dtype).to(tl.float32)
    row = cos_sin + tl.load(position).to(tl.int64) * ROTARY
    cos = tl.load(row + angle, mask=rotated, other=1.0)
    sin = tl.load(row + ROTARY // 2 + angle, mask=rotated, other=0.0)
    return value * cos[None, :] + mate * (sin * sign)[None, :]


@triton.jit
def _latent_kernel(
    q, latent, norm, positions, slots, cos_sin, cache, out, q_stride_t, q_stride_h, latent_stride, eps, heads,
    DIM: tl.constexpr, LATENT: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, TILE: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = ROTARY // 2
    i = tl.arange(0, HALF)
    row = cos_sin + tl.load(positions + token).to(tl.int64) * ROTARY
    cos, sin = tl.load(row + i), tl.load(row + HALF + i)
    first, second = (2 * i, 2 * i + 1) if INTERLEAVED else (i, HALF + i)
    if part * TILE < heads:
        head = part * TILE + tl.arange(0, TILE)
        heads_at = q + (token * q_stride_t + head * q_stride_h + DIM - ROTARY)[:, None]
        ours = (head < heads)[:, None] & (i >= 0)[None, :]
        a = tl.load(heads_at + first[None, :], mask=ours, other=0.0).to(tl.float32)
        b = tl.load(heads_at + second[None, :], mask=ours, other=0.0).to(tl.float32)
        tl.debug_barrier()  # every element is read before any is replaced
        tl.store(heads_at + i[None, :], (a * cos[None, :] - b * sin[None, :]).to(q.dtype.element_ty), mask=ours)
        tl.store(heads_at + HALF + i[None, :], (b * cos[None, :] + a * sin[None, :]).to(q.dtype.element_ty), mask=ours)
        return
    place = latent + token * latent_stride
    slot = tl.load(slots + token)
    width: tl.constexpr = LATENT + ROTARY
    x = tl.load(place + LATENT + first).to(tl.float32)
    y = tl.load(place + LATENT + second).to(tl.float32)
    _write_twice(out, cache, token * width + LATENT, slot * width + LATENT, i, x * cos - y * sin, i >= 0, slot)
    _write_twice(out, cache, token * width + LATENT + HALF, slot * width + LATENT + HALF, i, y * cos + x * sin, i >= 0, slot)
    c = tl.arange(0, BLOCK_L)
    value = tl.load(place + c, mask=c < LATENT, other=0.0).to(tl.float32)
    gain = tl.load(norm + c, mask=c < LATENT, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value) / LATENT + eps) * gain
    _write_twice(out, cache, token * width, slot * width, c, value, c < LATENT, slot)


@triton.jit
def _write_twice(out, cache, out_at, cache_at, column, value, inside, slot):
    """The finished row for this step's attention, and for the cache where the token has a slot."""
    rounded = value.to(out.dtype.element_ty)
    tl.store(out + out_at + column, rounded, mask=inside)
    tl.store(cache + cache_at + column, rounded.to(cache.dtype.element_ty), mask=inside & (slot >= 0))
