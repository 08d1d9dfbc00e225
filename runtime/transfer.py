"""KV from a prefill rank to a decode rank, layer by layer, in a thread beside the steps.

Blocks being read belong to a request that is held, blocks being written to one that has not begun, so steps meanwhile
touch neither. Messages between two ranks are told apart by the transfer's tag and keep their order within it.
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


def _send(rank: Rank, message: Message) -> int:
    n_bytes = 0
    for cache in rank.kv:
        for peer, first, last in message["routes"]:
            part = read_kv(cache, message["blocks"], message["tokens"], (first, last)).cpu()
            guarded(partial(dist.send, part, peer, tag=message["tag"]))
            n_bytes += part.numel() * part.element_size()
    return n_bytes


def _receive(rank: Rank, message: Message) -> int:
    n_bytes = 0
    for cache in rank.kv:
        for peer, first, last in message["routes"]:
            shape = (message["tokens"], *cache.shape[2:]) if cache.dim() == 3 else \
                (message["tokens"], 2, last - first, cache.shape[-1])
            part = torch.empty(shape, dtype=cache.dtype)
            guarded(partial(dist.recv, part, peer, tag=message["tag"]))
            write_kv(cache, message["blocks"], part.to(cache.device), (first, last))
            n_bytes += part.numel() * part.element_size()
    return n_bytes


def _start(event: str, work: Callable[[Rank, Message], int], rank: Rank, message: Message, control: Control) -> None:
    formation = control.formation

    def run() -> None:
        began = time.monotonic()
        try:
            with torch.inference_mode():
                n_bytes = work(rank, message)
            control.send({"ev": event, "formation": formation, "id": message["id"], "bytes": n_bytes, "start": began,
                          "end": time.monotonic()})
        except PeerLost as err:  # the main thread must end the rank, and with the right words
            control.post({"op": "lost", "formation": formation, "error": f"KV transfer: {err}"})

    threading.Thread(target=run, daemon=True, name=f"kv-{event}-{message['tag']}").start()
