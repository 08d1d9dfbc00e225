"""Import the operator tables that the aiconfigurator-core wheel carries (extra `[silicon]`) as engine profiles.

The wheel lies in `aiconfigurator_core/systems`: `<system>.yaml` has a GPU's peaks, `data/<system>/<family>/<framework>/
<version>/<file>_perf.parquet` the measurements. Their units differ from table to table; `_READERS` says what each
column means. Rows of several kernels are merged where an engine runs one kernel a shape, and kept apart (attribute
`kernel`) where the same shape was measured with more than one.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ruamel.yaml import YAML

from twin.cost.profile import GpuPeaks, Profile, Source, Table, normal_window
from twin.spec.errors import SpecError

SYSTEMS = {"a100_sxm": "a100", "h100_sxm": "h100", "h200_sxm": "h200", "b200_sxm": "b200", "b300_sxm": "b300",
           "gb200": "gb200"}
ENGINES = ("vllm", "sglang", "trtllm")
ATTRIBUTION = "Copyright (c) 2025-2026 NVIDIA CORPORATION & AFFILIATES; measured tables of aiconfigurator-core"
_DUPLICATES_KEPT_APART = 0.01  # more repeated shapes than this: two kernels were measured on purpose

_DTYPES = {"bfloat16": "bf16", "half": "fp16", "nvfp4": "fp4", "int4_wo": "int4", "w4a16_mxfp4": "mxfp4",
           "w4a8_mxfp4_mxfp8": "mxfp4_mxfp8"}  # the others have the same name here
_NOT_GATED = 22, (2688, 1856)  # Nemotron's experts (top 22, or this size) have two matrices, all others three

Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class _Reader:
    """How one Parquet file becomes tables: our name -> its column; `value` gives seconds from the columns."""

    file: str
    operator: str
    axes: Mapping[str, str]
    value: Callable[[Columns], npt.NDArray[Any]]
    shape: Mapping[str, str] = field(default_factory=dict)
    attrs: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)
    keep: Callable[[Columns], npt.NDArray[Any]] | None = None
    older_too: bool = False


def _ms(c: Columns) -> npt.NDArray[Any]:
    return c["latency"] * 1e-3


def _us(*names: str) -> Callable[[Columns], npt.NDArray[Any]]:
    return lambda c: np.sum([c[name] for name in names], axis=0) * 1e-6


def _rows(**wanted: str) -> Callable[[Columns], npt.NDArray[Any]]:
    return lambda c: np.logical_and.reduce([c[name] == value for name, value in wanted.items()])


_GQA = {"heads": "num_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "window": "window_size"}
_MOE = {"hidden": "hidden_size", "intermediate": "inter_size", "top_k": "topk", "experts": "num_experts",
        "moe_tp": "moe_tp_size", "moe_ep": "moe_ep_size"}
_DEEPEP = {"hidden": "hidden_size", "top_k": "num_topk", "experts": "num_experts", "ep": "ep", "nodes": "node_num"}
_A2A = {"hidden": "hidden_size", "top_k": "topk", "experts": "num_experts", "ep": "ep_size", "nodes": "node_num"}
_MLA = {"dtype": "mla_dtype", "kv_dtype": "kv_cache_dtype"}


def _readers() -> tuple[_Reader, ...]:
    kv = {"dtype": "attn_dtype", "kv_dtype": "kv_cache_dtype"}
    module = {**_MLA, "gemm_dtype": "gemm_type"}
    prefill, decode = {"batch": "batch_size", "new_tokens": "isl"}, {"batch": "batch_size", "context": "context"}
    heads = {"heads": "num_heads"}
    readers = [
        _Reader("gemm_perf", "gemm", {"m": "m", "n": "n", "k": "k"}, _ms, attrs={"dtype": "gemm_dtype"}),
        _Reader("context_attention_perf", "attention_prefill", prefill, _ms, _GQA, kv),
        _Reader("generation_attention_perf", "attention_decode", decode, _ms, _GQA, kv),
        _Reader("context_mla_perf", "mla_prefill", {**prefill, **heads}, _ms, {}, _MLA, {"scope": "kernel"}),
        _Reader("generation_mla_perf", "mla_decode", {**decode, **heads}, _ms, {}, _MLA, {"scope": "kernel"}),
        _Reader("mla_context_module_perf", "mla_prefill", {**prefill, **heads}, _ms, {}, module, {"scope": "module"}),
        _Reader("mla_generation_module_perf", "mla_decode", {**decode, **heads}, _ms, {}, module, {"scope": "module"}),
        _Reader("wideep_context_mla_perf", "mla_prefill", {**prefill, **heads}, _ms, {}, module,
                {"scope": "module", "layout": "deepep"}),
        _Reader("wideep_generation_mla_perf", "mla_decode", {**decode, **heads}, _ms, {}, module,
                {"scope": "module", "layout": "deepep"}),
        _Reader("mla_bmm_perf", "mla_bmm", {"tokens": "num_tokens", **heads}, _ms, {},
                {"dtype": "bmm_dtype", "side": "side"}),
    ]
    moe = {"dtype": "moe_dtype", "distribution": "distribution", "gated": "gated"}
    for file, layout, shape in (("moe_perf", "fused", _MOE), ("wideep_context_moe_perf", "deepep_normal", _MOE),
                                ("wideep_generation_moe_perf", "deepep_low_latency", _MOE),
                                ("wideep_moe_perf", "alltoall", {**_MOE, "slots": "num_slots"})):
        readers.append(_Reader(file, "moe", {"tokens": "num_tokens"}, _ms, shape, moe, {"layout": layout}))
    for phase, dtype in (("dispatch", "fp8"), ("combine", "bf16")):  # what DeepEP's own tests send
        readers += [
            _Reader("wideep_deepep_ll_perf", phase, {"tokens": "num_token"}, _us(f"{phase}_avg_t_us"), _DEEPEP, {},
                    {"mode": "low_latency", "backend": "deepep", "dtype": dtype}, older_too=True),
            _Reader("wideep_deepep_normal_perf", phase, {"tokens": "num_token"},
                    _us(f"{phase}_transmit_us", f"{phase}_notify_us"), {**_DEEPEP, "sms": f"{phase}_sms"}, {},
                    {"mode": "normal", "backend": "deepep", "dtype": dtype}, older_too=True),
            _Reader("moe_a2a_perf", phase, {"tokens": "num_tokens"}, _us("latency"), {**_A2A, "sms": "sms"},
                    {"backend": "backend", "mode": "mode", "dtype": "comm_dtype"}, keep=_rows(phase=phase)),
        ]
    readers += [
        _Reader("custom_allreduce_perf", "all_reduce", {"gpus": "num_gpus", "bytes": "bytes"}, _ms, {},
                {"launch": "launch"}, {"backend": "engine"}),
        *(_Reader("nccl_perf", ours, {"gpus": "num_gpus", "bytes": "bytes"}, _ms, {}, {}, {"backend": "nccl"},
                  keep=_rows(op_name=theirs, nccl_dtype="half"))
          for ours, theirs in (("all_reduce", "all_reduce"), ("all_gather", "all_gather"),
                               ("reduce_scatter", "reduce_scatter"), ("all_to_all", "alltoall"))),
    ]
    return tuple(readers)


def default_root() -> Path:
    """The `systems` folder of the installed wheel. Raises SpecError where the extra is missing."""
    found = importlib.util.find_spec("aiconfigurator_core")
    if found is None or not found.submodule_search_locations:
        raise SpecError("aiconfigurator-core is not installed", hint="pip install 'eptwin[silicon]'")
    return Path(next(iter(found.submodule_search_locations))) / "systems"


def import_silicon(root: Path, systems: Sequence[str] = tuple(SYSTEMS), engines: Sequence[str] = ENGINES,
                   version: str | None = None) -> list[Profile]:
    """One profile for each (system, engine) that was measured; `version` None takes the newest whole collection.

    A file that lacks that version is taken from the newest older one. Raises SpecError for an unknown system or engine.
    """
    profiles = []
    for system in systems:
        if system not in SYSTEMS or not (root / "data" / system).is_dir():
            raise SpecError(f"no measured tables for system {system[:40]!r}", field="system", expected=", ".join(SYSTEMS))
        peaks, gpus_a_node = _peaks(root / f"{system}.yaml")
        for engine in engines:
            if engine not in ENGINES:
                raise SpecError(f"no measured tables for engine {engine[:40]!r}", field="engine", expected=", ".join(ENGINES))
            profile = _import_engine(root / "data" / system, engine, version, peaks, gpus_a_node)
            if profile is not None:
                profiles.append(profile)
    return profiles


def _import_engine(data: Path, engine: str, version: str | None, peaks: GpuPeaks, gpus_a_node: int) -> Profile | None:
    current = version or max((p.parent.name for p in data.glob(f"gemm/{engine}/*/gemm_perf.parquet")),
                             key=_version_key, default=None)
    if current is None:
        return None
    tables: list[Table] = []
    for reader in _readers():
        folder = "nccl" if reader.file == "nccl_perf" else engine
        paths = _versions(data.glob(f"*/{folder}/*/{reader.file}.parquet"), None if folder == "nccl" else current)
        for older, path in enumerate(paths if reader.older_too else paths[:1]):
            tables += _read(path, reader, gpus_a_node, only_multi_node=older > 0)
    if not tables:
        return None
    wheel = Source(name="aiconfigurator-core", version=_wheel_version(), license="Apache-2.0", attribution=ATTRIBUTION)
    tables = [t.model_copy(update={"host_bound": True}) if _host_bound(t, peaks) else t for t in tables]
    return Profile(gpu=SYSTEMS[data.name], engine=engine, engine_version=current, peaks=peaks, sources=(wheel,),
                   provenance={"tables": "imported by twin.cost.silicon", "system": data.name}, tables=tuple(tables))


def _host_bound(table: Table, peaks: GpuPeaks) -> bool:
    """Whether calls that need next to no work take far longer than any GPU needs to launch them: 40 us for a product,
    80 us for a whole attention module. Such a table was measured without CUDA graphs."""
    limit_s = {"gemm": 40e-6, "mla_decode": 80e-6, "mla_prefill": 80e-6}.get(table.operator)
    if limit_s is None:
        return False
    grid = table.grid(0)
    small = peaks.roofline_s(table.operator, table.values(0), table.attrs) < limit_s / 8
    seconds = grid[small & ~np.isnan(grid)]
    return bool(seconds.size and np.median(seconds) > limit_s)


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))


def _versions(paths: Iterable[Path], current: str | None) -> list[Path]:
    """Paths by version, newest first, none newer than `current` (unless there are only newer ones)."""
    ordered = sorted(paths, key=lambda p: (_version_key(p.parent.name), p.parent.name), reverse=True)
    old_enough = [p for p in ordered if current is None or _version_key(p.parent.name) <= _version_key(current)]
    return old_enough or ordered


def _wheel_version() -> str:
    from importlib.metadata import PackageNotFoundError, version
    try:
        return version("aiconfigurator-core")
    except PackageNotFoundError:
        return "unknown"


def _peaks(path: Path) -> tuple[GpuPeaks, int]:
    spec = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    gpu, node = spec["gpu"], spec["node"]
    peaks = GpuPeaks(bf16_flop_per_s=gpu["bfloat16_tc_flops"], fp8_flop_per_s=gpu.get("fp8_tc_flops"),
                     fp4_flop_per_s=gpu.get("fp4_tc_flops"), hbm_bytes_per_s=gpu["mem_bw"],
                     nvlink_bytes_per_s=node["intra_node_bw"], nic_bytes_per_s=node["inter_node_bw"])
    return peaks, int(node["num_gpus_per_node"])


def _read(path: Path, reader: _Reader, gpus_a_node: int, only_multi_node: bool) -> list[Table]:
    """Tables of one file. Of an older DeepEP collection only what newer ones lack is wanted: runs over several nodes."""
    columns = _derived(_columns(path), gpus_a_node)
    wanted = np.ones(len(columns["device"]), dtype=bool) if reader.keep is None else reader.keep(columns)
    if only_multi_node:
        wanted &= columns["node_num"] > 1
    columns = {name: values[wanted] for name, values in columns.items()}
    attrs = {ours: theirs for ours, theirs in reader.attrs.items() if theirs in columns}
    numbers = {**reader.shape, **reader.axes}
    if not wanted.any() or any(theirs not in columns for theirs in numbers.values()):
        return []
    seconds = reader.value(columns)
    keys = [columns[name] for name in (*attrs.values(), *numbers.values())]
    if _repeated(keys) > _DUPLICATES_KEPT_APART and _repeated([*keys, columns["kernel_source"]]) < _repeated(keys):
        attrs["kernel"] = "kernel_source"
    source = f"measured:aiconfigurator-core {path.parts[-3]} {path.parts[-2]}"
    tables = []
    for labels, rows in _groups({ours: columns[theirs] for ours, theirs in attrs.items()}, len(seconds)):
        fixed = {**reader.fixed, **labels}
        part = {name: values[rows] for name, values in columns.items()}
        tables.append(_table(reader, fixed, part, seconds[rows], source + _foreign(path, part)))
    return tables


def _foreign(path: Path, columns: Columns) -> str:
    """The DeepEP runs over several nodes that lie under h200_sxm are those of h100_sxm, byte for byte."""
    if "node_num" in columns and columns["node_num"].max() > 1 and "h200_sxm" in path.parts:
        return " (nodes > 1 measured on H100)"
    return ""


def _columns(path: Path) -> Columns:
    import pyarrow.parquet as pq
    table = pq.read_table(path)
    return {name: np.asarray(table[name].to_pylist()) for name in table.column_names}


def _derived(c: Columns, gpus_a_node: int) -> Columns:
    """Columns that the files spell in their own ways, under one name and in base units."""
    c = dict(c)
    c.setdefault("kernel_source", np.full(len(c["device"]), "default"))
    if "window_size" in c:
        c["window_size"] = np.array([normal_window(w) for w in c["window_size"].tolist()])
    if "step" in c and "isl" in c:
        # A kernel row attends to step + isl keys; module and wide-EP rows name the KV length itself.
        c["context"] = np.where(c["step"] == 0, c["isl"], np.where(c["step"] % 2 == 1, c["step"] + c["isl"], c["step"]))
    if "message_size" in c:
        c["bytes"] = c["message_size"] * 2  # elements of bf16 / half
        c["launch"] = np.array(["graph" if "graph" in b else "eager" for b in c["backend"].tolist()]) \
            if "backend" in c else np.full(len(c["device"]), "graph")
    if "moe_dtype" in c:
        top_k, size = _NOT_GATED
        two = (c["topk"] == top_k) | ((c["hidden_size"] == size[0]) & (c["inter_size"] == size[1]))
        c["gated"] = np.where(two, "no", "yes")
    for name in ("gemm_dtype", "moe_dtype", "attn_dtype", "mla_dtype", "kv_cache_dtype", "gemm_type", "bmm_dtype", "comm_dtype"):
        if name in c:
            c[name] = np.array([_DTYPES.get(d, d) for d in c[name].tolist()])
    if c["op_name"][0].startswith("mla_gen_p"):
        c["side"] = np.array([name.removeprefix("mla_gen_") for name in c["op_name"].tolist()])
    if "comm_backend" in c:
        c["mode"] = np.array(["low_latency" if b.endswith("_ll") else "normal" for b in c["comm_backend"].tolist()])
        c["backend"] = np.array([re.sub("_(ll|ht)$", "", b) for b in c["comm_backend"].tolist()])
    if "node_num" in c:
        c["ep"] = c["node_num"] * gpus_a_node
    return c


def _repeated(keys: Sequence[npt.NDArray[Any]]) -> float:
    """The share of rows whose key another row has too."""
    codes = np.stack([np.unique(key, return_inverse=True)[1] for key in keys], axis=1)
    return 1.0 - len(np.unique(codes, axis=0)) / len(codes)


def _groups(labels: Columns, n_rows: int) -> list[tuple[dict[str, str], npt.NDArray[Any]]]:
    """Row numbers for every combination of labels that occurs, in sorted order."""
    if not labels:
        return [({}, np.arange(n_rows))]
    names = list(labels)
    rows: dict[tuple[str, ...], list[int]] = {}
    for i, key in enumerate(zip(*(labels[name].tolist() for name in names), strict=True)):
        rows.setdefault(tuple(map(str, key)), []).append(i)
    return [(dict(zip(names, key, strict=True)), np.array(rows[key])) for key in sorted(rows)]


def _table(reader: _Reader, attrs: dict[str, str], c: Columns, seconds: npt.NDArray[Any], source: str) -> Table:
    """Scatter rows into sheets of a dense grid; of repeated points the fastest counts (the engine's tuner takes it)."""
    levels = {ours: np.unique(c[theirs]) for ours, theirs in reader.axes.items()}
    places = [np.searchsorted(levels[ours], c[theirs]) for ours, theirs in reader.axes.items()]
    shapes = np.stack([c[theirs] for theirs in reader.shape.values()], axis=1) if reader.shape else np.zeros((len(seconds), 0))
    sheets, sheet_of = np.unique(shapes, axis=0, return_inverse=True)
    grid = np.full((len(sheets), *(len(v) for v in levels.values())), np.inf)
    np.minimum.at(grid, (sheet_of.reshape(-1), *places), seconds)
    rows = grid.reshape(len(sheets), -1)
    return Table(operator=reader.operator, attrs=attrs, shape=tuple(reader.shape),
                 sheets=tuple(tuple(map(float, s)) for s in sheets.tolist()),
                 axes={name: tuple(map(float, v.tolist())) for name, v in levels.items()},
                 seconds=tuple(tuple(s if np.isfinite(s) else None for s in row) for row in rows.tolist()),
                 source=source)
