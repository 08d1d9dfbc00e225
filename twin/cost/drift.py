"""Popularity that changes while a service runs: as it was recorded, or drifting: which experts are popular changes then, how
uneven they are does not.

Every expert of a layer has a score; the layer's shares are dealt by rank of score. Scores start as normal quantiles of the
first popularity and wander as stationary normal processes whose correlation with what they were halves in `half_life_s`.
Legend of shapes: L MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from twin.cost.batch import Array
from twin.spec.scenario import Routing

_TICKS = 16  # a half life; between two ticks nothing changes


class Drift:
    """The popularity of every moment. `epoch` numbers the times between ticks; epoch 0 is the popularity it began with."""

    def __init__(self, first_LE: Array, routing: Routing, stream: np.random.Generator) -> None:
        assert routing.drift_half_life_s is not None
        self.tick_s = routing.drift_half_life_s / _TICKS
        self._shares_LE = np.sort(first_LE, axis=1)
        self._common = routing.layer_correlation
        self._stream, self._keeps = stream, 2.0 ** (-1.0 / _TICKS)
        count = first_LE.shape[1]
        quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
        ranks = np.argsort(np.argsort(first_LE, axis=1, kind="stable"), axis=1)
        self._scores_LE = quantiles[ranks]
        self._known = [np.asarray(first_LE)]

    def epoch(self, time_s: float) -> int:
        return whole_ticks(time_s, self.tick_s)

    def next_s(self, epoch: int) -> float:
        """When the epoch after this one begins."""
        return (epoch + 1) * self.tick_s

    def at(self, epoch: int) -> Array:
        """Shares [L, E] in an epoch."""
        while len(self._known) <= epoch:
            layers, experts = self._scores_LE.shape
            news = layer_scores(layers, experts, self._common, self._stream)
            self._scores_LE = self._keeps * self._scores_LE + math.sqrt(1.0 - self._keeps**2) * news
            ranks = np.argsort(np.argsort(self._scores_LE, axis=1, kind="stable"), axis=1)
            self._known.append(np.take_along_axis(self._shares_LE, ranks, axis=1))
        return self._known[epoch]


class Recorded:
    """Popularity as windows of a recording had it, [L, E] each; the last one stays."""

    def __init__(self, windows: Sequence[Array], window_s: float) -> None:
        self.tick_s, self._windows = window_s, windows

    def epoch(self, time_s: float) -> int:
        return min(whole_ticks(time_s, self.tick_s), len(self._windows) - 1)

    def next_s(self, epoch: int) -> float:
        """When the epoch after this one begins."""
        return (epoch + 1) * self.tick_s if epoch + 1 < len(self._windows) else math.inf

    def at(self, epoch: int) -> Array:
        """Shares [L, E] in an epoch."""
        return self._windows[epoch]


def whole_ticks(time_s: float, tick_s: float) -> int:
    """The last n with n x tick_s <= time_s; a division alone would round."""
    number = int(time_s / tick_s)
    return number - (time_s < number * tick_s) + (time_s >= (number + 1) * tick_s)


def layer_scores(layers: int, experts: int, correlation: float, stream: np.random.Generator) -> Array:
    """Standard normal scores [L, E], those of one expert number correlated between any two layers."""
    common, own = stream.standard_normal(experts), stream.standard_normal((layers, experts))
    return np.asarray(math.sqrt(correlation) * common + math.sqrt(1.0 - correlation) * own)
