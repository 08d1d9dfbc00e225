"""The benchmark of latent attention's cuts, without a GPU: what it would time, and how it tells it."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

pytest.importorskip("triton")

from benchmarks import mla_splits
from twin.policy.latent_cuts import Cut


def test_every_shape_times_old_and_new_among_the_cuts() -> None:
    cuts = mla_splits.cuts_of((160, 64, 2500), 132)
    assert cuts["old"] == cuts["all 1"] == Cut(160, 1) and cuts["new"] == cuts["rest 4"] == Cut(132, 4)
    assert cuts["all 5"] == Cut(0, 5) and "rest 12" in cuts
    few = mla_splits.cuts_of((20, 64, 4096), 132)
    assert few["old"] == few["all 6"] == Cut(0, 6) and not any(name.startswith("rest") for name in few)


def test_a_row_says_how_near_the_choice_comes_to_the_best() -> None:
    sizes = (160, 64, 2500)
    cuts = mla_splits.cuts_of(sizes, 132)
    took = {cut: 2e-4 + 1e-6 * n for n, cut in enumerate(dict.fromkeys(cuts.values()))}
    took |= {Cut(132, 4): 1.5e-4, Cut(132, 3): 1.4e-4}
    row = mla_splits.row_of(sizes, 132, cuts, took, {"old": 2e-4, "new": 1e-4}, 1e-3)
    assert row["best"] == "rest 3" and row["new_over_best"] == pytest.approx(1.5 / 1.4) and row["old_s"] == 2e-4
    assert row["predicted_s"]["new"] < row["predicted_s"]["old"]
    line = mla_splits.table([row]).splitlines()[1]
    assert "132+4" in line and "1.071" in line and "best: rest 3" in line


def test_shapes_are_asked_for_by_three_numbers() -> None:
    refused = CliRunner().invoke(mla_splits.main, ["--shape", "160,64"])
    assert refused.exit_code == 2 and "SEQUENCES,HEADS,CONTEXT" in refused.output
