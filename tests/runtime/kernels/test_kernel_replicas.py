"""The split of a batch over replicas on the device, against the policy that both follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from runtime.kernels import replicas as kernels
from runtime.replicas import Replicas
from twin.policy.placement import place_global
from twin.policy.replica_split import BATCH_SWEEPS, BatchSplit


def choices(tokens: int, experts: int, k: int, seed: int) -> torch.Tensor:
    """Skewed ids [T, K], a few of them -1."""
    rng = np.random.default_rng(seed)
    scores = rng.gumbel(size=(tokens, experts)) + rng.normal(0, 1.5, experts)
    ids = np.argsort(-scores, axis=1)[:, :k]
    ids[rng.random(tokens) < 0.1] = -1
    return torch.from_numpy(ids)


SIZES = [(16, 24, 8), (12, 15, 3), (8, 8, 4), (4, 16, 4), (256, 288, 8), (64, 96, 24)]


@pytest.mark.parametrize(("experts", "slots", "ranks", "dtype"), [
    *((*size, torch.int32) for size in SIZES), (*SIZES[0], torch.int64),
    *(pytest.param(*size, torch.int64, marks=pytest.mark.slow) for size in SIZES[1:])])
def test_the_kernel_splits_as_the_policy_does(device: torch.device, experts: int, slots: int, ranks: int,
                                              dtype: torch.dtype) -> None:
    load = np.random.default_rng(3).lognormal(0, 1, (1, experts))
    placement = place_global(load, slots, ranks).slot_to_logical[0].tolist()
    policy = BatchSplit(placement, experts, ranks)
    for source, tokens in ((0, 1), (1, 37), (ranks - 1, 400)):
        replicas = Replicas(experts, slots, ranks, source, device, kernels=True)
        replicas.place(placement)
        ids = choices(tokens, experts, min(4, experts), tokens)
        got = replicas.slots(ids.to(device, dtype))
        assert got.dtype == dtype
        assert got.cpu().flatten().tolist() == policy.slots(ids.flatten().numpy(), source).tolist()


def test_a_placement_that_changes_is_seen_by_what_was_captured(device: torch.device) -> None:
    """Tables keep their places; a layer whose experts may move looks at them even while they lie in order."""
    replicas = Replicas(4, 4, 2, 0, device, kernels=True)
    replicas.place([0, 1, 2, 3])
    ids = torch.tensor([[0, 3], [-1, -1], [2, 1]], device=device)
    assert replicas.slots(ids) is ids, "nothing is looked up where nothing can change"
    replicas.may_move = True
    tables = kernels.Tables(**replicas._table)
    assert replicas.slots(ids).tolist() == ids.tolist()
    replicas.place([2, 3, 0, 1])
    assert kernels.split(ids, tables, 0, 2, BATCH_SWEEPS).tolist() == [[2, 1], [-1, -1], [0, 3]]


def test_no_choices_at_all(device: torch.device) -> None:
    replicas = Replicas(4, 6, 2, 0, device, kernels=True)
    replicas.place([0, 1, 2, 3, 0, 1])
    assert replicas.slots(torch.empty(0, 2, dtype=torch.int64, device=device)).shape == (0, 2)
    assert replicas.slots(torch.full((3, 2), -1, device=device)).eq(-1).all()
