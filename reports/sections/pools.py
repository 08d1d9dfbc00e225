"""What a pool's GPUs are busy with and full of: step time by operator, memory, expert load."""

from __future__ import annotations

from dataclasses import dataclass

import plotly.graph_objects as go

from reports.blocks import Block, Cell, Figure, Section, Table
from reports.figures import DIVERGING, FAMILY, PATTERN, QUIET, figure, in_order, operator_colours
from reports.load import Run, Story
from reports.words import cell, clip, label, number, percent, plural, text_of, word
from twin.spec.results import PoolResult

MAX_OPERATORS = 40
MAX_HEATMAP_CELLS = 40_000
MEMORY_PARTS = (
    ("dense weights", "dense_weight_bytes", FAMILY["attention"][1]),
    ("expert weights", "expert_weight_bytes", FAMILY["moe"][2]),
    ("KV cache", "kv_pool_bytes", FAMILY["other"][1]),
    ("activations", "activation_bytes", "#a855f7"),
    ("exchange buffers", "comm_buffer_bytes", "#eab308"),
    ("reserved", "reserved_bytes", QUIET),
    ("left", "free_bytes", "rgba(148,163,184,0.18)"),
)


@dataclass(frozen=True)
class PoolOf:
    """One pool of one run, with its name in figures and the place of its numbers."""

    run: Run
    index: int
    pool: PoolResult

    @property
    def name(self) -> str:
        return f"{self.pool.role}, {self.run.title}" if self.run.result is not None else self.pool.role

    @property
    def path(self) -> str:
        return f"{self.run.file('results.json')}#pools.{self.index}"


def pools_of(story: Story) -> list[PoolOf]:
    return [
        PoolOf(run, index, pool) for run in story.results if run.result is not None for index, pool in enumerate(run.result.pools)
    ]


def pools(story: Story) -> Section:
    """How each pool was doing: one row a pool."""
    every = pools_of(story)
    if not every:
        return Section("pools", "Pools", absent=_why(story, "what each pool did"))
    columns = (
        "pool",
        "shape",
        "GPUs",
        "busy",
        "steps",
        "step p50",
        "step p99",
        "seqs / step",
        "tokens / step",
        "KV used",
        "KV peak",
        "pre-empted",
        "KV moved",
        "KV transfer p50",
    )
    rows = []
    for at in every:
        p, path = at.pool, at.path
        moved = p.kv_transfer_s
        rows.append(
            (
                word(at.name),
                word(f"{p.instances} × DP{p.dp} TP{p.tp} EP{p.ep}"),
                cell(p.gpus, "", f"{path}.gpus"),
                cell(p.utilisation, "%", f"{path}.utilisation"),
                cell(p.steps, "", f"{path}.steps"),
                cell(p.step_s.p50, "s", f"{path}.step_s.p50"),
                cell(p.step_s.p99, "s", f"{path}.step_s.p99"),
                cell(p.batch_seqs_mean, "", f"{path}.batch_seqs_mean"),
                cell(p.batch_tokens_mean, "", f"{path}.batch_tokens_mean"),
                cell(p.kv_usage_mean, "%", f"{path}.kv_usage_mean"),
                cell(p.kv_usage_max, "%", f"{path}.kv_usage_max"),
                cell(p.preemptions, "", f"{path}.preemptions"),
                cell(p.kv_transfer_bytes or None, "bytes", f"{path}.kv_transfer_bytes"),
                cell(moved.p50 if moved else None, "s", f"{path}.kv_transfer_s.p50"),
            )
        )
    return Section("pools", "Pools", (Table("pools", columns, tuple(rows)),))


def breakdown(story: Story) -> Section:
    title = "Where a step's time goes"
    every = [at for at in pools_of(story) if at.pool.breakdown_s]
    if not every:
        return Section("steps", title, absent=_why(story, "a breakdown of the step time"))
    total: dict[str, float] = {}
    for at in every:
        for operator, seconds in at.pool.breakdown_s.items():
            total[operator] = total.get(operator, 0.0) + seconds
    largest = sorted(total, key=lambda o: (-total[o], o))[:MAX_OPERATORS]
    operators = in_order({operator: total[operator] for operator in largest})
    colours = operator_colours(operators)
    blocks: list[Block] = []
    for role in dict.fromkeys(at.pool.role for at in every):
        blocks.append(_step_bars(role, [at for at in every if at.pool.role == role], operators, colours))
    return Section(
        "steps",
        title,
        (*blocks, _operator_table(every, operators)),
        lead="Plain: measured or interpolated. Dotted: calibrated, or transferred from another GPU. Hatched: roofline. "
        "Crossed: assumed. Dashed: mixed.",
    )


def _step_bars(role: str, every: list[PoolOf], operators: list[str], colours: dict[str, str]) -> Figure:
    """One stacked bar a run, so that the same role's predicted and measured steps lie under each other."""
    traces = []
    for operator in operators:
        seconds = [at.pool.breakdown_s.get(operator) for at in every]
        if all(s is None for s in seconds):
            continue
        known = next(at.pool.sources.get(operator, "assumed") for at in every if operator in at.pool.breakdown_s)
        sources = [at.pool.sources.get(operator, "assumed") if operator in at.pool.breakdown_s else known for at in every]
        hover = [
            f"{label(operator)}<br>{text_of(s, 's')} ({percent(_share(s, at.pool))})<br>source: {source}"
            for s, source, at in zip(seconds, sources, every, strict=True)
        ]
        traces.append(
            go.Bar(
                y=[at.run.title for at in every],
                x=[None if s is None else s * 1e3 for s in seconds],
                name=label(operator),
                orientation="h",
                hovertext=hover,
                hovertemplate="%{hovertext}<extra></extra>",
                width=0.7,
                marker={
                    "color": colours[operator],
                    "line": {"width": 0.5, "color": "rgba(255,255,255,0.6)"},
                    "pattern": {
                        "shape": [PATTERN[s] for s in sources],
                        "size": 6,
                        "solidity": 0.25,
                        "fillmode": "overlay",
                        "fgcolor": "rgba(255,255,255,0.75)",
                    },
                },
            )
        )
    legend_px = 22 * -(-len(traces) // 5)
    drawn = figure(
        traces,
        barmode="stack",
        xaxis={"title": {"text": "mean step, ms"}},
        yaxis={"autorange": "reversed"},
        margin={"l": 84, "r": 20, "t": 14 + legend_px, "b": 46},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    )
    return Figure(
        f"steps-{role}", drawn, _breakdown_words(every), title=role.capitalize(), height_px=70 + legend_px + 52 * len(every)
    )


def _share(seconds: float | None, pool: PoolResult) -> float | None:
    total = sum(pool.breakdown_s.values())
    return None if seconds is None or total <= 0 else seconds / total


def _breakdown_words(every: list[PoolOf]) -> str:
    said = []
    for at in every:
        parts = sorted(at.pool.breakdown_s.items(), key=lambda item: (-item[1], item[0]))[:3]
        named = ", ".join(f"{clip(name, 60)} {percent(_share(s, at.pool))}" for name, s in parts)
        said.append(f"{at.name}: {text_of(sum(at.pool.breakdown_s.values()), 's')} a step, mostly {named}.")
    return " ".join(said)


def _operator_table(every: list[PoolOf], operators: list[str]) -> Table:
    """Every operator's seconds, share and source."""
    rows: list[tuple[Cell, ...]] = []
    for at in every:
        for operator in operators:
            seconds = at.pool.breakdown_s.get(operator)
            if seconds is not None:
                rows.append(
                    (
                        word(at.name),
                        word(operator),
                        cell(seconds, "s", f"{at.path}.breakdown_s.{operator}"),
                        cell(_share(seconds, at.pool), "%"),
                        word(at.pool.sources.get(operator, "assumed")),
                    )
                )
    return Table(
        "operators",
        ("pool", "operator", "mean a step", "share", "source"),
        tuple(rows),
        live=True,
        folded=f"All {plural(len(rows), 'operator time')} as a table",
    )


def memory(story: Story) -> Section:
    title = "Memory"
    every = [at for at in pools_of(story) if at.pool.memory is not None]
    if not every:
        return Section("memory", title, absent=_why(story, "the memory of a rank"))
    traces, rows, said = [], [], []
    for name, attribute, colour in MEMORY_PARTS:
        sizes = [float(getattr(at.pool.memory, attribute)) for at in every]
        traces.append(
            go.Bar(
                y=[at.name for at in every],
                x=[max(0.0, s) / 2**30 for s in sizes],
                name=name,
                orientation="h",
                hovertext=[f"{name}: {text_of(s, 'bytes')}" for s in sizes],
                hovertemplate="%{hovertext}<extra></extra>",
                marker={"color": colour, "line": {"width": 0.5, "color": "rgba(148,163,184,0.6)"}},
            )
        )
    for at in every:
        own = at.pool.memory
        assert own is not None
        path = f"{at.path}.memory"
        rows.append(
            (
                word(at.name),
                cell(own.hbm_bytes, "bytes", f"{path}.hbm_bytes"),
                *(cell(getattr(own, a), "bytes", f"{path}.{a}") for _, a, _ in MEMORY_PARTS),
                cell(own.kv_tokens, "", f"{path}.kv_tokens"),
                cell(own.kv_blocks, "", f"{path}.kv_blocks"),
            )
        )
        said.append(
            f"{at.name}: {text_of(own.free_bytes, 'bytes')} left of {text_of(own.hbm_bytes, 'bytes')}; the KV cache holds "
            f"{own.kv_tokens:,} tokens."
        )
    drawn = figure(
        traces,
        barmode="stack",
        xaxis={"title": {"text": "GiB on the fullest rank"}},
        yaxis={"autorange": "reversed"},
        margin={"l": 130, "r": 20, "t": 44, "b": 48},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    )
    columns = ("pool", "GPU memory", *(name for name, _, _ in MEMORY_PARTS), "KV tokens", "KV blocks")
    return Section(
        "memory",
        title,
        (
            Figure("memory", drawn, " ".join(said), height_px=140 + 56 * len(every)),
            Table("memory", columns, tuple(rows), folded="The same as a table"),
        ),
    )


def experts(story: Story) -> Section:
    title = "Expert load"
    blocks: list[Block] = []
    for number_, at in enumerate(at for at in pools_of(story) if at.pool.expert_load):
        load = at.pool.expert_load
        assert load is not None
        if sum(len(row) for row in load) > MAX_HEATMAP_CELLS or not any(load):
            continue
        worst = max(max(row) for row in load if row)
        mean_worst = sum(max(row) for row in load if row) / sum(1 for row in load if row)
        reach = max(0.1, worst - 1)
        heat = go.Heatmap(
            z=[list(row) for row in load],
            zmid=1.0,
            zmin=max(0.0, 1 - reach),
            zmax=1 + reach,
            colorscale=[list(stop) for stop in DIVERGING],
            colorbar={"title": {"text": "load / mean", "font": {"size": 12}}, "nticks": 6, "thickness": 12, "outlinewidth": 0},
            hovertemplate="MoE layer %{y}, rank %{x}: %{z:.3f} × mean<extra></extra>",
        )
        drawn = figure(
            [heat],
            xaxis={"title": {"text": "EP rank"}, "showgrid": False, "dtick": max(1, len(load[0]) // 8)},
            yaxis={"title": {"text": "MoE layer"}, "autorange": "reversed", "showgrid": False, "dtick": max(1, len(load) // 8)},
            margin={"l": 64, "r": 20, "t": 16, "b": 48},
        )
        words = (
            f"{at.name}: {plural(len(load), 'MoE layer')} × {plural(max(len(row) for row in load), 'rank')}. The fullest "
            f"rank carries {number(worst)} times the mean; the fullest rank of a layer {number(mean_worst)} times on "
            "average, which is what a step waits for."
        )
        blocks.append(
            Figure(f"experts-{number_}", drawn, words, title=at.name, height_px=min(640, 240 + 7 * len(load)), half=True)
        )
    return Section("experts", title, tuple(blocks), absent=_why(story, "expert load"))


def _why(story: Story, what: str) -> str:
    return "no results.json here" if not story.results else f"results.json does not have {what}"
