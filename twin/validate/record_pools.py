"""The instance that a record was measured on, as a cost model with the step that it repeats; and how its experts are loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from twin.cost.batch import Array, StepBatch, StepCost
from twin.cost.build import Site
from twin.cost.engines import Engine, wide_engine_of
from twin.cost.evidence import Evidence
from twin.cost.memory import memory_of
from twin.cost.model import CostModel
from twin.cost.routing import place, slot_shares
from twin.policy.placement import Placement, slots_to_ranks
from twin.spec.cluster import ClusterSpec
from twin.spec.errors import Infeasible
from twin.spec.model import ModelSpec
from twin.spec.plan import CommBackend, Plan, PoolPlan
from twin.validate.record_words import (
    Record,
    before,
    cached_share,
    cluster_of,
    engine_of_record,
    model_named,
    number,
    on_first_kernels,
    precision_of_record,
    ranks_of,
    stated,
    text_of,
)

# Popularity of experts as LMSYS reports the balance of ranks without EPLB (mean over fullest 0.673, 0.614, 0.550 on 8, 16, 32
# GPUs in prefill): groups of experts that stand together differ by 0.3 (log), experts inside one by 0.55. Since EPLB placed them
# popularity has moved by 0.22 in prefill (0.944, 0.902, 0.800 with EPLB) and by less in decode, whose batches hold thousands of
# requests (TensorRT-LLM: fullest rank 1.11 times the mean on 32 GPUs with 288 slots).
_GROUPS, SPREAD = 8, (0.3, 0.55)
DRIFT = {"prefill": 0.22, "decode": 0.14}
# Balance is a mean over many batches. One batch of prompts asks for experts in its own way, the less so the more prompts it
# holds: a prompt's demand for an expert varies by _PROMPT times its mean (the wait of 7.2 ms a layer for the fullest of 32 H100
# in LMSYS's trace of 64 prompts). Decoding sequences bring one token each; that noise is in the cost model.
_PROMPT, _MOST_NOISE = 3.0, 0.6
_PREFILL_TOKENS = {"sglang": 16384.0, "vllm": 8192.0, "trtllm": 8192.0}  # a step, where a record does not say
_TRACED_SEQS = 128.0  # in DeepSeek's decode trace, a GPU
# Published batches are 0.75 to 1.2 times what memory holds by this rule (256 on 72 H100, 480 on 96 H200 for Kimi K2, 768 and 1408
# on 48 GB200, 256 under vLLM on 32 H200), 1.8 times on 16 H20.
_MOST_SEQS = 1024
_VLLM_SMS = 20  # that vLLM keeps for exchanges under overlap (VLLM_DBO_COMM_SMS)
_TRACED_GPUS, _LENT_WIDTH = ("h100", "h200", "h800"), 1.15  # wide pools of SGLang on others, and other engines', are less known
_SECOND_KERNELS = "2025-07"  # deployments reported before, weeks after they ran, had low-latency kernels of before 23 May 2025
_TOLD_EP = 16  # ranks from which on nobody leaves vLLM its default all-to-all
_ASSUMED_WIDTH, _BATCH_WIDTH = 1.15, 1.35  # times wider where features or the tokens of a step are not stated, or the batch


@lru_cache(maxsize=1)
def evidence() -> Evidence:
    return Evidence.load()


def moved(phase: str, eplb: bool, prompts: float) -> float:
    """How far (log) popularity in a batch of so many prompts is from what the placement was made for."""
    drift = DRIFT[phase] if eplb else 0.0
    noise = min(_PROMPT / max(prompts, 1.0) ** 0.5, _MOST_NOISE) if phase == "prefill" else 0.0
    return round(float(np.hypot(drift, noise)), 2)


@lru_cache(maxsize=64)
def expert_loads(model: ModelSpec, ep: int, redundant: int, domains: int, away: float, eplb: bool,
                 spread: tuple[float, float] = SPREAD, *, nodes: bool = True) -> tuple[Array, Placement]:
    """Popularity of this step [L, E], `away` (log) from what was popular before, and the placement: by number without EPLB,
    with it made for what was popular before. `spread`: of the log popularity of groups, and of experts inside one. `nodes`:
    groups stay on a node, as EPLB's authors have it for prefill; wider decode is balanced over all ranks."""
    assert model.moe is not None
    moe, layers = model.moe, model.moe_layers
    groups = moe.groups if moe.groups > 1 else _GROUPS
    rng = np.random.default_rng(np.random.SeedSequence([0, ep, moe.experts]))
    inside = rng.standard_normal((layers, moe.experts)) * spread[1]
    before = np.exp(inside + rng.standard_normal((layers, groups))[:, np.arange(moe.experts) * groups // moe.experts] * spread[0])
    now = before * np.exp(rng.standard_normal(before.shape) * away)
    placement = "linear" if not eplb else "eplb_hierarchical" if nodes else "eplb_global"
    pool = PoolPlan(role="mixed", dp=ep, ep=ep, redundant_experts=redundant, placement=placement)  # type: ignore[arg-type]
    placed = place(model, pool, before / before.sum(axis=1, keepdims=True), domains)
    shares = np.minimum(now / now.sum(axis=1, keepdims=True), 1.0 / moe.top_k)
    return shares / shares.sum(axis=1, keepdims=True), placed


def rank_excess(shares_LE: Array, placement: Placement) -> Array:
    """The fullest rank's load over the mean, by layer: [L]."""
    load_LR = slots_to_ranks(slot_shares(shares_LE, placement), placement)
    return np.asarray(load_LR.max(axis=1) * load_LR.shape[1])


def usual_share(site: Site) -> float:
    """The middle rank's load over the mean, over layers: what traces of one rank show."""
    if site.popularity_LE is None or site.placement is None:
        return 1.0
    load_LR = slots_to_ranks(slot_shares(site.popularity_LE, site.placement), site.placement)
    return float(np.median(load_LR, axis=1).mean() * load_LR.shape[1])


def redundant_slots(experts: int, ep: int, wanted: int) -> int:
    """Redundant experts nearest to `wanted` with which all slots divide over the ranks, and no fewer than half of it: who asks
    for some would rather hold one more slot a rank than none."""
    slots = max(int((experts + wanted) / ep + 0.5), -(-experts // ep)) * ep
    return slots - experts + (ep if slots - experts < wanted / 2 else 0)


@dataclass(frozen=True)
class Asked:
    """One record's pool: its costs, the step it repeats, tokens that a GPU gains or takes in it, and what was assumed."""

    costs: CostModel
    batch: StepBatch
    tokens: float
    phase: str
    drafted: bool
    assumed: tuple[str, ...]

    @property
    def traced(self) -> bool:
        """Whether what wide pools add to their kernels was read off this engine on such a GPU."""
        site = self.costs.site
        return not site.wide or (site.engine.name == "sglang" and site.gpu.name.startswith(_TRACED_GPUS))

    def step(self) -> StepCost:
        """The step, without the pass that drafts where drafts were only simulated."""
        step = self.costs.step(self.batch)
        parts = {key: seconds for key, seconds in step.parts_s.items() if self.drafted or key != "mtp/draft"}
        total_s = sum(parts.values())
        wider = _BATCH_WIDTH if "batch" in self.assumed else _ASSUMED_WIDTH if self.assumed else 1.0
        wider *= 1.0 if self.traced else _LENT_WIDTH
        return StepCost(total_s, parts, step.sources, total_s * step.low_s / step.total_s / wider,
                        total_s * step.high_s / step.total_s * wider)


def phase_of(record: Record) -> str:
    """prefill or decode, from the record's phase or else its metric. Raises ValueError where neither tells."""
    words = f"{record.get('phase', '')} {record['metric']}".lower()
    for phase, pattern in (("prefill", r"prefill|input|context"), ("decode", r"decode|output|generat|itl|tpot")):
        if re.search(pattern, words):
            return phase
    raise ValueError("phase: neither prefill nor decode")


def asked(record: Record, *, even: bool = False, tbo: bool | None = None) -> Asked:
    """The instance of a record and its step; `even` loads experts evenly whatever the record says, `tbo` switches it."""
    phase, (dp, tp, ep) = phase_of(record), ranks_of(record)
    said, engine, model = stated(record, phase, ep), engine_of_record(record), model_named(record)
    cluster, text = cluster_of(record, dp * tp), text_of(record)
    if phase == "decode" and dp > 1 and tp == 1 and "gb" not in str(record.get("gpu")).lower() and (
            before(record, _SECOND_KERNELS) or _of_deepseek(text)):
        cluster = on_first_kernels(cluster, normal=False)
    assumed = list(said.assumed)
    redundant, layout = 0, None
    ep = ep if model.moe is not None else 1
    if model.moe is not None:
        redundant = redundant_slots(model.moe.experts, ep, said.redundant)
        if said.even and model.moe.groups > 1:  # loads made even by choosing experts at random heed no groups
            model = model.model_copy(update={"moe": model.moe.model_copy(update={"groups": 1, "top_k_groups": 1})})
    pool = PoolPlan(role="prefill" if phase == "prefill" else "decode", dp=dp, tp=tp, ep=ep,
                    tbo=said.tbo if tbo is None else tbo, redundant_experts=redundant,
                    placement="eplb_global" if said.eplb or said.even else "linear", mtp_draft_tokens=said.drafts,
                    tbo_min_tokens=0, comm=_comm(engine, phase, dp, ep),
                    mtp_acceptance=said.acceptance, max_batch_tokens=1 << 17, max_num_seqs=4096)
    other = PoolPlan(role="decode" if phase == "prefill" else "prefill")
    plan = Plan(pools=(pool, other), precision=precision_of_record(record), engine=engine)  # type: ignore[arg-type]
    isl, osl = float(record.get("isl") or 0), float(record.get("osl") or 0)
    tokens = _prefill_tokens(record, engine, assumed) if phase == "prefill" else 0.0
    prompts = max(1.0, tokens / (isl or 4096.0))
    if model.moe is not None and not (even or said.even):
        domains = max(1, -(-(dp * tp) // cluster.network.nvlink_domain_gpus))
        away = moved(phase, said.eplb, prompts * dp / (2 if pool.tbo else 1))
        layout = expert_loads(model, ep, redundant, domains, away, said.eplb, nodes=phase == "prefill")
    costs = CostModel(model, cluster, plan, pool, profile=evidence(), engine=_engine_then(record, engine, pool, cluster))
    if layout is not None:
        costs = costs.relaid(*layout)
    if phase == "prefill":
        held = cached_share(record)
        chunks = max(1.0, prompts / (1 - held))
        batch = StepBatch.prefill([tokens], held * (isl or 4096.0), chunks)
        return Asked(costs, batch, tokens / (1 - held) / tp, phase, True, tuple(assumed))
    if not isl:
        cached = re.search(r"kv (\d+)k", text)
        isl = float(cached[1]) * 1024 if cached else 4096.0 if said.even or said.drafts else 2000.0
    seqs = _decode_seqs(record, costs, isl + osl / 2, assumed)
    scaled = re.search(r"scaled to (\d+) tok/GPU", str(record.get("unit")))
    if scaled and said.drafts:
        seqs = float(scaled[1]) / (1 + said.drafts)
    seqs *= tp  # sequences of one DP rank
    batch = StepBatch.decode([seqs], [seqs * (isl + osl / 2)])
    return Asked(costs, batch, seqs * costs.tokens_per_step / tp, phase, said.drafted, tuple(assumed))


def _engine_then(record: Record, name: str, pool: PoolPlan, cluster: ClusterSpec) -> Engine | None:
    """The engine where it was another at a record's date: DeepEP's normal mode under vLLM waited for the other half batch's
    compute until March 2026 (vllm-project/vllm #38451), with SMs kept for it all the while. None: as it is."""
    waits = name == "vllm" and pool.tbo and pool.comm == "deepep_normal" and before(record, "2026-04")
    return replace(wide_engine_of(name, cluster.groups[0].gpu), tbo_waits_sms=_VLLM_SMS) if waits else None


def _of_deepseek(text: str) -> bool:
    """Whether a record is of the traces that DeepSeek published in February 2025, whoever cites them when."""
    return "profile" in text or "infersim" in text


def _comm(engine: str, phase: str, dp: int, ep: int) -> CommBackend:
    """vLLM gathers tokens from all ranks unless told otherwise, as every published deployment over several nodes is."""
    if engine != "vllm" or dp == 1 or ep < _TOLD_EP:
        return "auto"
    return "deepep_normal" if phase == "prefill" else "deepep_low_latency"


def _prefill_tokens(record: Record, engine: str, assumed: list[str]) -> float:
    """Prompt tokens a DP rank takes in one step."""
    if record.get("batch_per_gpu"):
        return number(record["batch_per_gpu"]) * int(record.get("tp") or 1)
    named = re.search(r"(?:TBO|[-_t])(\d+k|\d{4,5})(?![\dA-Za-z])", str(record.get("id", "")))
    if named and number(named[1]) <= 1 << 16:
        return number(named[1])
    assumed.append("tokens of a step")
    return _PREFILL_TOKENS[engine]


def _decode_seqs(record: Record, costs: CostModel, context: float, assumed: list[str]) -> float:
    """Sequences a GPU decodes at once: who states a throughput and no batch filled the memory."""
    if record.get("batch_per_gpu"):
        return number(record["batch_per_gpu"])
    for word in ("concurrency", "global_batch", "batch"):
        if record.get(word):
            return max(1.0, number(record[word]) / costs.pool.world)
    if _of_deepseek(text_of(record)):
        return _TRACED_SEQS
    assumed.append("batch")
    site, pool = costs.site, costs.pool.model_copy(update={"max_num_seqs": _MOST_SEQS, "max_batch_tokens": _MOST_SEQS})
    try:
        room = memory_of(costs.model, site.precision, pool, site.engine, site.gpu.hbm_bytes, site.protocol.name,
                         mtp=pool.mtp_draft_tokens > 0)
    except Infeasible:  # it ran, though our memory says it does not fit
        return _TRACED_SEQS
    return max(1.0, min(room.kv_tokens / context / pool.tp, float(_MOST_SEQS)))
