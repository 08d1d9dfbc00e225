"""Drawing tokens: frequencies, filters, seeds, and independence of the batch."""

from __future__ import annotations

import pytest
import torch

from runtime.sampling import filtered, sample, uniform
from runtime.types import SamplingParams
from twin.spec.errors import SpecError

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])


def draw(params: SamplingParams, n: int = 4000) -> torch.Tensor:
    rows = LOGITS.expand(n, -1)
    return sample(rows, [params] * n, [uniform(9, i) for i in range(n)]).bincount(minlength=5) / n


def test_frequencies_follow_the_softmax() -> None:
    for temperature in (0.5, 1.0, 2.0):
        want = (LOGITS / temperature).softmax(-1)
        assert (draw(SamplingParams(temperature=temperature)) - want).abs().max() < 0.02


@pytest.mark.parametrize(("params", "kept"), [
    (SamplingParams(temperature=1.0, top_k=2), {0, 4}), (SamplingParams(temperature=1.0, top_p=0.6), {4}),
    (SamplingParams(temperature=1.0, top_p=0.7), {0, 4}), (SamplingParams(temperature=1.0, min_p=0.1), {0, 1, 4}),
    (SamplingParams(temperature=1.0, top_k=3, min_p=0.2), {0, 4}), (SamplingParams(temperature=0.0), {4}),
    (SamplingParams(temperature=1.0, top_p=1e-9), {4}), (SamplingParams(temperature=1e-6), {4}),
])
def test_filters_keep_what_they_should(params: SamplingParams, kept: set[int]) -> None:
    shares = draw(params, 1000)
    assert set(shares.nonzero()[:, 0].tolist()) == kept


def test_a_row_does_not_feel_its_neighbours() -> None:
    stream = torch.Generator().manual_seed(1)
    logits = torch.randn(16, 300, generator=stream)
    params = [SamplingParams(temperature=t, top_k=k, top_p=p) for t in (0.0, 0.8) for k in (0, 5) for p in (1.0, 0.5)] * 2
    draws = [uniform(i, 0) for i in range(16)]
    together = sample(logits, params, draws)
    single = [int(sample(logits[i:i + 1], params[i:i + 1], draws[i:i + 1])) for i in range(16)]
    assert together.tolist() == single


def test_filters_follow_one_another() -> None:
    """top-p counts what top-k left; ties at an edge are all kept."""
    probs = torch.tensor([[0.4, 0.2, 0.2, 0.1, 0.1]])

    def kept(top_k: int, top_p: float, min_p: float) -> list[int]:
        columns = (torch.tensor([[value]], dtype=torch.float32) for value in (top_k, top_p, min_p))
        return filtered(probs, *columns)[0].nonzero()[:, 0].tolist()

    assert kept(1, 1.0, 0.0) == [0]
    assert kept(2, 1.0, 0.0) == [0, 1, 2]
    assert kept(5, 0.39, 0.0) == [0]
    assert kept(5, 0.45, 0.0) == [0, 1, 2]
    assert kept(2, 0.49, 0.0) == [0]
    assert kept(2, 0.51, 0.0) == [0, 1, 2]
    assert kept(5, 1.0, 0.3) == [0, 1, 2]
    assert kept(5, 1e-12, 1.0) == [0]


def test_uniform_is_uniform_and_keyed() -> None:
    values = torch.tensor([uniform(seed, index) for seed in range(50) for index in range(50)])
    assert len(set(values.tolist())) == 2500
    assert (values.histc(10, 0, 1) - 250).abs().max() < 75
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_k": -1},
                                 {"min_p": 1.5}, {"max_tokens": 0}, {"seed": 2**64}, {"stop_token_ids": tuple(range(65))}])
def test_values_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(SpecError, match=next(iter(bad))):
        SamplingParams(**bad)
