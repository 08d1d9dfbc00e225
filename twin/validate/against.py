"""Predictions beside the measurements of public tables, row by row, and how wrong they are by group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from twin.cost.deployments import load_deployments
from twin.spec.errors import EptwinError
from twin.validate.answer import Answer, Answers
from twin.validate.rows import Question, Row, Unanswered, in_fit_half, question_of, read_rows
from twin.validate.stats import summarise_errors

Split = Literal["fit", "report", "all"]
GROUPS = ("kind", "gpu", "engine", "model", "mode")
METRICS = ("tpot", "ttft")


@dataclass(frozen=True)
class Verdict:
    """One row: the answer beside the measurement, or why there is none."""

    row: Row
    half: str
    question: Question | None = None
    answer: Answer | None = None
    reason: str = ""
    mistake: bool = False

    def predicted_s(self, metric: str) -> float:
        assert self.answer is not None
        return self.answer.tpot_s if metric == "tpot" else self.answer.ttft_s

    def interval_s(self, metric: str) -> tuple[float, float]:
        """The 80% interval."""
        a = self.answer
        assert a is not None
        return (a.tpot_low_s, a.tpot_high_s) if metric == "tpot" else (a.ttft_low_s, a.ttft_high_s)

    def measured_s(self, metric: str) -> float | None:
        """Measured seconds; None where the row has none."""
        value = self.row.numbers.get(f"silicon_{metric}_ms")
        return None if value is None else value / 1e3

    def error(self, metric: str) -> float | None:
        """Signed relative error; None without a measurement or an answer."""
        measured = self.measured_s(metric)
        if self.answer is None or measured is None:
            return None
        return self.predicted_s(metric) / measured - 1.0

    def covered(self, metric: str) -> bool | None:
        """Whether the interval holds the measurement."""
        measured = self.measured_s(metric)
        if self.answer is None or measured is None:
            return None
        low, high = self.interval_s(metric)
        return low <= measured <= high


def judge(path: Path, *, split: Split = "all", seed: int = 0, limit: int | None = None, deployments: Path | None = None,
          tell: Callable[[int, int], None] | None = None) -> list[Verdict]:
    """Answer the rows of a file, in their order; `deployments` replaces the factors that ship. Raises SpecError for a file that
    cannot be read."""
    rows = [row for row in read_rows(path) if split == "all" or in_fit_half(row, seed) == (split == "fit")][:limit]
    answers = Answers(seed, deployments=None if deployments is None else load_deployments(deployments))
    verdicts = []
    for done, row in enumerate(rows):
        if tell is not None:
            tell(done, len(rows))
        verdicts.append(_judge(row, path.parent, answers, "fit" if in_fit_half(row, seed) else "report"))
    if tell is not None:
        tell(len(rows), len(rows))
    return verdicts


def _judge(row: Row, base: Path, answers: Answers, half: str) -> Verdict:
    question = question_of(row, base)
    if isinstance(question, Unanswered):
        return Verdict(row, half, reason=question.reason, mistake=question.mistake)
    try:
        return Verdict(row, half, question, answers.answer(question))
    except EptwinError as error:  # what the cost model refuses is an answer too
        return Verdict(row, half, question, reason=str(error).splitlines()[0])


def summarise(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Errors of all rows and by group, coverage of rows (mistakes of the collection left out) and of intervals, and the
    columns' own predictions beside them on the rows that both answer."""
    legal = [v for v in verdicts if not v.mistake]
    answered = [v for v in legal if v.answer is not None]
    groups = {g: sorted({v.question.groups[g] for v in answered if v.question is not None}) for g in GROUPS}
    return {
        "rows": len(verdicts), "mistakes_of_the_collection": len(verdicts) - len(legal), "answered": len(answered),
        "row_coverage": len(answered) / len(legal) if legal else None,
        "all": _errors(answered),
        **{f"by_{g}": {name: _errors(v for v in answered if v.question is not None and v.question.groups[g] == name)
                       for name in names} for g, names in groups.items()},
        "peers": {peer: _beside(answered, peer) for peer in _peers(legal)},
    }


def _errors(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    chosen = list(verdicts)
    found: dict[str, Any] = {"rows": len(chosen)}
    for metric in METRICS:
        summary = summarise_errors([v.error(metric) for v in chosen])
        covered = [c for v in chosen if (c := v.covered(metric)) is not None]
        found[metric] = {"rows": summary.count, "median_abs_error": summary.median_abs, "mean_abs_error": summary.mean_abs,
                         "p95_abs_error": summary.p95_abs, "bias_median": summary.median,
                         "interval_coverage": sum(covered) / len(covered) if covered else None}
    return found


def _peers(verdicts: Sequence[Verdict]) -> list[str]:
    return sorted({name.rsplit("_", 2)[0] for v in verdicts for name in v.row.peers})


def _beside(verdicts: Sequence[Verdict], peer: str) -> dict[str, Any]:
    """A peer's errors, and the twin's on the same rows."""
    found: dict[str, Any] = {}
    for metric in METRICS:
        column = f"{peer}_{metric}_ms"
        pairs = [(v, m) for v in verdicts if column in v.row.peers and (m := v.measured_s(metric)) is not None]
        theirs = summarise_errors([v.row.peers[column] / 1e3 / m - 1.0 for v, m in pairs])
        ours = summarise_errors([v.error(metric) for v, _ in pairs])
        found[metric] = {"rows": theirs.count, "median_abs_error": theirs.median_abs, "mean_abs_error": theirs.mean_abs,
                         "twin_median_abs_error": ours.median_abs, "twin_mean_abs_error": ours.mean_abs}
    return found


def plain(verdict: Verdict) -> dict[str, Any]:
    """One row as plain data: seconds, sources of the typical decode step, or the reason."""
    found: dict[str, Any] = {"id": verdict.row.name, "line": verdict.row.line, "half": verdict.half}
    if verdict.question is not None:
        found |= verdict.question.groups | {"concurrency": verdict.question.concurrency}
    if verdict.answer is None:
        return found | {"answered": False, "reason": verdict.reason, "mistake_of_the_collection": verdict.mistake}
    found["answered"] = True
    for metric in METRICS:
        low, high = verdict.interval_s(metric)
        found[f"{metric}_s"], found[f"{metric}_low_s"], found[f"{metric}_high_s"] = verdict.predicted_s(metric), low, high
        measured, error = verdict.measured_s(metric), verdict.error(metric)
        if measured is not None:
            found |= {f"measured_{metric}_s": measured, f"{metric}_error": error}
    found["parts_s"], found["sources"] = verdict.answer.parts_s, verdict.answer.sources
    found["notes"] = [*verdict.answer.notes]
    return found


def finite(value: Any) -> Any:
    """Plain data without NaN or infinity, for JSON."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
