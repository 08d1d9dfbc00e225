"""KV that leaves a prefill rank while its prompt is computed: what is on its way when, piece by piece, over gloo."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from runtime_worlds import fork_world

from runtime.batch import Segment
from runtime.comm.group import PeerLost
from runtime.progress import Progress
from runtime.transfer import start_receive, start_send

LAYERS, BLOCK, TOKENS, WIDTH = 2, 4, 11, 3
SOURCE, TARGET = (5, 2, 7), (0, 1, 3)


class Told:
    """Stands in for the control channel."""

    formation = 0

    def __init__(self) -> None:
        self.heard = threading.Event()
        self.message: dict[str, Any] = {}

    def send(self, message: dict[str, Any]) -> None:
        self.message = message
        self.heard.set()

    post = send


def prompt(start: int, stop: int) -> Segment:
    return Segment(range(start, stop), start, SOURCE, True)


def values(layer: int) -> torch.Tensor:
    return torch.arange(TOKENS * WIDTH).view(TOKENS, WIDTH) + 100.0 * (layer + 1)


def stored(kv: list[torch.Tensor]) -> list[int]:
    """Tokens of every layer that lie where they should."""
    rows = [cache[list(TARGET)].flatten(0, 1)[:TOKENS] for cache in kv]
    return [int((row == values(i)).all(1).int().cumprod(0).sum()) for i, row in enumerate(rows)]


def hand_over(rank: int, early: bool, by_layer: bool) -> list[list[int]]:
    """Rank 0 computes a prompt in two chunks and sends it; rank 1 waits after every stage for all that can have come by then,
    before rank 0 goes on. What came."""
    kv = [torch.zeros(8, BLOCK, WIDTH) for _ in range(LAYERS)]
    ask = {"id": 1, "tag": 9, "tokens": TOKENS, "early": early, "routes": [[1 - rank, 0, 1]]}
    told, go = Told(), torch.zeros(1)
    # (last token of the stage, layer that has it or all, what is there in the end)
    stages = [((0, 7), 0, [7, 0]), ((0, 7), None, [7, 7]), ((7, 11), 0, [11, 7]), ((7, 11), None, [11, 11])]
    if rank == 1:
        start_receive(SimpleNamespace(kv=kv), {**ask, "blocks": TARGET}, told)  # type: ignore[arg-type]
        came = []
        for _, layer, want in stages:
            if early and (by_layer or layer is None):
                until = time.monotonic() + 20
                while stored(kv) != want and time.monotonic() < until:
                    time.sleep(0.005)
            came.append(stored(kv))
            dist.send(go, 0)
        assert told.heard.wait(20), "the transfer did not end"
        return [*came, stored(kv), [told.message["bytes"]]]
    progress = Progress()
    for i, cache in enumerate(kv):
        cache[list(SOURCE)] = torch.nn.functional.pad(values(i), (0, 0, 0, 1)).view(3, BLOCK, WIDTH)
    progress.begin([prompt(0, 7)])
    start_send(SimpleNamespace(kv=kv, progress=progress), {**ask, "blocks": SOURCE}, told)  # type: ignore[arg-type]
    for (start, stop), layer, _ in stages:
        if layer is None:
            progress.end()
        else:
            if start:
                progress.begin([prompt(start, stop)])
            if by_layer:
                progress.layer(layer)
        dist.recv(go, 1)
    assert told.heard.wait(20)
    return []


@pytest.mark.parametrize("by_layer", [False, True], ids=["chunk", "layer"])
def test_what_is_computed_leaves_while_the_rest_is_not(tmp_path: Path, by_layer: bool) -> None:
    _, (first, chunk, third, done, end, n_bytes) = fork_world(2, tmp_path, hand_over, True, by_layer)
    assert (first, third) == (([7, 0], [11, 7]) if by_layer else ([0, 0], [7, 7]))
    assert (chunk, done, end) == ([7, 7], [11, 11], [11, 11])
    assert n_bytes == [LAYERS * TOKENS * WIDTH * 4]


def test_a_whole_prompt_is_one_piece(tmp_path: Path) -> None:
    assert fork_world(2, tmp_path, hand_over, False, False)[1][-2:] == [[11, 11], [LAYERS * TOKENS * WIDTH * 4]]


def test_halves_are_stored_when_both_are() -> None:
    progress = Progress()
    progress.begin([prompt(0, 7)], parts=2)
    progress.layer(0)
    assert progress._stored(SOURCE[-1], 0) == 0
    progress.layer(0)
    assert [progress._stored(SOURCE[-1], layer) for layer in range(LAYERS)] == [7, 0]


def test_a_table_that_was_another_requests_starts_anew() -> None:
    progress = Progress()
    progress.begin([prompt(0, 7)])
    progress.end()
    progress.begin([Segment(range(2), 0, (1, SOURCE[-1]), True)])
    assert progress._stored(SOURCE[-1], 0) == 0


def test_who_waits_hears_that_the_formation_is_over() -> None:
    progress = Progress()
    threading.Timer(0.1, progress.close).start()
    with pytest.raises(PeerLost, match="over"):
        progress.wait_for(SOURCE, 0, 0)
