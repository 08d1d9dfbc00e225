"""KV from a prefill rank to a decode rank, layer by layer, in a thread beside the steps.

Blocks being read belong to a request that is held or in prefill, blocks being written to one that has not begun, so steps
meanwhile touch neither, or only tokens that are not read yet. Messages between two ranks are told apart by the transfer's tag
and keep their order within it.

A transfer goes in pieces: how far the piece reaches, then every layer's part of it. Where KV leaves early (`Progress`) a piece is
what is computed by then, else the whole prompt is one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from runtime.comm.group import PeerLost, guarded
from runtime.control import Control, Message
from runtime.kv import read_kv, write_kv
from runtime.rank import Rank


def start_send(rank: Rank, message: Message, control: Control) -> None:
    """Send `tokens` tokens of `blocks` as `routes` [[peer, first head, last head], ...] say; reports `sent`."""
    _start("sent", _send, rank, message, control)


def start_receive(rank: Rank, message: Message, control: Control) -> None:
    """The other side of `start_send`; reports `received`."""
    _start("received", _receive, rank, message, control)


def _send(rank: Rank, message: Message) -> tuple[int, float]:
    began, n_bytes, done, total = time.monotonic(), 0, 0, message["tokens"]
    blocks, routes = message["blocks"], message["routes"]
    progress = rank.progress if message["early"] else None
    while done < total:
        stop = progress.wait_for(blocks, 0, done) if progress is not None else total
        for peer, _, _ in routes:
            guarded(partial(dist.send, torch.tensor([stop]), peer, tag=message["tag"]))
        for layer, cache in enumerate(rank.kv):
            if progress is not None:
                progress.wait_for(blocks, layer, stop - 1)
            for peer, first, last in routes:
                part = read_kv(cache, blocks, (done, stop), (first, last)).cpu()
                guarded(partial(dist.send, part, peer, tag=message["tag"]))
                n_bytes += part.numel() * part.element_size()
        done = stop
    return n_bytes, began


def _receive(rank: Rank, message: Message) -> tuple[int, float]:
    """Source by source, in the order in which all receivers take them; the transfer began with the first piece."""
    n_bytes, began, reach = 0, 0.0, torch.zeros(1, dtype=torch.int64)
    for peer, first, last in message["routes"]:
        done = 0
        while done < message["tokens"]:
            guarded(partial(dist.recv, reach, peer, tag=message["tag"]))
            began, rows = began or time.monotonic(), int(reach) - done
            for cache in rank.kv:
                shape = (rows, *cache.shape[2:]) if cache.dim() == 3 else (rows, 2, last - first, cache.shape[-1])
                part = torch.empty(shape, dtype=cache.dtype)
                guarded(partial(dist.recv, part, peer, tag=message["tag"]))
                write_kv(cache, message["blocks"], part.to(cache.device), (first, last), done)
                n_bytes += part.numel() * part.element_size()
            done += rows
    return n_bytes, began


Work = Callable[[Rank, Message], tuple[int, float]]
"""Move a request's KV; the bytes moved, and when that began."""


def _start(event: str, work: Work, rank: Rank, message: Message, control: Control) -> None:
    formation = control.formation

    def run() -> None:
        try:
            with torch.inference_mode():
                n_bytes, began = work(rank, message)
            control.send({"ev": event, "formation": formation, "id": message["id"], "bytes": n_bytes, "start": began,
                          "end": time.monotonic()})
        except PeerLost as err:  # the main thread must end the rank, and with the right words
            control.post({"op": "lost", "formation": formation, "error": f"KV transfer: {err}"})

    threading.Thread(target=run, daemon=True, name=f"kv-{event}-{message['tag']}").start()
