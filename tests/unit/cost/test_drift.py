"""Popularity that drifts: as uneven as ever, less and less like it was, and alike over layers as far as is asked."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cost_cases import gqa_model
from pydantic import ValidationError

from twin.cost.drift import Drift
from twin.cost.routing import over_time, popularity
from twin.spec.errors import SpecError
from twin.spec.model import MoE
from twin.spec.scenario import Routing

MODEL = gqa_model(layers=64, layer_attention=("full",) * 64, layer_ffn=("moe",) * 64,
                  moe=MoE(experts=64, top_k=4, intermediate=32))


def drift(**routing) -> Drift:
    asked = Routing(**{"kind": "lognormal", "sigma": 0.8, "drift_half_life_s": 60.0, **routing})
    return Drift(popularity(MODEL, asked), asked, np.random.default_rng(1))


def likeness(one, other) -> float:
    """Correlation of log shares, mean over layers."""
    return float(np.mean([np.corrcoef(np.log(a), np.log(b))[0, 1] for a, b in zip(one, other, strict=True)]))


@pytest.mark.parametrize("routing", [{}, {"kind": "zipf", "alpha": 0.7}])
def test_shares_change_owners_and_nothing_else(routing):
    moves = drift(**routing)
    first = moves.at(0)
    assert (first == popularity(MODEL, Routing(**{"kind": "lognormal", "sigma": 0.8, **routing}))).all()
    for epoch in (1, 16, 100):
        later = moves.at(epoch)
        assert (np.sort(later, axis=1) == np.sort(first, axis=1)).all()
        assert (later != first).any()
    assert (moves.at(16) == moves.at(16)).all()


def test_half_of_the_likeness_is_gone_in_a_half_life():
    moves = drift()
    for half_lives in (0.25, 1.0, 2.0):
        epoch = moves.epoch(60.0 * half_lives)
        assert likeness(moves.at(0), moves.at(epoch)) == pytest.approx(0.5**half_lives, abs=0.05)
    assert likeness(moves.at(16), moves.at(32)) == pytest.approx(0.5, abs=0.05), "it is stationary"


def test_epochs_follow_the_clock():
    moves = drift(drift_half_life_s=0.7)
    for epoch in range(40):
        at = moves.next_s(epoch)
        assert moves.epoch(at) == epoch + 1 and moves.epoch(np.nextafter(at, 0.0)) == epoch


@pytest.mark.parametrize("kind", [{"kind": "zipf", "alpha": 0.5}, {"kind": "lognormal", "sigma": 0.7}])
def test_layers_are_as_alike_as_is_asked(kind):
    def between(correlation: float) -> float:
        shares = popularity(MODEL, Routing(**kind, layer_correlation=correlation))
        # log shares of zipf are not normal: ranks tell likeness for both
        ranks = np.argsort(np.argsort(shares, axis=1), axis=1)
        return float(np.corrcoef(ranks)[np.triu_indices(len(ranks), 1)].mean())

    assert between(0.0) == pytest.approx(0.0, abs=0.05)
    assert between(0.6) == pytest.approx(0.6, abs=0.12)
    assert between(1.0) == pytest.approx(1.0)
    moves = drift(**kind, layer_correlation=1.0)
    assert np.allclose(moves.at(20), moves.at(20)[0])


def test_a_recording_is_followed_window_by_window(tmp_path):
    rng, file = np.random.default_rng(3), tmp_path / "windows.json"
    loads = rng.integers(1, 1000, (3, 2, 64))
    file.write_text(json.dumps({"window_s": 0.7, "windows": loads.tolist()}))
    routing = Routing(kind="matrix", file=str(file))
    first = popularity(MODEL, routing)
    assert first[:2] == pytest.approx(loads[0] / loads[0].sum(axis=1, keepdims=True))
    recorded = over_time(MODEL, routing, first, rng)
    assert [recorded.epoch(t) for t in (0.0, 0.6999, 0.7, 1.4, 1e6)] == [0, 0, 1, 2, 2]
    assert recorded.next_s(1) == 1.4 and recorded.next_s(2) == float("inf")
    assert recorded.at(2).shape == (64, 64) and recorded.at(2)[3] == pytest.approx(loads[2, 1] / loads[2, 1].sum())
    with pytest.raises(SpecError, match="cannot drift as well"):
        over_time(MODEL, routing.model_copy(update={"drift_half_life_s": 1.0}), first, rng)


@pytest.mark.parametrize("data", [{"windows": []}, {"windows": [], "window_s": 1.0}, {"windows": [[[1.0]]], "window_s": 1.0},
                                  {"windows": 3, "window_s": 1.0}, {"windows": [[[1.0] * 64]], "window_s": 0}, [], {}])
def test_a_broken_recording_is_refused(tmp_path, data):
    file = tmp_path / "windows.json"
    file.write_text(json.dumps(data))
    with pytest.raises(SpecError):
        popularity(MODEL, Routing(kind="matrix", file=str(file)))


def test_one_table_does_not_change(tmp_path):
    file = tmp_path / "loads.json"
    file.write_text(json.dumps({"loads": [[1.0] * 64]}))
    assert over_time(MODEL, Routing(kind="matrix", file=str(file)), np.ones((1, 64)) / 64, np.random.default_rng(0)) is None


def test_what_cannot_drift_says_so():
    with pytest.raises(ValidationError, match="cannot drift"):
        Routing(drift_half_life_s=10.0)
    with pytest.raises(ValidationError, match="layer_correlation"):
        Routing(layer_correlation=0.5)
    with pytest.raises(ValidationError):
        Routing(kind="zipf", alpha=1.0, drift_half_life_s=0.0)
    assert Routing.model_validate({"kind": "zipf", "alpha": 1.0, "drift_half_life_s": "10 min"}).drift_half_life_s == 600.0
