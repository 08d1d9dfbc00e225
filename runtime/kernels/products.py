"""Row-wise scaled fp8 products for the rows of a decode step (1 to about 256), cut so that every multiprocessor reads weights.

Shapes: M rows, N output columns, K depth; weight [N, K]. Tiles of the output alone are too few (a 7168-column product has 56
tiles of 128 columns for 132 multiprocessors). So tiles and their steps along K are numbered through, and each program takes
an equal share of the numbers: parts of up to a few tiles. Parts go to memory in fp32, and a second kernel sums each tile's in
order of K, so that sums are the same every time. It applies scales, bias and residual stream, or what follows a product in a
layer: an RMS norm, or an activation, and the rounding to fp8 for the next product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from runtime.kernels.fused import FP8, quantise_row
from runtime.kernels.skinny import wait_for_forerunner
from runtime.kernels.splits import multiprocessors

_WIDEST_ROW = 8192
"""Columns of a row that one program can hold when the whole row decides a scale."""
_SUM_ROWS = 8


class Rows8(NamedTuple):
    """Rows in float8_e4m3fn [M, K] with one fp32 scale a row [M]. `dtype`: what they were rounded from, and products are."""

    data: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Share:
    """How a product is cut: rows, columns and depth of a tile, warps, loads in flight, programs a multiprocessor.
    `whole`: no tile is cut along K. `tma`: tiles come by the copy engine. `pdl`: see `skinny.Cut`; `ahead`: so many bytes of each
    of its first tile's weight rows a program then asks for while its forerunner ends."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    resident: int = 1
    whole: bool = False
    tma: bool = False
    pdl: bool = False
    ahead: int = 0


class Cuts(NamedTuple):
    """A `Share` at a shape. Programs take `share` steps each; a tile takes `steps` and is cut into `most` parts at most; a
    program has room for `slots` parts."""

    tiles_m: int
    tiles: int
    steps: int
    share: int
    slots: int
    most: int
    programs: int


def cuts_of(share: Share, rows: int, width: int, depth: int, processors: int) -> Cuts:
    """The shares of programs, all but the last equal."""
    tiles_m, steps = triton.cdiv(rows, share.m), triton.cdiv(depth, share.k)
    tiles = tiles_m * triton.cdiv(width, share.n)
    each = steps if share.whole else triton.cdiv(tiles * steps, processors * share.resident)
    slots = triton.cdiv(each - 1, steps) + 1
    most = 1 if each % steps == 0 else triton.cdiv(steps - 1, each) + 1
    return Cuts(tiles_m, tiles, steps, each, slots, most, triton.cdiv(tiles * steps, each))


def fp8_product(
    x: Rows8,
    w_NK: torch.Tensor,
    w_scale_N: torch.Tensor,
    share: Share,
    *,
    bias_N: torch.Tensor | None = None,
    residual_MN: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_MN = (x * x_scale) (w * w_scale)' + bias + residual, summed in fp32."""
    rows, width = len(x.data), len(w_NK)
    out_MN = torch.empty(rows, width, dtype=x.dtype, device=w_NK.device)
    if not rows:
        return out_MN
    after = (
        out_MN, x.scale, w_scale_N, bias_N if bias_N is not None else out_MN,
        residual_MN if residual_MN is not None else out_MN,
    )  # fmt: skip
    flags = {"HAS_BIAS": bias_N is not None, "ADD": residual_MN is not None}
    parts, c = _parts(x, w_NK, share, after, flags)
    if c.most > 1:
        _sum_kernel[(triton.cdiv(rows, _SUM_ROWS), triton.cdiv(width, share.n))](
            parts, *after, width, rows, c.tiles_m, c.steps, c.share, c.slots, ROWS=_SUM_ROWS, **flags,
            **_constants(share, c, 4),
        )  # fmt: skip
    return out_MN


def fp8_product_gated(x: Rows8, w_NK: torch.Tensor, w_scale_N: torch.Tensor, share: Share) -> Rows8:
    """silu(gate) * up of a product whose columns are gates, then ups, rounded to fp8 row by row [M, N / 2]; see `row_fits`."""
    rows, width = len(x.data), len(w_NK) // 2
    assert row_fits(width, share)
    out = _like(x, width)
    parts, c = _parts(x, w_NK, share)
    _sum_gate_kernel[(rows,)](
        parts, out.data, out.scale, x.scale, w_scale_N, width, c.tiles_m, c.steps, c.share, c.slots,
        TILES=triton.next_power_of_2(width // share.n), **_constants(share, c, _warps(width)),
    )  # fmt: skip
    return out


def fp8_product_normed(
    x: Rows8, w_NK: torch.Tensor, w_scale_N: torch.Tensor, share: Share, norm: tuple[torch.Tensor, float],
    bias_N: torch.Tensor | None = None,
) -> tuple[Rows8, torch.Tensor]:  # fmt: skip
    """A product whose first columns, as many as the gain of `norm` has, get that RMS norm (gain, epsilon) and are rounded to
    fp8; the others are not. See `row_fits`."""
    rows, width, normed = len(x.data), len(w_NK), len(norm[0])
    assert row_fits(normed, share)
    out = _like(x, normed)
    rest = torch.empty(rows, width - normed, dtype=x.dtype, device=w_NK.device)
    parts, c = _parts(x, w_NK, share)
    most = max(normed, width - normed)
    _sum_norm_kernel[(rows, 2 if normed < width else 1)](
        parts, out.data, out.scale, rest, x.scale, w_scale_N, norm[0], bias_N if bias_N is not None else w_scale_N, norm[1],
        width, normed, c.tiles_m, c.steps, c.share, c.slots, HAS_BIAS=bias_N is not None,
        TILES=triton.next_power_of_2(triton.cdiv(most, share.n)), **_constants(share, c, _warps(most)),
    )  # fmt: skip
    return out, rest


def row_fits(columns: int, share: Share) -> bool:
    """Whether one program may hold so many columns of a row, in whole tiles."""
    return columns % share.n == 0 and columns <= _WIDEST_ROW


def _like(x: Rows8, width: int) -> Rows8:
    data = torch.empty(len(x.data), width, dtype=FP8, device=x.data.device)
    return Rows8(data, torch.empty(len(data), dtype=torch.float32, device=data.device), x.dtype)


def _warps(columns: int) -> int:
    return 4 if columns <= 1024 else 8


def _constants(share: Share, c: Cuts, warps: int) -> dict[str, object]:
    return {"MOST": triton.next_power_of_2(c.most), "BLOCK_M": share.m, "BLOCK_N": share.n, "PDL": share.pdl,
            "num_warps": warps, **({"launch_pdl": True} if share.pdl else {})}


def _parts(
    x: Rows8, w_NK: torch.Tensor, share: Share, after: tuple[torch.Tensor, ...] = (), flags: dict[str, bool] | None = None
) -> tuple[torch.Tensor, Cuts]:
    """Launch the product: fp32 parts [programs, slots, m, n], or, given what comes `after` and tiles that are not cut, all."""
    (rows, depth), width = x.data.shape, len(w_NK)
    assert x.data.is_contiguous() and w_NK.is_contiguous()
    c = cuts_of(share, rows, width, depth, multiprocessors(w_NK.device.index or 0))
    direct = bool(after) and c.most == 1
    parts = x.scale
    if not direct:
        parts = torch.empty(c.programs, c.slots, share.m, share.n, dtype=torch.float32, device=w_NK.device)
    a, b = x.data, w_NK
    if share.tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        a, b = (TensorDescriptor.from_tensor(t, [block, share.k]) for t, block in ((x.data, share.m), (w_NK, share.n)))
    _parts_kernel[(c.programs,)](
        a, b, w_NK, parts, *(after or (x.scale,) * 5), width, depth, rows, c.tiles, c.tiles_m, c.steps, c.share, c.slots,
        DIRECT=direct, **(flags or {"HAS_BIAS": False, "ADD": False}), TMA=share.tma, EVEN_N=width % share.n == 0,
        EVEN_K=depth % share.k == 0, BLOCK_M=share.m, BLOCK_N=share.n, BLOCK_K=share.k, PDL=share.pdl,
        AHEAD=min(share.ahead, depth) if share.pdl and depth % 16 == 0 else 0, num_warps=share.warps,
        num_stages=share.stages, **({"launch_pdl": True} if share.pdl else {}),
    )  # fmt: skip
    return parts, c


@triton.jit
def _ask(places, BYTES: tl.constexpr):
    """Bring BYTES, of sixteen times so many, from each place into the second-level cache (sm_90)."""
    tl.inline_asm_elementwise(
        f"cp.async.bulk.prefetch.L2.global [$1], {BYTES}; mov.u32 $0, 0;", "=r,l", [places.to(tl.int64)], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _finished(
    value, m, n, inside, x_scale, w_scale, bias, residual, width, HAS_BIAS: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """Sums with what belongs to them; m and n broadcast against each other."""
    value *= tl.load(x_scale + m, mask=inside, other=0.0) * tl.load(w_scale + n, mask=inside, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + m * width + n, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["rows", "tiles", "tiles_m", "steps", "share", "slots"])
def _parts_kernel(
    x, w, w_rows, parts, out, x_scale, w_scale, bias, residual, width, depth, rows, tiles, tiles_m, steps, share, slots,
    DIRECT: tl.constexpr, HAS_BIAS: tl.constexpr, ADD: tl.constexpr, TMA: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Weight rows are the matrix unit's rows: it takes 64 of them at least, but as few as 16 of the others."""
    pid = tl.program_id(0)
    begin = pid * share
    end = tl.minimum(begin + share, tiles * steps)
    first = begin // steps
    if AHEAD > 0:
        row = tl.minimum(first // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N), width - 1).to(tl.int64)
        _ask(w_rows + row * depth + tl.minimum((begin - first * steps) * BLOCK_K, depth - AHEAD), AHEAD)
    wait_for_forerunner(PDL)
    k = tl.arange(0, BLOCK_K)
    for tile in range(first, tl.cdiv(end, steps)):
        m0 = tile % tiles_m * BLOCK_M
        n0 = tile // tiles_m * BLOCK_N
        m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for step in range(tl.maximum(begin - tile * steps, 0), tl.minimum(end - tile * steps, steps)):
            if TMA:
                b, a = w.load([n0, step * BLOCK_K]), x.load([m0, step * BLOCK_K])
            else:
                at = step * BLOCK_K + k
                w_at, x_at = n[:, None].to(tl.int64) * depth + at[None, :], m[:, None] * depth + at[None, :]
                if EVEN_K:
                    b = tl.load(w + w_at) if EVEN_N else tl.load(w + w_at, mask=(n < width)[:, None], other=0.0)
                    a = tl.load(x + x_at, mask=(m < rows)[:, None], other=0.0)
                else:
                    b = tl.load(w + w_at, mask=(n < width)[:, None] & (at < depth)[None, :], other=0.0)
                    a = tl.load(x + x_at, mask=(m < rows)[:, None] & (at < depth)[None, :], other=0.0)
            acc = tl.dot(b, tl.trans(a), acc)
        if DIRECT:
            inside = (n < width)[:, None] & (m < rows)[None, :]
            acc = _finished(acc, m[None, :], n[:, None], inside, x_scale, w_scale, bias, residual, width, HAS_BIAS, ADD)
            tl.store(out + m[None, :] * width + n[:, None], acc.to(out.dtype.element_ty), mask=inside)
        else:
            part = parts + (pid * slots + tile - first) * (BLOCK_M * BLOCK_N)
            tl.store(part + tl.arange(0, BLOCK_M)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None], acc)


@triton.jit
def _summed(parts, tile, place, inside, steps, share, slots, MOST: tl.constexpr, SIZE: tl.constexpr):
    """A tile's parts, summed in order of K, at places within it. Tiles and places broadcast against each other."""
    first, last = tile * steps // share, (tile * steps + steps - 1) // share
    acc = tl.load(parts + (first * slots + tile - first * share // steps) * SIZE + place, mask=inside, other=0.0)
    for i in tl.static_range(1, MOST):
        program = first + i
        slot = program * slots + tile - program * share // steps
        acc += tl.load(parts + slot * SIZE + place, mask=inside & (program <= last), other=0.0)
    return acc


@triton.jit(do_not_specialize=["rows", "tiles_m", "steps", "share", "slots"])
def _sum_kernel(
    parts, out, x_scale, w_scale, bias, residual, width, rows, tiles_m, steps, share, slots, HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr, MOST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Some rows of one tile."""
    m0, column = tl.program_id(0) * ROWS, tl.arange(0, BLOCK_N)
    tile = tl.program_id(1) * tiles_m + m0 // BLOCK_M
    row, n = tl.arange(0, ROWS), tl.program_id(1) * BLOCK_N + column
    inside = (m0 + row < rows)[:, None] & (n < width)[None, :]
    wait_for_forerunner(PDL)
    place = (m0 % BLOCK_M + row)[:, None] * BLOCK_N + column[None, :]
    value = _summed(parts, tile, place, inside, steps, share, slots, MOST, BLOCK_M * BLOCK_N)
    m = (m0 + row)[:, None]
    value = _finished(value, m, n[None, :], inside, x_scale, w_scale, bias, residual, width, HAS_BIAS, ADD)
    tl.store(out + m * width + n[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _scaled_row(
    parts, x_scale, w_scale, m, first_tile, t, column, inside, tiles_m, steps, share, slots, MOST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[TILES, BLOCK_N]: row m of the tiles t from `first_tile`, scaled."""
    tile = ((first_tile + t) * tiles_m + m // BLOCK_M)[:, None]
    place = m % BLOCK_M * BLOCK_N + column[None, :]
    value = _summed(parts, tile, place, inside, steps, share, slots, MOST, BLOCK_M * BLOCK_N)
    n = (first_tile + t)[:, None] * BLOCK_N + column[None, :]
    return value * (tl.load(x_scale + m) * tl.load(w_scale + n, mask=inside, other=0.0))


@triton.jit(do_not_specialize=["tiles_m", "steps", "share", "slots"])
def _sum_gate_kernel(
    parts, out, scale, x_scale, w_scale, width, tiles_m, steps, share, slots, TILES: tl.constexpr, MOST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m, t, column = tl.program_id(0), tl.arange(0, TILES), tl.arange(0, BLOCK_N)
    n = t[:, None] * BLOCK_N + column[None, :]
    inside = n < width
    wait_for_forerunner(PDL)
    gate = _scaled_row(
        parts, x_scale, w_scale, m, 0, t, column, inside, tiles_m, steps, share, slots, MOST, BLOCK_M, BLOCK_N
    )  # fmt: skip
    up = _scaled_row(
        parts, x_scale, w_scale, m, width // BLOCK_N, t, column, inside, tiles_m, steps, share, slots, MOST, BLOCK_M, BLOCK_N
    )  # fmt: skip
    quantise_row(gate * tl.sigmoid(gate) * up, out, scale, m, width, n, inside)


@triton.jit(do_not_specialize=["tiles_m", "steps", "share", "slots"])
def _sum_norm_kernel(
    parts, out, scale, rest, x_scale, w_scale, gain, bias, eps, width, normed, tiles_m, steps, share, slots,
    HAS_BIAS: tl.constexpr, TILES: tl.constexpr, MOST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    m, t, column = tl.program_id(0), tl.arange(0, TILES), tl.arange(0, BLOCK_N)
    behind = tl.program_id(1) * normed  # the second program of a row has what is not normed
    n = behind + t[:, None] * BLOCK_N + column[None, :]
    inside = n < tl.where(behind > 0, width, normed)
    wait_for_forerunner(PDL)
    value = _scaled_row(
        parts, x_scale, w_scale, m, behind // BLOCK_N, t, column, inside, tiles_m, steps, share, slots, MOST, BLOCK_M, BLOCK_N
    )  # fmt: skip
    if HAS_BIAS:
        value += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    if behind > 0:
        tl.store(rest + m * (width - normed) + n - normed, value.to(rest.dtype.element_ty), mask=inside)
    else:
        value *= tl.rsqrt(tl.sum(value * value) / normed + eps)
        value *= tl.load(gain + n, mask=inside, other=0.0).to(tl.float32)
        quantise_row(value, out, scale, m, normed, n, inside)
