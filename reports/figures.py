"""The look of every figure, and the way from a plotly figure to plain data. Ink and grid colours are set by the page,
which knows whether it is read in light or dark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

ROLE = {"prefill": "#8b5cf6", "decode": "#0d9488", "mixed": "#3b82f6"}
KIND = {"predicted": "#3b82f6", "measured": "#f97316"}
OTHER = ("#3b82f6", "#f97316", "#0d9488", "#8b5cf6", "#db2777", "#65a30d")
SLO = "#dc2626"
GOOD = "#16a34a"
QUIET = "#94a3b8"
FAMILY = {
    "attention": ("#1e3a8a", "#1d4ed8", "#3b82f6", "#60a5fa", "#93c5fd", "#bfdbfe", "#dbeafe"),
    "moe": ("#7c2d12", "#c2410c", "#ea580c", "#f97316", "#fb923c", "#fdba74", "#fed7aa"),
    "other": ("#134e4a", "#0f766e", "#14b8a6", "#5eead4", "#99f6e4", "#ccfbf1"),
}
PATTERN = {
    "measured": "",
    "interpolated": "",
    "transferred": ".",
    "calibrated": ".",
    "roofline": "/",
    "assumed": "x",
    "mixed": "-",
}
DIVERGING = ((0.0, "#1d4ed8"), (0.25, "#93b4f5"), (0.5, "#e8e6e1"), (0.75, "#f2a36b"), (1.0, "#b4380b"))


def figure(traces: Sequence[Any], **layout: Any) -> dict[str, Any]:
    """Plain data of a figure: plotly checks the names of the properties, the page draws it."""
    base: dict[str, Any] = {
        "template": "none",
        "margin": {"l": 64, "r": 20, "t": 44, "b": 52},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "xanchor": "left"},
        "hovermode": "closest",
        "hoverlabel": {"align": "left"},
    }
    drawn = go.Figure(data=list(traces), layout={**base, **layout})
    plain: dict[str, Any] = json.loads(drawn.to_json())
    return plain


def run_colours(titles: Sequence[str]) -> list[str]:
    """A colour for each run: predicted and measured keep theirs, further ones take what is left."""
    colours: list[str] = []
    spare = [c for c in OTHER if c not in KIND.values()]
    for title in titles:
        own = KIND.get(title)
        colours.append(own if own and own not in colours else spare[len(colours) % len(spare)])
    return colours


def family_of(operator: str) -> str:
    """Colour family of an operator path: its first part, where it has a family."""
    top = operator.split("/", 1)[0]
    return top if top in FAMILY else "other"


def group_of(operator: str) -> str:
    """What an operator belongs to, whatever the detail: "moe/dispatch" for "moe/dispatch/nvlink" and for itself."""
    return "/".join(operator.split("/")[:2])


def in_order(total_s: Mapping[str, float]) -> list[str]:
    """Operators by family, then group, then own time, so that a coarse and a fine breakdown line up bar under bar."""
    groups: dict[str, float] = {}
    for operator, seconds in total_s.items():
        groups[group_of(operator)] = groups.get(group_of(operator), 0.0) + seconds
    families = list(FAMILY)

    def place(operator: str) -> tuple[int, float, str, float, str]:
        group = group_of(operator)
        return families.index(family_of(operator)), -groups[group], group, -total_s[operator], operator

    return sorted(total_s, key=place)


def operator_colours(operators: Sequence[str]) -> dict[str, str]:
    """Shades of one hue for the groups of one family, in the order given; operators of a group share theirs."""
    shades: dict[str, dict[str, str]] = {family: {} for family in FAMILY}
    for operator in operators:
        family, group = family_of(operator), group_of(operator)
        used = shades[family]
        if group not in used:
            used[group] = FAMILY[family][min(len(used), len(FAMILY[family]) - 1)]
    return {operator: shades[family_of(operator)][group_of(operator)] for operator in operators}
