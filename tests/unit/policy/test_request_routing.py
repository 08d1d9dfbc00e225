"""Request routing, admission and scaling on small cases with one right answer each."""

import numpy as np
import pytest

from twin.policy.admission import Admission
from twin.policy.routing import ROUTERS, Router, RouterLoad
from twin.policy.scaling import PoolScaling, TargetTracking
from twin.spec.errors import Overloaded, SpecError


def load(tokens, *, requests=None, kv=None, ttft_s=None, matched=None, healthy=None):
    tokens = np.array(tokens)
    return RouterLoad(np.zeros_like(tokens) if requests is None else np.array(requests), tokens,
                      np.zeros(len(tokens)) if kv is None else np.array(kv),
                      None if ttft_s is None else np.array(ttft_s), None if matched is None else np.array(matched),
                      None if healthy is None else np.array(healthy))


def test_round_robin_skips_the_sick_and_resumes_fairly():
    router = Router("round_robin", 3)
    assert [router.choose(load([0, 0, 0])) for _ in range(4)] == [0, 1, 2, 0]
    assert [router.choose(load([0, 0, 0], healthy=[True, False, True])) for _ in range(3)] == [2, 0, 2]
    assert router.choose(load([0, 0, 0])) == 1  # the one that waited longest


def test_least_loaded_compares_tokens_then_requests_then_memory():
    assert Router("least_loaded", 3).choose(load([5, 3, 4])) == 1
    assert Router("least_loaded", 3).choose(load([3, 3, 4], requests=[2, 1, 0])) == 1
    assert Router("least_loaded", 2).choose(load([3, 3], requests=[1, 1], kv=[0.5, 0.4])) == 1


def test_ties_take_turns():
    router = Router("least_loaded", 3)
    assert [router.choose(load([1, 1, 1])) for _ in range(4)] == [0, 1, 2, 0]


def test_power_of_two_never_picks_the_worst_of_two_and_spreads():
    router = Router("power_of_two", 3, seed=1)
    chosen = np.bincount([router.choose(load([1, 2, 3])) for _ in range(3000)], minlength=3)
    # Each pair is drawn with probability 1/3: instance 0 wins two of them, 1 wins one, 2 none.
    assert chosen[2] == 0 and abs(chosen[0] / 3000 - 2 / 3) < 0.03
    twin = Router("power_of_two", 3, seed=1)
    assert np.bincount([twin.choose(load([1, 2, 3])) for _ in range(3000)], minlength=3).tolist() == chosen.tolist()


def test_predicted_ttft_takes_the_earliest():
    assert Router("predicted_ttft", 3).choose(load([0, 9, 9], ttft_s=[0.3, 0.2, 0.25])) == 1
    with pytest.raises(ValueError, match="predicted_ttft_s"):
        Router("predicted_ttft", 2).choose(load([0, 0]))


def test_prefix_affinity_trades_matched_tokens_against_load():
    assert Router("prefix_affinity", 2).choose(load([500, 100], matched=[600, 0])) == 0
    assert Router("prefix_affinity", 2).choose(load([900, 100], matched=[600, 0])) == 1
    assert Router("prefix_affinity", 2, affinity=2.0).choose(load([900, 100], matched=[600, 0])) == 0
    with pytest.raises(ValueError, match="matched_tokens"):
        Router("prefix_affinity", 2).choose(load([0, 0]))


@pytest.mark.parametrize("kind", ROUTERS)
def test_every_router_obeys_health(kind):
    router = Router(kind, 4, seed=3)
    full = {"ttft_s": [0.0, 1.0, 2.0, 3.0], "matched": [9, 0, 0, 0]}
    chosen = {router.choose(load([0, 5, 6, 7], healthy=[False, True, False, True], **full)) for _ in range(30)}
    assert chosen <= {1, 3}
    assert router.choose(load([0, 0, 0, 0], healthy=[False, False, True, False], **full)) == 2
    with pytest.raises(Overloaded):
        router.choose(load([0, 0, 0, 0], healthy=[False] * 4, **full))


def test_a_pool_may_grow_and_shrink():
    router = Router("round_robin", 2)
    assert [router.choose(load([0, 0])) for _ in range(2)] == [0, 1]
    router.resize(3)
    assert [router.choose(load([0, 0, 0])) for _ in range(2)] == [2, 0]
    router.resize(1)
    assert router.choose(load([0])) == 0
    with pytest.raises(ValueError, match="3 instances"):
        router.choose(load([0, 0, 0]))


def test_unknown_router_and_empty_pool_are_refused():
    with pytest.raises(SpecError, match="one of round_robin"):
        Router("fastest", 2)
    with pytest.raises(SpecError, match="num_instances"):
        Router("round_robin", 0)


def test_admission_rejects_over_either_limit_with_a_time():
    admission = Admission(4, 1000)
    assert admission.decide(3, 400, 600).admitted
    full = admission.decide(6, 0, 1, requests_per_s=0.5)
    assert not full.admitted and full.retry_after_s == 6.0 and "limit is 4" in full.reason
    tokens = admission.decide(2, 900, 350, tokens_per_s=50.0)
    assert not tokens.admitted and tokens.retry_after_s == 5.0 and "1000" in tokens.reason
    assert admission.decide(9, 0, 1).retry_after_s == 1.0
    assert admission.decide(2, 900, 10**9, tokens_per_s=1.0).retry_after_s == 60.0
    assert admission.decide(2, 20, 10**9, tokens_per_s=1.0).retry_after_s == 20.0
    assert admission.decide(0, 0, 5000).admitted  # alone, or it could never enter
    assert Admission(4).decide(3, 10**9, 10**9).admitted
    with pytest.raises(SpecError, match="max_outstanding_tokens"):
        Admission(1, 0)


def test_scaling_tracks_its_target_within_cooldowns_and_bounds():
    rule = TargetTracking(0.5, min_instances=2, max_instances=10, grow_cooldown_steps=2, shrink_cooldown_steps=6)
    assert rule.decide(4, 0.54, 99) == 4  # within tolerance
    assert rule.decide(4, 0.75, 2) == 6 and rule.decide(4, 0.75, 1) == 4
    assert rule.decide(4, 0.25, 6) == 2 and rule.decide(4, 0.25, 5) == 4
    assert rule.decide(4, 9.0, 2) == 10 and rule.decide(4, 0.0, 6) == 2
    assert rule.decide(12, 0.5, 0) == 10 and rule.decide(0, 0.0, 0) == 2
    assert rule.decide(10, 0.9, 9) == 10


def test_scaling_settles_on_a_constant_load():
    rule = TargetTracking(0.7, 1, 100, grow_cooldown_steps=0, shrink_cooldown_steps=0)
    for work in (0.3, 3.5, 20.0, 64.9):
        instances, seen = 1, []
        for _ in range(10):
            instances = rule.decide(instances, work / instances, 1)
            seen.append(instances)
        assert len(set(seen[2:])) == 1 and work / instances <= 0.7 * 1.1


def test_prefill_and_decode_scale_apart():
    rule = TargetTracking(0.5, 1, 8)
    assert PoolScaling(rule, rule).decide((2, 4), (1.0, 0.25), (9, 9)) == (4, 2)


@pytest.mark.parametrize("bad", [{"target_utilisation": 0.0}, {"min_instances": 0}, {"max_instances": 0},
                                 {"tolerance": 1.0}, {"grow_cooldown_steps": -1}, {"shrink_cooldown_steps": -1}])
def test_rules_that_cannot_work_are_refused(bad):
    with pytest.raises(SpecError, match=next(iter(bad))):
        TargetTracking(**{"target_utilisation": 0.5, **bad})
