"""Dispatch and combine against an oracle: every expert transforms in its own way, so that a wrong route, weight or count
cannot pass. Skewed traffic on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runtime_worlds import fork_world

from runtime.comm.experts import AllToAll, make_expert_comm
from runtime.comm.group import Group, make_group
from runtime.layout import RankLayout
from twin.spec.errors import SpecError

HIDDEN, CHOICES, SLOTS = 8, 3, 8
COUNTS = {"even": [5, 5, 5, 5], "one token": [0, 1, 0, 0], "none": [0, 0, 0, 0], "uneven": [7, 0, 13, 2]}
CHOOSE = ("random", "all to the first", "all to the last rank")


def exchange(rank: int, ep: int, backend: str) -> list[str]:
    """Every traffic pattern through one backend; what went wrong."""
    world = 4
    at = RankLayout(rank, 0, "mixed", 0, 0, world, 1, ep, rank, 0, SLOTS)
    comm = make_expert_comm(backend, make_group(range(world), rank, 20), at)
    wrong = []
    for name, counts in COUNTS.items():
        for choose in CHOOSE:
            x, slots, weights = traffic(rank, counts[rank], choose)
            before, kept = comm.sent_bytes, x.clone()
            arrived = comm.dispatch(x, slots, weights, max(1, *counts))
            y = transform(arrived.x_NH, arrived.slots_NK, arrived.weights_NK, at)
            got = comm.combine(y, arrived)
            want = sum_of_experts(x, slots, weights)
            if not torch.allclose(got, want, atol=1e-5) or not torch.equal(x, kept):
                wrong.append(f"{name}, {choose}: off by {(got - want).abs().max()}")
            if backend == "gloo":
                wanted = (slots // at.slots_per_rank)[:, :, None] == torch.arange(ep)
                away = wanted.any(1).repeat_interleave(at.expert_tp, 1)
                away[:, rank] = False
                arrived_away = len(arrived.x_NH) - int(wanted.any(1).repeat_interleave(at.expert_tp, 1)[:, rank].sum())
                bytes_ = int(away.sum()) * (HIDDEN * 4 + CHOICES * 8) + arrived_away * HIDDEN * 4
                if comm.sent_bytes - before != bytes_:
                    wrong.append(f"{name}, {choose}: sent {comm.sent_bytes - before} bytes, not {bytes_}")
    return wrong


def traffic(rank: int, tokens: int, choose: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(100 * rank + tokens)
    x = torch.randn(tokens, HIDDEN, generator=stream)
    slots = torch.rand(tokens, SLOTS, generator=stream).argsort(-1)[:, :CHOICES]
    if choose == "all to the first":
        slots = torch.arange(CHOICES).expand(tokens, -1).contiguous()
    elif choose == "all to the last rank":
        slots = (SLOTS - 1 - torch.arange(CHOICES)).expand(tokens, -1).contiguous()
    return x, slots, torch.rand(tokens, CHOICES, generator=stream)


def expert(slot: int, x: torch.Tensor) -> torch.Tensor:
    return x * (slot + 1) + slot


def sum_of_experts(x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for k in range(CHOICES):
            out[t] += weights[t, k] * expert(int(slots[t, k]), x[t])
    return out


def transform(x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, at: RankLayout) -> torch.Tensor:
    """This rank's share of its experts: with expert TP each rank adds an equal part."""
    out = torch.zeros_like(x)
    for n in range(len(x)):
        for k in range(slots.shape[1]):
            if slots[n, k] >= 0:
                out[n] += weights[n, k] * expert(int(slots[n, k]) + at.local_slots.start, x[n]) / at.expert_tp
    return out


@pytest.mark.parametrize(("ep", "backend"), [(4, "gloo"), (2, "gloo"), (4, "ag_rs"), (2, "ag_rs"), (1, "ag_rs"), (1, "gloo")])
def test_every_token_meets_its_experts_once(tmp_path: Path, ep: int, backend: str) -> None:
    for rank, wrong in enumerate(fork_world(4, tmp_path, exchange, ep, backend)):
        assert not wrong, f"rank {rank}: {wrong}"


def test_symmetric_memory_is_refused_where_there_is_no_gpu() -> None:
    at = RankLayout(0, 0, "mixed", 0, 0, 2, 1, 2, 0, 0, SLOTS)
    with pytest.raises(SpecError, match="needs CUDA devices"):
        make_expert_comm("symm", Group(None, (0, 1), 0), at)
    assert isinstance(make_expert_comm("auto", Group(None, (0, 1), 0), at), AllToAll)
