"""How kernel tests compare: relative error in norm against float64, on data and outputs that hide nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# The interpreter multiplies bf16 as integers and truncates to bf16 and fp8: fp16 stands in, fp8 is off by a whole step.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
FP8_STEP = 0.01 if torch.cuda.is_available() else 0.13


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want|| in float64; NaN anywhere gives NaN, which is below no bound."""
    got, want = got.double().cpu(), want.double().cpu()
    return float((got - want).norm() / want.norm())


def normal(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=rng) * scale).to(dtype)


@contextmanager
def poisoned(monkeypatch) -> Iterator[None]:
    """Inside, torch.empty gives NaN (or the most negative integer): an element that no kernel writes shows."""
    plain, plain_like = torch.empty, torch.empty_like

    def poison(t: torch.Tensor) -> torch.Tensor:
        if t.dtype.is_floating_point:
            return t.copy_(torch.full(t.shape, float("nan")).to(t.dtype))
        return t.fill_(torch.iinfo(t.dtype).min)

    with monkeypatch.context() as m:
        m.setattr(torch, "empty", lambda *a, **k: poison(plain(*a, **k)))
        m.setattr(torch, "empty_like", lambda *a, **k: poison(plain_like(*a, **k)))
        yield


def paged_cache(
    rng: torch.Generator, lengths: list[int], block_tokens: int, tail: tuple[int, ...], dtype: torch.dtype, pair: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(cache, block table, lengths): blocks scattered, NaN in every slot that no sequence owns, -1 past each table row.

    `pair` gives [num_blocks, 2, block_tokens, *tail] (keys and values), else [num_blocks, block_tokens, *tail].
    """
    needed = [-(-n // block_tokens) for n in lengths]
    num_blocks = sum(needed) + 3
    order = torch.randperm(num_blocks, generator=rng).tolist()
    lead = (num_blocks, 2, block_tokens) if pair else (num_blocks, block_tokens)
    cache = torch.full((*lead, *tail), float("nan"))
    table = torch.full((len(lengths), max(*needed, 1) + 1), -1, dtype=torch.int32)
    for b, length in enumerate(lengths):
        for p in range(needed[b]):
            block = order.pop()
            table[b, p] = block
            used = min(block_tokens, length - p * block_tokens)
            data = normal(rng, *lead[1:-1], used, *tail)
            cache[block][..., :used, *([slice(None)] * len(tail))] = data
    return cache.to(dtype), table, torch.tensor(lengths, dtype=torch.int32)
