"""Order and colour of operators: a coarse and a fine breakdown of the same step line up."""

from __future__ import annotations

from reports.figures import in_order, operator_colours, run_colours

TOTAL = {
    "norm": 1.0,
    "moe/dispatch": 9.0,
    "attention/qkv": 2.0,
    "moe/dispatch/nvlink": 3.0,
    "attention": 5.0,
    "moe/experts": 8.0,
    "moe/dispatch/latency": 1.0,
}


def test_families_then_groups_then_time() -> None:
    assert in_order(TOTAL) == [
        "attention",
        "attention/qkv",
        "moe/dispatch",
        "moe/dispatch/nvlink",
        "moe/dispatch/latency",
        "moe/experts",
        "norm",
    ]


def test_a_group_has_one_colour_and_groups_differ() -> None:
    colours = operator_colours(in_order(TOTAL))
    assert colours["moe/dispatch"] == colours["moe/dispatch/nvlink"] == colours["moe/dispatch/latency"]
    assert len(set(colours.values())) == 5


def test_more_groups_than_shades_do_not_fail() -> None:
    many = {f"moe/{i}": float(i) for i in range(30)}
    assert set(operator_colours(in_order(many))) == set(many)


def test_runs_keep_their_colours() -> None:
    assert run_colours(["predicted", "measured"]) == run_colours(["measured", "predicted"])[::-1]
    assert len(set(run_colours(["predicted", "predicted", "measured", "measured"]))) == 4
