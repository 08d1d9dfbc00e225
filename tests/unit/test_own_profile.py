"""Points of the operator suite and of the grid, as one file."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.own_profile import merged
from runtime.gpu_operators import grids, key_of


def test_points_that_no_grid_asks_for_are_dropped_and_the_suites_stand() -> None:
    grid = next(grid for grid in grids() if grid.operator == "norm")
    points = {key_of(grid, {"tokens": 4, "width": width}): [1e-6, 0.01] for width in (2048, 4096, 2049)}
    shape = dict.fromkeys(("hidden", "width", "topk", "experts", "batch", "context", "heads", "kv_heads", "head_dim"), 4096)
    row: dict[str, Any] = {"operator": "norm", "shape": {**shape, "tokens": 4, "dtype": "bf16", "block_tokens": 64},
                           "median_s": 2e-6, "p10_s": 1.9e-6, "p90_s": 2.1e-6}
    found = merged(points, [row])
    assert found == {key_of(grid, {"tokens": 4, "width": 2048}): [1e-6, 0.01],
                     key_of(grid, {"tokens": 4, "width": 4096}): [2e-6, 0.05]}
