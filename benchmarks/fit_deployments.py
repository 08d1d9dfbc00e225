"""Fit `twin/cost/profiles/deployments.json` on a table of public deployments, and say how well that carries over.

    python -m benchmarks.fit_deployments silicon.csv --half fit --out half.json     # judged on the other half
    python -m benchmarks.fit_deployments silicon.csv --half all --like half.json    # what ships

Each row is predicted three times: as it is, with decode steps a tenth longer, and with prompt steps a tenth longer. In logs
its errors are then linear in the factors of the keys that it fits (`twin.cost.deployments.keys_of`), which least absolute
deviations with a pull towards zero find for all rows at once; two rounds, since lines bend. Errors of rows that a fit has not
seen choose the pull: five folds over rows, over whole configurations, and over all of a model's in one format on one
generation under an engine. The same errors, a configuration weighing the root of its rows, give the widths of
intervals (`twin.cost.deployments.NEAR`). With `--like` the pull and the widths are those of a fit that was judged.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from twin.cost.deployments import NEAR, NONE, SHIPPED, Deployments, Key, keys_of, load_deployments
from twin.cost.engines import ENGINES, Engine
from twin.cost.model import CostModel
from twin.spec.cluster import ClusterSpec
from twin.spec.errors import EptwinError
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan
from twin.spec.rundir import write_text
from twin.validate.answer import Answers
from twin.validate.rows import Question, Unanswered, in_fit_half, question_of, read_rows

Array = npt.NDArray[np.float64]
_NUDGE = math.log(1.1)
_BOUND = 0.7  # log error beyond which a row says no more: another deployment than its columns say
_PULLS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_TTFT_WEIGHT = 0.5
_FOLDS = 5
_AGAIN = 1.15  # times longer that a deployment may take when it is measured again; versions five weeks apart differ by 0.4%


@dataclass(frozen=True)
class Seen:
    """A row at its present factors: what it fits, log errors (TPOT, TTFT), their slopes in (decode, prefill), the log half
    width of its typical decode step, errors with nothing fitted at all, and whether prompts have a pool of their own."""

    configuration: str
    moe: bool
    keys: tuple[Key, ...]
    error: tuple[float, float]
    slope: tuple[tuple[float, float], tuple[float, float]]
    width: float
    unfitted: tuple[float, float] = (0.0, 0.0)
    separated: bool = False


def chosen(path: Path, half: str, seed: int) -> list[Question]:
    """Rows of one half (or of both) that are questions with measurements, each measurement once, and none that the table
    contradicts (`told_apart`)."""
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
    return told_apart(found)


def told_apart(questions: Sequence[Question]) -> list[Question]:
    """Questions without those whose columns were measured with TPOT further apart than runs of one deployment are: two
    deployments hide behind one name (with drafts and without), and neither says anything of the other's constants."""
    measured: dict[tuple[object, ...], list[float]] = {}
    for q in questions:
        measured.setdefault(_asked(q), []).append(q.measured_tpot_s)
    return [q for q in questions if max(measured[_asked(q)]) <= _AGAIN * min(measured[_asked(q)])]


def _asked(q: Question) -> tuple[object, ...]:
    return (q.row.configuration, q.concurrency, q.row.numbers["isl"], q.row.numbers["osl"], q.plan.pools[-1].mtp_draft_tokens,
            q.recipe)


def keys_for(question: Question) -> tuple[Key, ...]:
    """Keys of the pool that decodes; a separated prefill pool shares all but perhaps the layout."""
    plan, gpu = question.plan, question.cluster.groups[0].gpu
    return keys_of(plan.engine, gpu, question.model, plan.precision, plan.pools[-1])


def look(questions: Sequence[Question], seed: int, deployments: Deployments, bare: bool = True) -> list[Seen]:
    """Predict rows and their slopes; `bare` also with nothing fitted at all."""
    plain, found = Answers(seed, deployments=deployments), []
    nudged = [Answers(seed, deployments=_Nudged(deployments.log_factors, nudge)) for nudge in ((_NUDGE, 0.0), (0.0, _NUDGE))]
    asked = [plain, *nudged, *([_Unfitted(seed)] if bare else [])]
    for q in questions:
        try:
            at = [a.answer(q) for a in asked]
        except EptwinError:
            continue
        logs = np.log([[a.tpot_s / q.measured_tpot_s, a.ttft_s / q.measured_ttft_s] for a in at])
        d, p = (logs[1:3] - logs[0]) / _NUDGE
        found.append(Seen(q.row.configuration, q.model.moe is not None, keys_for(q), (logs[0][0], logs[0][1]),
                          ((d[0], p[0]), (d[1], p[1])), at[0].step_width, (logs[-1][0], logs[-1][1]), len(q.plan.pools) > 1))
    return found


class _Unfitted(Answers):
    """Engines as engines.py states them."""

    def costs_of(self, model: ModelSpec, cluster: ClusterSpec, plan: Plan, pool: PoolPlan,
                 engine: Engine | None = None) -> CostModel:
        return super().costs_of(model, cluster, plan, pool, ENGINES[plan.engine])


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


def folds(seen: Sequence[Seen], pull: float, before: Deployments, out: str = "model") -> Array:
    """Log errors [rows, 2] of rows left out of the fit. What stays known of them is `out`, one of `NEAR`: their configuration
    (rows are left out alone), their model (all of a configuration is), their engine (all of a model in its format and on
    its generation is)."""
    names = [{"configuration": f"row {i}", "model": s.configuration, "engine": "|".join(s.keys[1])}[out]
             for i, s in enumerate(seen)]
    which = np.array([hashlib.sha256(name.encode()).digest()[1] % _FOLDS for name in names])
    errors = np.zeros((len(seen), 2))
    for fold in range(_FOLDS):
        fit = solve([s for s, f in zip(seen, which, strict=True) if f != fold], pull, before)
        left = [s for s, f in zip(seen, which, strict=True) if f == fold]
        if left:
            errors[which == fold] = left_over(left, fit, before)
    return errors


def summary(errors: Array, seen: Sequence[Seen]) -> dict[str, Any]:
    """Medians and means of relative errors of mixtures of experts."""
    off = np.abs(np.expm1(errors[[s.moe for s in seen]]))
    return {"rows": len(off), "tpot_median": float(np.median(off[:, 0])), "tpot_mean": float(off[:, 0].mean()),
            "ttft_median": float(np.median(off[:, 1])), "ttft_mean": float(off[:, 1].mean())}


def width_for(errors: Array, seen: Sequence[Seen]) -> Array:
    """Multiples [2] of a row's width that hold four in five of mixtures of experts, a configuration weighing the root of its
    rows: what is asked next is another deployment more often than another row of the one that has most."""
    chosen = [i for i, s in enumerate(seen) if s.moe] or list(range(len(seen)))
    names = [seen[i].configuration for i in chosen]
    weight = np.array([names.count(name) ** -0.5 for name in names])
    times = np.abs(errors[chosen]) / np.array([seen[i].width for i in chosen])[:, None]
    order = np.argsort(times, axis=0)
    share = np.cumsum(weight[order], axis=0) / weight.sum()
    return np.array([times[order[np.searchsorted(share[:, m], 0.8), m], m] for m in (0, 1)])


def with_widths(fit: Deployments, left: dict[str, Array], seen: Sequence[Seen]) -> Deployments:
    """The fit with widths of intervals from errors left out. Separated pools have few rows: one factor for TTFT of all."""
    widths = {near: width_for(errors, seen) for near, errors in left.items()}
    for nearer, near in pairwise(NEAR):  # less known is never narrower
        widths[near] = np.maximum(widths[near], widths[nearer])
    apart = [i for i, s in enumerate(seen) if s.separated]
    times = 1.0
    if apart:
        times = width_for(left["model"][apart], [seen[i] for i in apart])[1] / widths["model"][1]
    return replace(fit, widths={near: (float(w[0]), float(w[1])) for near, w in widths.items()},
                   separated=max(1.0, float(times)))


def fit(questions: list[Question], seed: int, workers: int, rounds: int) -> tuple[Deployments, dict[str, Any]]:
    """Factors and how rows were and will be predicted."""
    found, report, pull = NONE, {}, 2.0
    parts = [questions[i::workers * 4] for i in range(workers * 4)]
    for turn in range(rounds):
        with ProcessPoolExecutor(workers) as pool:
            seen = [s for part in pool.map(partial(look, seed=seed, deployments=found), parts) for s in part]
        if not turn:
            report["before"] = summary(np.array([s.error for s in seen]), seen)
        tried = {p: {near: folds(seen, p, found, near) for near in NEAR[:3]} for p in _PULLS}
        pull = min(tried, key=lambda p: _loss(list(tried[p].values())))
        left = tried[pull] | {"nothing": np.array([s.unfitted for s in seen])}
        report |= {"pull": pull, "losses": {p: _loss(list(e.values())) for p, e in tried.items()},
                   "known": {near: summary(errors, seen) for near, errors in left.items()}}
        now = solve(seen, pull, found)
        report["inside"] = summary(left_over(seen, now, found), seen)
        found = with_widths(now, left, seen)
        click.echo(f"round {turn + 1}: pull {pull}, widths {found.widths}, separated {found.separated:.2f}")
        for name, told in (*report["known"].items(), ("inside", report["inside"])):
            click.echo(f"  {name}: {told}")
    return found, report


def fit_like(judged: Path, questions: list[Question], seed: int, workers: int, rounds: int) -> tuple[Deployments, dict[str, Any]]:
    """Factors at the pull of a fit that was judged, with its widths."""
    before, pull = load_deployments(judged), float(json.loads(judged.read_text(encoding="utf-8"))["report"]["pull"])
    found, report = replace(before, log_factors={}), {"pull": pull, "like": judged.name}
    parts = [questions[i::workers * 4] for i in range(workers * 4)]
    for _ in range(rounds):
        with ProcessPoolExecutor(workers) as pool:
            look_at = partial(look, seed=seed, deployments=found, bare=False)
            seen = [s for part in pool.map(look_at, parts) for s in part]
        now = solve(seen, pull, found)
        report["inside"] = summary(left_over(seen, now, found), seen)
        click.echo(f"inside: {report['inside']}")
        found = replace(found, log_factors=now.log_factors)
    return found, report


def _loss(errors: Sequence[Array]) -> float:
    """Mean bounded error of TPOT and, half as heavy, of TTFT."""
    return float(np.mean([(np.minimum(np.abs(e), _BOUND) @ [1.0, _TTFT_WEIGHT]).mean() for e in errors]))


@click.command()
@click.argument("table", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--half", type=click.Choice(["fit", "report", "all"]), default="fit", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True)
@click.option("--like", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A fit that was judged.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=SHIPPED, show_default=True)
def main(table: Path, half: str, seed: int, rounds: int, workers: int, like: Path | None, out: Path) -> None:
    """Fit and write."""
    questions = chosen(table, half, seed)
    found, report = fit(questions, seed, workers, rounds) if like is None else fit_like(like, questions, seed, workers, rounds)
    entries = [{"key": list(key), "log_decode": round(d, 4), "log_prefill": round(p, 4)}
               for key, (d, p) in sorted(found.log_factors.items())]
    write_text(out, json.dumps({"table": table.name, "half": half, "seed": seed, "report": report, "widths": found.widths,
                                "separated": found.separated, "entries": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
