"""Engine profiles: measured seconds of operators on one (GPU, engine, version), as one JSON file.

A table holds sheets. A sheet is one shape that was measured (say 64 query heads over 8 KV heads), given by the numbers
under `shape`; within it, seconds lie on the grid that `axes` spans, in C order, null where nothing was measured.
Sheets are scattered, axes are a grid: that is how benchmarks are run, and it keeps the files small.

A row of seconds is a list of numbers, or, as `dump_profile` writes it, a string with two characters a point: the
logarithm in steps of 0.37%. The same tables give the same bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from twin.cost.work import NO_WINDOW, OPERATORS, Attrs, Values, work_of
from twin.spec.base import Spec
from twin.spec.cluster import GpuSpec, NetworkSpec
from twin.spec.errors import Problem, SpecError
from twin.spec.rundir import write_text

MAX_FILE_BYTES = 64 << 20
Array = npt.NDArray[np.float64]
Positive = Annotated[float, Field(gt=0, le=1e20)]


# Packed seconds: log(seconds / 10 ns) / _STEP + 1 in base 91, high digit first; 0 is null. Printable, no quote, no backslash.
_ALPHABET = "".join(chr(c) for c in range(35, 127) if c != 92)
_LEAST_S, _STEP = 1e-8, math.log(1e13) / (91 * 91 - 2)
_DIGIT = np.full(128, -1)
_DIGIT[[ord(c) for c in _ALPHABET]] = range(91)


def pack(row: Iterable[float | None]) -> str:
    """Seconds (10 ns to 1e5 s; None: not measured) as two characters each, true to 0.2%."""
    codes = (0 if s is None else round(math.log(s / _LEAST_S) / _STEP) + 1 for s in row)
    return "".join(_ALPHABET[c // 91] + _ALPHABET[c % 91] for c in codes)


def unpack(text: str) -> tuple[float | None, ...]:
    """The reverse of `pack`. Raises ValueError for what it never writes."""
    if len(text) % 2 or not text.isascii():
        raise ValueError("packed seconds have two characters a point")
    digits = _DIGIT[np.frombuffer(text.encode(), dtype=np.uint8)].reshape(-1, 2)
    if (digits < 0).any():
        raise ValueError("packed seconds hold a character that never stands in them")
    codes = digits[:, 0] * 91 + digits[:, 1]
    seconds = _LEAST_S * np.exp((codes - 1) * _STEP)
    return tuple(None if c == 0 else s for c, s in zip(codes.tolist(), seconds.tolist(), strict=True))


def _unpacked(rows: Any) -> Any:
    if not isinstance(rows, list | tuple):
        return rows
    return tuple(unpack(row) if isinstance(row, str) else tuple(row) if isinstance(row, list) else row for row in rows)


class GpuPeaks(Spec):
    """The rates that rooflines are drawn with: dense tensor-core flops, HBM, NVLink and NIC per GPU and direction."""

    bf16_flop_per_s: Positive
    fp8_flop_per_s: Positive | None = None
    fp4_flop_per_s: Positive | None = None
    hbm_bytes_per_s: Positive
    nvlink_bytes_per_s: Positive
    nic_bytes_per_s: Positive

    @classmethod
    def of(cls, gpu: GpuSpec, network: NetworkSpec) -> GpuPeaks:
        """The peaks of a GPU in a cluster; without NICs, NVLink's rate stands in (nothing crosses it)."""
        return cls(bf16_flop_per_s=gpu.bf16_flop_per_s, fp8_flop_per_s=gpu.fp8_flop_per_s,
                   fp4_flop_per_s=gpu.fp4_flop_per_s, hbm_bytes_per_s=gpu.hbm_bytes_per_s,
                   nvlink_bytes_per_s=network.nvlink_bytes_per_s,
                   nic_bytes_per_s=network.nic_bytes_per_s or network.nvlink_bytes_per_s)

    def flop_per_s(self, rate: str) -> float:
        """Peak of a format; a GPU without it computes in the next wider one that it has."""
        narrow = {"fp4": (self.fp4_flop_per_s, self.fp8_flop_per_s), "fp8": (self.fp8_flop_per_s,)}.get(rate, ())
        return next((peak for peak in narrow if peak is not None), self.bf16_flop_per_s)

    def roofline_s(self, operator: str, values: Values, attrs: Attrs) -> Array:
        """The least seconds one call can take here: the largest of its compute, HBM, NVLink and NIC times."""
        work = work_of(operator, values, attrs)
        compute_s = np.maximum(work.flops / self.flop_per_s(work.rate), work.hbm_bytes / self.hbm_bytes_per_s)
        wire_s = np.maximum(work.link_bytes / self.nvlink_bytes_per_s, work.nic_bytes / self.nic_bytes_per_s)
        return np.asarray(np.maximum(compute_s, wire_s), dtype=float)


class Table(Spec):
    """Measured seconds of one operator under fixed attributes.

    `spread` is the half width of an 80% interval, as a fraction of the seconds, for a point between grid points
    (from leaving points out); null when it was not studied. `source` says where the points came from. `host_bound` says
    that the host launched kernels more slowly than they ran: inside a CUDA graph its small points are far too slow.
    """

    operator: str
    attrs: dict[str, str] = {}
    shape: tuple[str, ...] = ()
    sheets: tuple[tuple[float, ...], ...] = ((),)
    axes: dict[str, tuple[Annotated[float, Field(ge=0)], ...]]
    seconds: Annotated[tuple[tuple[Annotated[float, Field(ge=1e-8, lt=1e5)] | None, ...], ...], BeforeValidator(_unpacked)]
    spread: Annotated[float, Field(ge=0, le=10)] | None = None
    source: str = "measured"
    host_bound: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Table:
        if self.operator not in OPERATORS:
            raise ValueError(f"operator {self.operator[:40]!r} is not one of {', '.join(OPERATORS)}")
        size = math.prod(len(levels) for levels in self.axes.values())
        if not self.axes or size == 0:
            raise ValueError("a table needs at least one axis with levels")
        if any(list(levels) != sorted(set(levels)) for levels in self.axes.values()):
            raise ValueError("axis levels must rise strictly")
        if len(self.seconds) != len(self.sheets):
            raise ValueError(f"{len(self.sheets)} sheets but {len(self.seconds)} rows of seconds")
        if len(set(self.sheets)) != len(self.sheets):
            raise ValueError("two sheets have the same shape")
        if any(len(sheet) != len(self.shape) for sheet in self.sheets):
            raise ValueError("every sheet needs one number for each name in `shape`")
        if any(len(row) != size for row in self.seconds):
            raise ValueError(f"every sheet needs {size} seconds, one for each grid point (null where not measured)")
        if any(all(s is None for s in row) for row in self.seconds):
            raise ValueError("a sheet without any measured point")
        return self

    @cached_property
    def log_sheets(self) -> Array:
        """log2 of the sheets' numbers [sheets, names]."""
        return np.asarray(np.log2(np.maximum(np.array(self.sheets, dtype=float).reshape(len(self.sheets), -1), 1e-3)))

    @cached_property
    def least_s(self) -> float:
        """The smallest seconds: about what a launch takes."""
        return min(s for row in self.seconds for s in row if s is not None)

    def grid(self, sheet: int) -> Array:
        """Seconds of one sheet, shaped as the axes are; nan where nothing was measured."""
        row = np.array([math.nan if s is None else s for s in self.seconds[sheet]])
        return row.reshape([len(levels) for levels in self.axes.values()])

    def values(self, sheet: int) -> dict[str, Array]:
        """The coordinates of every grid point of a sheet, broadcastable to `grid(sheet)`."""
        mesh = np.meshgrid(*(np.array(levels) for levels in self.axes.values()), indexing="ij", sparse=True)
        shape = {name: np.asarray(number) for name, number in zip(self.shape, self.sheets[sheet], strict=True)}
        return {**shape, **dict(zip(self.axes, mesh, strict=True))}

    @property
    def n_points(self) -> int:
        return sum(s is not None for row in self.seconds for s in row)


class Source(Spec):
    """Where tables come from: a name and version, its licence, and who is to be credited."""

    name: str
    version: str = ""
    license: str = ""
    attribution: str = ""


class Profile(Spec):
    """The measured tables of one engine version on one GPU kind, and the peaks their rooflines are drawn with."""

    format: Literal["eptwin-profile-1"] = "eptwin-profile-1"
    gpu: str
    engine: str
    engine_version: str
    peaks: GpuPeaks
    sources: tuple[Source, ...]
    provenance: dict[str, str] = {}
    tables: tuple[Table, ...]

    @property
    def id(self) -> str:
        return f"{self.gpu}/{self.engine}/{self.engine_version}"


@dataclass(frozen=True)
class ProfileStore:
    """Profiles to look points up in; the order is that of their ids, so that ties break the same everywhere."""

    profiles: tuple[Profile, ...]

    def __iter__(self) -> Iterator[Profile]:
        return iter(self.profiles)


def load_profile(path: Path) -> Profile:
    """Read one profile file. Raises SpecError naming the field where the file is not one."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise SpecError("too large for a profile", file=path, expected=f"at most {MAX_FILE_BYTES} bytes")
        return Profile.model_validate_json(path.read_bytes())
    except OSError as err:
        raise SpecError(f"cannot read: {err.strerror}", file=path) from None
    except ValidationError as err:
        problems = [Problem(e["msg"], field=".".join(map(str, e["loc"]))) for e in err.errors(include_url=False)]
        raise SpecError(problems, file=path) from None


def load_store(folder: Path | None = None, gpus: Iterable[str] | None = None) -> ProfileStore:
    """The profiles of a folder (those that ship, without one), or only those of some kinds of GPU.

    Files are named `<gpu>-<engine>.json`. Where none is of those kinds, all are loaded: something to transfer from.
    """
    folder = folder or Path(__file__).parent / "profiles"
    paths = sorted(folder.glob("*-*.json"))
    keys = {gpu_key(gpu) for gpu in gpus or ()}
    chosen = [p for p in paths if p.name.split("-")[0] in keys] or paths
    return ProfileStore(tuple(sorted((load_profile(p) for p in chosen), key=lambda p: p.id)))


def dump_profile(profile: Profile, path: Path) -> None:
    """Write a profile whole, deterministically, true to 0.2% a point."""
    head = profile.model_dump(mode="json", exclude={"tables"})
    tables = sorted(profile.tables, key=lambda t: (t.operator, sorted(t.attrs.items())))
    lines = ",\n".join(_table_json(table) for table in tables)
    text = json.dumps(head, sort_keys=True, indent=1)[:-2] + f',\n "tables": [\n{lines}\n]}}\n'
    write_text(path, text)


def _table_json(table: Table) -> str:
    head = table.model_dump(mode="json", exclude={"seconds", "axes", "sheets"})
    head["axes"] = {name: [_short(x) for x in levels] for name, levels in table.axes.items()}
    head["sheets"] = [[_short(x) for x in sheet] for sheet in table.sheets]
    head["attrs"] = dict(sorted(table.attrs.items()))
    head["seconds"] = [pack(row) for row in table.seconds]
    return json.dumps(head, separators=(",", ":"))


def _short(x: float) -> float | int:
    return int(x) if float(x).is_integer() else x


def normal_window(window: float) -> float:
    """How tables write a window: NO_WINDOW where attention sees everything."""
    return float(window) if 0 < window < NO_WINDOW else float(NO_WINDOW)


def gpu_key(name: str) -> str:
    """The kind of GPU that a name means: "NVIDIA H200", "h200-sxm" and "H200-SXM-141GB" are all "h200"."""
    found = re.search(r"(gb|[abh])\d{2,3}", name.lower())
    return found.group(0) if found else name.lower()
