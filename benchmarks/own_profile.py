"""Bring the operator suite's points into our engine's profile of an H200.

    python -m benchmarks.own_profile

`benchmarks.operators --suite` rotates inputs of three times the L2 cache; points of `runtime.gpu_operators` whose inputs
were smaller (experts of one route, attention of few sequences) were read from L2. Where both measured a point, the
suite's stands; small kernels come from the suite alone. Steps are not read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.gpu_operators import NO_WINDOW, Grid, Measured, grids, key_of, tables_of
from twin.cost.profile import Profile, dump_profile, load_profile

HERE = Path(__file__).parent
POINTS, SUITE = HERE / "results" / "h200-eptwin.points.json", HERE / "results" / "h200_operators.json"
PROFILE = HERE.parent / "twin" / "cost" / "profiles" / "h200-eptwin.json"
_KIND = {"gqa": "attention_decode", **{name: name for name in ("moe", "gate", "norm", "silu", "quant", "rope")}}
"""Latent attention is cut otherwise since the suite was run: its points are the grid's."""
Json = dict[str, Any]


def values_of(row: Json) -> dict[str, int]:
    """A suite's row in the words of profiles; everything that any operator might be asked with."""
    s = row["shape"]
    found = {"hidden": s["hidden"], "intermediate": s["width"], "top_k": s["topk"], "experts": s["experts"], "moe_tp": 1,
             "moe_ep": 1, "tokens": s["tokens"], "batch": s["batch"], "context": s["context"], "heads": s["heads"],
             "kv_heads": s["kv_heads"], "head_dim": s["head_dim"], "window": NO_WINDOW, "width": s["hidden"]}
    if row["operator"] == "silu":  # as the experts call it: a row for each choice, of the experts' width
        found |= {"tokens": s["tokens"] * s["topk"], "width": s["width"]}
    return found


def _answers(grid: Grid, row: Json) -> bool:
    """Whether a suite's row is a point of this table: kernels and formats agree (caches in blocks of 64)."""
    dtype = row["shape"]["dtype"]
    plain = row["operator"] == "moe" or dtype == "bf16"
    return (_KIND.get(row["operator"]) == grid.operator and plain and row["shape"]["block_tokens"] == 64
            and grid.attrs.get("dtype") == dtype and grid.attrs.get("distribution", "balanced") == "balanced")


def merged(points: Json, suite: list[Json]) -> Json:
    """Points that the grids ask for, with the suite's in place."""
    found: Json = {}
    for grid in grids():
        on_grid = {key_of(grid, values) for _, _, values in grid.points()}
        found |= {key: points[key] for key in points if key in on_grid}
        for row in suite:
            if _answers(grid, row):
                asked = values_of(row)
                key = key_of(grid, {name: asked[name] for name in (*grid.shape, *grid.axes)})
                if key in on_grid:
                    half = (row["p90_s"] - row["p10_s"]) / 2 / row["median_s"]
                    found[key] = [float(f"{row['median_s']:.4g}"), round(half, 4)]
    return found


def main() -> None:
    """Write the points and the profile that they fill."""
    points = merged(json.loads(POINTS.read_text()), json.loads(SUITE.read_text())["operators"])
    POINTS.write_text(json.dumps(points), encoding="utf-8")
    now = load_profile(PROFILE)
    provenance = {**now.provenance, "suite": "points of h200_operators.json in place of those whose inputs fitted L2"}
    whole = {**now.model_dump(mode="json"), "provenance": provenance, "tables": tables_of(Measured(POINTS))}
    dump_profile(Profile.model_validate_json(json.dumps(whole)), PROFILE)


if __name__ == "__main__":
    main()
