"""Which replica of an expert a token goes to: a wheel of slots for every expert, turned by the tokens of a step.

A slot comes on its expert's wheel as often as its share of the expert's load asks for, spread evenly, so that a run of
tokens of any length keeps close to the shares. Which replica is taken never changes a result, so ranks may turn
different wheels.

Legend: E experts, S slots, W places on a wheel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MIN_PLACES = 32
"""Shares are kept to within half of one part in so many."""


def places_for(ep: int) -> int:
    """W: at least one place for a replica on every rank."""
    return max(MIN_PLACES, 1 << (ep - 1).bit_length())


def wheels(slot_experts: Sequence[int], experts: int, places: int,
           shares_S: NDArray[np.float64] | None = None) -> NDArray[np.int64]:
    """[E, W] slots. `shares_S` are loads by slot (None: alike). Every expert needs a slot; a slot with no share gets no
    token as long as another one of its expert has any."""
    slots_of: list[list[int]] = [[] for _ in range(experts)]
    for slot, expert in enumerate(slot_experts):
        slots_of[expert].append(slot)
    assert all(slots_of), "an expert without a slot"
    wheel_EW = np.empty((experts, places), dtype=np.int64)
    for expert, slots in enumerate(slots_of):
        if len(slots) == 1:
            wheel_EW[expert] = slots[0]
            continue
        shares = np.ones(len(slots)) if shares_S is None else np.asarray(shares_S, dtype=np.float64)[slots]
        wheel_EW[expert] = _wheel(np.array(slots), shares if shares.sum() > 0 else np.ones(len(slots)), places)
    return wheel_EW


def _wheel(slots: NDArray[np.int64], shares: NDArray[np.float64], places: int) -> NDArray[np.int64]:
    """W slots: counts by largest remainder, the n places of a slot at (j + 1/2) / n of the way round."""
    exact = shares / shares.sum() * places
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[:places - int(counts.sum())]] += 1
    owner = np.repeat(np.arange(len(slots)), counts)
    nth = np.arange(places) - np.repeat(np.cumsum(counts) - counts, counts)
    return slots[owner[np.argsort((nth + 0.5) / counts[owner], kind="stable")]]
