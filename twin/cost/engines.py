"""What engines do around the kernels, as data: host time, CUDA graphs, memory kept back, overlap, default backends.

Numbers marked `assumed` are orders of magnitude from the engines' public descriptions; a profile measured by
`eptwin calibrate` replaces them for our own engine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from twin.cost.engine_fits import FITS, generation
from twin.policy.graphs import PROMPT_GRAPH_TOKENS, ladder, prompt_ladder
from twin.spec.base import Source
from twin.spec.cluster import GpuSpec
from twin.spec.errors import SpecError
from twin.spec.plan import CommBackend


@dataclass(frozen=True)
class Engine:
    """One engine's habits.

    step_host_s, seq_host_s: host seconds of a step that the GPU waits for, fixed and per running sequence; graph_launch_s,
    eager_launch_s: from kernel to kernel inside a CUDA graph, and what the host needs to launch one without; helper_launches:
    small kernels a layer (rotary, casts, indices) that the operator table folds into others; graph_sizes: batch sizes that
    graphs exist for (decode is padded up to the next), none where they follow the pool's most rows (`graphs`);
    prompt_graph_tokens: in an instance of one rank steps with prompts of at most so many tokens are graphs too, padded up to the
    next (`prompt_graphs`; 0: none are);
    reserved_bytes: context, libraries and graphs; ep_reserved_bytes: what wide EP with DP attention keeps on top (symmetric
    heap, workspaces of the worst-case batch); activation_factor: live activations in units of tokens x hidden;
    shared_overlap: shared experts run beside the all-to-all; tp_reduces_experts: under TP without DP, experts are summed in
    the all-reduce and no token travels; tbo_compute_slowdown: how much longer kernels take while the other half batch
    communicates (memory and cache are shared); late_s: spread (standard deviation) of when ranks arrive at an exchange, which
    all wait for the last of; tbo_staggered: halves of a decode step run two stages apart (`overlap.py`); tbo_waits_sms: SMs kept
    from kernels for exchanges that wait for all compute issued before (0: they do not wait); splits_replicas: tokens go to an
    expert's replicas so that ranks are even batch by batch (`twin.policy.replica_split`), else replicas are used alike;
    mla_prefill: which rows of a profile describe its latent attention in prefill (the kernel rows of SGLang time the absorbed
    kernel, which it does not serve prompts with);
    draft_seq_host_s: more host seconds per running sequence of a step that verifies drafts, where the engine's scheduler does
    not run ahead of the GPU then; frontend_s: what a request spends outside any step until its first token leaves (HTTP,
    tokenizer, queues); prefill_slowdown, decode_slowdown: device time of a step with prompts, or of decodes alone, over the
    sum of its operators; *_scale: what dense products, attention, experts and collectives take in the engine over what their
    profile says (other versions, inputs quantised elsewhere); few_rows: (rows, device time over the sum of operators)
    of a decode step of so few rows on a GPU that holds the whole model, where kernels are fused then; sum_spread: relative
    half width (80%) of steps over what their operators say, beyond what these vary by themselves.
    """

    name: str
    step_host_s: float
    seq_host_s: float
    graph_launch_s: float
    eager_launch_s: float
    helper_launches: int
    graph_sizes: tuple[int, ...]
    memory_fraction: float
    reserved_bytes: float
    ep_reserved_bytes: float
    activation_factor: float
    shared_overlap: bool
    tp_reduces_experts: bool
    comm_nvlink: CommBackend
    comm_prefill: CommBackend
    comm_decode: CommBackend
    tbo_compute_slowdown: float
    late_s: float
    mla_prefill: Literal["kernel", "module"]
    source: Source = "assumed"
    note: str = ""
    frontend_s: float = 0.02
    draft_seq_host_s: float = 0.0
    prefill_slowdown: float = 1.0
    decode_slowdown: float = 1.0
    products_scale: float = 1.0
    attention_scale: float = 1.0
    experts_scale: float = 1.0
    collectives_scale: float = 1.0
    tbo_staggered: bool = False
    tbo_waits_sms: int = 0
    few_rows: tuple[tuple[int, float], ...] = ()
    sum_spread: float = 0.0
    splits_replicas: bool = False
    prompt_graph_tokens: int = 0

    def graphs(self, most: int, drafts: int) -> tuple[int, ...]:
        """Rows that graphs exist for in a pool that decodes at most `most` sequences of 1 + `drafts` rows a step. SGLang and
        TensorRT-LLM count sequences when they capture, vLLM rows."""
        if not self.graph_sizes:
            return ladder(most * (1 + drafts))
        return self.graph_sizes if self.name == "vllm" else tuple(size * (1 + drafts) for size in self.graph_sizes)

    def prompt_graphs(self, most_tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens that graphs exist for, of prompts alone and beside decodes, in a pool of at most `most_tokens` a step."""
        if not self.prompt_graph_tokens:
            return (), ()
        most = min(most_tokens, self.prompt_graph_tokens)
        return prompt_ladder(most), prompt_ladder(most, each=2)


def _ladder(*parts: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(sorted({size for start, stop, step in parts for size in range(start, stop + 1, step)}))


# 1, 2, 4, 8, 16, 24, ... 256, then by 16 to 512: vLLM's default capture sizes (its documentation).
_VLLM_GRAPHS = _ladder((1, 2, 1), (4, 4, 1), (8, 256, 8), (272, 512, 16))
_SGLANG_GRAPHS = _ladder((1, 8, 1), (12, 32, 4), (40, 160, 8), (176, 256, 16), (288, 512, 32))
_TRTLLM_GRAPHS = _ladder((1, 2, 1), (4, 4, 1), (8, 128, 8), (256, 256, 1), (512, 512, 1), (1024, 1024, 1), (2048, 2048, 1))
_GIB = 2.0**30
OUR_ENGINE = "eptwin"

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (
    Engine("eptwin", step_host_s=0.3e-3, seq_host_s=6.3e-6, graph_launch_s=1.5e-6, eager_launch_s=50e-6, helper_launches=6,
           graph_sizes=(), memory_fraction=0.90, reserved_bytes=2 * _GIB, ep_reserved_bytes=0.0,
           activation_factor=16.0, shared_overlap=False, tp_reduces_experts=False,
           comm_nvlink="nccl", comm_prefill="nccl", comm_decode="nccl",
           tbo_compute_slowdown=1.1, late_s=5e-6, mla_prefill="kernel", splits_replicas=True,
           prefill_slowdown=1.055, decode_slowdown=1.02, sum_spread=0.05,
           few_rows=((1, 0.87), (2, 0.92), (4, 0.975), (8, 0.985), (16, 1.0)), prompt_graph_tokens=PROMPT_GRAPH_TOKENS,
           note="eager launch: Qwen3-30B's prompts of 100 tokens in bf16 on the hosts of several H200s, 35 to 58 us for each "
                "kernel counted (one is kept: h200_prompts_eager_bf16.json, 56); prefill_slowdown: the same model's prompts of "
                "4 x 4096 and 6 x 1800 tokens, 1.04 to 1.09; decode_slowdown: median over 8 steps of it and 6 of DeepSeek-R1's "
                "slices; "
                "graph sizes are the runtime's; scheduling, sampling and booking of a served step take 1.4 ms there at 177 "
                "sequences, taken as 0.3 and 6.3 us a sequence (h200_serve_azure512.json); few_rows: Qwen3-30B's steps of "
                "1,024 tokens over what they would take with decode_slowdown alone (h200_step_small_batches.json); sum_spread: "
                "of 14 steps that the profile had not seen; the rest assumed"),
    Engine("vllm", step_host_s=1.0e-3, seq_host_s=4e-6, graph_launch_s=2e-6, eager_launch_s=7e-6, helper_launches=6,
           graph_sizes=_VLLM_GRAPHS, memory_fraction=0.90, reserved_bytes=5 * _GIB, ep_reserved_bytes=12e9,
           activation_factor=24.0, shared_overlap=False, tp_reduces_experts=True,
           comm_nvlink="ag_rs", comm_prefill="deepep_normal", comm_decode="deepep_low_latency",
           tbo_compute_slowdown=1.05, late_s=25e-6, mla_prefill="module",
           note="default all-to-all is ag_rs; ep_reserved_bytes from its published free KV memory on H200"),
    Engine("sglang", step_host_s=0.5e-3, seq_host_s=2e-6, graph_launch_s=2e-6, eager_launch_s=6e-6, helper_launches=5,
           graph_sizes=_SGLANG_GRAPHS, memory_fraction=0.88, reserved_bytes=4 * _GIB, ep_reserved_bytes=4e9,
           activation_factor=24.0, shared_overlap=False, tp_reduces_experts=True,
           comm_nvlink="deepep_normal", comm_prefill="deepep_normal", comm_decode="deepep_low_latency",
           tbo_compute_slowdown=1.05, late_s=25e-6, mla_prefill="module",
           note="overlap scheduler; late_s and slowdown from layer times on 96 H100: exchanges take 0.13 ms "
                "a layer longer than alone; draft_seq_host_s from runs with and without drafts on 8 B200",
           draft_seq_host_s=0.10e-3, tbo_staggered=True),
    Engine("trtllm", step_host_s=0.5e-3, seq_host_s=2e-6, graph_launch_s=1.5e-6, eager_launch_s=5e-6, helper_launches=4,
           graph_sizes=_TRTLLM_GRAPHS, memory_fraction=0.90, reserved_bytes=4 * _GIB, ep_reserved_bytes=4e9,
           activation_factor=24.0, shared_overlap=True, tp_reduces_experts=True,
           comm_nvlink="symm", comm_prefill="deepep_normal", comm_decode="deepep_low_latency",
           tbo_compute_slowdown=1.05, late_s=25e-6, mla_prefill="kernel",
           note="overlap scheduler; one-sided NVLink all-to-all"),
)}


def engine_of(name: str, gpu: GpuSpec | None = None) -> Engine:
    """The engine of that name, as fitted on the GPU's generation where it was; on a CPU without what GPUs taught. Raises
    SpecError for one we do not know."""
    if name not in ENGINES:
        raise SpecError(f"unknown engine {name[:40]!r}", field="plan.engine", expected=", ".join(ENGINES))
    if gpu is not None and gpu.kind == "cpu":
        return replace(ENGINES[name], prefill_slowdown=1.0, decode_slowdown=1.0, few_rows=())
    fitted = FITS.get((name, generation(gpu)), {}) if gpu is not None else {}
    return replace(ENGINES[name], **fitted)  # type: ignore[arg-type]


# How ranks of DeepEP pools wait for one another. Prompts make them late: barriers of even loads take 12 to 13% of a layer in
# prefill, 2.1 ms of 12.6 at the dispatch without overlap (LMSYS, 2025-05; the median of nine barriers). In decode exchanges take
# what their bytes say, on 72 H100 as on 128 H800, where all of them crossed RDMA.
WIDE_LATE_PROMPTS = 0.06
# Kernels beside another half batch's exchanges, their missing SMs apart: a layer's take 1.22 to 1.36 times as long there in
# prefill, where 108 of 132 SMs alone would be 1.22 (the same layer times).
_WIDE_TBO_SLOWDOWN = 1.10


def wide_engine_of(name: str, gpu: GpuSpec) -> Engine:
    """The engine of a pool that exchanges tokens through DeepEP: its own, with fitted dense products (the same kernels run
    whatever the experts do) and nothing else of the fits inside one node."""
    fitted = FITS.get((name, generation(gpu)), {})
    return replace(engine_of(name), products_scale=fitted.get("products_scale", 1.0), late_s=0.0,
                   tbo_compute_slowdown=_WIDE_TBO_SLOWDOWN, draft_seq_host_s=0.0)
