"""The next token of each request, on the device, without a host sync: torch operators alone.

Shapes: B requests, V vocabulary. A request's draw depends only on its own seed and position, never on who else is in
the batch, so the same request gives the same tokens whatever it is batched with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SamplingTensors:
    """Each request's settings as device tensors of B entries.

    `temperature` fp32 (0: greedy) · `top_k` int64 (0: all) · `top_p` fp32 (1: all) · `min_p` fp32 (0: all) ·
    `seed` int64 · `position` int64 (tokens generated so far; makes each draw of a request its own).
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    position: torch.Tensor


def greedy(logits_BV: torch.Tensor) -> torch.Tensor:
    """ids_B int64 of the largest logits; the lowest id among equals is not promised."""
    return logits_BV.argmax(-1)


def sample(
    logits_BV: torch.Tensor, s: SamplingTensors, *, filtered: bool = True, most: int | None = None
) -> torch.Tensor:
    """ids_B int64. Order of filters: temperature, top-k, top-p (of what top-k left), min-p (against the best token).

    `filtered` False promises, on the host, that no request of the batch filters: the sort over V is skipped. `most` promises
    that every request has 0 < top_k <= most, so that only so many need sorting. Ties at a filter's edge are all kept.
    Requests with temperature 0 are greedy.
    """
    hot = s.temperature > 0
    scaled = logits_BV.float() / torch.where(hot, s.temperature, 1.0)[:, None]
    probs = torch.softmax(scaled, -1)
    if filtered:
        probs = probs.masked_fill(probs < _threshold(probs, s, most)[:, None], 0.0)
    # inverse transform: the first token whose running sum passes u * total
    running = probs.cumsum(-1, dtype=torch.float64)
    target = uniform(s.seed, s.position) * running[:, -1]
    drawn = torch.searchsorted(running, target[:, None], right=True)[:, 0]
    return torch.where(hot, drawn.clamp(max=logits_BV.shape[1] - 1), greedy(logits_BV))


def _threshold(probs_BV: torch.Tensor, s: SamplingTensors, most: int | None) -> torch.Tensor:
    """The least probability that survives top-k, top-p and min-p, one a request."""
    ordered = probs_BV.topk(most, -1).values if most else probs_BV.sort(dim=-1, descending=True).values
    last = ordered.shape[1] - 1
    k = torch.where(s.top_k > 0, s.top_k - 1, last).clamp(max=last)
    kth = ordered.gather(1, k[:, None])
    kept = ordered.masked_fill(ordered < kth, 0.0)
    before = kept.cumsum(-1) - kept  # what is already covered when a token's turn comes
    needed = (before < s.top_p[:, None] * kept.sum(-1, keepdim=True)) & (kept > 0)
    pth = ordered.gather(1, (needed.sum(-1, keepdim=True) - 1).clamp(min=0))
    return torch.maximum(pth[:, 0], s.min_p * ordered[:, 0])


def uniform(seed_B: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
    """One float64 in [0, 1) a request: splitmix64's finaliser over seed and position (Steele, Lea, Flood 2014)."""
    x = seed_B + (position_B + 1) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _logical_right(x, shift)) * _signed(factor)
    x = x ^ _logical_right(x, 31)
    return _logical_right(x, 11).to(torch.float64) * 2.0**-53


def _logical_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same bits, as torch has no unsigned arithmetic."""
    return value - (1 << 64) if value >= 1 << 63 else value
