"""Products of a few rows with a wide weight, with what surrounds them in a decode step fused in: the RMS norm of the rows
before, the bias and the residual stream after.

Shapes: T tokens (1 to 16), N output columns, K depth. A weight [N, K] is read once, which is what such a product costs;
so programs are cut finely enough that every multiprocessor has several, and none waits for another. One row is multiplied
and summed lane by lane; more rows go through the tensor cores, padded to 16.

The norm needs no pass of its own: sums of squares are gathered while the row is multiplied, and the sum over K is scaled
afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, num_threads

MOST_ROWS = 16
_CHUNK = 2048
"""Bytes that a lane asks for at once."""


@dataclass(frozen=True)
class Cut:
    """How a product is cut: output columns a program, depth it reads at a time, warps, loads in flight; by the tensor cores or
    lane by lane. `pdl` starts it while its forerunner ends (programmatic dependent launch, sm_90): what it reads of weights
    alone is then on its way before the forerunner's results are there. `early` lets its own follower start as soon as all
    its programs have, not only once they have their inputs. `per_sm`: so many programs a multiprocessor, each of which goes
    through several tiles and reads the next while it multiplies one (0: a program a tile)."""

    n: int
    k: int
    warps: int
    stages: int = 1
    dot: bool = False
    pdl: bool = False
    early: bool = False
    per_sm: int = 0


def skinny_linear(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    cut: Cut,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
    scale_N: torch.Tensor | None = None,
    bias_N: torch.Tensor | None = None,
    residual_TN: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_TN = norm(x) weight' * scale + bias + residual, in x's dtype, fp32 inside.

    `norm`: gain [K] and epsilon of an RMS norm of x. `weight` may be float8_e4m3fn with one fp32 scale an output row.
    """
    tokens, depth = x_TK.shape
    width = weight_NK.shape[0]
    assert tokens <= MOST_ROWS and x_TK.stride(1) == 1 and weight_NK.is_contiguous()
    assert residual_TN is None or residual_TN.is_contiguous()
    out_TN = torch.empty(tokens, width, dtype=x_TK.dtype, device=x_TK.device)
    gain, eps = norm or (x_TK, 0.0)
    operands = (
        x_TK, weight_NK, out_TN, residual_TN if residual_TN is not None else x_TK, gain,
        scale_N if scale_N is not None else x_TK, bias_N if bias_N is not None else x_TK,
    )  # fmt: skip
    flags = {
        "DEPTH": depth, "NORM": norm is not None, "ADD": residual_TN is not None, "HAS_SCALE": scale_N is not None,
        "HAS_BIAS": bias_N is not None, "EVEN_N": width % cut.n == 0, "EVEN_K": depth % cut.k == 0, "PDL": cut.pdl,
        "EARLY": cut.early, "BLOCK_N": cut.n, "BLOCK_K": cut.k, "num_warps": cut.warps, **launch_options(cut),
    }  # fmt: skip
    tiles = triton.cdiv(width, cut.n)
    if cut.dot:
        _tile_kernel[(tiles,)](*operands, tokens, x_TK.stride(0), width, eps, num_stages=cut.stages, **flags)
    else:
        _vector_kernel[(tiles, tokens)](*operands, x_TK.stride(0), width, eps, **flags)
    return out_TN


def prefetchers(ahead: torch.Tensor | None, warps: int) -> int:
    """Programs that `prefetch` needs for a weight; none under the interpreter, which knows no cache."""
    return 0 if ahead is None or not ahead.is_cuda else triton.cdiv(ahead.nbytes, _CHUNK * 32 * warps)


def launch_options(cut: Cut) -> dict[str, bool]:
    """What a launch adds for programmatic dependent launch."""
    return {"launch_pdl": True} if cut.pdl else {}


@triton.jit
def prefetch(weight, part, BYTES: tl.constexpr):
    """Program `part` brings its share of a weight's first BYTES, but for an odd rest, into the second-level cache (sm_90)."""
    LANES: tl.constexpr = num_threads()
    CHUNK: tl.constexpr = 2048
    chunk = tl.minimum(part * LANES + tl.arange(0, LANES), BYTES // CHUNK - 1)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], 2048; mov.u32 $0, 0;", "=r,l",
        [weight.to(tl.int64) + chunk.to(tl.int64) * CHUNK], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def let_follower_start(EARLY: tl.constexpr):
    """First of all in a program: the kernel after may start once every program of this one has, whatever it waits for.

    That kernel's programs take what room these leave, read weights and wait for the end of this grid, which comes after the
    end of all before it, as every kernel of a chain waits. So what weights they read is all that changes.
    """
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait_for_forerunner(PDL: tl.constexpr, EARLY: tl.constexpr = False):
    """Nothing that the kernel before wrote may be read, and nothing written, before this. The kernel after may start."""
    if PDL:
        gdc_wait()
        if not EARLY:
            gdc_launch_dependents()


@triton.jit
def tile_of(
    rows, at, row_ok, DEPTH: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, ONCE: tl.constexpr = False
):
    """A tile of a weight: `rows` [n] point at row starts, `at` [k] are columns. What is read `ONCE` leaves the caches first."""
    POLICY: tl.constexpr = "evict_first" if ONCE else ""
    place = rows[:, None] + at[None, :]
    if EVEN_N and EVEN_K:
        return tl.load(place, eviction_policy=POLICY)
    if EVEN_K:
        return tl.load(place, mask=row_ok[:, None], other=0.0, eviction_policy=POLICY)
    return tl.load(place, mask=row_ok[:, None] & (at < DEPTH)[None, :], other=0.0, eviction_policy=POLICY)


@triton.jit
def _vector_kernel(
    x, w, out, residual, gain, scale, bias, x_stride, width, eps,
    DEPTH: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    let_follower_start(EARLY)
    n, token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    rows, row_ok = w + n.to(tl.int64) * DEPTH, n < width
    tile = tile_of(rows, k, row_ok, DEPTH, EVEN_N, EVEN_K)
    if NORM:
        first_gain = tl.load(gain + k, mask=k < DEPTH, other=0.0)
    wait_for_forerunner(PDL, EARLY)
    if ADD:  # with the row, not after it
        stream = tl.load(residual + token * width + n, mask=row_ok, other=0.0)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    # unrolled, so that many loads are on their way at once
    for step in tl.static_range((DEPTH + BLOCK_K - 1) // BLOCK_K):
        at = step * BLOCK_K + k
        if step > 0:
            tile = tile_of(rows, at, row_ok, DEPTH, EVEN_N, EVEN_K)
        a = tl.load(x + token * x_stride + at, mask=at < DEPTH, other=0.0).to(tl.float32)
        if NORM:
            squares += a * a
            a *= (first_gain if step == 0 else tl.load(gain + at, mask=at < DEPTH, other=0.0)).to(tl.float32)
        acc += tile.to(tl.float32) * a[None, :]
    value = tl.sum(acc, 1)
    if NORM:
        value *= tl.rsqrt(tl.sum(squares) / DEPTH + eps)
    if HAS_SCALE:
        value *= tl.load(scale + n, mask=row_ok, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + n, mask=row_ok, other=0.0).to(tl.float32)
    if ADD:
        value += stream.to(tl.float32)
    tl.store(out + token * width + n, value.to(out.dtype.element_ty), mask=row_ok)


@triton.jit(do_not_specialize=["tokens"])
def _tile_kernel(
    x, w, out, residual, gain, scale, bias, tokens, x_stride, width, eps,
    DEPTH: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    let_follower_start(EARLY)
    n, m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, 16)
    k = tl.arange(0, BLOCK_K)
    rows, row_ok, real = w + n.to(tl.int64) * DEPTH, n < width, m < tokens
    wait_for_forerunner(PDL, EARLY)
    acc = tl.zeros([16, BLOCK_N], tl.float32)
    squares = tl.zeros([16], tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        at = start + k
        a = tl.load(x + m[:, None] * x_stride + at[None, :], mask=real[:, None] & (at < DEPTH)[None, :], other=0.0)
        tile = tile_of(rows, at, row_ok, DEPTH, EVEN_N, EVEN_K)
        if NORM:
            wide = a.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            wide *= tl.load(gain + at, mask=at < DEPTH, other=0.0).to(tl.float32)[None, :]
            a = wide.to(a.dtype)
        acc = tl.dot(a, tl.trans(tile.to(a.dtype)), acc)
    if NORM:
        acc *= tl.rsqrt(squares / DEPTH + eps)[:, None]
    if HAS_SCALE:
        acc *= tl.load(scale + n, mask=row_ok, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=row_ok, other=0.0).to(tl.float32)[None, :]
    place, stored = m[:, None].to(tl.int64) * width + n[None, :], real[:, None] & row_ok[None, :]
    if ADD:
        acc += tl.load(residual + place, mask=stored, other=0.0).to(tl.float32)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=stored)
