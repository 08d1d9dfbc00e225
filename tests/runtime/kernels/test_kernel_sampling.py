"""Sampling: filters against a plain sorted implementation, draws against their distribution."""

from __future__ import annotations

import pytest
import torch

from runtime.kernels.sampling import SamplingTensors, sample, uniform


def settings(batch: int, **given: float) -> SamplingTensors:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 7, "position": 0} | given
    floats = {"temperature", "top_p", "min_p"}
    return SamplingTensors(
        **{k: torch.full((batch,), v, dtype=torch.float32 if k in floats else torch.int64) for k, v in values.items()}
    )


def draws(logits: torch.Tensor, n: int, **given: float) -> torch.Tensor:
    s = settings(n, **given)
    s.position.copy_(torch.arange(n))
    return sample(logits.expand(n, -1), s)


def kept(logits: torch.Tensor, top_k: int, top_p: float, min_p: float, temperature: float) -> torch.Tensor:
    """Renormalised probabilities of the tokens that survive, one by one as the filters are defined."""
    p = torch.softmax(logits.double() / temperature, -1)
    best = p.max()
    order = p.argsort(descending=True)
    order = order[: top_k or len(order)]
    total, running, nucleus = p[order].sum(), 0.0, []
    for token in order.tolist():
        if running >= top_p * total:
            break
        nucleus.append(token)
        running += p[token]
    out = torch.zeros_like(p)
    out[nucleus] = p[nucleus]
    out[p < min_p * best] = 0
    return out / out.sum()


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0},
        {"top_k": 3, "top_p": 1.0, "min_p": 0.0, "temperature": 1.5},
        {"top_k": 0, "top_p": 0.7, "min_p": 0.0, "temperature": 1.0},
        {"top_k": 5, "top_p": 0.8, "min_p": 0.0, "temperature": 0.8},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.2, "temperature": 1.0},
        {"top_k": 1, "top_p": 0.1, "min_p": 0.9, "temperature": 2.0},
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(filters, rng) -> None:
    logits = torch.randn(11, generator=rng)
    want = kept(logits, **filters)
    n = 20_000
    seen = draws(logits, n, **filters).bincount(minlength=11) / n
    assert not seen[want == 0].any()
    # five standard deviations of a count's share
    assert ((seen - want).abs() <= 5 * (want * (1 - want) / n).sqrt()).all()


def test_temperature_zero_is_greedy(rng) -> None:
    logits = torch.randn(4, 50, generator=rng)
    assert torch.equal(sample(logits, settings(4, temperature=0.0)), logits.argmax(-1))


def test_unfiltered_path_draws_the_same(rng) -> None:
    logits, s = torch.randn(64, 40, generator=rng), settings(64)
    assert torch.equal(sample(logits, s), sample(logits, s, filtered=False))


def test_a_draw_is_its_requests_own(rng) -> None:
    logits = torch.randn(5, 1000, generator=rng)
    s = settings(5)
    s.seed.copy_(torch.tensor([3, 1, 3, 9, -5]))
    together = sample(logits, s)
    for b in range(5):
        alone = SamplingTensors(*(getattr(s, f)[b : b + 1] for f in s.__dataclass_fields__))
        assert sample(logits[b : b + 1], alone)[0] == together[b]


def test_uniform_is_splitmix64() -> None:
    """First outputs for seed 1234567, as published with the generator's reference implementations."""
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    got = uniform(torch.full((3,), 1234567), torch.arange(3))
    assert got.tolist() == [(w >> 11) * 2.0**-53 for w in want]


def test_a_bound_on_top_k_changes_nothing(rng) -> None:
    logits, s = torch.randn(64, 300, generator=rng), settings(64, top_k=20, top_p=0.8)
    assert torch.equal(sample(logits, s), sample(logits, s, most=32))
