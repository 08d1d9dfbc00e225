"""How an engine is run, beyond what its plan says; and what each rank process is told at its start."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from runtime.faults import parse
from twin.spec.errors import SpecError
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan
from twin.spec.rundir import write_text
from twin.spec.scenario import KvSend


def stated_threads(text: str) -> int | None:
    """What OMP_NUM_THREADS says of the outermost level, None when it says nothing that is a number."""
    first = text.partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


@dataclass(frozen=True)
class EngineOptions:
    """`checkpoint` None means random weights from `seed`. `dtype` is that of weights, activations and KV.

    A rank that shows no sign of life for `timeout_s` counts as lost. So does one that lives but stays in one phase of a step
    for `stall_timeout_s` (and no less than `timeout_s`) without waiting for others, or whom others' devices wait for as long.
    With `recover` the others then go on without it (`runtime.recovery`), else the engine fails. `faults` strike on purpose
    (`runtime.faults`). `record_routing` is a file for expert loads (`runtime.routing_record`). `threads` are torch threads a
    rank, by default what OMP_NUM_THREADS says (None: the machine's cores shared out). `max_context` caps prompt plus output.
    `record` keeps a record of every step. `weights` fp8 stores and multiplies the large matrices in fp8 (`runtime.quantise`).
    `graphs` runs decode steps as CUDA graphs where one rank is the whole instance or its ranks exchange tokens by symmetric
    memory. `warm_up` takes steps before the first request that compile every kernel (`runtime.warmup`); `tune` times kernels
    for small decode steps (`runtime.tune`).
    `kv_send` is what of a prompt's KV leaves a prefill rank before the prompt is done: nothing (prompt, engine), all chunks but
    the last (chunk), all layers of it but the last as well (layer). `external` is a folder for ranks that somebody else
    starts (torchrun, on this machine): see `runtime.launch`.
    """

    checkpoint: str | None = None
    seed: int = 0
    dtype: Literal["fp32", "bf16"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    backend: Literal["torch", "triton"] = "torch"
    weights: Literal["same", "fp8"] = "same"
    graphs: bool = True
    warm_up: bool = True
    tune: bool = True
    timeout_s: float = 3.0
    stall_timeout_s: float = 30.0
    recover: bool = False
    faults: str = ""
    record_routing: str | None = None
    start_timeout_s: float = 120.0
    threads: int | None = field(default_factory=lambda: stated_threads(os.environ.get("OMP_NUM_THREADS", "")))
    max_context: int | None = None
    record: bool = False
    kv_send: KvSend = "engine"
    external: str | None = None

    def __post_init__(self) -> None:
        if self.device == "cpu" and self.backend != "torch":
            raise SpecError("triton kernels need a GPU", field="backend", expected="torch on cpu")
        if not 0 < self.timeout_s <= 3600:
            raise SpecError(f"is {self.timeout_s}", field="timeout_s", expected="0 < timeout_s <= 3600")
        if not 0 < self.stall_timeout_s <= 3600:
            raise SpecError(f"is {self.stall_timeout_s}", field="stall_timeout_s", expected="0 < stall_timeout_s <= 3600")
        if self.recover and self.external is not None:
            raise SpecError("ranks that somebody else started cannot be replaced", field="recover", expected="false")
        parse(self.faults)
        if self.record_routing is not None and Path(self.record_routing).suffix not in (".csv", ".json"):
            raise SpecError(f"is {self.record_routing}", field="record_routing", expected="a file that ends with .csv or .json")

    @property
    def stall_s(self) -> float:
        """How long a rank may make no progress."""
        return max(self.stall_timeout_s, self.timeout_s)

    @property
    def patience_s(self) -> float:
        """How long a collective waits. Who is lost, heart beats and progress tell before."""
        return max(60.0, 2 * self.stall_s)

    def threads_for(self, world: int) -> int:
        return self.threads or max(1, len(os.sched_getaffinity(0)) // world)


@dataclass(frozen=True)
class Briefing:
    """The file that a rank reads first. `plan` is that of the formation in which it begins."""

    model: ModelSpec
    plan: Plan
    options: EngineOptions
    control: Path
    board: Path
    formation: int = 0

    def write(self, path: Path) -> None:
        fields = {"model": self.model.model_dump(mode="json"), "plan": self.plan.model_dump(mode="json"),
                  "options": asdict(self.options), "control": str(self.control), "board": str(self.board),
                  "formation": self.formation}
        write_text(path, json.dumps(fields))  # whole at once: external ranks may be waiting for it

    @classmethod
    def read(cls, path: Path) -> Briefing:
        fields = json.loads(path.read_text(encoding="utf-8"))
        model = ModelSpec.model_validate_json(json.dumps(fields["model"]))
        plan = Plan.model_validate_json(json.dumps(fields["plan"]))
        return cls(model, plan, EngineOptions(**fields["options"]), Path(fields["control"]), Path(fields["board"]),
                   fields["formation"])
