"""Grouped expert GEMMs in lockstep: all EP ranks wait for the one with most to do, layer after layer.

The seconds depend on how many tokens the instance brings in all, so they are tabulated over tokens once per pool.
Legend of shapes: g grid points, L layers that differ, S slots, R EP ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twin.cost.batch import Array
from twin.cost.engines import OUR_ENGINE
from twin.cost.interpolate import Curve, Interpolator
from twin.cost.local_experts import ENGINES as LOCAL_ENGINES
from twin.cost.local_experts import LOCAL
from twin.cost.measured import Evidence, evidence_of
from twin.cost.roofline import Efficiency, activation_bytes, bytes_of, peak_flop_per_s
from twin.cost.routing import expected_max, load_variance, slot_shares, split_variance
from twin.policy.placement import Placement, slots_to_ranks
from twin.spec.cluster import GpuSpec
from twin.spec.model import ModelSpec
from twin.spec.plan import PoolPlan, Precision

_TOKENS: Array = np.exp2(np.arange(0.0, 22.01, 0.5))  # grid of tokens of the whole instance
_UNTUNED = 2.0  # times the roofline, at the sizes of decode steps, beyond which a table is not believed
_UNTUNED_SLOW = 6.0  # what is slow in earnest: weights unpacked in the kernel; our own rows, timed in graphs without the host
_SKEWED = "power_law_1.01"
_LENDERS, _SLOWER = ("sglang", "vllm"), 1.4
_KERNELS = ("moe_torch_flow_cutlass", "moe_torch_flow_min_latency")  # TensorRT-LLM's of nvfp4
_TILE = 128.0  # rows that grouped kernels multiply at once
_COARSE: Array = _TOKENS[::2]  # where layers differ, each costs its own row


@dataclass(frozen=True)
class ExpertWork:
    """What the fullest rank of one mean layer does when the instance brings so many tokens: arrays over `tokens`."""

    tokens: Array
    pairs_max: Array  # token-expert pairs of the fullest rank
    pairs_mean: Array
    hit: Array  # experts of a rank that got a token: the fullest rank's

    def at(self, tokens: Array, column: Array) -> Array:
        """Read one column at any number of tokens (log-log straight between grid points)."""
        return np.asarray(np.exp(np.interp(np.log(np.maximum(tokens, 1e-9)), np.log(self.tokens), np.log(column))))


def expert_work(model: ModelSpec, placement: Placement, popularity_LE: Array, share_LS: Array | None = None,
                senders: int = 0) -> ExpertWork:
    """Pairs and experts hit over the token grid, averaged over layers.

    A slot that takes part `s` of a token's k choices stays idle through N tokens with chance (1 - k s)^N. The fullest
    rank's pairs are the expected maximum over ranks: uneven popularity and the noise of sampling together. `share_LS`: how
    replicas share where they are not used alike; `senders` ranks then even out the noise of their batches too.
    """
    moe = model.moe
    assert moe is not None
    splits = share_LS is not None and placement.num_slots > placement.num_experts
    share_LS = slot_shares(popularity_LE, placement) if share_LS is None else share_LS
    share_LR = slots_to_ranks(share_LS, placement)
    ranks = placement.num_ranks
    grid = _TOKENS if len(share_LS) == 1 else _COARSE
    tokens = grid[:, None, None]
    mean = tokens * moe.top_k * share_LR  # [g, L, R]
    variance = load_variance(moe, tokens, share_LR)
    if splits:
        variance = split_variance(moe, placement, popularity_LE, variance, tokens, senders)
    largest = expected_max(mean.reshape(-1, ranks), variance.reshape(-1, ranks)).reshape(mean.shape[:2])
    largest = np.clip(largest, mean.max(axis=2), grid[:, None] * moe.top_k)
    pairs_max = largest.mean(axis=1)
    idle_LS = np.log1p(-np.minimum(moe.top_k * share_LS, 1 - 1e-12))
    hit = -np.expm1(tokens * idle_LS).reshape(len(grid), len(share_LS), ranks, -1).sum(axis=3)
    hit = hit.max(axis=2).mean(axis=1)
    return ExpertWork(grid, pairs_max, grid * moe.top_k / ranks, np.maximum(hit, 1e-9))


@dataclass(frozen=True)
class ExpertCost:
    """Seconds of the experts of all MoE layers over tokens of the instance; GEMM and data movement apart."""

    log_tokens: Array
    log_gemm_s: Array
    log_permute_s: Array  # -inf where the GEMM's table includes it
    evidence: Evidence

    def seconds(self, tokens: Array) -> tuple[Array, Array]:
        """(grouped GEMMs, gathering and scattering of tokens) for `tokens` of the whole instance; 0 for none."""
        at = np.log(np.maximum(tokens, 1e-9))
        some = tokens > 0
        gemm = np.exp(np.interp(at, self.log_tokens, self.log_gemm_s)) * some
        if np.isneginf(self.log_permute_s[0]):
            return gemm, np.zeros(np.shape(tokens))
        permute = np.exp(np.interp(at, self.log_tokens, self.log_permute_s)) * some
        return gemm, permute


def expert_cost(work: ExpertWork, model: ModelSpec, precision: Precision, pool: PoolPlan, gpu: GpuSpec,
                gemm: Efficiency, elementwise: Efficiency, launch_s: float, layers: int,
                compute_share: float = 1.0) -> ExpertCost:
    """Time `work` on a GPU: two grouped GEMMs (gate and up, down) with their activation, and the token permutation."""
    moe = model.moe
    assert moe is not None
    h, inner = model.hidden, moe.intermediate / pool.expert_tp
    a, w = activation_bytes(precision.weights), bytes_of(precision.experts)
    quantised = precision.experts not in ("bf16", "fp32")
    flops = work.pairs_max * 6 * h * inner
    weights = work.hit * 3 * h * inner * w
    io = work.pairs_max * (h * (1 if quantised else a) + 2 * inner * a + inner * a + h * a)
    peak = peak_flop_per_s(gpu, precision.experts) * gemm.compute * compute_share
    gemm_s = np.maximum(flops / peak, (weights + io) / (gpu.hbm_bytes_per_s * gemm.memory)) + 2 * launch_s
    # activation read and written (quantised on the way), rows gathered by expert and summed back by token
    moved = work.pairs_max * (3 * inner * a + (h * (1 if quantised else a)) * 2 + h * a + h * a / moe.top_k)
    permute_s = moved / (gpu.hbm_bytes_per_s * elementwise.memory) + 4 * launch_s
    return ExpertCost(np.log(work.tokens), np.log(gemm_s * layers), np.log(permute_s * layers), Evidence("roofline", 0.25))


def measured_expert_cost(work: ExpertWork, model: ModelSpec, precision: Precision, pool: PoolPlan, profile: Interpolator,
                         protocol: str, layers: int, roofline: ExpertCost, share: float = 1.0, *, even: bool = False,
                         dtype: str | None = None, shared_kernels: bool = False) -> ExpertCost | None:
    """From the profile's tables of one MoE layer, permutation included.

    Behind DeepEP, and where popularity is stated, the table of an even load is read at the tokens that would load every rank
    as the fullest is (`local_experts` says how those of SGLang and vLLM are read). Where it is not (`even`: nothing is known
    of it), the table that was measured under a mild power law says what real routers do: they leave experts idle in small
    batches. Of several kernels the fastest counts, as engines choose; with `shared_kernels` (Blackwell, where engines can run
    the same library's) also another engine's, if the own table says much more. None where no table of this layout is close
    enough, or where it says several times what `roofline` does: such rows were measured with the host in the way or with a
    kernel nobody tuned for the shape.
    """
    moe = model.moe
    assert moe is not None
    layout = protocol if protocol.startswith("deepep") and pool.ep > 1 else "fused"
    fixed = {"hidden": model.hidden, "intermediate": moe.intermediate, "top_k": moe.top_k, "moe_tp": pool.expert_tp,
             "experts": moe.experts + pool.redundant_experts, "moe_ep": pool.ep}
    skewed = even and layout == "fused"
    words = {"layout": layout, "dtype": dtype or precision.experts, "gated": "yes",
             "distribution": _SKEWED if skewed else "balanced" if layout == "fused" else "uniform"}
    shape = {name: float(value) for name, value in fixed.items()}
    tokens = work.tokens if skewed else work.tokens * work.pairs_max / work.pairs_mean
    if layout == "fused" and not skewed and pool.ep > 1 and profile.engine in LOCAL_ENGINES:
        shape |= {"experts": shape["experts"] / pool.ep, "moe_ep": 1.0}
        words["layout"], tokens = LOCAL, work.pairs_max / moe.top_k
    if layout == "deepep_low_latency":
        tokens = tokens * _more_tiles(work.pairs_max / np.maximum(work.hit, 1e-9))
    decoding = work.tokens <= 1024
    found = _fastest(_kernels(profile, shape, words), tokens, 128.0 * pool.dp)
    if found is None or found[1].half_width > 1.0:
        return None
    if shared_kernels and skewed:
        for engine in _LENDERS:
            other = _fastest(_kernels(profile.under(engine), shape, words), tokens, 128.0 * pool.dp)
            if other is not None and other[1].half_width < 0.4 and np.median((found[0] / other[0])[decoding]) > _SLOWER:
                found = other[0], Evidence("transferred", max(other[1].half_width, 0.35))
    seconds = found[0] * layers / share
    plain = np.exp(roofline.log_gemm_s) + np.exp(roofline.log_permute_s)
    own = profile.engine == OUR_ENGINE and found[1].source != "transferred"
    if np.median((seconds / plain)[decoding]) > (_UNTUNED_SLOW if own or precision.experts == "int4" else _UNTUNED):
        return None
    return ExpertCost(np.log(work.tokens), np.log(seconds), np.full(len(work.tokens), -np.inf), found[1])


def _more_tiles(rows: Array) -> Array:
    """Tiles that experts of about so many rows need, over those of experts of exactly so many: as routing has it an expert's last
    tile is half empty, and in tables, whose even loads are powers of two, it is full."""
    tiles = rows / _TILE
    return np.asarray(np.maximum(tiles + 0.5, 1.0) / np.maximum(tiles, 1.0))


def _fastest(curves: list[Curve], tokens: Array, typical: float) -> tuple[Array, Evidence] | None:
    """Seconds over `tokens` of the fastest kernel at each, and the evidence of the one that is so at a typical size."""
    if not curves:
        return None
    read = np.stack([curve.many(tokens) for curve in curves])
    return read.min(axis=0), evidence_of(curves[int(read[:, len(tokens) // 3].argmin())], typical)


def _kernels(profile: Interpolator, fixed: dict[str, float], words: dict[str, str]) -> list[Curve]:
    """The curves of every kernel that an engine has for these experts, as long as none is a worse guess than the first."""
    first = profile.curve("moe", fixed, words)
    if first is None:
        return []
    others = [profile.curve("moe", fixed, {**words, "kernel": name}) for name in _KERNELS] if "trtllm" in first.detail else []
    return [first, *(c for c in others if c is not None and c.detail == first.detail and c.transferred == first.transferred)]
