"""Numbers and plans in words: the one place where the report formats. Every cell keeps the exact number beside its text."""

from __future__ import annotations

from reports.blocks import Cell, Tone
from twin.spec.plan import Plan, PoolPlan
from twin.spec.units import format_bytes, format_s

NAME_CHARS = 12_000
CELL_CHARS = 600
LABEL_CHARS = 72
DASH = "–"


def clip(text: str, limit: int = CELL_CHARS) -> str:
    """`text`, or its beginning and how much is missing when it is longer than `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit} more characters)"


def label(text: str) -> str:
    """Text for a figure. Plotly reads a small HTML dialect in labels; escaped here, names are shown as written."""
    short = text if len(text) <= LABEL_CHARS else text[:LABEL_CHARS] + "…"
    return short.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def number(value: float | None, digits: int = 3) -> str:
    """A plain number for reading: 1,234 · 12.3 · 0.0456."""
    if value is None:
        return DASH
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def percent(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.1f}%"


def signed_percent(share: float | None) -> str:
    """A signed error; what rounds to nothing has no sign."""
    if share is None:
        return DASH
    return "0.0%" if abs(share) < 0.0005 else f"{100 * share:+.1f}%"


def usd(value: float | None) -> str:
    if value is None:
        return DASH
    return f"${value:,.2f}" if abs(value) >= 0.1 else f"${value:.3g}"


FORMATS = {"s": format_s, "tok/s": number, "/s": number, "1": number, "%": percent, "$": usd, "bytes": None}


def text_of(value: float | None, unit: str) -> str:
    """A value in words; `unit` is one of s, bytes, %, $ or anything else (written behind the number)."""
    if value is None:
        return DASH
    if unit == "bytes":
        return format_bytes(value)
    if unit in FORMATS:
        return FORMATS[unit](value)  # type: ignore[misc]
    return f"{number(value)} {unit}" if unit else number(value)


def cell(value: float | int | None, unit: str = "", path: str = "", tone: Tone = "", badge: str = "") -> Cell:
    """A number with its exact value and the field it came from."""
    return Cell(text_of(value, unit), value, path if value is not None else "", tone, badge)


def word(text: object, tone: Tone = "", badge: str = "", limit: int = CELL_CHARS) -> Cell:
    """A cell of text, clipped to `limit` characters."""
    return Cell(clip(str(text), limit), None, "", tone, badge)


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def pool_words(pool: PoolPlan) -> str:
    """ "2 × prefill (DP4 TP2 EP8)"."""
    return f"{pool.instances} × {pool.role} (DP{pool.dp} TP{pool.tp} EP{pool.ep})"


def plan_words(plan: Plan) -> str:
    """The whole plan on one line: its pools, then what else sets it apart."""
    return " + ".join(pool_words(pool) for pool in plan.pools)


def plan_switches(plan: Plan) -> tuple[str, ...]:
    """Limits and switches of a plan, one phrase each; what only one of its pools has names that pool."""
    by_pool = [(pool.role, _pool_switches(pool)) for pool in plan.pools]
    phrases = dict.fromkeys(phrase for _, own in by_pool for phrase in own)
    said = []
    for phrase in phrases:
        roles = [role for role, own in by_pool if phrase in own]
        said.append(phrase if len(roles) == len(by_pool) else f"{' and '.join(roles)} {phrase}")
    return (*said, f"{plan.router.replace('_', ' ')} router")


def _pool_switches(pool: PoolPlan) -> list[str]:
    own = [f"≤ {pool.max_num_seqs} seqs", f"≤ {pool.max_batch_tokens:,} tokens"]
    own.append(f"chunk {pool.chunk_tokens:,}" if pool.chunk_tokens else "whole prompts")
    own += [f"+{pool.redundant_experts} experts"] if pool.redundant_experts else []
    own += [pool.placement.replace("_", " ")] if pool.placement != "linear" else []
    own += [name for name, on in (("TBO", pool.tbo), ("prefix cache", pool.prefix_cache)) if on]
    return own + ([f"MTP {pool.mtp_draft_tokens}"] if pool.mtp_draft_tokens else [])


def plan_sentence(plan: Plan) -> str:
    """The plan as one would say it aloud."""
    said = []
    for pool in plan.pools:
        what = "instance" if pool.instances == 1 else "instances"
        role = "" if pool.role == "mixed" else f"{pool.role} "
        said.append(
            f"{pool.instances} {role}{what} of {plural(pool.world, 'GPU')} (DP {pool.dp} × TP {pool.tp}, experts "
            f"over EP {pool.ep})"
        )
    kind = "prefill and decode separated" if plan.separated else "prefill and decode mixed"
    return " and ".join(said) + f"; {kind}, {plan.router.replace('_', ' ')} router, engine {plan.engine}"
