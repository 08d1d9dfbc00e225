"""The router of an MoE layer in one launch: scores, group limit, top-k, weights.

Shapes: T tokens, E experts (up to 512), K choices (up to 8 in the models served).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.kernels.skinny import Cut, launch_options, let_follower_start, prefetch, prefetchers, wait_for_forerunner

_FEW_TOKENS = 512
"""Up to here small tiles of our own beat a library's product that is split along its depth and summed afterwards."""
_DEPTH = 256
_MAX_PARTS = 8
_MOST_RANKED = 256
"""Experts up to which every one may be compared with every other, which takes one pass instead of one a choice."""


def router_logits(x_TH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """fp32 [S, T, E], to be summed over S: x weight', the depth cut in S parts so that few tokens keep the device busy.

    Both sides in one half-precision format.
    """
    tokens, hidden = x_TH.shape
    experts = weight_EH.shape[0]
    if tokens > _FEW_TOKENS:
        return torch.mm(x_TH, weight_EH.t(), out_dtype=torch.float32)[None]
    assert x_TH.is_contiguous() and weight_EH.is_contiguous()
    parts = min(_MAX_PARTS, triton.cdiv(hidden, _DEPTH))
    each = triton.cdiv(triton.cdiv(hidden, _DEPTH), parts) * _DEPTH
    out_STE = torch.empty(parts, tokens, experts, dtype=torch.float32, device=x_TH.device)
    high, wide, depth = (16, 16, _DEPTH) if tokens <= 32 else (64, 32, 128)  # many tokens read their weights too often
    _logits_kernel[(triton.cdiv(experts, wide), triton.cdiv(tokens, high), parts)](
        x_TH, weight_EH, out_STE, tokens, experts, hidden, EACH=each, BLOCK_T=high, BLOCK_E=wide, BLOCK_K=depth, num_warps=4,
        num_stages=4)
    return out_STE


def gate_topk(
    logits: torch.Tensor,
    k: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    bias_E: torch.Tensor | None = None,
    groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "top2",
    slots_T: torch.Tensor | None = None,
    load_E: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights_TK fp32, ids_TK int32) of logits [T, E], or [S, T, E] to be summed; best first, equals to the lower id.

    `scoring` "softmax" or "sigmoid" gives each expert's score. `bias_E` is added for choosing only, never to a weight
    (DeepSeek-V3's correction). With `groups` > 1 only the best `topk_groups` groups may be chosen, a group's score being
    its two best experts' sum ("top2", DeepSeek-V3) or its best ("max", DeepSeek-V2). `renormalize` divides a token's
    weights by their sum; `scale` multiplies them last. Softmax over the chosen logits alone (gpt-oss) is "softmax" with
    `renormalize`. Tokens whose `slots_T` is negative are a graph's padding: their ids are -1. `load_E` int64 is counted up
    by one for every choice.
    """
    tokens, experts = logits.shape[-2:]
    assert experts % groups == 0 and k <= experts and logits.is_contiguous()
    assert scoring in ("softmax", "sigmoid") and group_score in ("top2", "max")
    weights = torch.empty(tokens, k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(tokens, k, dtype=torch.int32, device=logits.device)
    each = experts // groups
    _gate_kernel[(tokens,)](
        logits, bias_E if bias_E is not None else logits, weights, ids,
        slots_T if slots_T is not None else ids, load_E if load_E is not None else ids, experts, scale,
        HAS_SLOTS=slots_T is not None, HAS_LOAD=load_E is not None,
        PARTS=logits.shape[0] if logits.dim() == 3 else 1, K=k,
        SIGMOID=scoring == "sigmoid", RENORMALIZE=renormalize, HAS_BIAS=bias_E is not None, GROUPS=groups,
        TOPK_GROUPS=topk_groups, EACH=each, TOP2=group_score == "top2" and each > 1,
        BLOCK_G=triton.next_power_of_2(groups), BLOCK_E=triton.next_power_of_2(each), num_warps=1,
    )  # fmt: skip
    return weights, ids


def norm_gate_topk(
    x_TH: torch.Tensor,
    gain_H: torch.Tensor,
    eps: float,
    weight_EH: torch.Tensor,
    k: int,
    cut: Cut,
    arrived: torch.Tensor,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    logit_bias_E: torch.Tensor | None = None,
    bias_E: torch.Tensor | None = None,
    groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "top2",
    slots_T: torch.Tensor | None = None,
    load_E: torch.Tensor | None = None,
    ahead: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(RMS norm of x [T, H], weights_TK, ids_TK) in one launch, for a few tokens: `router_logits` of the norm, then `gate_topk`.

    `arrived` int32, zero for each token, counts a token's programs and is left zero; `cut.n` experts are a program's. `ahead`:
    a weight to come that more programs bring into the cache meanwhile.
    """
    tokens, hidden = x_TH.shape
    experts = weight_EH.shape[0]
    assert tokens <= arrived.numel() and x_TH.is_contiguous() and weight_EH.is_contiguous()
    assert scoring in ("softmax", "sigmoid") and group_score in ("top2", "max") and experts % groups == 0
    new = lambda columns, dtype: torch.empty(tokens, columns, dtype=dtype, device=x_TH.device)  # noqa: E731
    normed, logits = new(hidden, x_TH.dtype), new(experts, torch.float32)
    weights, ids = new(k, torch.float32), new(k, torch.int32)
    each = experts // groups
    parts = triton.cdiv(experts, cut.n)
    extra = prefetchers(ahead, cut.warps)
    _norm_gate_kernel[(parts + extra, tokens)](
        x_TH, gain_H, weight_EH, logit_bias_E if logit_bias_E is not None else logits, logits, arrived, normed,
        bias_E if bias_E is not None else logits, weights, ids, slots_T if slots_T is not None else ids,
        load_E if load_E is not None else ids, ahead if extra else weight_EH, eps, experts, parts, scale,
        HIDDEN=hidden, AHEAD_BYTES=ahead.nbytes if extra else 0, RANKED=cut.warps >= 4 and experts <= _MOST_RANKED,
        HAS_LOGIT_BIAS=logit_bias_E is not None, HAS_SLOTS=slots_T is not None, HAS_LOAD=load_E is not None,
        K=k, SIGMOID=scoring == "sigmoid", RENORMALIZE=renormalize, HAS_BIAS=bias_E is not None, GROUPS=groups,
        TOPK_GROUPS=topk_groups, EACH=each, TOP2=group_score == "top2" and each > 1, PDL=cut.pdl,
        EARLY=cut.early, BLOCK_G=triton.next_power_of_2(groups), BLOCK_E=triton.next_power_of_2(each), BLOCK_N=cut.n,
        BLOCK_H=triton.next_power_of_2(hidden), num_warps=cut.warps, **launch_options(cut),
    )  # fmt: skip
    return normed, weights, ids


@triton.jit(do_not_specialize=["tokens"])
def _logits_kernel(
    x, w, out, tokens, experts, hidden,
    EACH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(2)
    acc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for start in range(0, EACH, BLOCK_K):
        k = part * EACH + start + tl.arange(0, BLOCK_K)
        inside = (k < hidden)[None, :]
        a = tl.load(x + token[:, None] * hidden + k[None, :], mask=(token < tokens)[:, None] & inside, other=0.0)
        b = tl.load(w + expert[:, None] * hidden + k[None, :], mask=(expert < experts)[:, None] & inside, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc)
    place = (part * tokens + token)[:, None] * experts + expert[None, :]
    tl.store(out + place, acc, mask=(token < tokens)[:, None] & (expert < experts)[None, :])


@triton.jit
def _allowed_groups(choice, group, GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOP2: tl.constexpr):
    """1 for each of the TOPK_GROUPS best groups of `choice` [groups, experts of a group]."""
    best, at = tl.max(choice, 1, return_indices=True)
    score = best
    if TOP2:
        column = tl.arange(0, choice.shape[1])
        score += tl.max(tl.where(column[None, :] == at[:, None], float("-inf"), choice), 1)
    score = tl.where(group < GROUPS, score, float("-inf"))
    allowed = tl.zeros_like(group)
    for _ in tl.static_range(TOPK_GROUPS):
        winner = tl.argmax(score, 0)
        allowed = tl.where(group == winner, 1, allowed)
        score = tl.where(group == winner, float("-inf"), score)
    return allowed


@triton.jit
def _grid(GROUPS: tl.constexpr, EACH: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr):
    """Numbers of the experts by group, and which of them there are."""
    group, column = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_E)
    return group[:, None] * EACH + column[None, :], (group < GROUPS)[:, None] & (column < EACH)[None, :]


@triton.jit
def _pick(
    logit, real, expert, token, real_token, bias, weights, ids, load, scale,
    HAS_LOAD: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr, EACH: tl.constexpr, TOP2: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, RANKED: tl.constexpr = False,
):  # fmt: skip
    """Choose for one token, from `logit` [groups, experts of a group], -inf where not `real`.

    `RANKED` compares every expert with every other (for a program of many lanes); else the best is taken K times.
    """
    group = tl.arange(0, BLOCK_G)
    if SIGMOID:
        score = tl.sigmoid(logit)
    else:
        score = tl.exp(logit - tl.max(logit))
        score = score / tl.sum(score)
    choice = tl.where(real, score, float("-inf"))
    if HAS_BIAS:
        choice += tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)
    if GROUPS > 1:
        allowed = _allowed_groups(choice, group, GROUPS, TOPK_GROUPS, TOP2)
        choice = tl.where((allowed > 0)[:, None], choice, float("-inf"))
    choice = tl.where(real, choice, float("-inf"))
    if RANKED:
        flat = tl.reshape(choice, [BLOCK_G * BLOCK_E])
        number = tl.reshape(tl.where(real, expert, GROUPS * EACH), [BLOCK_G * BLOCK_E])  # what is not real comes last
        better = (flat[None, :] > flat[:, None]) | ((flat[None, :] == flat[:, None]) & (number[None, :] < number[:, None]))
        place = tl.sum(better.to(tl.int32), 1)
        chosen = (place < K) & (number < GROUPS * EACH)
        all_scores = tl.reshape(score, [BLOCK_G * BLOCK_E])
        whole = tl.sum(tl.where(chosen, all_scores, 0.0))
        part = scale / tl.maximum(whole, 1e-20) if RENORMALIZE else scale
        tl.store(ids + token * K + place, tl.where(real_token, number, -1), mask=chosen)
        tl.store(weights + token * K + place, all_scores * part, mask=chosen)
        if HAS_LOAD:
            tl.atomic_add(load + number, 1, mask=chosen & real_token, sem="relaxed")
        return
    total = 0.0
    rank = tl.full([BLOCK_G, BLOCK_E], -1, tl.int32)
    for i in tl.static_range(K):
        best = tl.max(choice)
        # the lowest id among equals
        winner = tl.min(tl.where((choice == best) & real, expert, GROUPS * EACH))
        hit = (expert == winner) & real  # a padded column's number is the next group's
        tl.store(ids + token * K + i, tl.where(real_token, winner, -1))
        if HAS_LOAD:
            tl.atomic_add(load + winner, 1, mask=real_token, sem="relaxed")
        total += tl.sum(tl.where(hit, score, 0.0))
        rank = tl.where(hit, i, rank)
        choice = tl.where(hit, float("-inf"), choice)
    share = scale / tl.maximum(total, 1e-20) if RENORMALIZE else scale
    tl.store(weights + token * K + rank, score * share, mask=rank >= 0)


@triton.jit
def _gate_kernel(
    logits, bias, weights, ids, slots, load, experts, scale,
    HAS_SLOTS: tl.constexpr, HAS_LOAD: tl.constexpr, PARTS: tl.constexpr,
    K: tl.constexpr, SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr, EACH: tl.constexpr, TOP2: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    real_token = tl.load(slots + token) >= 0 if HAS_SLOTS else True
    expert, real = _grid(GROUPS, EACH, BLOCK_G, BLOCK_E)
    logit = tl.load(logits + token * experts + expert, mask=real, other=float("-inf")).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        logit += tl.load(logits + (part * tl.num_programs(0) + token) * experts + expert, mask=real, other=0.0)
    _pick(
        logit, real, expert, token, real_token, bias, weights, ids, load, scale,
        HAS_LOAD, K, SIGMOID, RENORMALIZE, HAS_BIAS, GROUPS, TOPK_GROUPS, EACH, TOP2, BLOCK_G, BLOCK_E,
    )  # fmt: skip


@triton.jit
def _norm_gate_kernel(
    x, gain, w, logit_bias, logits, arrived, normed, bias, weights, ids, slots, load, ahead, eps, experts, parts, scale,
    HIDDEN: tl.constexpr, AHEAD_BYTES: tl.constexpr, RANKED: tl.constexpr, HAS_LOGIT_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_LOAD: tl.constexpr, K: tl.constexpr,
    SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr, EACH: tl.constexpr, TOP2: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Program (p, t) gives token t's logits of BLOCK_N experts; the last of a token's `parts` programs chooses."""
    let_follower_start(EARLY)
    part, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if AHEAD_BYTES > 0:
        extra = part >= parts
        if extra & (token == 0):
            prefetch(ahead, part - parts, AHEAD_BYTES)
        if extra:
            return
    n, h = part * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_H)
    tile = tl.load(w + n[:, None] * HIDDEN + h[None, :], mask=(n < experts)[:, None] & (h < HIDDEN)[None, :], other=0.0)
    gains = tl.load(gain + h, mask=h < HIDDEN, other=0.0).to(tl.float32)
    wait_for_forerunner(PDL, EARLY)
    a = tl.load(x + token * HIDDEN + h, mask=h < HIDDEN, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(a * a) / HIDDEN + eps)
    row = (a * inverse * gains).to(normed.dtype.element_ty)
    if part == 0:
        tl.store(normed + token * HIDDEN + h, row, mask=h < HIDDEN)
    part_logit = tl.sum(tile.to(tl.float32) * row.to(tl.float32)[None, :], 1)
    if HAS_LOGIT_BIAS:
        part_logit += tl.load(logit_bias + n, mask=n < experts, other=0.0).to(tl.float32)
    tl.store(logits + token * experts + n, part_logit, mask=n < experts)
    tl.debug_barrier()  # all lanes have stored before the program says so
    if tl.atomic_add(arrived + token, 1, sem="acq_rel") == parts - 1:
        tl.store(arrived + token, 0)  # as the next layer wants it
        expert, real = _grid(GROUPS, EACH, BLOCK_G, BLOCK_E)
        logit = tl.load(logits + token * experts + expert, mask=real, other=float("-inf"), cache_modifier=".cg")
        real_token = tl.load(slots + token) >= 0 if HAS_SLOTS else True
        _pick(
            logit, real, expert, token, real_token, bias, weights, ids, load, scale,
            HAS_LOAD, K, SIGMOID, RENORMALIZE, HAS_BIAS, GROUPS, TOPK_GROUPS, EACH, TOP2, BLOCK_G, BLOCK_E, RANKED,
        )  # fmt: skip
