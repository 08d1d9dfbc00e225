"""CostModel: seconds of a step of one instance, its memory, and the bytes it hands over.

A step is the slowest DP rank's own work, the experts in lockstep over all ranks, the exchanges between them and the
host. `step` returns it in parts whose sum is the total; `step_s` and `decode_s` return the same number quickly.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from twin.cost.batch import INDEX, Array, Extents, StepBatch, StepCost, features
from twin.cost.build import (
    Shared,
    Site,
    build_shared,
    build_stack,
    draft_model,
    expert_layout,
    gpus_of,
    helper_launches,
    resolve_protocol,
)
from twin.cost.collectives import Collective
from twin.cost.comm import Exchange
from twin.cost.defaults import default_efficiency
from twin.cost.deployments import Deployments, as_deployed, keys_of, load_deployments
from twin.cost.engines import Engine, engine_of, wide_engine_of
from twin.cost.evidence import Evidence
from twin.cost.graphs import Graphs
from twin.cost.interpolate import Interpolator
from twin.cost.interval import interval, plain
from twin.cost.memory import kv_block_bytes, memory_of
from twin.cost.network import Network, network_of
from twin.cost.overlap import Half, overlapped_s, shown_s
from twin.cost.protocols import Slows
from twin.cost.stack import Stack
from twin.policy.placement import Placement
from twin.spec.base import Source
from twin.spec.cluster import ClusterSpec
from twin.spec.errors import SpecError
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan
from twin.spec.results import Memory
from twin.spec.scenario import Routing

_CPU_RESERVED_BYTES = 300e6
_UNMEASURED: dict[str, Source] = {"host": "assumed", "engine": "calibrated"}
LIMITS = ("max_num_seqs", "max_batch_tokens", "chunk_tokens", "block_tokens", "kv_blocks", "memory_fraction")
_FIRST_AMOUNT = INDEX["tokens"]  # features from here on halve with the batch; those before are indicators


class CostModel:
    """Costs of one pool of a plan. `first_gpu` is where its (first) instance starts in its node group; `profile` is what
    was measured (Evidence shared by many models keeps its curves), None leaves everything to the roofline; `engine` replaces
    the plan's own. `alone` is the first rank by itself on its GPU, steps following one another without the host: what
    `benchmarks.step` runs.

    Raises SpecError for a group or protocol that does not exist; `memory()` raises Infeasible when the pool does not fit.
    """

    def __init__(self, model: ModelSpec, cluster: ClusterSpec, plan: Plan, pool: PoolPlan, *, routing: Routing | None = None,
                 profile: Evidence | Interpolator | None = None, seed: int = 0, network: Network | None = None,
                 first_gpu: int = 0, engine: Engine | None = None, alone: bool = False,
                 deployments: Deployments | None = None) -> None:
        self.model, self.cluster, self.plan, self.pool = model, cluster, plan, pool
        self.network = network or network_of(cluster)
        try:
            group = cluster.group(pool.node_group)
        except KeyError:
            raise SpecError(f"no node group {pool.node_group!r}", field="pool.node_group",
                            expected=", ".join(g.name for g in cluster.groups)) from None
        offset = sum(g.gpus for g in cluster.groups[: cluster.groups.index(group)])
        gpus = gpus_of(pool, self.network, offset + first_gpu)
        stated = engine
        engine = stated or engine_of(plan.engine)
        domains = len(np.unique(self.network.domain_of[gpus]))
        protocol = resolve_protocol(pool, engine, group.gpu, domains == 1)
        wide = pool.dp > 1 and protocol.name.startswith("deepep")
        if stated is None:  # fits are of deployments inside one node; what DeepEP's differ in is in `engines.py`
            engine = wide_engine_of(plan.engine, group.gpu) if wide else as_deployed(
                engine_of(plan.engine, group.gpu), keys_of(plan.engine, group.gpu, model, plan.precision, pool),
                deployments or load_deployments())
        shares = placement = None
        if model.moe is not None:
            shares, placement = expert_layout(model, pool, routing or Routing(), domains, seed)
        interpolator = profile.interpolator(group.gpu, cluster.network, plan) if isinstance(profile, Evidence) else profile
        self.site = Site(model, pool, plan.precision, engine, group.gpu, self.network, gpus, default_efficiency(group.gpu),
                         protocol, shares, placement, interpolator, alone)
        self.extents = Extents.of(model, pool.mtp_draft_tokens)
        self._limit(pool)

    def _limit(self, pool: PoolPlan) -> None:
        by_itself = pool.world == 1 or self.site.alone  # with others it would have to agree on a graph, prompts or none
        prompts = by_itself and self.site.gpu.kind == "gpu" and not pool.tbo and not self.holds_mtp
        self.graphs = Graphs.of(self.site.engine, pool, prompts=prompts)
        self._memory: Memory | None = None

    # --- compiled stacks, built when first asked for
    @cached_property
    def _shared(self) -> Shared:
        return build_shared(self.site)

    @cached_property
    def _stack(self) -> Stack:
        return build_stack(self.site, self._shared, self.model)

    @cached_property
    def _stack_beside_comm(self) -> Stack:
        """The stack while communication kernels hold their SMs (two-batch overlap)."""
        if self._slows is not None:
            return build_stack(self.site, self._shared, self.model, slows=self._slows)
        taken = (self.site.engine.tbo_waits_sms or self.site.protocol.comm_sms) / self.site.gpu.sm_count
        return build_stack(self.site, self._shared, self.model, compute_share=max(0.1, 1.0 - taken)) if taken else self._stack

    @property
    def _slows(self) -> Slows | None:
        """What kernels take beside exchanges, by family, where it was measured."""
        return None if self.site.engine.tbo_waits_sms else self.site.protocol.slows

    @property
    def _slower(self) -> float:
        """How many times as long kernels take beside exchanges than `_stack_beside_comm` says."""
        engine = self.site.engine
        return self._slows.others if self._slows else 1.0 if engine.tbo_waits_sms else engine.tbo_compute_slowdown

    @cached_property
    def holds_mtp(self) -> bool:
        """Whether ranks hold the model's MTP module: where any pool drafts with it, prompts need its KV in all of them."""
        return self.model.mtp_layers > 0 and any(pool.mtp_draft_tokens for pool in (*self.plan.pools, self.pool))

    @cached_property
    def _drafts(self) -> Stack | None:
        if not (self.pool.mtp_draft_tokens or self.holds_mtp):
            return None
        return build_stack(self.site, self._shared, draft_model(self.model), draft=True)

    def limited(self, plan: Plan, pool: PoolPlan) -> CostModel:
        """A pool of another plan that differs from this one in nothing but `LIMITS`: what was compiled for this serves it too."""
        other = copy.copy(self)
        for of_plan in ("holds_mtp", "_drafts"):
            other.__dict__.pop(of_plan, None)
        other.plan, other.pool, other.site = plan, pool, replace(self.site, pool=pool)
        other._limit(pool)
        return other

    def relaid(self, popularity_LE: Array, placement: Placement) -> CostModel:
        """The same pool with experts of another popularity, placed otherwise."""
        other = copy.copy(self)
        for compiled in ("_shared", "_stack", "_stack_beside_comm", "_drafts"):
            other.__dict__.pop(compiled, None)
        other.site = replace(self.site, popularity_LE=popularity_LE, placement=placement)
        return other

    # --- steps
    def step(self, batch: StepBatch) -> StepCost:
        """Seconds of one step by part, with sources and an 80% interval. `batch` holds arrays over DP ranks, [d], or
        [1] where all ranks do the same."""
        x = self._features(batch)[None]
        tbo = bool(self._overlaps(x)[0])
        stack = self._stack_beside_comm if tbo else self._stack
        parts = dict(stack.parts(_halved(x)[0] if tbo else x[0]))
        if tbo:
            parts = self._two_halves(parts, stack.half(_halved(x)), x)
        elif self.site.engine.shared_overlap and stack.exchanges:
            parts["overlap/shared_experts"] = -float(np.minimum(stack.shared_s(x), stack.streams(x).comm)[0])
        if self._drafts is not None:
            draft_s = float(self._draft_s(batch)[0])
            parts |= {"mtp/draft": draft_s} if draft_s else {}
        device_s = sum(parts.values())
        slower = float(self._slowdown(x)[0]) - 1.0
        if slower:
            parts["engine/slowdown"] = slower * device_s
            device_s += parts["engine/slowdown"]
        if not self.site.alone:
            parts["host/overhead"] = float(self._host_s(batch)[0])
        launch_s = float(self._launch_s(x, np.array([device_s]), np.array([tbo]))[0])
        if launch_s:
            parts["host/launch"] = launch_s
        total_s = float(sum(parts.values()))
        known = stack.evidence()
        kept = {key: known.get(key) or plain(_UNMEASURED.get(key.split("/")[0], "roofline")) for key in parts}
        low_s, high_s = interval(parts, kept, self.site.engine.sum_spread)
        return StepCost(total_s, parts, {key: evidence.source for key, evidence in kept.items()}, low_s, high_s)

    def step_s(self, batch: StepBatch) -> float:
        """`step(batch).total_s` without the parts."""
        return float(self.steps_s(batch)[0])

    def decode_s(self, seqs: npt.ArrayLike, context: npt.ArrayLike) -> Array:
        """Seconds of many pure decode steps: `seqs` sequences with `context` tokens in all on each rank.

        Arrays [n] (all DP ranks alike) or [n, d] (each rank its own) -> [n].
        """
        seqs_n, context_n = np.broadcast_arrays(np.asarray(seqs, dtype=float), np.asarray(context, dtype=float))
        if seqs_n.ndim == 1:
            seqs_n, context_n = seqs_n[:, None], context_n[:, None]
        none = np.zeros(seqs_n.shape)
        return self.steps_s(StepBatch(seqs_n, context_n, none, none, none))

    def exchanged_tokens(self, batch: StepBatch) -> Array:
        """Tokens that each rank brings to the exchanges of a step, padding included: [..., d]."""
        return np.asarray(self._features(batch)[..., INDEX["tokens"]])

    def longer_s(self, batch: StepBatch, more_s: float) -> Array:
        """What steps [n, d] take longer when their exchanges take `more_s` longer in all, overlap hiding what it can: [n]."""
        if not self.pool.tbo and not self.site.engine.shared_overlap:
            prompts = (batch.prefill_tokens > 0).any(axis=-1)
            return np.asarray(more_s * np.where(prompts, self.site.engine.prefill_slowdown, 1.0))
        x = self._features(batch)
        x = x[None] if x.ndim == 2 else x
        longer, tbo = np.full(len(x), more_s), self._overlaps(x)
        if tbo.any():
            half = self._stack_beside_comm.half(_halved(x[tbo]))
            later = replace(half, dispatch=half.dispatch + more_s / 4, combine=half.combine + more_s / 4)
            longer[tbo] = self._overlapped_s(later, x[tbo]) - self._overlapped_s(half, x[tbo])
        if self.site.engine.shared_overlap and self._stack.exchanges and not tbo.all():
            shared_s, comm_s = self._stack.shared_s(x[~tbo]), self._stack.streams(x[~tbo]).comm
            longer[~tbo] -= np.minimum(shared_s, comm_s + more_s) - np.minimum(shared_s, comm_s)
        return longer * self._slowdown(x)

    @cached_property
    def tokens_per_step(self) -> float:
        """Tokens that a decoding sequence gains a step: itself and the drafts accepted in a row."""
        a, drafts = self.pool.mtp_acceptance, self.pool.mtp_draft_tokens
        return float(sum(a**i for i in range(drafts + 1)))

    def shown_exchanges_s(self, batch: StepBatch) -> tuple[float, float]:
        """What dispatch and combine add to a decode step: all of them, or what overlap does not hide."""
        x = self._features(batch)[None]
        if not self._overlaps(x)[0]:
            parts = self._stack.parts(x[0])
            found = [sum(s for key, s in parts.items() if key.startswith(f"moe/{name}/")) for name, _ in self.exchanges]
        else:
            engine = self.site.engine
            shown = shown_s(self._stack_beside_comm.half(_halved(x)), self.site.protocol, self._slower,
                            "staggered" if engine.tbo_staggered else "alternating")
            found = [float(seconds[0]) for seconds in shown]
        return (found[0], found[1]) if found else (0.0, 0.0)

    # --- inside a step
    def _features(self, batch: StepBatch) -> Array:
        prompts = np.any(batch.prefill_tokens)
        x = features(batch, self.extents, None if prompts else self.graphs.pad)
        if prompts:
            self.graphs.fill(x)
        if x.shape[-2] not in (1, self.pool.dp):
            raise SpecError(f"a batch of {x.shape[-2]} ranks for an instance of {self.pool.dp}", field="batch")
        return x

    def steps_s(self, batch: StepBatch) -> Array:
        """Seconds of many steps of any kind at once: arrays [n, d] -> [n]."""
        x = self._features(batch)
        x = x[None] if x.ndim == 2 else x
        tbo = self._overlaps(x)
        if tbo.all():
            device_s = self._overlapped_s(self._stack_beside_comm.half(_halved(x)), x)
        else:
            device_s = self._alone_s(x)
            if tbo.any():
                device_s[tbo] = self._overlapped_s(self._stack_beside_comm.half(_halved(x[tbo])), x[tbo])
        if self._drafts is not None:
            device_s = device_s + self._draft_s(batch)
        device_s = device_s * self._slowdown(x)
        return np.asarray(device_s + self._host_s(batch) + self._launch_s(x, device_s, tbo))

    def _alone_s(self, x: Array) -> Array:
        """Device seconds of steps [n] that run as one batch."""
        streams = self._stack.streams(x)
        device_s = streams.compute + streams.comm
        if self.site.engine.shared_overlap and self._stack.exchanges:
            device_s = device_s - np.minimum(self._stack.shared_s(x), streams.comm)
        return np.asarray(device_s)

    def _overlaps(self, x: Array) -> npt.NDArray[np.bool_]:
        """Which steps [n] run as two overlapped half batches: all ranks must have enough tokens to split."""
        if not (self.pool.tbo and self._stack.exchanges):
            return np.zeros(len(x), dtype=bool)
        return np.asarray(x[..., _FIRST_AMOUNT].min(axis=-1) >= max(self.pool.tbo_min_tokens, 2))

    def _overlapped_s(self, half: Half, x: Array) -> Array:
        """Seconds of steps [n] whose halves run side by side, in the engine's order of stages."""
        engine, protocol = self.site.engine, self.site.protocol
        with_prompts = overlapped_s(half, protocol, self._slower, "waiting" if engine.tbo_waits_sms else "alternating")
        if not engine.tbo_staggered:
            return with_prompts
        prompts = (x[..., INDEX["any_prefill"]] > 0).any(axis=-1)
        return np.where(prompts, with_prompts, overlapped_s(half, protocol, self._slower, "staggered"))

    def _two_halves(self, half_parts: dict[str, float], half: Half, x: Array) -> dict[str, float]:
        """Both halves' parts at their slowed rates, and what running them side by side saves."""
        slower, beside = self._slower, self.site.protocol.beside
        comm_keys = tuple(f"moe/{name}/" for name, _ in self._stack.exchanges)
        parts = {key: 2 * seconds * (beside if key.startswith(comm_keys) and not key.endswith("/wait") else slower)
                 for key, seconds in half_parts.items()}
        parts["overlap/tbo"] = float(self._overlapped_s(half, x)[0]) - sum(parts.values())
        return parts

    def _draft_s(self, batch: StepBatch) -> Array:
        """Seconds of drafting: one pass of the MTP module for every draft token, over the decoding sequences; the first one
        takes prompts along, where the model has a module (prompt look-up needs no KV of its own)."""
        assert self._drafts is not None
        extents = Extents(self.extents.window, self.extents.sparse, 0)
        seqs, context = np.atleast_2d(batch.decode_seqs), np.atleast_2d(batch.decode_context)
        none = np.zeros(seqs.shape)

        def passes(tokens: StepBatch) -> Array:
            assert self._drafts is not None
            streams = self._drafts.streams(features(tokens, extents))
            return np.asarray((streams.compute + streams.comm) * ((tokens.decode_seqs + tokens.prefill_tokens).sum(axis=-1) > 0))

        drafts = self.pool.mtp_draft_tokens
        if not (self.holds_mtp and np.any(batch.prefill_tokens)):
            return drafts * passes(StepBatch(seqs, context, none, none, none)) if drafts else np.zeros(len(seqs))
        prompts = [np.atleast_2d(part) for part in (batch.prefill_tokens, batch.prefill_context, batch.prefill_seqs)]
        if not drafts:
            return passes(StepBatch(none, none, *prompts))
        first = passes(StepBatch(seqs, context, *prompts))
        return first + (drafts - 1) * passes(StepBatch(seqs, context, none, none, none))

    def _host_s(self, batch: StepBatch) -> Array:
        """Host time that the GPU waits for: fixed, and per sequence of the busiest rank. [n]"""
        seqs = np.atleast_2d(np.asarray(batch.decode_seqs) + np.asarray(batch.prefill_seqs))
        engine = self.site.engine
        if self.site.alone:
            return np.zeros(seqs.shape[:-1])
        decoding = np.atleast_2d(np.asarray(batch.decode_seqs)).max(axis=-1) if self.pool.mtp_draft_tokens else 0.0
        return np.asarray(engine.step_host_s + engine.seq_host_s * seqs.max(axis=-1) + engine.draft_seq_host_s * decoding)

    def _slowdown(self, x: Array) -> Array:
        """Device time over the sum of operators, which differ where a step holds prompts: [n, d, f] -> [n]."""
        engine = self.site.engine
        prompts = (x[..., INDEX["any_prefill"]] > 0).any(axis=-1)
        decode = np.full(prompts.shape, engine.decode_slowdown)
        if engine.few_rows and self.pool.world == 1:
            rows, factors = (np.array(column, dtype=float) for column in zip(*engine.few_rows, strict=True))
            tokens = np.maximum(x[..., INDEX["tokens"]].max(axis=-1), 1.0)
            few = np.interp(np.log2(tokens), np.log2(rows), factors)
            decode = decode * np.where(tokens <= rows[-1], few, 1.0)
        return np.where(prompts, engine.prefill_slowdown, decode)

    def _launch_s(self, x: Array, device_s: Array, tbo: npt.NDArray[np.bool_]) -> Array:
        """What launching kernel by kernel adds where no CUDA graph covers the step and the GPU outruns the host. [n]"""
        if self.site.gpu.kind == "cpu":
            return np.zeros(len(x))  # the host is the device: launches are in the operators already
        covered = self.graphs.cover(x)
        if covered.all():
            return np.zeros(len(x))
        engine = self.site.engine
        launches = (self._stack.launches(x) + helper_launches(self.model, engine)) * (1 + tbo)
        eager_s = np.maximum(launches * engine.eager_launch_s - device_s, 0.0)
        return np.asarray(np.where(covered, 0.0, eager_s))

    @property
    def exchanges(self) -> tuple[tuple[str, Exchange], ...]:
        """Dispatch and combine of one MoE layer, named; empty where tokens stay on their rank."""
        return self._shared.exchanges

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """What TP groups sum and gather in a step."""
        return self._stack.collectives

    # --- memory and transfer
    def memory(self) -> Memory:
        """Bytes on the fullest rank. Raises Infeasible("memory") when the pool does not fit, saying by how much."""
        if self._memory is None:
            backend = self.site.protocol.name if self.site.exchanges_tokens else "none"
            engine = self.site.engine
            if self.site.gpu.kind == "cpu":  # a process, no GPU context
                engine = replace(engine, reserved_bytes=_CPU_RESERVED_BYTES)
            self._memory = memory_of(self.model, self.plan.precision, self.pool, engine, self.site.gpu.hbm_bytes, backend,
                                     mtp=self.holds_mtp)
        return self._memory

    @property
    def kv_blocks_per_rank(self) -> int:
        """KV blocks of one DP rank (its TP ranks hold their heads of the same blocks)."""
        return self.memory().kv_blocks

    def kv_transfer_bytes(self, tokens: int) -> float:
        """Bytes that one request of `tokens` prompt tokens hands over, in this pool's layout: all TP ranks together, GQA
        heads replicated where TP exceeds them (each rank sends what it holds), MLA's latent once; an MTP module's layer goes
        along."""
        per_token = kv_block_bytes(self.model, self.plan.precision, self.pool, mtp=self.holds_mtp) / self.pool.block_tokens
        copies = 1 if self.model.attention.kind == "mla" else self.pool.tp
        return tokens * per_token * copies + self.model.state_elements * 4.0


def _halved(x: Array) -> Array:
    """One of two equal micro-batches: amounts halve, indicators stay (each half reads weights and launches kernels)."""
    half = x.copy()
    half[..., _FIRST_AMOUNT:] *= 0.5
    return half
