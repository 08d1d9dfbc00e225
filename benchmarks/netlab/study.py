"""Run cases in standing labs, predict them, fit the constants on half of the cases and report the other half."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.netlab.cases import Case, draw
from benchmarks.netlab.crew import Crew, crew
from benchmarks.netlab.lab import BURST_BYTES, LabSpec, lab
from benchmarks.netlab.rank import ROW_BYTES
from benchmarks.netlab.schedule import Constants, Message, all_gather, all_reduce, all_to_all, ends_s, kv_transfer
from twin.cost.network import Network

REPEATS = 3
_LATE_S = (0.0, 0.1e-3, 0.2e-3, 0.3e-3, 0.4e-3, 0.5e-3, 0.6e-3, 0.8e-3, 1e-3, 1.3e-3, 1.6e-3, 2e-3)
Json = dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """One number of a case: seconds until its collective (`part` "collective") or its last KV transfer ("kv") ended."""

    shape: LabSpec
    case: Case
    part: str
    repeats_s: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return float(np.median(self.repeats_s))


def measure(labs: Sequence[Sequence[LabSpec]], seed: int, progress: Callable[[str], None],
            only: Callable[[list[Case]], list[Case]] = lambda cases: cases) -> list[Timing]:
    """Time every case of every shape in labs that stand one after the other."""
    timings: list[Timing] = []
    for number, shapes in enumerate(labs):
        with lab(shapes[0]) as standing, crew(standing) as hands:
            for place, shape in enumerate(shapes):
                standing.shape(shape)
                rng = np.random.default_rng([seed, number, place])
                for case in only(draw(shape, rng)):
                    timings += _time(hands, shape, case)
                progress(f"{shape.name}, {shape.nic_bit_per_s / 1e6:g} Mbit/s, {shape.oversubscription:g}:1: "
                         f"{len(timings)} timings so far")
    return timings


def _time(hands: Crew, shape: LabSpec, case: Case) -> Iterator[Timing]:
    """Once to open connections and windows, then the repeats."""
    collective, kv = [], []
    for repeat in range(1 + REPEATS):
        answers = hands.do(case.command())
        if repeat:
            collective.append(max((a["collective_s"] or 0.0 for a in answers), default=0.0))
            kv.append(max((v for a in answers for v in a["kv_s"].values()), default=0.0))
    if case.op != "none":
        yield Timing(shape, case, "collective", tuple(collective))
    if case.kv:
        yield Timing(shape, case, "kv", tuple(kv))


def predict(timing: Timing, constants: Constants, network: Network | None = None) -> float:
    """The twin's answer to a timing."""
    shape, case = timing.shape, timing.case
    network = network or Network(shape.cluster())
    messages, first_kv = messages_of(case, shape.ranks)
    ends = ends_s(messages, network, constants, BURST_BYTES * shape.wire_share)
    chosen = ends[:first_kv] if timing.part == "collective" else ends[first_kv:]
    return float(chosen.max())


def messages_of(case: Case, world: int) -> tuple[list[Message], int]:
    """A case's messages, and the index of the first that carries KV."""
    messages: list[Message] = []
    if case.op == "all_to_all":
        messages = all_to_all(np.array(case.traffic_rows, dtype=float) * ROW_BYTES)
    elif case.op == "all_reduce":
        messages = all_reduce(case.rows * ROW_BYTES, world)
    elif case.op == "all_gather":
        messages = all_gather(case.rows * ROW_BYTES, world)
    first_kv = len(messages)
    for move in case.kv:
        messages += kv_transfer(move.source, move.target, move.layers, move.tokens * move.width, len(messages))
    return messages, first_kv


def fit(timings: Iterable[Timing]) -> Constants:
    """The constants that make the median error smallest: `late_s` from a grid, `begin_s` the median of what is left."""
    chosen = list(timings)
    measured = np.array([t.seconds for t in chosen])
    networks = [Network(t.shape.cluster()) for t in chosen]
    best = (np.inf, Constants())
    for late_s in _LATE_S:
        constants = Constants(late_s)
        predicted = np.array([predict(t, constants, n) for t, n in zip(chosen, networks, strict=True)])
        short = measured < np.median(measured)  # in long ones a constant drowns
        begin_s = max(0.0, float(np.median((measured - predicted)[short])))
        error = float(np.mean(np.abs(np.log((predicted + begin_s) / measured))))
        if error < best[0]:
            best = (error, Constants(late_s, begin_s))
    return best[1]


def halves(timings: Sequence[Timing], seed: int) -> tuple[list[Timing], list[Timing]]:
    """(fitted, reported): cases dealt by a seed, both numbers of a case to the same half."""
    cases = list(dict.fromkeys((t.shape, t.case) for t in timings))
    order = np.random.default_rng([seed, 99]).permutation(len(cases))
    first = {cases[i] for i in order[:len(cases) // 2]}
    fitted = [t for t in timings if (t.shape, t.case) in first]
    return fitted, [t for t in timings if (t.shape, t.case) not in first]


def rows(timings: Iterable[Timing], constants: Constants, part: str) -> list[Json]:
    """One JSON row a timing."""
    out = []
    for timing in timings:
        predicted_s, plain_s = predict(timing, constants), predict(timing, Constants())
        out.append({"half": part, "kind": timing.case.kind, "part": timing.part, "shape": asdict(timing.shape),
                    "case": timing.case.command(), "repeats_s": [round(s, 6) for s in timing.repeats_s],
                    "measured_s": round(timing.seconds, 6), "predicted_s": round(predicted_s, 6),
                    "unfitted_s": round(plain_s, 6), "error": round(predicted_s / timing.seconds - 1, 4)})
    return out


def summary(table: Sequence[Json]) -> dict[str, Json]:
    """Errors by kind: how many, median, 90th percentile, worst, and the mean with its sign."""
    groups: dict[str, list[Json]] = {}
    for row in table:
        name = f"{row['kind']}: {row['part']}" if row["kind"] == "overlap" else row["kind"]
        groups.setdefault(name, []).append(row)
        if row["kind"] in ("all_to_all", "kv", "overlap"):
            groups.setdefault("all-to-all, KV and overlap", []).append(row)
    return {name: _errors(group) for name, group in sorted(groups.items())}


def _errors(group: Sequence[Json]) -> Json:
    errors = np.array([row["error"] for row in group])
    unfitted = np.array([row["unfitted_s"] / row["measured_s"] - 1 for row in group])
    return {"rows": len(group), "median": round(float(np.median(abs(errors))), 4),
            "p90": round(float(np.quantile(abs(errors), 0.9)), 4), "worst": round(float(abs(errors).max()), 4),
            "bias": round(float(np.median(errors)), 4), "unfitted_median": round(float(np.median(abs(unfitted))), 4)}
