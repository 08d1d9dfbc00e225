"""Drawing the next token. What a request draws depends on its logits, its seed and the token's index, and on nothing
else: not on the batch it runs in, nor on how the model is cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.types import SamplingParams

_MASK = (1 << 64) - 1


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for (seed, index), by the SplitMix64 finaliser (Steele, Lea and Flood, 2014)."""
    z = ((seed & _MASK) + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & _MASK
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def sample(logits_RV: torch.Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> torch.Tensor:
    """One token a row, int64 [R]. `draws[r]` in [0, 1) decides row r; greedy rows ignore it."""
    greedy = logits_RV.argmax(-1)
    if all(p.temperature == 0 for p in params):
        return greedy
    device = logits_RV.device

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    temperature = column([p.temperature for p in params])
    scaled = logits_RV.float() / temperature.clamp(min=1e-6)
    probs, ids = filtered(scaled, column([p.top_k or logits_RV.shape[1] for p in params]),
                          column([p.top_p for p in params]), column([p.min_p for p in params]))
    ends = probs.double().cumsum(-1)
    draw = torch.tensor(draws, dtype=torch.float64, device=device)[:, None] * ends[:, -1:]
    at = torch.searchsorted(ends, draw, right=True).clamp(max=logits_RV.shape[1] - 1)
    return torch.where(temperature[:, 0] == 0, greedy, ids.gather(1, at)[:, 0])


def filtered(scaled_RV: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor,
             min_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities in falling order, zero where a filter cut; their token ids), both [R, V]; not renormalised.

    top_k keeps the k best; top_p the shortest prefix that reaches p, at least one token; min_p what has at least that
    fraction of the best token's probability. All three look at the softmax before any cut.
    """
    ordered, ids = scaled_RV.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs
    rank = torch.arange(probs.shape[1], device=probs.device)
    keep = (rank < top_k) & ((before < top_p) | (rank == 0)) & (probs >= min_p * probs[:, :1])
    return probs.masked_fill(~keep, 0.0), ids
