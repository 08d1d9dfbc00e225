"""Our own engine's small kernels, each by its name, where its profile has measured them; other engines keep the roofline.

The operator table folds what lies between products into a line or two, as every engine fuses it its own way. Ours runs: an
addition with its norm twice a layer, queries and keys turned into the cache in one kernel, an activation between two
products, in fp8 a quantisation before every product, latent attention's down projections one by one, and a router of a
product and a top-k. All take as long as a rank has tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from twin.cost.batch import INDEX
from twin.cost.interpolate import Interpolator
from twin.cost.measured import ROWS, Evidence, RowTable, evidence_of
from twin.cost.operators import Slice
from twin.cost.roofline import Op
from twin.spec.plan import PoolPlan

_TYPICAL = 128.0  # tokens at which the interval is read
_REPLICA_SPLIT_S = 9.6e-6
"""The split of a batch over redundant experts where a profile lacks it: two kernels, as the H200's own profile has them for 128
tokens, 256 experts and 288 slots over 32 ranks. Replicas that share ranks take a round each: 24.5 us with 32 on three ranks."""
_ASSUMED_WIDTH = float(np.log(1.6))


@dataclass(frozen=True)
class Kernel:
    """One kernel that runs `times` a step, over tokens. `assumed_s`: what one takes where the profile does not have it."""

    key: str
    operator: str
    fixed: Mapping[str, float]
    times: int
    dtype: str = "bf16"
    assumed_s: float | None = None


@dataclass(frozen=True)
class Group:
    """Kernels that stand together for the operators that `folded` picks."""

    folded: Callable[[Op], bool]
    kernels: tuple[Kernel, ...]


def split_small(ops: Sequence[Op], s: Slice, profile: Interpolator, pool: PoolPlan) -> tuple[list[Op], RowTable | None]:
    """Operators that no small kernels stand for, and the kernels' table; None where the profile has none of them."""
    left, keys, rows, known = list(ops), [], [], []
    for group in groups_of(s, pool):
        curves = [(kernel, profile.curve(kernel.operator, kernel.fixed, {"dtype": kernel.dtype})) for kernel in group.kernels]
        if any(curve is None and kernel.assumed_s is None for kernel, curve in curves) or not any(map(group.folded, left)):
            continue  # not measured; or another group stands for it
        left = [op for op in left if not group.folded(op)]
        for kernel, curve in curves:
            seconds = np.full(len(ROWS), kernel.assumed_s) if curve is None else curve.many(ROWS)
            keys.append(kernel.key)
            rows.append(np.log(seconds * kernel.times))
            known.append(Evidence("assumed", _ASSUMED_WIDTH) if curve is None else evidence_of(curve, _TYPICAL))
    if not rows:
        return left, None
    each = np.stack(rows)
    evidence: tuple[Evidence, ...] = tuple(known)
    return left, RowTable(INDEX["tokens"], tuple(keys), each, np.log(np.exp(each).sum(axis=0)), evidence)


def groups_of(s: Slice, pool: PoolPlan) -> list[Group]:
    """What our engine runs between its products."""
    model, a, h = s.model, s.model.attention, float(s.model.hidden)
    heads, fp8 = a.heads / s.tp, s.precision.weights == "fp8"
    softmax = sum(kind != "linear" for kind in model.layer_attention)
    norms = [Kernel("norm", "norm", {"width": h}, 2 * model.layers)]
    inputs: list[tuple[str, float, int]] = []  # (key, width, times a step) of what products read
    groups = []
    if a.kind == "gqa" and softmax:
        shape = {"heads": heads, "kv_heads": float(-(-a.kv_heads // s.tp)), "head_dim": float(a.head_dim)}
        groups.append(Group(_elementwise("attention/kv_write"), (Kernel("attention/kv_write", "rope", shape, softmax),)))
        inputs += [("attention/quantise", h, softmax), ("attention/quantise", heads * a.v_head_dim, softmax)]
    elif a.kind == "mla":
        assert a.kv_lora_rank and a.qk_rope_head_dim
        latent = Kernel("attention/kv_write", "latent", {"heads": heads}, softmax)
        groups.append(Group(_elementwise("attention/kv_write"), (latent,)))
        inputs += [("attention/quantise", width, softmax) for width in (heads * a.v_head_dim, float(a.q_lora_rank or h))]
        if a.q_lora_rank:
            norms.append(Kernel("norm", "norm", {"width": float(a.q_lora_rank)}, softmax))
            if not fp8:  # else they are one matrix, and the norm before it rounds what it reads
                groups.append(_down(s, h, (float(a.q_lora_rank), float(a.kv_lora_rank + a.qk_rope_head_dim)), softmax))
    for key, width, layers in _gated(s):
        groups.append(Group(_elementwise(key), (Kernel(key, "silu", {"width": width}, layers),)))
        inputs += [(key, h, layers)]  # an activation rounds what comes of it
    quants = [Kernel(key, "quant", {"width": width}, times) for key, width, times in inputs] if fp8 else []
    groups.append(Group(_elementwise("norm"), (*norms, *quants)))
    if model.moe is not None and model.moe_layers:
        experts, layers = float(model.moe.experts), model.moe_layers
        chosen = {"experts": experts, "top_k": float(model.moe.top_k)}
        shape = {**chosen, "slots": experts + pool.redundant_experts, "ranks": float(pool.ep)}
        redundant = Kernel("moe/gate", "replica_split", shape, layers, assumed_s=_REPLICA_SPLIT_S)
        split = (redundant,) if pool.redundant_experts else ()
        for router in ((Kernel("moe/gate", "router", {**chosen, "hidden": h}, layers),),
                       # what profiles had before: a dense product, and the top-k of its scores
                       (Kernel("moe/gate", "gemm", {"k": h, "n": experts}, layers), Kernel("moe/gate", "gate", chosen, layers))):
            groups.append(Group(lambda op: op.kind == "gate", (*router, *split)))
    return groups


def _elementwise(key: str) -> Callable[[Op], bool]:
    return lambda op: op.key == key and op.kind == "elementwise"


def _down(s: Slice, hidden: float, widths: tuple[float, float], layers: int) -> Group:
    """Queries' and latents' down projections, two products in place of one."""
    whole = (hidden, sum(widths))
    return Group(lambda op: op.matrix == whole,
                 tuple(Kernel("attention/projections", "gemm", {"k": hidden, "n": n}, layers, s.precision.weights)
                       for n in widths))


def _gated(s: Slice) -> list[tuple[str, float, int]]:
    """(key, width here, layers) of the FFNs on a rank's own tokens."""
    model = s.model
    found = [("ffn/dense", model.dense_intermediate / s.tp, model.dense_layers)] if model.dense_layers else []
    if model.moe is not None and model.moe.shared_intermediate and model.moe_layers:
        found.append(("moe/shared", model.moe.shared_intermediate / s.tp, model.moe_layers))
    return found
