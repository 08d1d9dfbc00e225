"""Top-k gating against plain loops and hand-worked groups."""

import math

import numpy as np
import pytest

from twin.policy.gating import expert_counts, grouped_sigmoid_topk, grouped_softmax_topk, sigmoid, softmax_topk
from twin.spec.errors import SpecError


def test_softmax_topk_by_hand():
    logits = np.log([[1.0, 4.0, 3.0, 2.0]])
    ids, weights = softmax_topk(logits, 2, renormalize=False)
    assert ids.tolist() == [[1, 2]]
    np.testing.assert_allclose(weights, [[0.4, 0.3]])
    ids, weights = softmax_topk(logits, 2, renormalize=True, scale=7.0)
    np.testing.assert_allclose(weights, [[4.0, 3.0]])


def test_equal_scores_go_to_the_lower_id():
    assert softmax_topk(np.zeros((2, 5)), 3, renormalize=True)[0].tolist() == [[0, 1, 2]] * 2


def test_huge_logits_neither_overflow_nor_vanish():
    ids, weights = softmax_topk([[1e4, -1e4, 9.9e3]], 2, renormalize=True)
    assert ids.tolist() == [[0, 2]] and np.isfinite(weights).all()
    assert sigmoid(np.array([[-1e4, 0.0, 1e4]])).tolist() == [[0.0, 0.5, 1.0]]
    assert np.isfinite(grouped_sigmoid_topk([[-1e4] * 4], np.zeros(4), 2)[1]).all()


def test_bias_steers_the_choice_but_not_the_weights():
    logits = [[0.0, 1.0, 2.0, 3.0]]
    ids, weights = grouped_sigmoid_topk(logits, [9.0, 0.0, 0.0, 0.0], 2, renormalize=False)
    assert ids.tolist() == [[0, 3]]
    np.testing.assert_allclose(weights, [[0.5, 1 / (1 + math.exp(-3))]])


def test_sigmoid_groups_are_ranked_by_their_two_best():
    # Group sums of two best scores: (0.9 + 0.1) < (0.6 + 0.6); the best single expert is left out.
    scores = np.array([[0.9, 0.1, 0.05, 0.6, 0.6, 0.05]])
    logits = np.log(scores / (1 - scores))
    ids, weights = grouped_sigmoid_topk(logits, np.zeros(6), 2, num_groups=2, top_groups=1, scale=2.5)
    assert ids.tolist() == [[3, 4]]
    np.testing.assert_allclose(weights, [[1.25, 1.25]])


def test_softmax_groups_are_ranked_by_their_best():
    scores = np.array([[0.4, 0.02, 0.03, 0.25, 0.2, 0.1]])
    ids, weights = grouped_softmax_topk(np.log(scores), 2, num_groups=2, top_groups=1)
    assert ids.tolist() == [[0, 2]]
    np.testing.assert_allclose(weights, [[0.4, 0.03]])


def test_negative_bias_never_lets_a_closed_group_in():
    ids, _ = grouped_sigmoid_topk(np.zeros((1, 4)), [-5.0, -6.0, -9.0, -9.0], 2, num_groups=2, top_groups=1)
    assert ids.tolist() == [[0, 1]]


def test_deepseek_shape_against_a_plain_loop():
    random = np.random.default_rng(0)
    logits, bias = random.normal(0, 1, (40, 256)), random.normal(0, 0.1, 256)
    ids, weights = grouped_sigmoid_topk(logits, bias, 8, num_groups=8, top_groups=4, scale=2.5)
    for t in range(40):
        score = [1 / (1 + math.exp(-x)) for x in logits[t]]
        biased = [s + b for s, b in zip(score, bias, strict=True)]
        rank = {g: sum(sorted(biased[g * 32:g * 32 + 32])[-2:]) for g in range(8)}
        groups = sorted(rank, key=rank.get)[-4:]
        chosen = sorted((e for e in range(256) if e // 32 in groups), key=lambda e: -biased[e])[:8]
        assert ids[t].tolist() == chosen
        total = sum(score[e] for e in chosen)
        np.testing.assert_allclose(weights[t], [2.5 * score[e] / total for e in chosen])
    counts = expert_counts(ids, 256)
    assert counts.sum() == 320 and counts.shape == (256,)


def test_no_tokens_give_empty_results():
    ids, weights = softmax_topk(np.zeros((0, 4)), 2, renormalize=True)
    assert ids.shape == weights.shape == (0, 2)
    assert grouped_sigmoid_topk(np.zeros((0, 4)), np.zeros(4), 2, num_groups=2, top_groups=1)[0].shape == (0, 2)


@pytest.mark.parametrize(("call", "named"), [
    (lambda: softmax_topk(np.zeros((1, 4)), 5, renormalize=True), "top 5"),
    (lambda: softmax_topk(np.zeros(4), 1, renormalize=True), "shaped"),
    (lambda: grouped_sigmoid_topk(np.zeros((1, 6)), np.zeros(6), 2, num_groups=4), "6 experts do not divide over 4"),
    (lambda: grouped_softmax_topk(np.zeros((1, 8)), 3, num_groups=4, top_groups=1), "cannot give 3"),
    (lambda: grouped_softmax_topk(np.zeros((1, 8)), 1, num_groups=4, top_groups=5), "top_groups"),
])
def test_impossible_choices_are_refused(call, named):
    with pytest.raises(SpecError, match=named):
        call()
