"""The least probability that survives top-k, top-p and min-p, without sorting the vocabulary.

A probability's bits, read as an integer, order as the number does; so the k-th largest probability and the nucleus's edge
are found exactly, three bits a pass over the row, which stays in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROUNDS = tl.constexpr(10)  # of 3 bits: probabilities are at most 1.0, whose bits 0x3F800000 fit in 30


def threshold(
    probs_BV: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """threshold_B fp32 as `sampling` defines the filters: keep top_k (int64, 0: all), of these the fewest best that reach
    top_p of their sum (fp32), and what is at least min_p (fp32) times the best. Tokens at the threshold are kept.
    """
    batch, vocab = probs_BV.shape
    assert probs_BV.dtype == torch.float32 and probs_BV.is_contiguous()
    out = torch.empty(batch, dtype=torch.float32, device=probs_BV.device)
    _threshold_kernel[(batch,)](probs_BV, top_k, top_p, min_p, out, vocab, BLOCK=2048, num_warps=16)
    return out


@triton.jit
def _edge(row, vocab, needed, floor, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest bits t >= floor whose tokens (bits >= t) reach `needed`, in number or in probability."""
    edge = 0
    digit = tl.arange(0, 8)
    for i in range(_ROUNDS):
        shift = 3 * (_ROUNDS - 1 - i)
        candidate = edge + (digit << shift)
        seen = tl.zeros([BLOCK, 8], tl.float32)  # summed across lanes once a round, not once a block
        for start in range(0, vocab, BLOCK):
            at = start + tl.arange(0, BLOCK)
            p = tl.load(row + at, mask=at < vocab, other=0.0)
            bits = p.to(tl.int32, bitcast=True)
            weight = tl.where(at < vocab, 1.0, 0.0) if BY_COUNT else tl.where(bits >= floor, p, 0.0)
            seen += tl.where(bits[:, None] >= candidate[None, :], weight[:, None], 0.0)
        reached = tl.sum(seen, 0)
        # digit 0 reached it in the round before; reached falls as the digit grows
        edge += (tl.maximum(tl.sum((reached >= needed).to(tl.int32)), 1) - 1) << shift
    return tl.maximum(edge, floor)


@triton.jit
def _threshold_kernel(probs, top_k, top_p, min_p, out, vocab, BLOCK: tl.constexpr):
    request = tl.program_id(0).to(tl.int64)
    row = probs + request * vocab
    k = tl.load(top_k + request)
    share = tl.load(top_p + request)
    best = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(row + at, mask=at < vocab, other=0.0))
    edge = 0
    if (k > 0) & (k < vocab):
        edge = _edge(row, vocab, k.to(tl.float32), 0, True, BLOCK)
    if share < 1.0:
        kept = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            at = start + tl.arange(0, BLOCK)
            p = tl.load(row + at, mask=at < vocab, other=0.0)
            kept += tl.where(p.to(tl.int32, bitcast=True) >= edge, p, 0.0)
        edge = _edge(row, vocab, share * tl.sum(kept), edge, False, BLOCK)
    least = edge.to(tl.float32, bitcast=True)
    tl.store(out + request, tl.maximum(least, tl.load(min_p + request) * tl.max(best)))
