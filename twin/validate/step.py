"""One rank's step, predicted and measured: the step benchmark's figures beside the cost model's, phase by phase.

What one GPU can run of a wide instance is a rank alone (`CostModel(alone=True)`): its attention and its experts' mean share,
local copies for exchanges, no host between steps. Its routing is what the benchmark draws: even unless a spread is stated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from twin.cost.batch import StepBatch, StepCost
from twin.cost.evidence import Evidence
from twin.cost.model import CostModel
from twin.cost.profile import gpu_key
from twin.policy.graphs import PROMPT_GRAPH_TOKENS
from twin.spec.base import Dtype
from twin.spec.errors import Infeasible, SpecError
from twin.spec.load import load_cluster, load_model
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan, Precision
from twin.spec.scenario import Routing

StepPhase = Literal["decode", "prefill"]
MAX_FILE_BYTES = 16 << 20
# The benchmark's phases, and the keys of a cost that fall into each; a key goes to the first that it begins with.
PHASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("embed", ("embedding",)), ("attention", ("attention/", "norm", "collective/attention")), ("dense_ffn", ("ffn/",)),
    ("gate", ("moe/gate",)), ("dispatch", ("moe/dispatch", "moe/all_gather")), ("shared_experts", ("moe/shared",)),
    ("experts", ("moe/experts", "moe/permute")), ("combine", ("moe/combine", "moe/reduce_scatter", "moe/sum")),
    ("head", ("head", "sampling")),
)
_NODE = 8  # GPUs of a node of the shipped clusters


@dataclass(frozen=True)
class Case:
    """One step of one rank. `batch` sequences of the rank, each `context` tokens long (decode) or computed whole (prefill);
    `gpu` is a cluster preset's name; `instance`: all ranks together, exchanges and host included; `graph_tokens`: of the CUDA
    graph that a step of prompts replays, 0 where its kernels are launched one by one, None as the engine has the habit."""

    model: ModelSpec
    phase: StepPhase
    batch: int
    context: int
    ep: int = 1
    tp: int = 1
    dp: int | None = None
    redundant: int = 0
    precision: Dtype = "bf16"
    gpu: str = "h200"
    routing: Routing = field(default_factory=Routing)
    instance: bool = False
    graph_tokens: int | None = None

    @property
    def ranks(self) -> int:
        """DP ranks of the instance: enough for the experts unless stated."""
        return self.dp or max(1, self.ep // self.tp)

    @property
    def alone(self) -> bool:
        """Whether one GPU can run it: TP ranks need each other."""
        return not self.instance and self.tp == 1

    def named(self) -> str:
        """A line's beginning."""
        text = f"{self.model.name} {self.precision} {self.phase} batch {self.batch} context {self.context}"
        text += "".join(f" {name} {n}" for name, n in (("ep", self.ep), ("tp", self.tp), ("dp", self.dp or 1)) if n > 1)
        graph = "" if self.graph_tokens is None else f" graph {self.graph_tokens}" if self.graph_tokens else " no graph"
        return text + graph


@dataclass(frozen=True)
class Pair:
    """A prediction, and what was measured where it was: the benchmark's row."""

    case: Case
    predicted: StepCost
    measured: dict[str, Any] | None = None

    @property
    def error(self) -> float | None:
        """Relative, signed."""
        return None if self.measured is None else self.predicted.total_s / self.measured["step_s"] - 1

    @property
    def inside(self) -> bool | None:
        """Whether the 80% interval holds what was measured."""
        return None if self.measured is None else self.predicted.low_s <= self.measured["step_s"] <= self.predicted.high_s

    def phases(self) -> list[tuple[str, float, float | None]]:
        """(phase, predicted, measured) seconds, largest first. The benchmark times phases with events between them, which
        take time themselves: its phases add up to a little more than its step."""
        predicted, measured = phase_seconds(self.predicted.parts_s), (self.measured or {}).get("parts_s") or {}
        names = sorted({*predicted, *measured}, key=lambda name: -max(predicted.get(name, 0.0), measured.get(name, 0.0)))
        return [(name, predicted.get(name, 0.0), measured.get(name)) for name in names]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        c, p, m = self.case, self.predicted, self.measured
        return {
            "model": c.model.name, "phase": c.phase, "batch": c.batch, "context": c.context, "ep": c.ep, "tp": c.tp,
            "dp": c.ranks, "redundant": c.redundant, "precision": c.precision, "gpu": c.gpu, "layers": c.model.layers,
            "alone": c.alone, "graph_tokens": c.graph_tokens,
            "routing": c.routing.model_dump(mode="json", exclude_defaults=True) or {"kind": c.routing.kind},
            "predicted": {"step_s": p.total_s, "low_s": p.low_s, "high_s": p.high_s, "parts_s": p.parts_s, "sources": p.sources},
            "measured": None if m is None else {k: m[k] for k in ("step_s", "p10_s", "p90_s", "parts_s", "floor_s") if k in m},
            "error": self.error, "inside": self.inside,
            "phases": [{"phase": name, "predicted_s": a, "measured_s": b} for name, a, b in self.phases()],
        }


def predict(case: Case, evidence: Evidence | None) -> StepCost:
    """Seconds of the step in parts, with sources and an 80% interval. Raises SpecError for sizes that do not go together."""
    cost = _cost(case, evidence)
    if case.phase == "decode":
        return cost.step(StepBatch.decode([case.batch], [case.batch * case.context]))
    return cost.step(StepBatch.prefill([case.batch * case.context], seqs=[case.batch]))


def too_large(case: Case) -> str | None:
    """Why the rank's GPU cannot hold the step; None where it can."""
    try:
        room = _cost(case, None).memory().kv_tokens
    except Infeasible as short:
        return str(short)
    asked = case.batch * case.context
    return f"the KV cache has room for {room} tokens of {asked}" if asked > room else None


def _cost(case: Case, evidence: Evidence | None) -> CostModel:
    if case.model.moe is None and case.ep > 1:
        raise SpecError(f"{case.model.name} has no experts", field="ep", expected="1")
    if case.model.attention.heads % case.tp:
        raise SpecError(f"{case.model.attention.heads} heads do not divide over TP {case.tp}", field="tp")
    tokens = case.batch * (case.context if case.phase == "prefill" else 1)
    if case.phase == "prefill" and case.graph_tokens != 0:  # room for the graph that is known, as the last, or for all there are
        tokens = case.graph_tokens or max(tokens, PROMPT_GRAPH_TOKENS)
    pool = PoolPlan(role="mixed", dp=case.ranks, tp=case.tp, ep=case.ep, redundant_experts=case.redundant,
                    max_num_seqs=case.batch, max_batch_tokens=tokens, cuda_graphs=case.graph_tokens != 0)
    precision = Precision(weights=case.precision, experts=case.precision, kv="bf16", dispatch="bf16")
    plan = Plan(pools=(pool,), precision=precision, engine="eptwin")
    gpus = case.ranks * case.tp
    cluster = load_cluster(f"{case.gpu}-{-(-gpus // _NODE)}x{_NODE}")
    return CostModel(case.model, cluster, plan, pool, routing=case.routing, profile=evidence, alone=case.alone)


def phase_seconds(parts_s: dict[str, float]) -> dict[str, float]:
    """A cost's parts added up by the benchmark's phases; keys of none stand for themselves."""
    found: dict[str, float] = {}
    for key, seconds in parts_s.items():
        name = next((phase for phase, starts in PHASES if key.startswith(starts)), key)
        found[name] = found.get(name, 0.0) + seconds
    return found


def read_measured(path: Path) -> list[tuple[Case, dict[str, Any]]]:
    """The rows of a JSON of `benchmarks.step`, and the case that each ran. Raises SpecError for another file."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise SpecError("too large", file=path, expected=f"at most {MAX_FILE_BYTES} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
        model = shorten(load_model(data["model"]), int(data["layers"]))
        skew = float(data.get("skew") or 0.0)
        shared: dict[str, Any] = {
            "ep": int(data["ep"]), "redundant": int(data["redundant"]), "precision": data["precision"],
            "gpu": gpu_key(str(data["provenance"]["gpu"])),
            "routing": Routing(kind="lognormal", sigma=skew) if skew else Routing(),
        }
        rows = [(Case(model, row["phase"], int(row["batch"]), int(row["context"]), graph_tokens=graph_tokens_of(row), **shared),
                 row) for row in data["rows"]]
        if not rows or not all(_is_time(row["step_s"]) for _, row in rows):
            raise ValueError("no rows with step_s")
    except OSError as err:
        raise SpecError(f"cannot read: {err.strerror}", file=path) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise SpecError(f"is no result of the step benchmark: {str(err)[:120]}", file=path,
                        expected="what `python -m benchmarks.step --json FILE` writes") from None
    return rows


def graph_tokens_of(row: dict[str, Any]) -> int | None:
    """`Case.graph_tokens` of a row of the benchmark. Rows from before prompts ran from graphs do not tell."""
    if row["phase"] != "prefill":
        return None
    tokens = int(row.get("graph_tokens") or 0)
    if tokens < 0:
        raise ValueError(f"graph_tokens of {tokens}")
    return tokens


def _is_time(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


def shorten(model: ModelSpec, layers: int | None) -> ModelSpec:
    """The model with its first `layers` layers alone; None: all."""
    if layers is None or layers >= model.layers:
        return model
    return model.model_copy(update={"layers": layers, "layer_ffn": model.layer_ffn[:layers],
                                    "layer_attention": model.layer_attention[:layers]})


def summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Errors over the pairs that were measured."""
    errors = [abs(pair.error) for pair in pairs if pair.error is not None]
    if not errors:
        return {"pairs": 0}
    return {"pairs": len(errors), "median_abs_error": float(np.median(errors)), "p95_abs_error": float(np.percentile(errors, 95)),
            "worst_abs_error": max(errors), "inside_80": sum(bool(pair.inside) for pair in pairs) / len(errors)}
