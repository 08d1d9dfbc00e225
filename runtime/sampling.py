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
    most = logits_RV.shape[1]
    probs = filtered(scaled.softmax(-1), column([min(p.top_k, most) or most for p in params]),
                     column([p.top_p for p in params]), column([p.min_p for p in params]))
    # inverse transform in the order of token ids: the first token whose running sum passes draw * total
    running = probs.cumsum(-1, dtype=torch.float64)
    draw = torch.tensor(draws, dtype=torch.float64, device=device)[:, None] * running[:, -1:]
    drawn = torch.searchsorted(running, draw, right=True)[:, 0].clamp(max=most - 1)
    return torch.where(temperature[:, 0] == 0, greedy, drawn)


def filtered(probs_RV: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """The probabilities with zeros where a filter cut, not renormalised; filters are columns [R, 1].

    top_k keeps the k best; top_p, of what those hold, the least head that reaches its share, at least one token; min_p
    what has at least that fraction of the best. Ties at an edge are all kept.
    """
    ordered = probs_RV.sort(-1, descending=True)[0]
    held = torch.where(ordered >= ordered.gather(1, top_k.long() - 1), ordered, 0.0)
    before = held.cumsum(-1) - held
    inside = (held > 0) & ((before < top_p * held.sum(-1, keepdim=True)) | (before == 0))
    least = torch.where(inside, ordered, torch.inf).amin(-1, keepdim=True)
    return torch.where(probs_RV >= torch.maximum(least, min_p * ordered[:, :1]), probs_RV, 0.0)
