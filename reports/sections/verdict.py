"""The headline: which plan, what it does, against what was promised, and how we know."""

from __future__ import annotations

import math

from reports.blocks import Block, Cell, Facts, Section, Table, Text, Tile, Tiles, Tone
from reports.load import Run, Story
from reports.words import NAME_CHARS, cell, clip, number, plan_sentence, plural, text_of, word
from twin.spec.plan import Plan
from twin.spec.results import RunResult, Summary
from twin.spec.workload import Lengths, Slo, WorkloadSpec

PERCENTILES = {50.0: "p50", 90.0: "p90", 95.0: "p95", 99.0: "p99", 100.0: "max"}


def section(story: Story) -> Section:
    plan = story.plan
    blocks: list[Block] = []
    blocks += [_question(story)] if story.scenario else []
    if plan is not None:
        blocks.append(Text((clip(f"The plan: {plan_sentence(plan)}.", NAME_CHARS),)))
    blocks += _capacity(story)
    verdicts = [v for run in story.results for v in _verdict(run, story)]
    blocks += [Text((text,), tone) for text, tone in verdicts]
    tiles = _tiles(story)
    if tiles:
        blocks.append(Tiles(tuple(tiles)))
    if plan is not None:
        blocks.append(_plan_table(plan))
    return Section("verdict", "Verdict", tuple(blocks), absent="no plan, search or result in this directory")


def _capacity(story: Story) -> list[Text]:
    """The most load that the search found the chosen plan to carry; the numbers below are at the load that was asked for."""
    run = story.searched
    best = run.search.best if run is not None and run.search is not None else None
    load = None if best is None else best.metrics.get("capacity_load")
    if best is None or load is None:
        return []
    kind = story.scenario.workload.arrivals.kind if story.scenario is not None else ""
    unit = {"closed_loop": " users", "trace": " times the trace"}.get(kind, " requests/s")
    words = f"The search predicts that it carries up to {number(load)}{unit} within the objectives"
    per_gpu, price = best.metrics.get("capacity_tok_per_s_per_gpu"), best.metrics.get("capacity_usd_per_million_output_tokens")
    words += f", {number(per_gpu)} output tok/s/GPU" if per_gpu is not None else ""
    words += f" at {text_of(price, '$')} per million output tokens" if price is not None else ""
    return [Text((f"{words}. The numbers below are at the load that was asked for.",))]


def slo_of(story: Story) -> Slo:
    return story.scenario.workload.slo if story.scenario is not None else Slo()


def lengths_words(lengths: Lengths | None) -> str:
    """A length distribution in words."""
    if lengths is None:
        return "as in the trace"
    if lengths.kind == "uniform":
        return f"uniform {lengths.low:,}–{lengths.high:,}"
    if lengths.kind == "empirical":
        return f"drawn from {plural(len(lengths.values), 'value')}"
    spread = f", cv {number(lengths.cv)}" if lengths.kind == "lognormal" else ""
    return f"{lengths.kind} mean {number(lengths.mean)}{spread}"


def arrivals_words(workload: WorkloadSpec) -> str:
    """How requests come, in words."""
    arrivals = workload.arrivals
    if arrivals.kind == "closed_loop":
        return f"closed loop, {plural(arrivals.concurrency or 0, 'user')}, {text_of(arrivals.think_s, 's')} between requests"
    if arrivals.kind == "trace":
        return f"trace {arrivals.file} ({arrivals.format}), speed-up {number(arrivals.speedup)}"
    if arrivals.kind == "burst":
        return "all at once"
    return f"{arrivals.kind}, {number(arrivals.rate_per_s)} requests/s"


def slo_words(slo: Slo) -> str:
    """The objectives in words, or that there are none."""
    parts = [
        f"{name} ≤ {text_of(limit, 's')}"
        for name, limit in (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s), ("E2E", slo.e2e_s))
        if limit is not None
    ]
    return f"{', '.join(parts)} at p{number(slo.percentile)}" if parts else "no objective stated"


def _question(story: Story) -> Block:
    scenario = story.scenario
    assert scenario is not None
    work = scenario.workload
    rows = [
        ("Model", word(scenario.model.name, limit=NAME_CHARS)),
        (
            "Cluster",
            word(f"{scenario.cluster.name}: {plural(scenario.cluster.gpus, 'GPU')} in {plural(scenario.cluster.nodes, 'node')}"),
        ),
        ("Traffic", word(f"{work.name}: {arrivals_words(work)}; ISL {lengths_words(work.isl)}; OSL {lengths_words(work.osl)}")),
        ("Objectives", word(slo_words(work.slo))),
    ]
    if scenario.description:
        rows.insert(0, ("Question", word(scenario.description, limit=NAME_CHARS)))
    return Facts(tuple(rows))


def _verdict(run: Run, story: Story) -> list[tuple[str, Tone]]:
    """Does this run keep its promises? One sentence, and a second when its window was not steady."""
    result = run.result
    assert result is not None
    slo = slo_of(story)
    who = run.title.capitalize()
    said: list[tuple[str, Tone]] = []
    checks = [
        c
        for c in (
            _check(run, "TTFT", result.latencies.ttft_s, slo.ttft_s, slo.percentile),
            _check(run, "TPOT", result.latencies.tpot_s, slo.tpot_s, slo.percentile),
            _check(run, "E2E", result.latencies.e2e_s, slo.e2e_s, slo.percentile),
        )
        if c is not None
    ]
    if checks:
        missed = [words for words, kept in checks if kept is False]
        unknown = [words for words, kept in checks if kept is None]
        if missed:
            said.append((f"{who}: misses its objectives: {'; '.join(missed)}.", "bad"))
        elif unknown:
            said.append((f"{who}: cannot be judged: {'; '.join(unknown)}.", "warn"))
        else:
            said.append((f"{who}: meets its objectives: {'; '.join(words for words, _ in checks)}.", "good"))
    if result.steady.verdict != "steady":
        why = f" ({result.steady.reason})" if result.steady.reason else ""
        said.append((clip(f"{who}: the counted window is {result.steady.verdict}{why}, so its averages may not last."), "warn"))
    lost = result.counts.rejected + result.counts.failed
    if lost:
        said.append(
            (
                f"{who}: {plural(result.counts.rejected, 'request')} rejected and {result.counts.failed:,} failed of "
                f"{result.counts.submitted:,}.",
                "warn",
            )
        )
    return said


def percentile_of(run: Run, summary: Summary, metric: str, percentile: float) -> float | None:
    """The percentile of a latency: from the result where it states it, else from the counted requests."""
    name = PERCENTILES.get(percentile)
    if name is not None:
        value = getattr(summary, name)
        return None if value is None else float(value)
    values = sorted(v for r in run.requests if r.counted and (v := getattr(r, f"{metric.lower()}_s")) is not None)
    if not values:
        return None
    position = (len(values) - 1) * percentile / 100
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return float(values[low] + (values[high] - values[low]) * (position - low))


def _check(run: Run, metric: str, summary: Summary, limit: float | None, percentile: float) -> tuple[str, bool | None] | None:
    if limit is None:
        return None
    value = percentile_of(run, summary, metric, percentile)
    name = f"{metric} p{number(percentile)}"
    if value is None:
        return f"{name} is not known", None
    sign = "≤" if value <= limit else ">"
    return f"{name} {text_of(value, 's')} {sign} {text_of(limit, 's')}", value <= limit


def _badged(run: Run, value: float | None, unit: str, path: str, tone: Tone = "") -> Cell:
    """A number of a run with its badge: measured, predicted, or assumed where nothing else stands behind it."""
    result = run.result
    assert result is not None
    badge = "measured" if result.kind == "measurement" else "assumed" if result.source == "assumed" else "predicted"
    return cell(value, unit, f"{run.file('results.json')}#{path}", tone, badge)


def _tiles(story: Story) -> list[Tile]:
    if not story.results:
        return _searched_tiles(story)
    slo = slo_of(story)

    def across(label: str, unit: str, path: str, limit: float | None = None, note: str = "") -> Tile:
        cells = []
        for run in story.results:
            value = value_at(run.result, path)
            tone: Tone = "" if limit is None or value is None else "good" if value <= limit else "bad"
            if value is not None:
                cells.append(_badged(run, value, unit, path, tone))
        return Tile(label, tuple(cells), note or (f"objective {text_of(limit, unit)}" if limit is not None else ""))

    def judged(metric: str, quantile: str, limit: float | None) -> Tile:
        """Only the percentile that was promised is coloured; the other is shown beside it."""
        own = limit if PERCENTILES.get(slo.percentile) == quantile else None
        note = f"objective {text_of(limit, 's')} at p{number(slo.percentile)}" if limit is not None else ""
        return across(f"{metric.upper()} {quantile}", "s", f"latencies.{metric}_s.{quantile}", own, note)

    quantiles = dict.fromkeys(["p50", PERCENTILES.get(slo.percentile, "p99"), "p99"])
    plan = story.plan
    tiles = [] if plan is None else [Tile("GPUs", (Cell(f"{plan.gpus:,}", plan.gpus),), plural(len(plan.pools), "pool"))]
    tiles += [
        across("tok/s/GPU", "", "throughput.output_tok_per_s_per_gpu", note="output tokens"),
        across("tok/s/user", "", "throughput.tok_per_s_per_user", note="1 / TPOT"),
    ]
    tiles += [judged("ttft", q, slo.ttft_s) for q in quantiles] + [judged("tpot", q, slo.tpot_s) for q in quantiles]
    tiles += [
        across("goodput /s", "", "throughput.goodput_per_s", note="requests in time"),
        across("$ / 1M tokens", "$", "cost.usd_per_million_output_tokens", note="output tokens"),
    ]
    return [tile for tile in tiles if tile.cells]


def value_at(result: RunResult | None, path: str) -> float | None:
    """The number at a dotted path of a result."""
    value: object = result
    for part in path.split("."):
        value = getattr(value, part)
    return value if isinstance(value, (int, float)) else None


def _searched_tiles(story: Story) -> list[Tile]:
    """When only a search is there, its winner's own numbers."""
    from reports.sections.candidates import METRICS  # the table and the tiles share names and units

    run = story.searched
    if run is None or run.search is None or run.search.best is None:
        return []
    best, path = run.search.best, f"{run.file('search.json')}#best"
    return [Tile(metric.heading, (metric.cell(best, path, badge="predicted"),)) for metric in METRICS if metric.key(best)]


def _plan_table(plan: Plan) -> Table:
    columns = (
        "pool",
        "instances",
        "DP",
        "TP",
        "EP",
        "GPUs",
        "seqs / rank",
        "tokens / step",
        "chunk",
        "redundant experts",
        "placement",
        "MTP",
        "TBO",
        "exchange",
    )
    rows = []
    for pool in plan.pools:
        rows.append(
            (
                word(pool.role),
                cell(pool.instances),
                cell(pool.dp),
                cell(pool.tp),
                cell(pool.ep),
                cell(pool.gpus),
                cell(pool.max_num_seqs),
                cell(pool.max_batch_tokens),
                cell(pool.chunk_tokens),
                cell(pool.redundant_experts),
                word(pool.placement.replace("_", " ")),
                word(str(pool.mtp_draft_tokens) if pool.mtp_draft_tokens else "off"),
                word("on" if pool.tbo else "off"),
                word(pool.comm),
            )
        )
    form = plan.precision
    return Table(
        "plan",
        columns,
        tuple(rows),
        caption=clip(
            f"Plan {plan.name}. Formats: weights {form.weights}, experts {form.experts}, KV cache {form.kv}, "
            f"dispatch {form.dispatch}."
        ),
    )
