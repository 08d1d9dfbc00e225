"""What measured deployments of an engine say beyond its operators and its general constants: two factors each.

Whole-engine measurements differ from the sum of an engine's operators in ways that belong to one model in one format on one
kind of GPU (which kernels it was built with, what its router loads, what its attention backend does around the kernel). Each
entry multiplies device time of steps without prompts (`decode`) and with prompts (`prefill`) of the deployments it names;
a deployment takes the product of all entries that fit it, and those that nothing was measured of take 1. Fitted, shrunk
towards 1, by `benchmarks/fit_deployments.py`; docs/accuracy.md says on what and how well that carries over.

How wide an 80% interval is depends on how near what was measured is (`NEAR`): errors of rows left out alone, with all of
their configuration, with all of their model under the engine, or without anything fitted at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import exp
from pathlib import Path

from twin.cost.engine_fits import FITS, generation
from twin.cost.engines import Engine
from twin.spec.cluster import GpuSpec
from twin.spec.errors import SpecError
from twin.spec.model import ModelSpec
from twin.spec.parse import read_text
from twin.spec.plan import PoolPlan, Precision

SHIPPED = Path(__file__).parent / "profiles" / "deployments.json"
Key = tuple[str, ...]
NEAR = ("configuration", "model", "engine", "nothing")
"""What of a deployment was measured: it itself, its model in the format and on the generation, its engine there, or none."""
_UNMEASURED = (2.0, 4.0)  # widths where a file has none


@dataclass(frozen=True)
class Deployments:
    """Log factors (decode, prefill) by key; see `keys_of` for what a key is. `widths`: by what was measured (`NEAR`), the log
    half widths of TPOT's and TTFT's 80% intervals as multiples of the typical decode step's; `separated` is how many times
    wider TTFT's is where prompts have a pool of their own."""

    log_factors: Mapping[Key, tuple[float, float]]
    widths: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    separated: float = 1.0

    def factors(self, keys: tuple[Key, ...]) -> tuple[float, float]:
        """(decode, prefill) of a deployment, as logs: the sum over the keys that are known."""
        known = [self.log_factors[key] for key in keys if key in self.log_factors]
        return sum(d for d, _ in known), sum(p for _, p in known)

    def near(self, keys: tuple[Key, ...]) -> str:
        """The nearest thing to a deployment that was measured, one of `NEAR`."""
        if keys[-1] in self.log_factors:
            return "configuration"
        if keys[1] in self.log_factors:
            return "model"
        return "engine" if (keys[1][0], keys[1][3]) in FITS else "nothing"

    def widths_of(self, keys: tuple[Key, ...], separated: bool) -> tuple[float, float]:
        """(TPOT, TTFT) widths of a deployment's intervals, in those of its typical decode step."""
        tpot, ttft = self.widths.get(self.near(keys), _UNMEASURED)
        return tpot, ttft * (self.separated if separated else 1.0)


def keys_of(engine: str, gpu: GpuSpec, model: ModelSpec, precision: Precision, pool: PoolPlan) -> tuple[Key, ...]:
    """From the general to the particular: the family of models under the engine; in one format on one generation of GPUs;
    on one GPU, with attention cut (`tp`) or data-parallel (`dp`); cut just so."""
    family = model.model_type
    words = precision.experts if model.moe is not None else precision.weights
    kind = gpu.name.split("-")[0]
    layout = "dp" if pool.dp > 1 else "tp"
    model_there = (engine, family, words, generation(gpu))
    cut = f"dp{pool.dp} tp{pool.tp} ep{pool.ep} drafts{pool.mtp_draft_tokens}"
    return ((engine, family), model_there, (*model_there, kind, layout), (*model_there, kind, layout, cut))


@lru_cache(maxsize=8)
def load_deployments(path: Path = SHIPPED) -> Deployments:
    """Factors from a file. Raises SpecError for one that is not in its format."""
    text = read_text(path, max_bytes=4 << 20)
    try:
        content = json.loads(text)
        entries, widths = content["entries"], content.get("widths", {})
        found = {tuple(str(word) for word in e["key"]): (float(e["log_decode"]), float(e["log_prefill"])) for e in entries}
        return Deployments(found, {near: (float(widths[near][0]), float(widths[near][1])) for near in NEAR if near in widths},
                           float(content.get("separated", 1.0)))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise SpecError(f"not a file of deployments: {error}", file=path,
                        hint='{"entries": [{"key": [engine, family], "log_decode": 0.1, "log_prefill": 0.0}]}') from error


NONE = Deployments({})


def as_deployed(engine: Engine, keys: tuple[Key, ...], deployments: Deployments) -> Engine:
    """The engine as slow as such deployments were measured. What a model's steps with prompts take more is as often kernels
    launched one by one as work on the device, so both grow."""
    decode, prefill = deployments.factors(keys)
    return replace(engine, decode_slowdown=engine.decode_slowdown * exp(decode),
                   prefill_slowdown=engine.prefill_slowdown * exp(prefill),
                   eager_launch_s=engine.eager_launch_s * exp(prefill))
