"""One rank's equipment: groups, weights, cache and model, ready to take steps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from runtime.comm.experts import ExpertComm, graph_rows, make_expert_comm
from runtime.comm.group import Group, TensorGroup, make_group, solo
from runtime.comm.waiting import Waiting
from runtime.compiles import compiles
from runtime.kv import kv_shape, make_kv
from runtime.layout import RankLayout, layouts
from runtime.model.mtp import Mtp
from runtime.model.params import rank_params, with_mtp
from runtime.model.transformer import Mark, Rig, Transformer
from runtime.ops import ops_for
from runtime.options import EngineOptions
from runtime.progress import Progress
from runtime.quantise import quantise
from runtime.speculate import uses_mtp
from runtime.warmup import warm_up
from runtime.weights import Kept, load_weights
from twin.policy import placement as policy
from twin.spec.errors import SpecError
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan

if TYPE_CHECKING:
    from runtime.decode import DecodeRunner
    from runtime.few_rows import FewRows
    from runtime.prompts import PromptRunner

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CPU_KV_SHARE = 0.25
"""Share of a machine's free memory that the KV caches of all its CPU ranks together may take unasked."""


@dataclass(frozen=True)
class Groups:
    """`control` carries plans between hosts' processors (gloo), `experts` weights beside the steps where experts move;
    `instance` and `tp` carry tensors."""

    control: Group
    instance: Group
    tp: Group
    experts: Group | None = None


@dataclass(frozen=True)
class Rank:
    """Everything that a step needs. `kv_blocks` and `max_context` are the same on all ranks of an instance; `decode` runs
    steps of decodes alone from graphs, where it is there, which it is on all of them or on none; `prompts` runs steps with
    prompts from graphs, where it is there and has one; `mtp` drafts, with the last of `kv` as its cache; `prepared` says what
    was tuned and compiled at the start (`runtime.tune`, `runtime.warmup`);
    `progress` is there where KV leaves while its prompt is computed."""

    model: ModelSpec
    pool: PoolPlan
    at: RankLayout
    groups: Groups
    experts: ExpertComm
    transformer: Transformer
    kv: list[torch.Tensor]
    kv_blocks: int
    max_context: int
    device: torch.device
    dense_bytes: int
    expert_bytes: int
    placement: list[list[int]] | None = None
    decode: DecodeRunner | None = None
    prompts: PromptRunner | None = None
    mtp: Mtp | None = None
    prepared: dict[str, Any] = field(default_factory=dict)
    progress: Progress | None = None

    def keep(self) -> Kept | None:
        """Its weights for another formation; None where they are not as they were loaded (fp8)."""
        params = self.transformer.params
        as_loaded = not any(name.endswith(".scale") for name in params)
        return Kept(rank_params(self.model, self.at, self.placement, mtp=self.mtp is not None), params) if as_loaded else None

    @property
    def over_ranks(self) -> tuple[object, object]:
        """What reaches over to other ranks: see `runtime.comm.waiting`."""
        return self.experts, self.transformer.rig.tp

    @property
    def kv_bytes(self) -> int:
        return sum(cache.numel() * cache.element_size() for cache in self.kv)


def _device(options: EngineOptions, rank: int) -> torch.device:
    """Where a rank computes; ranks share GPUs where there are fewer."""
    if options.device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if not count:
        raise SpecError("this machine has no CUDA device that torch can use", field="device", expected="an NVIDIA GPU",
                        hint="--device cpu runs on any machine")
    return torch.device("cuda", rank % count)


def build_rank(model: ModelSpec, plan: Plan, options: EngineOptions, rank: int, mark: Mark, kept: Kept | None = None) -> Rank:
    """Set a rank up. In a world of more than one, every rank must call this with torch.distributed initialised.

    `kept` are weights from a former formation: what is needed again is not loaded again.
    Raises SpecError when weights are not as they should be or nothing is left for the cache.
    """
    compiles.starting()
    everyone = layouts(plan, model)
    at = everyone[rank]
    pool = plan.pools[at.pool]
    device = _device(options, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # chosen by index, not by hiding the others: peers address one another's memory
    groups = _groups(everyone, at, options, moves=any(one.eplb is not None for one in plan.pools))
    experts = make_expert_comm(pool.comm, groups.instance, at, device=options.device,
                               fp8=plan.precision.dispatch == "fp8", timeout_s=options.start_timeout_s)
    placement, mtp = place(model, pool), uses_mtp(plan, model)
    cached = with_mtp(model) if mtp else model
    dtype = DTYPES[options.dtype]
    mark("load")
    checkpoint = Path(options.checkpoint) if options.checkpoint else None
    params = load_weights(model, at, checkpoint=checkpoint, seed=options.seed, dtype=dtype, device=device, mtp=mtp,
                          placement=placement, kept=kept)
    params = quantise(params) if options.weights == "fp8" else params
    most = pool.max_num_seqs * (1 + pool.mtp_draft_tokens)
    progress = Progress() if pool.role == "prefill" and options.kv_send in ("chunk", "layer") else None
    rig = Rig(ops_for(options.backend), tensor_group(model, pool, groups.tp, options, device, most), experts, mark,
              progress.layer if progress is not None and options.kv_send == "layer" else None)
    transformer = Transformer(model, at, params, rig, placement)
    blocks = _kv_blocks(cached, pool, at, options, device, groups.control, len(everyone))
    cap = options.max_context or model.max_context
    held = {kind: sum(p.numel() * p.element_size() for name, p in params.items() if (".experts." in name) == kind)
            for kind in (False, True)}
    kv = make_kv(cached, at, blocks, pool.block_tokens, dtype, device)
    max_context = min(cap, model.max_context, blocks * pool.block_tokens)
    for ffn in transformer.moe_layers:  # before any step is captured
        ffn.replicas.may_move = pool.eplb is not None and at.ep > 1
        if (options.record_routing or "").endswith(".json"):
            ffn.count_pairs()
    rows = min(graph_rows(experts, most) if model.moe is not None else most, held_rows(rig.tp, most))
    if options.backend == "triton":
        compiles.listen()
    built = Rank(model, pool, at, groups, experts, transformer, kv, blocks, max_context, device, held[False], held[True],
                 placement, mtp=Mtp(transformer, params, placement) if mtp else None, progress=progress)
    if device.type == "cuda" and options.backend == "triton" and options.graphs and rows:
        mark("capture")
        built = _with_graphs(built, rows, tuned=options.tune)
    if device.type == "cuda" and options.backend == "triton" and options.warm_up:
        mark("warm-up")
        built.prepared["warm_up"] = warm_up(built)
    built.prepared["device_allocs"] = device_allocs(device)
    compiles.started()
    return built


def device_allocs(device: torch.device) -> int:
    """How often memory was asked of the device, which stops it each time; 0 on a CPU."""
    return int(torch.cuda.memory_stats(device).get("num_device_alloc", 0)) if device.type == "cuda" else 0


def _with_graphs(rank: Rank, rows: int, *, tuned: bool) -> Rank:
    """The rank with kernels chosen for small steps and graphs of decodes of up to `rows` rows, on all ranks of the instance at
    once, and of steps with prompts where it is alone; `prepared` says what was timed."""
    from runtime.decode import DecodeRunner  # needs triton, which a CPU does not
    from runtime.few_rows import FewRowsOps
    from runtime.prompts import PromptRunner
    from runtime.tune import confirm, tune

    pool, ops, alone = rank.pool, rank.transformer.rig.ops, rank.at.world == 1
    decode = DecodeRunner(rank.transformer, rank.kv, pool.block_tokens, max_context=rank.max_context, most=rows,
                          halve_from=pool.tbo_min_tokens if pool.tbo else None)
    if isinstance(ops, FewRowsOps):
        ops.few = _table()
    if tuned:
        tune(rank.transformer, decode.sizes)
    decode.capture()
    steps = confirm(decode) if tuned and alone else {}
    parts = [*ops.few.report(), *ops.products.report()] if isinstance(ops, FewRowsOps) else []
    prepared = {"parts": parts, "steps_s": {str(size): pair for size, pair in steps.items()}}
    # ranks that step together would have to agree on sizes; halves, layers that leave early and drafts are steps of their own
    if not alone or pool.tbo or pool.role == "decode" or rank.mtp is not None or rank.progress is not None:
        return replace(rank, decode=decode, prepared=prepared)
    began = time.monotonic()
    prompts = PromptRunner(rank.transformer, rank.kv, pool.block_tokens, most=pool.max_step_tokens, sequences=pool.max_num_seqs,
                           decodes=rows, max_context=rank.max_context)
    prompts.capture()
    prepared["prompt_graphs"] = {"graphs": len(prompts.graphs), "seconds": time.monotonic() - began}
    return replace(rank, decode=decode, prompts=prompts, prepared=prepared)


def tensor_group(model: ModelSpec, pool: PoolPlan, group: Group, options: EngineOptions, device: torch.device,
                 rows: int) -> TensorGroup:
    """What makes tensors of TP ranks whole: through symmetric memory between CUDA devices, in steps of up to `rows` rows."""
    if group.size == 1 or device.type != "cuda" or pool.comm not in ("auto", "symm"):
        return group
    from runtime.comm.reduce import Room, SymmetricGroup  # which need triton
    from runtime.comm.symm import share_memory

    room = Room(rows, max(model.hidden, -(-model.vocab // group.size)) * DTYPES[options.dtype].itemsize)
    sharers = -(-dist.get_world_size() // torch.cuda.device_count())  # all ranks are on this machine
    return SymmetricGroup(group, lambda size: share_memory(group.pg, group.size, size, device), room, device,
                          Waiting(group.ranks, options.start_timeout_s), sharers)


def held_rows(tp: TensorGroup, most: int) -> int:
    """Of steps of up to `most` rows, how many one may have whose tensors become whole without the host."""
    room = getattr(tp, "room", None)
    return most if tp.size == 1 else room.held_rows if room is not None else 0


@cache
def _table() -> FewRows:
    """What this process has timed, whatever formation it is in."""
    from runtime.few_rows import FewRows

    return FewRows()


def place(model: ModelSpec, pool: PoolPlan) -> list[list[int]] | None:
    """Slot -> expert of every MoE layer, before any load was seen: replicas go where even loads want them."""
    if model.moe is None:
        return None
    layers, experts = model.moe_layers, model.moe.experts
    slots = experts + pool.redundant_experts
    if pool.placement == "linear":
        found = policy.linear(layers, experts, pool.ep, pool.redundant_experts)
    elif pool.placement == "eplb_global":
        found = policy.place_global(np.ones((layers, experts)), slots, pool.ep)
    else:
        found = policy.place_hierarchical(np.ones((layers, experts)), slots, pool.ep, 1, model.moe.groups)
    rows: list[list[int]] = found.slot_to_logical.tolist()
    return rows


def _groups(everyone: list[RankLayout], at: RankLayout, options: EngineOptions, *, moves: bool) -> Groups:
    """Make every group of the world, in one order, and keep this rank's."""
    mine: dict[tuple[str, int], Group] = {}
    # NCCL refuses two ranks on one GPU; gloo carries what symmetric memory does not (see docs/ep.md on sharing a GPU)
    own_gpu = options.device == "cuda" and torch.cuda.device_count() >= len(everyone)
    backend = "nccl" if own_gpu else "gloo"

    def groups_of(kind: str, ranks_of: Callable[[RankLayout], list[int]], how: str) -> Group:
        for ranks in sorted({tuple(ranks_of(one)) for one in everyone}):
            group = make_group(ranks, at.rank, options.patience_s, how) if len(ranks) > 1 else solo(ranks[0])
            mine[kind, ranks[0]] = group
        return mine[kind, ranks_of(at)[0]]

    control = groups_of("control", lambda one: one.instance_ranks, "gloo")
    instance = control if backend == "gloo" else groups_of("instance", lambda one: one.instance_ranks, backend)
    whole = all(one.tp == one.world for one in everyone)
    tp = instance if whole else groups_of("tp", lambda one: one.tp_ranks, backend)
    experts = groups_of("experts", lambda one: one.instance_ranks, "gloo") if moves else None
    return Groups(control, instance, tp, experts)


def _kv_blocks(model: ModelSpec, pool: PoolPlan, at: RankLayout, options: EngineOptions, device: torch.device,
               control: Group, world: int) -> int:
    """Blocks of this instance's ranks: what the plan says, or what memory allows up to what requests could fill."""
    if pool.kv_blocks is not None:
        return pool.kv_blocks
    element = DTYPES[options.dtype].itemsize
    block_bytes = model.layers * element * int(np.prod(kv_shape(model, at, 1, pool.block_tokens)))
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = free - total * (1 - pool.memory_fraction)
    else:
        budget = _free_memory_bytes() * _CPU_KV_SHARE / world
    context = min(options.max_context or model.max_context, model.max_context)
    wanted = pool.max_num_seqs * -(-context // pool.block_tokens)
    possible = int(min(wanted, budget // block_bytes))
    agreed = int(control.all_gather(torch.tensor([possible])).min())
    if agreed < 1:
        raise SpecError("no memory is left for the KV cache", field=f"pools.{at.pool}.memory_fraction",
                        hint="shorten max_context, give kv_blocks or spread the model over more ranks")
    return agreed


def _free_memory_bytes() -> int:
    """What the machine could still give without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def expert_load(rank: Rank) -> list[list[int]]:
    """Tokens that this rank routed to every expert [moe layers][experts] since its start."""
    return [ffn.load_E.tolist() for ffn in rank.transformer.moe_layers]


def param_count(model: ModelSpec, at: RankLayout) -> int:
    """Elements that a rank holds, replicas and slack not counted twice."""
    return sum(int(np.prod(param.shape)) for param in rank_params(model, at))


def world_rank() -> int:
    """This process's global rank, also outside torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
