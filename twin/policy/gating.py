"""Top-k gating in numpy: which experts each token takes and with what weight.

The runtime's kernels are held to these functions, and the simulator samples routing with them.
Shapes: T tokens, E experts, K chosen experts, G groups. Equal scores go to the lower expert id.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twin.spec.errors import SpecError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def softmax_topk(logits_TE: ArrayLike, k: int, *, renormalize: bool, scale: float = 1.0) -> tuple[Ints, Floats]:
    """The k largest of softmax(logits): ids and weights [T, K], best first.

    With `renormalize` weights sum to `scale` (Mixtral, Qwen3-MoE with norm_topk_prob; gpt-oss, whose softmax over the
    chosen k is the same number); without it they are the plain probabilities times `scale` (Qwen2-MoE).
    """
    scores_TE = softmax(_logits(logits_TE, k))
    return _weigh(top(scores_TE, k), scores_TE, renormalize, scale)


def grouped_softmax_topk(logits_TE: ArrayLike, k: int, *, num_groups: int, top_groups: int, renormalize: bool = False,
                         scale: float = 1.0) -> tuple[Ints, Floats]:
    """DeepSeek-V2's group-limited softmax: the best `top_groups` groups by their largest probability, then top-k."""
    scores_TE = softmax(_logits(logits_TE, k))
    group_TG = _by_group(scores_TE, num_groups, top_groups, k).max(axis=2)
    allowed_TE = _allowed(group_TG, top_groups, scores_TE.shape[1])
    return _weigh(top(np.where(allowed_TE, scores_TE, -np.inf), k), scores_TE, renormalize, scale)


def grouped_sigmoid_topk(logits_TE: ArrayLike, bias_E: ArrayLike, k: int, *, num_groups: int = 1, top_groups: int = 1,
                         renormalize: bool = True, scale: float = 1.0) -> tuple[Ints, Floats]:
    """DeepSeek-V3's selection (also Kimi K2, GLM-4.5): sigmoid scores, a bias that only steers the choice.

    A group's score is the sum of its two best biased scores (DeepSeek-V3 report, section 2.1.2). The best `top_groups`
    groups take part; the k best biased scores among them are chosen; weights are their scores without bias.
    """
    logits = _logits(logits_TE, k)
    scores_TE = sigmoid(logits)
    biased_TE = scores_TE + np.asarray(bias_E, dtype=np.float64)
    groups_TGE = _by_group(biased_TE, num_groups, top_groups, k)
    best_two = min(2, groups_TGE.shape[2])
    group_TG = np.sort(groups_TGE, axis=2)[:, :, -best_two:].sum(axis=2)
    allowed_TE = _allowed(group_TG, top_groups, scores_TE.shape[1])
    return _weigh(top(np.where(allowed_TE, biased_TE, -np.inf), k), scores_TE, renormalize, scale)


def expert_counts(ids_TK: Ints, num_experts: int) -> Ints:
    """Tokens that chose each expert [E]."""
    return np.bincount(np.asarray(ids_TK).ravel(), minlength=num_experts)


def softmax(logits_TE: Floats) -> Floats:
    exp_TE = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True, initial=-np.inf))
    result: Floats = exp_TE / exp_TE.sum(axis=1, keepdims=True)
    return result


def sigmoid(logits_TE: Floats) -> Floats:
    """1 / (1 + exp(-x)), written with exp of negative numbers only, so that it never overflows."""
    small = np.exp(-np.abs(logits_TE))
    result: Floats = np.where(logits_TE >= 0, 1.0, small) / (1.0 + small)
    return result


def top(scores_TE: Floats, k: int) -> Ints:
    """Ids of the k largest scores of each row, best first, ties to the lower id."""
    return np.argsort(-scores_TE, axis=1, kind="stable")[:, :k]


def _weigh(ids_TK: Ints, scores_TE: Floats, renormalize: bool, scale: float) -> tuple[Ints, Floats]:
    weights_TK = np.take_along_axis(scores_TE, ids_TK, axis=1)
    if renormalize:
        # A sigmoid may underflow to 0 for all of a token's experts; the tiny term keeps 0 / 0 away, as DeepSeek's does.
        weights_TK = weights_TK / (weights_TK.sum(axis=1, keepdims=True) + 1e-20)
    return ids_TK, weights_TK * scale


def _allowed(group_TG: Floats, top_groups: int, num_experts: int) -> NDArray[np.bool_]:
    chosen_TG = np.zeros(group_TG.shape, dtype=bool)
    np.put_along_axis(chosen_TG, top(group_TG, top_groups), True, axis=1)
    return np.repeat(chosen_TG, num_experts // group_TG.shape[1], axis=1)


def _by_group(scores_TE: Floats, num_groups: int, top_groups: int, k: int) -> Floats:
    T, E = scores_TE.shape
    if num_groups < 1 or E % num_groups:
        raise SpecError(f"{E} experts do not divide over {num_groups} groups", field="num_groups",
                        expected="a divisor of the experts")
    if not 1 <= top_groups <= num_groups or top_groups * (E // num_groups) < k:
        raise SpecError(f"{top_groups} of {num_groups} groups of {E // num_groups} experts cannot give {k} experts",
                        field="top_groups", expected=f"1..{num_groups}, holding at least {k} experts")
    return scores_TE.reshape(T, num_groups, E // num_groups)


def _logits(logits_TE: ArrayLike, k: int) -> Floats:
    logits = np.asarray(logits_TE, dtype=np.float64)
    if logits.ndim != 2 or not 1 <= k <= logits.shape[1]:
        raise SpecError(f"top {k} of logits shaped {logits.shape}", field="k", expected="1..E of [T, E]")
    return logits
