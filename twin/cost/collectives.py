"""All-reduce and all-gather of tensor parallelism, asked of the graph once and then straight lines in bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twin.cost.batch import INDEX, Array
from twin.cost.interpolate import Interpolator
from twin.cost.measured import Evidence, evidence_of
from twin.cost.network import Ints, Network
from twin.cost.protocols import TP_BASE_S, TP_EFFICIENCY
from twin.cost.roofline import activation_bytes
from twin.spec.model import ModelSpec
from twin.spec.plan import PoolPlan, Precision

_PROBE_BYTES: Array = np.exp2(np.arange(10.0, 33.0))


@dataclass(frozen=True)
class Collective:
    """`times` collectives a step of `unit_bytes` for each unit of a feature, over one TP group."""

    key: str
    feature: int
    unit_bytes: float
    times: float
    log_bytes: Array
    log_s: Array
    evidence: Evidence

    def seconds(self, x: Array) -> Array:
        """[..., f] -> [...]; none for a rank without tokens."""
        amount = x[..., self.feature] * self.unit_bytes
        each = np.exp(np.interp(np.log(np.maximum(amount, 1.0)), self.log_bytes, self.log_s))
        return np.asarray(each * self.times * (amount > 0))


def _curve(network: Network, gpus: Ints, kind: str, profile: Interpolator | None) -> tuple[Array, Evidence]:
    """Log seconds over `_PROBE_BYTES`: the profile's where it measured such a group inside one domain, else the graph's
    time at the efficiency collectives reach, and what each costs at least."""
    if profile is not None and len(np.unique(network.domain_of[gpus])) == 1:
        backend = {"backend": "engine", "launch": "graph"} if kind == "all_reduce" else {"backend": "nccl"}
        found = profile.curve(kind, {"gpus": float(len(gpus))}, backend)
        if found is not None:
            evidence = evidence_of(found, 2.0**20)
            if evidence.half_width <= 0.6:
                return np.log(found.many(_PROBE_BYTES)), evidence
    ask = network.all_reduce_s if kind == "all_reduce" else network.all_gather_s
    alone = np.array([ask(float(size) / TP_EFFICIENCY, gpus) for size in _PROBE_BYTES])
    return np.asarray(np.log(alone + TP_BASE_S)), Evidence("calibrated", 0.2)


def tp_collectives(model: ModelSpec, precision: Precision, pool: PoolPlan, network: Network, gpus_R: Ints,
                   profile: Interpolator | None = None, *, routed: bool = True) -> list[Collective]:
    """What TP adds to a step: one all-reduce after attention and one after the FFN of every layer, and the logits.

    Where experts are reached by all-to-all (`routed`), each rank of a TP group sends its share of the tokens and what comes
    back is gathered over the group (all-reduced when shared experts are cut over TP, whose partial sums ride along).
    """
    tp = pool.tp
    if tp <= 1:
        return []
    groups = gpus_R.reshape(pool.dp, tp)
    probes = [network.all_reduce_s(2.0**20, group) for group in groups]
    group = groups[int(np.argmax(probes))]  # the worst placed group paces the rest
    a = activation_bytes(precision.weights)
    token, row = model.hidden * a, model.vocab * a
    log_bytes = np.log(_PROBE_BYTES)
    reduce, reduce_from = _curve(network, group, "all_reduce", profile)
    gather, gather_from = _curve(network, group, "all_gather", profile)
    tokens, rows = INDEX["tokens"], INDEX["rows"]
    gathered = model.moe_layers if routed and not model.shared_params else 0
    reduced = model.layers + (model.layers - gathered) + 1  # + 1: the embedding is cut by vocabulary
    found = [Collective("tp/all_reduce", tokens, token, float(reduced), log_bytes, reduce, reduce_from),
             Collective("tp/logits", rows, row, 1.0, log_bytes, gather, gather_from)]
    if gathered:
        found.append(Collective("tp/all_gather", tokens, token, float(gathered), log_bytes, gather, gather_from))
    return found
