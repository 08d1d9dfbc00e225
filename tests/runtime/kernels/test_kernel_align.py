"""Every row lands once, in its expert's blocks, in order."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import poisoned

from runtime.kernels.align import align


def expected(ids: torch.Tensor, experts: int, block_m: int, local: list[int]) -> tuple[list[int], list[int], list[int]]:
    rows, blocks, ends = [], [], []
    for expert in range(experts):
        mine = [row for row, got in enumerate(local) if got == expert]
        padded = -(-len(mine) // block_m) * block_m
        rows += mine + [ids.numel()] * (padded - len(mine))
        blocks += [expert] * (padded // block_m)
        ends.append(len(rows))
    return rows, blocks, ends


CASES = {
    "random": (37, 2, 5, 16),
    "batch 1": (1, 8, 40, 16),
    "more experts than rows": (3, 2, 70, 16),
    "no padding": (50, 4, 7, 1),
    "wide blocks": (100, 2, 3, 64),
}


@pytest.mark.parametrize("case", CASES)
def test_sorts_and_pads(case: str, device: torch.device, rng: torch.Generator, monkeypatch) -> None:
    tokens, choices, experts, block_m = CASES[case]
    ids = torch.randint(0, experts, (tokens, choices), generator=rng, dtype=torch.int32)
    check(ids, experts, block_m, device, monkeypatch)


@pytest.mark.parametrize("only", [0, 6])
def test_all_rows_to_one_expert(only: int, device: torch.device, monkeypatch) -> None:
    check(torch.full((33, 2), only, dtype=torch.int32), 7, 16, device, monkeypatch)


def test_rows_of_other_ranks_are_skipped(device: torch.device, rng: torch.Generator, monkeypatch) -> None:
    ids = torch.randint(-1, 12, (40, 3), generator=rng, dtype=torch.int32)
    expert_map = torch.tensor([-1, 2, -1, 0, -1, -1, 1, -1, 3, 9], dtype=torch.int32)  # 9 is no local expert
    check(ids, 4, 16, device, monkeypatch, expert_map)


def test_counting_launch_agrees(device: torch.device, rng: torch.Generator, monkeypatch) -> None:
    monkeypatch.setattr("runtime.kernels.align._HISTOGRAM_ROWS", 10)
    ids = torch.randint(0, 6, (2500, 2), generator=rng, dtype=torch.int32)
    check(ids, 6, 16, device, monkeypatch)


def test_long_lists_of_which_some_are_elsewhere(device: torch.device, rng: torch.Generator, monkeypatch) -> None:
    """Chunks, the last of them not full; experts that get nothing; more experts than chunks."""
    monkeypatch.setattr("runtime.kernels.align._HISTOGRAM_ROWS", 10)
    monkeypatch.setattr("runtime.kernels.align._CHUNKS", 2)
    ids = torch.randint(-2, 9, (1111, 3), generator=rng, dtype=torch.int32)
    expert_map = torch.tensor([-1, 2, -1, 0, -1, -1, 1, -1, 5], dtype=torch.int32)
    check(ids, 7, 32, device, monkeypatch, expert_map)


def check(ids, experts, block_m, device, monkeypatch, expert_map=None) -> None:
    with poisoned(monkeypatch):
        plan = align(ids.to(device), experts, block_m, None if expert_map is None else expert_map.to(device), places=True)
    local = ids.flatten().tolist()
    if expert_map is not None:
        local = [int(expert_map[i]) if 0 <= i < expert_map.numel() else -1 for i in local]
    rows, blocks, ends = expected(ids, experts, block_m, local)
    used = int(plan.num_padded)
    assert used == len(rows) <= plan.sorted_rows.numel()
    assert plan.sorted_rows[:used].tolist() == rows
    assert plan.expert_ids[: used // block_m].tolist() == blocks
    assert plan.ends.tolist() == ends
    assert plan.places is not None
    want = {row: place for place, row in enumerate(rows) if row < ids.numel()}
    assert plan.places.tolist() == [want.get(row, -1) for row in range(ids.numel())]
