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


class Rows8(NamedTuple):
    """Rows in float8_e4m3fn [M, K] with one fp32 scale a row [M]."""

    data: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class Share:
    """How a product is cut: rows, columns and depth of a tile, warps, loads in flight, programs a multiprocessor.
    `whole`: no tile is cut along K. `tma`: tiles come by the copy engine. `pdl`: see `skinny.Cut`."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    resident: int = 1
    whole: bool = False
    tma: bool = False
    pdl: bool = False


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
    slots, most = triton.cdiv(each - 1, steps) + 1, triton.cdiv(steps - 1, each) + 1
    return Cuts(tiles_m, tiles, steps, each, slots, most, triton.cdiv(tiles * steps, each))


def fp8_product(
    x: Rows8,
    w_NK: torch.Tensor,
    w_scale_N: torch.Tensor,
    share: Share,
    *,
    bias_N: torch.Tensor | None = None,
    residual_MN: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """y_MN = (x * x_scale) (w * w_scale)' + bias + residual, summed in fp32."""
    rows, width = len(x.data), len(w_NK)
    out_MN = torch.empty(rows, width, dtype=dtype, device=w_NK.device)
    if not rows:
        return out_MN
    parts, c = _parts(x, w_NK, share)
    block = min(1024, triton.next_power_of_2(width))
    _sum_kernel[(rows, triton.cdiv(width, block))](
        parts, out_MN, x.scale, w_scale_N, bias_N if bias_N is not None else out_MN,
        residual_MN if residual_MN is not None else out_MN, HAS_BIAS=bias_N is not None, ADD=residual_MN is not None,
        BLOCK=block, num_warps=4, **_constants(share, c, width),
    )  # fmt: skip
    return out_MN


def fp8_product_gated(x: Rows8, w_NK: torch.Tensor, w_scale_N: torch.Tensor, share: Share) -> Rows8:
    """silu(gate) * up of a product whose columns are gates, then ups, rounded to fp8 row by row [M, N / 2]."""
    rows, width = len(x.data), len(w_NK) // 2
    assert width <= _WIDEST_ROW
    out = _rows8(rows, width, w_NK.device)
    parts, c = _parts(x, w_NK, share)
    block = triton.next_power_of_2(width)
    _sum_gate_kernel[(rows,)](
        parts, out.data, out.scale, x.scale, w_scale_N, BLOCK=block, num_warps=_warps(block), **_constants(share, c, 2 * width)
    )
    return out


def fp8_product_normed(
    x: Rows8, w_NK: torch.Tensor, w_scale_N: torch.Tensor, share: Share, norm: tuple[torch.Tensor, float], normed: int,
    dtype: torch.dtype = torch.bfloat16, bias_N: torch.Tensor | None = None,
) -> tuple[Rows8, torch.Tensor]:  # fmt: skip
    """A product whose first `normed` columns get an RMS norm (gain, epsilon) and are rounded to fp8; the others in `dtype`."""
    rows, width = len(x.data), len(w_NK)
    assert normed <= _WIDEST_ROW
    out = _rows8(rows, normed, w_NK.device)
    rest = torch.empty(rows, width - normed, dtype=dtype, device=w_NK.device)
    parts, c = _parts(x, w_NK, share)
    block = triton.next_power_of_2(max(normed, width - normed))
    _sum_norm_kernel[(rows, 2 if normed < width else 1)](
        parts, out.data, out.scale, rest, x.scale, w_scale_N, norm[0], bias_N if bias_N is not None else w_scale_N, norm[1],
        NORMED=normed, HAS_BIAS=bias_N is not None, BLOCK=block, num_warps=_warps(block), **_constants(share, c, width),
    )  # fmt: skip
    return out, rest


def _rows8(rows: int, width: int, device: torch.device) -> Rows8:
    return Rows8(torch.empty(rows, width, dtype=FP8, device=device), torch.empty(rows, dtype=torch.float32, device=device))


def _warps(block: int) -> int:
    return 4 if block <= 1024 else 8


def _constants(share: Share, c: Cuts, width: int) -> dict[str, object]:
    return {"N": width, "TILES_M": c.tiles_m, "STEPS": c.steps, "SHARE": c.share, "SLOTS": c.slots, "MOST": c.most,
            "BLOCK_M": share.m, "BLOCK_N": share.n, "PDL": share.pdl, **({"launch_pdl": True} if share.pdl else {})}


def _parts(x: Rows8, w_NK: torch.Tensor, share: Share) -> tuple[torch.Tensor, Cuts]:
    """Launch the product: fp32 parts [programs, slots, m, n]."""
    (rows, depth), width = x.data.shape, len(w_NK)
    assert x.data.is_contiguous() and w_NK.is_contiguous()
    c = cuts_of(share, rows, width, depth, multiprocessors(w_NK.device.index or 0))
    parts = torch.empty(c.programs, c.slots, share.m, share.n, dtype=torch.float32, device=w_NK.device)
    a, b = x.data, w_NK
    if share.tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        a, b = (TensorDescriptor.from_tensor(t, [block, share.k]) for t, block in ((x.data, share.m), (w_NK, share.n)))
    _parts_kernel[(c.programs,)](
        a, b, parts, rows, N=width, K=depth, TILES=c.tiles, TILES_M=c.tiles_m, STEPS=c.steps, SHARE=c.share, SLOTS=c.slots,
        TMA=share.tma, BLOCK_M=share.m, BLOCK_N=share.n, BLOCK_K=share.k, PDL=share.pdl, num_warps=share.warps,
        num_stages=share.stages, **({"launch_pdl": True} if share.pdl else {}),
    )  # fmt: skip
    return parts, c


@triton.jit(do_not_specialize=["rows"])
def _parts_kernel(
    x, w, parts, rows, N: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr, TILES_M: tl.constexpr, STEPS: tl.constexpr,
    SHARE: tl.constexpr, SLOTS: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Weight rows are the matrix unit's rows: it takes 64 of them at least, but as few as 16 of the others."""
    pid = tl.program_id(0)
    begin = pid * SHARE
    end = tl.minimum(begin + SHARE, TILES * STEPS)
    first = begin // STEPS
    wait_for_forerunner(PDL)
    k = tl.arange(0, BLOCK_K)
    for tile in range(first, tl.cdiv(end, STEPS)):
        m0 = tile % TILES_M * BLOCK_M
        n0 = tile // TILES_M * BLOCK_N
        m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for step in range(tl.maximum(begin - tile * STEPS, 0), tl.minimum(end - tile * STEPS, STEPS)):
            if TMA:
                b, a = w.load([n0, step * BLOCK_K]), x.load([m0, step * BLOCK_K])
            else:
                at = step * BLOCK_K + k
                w_at, x_at = n[:, None].to(tl.int64) * K + at[None, :], m[:, None] * K + at[None, :]
                if K % BLOCK_K == 0:
                    b = tl.load(w + w_at) if N % BLOCK_N == 0 else tl.load(w + w_at, mask=(n < N)[:, None], other=0.0)
                    a = tl.load(x + x_at, mask=(m < rows)[:, None], other=0.0)
                else:
                    b = tl.load(w + w_at, mask=(n < N)[:, None] & (at < K)[None, :], other=0.0)
                    a = tl.load(x + x_at, mask=(m < rows)[:, None] & (at < K)[None, :], other=0.0)
            acc = tl.dot(b, tl.trans(a), acc)
        part = parts + (pid * SLOTS + tile - first) * (BLOCK_M * BLOCK_N)
        place = tl.arange(0, BLOCK_M)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        tl.store(part + place, acc)


@triton.jit
def _summed(
    parts, m, n, inside, TILES_M: tl.constexpr, STEPS: tl.constexpr, SHARE: tl.constexpr, SLOTS: tl.constexpr,
    MOST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Columns n of row m, their tiles' parts summed in order of K."""
    tile = n // BLOCK_N * TILES_M + m // BLOCK_M
    first, last = tile * STEPS // SHARE, (tile * STEPS + STEPS - 1) // SHARE
    place = m % BLOCK_M * BLOCK_N + n % BLOCK_N
    acc = tl.zeros(n.shape, tl.float32)
    for i in tl.static_range(MOST):
        program = first + i
        slot = program * SLOTS + tile - program * SHARE // STEPS
        acc += tl.load(parts + slot * (BLOCK_M * BLOCK_N) + place, mask=inside & (program <= last), other=0.0)
    return acc


@triton.jit
def _sum_kernel(
    parts, out, x_scale, w_scale, bias, residual, N: tl.constexpr, TILES_M: tl.constexpr, STEPS: tl.constexpr,
    SHARE: tl.constexpr, SLOTS: tl.constexpr, MOST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    wait_for_forerunner(PDL)
    value = _summed(parts, m, n, inside, TILES_M, STEPS, SHARE, SLOTS, MOST, BLOCK_M, BLOCK_N)
    value *= tl.load(x_scale + m) * tl.load(w_scale + n, mask=inside, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + m * N + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + m * N + n, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_gate_kernel(
    parts, out, scale, x_scale, w_scale, N: tl.constexpr, TILES_M: tl.constexpr, STEPS: tl.constexpr, SHARE: tl.constexpr,
    SLOTS: tl.constexpr, MOST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0), tl.arange(0, BLOCK)
    inside = n < N // 2
    wait_for_forerunner(PDL)
    step = tl.load(x_scale + m)
    gate = _summed(parts, m, n, inside, TILES_M, STEPS, SHARE, SLOTS, MOST, BLOCK_M, BLOCK_N)
    gate *= step * tl.load(w_scale + n, mask=inside, other=0.0)
    up = _summed(parts, m, n + N // 2, inside, TILES_M, STEPS, SHARE, SLOTS, MOST, BLOCK_M, BLOCK_N)
    up *= step * tl.load(w_scale + N // 2 + n, mask=inside, other=0.0)
    quantise_row(gate * tl.sigmoid(gate) * up, out, scale, m, N // 2, n, inside)


@triton.jit
def _sum_norm_kernel(
    parts, out, scale, rest, x_scale, w_scale, gain, bias, eps, N: tl.constexpr, TILES_M: tl.constexpr, STEPS: tl.constexpr,
    SHARE: tl.constexpr, SLOTS: tl.constexpr, MOST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NORMED: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m, column, behind = tl.program_id(0), tl.arange(0, BLOCK), tl.program_id(1) == 1
    n = column + behind.to(tl.int32) * NORMED
    inside = n < tl.where(behind, N, NORMED)
    wait_for_forerunner(PDL)
    value = _summed(parts, m, n, inside, TILES_M, STEPS, SHARE, SLOTS, MOST, BLOCK_M, BLOCK_N)
    value *= tl.load(x_scale + m) * tl.load(w_scale + n, mask=inside, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    if behind:
        tl.store(rest + m * (N - NORMED) + column, value.to(rest.dtype.element_ty), mask=inside)
    else:
        value *= tl.rsqrt(tl.sum(value * value) / NORMED + eps)
        value *= tl.load(gain + n, mask=inside, other=0.0).to(tl.float32)
        quantise_row(value, out, scale, m, NORMED, n, inside)
