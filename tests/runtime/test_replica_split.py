"""What ranks execute, counted in a world of eight: each spreads its own tokens, and the sum is even."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from runtime_worlds import fork_world

from benchmarks.replica_split import Case, figures_of, read_loads, run_rank
from twin.policy.replica_split import BatchSplit, pour


def test_ranks_execute_alike_under_noise_of_every_batch(tmp_path: Path) -> None:
    """Eight ranks, an eighth more slots than experts, loads moved by a factor of e^0.5 from batch to batch: whole tokens, none
    lost, and the fullest rank within 5% of the mean where equal shares would leave it 10% and more above."""
    case = Case(read_loads(None, 2), tokens=128, steps=3)
    found = figures_of(case, fork_world(8, tmp_path, run_rank, case))
    assert found["even"]["mean"] > 1.1
    assert found["runtime"]["mean"] <= 1.05
    assert found["runtime"]["mean"] >= found["best"]["mean"] >= 1.0
    with pytest.raises(ValueError, match="not what was chosen"):
        figures_of(case, [{"executed": [[1, 1]] * 3, "chosen": np.zeros((3, 2, 256), int).tolist()}] * 8)


def test_a_split_is_of_whole_tokens_and_fills_the_emptier() -> None:
    assert pour(10, [5, 1]) == [3, 7]
    assert pour(2, [9, 1, 1]) == [0, 1, 1]
    assert pour(3, [0, 0]) == [2, 1], "what is left over goes to the first"
    assert pour(0, [4, 2]) == [0, 0]
    split = BatchSplit([0, 1, 0, 2], 3, 2)
    ids = np.array([0] * 10 + [1] * 5 + [2, -1])
    slots = split.slots(ids, 0)
    assert np.bincount(slots[slots >= 0], minlength=4).tolist() == [3, 5, 7, 1]
    assert slots[-1] == -1 and set(slots[:10]) == {0, 2}


def test_sources_do_not_all_favour_the_same_rank() -> None:
    """One token each of an expert that everybody has: it goes to as many ranks as there are sources."""
    split = BatchSplit([0, 1, 0, 2, 0, 3, 0, 4], 5, 4)
    assert sorted(int(split.slots(np.array([0]), source)[0]) // 2 for source in range(4)) == [0, 1, 2, 3]


def test_loads_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "loads.csv"
    path.write_text("# what it is\n0.5,0.5\n0.25,0.75\n0.1,0.9\n")
    assert read_loads(path, 2) == [[0.5, 0.5], [0.1, 0.9]]
    assert np.array(read_loads(None, 3)).shape == (3, 256)


def test_experts_of_a_round_share_no_rank_and_rounds_are_few() -> None:
    """What lets a kernel fill a wide instance's replicated experts in a few steps."""
    slots = [*range(256), *range(32)]  # 144 ranks of two slots: replicas of expert e lie on ranks e // 2 and 128 + e // 2
    split = BatchSplit(slots, 256, 144)
    assert len(split.experts_J) == 32
    for q in range(int(split.round_J.max()) + 1):
        held = (split.slot_JR[split.round_J == q] >= 0).sum(axis=0)
        assert held.max() == 1
        assert held.sum() <= split.places
    assert split.round_J.max() + 1 <= 4
