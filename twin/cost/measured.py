"""Operators whose seconds come from an engine profile instead of the roofline.

Dense products depend on one number of rows each, so all that share it add up to one table over it; attention depends on
two and is read from the profile's own surface. What no table covers well enough stays with the roofline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from twin.cost.batch import INDEX, Array
from twin.cost.engines import OUR_ENGINE
from twin.cost.interpolate import Curve, Interpolator
from twin.cost.roofline import Op
from twin.cost.work import equivalent_tokens
from twin.policy.latent_cuts import Shape, chosen_over_measured
from twin.spec.base import Source
from twin.spec.model import Attention

_STEPS = 4  # knots an octave of the tables that steps are read from
ROWS: Array = np.exp2(np.arange(0.0, 20.01, 1 / _STEPS))
_BATCH: Array = np.exp2(np.arange(0.0, 13.01, 1 / _STEPS))
_LENGTH: Array = np.exp2(np.arange(0.0, 21.01, 1 / _STEPS))
_HOST_BOUND = 2.5  # times the roofline, at decode sizes, beyond which a product was timed with the host in the way
_DOUBLE = 2.15  # times as long for twice the batch, at most: no measured pair of large batches differs by more
_NARROW_SLOWER = 1.3  # times as long for half the bytes of cache, at most
_WIDEST = 1.0  # log half width beyond which a transferred table says less than a roofline


def _place(x: Array, knots: int) -> tuple[npt.NDArray[np.int64], Array]:
    """Knot below `x` and how far beyond it, on a grid of `_STEPS` an octave from 1; clipped to its ends."""
    at = np.minimum(np.log2(np.maximum(x, 1.0)) * _STEPS, knots - 1.0001)
    low = at.astype(np.int64)
    return low, at - low


def _read(log_s: Array, x: Array) -> Array:
    """Seconds from a table over `ROWS`, straight in log-log."""
    low, beyond = _place(x, len(log_s))
    below = log_s[low]
    return np.asarray(np.exp(below + beyond * (log_s[low + 1] - below)))


def _read_two(log_s: Array, x: Array, y: Array) -> Array:
    """Seconds from a table over (`_BATCH`, `_LENGTH`)."""
    i, u = _place(x, log_s.shape[0])
    j, v = _place(y, log_s.shape[1])
    flat, at = log_s.ravel(), i * log_s.shape[1] + j
    low = flat[at] + v * (flat[at + 1] - flat[at])
    at = at + log_s.shape[1]
    return np.asarray(np.exp(low + u * (flat[at] + v * (flat[at + 1] - flat[at]) - low)))


@dataclass(frozen=True)
class Evidence:
    """Where one operator's seconds come from: the kind of source and the log half width of its 80% interval."""

    source: Source
    half_width: float


def evidence_of(curve: Curve, x: float, y: float | None = None) -> Evidence:
    """Source and interval of a curve at a typical point."""
    found = curve.estimate(x, y)
    return Evidence(found.source, float(np.log(found.high_s / found.seconds)))


@dataclass(frozen=True)
class RowTable:
    """Dense products over the rows of one feature: log seconds [o, g], all layers together, and their sum."""

    feature: int
    keys: tuple[str, ...]
    log_s: Array
    log_total: Array
    evidence: tuple[Evidence, ...]

    def seconds(self, x: Array) -> Array:
        """[..., f] -> [...]"""
        rows = x[..., self.feature]
        return np.asarray(_read(self.log_total, rows) * (rows > 0)) if rows.any() else np.zeros(rows.shape)

    def parts(self, x: Array) -> dict[str, Array]:
        """The sum, split as the operators' own tables split it."""
        rows, total = x[..., self.feature], self.seconds(x)
        each = [_read(log_s, rows) for log_s in self.log_s]
        whole = np.sum(each, axis=0)
        parts: dict[str, Array] = {}
        for key, seconds in zip(self.keys, each, strict=True):
            parts[key] = parts.get(key, np.zeros(rows.shape)) + total * seconds / whole
        return parts


@dataclass(frozen=True)
class Surface:
    """Attention of one kind of layer, decode or prefill, from a table over (batch, length)."""

    op: Op
    log_s: Array  # over (_BATCH, _LENGTH), one layer
    decode: bool
    drafts: int
    share: float
    bounds: tuple[Array, Array]  # roofline seconds a unit of each feature, compute and memory [f]
    evidence: tuple[Evidence, ...]
    log_products: Array | None = None  # dense products that the table includes, over `ROWS`, one layer
    cut: Shape | None = None  # of our own latent attention, whose batches between those of the table are cut otherwise

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.op.key,)

    def seconds(self, x: Array) -> Array:
        """[..., f] -> [...]"""
        return self._decode_s(x) if self.decode else self._prefill_s(x)

    def parts(self, x: Array) -> dict[str, Array]:
        return {self.op.key: self.seconds(x)}

    def _decode_s(self, x: Array) -> Array:
        seqs = x[..., INDEX["decode_seqs"]]
        if not seqs.any():
            return np.zeros(seqs.shape)
        context = x[..., INDEX["decode_kv"]] / np.maximum(seqs, 1.0)
        each = _read_two(self.log_s, seqs, context)
        if self.cut is not None:
            each = each * chosen_over_measured(self.cut, seqs, context)
        if self.drafts:  # tables have one query a sequence; more of them share the keys that are read beside the arithmetic
            each = np.maximum(each, x @ self.bounds[0] * self.share / self.op.layers)
        return np.asarray(each * self.op.layers / self.share * (seqs > 0))

    def _bound(self, x: Array) -> Array:
        return np.asarray(np.maximum(x @ self.bounds[0], x @ self.bounds[1]))

    def _prefill_s(self, x: Array) -> Array:
        tokens = x[..., INDEX["prefill_tokens"]]
        if not tokens.any():
            return np.zeros(tokens.shape)
        chunks = np.maximum(x[..., INDEX["rows"]] - x[..., INDEX["decode_tokens"]], 1e-9)
        new = tokens / np.maximum(chunks, 1.0)  # half a chunk (of a split batch) is a shorter chunk
        past = np.maximum(x[..., INDEX["prefill_kv"]] / chunks - tokens / chunks, 0.0)
        length = equivalent_tokens(np.maximum(new, 1.0), past, self.op.window or 0)
        each = _read_two(self.log_s, chunks, length)
        if self.log_products is not None:
            products = _read(self.log_products, np.maximum(chunks, 1.0) * length)
            each = np.maximum(each - products, self._bound(x) * self.share / self.op.layers)  # the bound knows the share
        return np.asarray(each * self.op.layers / self.share * (tokens > 0))


Measured = RowTable | Surface


@dataclass(frozen=True)
class Ask:
    """What one rank's operators ask a profile with. `module` reads latent attention in prefill from rows of the whole
    block, less its dense products; `share` is the part of the SMs left to compute."""

    profile: Interpolator
    attention: Attention
    heads: float
    kv_heads: int
    kv_dtype: str
    drafts: int
    share: float
    module: bool
    products_scale: float = 1.0  # what the engine's products take over their table: those inside a module's rows too
    latent_programs: int = 0  # at a time, of our own kernel of latent attention (0: another engine's)


def split_measured(ops: Sequence[Op], ask: Ask, bounds: tuple[Array, Array, Array]) -> tuple[list[Op], list[Measured]]:
    """Operators that stay with the roofline, and the tables that answer for the others. `bounds` are the roofline's
    coefficient matrices [f, o] of `ops`: compute, memory, launches."""
    left: list[Op] = []
    rows: dict[str, list[tuple[str, Array, Evidence]]] = {}
    found: list[Measured] = []
    for j, op in enumerate(ops):
        curve, absorbed = _curve(op, ask), _absorbed(op, ask)
        if absorbed:
            rows.setdefault(next(iter(op.flops)), []).extend(
                (op.key, np.log(_rows_s(one) * op.layers / ask.share), evidence_of(one, 128)) for one in absorbed)
        elif curve is None:
            left.append(op)
        elif op.matrix is not None:
            log_s, evidence = _product(op, curve, ask.share, bounds[0][:, j], bounds[1][:, j], bounds[2][:, j])
            rows.setdefault(next(iter(op.flops)), []).append((op.key, log_s, evidence))
        else:
            products = _products(ops, ask) if ask.module and op.kind == "mla_prefill" else None
            ours = ask.latent_programs and op.kind == "mla_decode"
            found.append(Surface(op, _surface_log_s(curve), op.gate == "any_decode", ask.drafts, ask.share,
                                 (bounds[0][:, j], bounds[1][:, j]), (evidence_of(curve, 32, 2048),), products,
                                 Shape(round(ask.heads), ask.latent_programs) if ours else None))
    for feature, entries in sorted(rows.items()):
        each = np.stack([log_s for _, log_s, _ in entries])
        found.append(RowTable(INDEX[feature], tuple(key for key, _, _ in entries), each, np.log(np.exp(each).sum(axis=0)),
                              tuple(evidence for _, _, evidence in entries)))
    return left, found


@lru_cache(maxsize=1024)
def _rows_s(curve: Curve) -> Array:
    """Seconds over `ROWS`, read once for all pools of a search."""
    return curve.many(ROWS)


@lru_cache(maxsize=256)
def _surface_log_s(curve: Curve) -> Array:
    """Log seconds over (`_BATCH`, `_LENGTH`), read once for all pools of a search."""
    return _divisible(np.log(curve.many(_BATCH[:, None], _LENGTH[None, :])))


def _divisible(log_s: Array) -> Array:
    """A batch takes hardly longer than its two halves one after the other: what trends say beyond the largest measured batches is
    held to that. Log seconds over (`_BATCH`, `_LENGTH`)."""
    held = log_s.copy()
    for i in range(_STEPS, len(held)):
        held[i] = np.minimum(held[i], held[i - _STEPS] + np.log(_DOUBLE))
    return np.asarray(np.maximum.accumulate(held, axis=0))


def _product(op: Op, curve: Curve, share: float, compute: Array, memory: Array, launch: Array) -> tuple[Array, Evidence]:
    """Log seconds of a dense product over `ROWS`, all layers, and where they come from.

    A table that says several times what a roofline does at 16 and 64 rows was timed with the host in the way: what it
    shows there is the host, and only where it has risen well above its floor is it the kernel. Ours are timed in graphs.
    """
    feature, gate = INDEX[next(iter(op.flops))], INDEX[op.gate]
    measured = _rows_s(curve) * op.layers / share
    bound = np.maximum(compute[feature] * ROWS, memory[feature] * ROWS + memory[gate]) + launch[gate]
    if _ours(curve) or min((measured / bound)[[4 * _STEPS, 6 * _STEPS]]) <= _HOST_BOUND:
        return np.log(measured), evidence_of(curve, 128)
    risen = np.clip(measured / measured[0] - 1.0, 0.0, 1.0)
    return np.log(bound) + risen * np.log(measured / bound), Evidence("mixed", 0.25)


def _curve(op: Op, ask: Ask) -> Curve | None:
    """The profile's curve for an operator, or None where it has none worth more than a roofline."""
    if op.matrix is not None:
        curve = ask.profile.curve("gemm", {"k": op.matrix[0], "n": op.matrix[1]}, {"dtype": op.dtype})
        return curve if curve is not None and evidence_of(curve, 128).half_width <= _WIDEST else None
    words = {"dtype": op.dtype, "kv_dtype": ask.kv_dtype}
    if op.kind in ("attention_decode", "attention_prefill") and ask.attention.kind == "gqa" and op.key in _CORES:
        values = {"heads": ask.heads, "kv_heads": float(ask.kv_heads), "head_dim": float(ask.attention.head_dim),
                  "window": float(op.window or 0)}
        curve = ask.profile.curve(op.kind, values, words)
    elif op.kind == "mla_prefill" and ask.module and _is_deepseek(ask.attention):
        words = {"scope": "module", "layout": "deepep", "dtype": "fp8_block", "gemm_dtype": "fp8_block", "kv_dtype": ask.kv_dtype}
        curve = ask.profile.curve(op.kind, {"heads": ask.heads}, words)
    elif op.kind in ("mla_decode", "mla_prefill") and _is_deepseek(ask.attention):
        curve = _latent(op.kind, words | {"scope": "kernel"}, ask)
    else:
        return None
    return curve if curve is not None and evidence_of(curve, 32, 2048).half_width <= _WIDEST else None


def _absorbed(op: Op, ask: Ask) -> list[Curve]:
    """Our engine's products of queries and outputs with what decode of latent attention absorbs; nothing where its profile lacks
    one: other engines run them otherwise, beside other copies."""
    if op.kind != "bmm" or not ask.latent_programs or not _is_deepseek(ask.attention):
        return []
    sides = [ask.profile.curve("mla_bmm", {"heads": ask.heads}, {"dtype": op.dtype, "side": side}) for side in ("pre", "post")]
    found = [curve for curve in sides if curve is not None and _ours(curve)]
    return found if len(found) == len(sides) else []


def _ours(curve: Curve) -> bool:
    """Whether a curve stands on what our engine measured, here or on another GPU."""
    return f"/{OUR_ENGINE}/" in curve.detail


def _latent(kind: str, words: dict[str, str], ask: Ask) -> Curve | None:
    """The kernel of latent attention. Where a table has a narrow cache take longer than a wide one, a kernel was timed that
    nobody serves with (SGLang's of fp8 on Hopper: four times): the wide cache's answers."""
    curve = ask.profile.curve(kind, {"heads": ask.heads}, words)
    if kind != "mla_decode" or words["kv_dtype"] == "bf16" or curve is None:
        return curve
    wide = ask.profile.curve(kind, {"heads": ask.heads}, words | {"kv_dtype": "bf16"})
    slower = wide is not None and curve.estimate(32, 2048).seconds > _NARROW_SLOWER * wide.estimate(32, 2048).seconds
    return wide if slower else curve


def _products(ops: Sequence[Op], ask: Ask) -> Array:
    """Log seconds over `ROWS` of one layer's attention products: what a row of the whole block includes."""
    total = np.zeros(len(ROWS))
    for op in ops:
        if op.key in ("attention/projections", "attention/kv_up") and op.matrix is not None:
            curve = ask.profile.curve("gemm", {"k": op.matrix[0], "n": op.matrix[1]}, {"dtype": op.dtype})
            total += _rows_s(curve) * ask.products_scale if curve is not None else 0.0
    return np.asarray(np.log(np.maximum(total, 1e-12)))


_CORES = ("attention/kv_read", "attention/prefill")


def _is_deepseek(a: Attention) -> bool:
    """The one latent shape that the tables were measured on, attended to in full."""
    return (a.kv_lora_rank, a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim) == (512, 128, 64, 128) and not a.index_top_k
