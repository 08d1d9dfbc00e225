"""Load the words from files, presets and overrides; every mistake is a SpecError with file, line, field and hint."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from twin.spec.base import Spec
from twin.spec.cluster import ClusterSpec, GpuSpec
from twin.spec.errors import Problem, SpecError
from twin.spec.hf import model_from_hf_config
from twin.spec.model import ModelSpec
from twin.spec.parse import Document, parse_file, parse_yaml
from twin.spec.plan import Plan
from twin.spec.scenario import Scenario
from twin.spec.workload import WorkloadSpec

S = TypeVar("S", bound=Spec)
_COUNTED = re.compile(r"(.+)-(\d{1,4})x(\d{1,4})$")
_FILES = ("routing.file", "workload.arrivals.file", "model", "cluster")  # fields that may name a file
_SPEC_SUFFIXES = (".json", ".yaml", ".yml")
_PRESET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}$")


def load_scenario(source: str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """A scenario file, or the bare name of a shipped one. `overrides` are `path.to.field=value`."""
    document = _document(source, "scenarios", "scenario")
    data = _apply(document, overrides)
    base = Path(document.file).parent
    data = dict(data)
    for key, read in (("model", _model), ("cluster", _cluster)):
        if key in data:
            data[key] = read(data[key], document, base)
    if isinstance(data.get("workload"), dict):
        data["workload"] = _with_files(data["workload"], ("arrivals", "file"), base)
    data = _with_files(data, ("routing", "file"), base)
    if isinstance(data.get("model"), ModelSpec):
        for key in ("plan", "search"):
            data[key] = _with_native_precision(data.get(key), data["model"]) if key in data or key == "search" else None
    return validate(Scenario, {key: value for key, value in data.items() if value is not None}, document)


def load_model(source: str | Path) -> ModelSpec:
    """A model: a preset's name, a Hugging Face config.json, a checkpoint folder, or a ModelSpec file."""
    return _model(str(source), Document({}, {}, ""), Path())


def load_cluster(source: str | Path) -> ClusterSpec:
    """A cluster: a preset's name (`h200-4x8`: 4 nodes of 8) or a file."""
    return _cluster(str(source), Document({}, {}, ""), Path())


def load_plan(source: str | Path, model: ModelSpec | None = None) -> Plan:
    """A plan.json or plan.yaml, or the plan that a scenario states.

    A plan that states no precision takes the checkpoint's own when the `model` is known.
    """
    document = _document(source, "scenarios", "plan")
    if isinstance(document.data, dict) and "pools" not in document.data and "cluster" in document.data:
        plan = load_scenario(source).plan
        if plan is None:
            raise SpecError(
                "this scenario states no plan",
                file=document.file,
                field="plan",
                hint="`eptwin plan` finds one and writes plan.json",
            )
        return plan
    data = document.data if model is None else _with_native_precision(document.data, model)
    return validate(Plan, data, document)


def _with_native_precision(data: Any, model: ModelSpec) -> Any:
    """Fill a missing `precision` with the formats that the checkpoint stores; fp8 experts take fp8 dispatch."""
    if data is None:
        data = {}
    if not isinstance(data, Mapping) or "precision" in data:
        return data
    dispatch = "fp8" if model.expert_dtype in ("fp8", "fp8_block", "fp4") else "bf16"
    return {**data, "precision": {"weights": model.weight_dtype, "experts": model.expert_dtype, "dispatch": dispatch}}


def load_workload(source: str | Path) -> WorkloadSpec:
    """A workload file."""
    document = parse_file(Path(source))
    return validate(WorkloadSpec, _with_files(document.data, ("arrivals", "file"), Path(document.file).parent), document)


def presets(kind: str) -> list[str]:
    """Names of the shipped `models`, `clusters`, `gpus` or `scenarios`."""
    if kind == "models":
        return sorted(
            p.name.removesuffix(".json") for p in (_package("scenarios") / "models").iterdir() if p.name.endswith(".json")
        )
    if kind == "scenarios":
        return sorted(p.name.removesuffix(".yaml") for p in _package("scenarios").iterdir() if p.name.endswith(".yaml"))
    return sorted(_catalogue(kind))


def validate(cls: type[S], data: Any, document: Document, at: tuple[str | int, ...] = ()) -> S:
    """Validate plain data, turning every complaint into a Problem with its line."""
    if not isinstance(data, Mapping):
        raise SpecError(
            Problem(f"a {cls.__name__} must be a mapping of fields", line=document.line_of(at), expected="key: value lines"),
            file=document.file or None,
        )
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False)
        # A list whose entries are wrong counts as empty to pydantic: the entries' own problems say what is the matter.
        inside = {tuple(item["loc"][:end]) for item in found for end in range(len(item["loc"]))}
        found = [item for item in found if item["type"] != "too_short" or tuple(item["loc"]) not in inside]
        raise SpecError([_problem(cls, item, document, at) for item in found], file=document.file or None) from error
    except RecursionError as error:
        raise SpecError("is nested too deep", file=document.file or None) from error


def _problem(cls: type[BaseModel], item: Any, document: Document, at: tuple[str | int, ...]) -> Problem:
    loc = (*at, *item["loc"])
    kind, message = item["type"], item["msg"].removeprefix("Value error, ")
    field = ".".join(str(part) for part in loc)[:200]
    override = document.override_of(loc)
    line = None if override else document.line_of(loc)
    if kind == "extra_forbidden":
        known = list(_fields_at(cls, item["loc"][:-1]))
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else ("known fields: " + ", ".join(known[:30]) if known else "")
        return Problem("unknown field", field=field, line=line, hint=hint)
    if kind == "missing":
        return Problem("is missing", field=field, line=line)
    got = item.get("input")
    if isinstance(got, (str, int, float, bool)) and kind != "value_error":
        shown = repr(got)
        message += f", got {shown[:60]}{'…' if len(shown) > 60 else ''}"
    return Problem(message, field=field, line=line, hint=f"it comes from --set {override[:120]}" if override else "")


def _fields_at(cls: Any, loc: Sequence[str | int]) -> Sequence[str]:
    """Field names of the spec class that a location leads to."""
    current = cls
    for part in loc:
        if isinstance(part, int):
            continue
        fields = getattr(current, "model_fields", {})
        if part not in fields:
            return ()
        current = _spec_inside(fields[part].annotation)
        if current is None:
            return ()
    return list(getattr(current, "model_fields", {}))


def _spec_inside(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _spec_inside(argument)
        if found is not None:
            return found
    return None


def _package(name: str) -> Any:
    return resources.files(name)


@lru_cache(maxsize=8)
def _catalogue(kind: str) -> dict[str, Any]:
    """A shipped catalogue, read once: whoever loads many scenarios asks for the same few. Nobody writes into it."""
    resource = _package("topologies") / f"{kind}.yaml"
    data = parse_yaml(resource.read_text(encoding="utf-8"), f"topologies/{kind}.yaml").data
    assert isinstance(data, dict)
    return data


def _document(source: str | Path, package: str, what: str) -> Document:
    """A file's document, or a shipped preset's when `source` is a bare name."""
    text = str(source)
    if len(text) > 4096 or "\x00" in text:
        raise SpecError(f"not a usable {what} path")
    path = Path(text)
    if path.suffix == "" and "/" not in text and _PRESET_NAME.match(text) and not path.exists():
        resource = _package(package) / f"{text}.yaml"
        if resource.is_file():
            return parse_yaml(resource.read_text(encoding="utf-8"), str(resource))
        names = presets("scenarios")
        close = difflib.get_close_matches(text, names, n=1)
        raise SpecError(
            f"no {what} file or preset named {text!r}",
            hint=f"did you mean {close[0]!r}?" if close else "presets: " + ", ".join(names),
        )
    return parse_file(path)


def _is(path: Path, kind: Callable[[Path], bool]) -> bool:
    """Whether a path is a file or a folder; a name that no file can have is neither."""
    try:
        return kind(path)
    except OSError:
        return False


def _resolve(value: str, kind: str, document: Document, field: str, names: Callable[[], list[str]]) -> SpecError:
    close = difflib.get_close_matches(value, names(), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"presets: {', '.join(names())}; or a path"
    line = None if document.override_of((field,)) else document.line_of((field,))
    return SpecError(
        Problem(f"no {kind} preset or file {value[:80]!r}", field=field, line=line, hint=hint),
        file=document.file or None,
    )


def _model(value: Any, document: Document, base: Path) -> ModelSpec:
    if isinstance(value, ModelSpec):
        return value
    if isinstance(value, str):
        if _PRESET_NAME.match(value):
            resource = _package("scenarios") / "models" / f"{value}.json"
            if resource.is_file():
                return model_from_hf_config(json.loads(resource.read_text(encoding="utf-8")), value, file=f"models/{value}.json")
        path = base / value if len(value) < 4096 and "\x00" not in value else Path("?")
        if _is(path, Path.is_dir):
            path = path / "config.json"
        if not _is(path, Path.is_file) or path.suffix not in _SPEC_SUFFIXES:
            raise _resolve(value, "model", document, "model", lambda: presets("models"))
        inner = parse_file(path)
        return _model_from(inner.data, inner, path.parent.name if path.name == "config.json" else path.stem, ())
    return _model_from(value, document, "model", ("model",))


def _model_from(data: Any, document: Document, name: str, at: tuple[str | int, ...]) -> ModelSpec:
    if isinstance(data, Mapping) and ("num_hidden_layers" in data or "text_config" in data or "architectures" in data):
        return model_from_hf_config(data, str(data.get("_name_or_path") or name) or name, file=document.file or None)
    return validate(ModelSpec, data, document, at)


def _cluster(value: Any, document: Document, base: Path) -> ClusterSpec:
    if isinstance(value, ClusterSpec):
        return value
    if isinstance(value, str):
        found = _cluster_preset(value)
        if found is not None:
            return validate(ClusterSpec, _with_gpus(found, document), Document({}, {}, f"topologies/clusters.yaml ({value})"))
        path = base / value if len(value) < 4096 and "\x00" not in value else Path("?")
        if not _is(path, Path.is_file) or path.suffix not in _SPEC_SUFFIXES:
            raise _resolve(value, "cluster", document, "cluster", lambda: presets("clusters"))
        inner = parse_file(path)
        return validate(ClusterSpec, _with_gpus(inner.data, inner), inner)
    return validate(ClusterSpec, _with_gpus(value, document), document, ("cluster",))


def _cluster_preset(name: str) -> dict[str, Any] | None:
    """A preset by its name, or `BASE-NxG`: the preset BASE with N nodes of G GPUs."""
    catalogue = _catalogue("clusters")
    if name in catalogue:
        return {"name": name, **catalogue[name]}
    match = _COUNTED.match(name)
    if match and match[1] in catalogue:
        base = catalogue[match[1]]
        group = {**base["groups"][0], "nodes": int(match[2]), "gpus_per_node": int(match[3])}
        return {**base, "name": name, "groups": (group,)}
    return None


def _with_gpus(data: Any, document: Document) -> Any:
    """Replace `gpu: NAME` in node groups by the catalogue's numbers; a `gpu: {preset: NAME, ...}` changes some of them."""
    if not isinstance(data, Mapping) or not isinstance(data.get("groups"), tuple):
        return data
    catalogue = _catalogue("gpus")
    groups = []
    for index, given in enumerate(data["groups"]):
        group = given
        gpu = group.get("gpu") if isinstance(group, Mapping) else None
        name = gpu if isinstance(gpu, str) else gpu.get("preset") if isinstance(gpu, Mapping) else None
        if isinstance(name, str):
            if name not in catalogue:
                close = difflib.get_close_matches(name, list(catalogue), n=1)
                raise SpecError(
                    Problem(
                        f"no GPU preset {name[:60]!r}",
                        field=f"groups.{index}.gpu",
                        line=document.line_of(("cluster", "groups", index, "gpu")),
                        hint=f"did you mean {close[0]!r}?" if close else "presets: " + ", ".join(sorted(catalogue)),
                    ),
                    file=document.file or None,
                )
            changes = {k: v for k, v in gpu.items() if k != "preset"} if isinstance(gpu, Mapping) else {}
            group = {**group, "gpu": {"name": name, **catalogue[name], **changes}}
        groups.append(group)
    return {**data, "groups": tuple(groups)}


def load_gpu(name: str) -> GpuSpec:
    """A GPU of the catalogue."""
    catalogue = _catalogue("gpus")
    if name not in catalogue:
        raise SpecError(f"no GPU preset {name[:60]!r}", hint="presets: " + ", ".join(sorted(catalogue)))
    return validate(GpuSpec, {"name": name, **catalogue[name]}, Document({}, {}, "topologies/gpus.yaml"))


def _with_files(data: Any, path: tuple[str, str], base: Path) -> Any:
    """Make a file named relative to its document absolute, so that a resolved copy means the same elsewhere."""
    outer, inner = path
    if not isinstance(data, Mapping) or not isinstance(data.get(outer), Mapping):
        return data
    value = data[outer].get(inner)
    if not isinstance(value, str) or not value or "\x00" in value or len(value) > 4096:
        return data
    return {**data, outer: {**data[outer], inner: str((base / value).resolve())}}


def _apply(document: Document, overrides: Sequence[str]) -> Any:
    """Set `path.to.field=value` (value in YAML) in a copy of the document's data."""
    data = document.data
    if not isinstance(data, dict):
        return validate(Scenario, data, document) if overrides == () else data
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator or not name:
            raise SpecError(f"cannot read override {override[:80]!r}", expected="path.to.field=value")
        value = _from_here(name, parse_yaml(text, "--set").data)
        data = _set(data, name.split("."), value, override)
        document.changed[tuple(name.split("."))] = override
    return data


def _from_here(name: str, value: Any) -> Any:
    """An override's value; files that it names are looked for from the current folder, where a command line is written."""
    if name in ("routing", "workload.arrivals") and isinstance(value, dict) and "file" in value:
        return {**value, "file": _from_here(f"{name}.file", value["file"])}
    if name not in _FILES or not isinstance(value, str) or not value or "\x00" in value:
        return value
    plain = name in ("model", "cluster") and _PRESET_NAME.match(value) and Path(value).suffix not in _SPEC_SUFFIXES
    try:
        return value if plain or not Path(value).exists() else str(Path(value).resolve())
    except OSError:  # a name too long: said later, with its field
        return value


def _set(data: Any, path: list[str], value: Any, override: str) -> Any:
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(data, tuple):
        if not head.isdigit() or int(head) >= len(data):
            raise SpecError(f"override {override[:80]!r} names no entry {head!r}", expected=f"0 to {len(data) - 1}")
        index = int(head)
        return (*data[:index], _set(data[index], rest, value, override), *data[index + 1 :])
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise SpecError(f"override {override[:80]!r} goes through a value that is not a mapping at {head!r}")
    return {**data, head: _set(data.get(head), rest, value, override)}
