"""Small fused operators between the GEMMs: norm with residual, activation, row-wise fp8 quantisation.

Shapes: T tokens, H hidden, I expert or MLP width, N rows. fp8 is float8_e4m3fn with one fp32 scale a row:
value = fp8 * scale, scale = max|row| / 448 (the largest e4m3 number). `early`: a kernel behind that is launched for it may
start at once, and wait by itself (see `skinny.Cut`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.kernels.skinny import let_follower_start

FP8 = torch.float8_e4m3fn
_FP8_MAX = tl.constexpr(448.0)
_TINY = tl.constexpr(1e-10)  # the least scale's numerator: a row of zeros must not divide by zero


def add_rmsnorm(
    x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, residual_TH: torch.Tensor | None = None
) -> torch.Tensor:
    """RMS norm of x (+ residual) times weight, in x's dtype with fp32 inside; `residual_TH` is replaced by the sum.

    The sum is rounded to the residual's dtype before the norm, as separate operators would do. Rows may be strided.
    """
    tokens, hidden = x_TH.shape
    assert x_TH.stride(1) == 1 and (residual_TH is None or residual_TH.is_contiguous())
    out_TH = torch.empty(tokens, hidden, dtype=x_TH.dtype, device=x_TH.device)
    block = triton.next_power_of_2(hidden)
    _add_rmsnorm_kernel[(tokens,)](
        x_TH, residual_TH if residual_TH is not None else x_TH, weight_H, out_TH, weight_H, x_TH.stride(0), hidden, eps,
        HAS_RESIDUAL=residual_TH is not None, QUANT=False, EARLY=False, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out_TH


def add_rmsnorm_quant(
    x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, residual_TH: torch.Tensor | None = None, *, early: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rmsnorm` then `quant_fp8_rows`, without the row in between touching memory."""
    tokens, hidden = x_TH.shape
    assert x_TH.stride(1) == 1 and (residual_TH is None or residual_TH.is_contiguous())
    out = torch.empty(tokens, hidden, dtype=FP8, device=x_TH.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x_TH.device)
    block = triton.next_power_of_2(hidden)
    _add_rmsnorm_kernel[(tokens,)](
        x_TH, residual_TH if residual_TH is not None else x_TH, weight_H, out, scale, x_TH.stride(0), hidden, eps,
        HAS_RESIDUAL=residual_TH is not None, QUANT=True, EARLY=early, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out, scale


def silu_mul(gate_up_N2I: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of rows that hold gate, then up; fp32 inside."""
    rows, twice = gate_up_N2I.shape
    width = twice // 2
    assert gate_up_N2I.is_contiguous()
    out_NI = torch.empty(rows, width, dtype=gate_up_N2I.dtype, device=gate_up_N2I.device)
    block = min(1024, triton.next_power_of_2(width))
    _silu_mul_kernel[(rows, triton.cdiv(width, block))](gate_up_N2I, out_NI, width, BLOCK=block, num_warps=4)
    return out_NI


def silu_mul_quant(gate_up_N2I: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`silu_mul` then `quant_fp8_rows`, without the row in between touching memory."""
    rows, twice = gate_up_N2I.shape
    assert gate_up_N2I.is_contiguous()
    return _quantised(_silu_mul_quant_kernel, gate_up_N2I, rows, twice // 2)


def quant_fp8_rows(
    x_NH: torch.Tensor, num_used: torch.Tensor | None = None, *, early: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(fp8 rows, fp32 scale a row), dynamic: each row's largest magnitude becomes 448.

    With `num_used` [1] int32, a device's count, later rows are neither read nor written.
    """
    assert x_NH.is_contiguous()
    return _quantised(_quant_kernel, x_NH, *x_NH.shape, num_used, early)


def to_half(x: torch.Tensor) -> torch.Tensor:
    """x in fp16, saturated at its largest number instead of overflowing."""
    assert x.is_contiguous()
    out = torch.empty_like(x, dtype=torch.float16)
    _half_kernel[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), BLOCK=1024, num_warps=4)
    return out


def _quantised(
    kernel, x, rows: int, width: int, num_used: torch.Tensor | None = None, early: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(rows, width, dtype=FP8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    used = num_used if num_used is not None else scale
    kernel[(rows,)](
        x, out, scale, used, width, LIMITED=num_used is not None, EARLY=early, BLOCK=block, num_warps=_warps(block)
    )
    return out, scale


def _warps(block: int) -> int:
    return 1 if block <= 1024 else 4 if block <= 4096 else 8


@triton.jit
def _add_rmsnorm_kernel(
    x, residual, weight, out, out_scale, x_stride, hidden, eps, HAS_RESIDUAL: tl.constexpr, QUANT: tl.constexpr,
    EARLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    let_follower_start(EARLY)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    value = tl.load(x + token * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + token * hidden + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(residual.dtype.element_ty)
        tl.store(residual + token * hidden + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / hidden + eps)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if QUANT:
        quantise_row(value * scale * gain, out, out_scale, token, hidden, column, inside)
    else:
        tl.store(out + token * hidden + column, (value * scale * gain).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul_row(gate_up, row, width, column, inside):
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    return gate * tl.sigmoid(gate) * up


@triton.jit
def quantise_row(value, out, scale, row, width, column, inside):
    """Write one row as fp8 and its scale. `value` is fp32 with zeros outside."""
    step = tl.maximum(tl.max(tl.abs(value)), _TINY) / _FP8_MAX
    tl.store(scale + row, step)
    tl.store(out + row * width + column, (value / step).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul_kernel(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = _silu_mul_row(gate_up, row, width, column, column < width)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=column < width)


@triton.jit
def _silu_mul_quant_kernel(gate_up, out, scale, num_used, width, LIMITED: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    let_follower_start(EARLY)
    row = tl.program_id(0).to(tl.int64)
    if LIMITED:  # noqa: SIM102 - one `if` would load even when not limited
        if row >= tl.load(num_used):
            return
    column = tl.arange(0, BLOCK)
    value = _silu_mul_row(gate_up, row, width, column, column < width)
    quantise_row(value, out, scale, row, width, column, column < width)


@triton.jit
def _quant_kernel(x, out, scale, num_used, width, LIMITED: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    let_follower_start(EARLY)
    row = tl.program_id(0).to(tl.int64)
    if LIMITED:  # noqa: SIM102 - one `if` would load even when not limited
        if row >= tl.load(num_used):
            return
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
    quantise_row(value, out, scale, row, width, column, column < width)


@triton.jit(do_not_specialize=["size"])
def _half_kernel(x, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, tl.minimum(tl.maximum(value, -65504.0), 65504.0).to(tl.float16), mask=at < size)
