"""Fit `twin/cost/profiles/deployments.json` on a table of public deployments, and say how well that carries over.

    python -m benchmarks.fit_deployments silicon.csv --half fit --out half.json     # judged on the other half
    python -m benchmarks.fit_deployments silicon.csv --half all                     # what ships

Each row is predicted three times: as it is, with decode steps a tenth longer, and with prompt steps a tenth longer. In logs
its errors are then linear in the factors of the keys that it fits (`twin.cost.deployments.keys_of`), which least absolute
deviations with a pull towards zero find for all rows at once; two rounds, since lines bend. Errors of configurations that a fit
has not seen (five folds over whole configurations) choose the pull and the widths of intervals.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from twin.cost.deployments import NONE, SHIPPED, Deployments, Key, keys_of
from twin.spec.errors import EptwinError
from twin.spec.rundir import write_text
from twin.validate.answer import Answers
from twin.validate.rows import Question, Unanswered, in_fit_half, question_of, read_rows

Array = npt.NDArray[np.float64]
_NUDGE = math.log(1.1)
_BOUND = 0.7  # log error beyond which a row says no more: another deployment than its columns say
_PULLS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_TTFT_WEIGHT = 0.5
_FOLDS = 5


@dataclass(frozen=True)
class Seen:
    """A row at its present factors: what it fits, log errors (TPOT, TTFT), their slopes in (decode, prefill), and the log half
    width of its typical decode step."""

    configuration: str
    moe: bool
    keys: tuple[Key, ...]
    error: tuple[float, float]
    slope: tuple[tuple[float, float], tuple[float, float]]
    width: float


def chosen(path: Path, half: str, seed: int) -> list[Question]:
    """Rows of one half (or of both) that are questions with measurements, each measurement once."""
    found, met = [], set()
    for row in read_rows(path):
        question = question_of(row)
        if isinstance(question, Unanswered) or not (question.measured_tpot_s > 0 and question.measured_ttft_s > 0):
            continue
        mark = (row.configuration, question.concurrency, row.numbers["isl"], row.numbers["osl"],
                round(question.measured_tpot_s, 7))
        if mark not in met and (half == "all" or in_fit_half(row, seed) == (half == "fit")):
            met.add(mark)
            found.append(question)
    return found


def keys_for(question: Question) -> tuple[Key, ...]:
    """Keys of the pool that decodes; a separated prefill pool shares all but perhaps the layout."""
    plan, gpu = question.plan, question.cluster.groups[0].gpu
    return keys_of(plan.engine, gpu, question.model, plan.precision, plan.pools[-1])


def look(questions: Sequence[Question], seed: int, deployments: Deployments) -> list[Seen]:
    """Predict rows and their slopes."""
    plain, found = Answers(seed, deployments=deployments), []
    nudged = [Answers(seed, deployments=_Nudged(deployments.log_factors, nudge)) for nudge in ((_NUDGE, 0.0), (0.0, _NUDGE))]
    for q in questions:
        try:
            at = [a.answer(q) for a in (plain, *nudged)]
        except EptwinError:
            continue
        logs = np.log([[a.tpot_s / q.measured_tpot_s, a.ttft_s / q.measured_ttft_s] for a in at])
        d, p = (logs[1:] - logs[0]) / _NUDGE
        width = math.log(at[0].tpot_high_s / at[0].tpot_s)
        found.append(Seen(q.row.configuration, q.model.moe is not None, keys_for(q), (logs[0][0], logs[0][1]),
                          ((d[0], p[0]), (d[1], p[1])), width))
    return found


class _Nudged(Deployments):
    """The same factors, all of one kind a little larger."""

    def __init__(self, log_factors: Any, nudge: tuple[float, float]) -> None:
        super().__init__(log_factors)
        object.__setattr__(self, "nudge", nudge)

    def factors(self, keys: tuple[Key, ...]) -> tuple[float, float]:
        decode, prefill = super().factors(keys)
        nudge: tuple[float, float] = self.__dict__["nudge"]
        return decode + nudge[0], prefill + nudge[1]


def solve(seen: Sequence[Seen], pull: float, before: Deployments = NONE) -> Deployments:
    """Factors under which the rows' errors are least; `before` is what they were seen under, and the pull is towards none."""
    keys = sorted({key for s in seen for key in s.keys})
    place = {key: i for i, key in enumerate(keys)}
    start = np.array([before.log_factors.get(key, (0.0, 0.0)) for key in keys]).T.ravel()
    matrix, target, weight = np.zeros((2 * len(seen), 2 * len(keys))), np.zeros(2 * len(seen)), np.ones(2 * len(seen))
    for i, s in enumerate(seen):
        for m in (0, 1):
            row = 2 * i + m
            target[row] = -max(-_BOUND, min(_BOUND, s.error[m]))
            weight[row] = _TTFT_WEIGHT if m else 1.0
            for key in s.keys:
                matrix[row, place[key]] += s.slope[m][0]
                matrix[row, len(keys) + place[key]] += s.slope[m][1]
    target = target + matrix @ start
    found = start
    for _ in range(25):  # least absolute deviations by weighing anew
        off = np.maximum(np.abs(target - matrix @ found), 0.03)
        scaled = matrix * (weight / off)[:, None]
        found = np.linalg.solve(matrix.T @ scaled + pull / 0.15 * np.eye(2 * len(keys)), scaled.T @ target)
    return Deployments({key: (float(found[i]), float(found[len(keys) + i])) for key, i in place.items()})


def left_over(seen: Sequence[Seen], fit: Deployments, before: Deployments) -> Array:
    """Log errors [rows, 2] that would remain under `fit`, by the slopes."""
    moved = np.array([np.subtract(fit.factors(s.keys), before.factors(s.keys)) for s in seen])
    return np.array([s.error for s in seen]) + np.einsum("rmk,rk->rm", np.array([s.slope for s in seen]), moved)


def folds(seen: Sequence[Seen], pull: float, before: Deployments, *, strangers: bool = False) -> Array:
    """Log errors [rows, 2] of rows whose configuration was left out of the fit; with `strangers` all of their model, format
    and generation of GPUs under their engine was."""
    names = ["|".join(s.keys[1]) if strangers else s.configuration for s in seen]
    which = np.array([hashlib.sha256(name.encode()).digest()[1] % _FOLDS for name in names])
    errors = np.zeros((len(seen), 2))
    for fold in range(_FOLDS):
        fit = solve([s for s, f in zip(seen, which, strict=True) if f != fold], pull, before)
        out = [s for s, f in zip(seen, which, strict=True) if f == fold]
        if out:
            errors[which == fold] = left_over(out, fit, before)
    return errors


def summary(errors: Array, seen: Sequence[Seen]) -> dict[str, Any]:
    """Medians and means of relative errors of mixtures of experts, and the multiple of a row's width that holds four in five."""
    moe = np.array([s.moe for s in seen])
    off, width = np.abs(np.expm1(errors[moe])), np.array([s.width for s in seen])[moe]
    times = np.quantile(np.abs(errors[moe]) / width[:, None], 0.8, axis=0)
    return {"rows": int(moe.sum()), "tpot_median": float(np.median(off[:, 0])), "tpot_mean": float(off[:, 0].mean()),
            "ttft_median": float(np.median(off[:, 1])), "ttft_mean": float(off[:, 1].mean()),
            "widths_for_80_percent": [float(t) for t in times]}


def fit(questions: list[Question], seed: int, workers: int, rounds: int) -> tuple[Deployments, dict[str, Any]]:
    """Factors and how rows were and will be predicted."""
    found, report, pull = NONE, {}, 2.0
    parts = [questions[i::workers * 4] for i in range(workers * 4)]
    for turn in range(rounds):
        with ProcessPoolExecutor(workers) as pool:
            seen = [s for part in pool.map(partial(look, seed=seed, deployments=found), parts) for s in part]
        if not turn:
            report["before"] = summary(np.array([s.error for s in seen]), seen)
        tried = {p: folds(seen, p, found) for p in _PULLS}
        pull = min(tried, key=lambda p: float(np.minimum(np.abs(tried[p]), _BOUND) @ [1.0, _TTFT_WEIGHT] @ np.ones(len(seen))))
        report |= {"pull": pull, "left_out": summary(tried[pull], seen), "pulls": {p: summary(e, seen) for p, e in tried.items()}}
        report["strangers"] = summary(folds(seen, pull, found, strangers=True), seen)
        now = solve(seen, pull, found)
        report["inside"] = summary(left_over(seen, now, found), seen)
        found = now
        click.echo(f"round {turn + 1}: pull {pull}")
        for name in ("left_out", "strangers", "inside"):
            click.echo(f"  {name}: {report[name]}")
    return found, report


@click.command()
@click.argument("table", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--half", type=click.Choice(["fit", "report", "all"]), default="fit", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=SHIPPED, show_default=True)
def main(table: Path, half: str, seed: int, rounds: int, workers: int, out: Path) -> None:
    """Fit and write."""
    found, report = fit(chosen(table, half, seed), seed, workers, rounds)
    entries = [{"key": list(key), "log_decode": round(d, 4), "log_prefill": round(p, 4)}
               for key, (d, p) in sorted(found.log_factors.items()) if abs(d) > 5e-4 or abs(p) > 5e-4]
    write_text(out, json.dumps({"table": table.name, "half": half, "seed": seed, "report": report, "entries": entries},
                               indent=1) + "\n")


if __name__ == "__main__":
    main()
