"""What a published record says, in the twin's words: GPU, cluster, model, formats, engine, features, batch and context.

Records are written by hand, so names vary ("H100-80G", "NVIDIA H200 141GB", "GB200 NVL72", "Kimi K2", "16384 tok/GPU"). What is
not stated is assumed, and `Stated.assumed` says what.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twin.spec.cluster import ClusterSpec
from twin.spec.errors import SpecError
from twin.spec.load import load_cluster, presets
from twin.spec.model import ModelSpec
from twin.spec.plan import Precision
from twin.validate.recipes import ACCEPTANCE
from twin.validate.words import model_of

Record = Mapping[str, Any]
# cluster preset by what a GPU's name holds, most telling first
_GPUS = (("gb300", "gb300-nvl72"), ("gb200", "gb200-nvl72"), ("b300", "b300"), ("b200", "b200"), ("h200", "h200"),
         ("h800", "h800"), ("h100", "h100"), ("h20-3e", "h20-141g"), ("h20-141", "h20-141g"), ("h20", "h20-96g"),
         ("a100", "a100"), ("mi300", "mi300x"), ("mi325", "mi325x"), ("mi355", "mi355x"), ("910c", "cloudmatrix384"),
         ("cloudmatrix", "cloudmatrix384"), ("sm100", "b200"), ("sm90", "h800"))
_SIMULATED = ("perfect", "profile", "infersim", "simulat", "unit_test")
_WIDE_EP = 32  # from here on deployments that say nothing overlap batches and balance experts, as all published ones do


@dataclass(frozen=True)
class Found:
    """A prediction in the record's unit, its 80% interval and its sources."""

    value: float
    low: float
    high: float
    sources: tuple[str, ...]

    @classmethod
    def near(cls, value: float, width: float, source: str) -> Found:
        return cls(value, value / (1 + width), value * (1 + width), (source,))


def text_of(record: Record) -> str:
    """All that could tell how a record came about, in small letters."""
    return " ".join(str(record.get(k, "")) for k in ("id", "note", "source", "backend")).lower()


def number(value: Any) -> float:
    """The first number of `16384 tok/GPU`; k and M count."""
    match = re.search(r"(\d+(?:\.\d+)?)\s*([kM](?![a-z]))?", str(value).replace(",", ""))
    if match is None:
        raise ValueError(f"batch_per_gpu: {value}")
    return float(match[1]) * {"k": 1024.0, "M": 1e6}.get(match[2] or "", 1.0)


def model_named(record: Record) -> ModelSpec:
    """The model of `deepseek-v3/r1`, `DeepSeek-R1 (0528)`, `Kimi K2 Instruct`. Raises SpecError for one that is not known."""
    name = re.sub(r"\(.*?\)", "", str(record["model"])).strip().lower()
    tries = [name, name.replace(" ", "-").replace("_", "-"), *(p.strip().replace(" ", "-") for p in name.split("/")),
             *re.findall(r"[a-z][\w.-]+", name)]
    for one in tries:
        try:
            return model_of(one)
        except SpecError:
            known = [p for p in presets("models") if one.startswith(p) or (len(one) > 6 and p.startswith(one))]
            if known:
                return model_of(max(known, key=len) if any(one.startswith(p) for p in known) else min(known, key=len))
    raise SpecError(f"model {name[:60]!r} is no preset", expected=", ".join(presets("models")))


def preset_of(record: Record) -> str:
    """The cluster preset that holds the record's GPU. Raises SpecError for one that is not known."""
    name = re.sub(r"[ _]+", "-", str(record.get("gpu") or "").lower())
    if "nvl72" in name and "gb" not in name:
        name = "gb200"
    for known, preset in _GPUS:
        if known in name:
            return preset
    raise SpecError(f"GPU {record.get('gpu')!r} is not known", expected=", ".join(known for known, _ in _GPUS))


def cluster_of(record: Record, ranks: int) -> ClusterSpec:
    """Enough nodes for `ranks`, with the NICs that the record states (`8x400Gb`, `200Gb/s`)."""
    name = preset_of(record)
    per_node = load_cluster(name).groups[0].gpus_per_node
    cluster = load_cluster(f"{name}-{-(-ranks // per_node)}x{per_node}")
    stated = re.search(r"(?:(\d+)\s*x\s*)?(?:[A-Za-z]+\d*\s+)?(\d+)\s*G(?:b|bps|bit)", str(record.get("network", "")))
    if stated is None:
        return cluster
    count, rate = int(stated[1] or cluster.network.nics_per_node), float(stated[2]) * 1e9 / 8
    nics = min(count, per_node)
    changed = {"nics_per_node": nics, "nic_bytes_per_s": rate * max(count / nics, 1.0)}
    return cluster.model_copy(update={"network": cluster.network.model_copy(update=changed)})


# DeepEP's first kernels: until 22 April 2025 normal mode across nodes reached so much of what it reaches since (44 and 46 of 58
# and 51 GB/s, its README); until 23 May 2025 low latency sent everything over RDMA, inside a node too.
_FIRST_ACROSS = 0.85


def before(record: Record, month: str) -> bool:
    """Whether a record says that it is older than a month; a year alone says nothing."""
    date = str(record.get("date", ""))
    return len(date) >= len(month) and date < month


def on_first_kernels(cluster: ClusterSpec, normal: bool) -> ClusterSpec:
    """The cluster as DeepEP's first kernels used it, in normal or in low-latency mode."""
    network = cluster.network
    changed = {"nic_bytes_per_s": network.nic_bytes_per_s * _FIRST_ACROSS} if normal else {"nvlink_domain_gpus": 1}
    return cluster.model_copy(update={"network": network.model_copy(update=changed)})


def precision_of_record(record: Record) -> Precision:
    """Formats: narrow experts where the record says so, a bf16 model where it says only that, else block-scaled fp8."""
    text = str(record.get("precision", "")).lower()
    narrow = "fp4" if "fp4" in text and "mxfp4" not in text else "mxfp4" if "mxfp4" in text else \
        "int4" if re.search(r"int4|w4a", text) else None
    kv = "fp8" if re.search(r"fp8[ -]?(kv|attn|attention)|kv[ -]?(cache)?[ -]?fp8", text) else "bf16"
    if narrow is None and "bf16" in text and "fp8" not in text:
        return Precision(weights="bf16", experts="bf16", kv="bf16", dispatch="bf16")
    return Precision(weights="fp8_block", experts=narrow or "fp8_block", kv=kv, dispatch="fp8")  # type: ignore[arg-type]


def cached_share(record: Record) -> float:
    """The part of prompt tokens that a prefix cache holds and throughput counts all the same; 0 where nothing says so."""
    given = record.get("cache_hit_rate")
    if given is None:
        said = re.search(r"cache\w*[- ]hit\w*\D{0,20}(\d+(?:\.\d+)?)\s*%", text_of(record))
        given = float(said[1]) / 100 if said else 0.0
    return min(max(float(given), 0.0), 0.99)


_ENGINES = (("vllm", r"vllm|llm-d"), ("trtllm", r"trt|tensorrt"), ("sglang", r"sglang|sgl\b|lmsys"))


def engine_of_record(record: Record) -> str:
    """The engine that a record names, its own fields before what else it says; SGLang where it names none."""
    for text in (f"{record.get('engine', '')} {record.get('backend', '')}".lower(), text_of(record)):
        found = next((name for name, pattern in _ENGINES if re.search(pattern, text)), None)
        if found is not None:
            return found
    return "sglang"


def engine_stated(record: Record) -> bool:
    """Whether anything in a record names its engine."""
    return any(re.search(pattern, f"{record.get('engine', '')} {text_of(record)}".lower()) for _, pattern in _ENGINES)


def ranks_of(record: Record) -> tuple[int, int, int]:
    """(dp, tp, ep) of one instance: EP over all its GPUs unless stated."""
    tp = int(record.get("tp") or 1)
    ep = int(record.get("ep") or record.get("gpus") or 0)
    dp = int(record.get("dp") or 0)
    world = max(ep, dp * tp) if dp else max(ep, tp)
    if not world:
        raise ValueError("ep")
    if world % tp:
        raise ValueError(f"tp: {tp} does not divide {world} GPUs")
    return world // tp, tp, ep or world


@dataclass(frozen=True)
class Stated:
    """What was switched on. `drafts`: tokens drafted a step, `drafted`: by a pass that takes time (not simulated); `even`:
    experts loaded evenly on purpose; `assumed`: what the record left open."""

    tbo: bool
    eplb: bool
    redundant: int
    drafts: int
    drafted: bool
    acceptance: float
    even: bool
    assumed: tuple[str, ...]


def stated(record: Record, phase: str, ep: int) -> Stated:
    """Features of a record. Wide EP that states nothing balances experts and, across nodes, overlaps batches."""
    given, text = record.get("features"), text_of(record)
    assumed: list[str] = []
    if not isinstance(given, Mapping):
        given = {"TBO": _overlaps(record), "EPLB": True} if ep >= _WIDE_EP else {}
        assumed.append("features")
    features = {str(k).upper(): v for k, v in given.items()}
    eplb = bool(features.get("EPLB", ep >= _WIDE_EP))
    said = features.get("MTP", features.get("EAGLE"))
    drafts = _drafts(said, "profile" in text or "infersim" in text, ep) if phase == "decode" else 0
    wanted = int(features.get("REDUNDANT_EXPERTS", 32 if eplb else 0))
    accept = re.search(r"accept\w*\D{0,12}(\d+(?:\.\d+)?)\s*(%?)", f"{said} {record.get('note', '')}".lower())
    rate = (float(accept[1]) / (100 if accept[2] or float(accept[1]) > 1 else 1)) if accept else None
    if rate is None:
        # LMSYS counts 60% where it derives throughput from DeepSeek's published traces
        rate = 0.6 if any(word in text for word in ("profile", "infersim", "simulat")) else ACCEPTANCE
    simulated = "simulat" in f"{said}".lower() or "profile" in text or "infersim" in text
    return Stated(bool(features.get("TBO") or features.get("DBO")), eplb, wanted if eplb else 0, drafts, not simulated,
                  min(rate, 1.0), any(word in text for word in _SIMULATED), tuple(assumed))


def _overlaps(record: Record) -> bool:
    """Whether a wide deployment that does not say so overlaps two batches: not under TensorRT-LLM, and not where NVLink reaches
    all ranks (SGLang switched it off on GB200)."""
    return engine_of_record(record) != "trtllm" and "nvl72" not in preset_of(record)


def _drafts(said: Any, profile: bool, ep: int) -> int:
    if said is None:
        return 1 if profile and ep > 100 else 0  # DeepSeek's decode profile: two tokens a request
    if isinstance(said, bool) or not said:
        return int(bool(said))
    if isinstance(said, int):
        return said
    verified = re.search(r"(\d+)\s*tok\w*/(?:req|seq)", str(said))
    drafted = re.search(r"(\d+)\s*draft", str(said))
    return int(verified[1]) - 1 if verified else int(drafted[1]) if drafted else 1
