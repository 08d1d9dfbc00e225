"""From the words to compiled stacks: where ranks sit, which protocol they use, what their tables are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from twin.cost.batch import Array
from twin.cost.collectives import tp_collectives
from twin.cost.comm import Exchange, Reach, compile_exchange, loads_of
from twin.cost.engines import OUR_ENGINE, WIDE_LATE_PROMPTS, Engine
from twin.cost.experts import ExpertCost, ExpertWork, expert_cost, expert_work, measured_expert_cost
from twin.cost.interpolate import Interpolator
from twin.cost.measured import Ask, Measured, RowTable, split_measured
from twin.cost.network import Ints, Network
from twin.cost.operators import Slice, copies, gemm, joined, rank_ops
from twin.cost.protocols import ALONE, PROTOCOLS, Phase, Protocol, Slows
from twin.cost.roofline import Efficiency, Op, OpTable, bytes_of, product_dtype
from twin.cost.routing import place, popularity, slot_shares, touch_probability, typical_max
from twin.cost.small import split_small
from twin.cost.stack import Stack
from twin.policy.placement import Placement, linear, slots_to_ranks
from twin.spec.cluster import GpuSpec
from twin.spec.errors import SpecError
from twin.spec.model import ModelSpec
from twin.spec.plan import PoolPlan, Precision
from twin.spec.scenario import Routing

_USUAL_TOKENS = {"prefill": 8192, "decode": 128}  # of a DP rank, by which the noise of an exchange is taken
_INTRICATE = 3  # times the small kernels of a plain attention block
_CPU_LAUNCH_S = 13.65e-6  # an operator's dispatch, where the host is the device


@dataclass(frozen=True)
class Site:
    """One pool of one model on one cluster: all that stacks are built from. `alone`: the first rank by itself on its GPU,
    with a mean share of the experts' work, and local copies for exchanges."""

    model: ModelSpec
    pool: PoolPlan
    precision: Precision
    engine: Engine
    gpu: GpuSpec
    network: Network
    gpus_R: Ints
    efficiency: Mapping[str, Efficiency]
    protocol: Protocol
    popularity_LE: Array | None
    placement: Placement | None
    profile: Interpolator | None
    alone: bool = False

    @property
    def exchanges_tokens(self) -> bool:
        """Whether tokens travel to experts. Under TP alone all ranks hold all tokens: engines that keep them so sum the
        experts' partial results in the all-reduce instead."""
        return self.pool.dp > 1 or (self.pool.ep > 1 and not self.engine.tp_reduces_experts)

    @cached_property
    def share_LS(self) -> Array:
        """Share of the pairs by slot, as the engine uses replicas: [L, S]."""
        assert self.popularity_LE is not None and self.placement is not None
        return slot_shares(self.popularity_LE, self.placement, split=self.engine.splits_replicas)

    @cached_property
    def work(self) -> ExpertWork:
        """What experts do, over the instance's tokens."""
        assert self.popularity_LE is not None and self.placement is not None
        splits = self.engine.splits_replicas and self.pool.ep > 1
        return expert_work(self.model, self.placement, self.popularity_LE, self.share_LS if splits else None, self.pool.world)

    @property
    def share_LR(self) -> Array:
        """Share of the pairs by EP rank: [L, R]."""
        assert self.placement is not None
        return slots_to_ranks(self.share_LS, self.placement)

    @property
    def wide(self) -> bool:
        """Whether DP ranks exchange tokens through DeepEP, across nodes or inside one."""
        return self.pool.dp > 1 and self.protocol.name.startswith("deepep")

    @property
    def launch_s(self) -> float:
        """Seconds from one kernel to the next: inside a CUDA graph, or on a CPU the operator's own dispatch."""
        return _CPU_LAUNCH_S if self.gpu.kind == "cpu" else self.engine.graph_launch_s


def gpus_of(pool: PoolPlan, network: Network, first: int) -> Ints:
    """GPUs of an instance that starts at GPU `first`: ranks follow one another. Raises SpecError past the end."""
    last = first + pool.world
    if last > network.gpus:
        raise SpecError(f"an instance of {pool.world} GPUs does not fit a cluster of {network.gpus}", field="pool.dp",
                        expected=f"dp x tp <= {network.gpus - first}")
    return np.arange(first, last, dtype=np.int64)


def resolve_protocol(pool: PoolPlan, engine: Engine, gpu: GpuSpec, one_domain: bool) -> Protocol:
    """The all-to-all that `comm` names, or the engine's default for where the ranks sit and what the pool does."""
    if pool.comm != "auto":
        return PROTOCOLS[pool.comm]
    if gpu.kind == "cpu":
        return PROTOCOLS["gloo"]
    if one_domain and pool.role != "prefill" and engine.comm_nvlink == "deepep_normal":
        return PROTOCOLS[engine.comm_decode]
    if one_domain:
        return PROTOCOLS[engine.comm_nvlink]
    return PROTOCOLS[engine.comm_decode if pool.role == "decode" else engine.comm_prefill]


def expert_layout(model: ModelSpec, pool: PoolPlan, routing: Routing, domains: int, seed: int) -> tuple[Array, Placement]:
    """Popularity [L, E] and the placement of experts over EP ranks. A search asks for the same few again and again."""
    alike = PoolPlan(role="mixed", dp=pool.ep, ep=pool.ep, redundant_experts=pool.redundant_experts, placement=pool.placement)
    return _layout(model, alike, routing, domains, seed)


@lru_cache(maxsize=64)
def _layout(model: ModelSpec, pool: PoolPlan, routing: Routing, domains: int, seed: int) -> tuple[Array, Placement]:
    shares = popularity(model, routing, seed)
    return shares, place(model, pool, shares, domains)


def draft_model(model: ModelSpec) -> ModelSpec:
    """The MTP module as a model of one layer: full attention and, where the model has experts, an MoE FFN."""
    return model.model_copy(update={"layers": 1, "layer_attention": ("full",), "mtp_layers": 0,
                                    "layer_ffn": ("moe",) if model.moe is not None else ("dense",)})


@dataclass(frozen=True)
class Shared:
    """What all stacks of a site share: how expert work grows with tokens, and the exchanges of one layer."""

    work: ExpertWork | None
    exchanges: tuple[tuple[str, Exchange], ...]


def build_shared(site: Site) -> Shared:
    """Compile what does not depend on the GPU's rates."""
    model = site.model
    if model.moe is None or not model.moe_layers:
        return Shared(None, ())
    assert site.popularity_LE is not None and site.placement is not None
    names = ("dispatch", "combine") if site.pool.ep > 1 else ("all_gather", "reduce_scatter")
    work = site.work
    if site.alone:
        return Shared(replace(work, pairs_max=work.pairs_mean), ())
    found = [(name, exchange) for name, exchange in zip(names, exchanges(site), strict=True) if exchange is not None]
    return Shared(work, tuple(found))


def build_stack(site: Site, shared: Shared, model: ModelSpec, *, compute_share: float = 1.0, slows: Slows = ALONE,
                draft: bool = False) -> Stack:
    """Compile the layers of `model` (the site's own, or its MTP module), `slows` beside another half batch's exchanges."""
    s = Slice(model, site.precision, site.pool.tp)
    ops: list[Op] = rank_ops(s)
    if site.engine.name == OUR_ENGINE:
        ops += joined(s)
    if site.alone and site.pool.ep > 1:
        ops += copies(s)
    if draft:  # hidden state and embedding of the last token, joined
        ops.append(gemm("mtp/projection", s, 2 * model.hidden, model.hidden / site.pool.tp, 1))
    table = OpTable.of(ops, site.gpu, site.efficiency, site.launch_s, compute_share)
    counts = table.launch_counts
    if site.wide and site.engine.name != OUR_ENGINE:  # what fits of one-node deployments hold for others, DeepEP's pay here
        ops.append(Op("small", "elementwise", s.core_dtype, launches=round(helper_launches(model, site.engine) / model.layers),
                      layers=model.layers))
        table = OpTable.of(ops, site.gpu, site.efficiency, site.launch_s, compute_share)
    measured: list[Measured] = []
    if site.profile is not None:
        ops, small = split_small(ops, s, site.profile, site.pool) if site.engine.name == OUR_ENGINE else (ops, None)
        table = OpTable.of(ops, site.gpu, site.efficiency, site.launch_s, compute_share)
        attention, tp = model.attention, site.pool.tp
        ask = Ask(site.profile, attention, attention.heads / tp, -(-attention.kv_heads // tp), site.precision.kv,
                  0 if draft else site.pool.mtp_draft_tokens, compute_share, site.engine.mla_prefill == "module",
                  site.engine.products_scale if site.wide else 1.0,
                  site.gpu.sm_count if site.engine.name == OUR_ENGINE else 0)
        left, measured = split_measured(ops, ask, (table.compute, table.memory, table.launch))
        measured = [scaled(own, site.engine, slows) for own in (*measured, *([small] if small is not None else []))]
        table = OpTable.of(left, site.gpu, site.efficiency, site.launch_s, compute_share)
    experts = None if shared.work is None else _experts(site, shared.work, model, compute_share, slows)
    collectives = tp_collectives(model, site.precision, site.pool, site.network, site.gpus_R, site.profile,
                                 routed=site.exchanges_tokens and site.pool.ep > 1)
    slower = np.log(site.engine.collectives_scale)
    collectives = [replace(one, log_s=one.log_s + slower) for one in collectives]
    last = typical_max(site.pool.world) if shared.exchanges else 0.0
    late = WIDE_LATE_PROMPTS if site.wide and site.pool.role == "prefill" else 0.0
    share = late * last / max(len(shared.exchanges), 1)
    return Stack(table, tuple(measured), tuple(collectives), experts, shared.exchanges, model.moe_layers, counts,
                 site.engine.late_s * last, share, site.pool.dp, model.layers, output_share(model))


def helper_launches(model: ModelSpec, engine: Engine) -> float:
    """Small kernels of a pass that the operator table folds into others. Latent and linear attention split, join, copy and
    quantise several times what plain attention does."""
    linear = model.layer_attention.count("linear")
    layers = (model.layers - linear) * (1 if model.attention.kind == "gqa" else _INTRICATE) + linear * _INTRICATE
    return float(engine.helper_launches * layers)


def output_share(model: ModelSpec) -> float:
    """The part of the attention projections' work that comes after attention."""
    a = model.attention
    after = a.heads * a.v_head_dim * model.hidden
    if a.kind == "mla":
        assert a.kv_lora_rank and a.qk_nope_head_dim and a.qk_rope_head_dim
        q_in = a.q_lora_rank or model.hidden
        before = model.hidden * ((a.q_lora_rank or 0) + a.kv_lora_rank + a.qk_rope_head_dim)
        before += q_in * a.heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    else:
        before = model.hidden * (a.heads * a.head_dim + a.kv_heads * (a.head_dim + a.v_head_dim))
    return after / (after + before)


def scaled(own: Measured, engine: Engine, slows: Slows) -> Measured:
    """A measured operator as long as the engine takes for it, `slows` relative to all others."""
    if isinstance(own, RowTable):
        more = np.log(engine.products_scale * slows.products / slows.others)
        return replace(own, log_s=own.log_s + more, log_total=own.log_total + more)
    beside = np.log(slows.attention / slows.others)
    products = None if own.log_products is None else own.log_products + beside
    return replace(own, log_s=own.log_s + np.log(engine.attention_scale) + beside, log_products=products)


def _experts(site: Site, work: ExpertWork, model: ModelSpec, compute_share: float, slows: Slows) -> ExpertCost:
    rates = site.efficiency
    plain = expert_cost(work, model, site.precision, site.pool, site.gpu, rates.get("experts", rates["default"]),
                        rates.get("elementwise", rates["default"]), site.launch_s, model.moe_layers, compute_share)
    beside = np.log(slows.experts / slows.others)
    if site.profile is None:
        return replace(plain, log_gemm_s=plain.log_gemm_s + beside)
    more = np.log(site.engine.experts_scale) + beside
    assert site.popularity_LE is not None
    found = measured_expert_cost(work, model, site.precision, site.pool, site.profile,
                                 site.protocol.name if site.exchanges_tokens else "none", model.moe_layers,
                                 plain, compute_share, even=len(site.popularity_LE) == 1 and not site.alone,
                                 dtype=product_dtype(site.precision.experts, site.gpu),
                                 shared_kernels=site.gpu.fp4_flop_per_s is not None) or plain
    return replace(found, log_gemm_s=found.log_gemm_s + more, log_permute_s=found.log_permute_s + more)


@dataclass(frozen=True)
class Crossing:
    """Dispatch or combine of one MoE layer before it is compiled: whose tokens (`senders_Rd`: part of DP rank d's tokens
    that rank r sends) go how far (`reach`), at what size, by which protocol's phase."""

    name: str
    protocol: Protocol
    phase: Phase
    reach: Reach
    senders_Rd: Array
    token_bytes: float
    backwards: bool


def crossings(site: Site) -> tuple[Crossing, ...]:
    """Dispatch and combine of one MoE layer. Empty when all of an instance's tokens are where its experts are."""
    pool, model = site.pool, site.model
    if not site.exchanges_tokens:
        return ()
    assert model.moe is not None
    protocol = site.protocol if pool.ep > 1 else PROTOCOLS["ag_rs" if site.gpu.kind == "gpu" else "gloo"]
    # tokens of a DP rank are on all its TP ranks: each sends its part, once for every rank that shares an expert
    part = (1 if protocol.pattern == "rail_all" else pool.expert_tp) / pool.tp
    senders = np.repeat(np.eye(pool.dp), pool.tp, axis=0) * part
    reach = reach_of(site)
    scales = model.hidden / 128 * 4 if site.precision.dispatch == "fp8" else 0.0  # an fp32 scale for every 128 elements
    choices = 8.0 * model.moe.top_k  # an expert's number and weight for each choice
    out_bytes = model.hidden * bytes_of(site.precision.dispatch) + scales + choices
    back_bytes = model.hidden * (4.0 if site.precision.weights == "fp32" else 2.0)
    return (Crossing("dispatch", protocol, protocol.dispatch, reach, senders, out_bytes, False),
            Crossing("combine", protocol, protocol.combine, reach, senders, back_bytes, True))


def exchanges(site: Site) -> tuple[Exchange | None, Exchange | None]:
    """The crossings of one MoE layer, compiled; None, None without any."""
    found = crossings(site)
    loads = loads_of(found[0].protocol, found[0].reach, site.network, site.gpus_R, found[0].senders_Rd) if found else None
    made = [compile_exchange(c.protocol, c.phase, c.reach, site.network, site.gpus_R, c.senders_Rd, c.token_bytes, loads=loads,
                             backwards=c.backwards, hbm_bytes_per_s=site.gpu.hbm_bytes_per_s) for c in found]
    return (made[0], made[1]) if made else (None, None)


def reach_of(site: Site) -> Reach:
    """How a token's top-k spreads over ranks and domains. A rank is one of expert-TP that share an EP rank's experts, and
    receives its part of them: ranks of one EP rank count once between them for the traffic of one TP rank."""
    moe, pool = site.model.moe, site.pool
    assert moe is not None and site.placement is not None and site.popularity_LE is not None
    etp = pool.expert_tp
    even = np.full(moe.experts, 1.0 / moe.experts)
    slots = site.placement.slot_to_logical[0] if len(site.popularity_LE) == 1 else linear(
        1, moe.experts, pool.ep, pool.redundant_experts).slot_to_logical[0]
    ep_of_slot = np.arange(len(slots)) // (len(slots) // pool.ep)
    touch_ep = touch_probability(moe, even, slots, ep_of_slot, pool.ep)
    copies_ep = np.bincount(ep_of_slot, weights=(even / np.bincount(slots, minlength=moe.experts))[slots],
                            minlength=pool.ep) * moe.top_k
    domains, domain_of_rank = np.unique(site.network.domain_of[site.gpus_R], return_inverse=True)
    domain_of_ep = domain_of_rank[::etp][: pool.ep]
    touch_domain = touch_probability(moe, even, slots, domain_of_ep[ep_of_slot], len(domains))
    if len(site.popularity_LE) > 1:  # placements differ by layer; the skew says how uneven they leave ranks, their order does not
        touch_ep, copies_ep = np.full(pool.ep, touch_ep.mean()), np.full(pool.ep, copies_ep.mean())
        touch_domain = np.full(len(domains), touch_domain.mean()) if _alike(domain_of_ep) else touch_domain
    skew, skew_rail = _skews(site, domain_of_ep, len(domains))
    # each of the etp ranks of an EP rank takes 1 / etp of the senders' copies (`senders` counts them etp times)
    return Reach(np.repeat(copies_ep, etp) / etp, np.repeat(touch_ep, etp) / etp, touch_domain / etp, skew, skew_rail)


def _alike(domain_of_ep: Ints) -> bool:
    """Whether all domains hold as many EP ranks."""
    return len(np.unique(np.bincount(domain_of_ep))) == 1


def _skews(site: Site, domain_of_ep: Ints, domains: int) -> tuple[float, float]:
    """Most visited rank and domain relative to even routing, means over layers (touches, so that skew saturates). A rank's is
    more by the chance of routing in a usual batch: libraries' own tests time the average rank, a layer waits for the last."""
    assert site.placement is not None and site.popularity_LE is not None and site.model.moe is not None
    if len(site.popularity_LE) == 1:
        return 1.0, 1.0
    k = site.model.moe.top_k
    share_LR = site.share_LR
    share_LN = np.stack([share_LR[:, domain_of_ep == n].sum(axis=1) for n in range(domains)], axis=1)

    def excess(share: Array) -> float:
        touched = 1.0 - np.clip(1.0 - share, 0.0, 1.0) ** k
        return float(touched.max(axis=1).mean() / (1.0 - (1.0 - 1.0 / share.shape[1]) ** k))

    usual = np.array([float(_USUAL_TOKENS["prefill" if site.pool.role == "prefill" else "decode"] * site.pool.dp)])
    most = float((site.work.at(usual, site.work.pairs_max) / site.work.at(usual, site.work.pairs_mean))[0])
    chance = max(1.0, most / float((share_LR.max(axis=1) * share_LR.shape[1]).mean()))
    return max(1.0, excess(share_LR) * chance), max(1.0, excess(share_LN))
