"""Popularity, loads and touches against sampling and against closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from cost_cases import gqa_model, mla_model, pool_of

from twin.cost.experts import expert_work
from twin.cost.routing import expected_max, place, popularity, sample_top_k, slot_shares, touch_probability
from twin.policy.placement import linear, place_global, rank_load
from twin.policy.replica_split import BatchSplit
from twin.spec.errors import SpecError
from twin.spec.load import load_model
from twin.spec.model import MoE
from twin.spec.scenario import Routing

R1 = load_model("deepseek-r1").moe
assert R1 is not None


@pytest.mark.parametrize("routing", [Routing(), Routing(kind="zipf", alpha=0.8), Routing(kind="lognormal", sigma=0.7)])
def test_popularity_sums_to_one_and_no_expert_beats_a_slot_of_every_token(routing: Routing) -> None:
    model = gqa_model()
    shares = popularity(model, routing, seed=3)
    assert shares.sum(axis=1) == pytest.approx(np.ones(len(shares)))
    assert shares.max() <= 1 / 4 + 1e-12
    assert (popularity(model, routing, seed=3) == shares).all()
    if routing.kind != "uniform":
        assert shares.shape == (2, 16)
        assert not np.allclose(shares[0], shares[1])


def test_load_matrix_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "load.csv"
    rng = np.random.default_rng(0)
    table = rng.integers(1, 100, (2, 16))
    path.write_text("\n".join(",".join(map(str, row)) for row in table))
    shares = popularity(gqa_model(), Routing(kind="matrix", file=str(path)))
    assert shares == pytest.approx(table / table.sum(axis=1, keepdims=True))
    path.write_text("1,2,3\n")
    with pytest.raises(SpecError, match="16 columns"):
        popularity(gqa_model(), Routing(kind="matrix", file=str(path)))
    path.write_text(",".join(["nan"] * 16))
    with pytest.raises(SpecError, match="finite"):
        popularity(gqa_model(), Routing(kind="matrix", file=str(path)))


def test_touch_probability_is_hypergeometric_for_equal_experts() -> None:
    moe = MoE(experts=64, top_k=6, intermediate=8)
    slots, owner = np.arange(64), np.arange(64) // 8
    exact = 1 - math.comb(56, 6) / math.comb(64, 6)
    assert touch_probability(moe, np.full(64, 1 / 64), slots, owner, 8) == pytest.approx(np.full(8, exact))


@pytest.mark.parametrize(("moe", "owners", "tolerance"), [
    (R1, 8, 0.02), (R1, 32, 0.02), (R1, 4, 0.02), (MoE(experts=32, top_k=4, intermediate=8, groups=4, top_k_groups=2), 8, 0.03),
])
def test_touches_match_sampled_group_limited_routing(moe: MoE, owners: int, tolerance: float) -> None:
    owner = np.arange(moe.experts) // (moe.experts // owners)
    even = np.full(moe.experts, 1 / moe.experts)
    expected = touch_probability(moe, even, np.arange(moe.experts), owner, owners)
    chosen = owner[sample_top_k(moe, even, 20_000, np.random.default_rng(5))]
    seen = np.stack([(chosen == o).any(axis=1).mean() for o in range(owners)])
    assert expected.mean() == pytest.approx(seen.mean(), rel=tolerance)
    assert expected == pytest.approx(seen, rel=3 * tolerance)


def test_skewed_touches_match_sampling() -> None:
    moe = MoE(experts=32, top_k=4, intermediate=8)
    shares = popularity(gqa_model(moe=moe), Routing(kind="zipf", alpha=0.6))[0]
    counts = np.bincount(sample_top_k(moe, shares, 40_000, np.random.default_rng(7)).ravel(), minlength=32)
    observed = counts / counts.sum()  # top-k flattens popularity: compare at what was really drawn
    owner = np.arange(32) // 4
    expected = touch_probability(moe, observed, np.arange(32), owner, 8)
    chosen = owner[sample_top_k(moe, shares, 40_000, np.random.default_rng(8))]
    seen = np.stack([(chosen == o).any(axis=1).mean() for o in range(8)])
    assert expected == pytest.approx(seen, rel=0.05)


@pytest.mark.parametrize("equal", [True, False])
def test_expected_maximum_of_loads(equal: bool) -> None:
    rng = np.random.default_rng(2)
    mean = np.full((1, 32), 100.0) if equal else rng.uniform(80, 120, (1, 32))
    std = np.full((1, 32), 9.0) if equal else rng.uniform(5, 12, (1, 32))
    drawn = (mean + std * rng.standard_normal((60_000, 32))).max(axis=1).mean()
    assert expected_max(mean, std**2)[0] == pytest.approx(drawn, rel=0.003)


@pytest.mark.parametrize(("tokens", "alpha"), [(256, 0.0), (4096, 0.0), (512, 0.5), (4096, 0.5)])
def test_fullest_rank_of_sampled_batches(tokens: int, alpha: float) -> None:
    """Mean over batches of the fullest rank's pairs within 2%, and of the experts hit."""
    model = gqa_model(moe=MoE(experts=64, top_k=6, intermediate=8))
    assert model.moe is not None
    shares = popularity(model, Routing(kind="zipf", alpha=alpha), seed=1)
    rng = np.random.default_rng(9)
    loads, marginals = [], []
    for row in shares:
        chosen = np.stack([sample_top_k(model.moe, row, tokens, rng) for _ in range(16)])
        counts = np.stack([np.bincount(batch.ravel(), minlength=64) for batch in chosen])
        marginals.append(counts.sum(axis=0) / counts.sum())
        loads.append(counts.reshape(16, 16, 4).sum(axis=2).max(axis=1).mean())
    placement = linear(len(shares), 64, 16)
    work = expert_work(model, placement, np.stack(marginals))
    assert float(work.at(np.array([tokens]), work.pairs_max)[0]) == pytest.approx(np.mean(loads), rel=0.02)


def test_even_load_matrix_is_exact() -> None:
    """Without noise (many tokens) max over mean is the placement's own arithmetic."""
    model = load_model("deepseek-r1")
    shares = popularity(model, Routing(kind="zipf", alpha=0.5), seed=4)
    pool = pool_of(dp=32, ep=32)
    placement = place(model, pool, shares, 4)
    exact = (rank_load(shares, placement).max(axis=1) * 32).mean()
    work = expert_work(model, placement, shares)
    assert float(work.pairs_max[-1] / work.pairs_mean[-1]) == pytest.approx(exact, rel=0.005)


def test_split_replicas_leave_the_fullest_rank_what_senders_cannot_even_out() -> None:
    """Beside `BatchSplit` itself: the fullest of 8 ranks, every rank spreading its own batch over replicas."""
    ranks, experts, slots, k = 8, 64, 80, 4
    model = gqa_model(moe=MoE(experts=experts, top_k=k, intermediate=8))
    rng = np.random.default_rng(2)
    before = np.exp(0.8 * rng.standard_normal((1, experts)))
    placed = place_global(before, slots, ranks)
    shares = before * np.exp(0.3 * rng.standard_normal(before.shape))
    shares = np.minimum(shares / shares.sum(), 1 / k)
    shares /= shares.sum()
    split = BatchSplit(placed.slot_to_logical[0].tolist(), experts, ranks)
    for tokens in (16, 128):
        seen, counts = [], np.zeros(experts)
        for _ in range(16):
            total = np.zeros(ranks)
            for source in range(ranks):
                chosen = np.argsort(-(np.log(shares) + rng.gumbel(size=(tokens, experts))), axis=1)[:, :k]
                counts += np.bincount(chosen.ravel(), minlength=experts)
                sent = split.slots(chosen.ravel(), source)
                total += np.bincount(sent // (slots // ranks), minlength=ranks)
            seen.append(total.max() / total.mean())
        drawn = counts[None] / counts.sum()  # top-k without replacement flattens popularity
        work = expert_work(model, placed, drawn, slot_shares(drawn, placed, split=True), ranks)
        alike = expert_work(model, placed, drawn)
        at = np.array([float(tokens * ranks)])
        said, plain = (float(one.at(at, one.pairs_max)[0] / one.at(at, one.pairs_mean)[0]) for one in (work, alike))
        assert said == pytest.approx(np.mean(seen), rel=0.05) and said < plain - 0.02


def test_eplb_evens_loads_and_replicas_share() -> None:
    model = mla_model()
    shares = popularity(model, Routing(kind="zipf", alpha=0.9), seed=0)
    plain = place(model, pool_of(dp=8, ep=8), shares, 1)
    for kind in ("eplb_global", "eplb_hierarchical"):
        placed = place(model, pool_of(dp=8, ep=8, redundant_experts=8, placement=kind), shares, 2)
        assert rank_load(shares, placed).max(axis=1).mean() < rank_load(shares, plain).max(axis=1).mean()
        assert slot_shares(shares, placed).sum(axis=1) == pytest.approx(np.ones(3))
