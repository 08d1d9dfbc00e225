"""Rotary embedding, query-key norm and the write of new keys and values into the paged cache, in one launch a layer.

Shapes: T tokens, D head width, R rotary columns (the first R of D, R even), L latent columns. `cos_sin` [positions, R]
fp32 holds R/2 cosines, then R/2 sines. Pairs are (i, i + R/2) ("neox", half-split) or (2i, 2i + 1) (interleaved).
`slots` [T] int64: block * block_tokens + offset of each new token; negative slots (a graph's padding) are not written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


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
    _qkv_kernel[(tokens, heads + 2 * kv_heads)](
        qkv_TC, positions_T, slots_T, cos_sin, kv_cache, q, k, v,
        q_norm_D if q_norm_D is not None else qkv_TC, k_norm_D if k_norm_D is not None else qkv_TC,
        qkv_TC.stride(0), eps, 1.0 / k_scale, 1.0 / v_scale,
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, ROTARY=cos_sin.shape[1], BLOCK_TOKENS=block_tokens,
        INTERLEAVED=interleaved, Q_NORM=q_norm_D is not None, K_NORM=k_norm_D is not None,
        BLOCK_D=triton.next_power_of_2(dim), num_warps=1,
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
    _latent_kernel[(tokens, heads + 1)](
        q_THD, latent_TC, norm_L, positions_T, slots_T, cos_sin, cache, out_TC,
        q_THD.stride(0), q_THD.stride(1), latent_TC.stride(0), eps, heads,
        DIM=dim, LATENT=width - rotary, ROTARY=rotary, INTERLEAVED=interleaved,
        BLOCK_L=triton.next_power_of_2(width - rotary), num_warps=1 if width <= 1024 else 4,
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
    INTERLEAVED: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    inside = d < DIM
    source = qkv + token * stride + part * DIM
    slot = tl.load(slots + token)
    place = (slot + slot // BLOCK_TOKENS * BLOCK_TOKENS) * KV_HEADS * DIM + d
    if part >= HEADS + KV_HEADS:
        kv_head = part - HEADS - KV_HEADS
        plain = tl.load(source + d, mask=inside, other=0.0)
        tl.store(v + (token * KV_HEADS + kv_head) * DIM + d, plain, mask=inside)
        v_stored = (plain.to(tl.float32) * v_inverse).to(cache.dtype.element_ty)
        tl.store(cache + place + (BLOCK_TOKENS * KV_HEADS + kv_head) * DIM, v_stored, mask=inside & (slot >= 0))
    else:
        is_q = part < HEADS
        value = _normed_rotated(
            source, positions + token, cos_sin, q_norm, k_norm, eps, is_q, d, inside,
            DIM, ROTARY, INTERLEAVED, Q_NORM, K_NORM,
        )  # fmt: skip
        if is_q:
            tl.store(q + (token * HEADS + part) * DIM + d, value.to(q.dtype.element_ty), mask=inside)
        else:
            k_head = part - HEADS
            rounded = value.to(k.dtype.element_ty)
            tl.store(k + (token * KV_HEADS + k_head) * DIM + d, rounded, mask=inside)
            stored = (rounded.to(tl.float32) * k_inverse).to(cache.dtype.element_ty)
            tl.store(cache + place + k_head * DIM, stored, mask=inside & (slot >= 0))


@triton.jit
def _normed_rotated(
    source, position, cos_sin, q_norm, k_norm, eps, is_q, d, inside,
    DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
):  # fmt: skip
    """One head's row in fp32, normed where its weight is given (rounded as a separate norm would), then rotated."""
    rotated = d < ROTARY
    other, angle, sign = _partner(d, ROTARY, INTERLEAVED)
    dtype: tl.constexpr = source.dtype.element_ty
    value = tl.load(source + d, mask=inside, other=0.0).to(tl.float32)
    mate = tl.load(source + other, mask=rotated, other=0.0).to(tl.float32)
    if Q_NORM or K_NORM:
        inverse = tl.rsqrt(tl.sum(value * value) / DIM + eps)
        if is_q:
            if Q_NORM:
                value = _gained(value, inverse, q_norm, d, inside, dtype)
                mate = _gained(mate, inverse, q_norm, other, rotated, dtype)
        elif K_NORM:
            value = _gained(value, inverse, k_norm, d, inside, dtype)
            mate = _gained(mate, inverse, k_norm, other, rotated, dtype)
    row = cos_sin + tl.load(position).to(tl.int64) * ROTARY
    cos = tl.load(row + angle, mask=rotated, other=1.0)
    sin = tl.load(row + ROTARY // 2 + angle, mask=rotated, other=0.0)
    return value * cos + mate * sin * sign


@triton.jit
def _gained(value, inverse, weight, column, inside, dtype: tl.constexpr):
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    return (value * inverse * gain).to(dtype).to(tl.float32)


@triton.jit
def _latent_kernel(
    q, latent, norm, positions, slots, cos_sin, cache, out, q_stride_t, q_stride_h, latent_stride, eps, heads,
    DIM: tl.constexpr, LATENT: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = ROTARY // 2
    i = tl.arange(0, HALF)
    row = cos_sin + tl.load(positions + token).to(tl.int64) * ROTARY
    cos, sin = tl.load(row + i), tl.load(row + HALF + i)
    first, second = (2 * i, 2 * i + 1) if INTERLEAVED else (i, HALF + i)
    if head < heads:
        place = q + token * q_stride_t + head * q_stride_h + DIM - ROTARY
        x, y = tl.load(place + first).to(tl.float32), tl.load(place + second).to(tl.float32)
        tl.debug_barrier()  # every element is read before any is replaced
        tl.store(place + i, (x * cos - y * sin).to(q.dtype.element_ty))
        tl.store(place + HALF + i, (y * cos + x * sin).to(q.dtype.element_ty))
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
