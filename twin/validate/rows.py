"""Rows in the columns of public serving benchmarks (`silicon.csv`) as questions to the twin.

for row in read_rows(Path("silicon.csv")):
    question = question_of(row)      # a Question, or Unanswered with the reason
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from twin.spec.cluster import ClusterSpec
from twin.spec.errors import Problem, SpecError
from twin.spec.load import load_cluster
from twin.spec.model import ModelSpec
from twin.spec.parse import read_text
from twin.spec.plan import Plan, PoolPlan, Role
from twin.spec.workload import Arrivals, Lengths, WorkloadSpec
from twin.validate.recipes import ACCEPTANCE, Recipe, drafts_of, recipe_of
from twin.validate.words import kv_dtype, model_of, precision_of

MAX_FILE_BYTES = 64 << 20
MAX_ROWS = 100_000
REQUIRED = ("backend", "model_path", "system", "mode", "isl", "osl")
TEXT = ("id", "silicon_data_source", "backend", "backend_version", "model_path", "system", "precision", "mode",
        "gemm_quant_mode", "moe_quant_mode")
_LAYOUT = ("batch_size", "num_workers", "tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
NUMBERS = ("isl", "osl", *(p + c for p in ("", "prefill_", "decode_") for c in _LAYOUT if p or c != "num_workers"),
           "silicon_ttft_ms", "silicon_tpot_ms")
# name of a system: cluster preset, GPUs of one NVLink domain that a pool may take, GPUs of a node
SYSTEMS: dict[str, str] = {"a100_sxm": "a100", "h100_sxm": "h100", "h200_sxm": "h200", "h20_sxm": "h20-96g", "h800_sxm": "h800",
                           "b200_sxm": "b200", "b300_sxm": "b300", "gb200": "gb200-nvl72", "gb200_sxm": "gb200-nvl72",
                           "gb300": "gb300-nvl72", "gb300_sxm": "gb300-nvl72", "mi300x": "mi300x",
                           "mi325x": "mi325x", "mi355x": "mi355x"}
_BLANK = re.compile(r"(?i)^(nan|none|null|n/a|-)$")
_WAVES = 10  # requests of each user that InferenceX counts, and what we take where a test does not say
# How much before the nominal length outputs end in tests of fixed lengths: users stay mostly in step with each other, but not
# quite. Swept on a third of the rows of both halves, so it is not held out.
_STOP_EARLY = {"vllm": 0.1, "trtllm": 0.04}
# Part of a GPU's memory that weights, cache and work fill together. Where users begin to wait for memory (rows of the fit half
# with more users than fit) says it: vLLM is told 0.90 to 0.95 in recipes, SGLang 0.82 for weights and cache alone.
_MEMORY = {"vllm": 0.92, "sglang": 0.86}
_MEMORY_OF_OTHERS = 0.95
_WARM_SHAPES = {(1024, 1024), (1024, 8192), (8192, 1024)}  # lengths of InferenceX, which draws them from 0.8 to 1.0 of these


@dataclass(frozen=True)
class Row:
    """One line: texts as written (engines and systems by their usual name), numbers parsed (absent where blank), others'
    columns in `peers` (predictions of others: `<name>_ttft_ms`, `<name>_tpot_ms`), and what could not be read (`problem`)."""

    line: int
    texts: Mapping[str, str]
    numbers: Mapping[str, float]
    peers: Mapping[str, float]
    problem: str = ""

    @property
    def name(self) -> str:
        return self.texts.get("id") or f"line {self.line}"

    def count(self, column: str, default: int = 1) -> int:
        return int(self.numbers.get(column, default))

    @property
    def configuration(self) -> str:
        """What was deployed, without traffic: rows of one configuration must not sit on both sides of a split."""
        t = self.texts
        model = model_key(t["model_path"])
        layout = [f"{self.numbers.get(p + c, '')}" for p in ("", "prefill_", "decode_") for c in _LAYOUT[1:]]
        return "|".join((model, t["system"], t["backend"], t["mode"], t.get("gemm_quant_mode", ""),
                         t.get("moe_quant_mode", ""), *layout))


@dataclass(frozen=True)
class Question:
    """What a row asks. `concurrency` users in a closed loop; measured seconds are NaN where the row has none."""

    row: Row
    model: ModelSpec
    cluster: ClusterSpec
    plan: Plan
    workload: WorkloadSpec
    concurrency: int
    measured_ttft_s: float
    measured_tpot_s: float
    waves: int  # requests of a user
    recipe: Recipe | None = None  # how it was served where that is published

    @property
    def groups(self) -> dict[str, str]:
        """What summaries group by."""
        return {"gpu": self.row.texts["system"], "engine": self.plan.engine, "model": self.model.name,
                "mode": self.row.texts["mode"], "kind": "moe" if self.model.moe is not None else "dense"}


@dataclass(frozen=True)
class Unanswered:
    """A row without a prediction, and why. `mistake` marks rows that no node could have run."""

    row: Row
    reason: str
    mistake: bool = False


def in_fit_half(row: Row, seed: int = 0) -> bool:
    """Whether a row's configuration belongs to the half that constants may be fitted on: by a hash of both, so that all
    rows of a configuration (and no others) are on one side, whatever the order and the rest of the file."""
    return hashlib.sha256(f"{seed}|{row.configuration}".encode()).digest()[0] % 2 == 0


def model_key(path: str) -> str:
    """A model's path without the organisation and the release date, for grouping."""
    name = path.rstrip("/").rsplit("/", 1)[-1].lower()
    return "deepseek-v3" if name.startswith(("deepseek-r1", "deepseek-v3")) and "v3.2" not in name else name


def read_rows(path: Path) -> list[Row]:
    """All rows of a CSV file; a cell that cannot be read is its row's problem. Raises SpecError for what is no table."""
    text = read_text(path, max_bytes=MAX_FILE_BYTES)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(header, path)
        rows: list[Row] = []
        for cells in reader:
            if not cells:
                continue
            if len(rows) >= MAX_ROWS:
                raise SpecError(f"more than {MAX_ROWS} rows", file=path)
            rows.append(_row(header, cells, reader.line_num, path))
    except csv.Error as error:
        raise SpecError(Problem(f"not a CSV file: {error}", line=reader.line_num), file=path) from error
    if not rows:
        raise SpecError("has no rows", file=path)
    return rows


def _check_header(header: list[str], path: Path) -> None:
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        raise SpecError(Problem(f"lacks the columns {', '.join(missing)}", line=1), file=path,
                        hint="needed: " + ", ".join(REQUIRED) + "; others may be blank or absent")
    if len(set(header)) != len(header):
        raise SpecError(Problem("a column is named twice", line=1), file=path)


def _row(header: list[str], cells: list[str], line: int, path: Path) -> Row:
    if len(cells) != len(header):
        raise SpecError(Problem(f"has {len(cells)} cells", line=line, expected=f"{len(header)}"), file=path)
    values = {name: _BLANK.sub("", cell.strip()) for name, cell in zip(header, cells, strict=True)}
    texts = {name: values.get(name, "")[:500] for name in TEXT}
    texts["backend"] = _backend(texts["backend"])
    texts["system"] = _system(texts["system"])
    texts["mode"] = texts["mode"].lower()
    numbers, peers, problems = {}, {}, []
    for name in NUMBERS:
        value = _number(values.get(name, ""), name)
        if isinstance(value, float):
            numbers[name] = value
        elif values.get(name) and not name.startswith("silicon_"):  # without a measurement a row is still a question
            problems.append(value)
    for name, text in values.items():
        if name.endswith(("_ttft_ms", "_tpot_ms")) and not name.startswith("silicon_"):
            value = _number(text, name)
            if isinstance(value, float):
                peers[name] = value
    problems += [f"{name} is blank: tokens are needed" for name in ("isl", "osl") if not values.get(name)]
    return Row(line, texts, numbers, peers, "; ".join(problems))


def _backend(text: str) -> str:
    """An engine by its usual name; a framework in front of it ("dynamo-trt") and what runs separated behind are no engines."""
    name = re.sub(r"^dynamo[-_]|[-_]disagg$", "", text.lower())
    return "trtllm" if name in ("trt", "trt-llm", "trt_llm", "tensorrt-llm", "tensorrt_llm", "tensorrtllm") else name


def _system(text: str) -> str:
    name = re.sub(r"_(nvl72|sxm[0-9])$", "", text.lower().replace("-", "_"))
    return name if name in SYSTEMS or f"{name}_sxm" not in SYSTEMS else f"{name}_sxm"


def _number(text: str, name: str) -> float | str:
    """A cell as a number, or what is wrong with it."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    whole = name not in ("batch_size", "prefill_batch_size", "decode_batch_size") and not name.endswith("_ms")
    if not math.isfinite(value) or value <= 0 or value > 1e9 or (whole and value != int(value)):
        return f"{name}: cannot read {text[:40]!r}, expected {'a whole number above 0' if whole else 'a number above 0'}"
    return value


# --- from a row to what the twin is asked
def question_of(row: Row, base: Path = Path()) -> Question | Unanswered:
    """The deployment and the traffic of a row. Model files are looked for relative to `base`.

    Blank fields: sizes are 1; attention DP is what makes TP x DP the ranks that hold the experts; a blank precision is the
    checkpoint's own; concurrency is the batch of a rank times attention DP (decode workers in separated rows).
    """
    texts = row.texts
    if row.problem:
        return Unanswered(row, row.problem)
    if texts["backend"] not in ("vllm", "sglang", "trtllm", "eptwin"):
        return Unanswered(row, f"engine {texts['backend'][:40]!r} is not known: vllm, sglang, trtllm or eptwin")
    if texts["system"] not in SYSTEMS:
        return Unanswered(row, f"system {texts['system'][:40]!r} is not known: {', '.join(SYSTEMS)}")
    if texts["mode"] not in ("agg", "disagg"):
        return Unanswered(row, f"mode {texts['mode'][:40]!r} is not known: agg or disagg")
    try:
        model = model_of(texts["model_path"], base)
        return _pools(row, model)
    except SpecError as error:
        return Unanswered(row, error.problems[0].message)
    except ValidationError as error:  # sizes beyond what a plan or a cluster may have
        first = error.errors(include_url=False)[0]
        return Unanswered(row, f"sizes are beyond what the twin takes: {'.'.join(map(str, first['loc']))}: {first['msg']}"[:300])


def _pools(row: Row, model: ModelSpec) -> Question | Unanswered:
    roles: tuple[tuple[str, Role], ...] = (("", "mixed"),)
    if row.texts["mode"] == "disagg":
        roles = (("prefill_", "prefill"), ("decode_", "decode"))
    pools = []
    domain = load_cluster(SYSTEMS[row.texts["system"]]).network.nvlink_domain_gpus
    for prefix, role in roles:
        found = _pool(row, model, prefix, role)
        if isinstance(found, str):
            return Unanswered(row, found)
        gpus = found.world * row.count(prefix + "pp_size")
        if role == "mixed" and gpus > domain:
            return Unanswered(row, f"{gpus} GPUs exceed the {domain} of one node: a mistake of the collection", mistake=True)
        if row.count(prefix + "pp_size") > 1:
            return Unanswered(row, "pipeline parallelism is not modelled")
        pools.append(found)
    return _question(row, model, tuple(pools))


def _pool(row: Row, model: ModelSpec, prefix: str, role: Role) -> PoolPlan | str:
    """The pool that the columns with `prefix` describe, or why there is none."""
    tp, given_dp = row.count(prefix + "tp_size"), row.numbers.get(prefix + "attention_dp_size")
    moe_tp, moe_ep = row.count(prefix + "moe_tp_size"), row.count(prefix + "moe_ep_size")
    experts = model.moe is not None
    dp = int(given_dp) if given_dp else 1
    if not given_dp and experts and moe_tp * moe_ep > tp and moe_tp * moe_ep % tp == 0:
        dp = moe_tp * moe_ep // tp
    world = tp * dp
    ep = moe_ep if experts and world % moe_ep == 0 else 1
    if experts and moe_tp == 1 and moe_ep == 1:
        ep = 1  # not stated: experts are cut as attention is
    redundant = -model.moe.experts % ep if model.moe is not None else 0  # as many as fill all ranks alike
    if model.attention.heads % tp and role != "prefill":
        return f"{model.attention.heads} heads do not divide over TP {tp}"
    workers = row.count(prefix + "num_workers") if prefix else 1
    drafts = drafts_of(row.texts, row.numbers, model.name) if role == "mixed" and model.mtp_layers else 0
    return PoolPlan(role=role, instances=workers, dp=dp, tp=tp, ep=ep, redundant_experts=redundant, max_num_seqs=512,
                    max_batch_tokens=8192, chunk_tokens=8192, block_tokens=64, mtp_draft_tokens=drafts, mtp_acceptance=ACCEPTANCE,
                    memory_fraction=_MEMORY.get(row.texts["backend"], _MEMORY_OF_OTHERS))


def _question(row: Row, model: ModelSpec, pools: tuple[PoolPlan, ...]) -> Question | Unanswered:
    cluster = _cluster(row.texts["system"], sum(pool.gpus for pool in pools))
    precision = precision_of(row.texts, model)
    engine = row.texts["backend"]
    precision = precision.model_copy(update={"kv": kv_dtype(engine, precision, cluster.groups[0].gpu, model)})
    plan = Plan(name=row.name[:200], pools=pools, precision=precision, engine=engine,  # type: ignore[arg-type]
                engine_version=row.texts["backend_version"] or None)
    last = pools[-1]
    prefix = "decode_" if last.role == "decode" else ""
    batch = row.numbers.get(prefix + "batch_size", 1.0)
    concurrency = max(1, round(batch * last.dp * last.instances))
    isl, osl = row.count("isl"), row.count("osl")
    drawn = (isl, osl) in _WARM_SHAPES and "auto-gap-analysis" not in row.texts["silicon_data_source"]
    workload = WorkloadSpec(name=row.name[:200], arrivals=Arrivals(kind="closed_loop", concurrency=concurrency),
                            isl=_lengths(isl, drawn), osl=_lengths(osl, drawn, _STOP_EARLY.get(engine, 0.0)),
                            requests=_WAVES * concurrency)
    numbers = row.numbers
    recipe = recipe_of(row.texts, numbers, model.name, precision.experts, concurrency,
                       pools[0].mtp_draft_tokens) if drawn and len(pools) == 1 else None
    if recipe is not None:
        plan = _as_served(plan, recipe)
    return Question(row, model, cluster, plan, workload, concurrency, numbers.get("silicon_ttft_ms", math.nan) / 1e3,
                    numbers.get("silicon_tpot_ms", math.nan) / 1e3, _WAVES, recipe)


def _as_served(plan: Plan, recipe: Recipe) -> Plan:
    """The plan of one pool with what its recipe sets and its columns do not tell."""
    pool, precision = plan.pools[0], plan.precision
    if recipe.expert_parallel:
        pool = pool.model_copy(update={"ep": pool.world})
    if recipe.kv:
        precision = precision.model_copy(update={"kv": recipe.kv})
    return plan.model_copy(update={"pools": (pool,), "precision": precision})


def _lengths(nominal: int, drawn: bool, stop_early: float = 0.0) -> Lengths:
    """InferenceX draws lengths uniformly from 0.8 to 1.0 of the nominal. Other tests fix them, up to `stop_early`."""
    least = 0.8 if drawn else 1.0 - stop_early
    return Lengths(kind="uniform", low=max(1, int(least * nominal)), high=nominal)


@lru_cache(maxsize=64)
def _cluster(system: str, gpus: int) -> ClusterSpec:
    """The preset with as many nodes as the deployment needs."""
    name = SYSTEMS[system]
    base = load_cluster(name)
    group = base.groups[0]
    nodes = -(-gpus // group.gpus_per_node)
    # each pool may begin on a node of its own
    return base if nodes <= group.nodes else load_cluster(f"{name}-{nodes + 1}x{group.gpus_per_node}")
