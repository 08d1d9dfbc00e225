"""Published records (a YAML list: what was measured, of which model, on what) beside the twin's predictions of them.

A record has `id`, `metric`, `value`, `unit` and whatever describes its configuration: model, gpu, nodes, gpus, phase, ep, dp,
tp, isl, osl, batch_per_gpu, tokens_per_gpu, features, network, concurrency, backend, … Unknown fields are ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from twin.spec.errors import EptwinError, Problem, SpecError
from twin.spec.parse import read_text
from twin.validate.record_kinds import ANSWERS, kind_of
from twin.validate.record_words import Found

MAX_FILE_BYTES = 16 << 20
MAX_RECORDS = 100_000
_LARGEST = 1e12  # of any number in a record
_SIZES = ("ep", "tp", "dp", "gpus", "nodes", "isl", "osl", "batch_per_gpu", "batch", "tokens_per_gpu", "concurrency", "hidden",
          "topk", "experts", "message_bytes", "message_elements", "M", "sms", "kv_mb", "size_bytes", "bw_gbps")
_ALIKE = ("source", "model", "gpu", "gpus", "phase", "ep", "isl", "osl", "batch_per_gpu", "metric", "unit")


@dataclass(frozen=True)
class Judged:
    """One record: the prediction in the record's own unit, or why there is none."""

    name: str
    kind: str
    metric: str
    unit: str
    published: float | None
    found: Found | None
    reason: str = ""
    alike: str = ""  # what else it shares with the record that differs in two-batch overlap alone; empty where it has none
    tbo: bool = False

    @property
    def error(self) -> float | None:
        """Signed relative error; None without a prediction or a published number."""
        if self.found is None or not self.published:
            return None
        return self.found.value / self.published - 1.0

    def plain(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        found: dict[str, Any] = {"id": self.name, "kind": self.kind, "metric": self.metric, "unit": self.unit,
                                 "published": self.published, "answered": self.found is not None}
        if self.found is None:
            return found | {"reason": self.reason}
        return found | {"predicted": self.found.value, "low": self.found.low, "high": self.found.high, "error": self.error,
                        "sources": list(self.found.sources)}

    def line(self) -> str:
        """One line for people."""
        if self.found is None:
            return f"{self.name}: not answered: {self.reason}"
        text = f"{self.name}: {self.metric} {self.found.value:.4g} {self.unit} [{self.found.low:.4g}, {self.found.high:.4g}]"
        if self.error is not None:
            text += f" published {self.published:.4g} ({self.error:+.1%})"
        return text + f"  ({', '.join(self.found.sources)})"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a YAML file. Raises SpecError for anything that is no list of mappings with a metric."""
    text = read_text(path, max_bytes=MAX_FILE_BYTES)
    try:
        data = YAML(typ="safe", pure=True).load(text)
    except RecursionError as error:
        raise SpecError("is nested too deep", file=path) from error
    except (YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        message = str(getattr(error, "problem", None) or error).splitlines()[0][:200]
        raise SpecError(Problem(f"not valid YAML: {message}", line=mark.line + 1 if mark else None), file=path) from error
    if isinstance(data, Mapping) and isinstance(data.get("records"), list):
        data = data["records"]
    if not isinstance(data, list) or not data:
        raise SpecError("holds no list of records", file=path, expected="- {id: …, metric: …, value: …}")
    if len(data) > MAX_RECORDS:
        raise SpecError(f"more than {MAX_RECORDS} records", file=path)
    for number, record in enumerate(data):
        if not isinstance(record, Mapping) or not isinstance(record.get("metric"), str):
            raise SpecError(f"record {number + 1} has no metric", file=path, field=f"{number}.metric", expected="a name")
    return [dict(record) for record in data]


def judge_records(path: Path, limit: int | None = None) -> list[Judged]:
    """Answer the records of a file, in their order."""
    return [_judge(record, number) for number, record in enumerate(read_records(path)[:limit])]


def _judge(record: Mapping[str, Any], number: int) -> Judged:
    judged, features = _answered(record, number), record.get("features")
    if judged.kind != "throughput" or not isinstance(features, Mapping) or "TBO" not in features:
        return judged
    rest = {key: record.get(key) for key in _ALIKE} | {"features": sorted((k, str(v)) for k, v in features.items() if k != "TBO")}
    return replace(judged, alike=str(rest), tbo=bool(features["TBO"]))


def overlap_gains(records: list[Judged]) -> list[dict[str, Any]]:
    """What two-batch overlap adds to throughput, published and predicted, for pairs of records that differ in it alone.
    `error` is of the gain's size."""
    found = []
    for one in records:
        other = next((r for r in records if r.alike and r.alike == one.alike and one.tbo and not r.tbo), None)
        if other is None or not (one.found and other.found and one.published and other.published):
            continue
        published, predicted = one.published / other.published - 1, one.found.value / other.found.value - 1
        found.append({"with": one.name, "without": other.name, "published": published, "predicted": predicted,
                      "error": predicted / published - 1 if published else None})
    return found


def _answered(record: Mapping[str, Any], number: int) -> Judged:
    name, metric, unit = str(record.get("id") or f"record {number + 1}"), str(record["metric"]), str(record.get("unit") or "")
    value, kind = record.get("value"), kind_of(record)
    published = float(value) if isinstance(value, int | float) and 0 <= abs(value) < _LARGEST else None
    answer = ANSWERS.get(kind)
    if answer is None:
        found: Found | str = f"the twin has no word for {metric!r} of this configuration"
    else:
        found = _misstated(record) or _tried(answer, record)
    if isinstance(found, str):
        return Judged(name, kind, metric, unit, published, None, found)
    return Judged(name, kind, metric, unit, published, found)


def _misstated(record: Mapping[str, Any]) -> str:
    """The first size of a record that none can have, or ''."""
    for key in _SIZES:
        value = record.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value < _LARGEST:
            return f"the record misstates {key}: {str(value)[:20]}"
    return ""


def _tried(answer: Callable[[Mapping[str, Any]], Found | str], record: Mapping[str, Any]) -> Found | str:
    """What the twin answers, or why it does not: records are written by hand, and what is in them may be of any type."""
    try:
        found = answer(record)
    except EptwinError as error:
        return str(error).splitlines()[0]
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        return f"the record lacks or misstates {re.sub(r'[^a-zA-Z0-9_ .,:()-]', '', str(error))[:120]}"
    if isinstance(found, str) or (math.isfinite(found.high) and 0 < found.low <= found.value <= found.high):
        return found
    return "nothing is left of this part in this configuration, or its sizes are no sizes"


def summarise_records(records: list[Judged]) -> dict[str, Any]:
    """Errors by kind of record."""
    by_kind = {}
    for kind in sorted({r.kind for r in records}):
        chosen = [r for r in records if r.kind == kind]
        errors = sorted(abs(r.error) for r in chosen if r.error is not None)
        inside = [r.found.low <= r.published <= r.found.high for r in chosen if r.found is not None and r.published]
        by_kind[kind] = {"records": len(chosen), "answered": sum(r.found is not None for r in chosen),
                         "median_abs_error": errors[len(errors) // 2] if errors else None,
                         "worst_abs_error": errors[-1] if errors else None,
                         "interval_coverage": sum(inside) / len(inside) if inside else None}
    return {"records": len(records), "answered": sum(r.found is not None for r in records), "by_kind": by_kind,
            "layer_parts": _layer_parts(records), "overlap_gains": overlap_gains(records)}


def _layer_parts(records: list[Judged]) -> dict[str, Any]:
    """Errors of layer times by phase and part."""
    errors: dict[str, list[float]] = {}
    for record in records:
        if record.kind == "layer" and record.error is not None:
            phase, _, part = record.metric.partition("_layer_time_")
            errors.setdefault(f"{phase} {part}", []).append(record.error)
    return {name: {"records": len(found), "median_abs_error": sorted(map(abs, found))[len(found) // 2],
                   "worst_abs_error": max(map(abs, found)), "bias": sum(found) / len(found)}
            for name, found in sorted(errors.items())}
