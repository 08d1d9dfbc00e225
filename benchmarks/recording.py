"""What recording costs a step on a GPU: seconds from one decode step's news to the next, by what of the step is recorded.

Three kinds of steps. `plain`: marks note the phase alone. `timed`: events on the device at marks as well, and the step's times
are taken and dropped. `recorded`: they are kept, packed and sent, as a run that records does. Which kind a step is, is drawn for
every step (`by_step`, little noise), or is the same for a whole round of requests (`by_round`: rounds of the three kinds follow
one another in an order drawn anew each time, so that what a step leaves to the next counts too). Wall seconds, since the host
waits for the device: what the host does meanwhile costs nothing. `own_s` is what ending a step's times takes the
host between steps, `later_s` what reading and keeping them takes it while the next step runs, `mark_s` what a mark takes with and
without events, apart from any step.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from runtime.clock import Clock, Cut, DeviceClock
from runtime.loop import StepLoop
from runtime.rank import Rank
from runtime.records import StepLog
from runtime.types import SamplingParams

KINDS = ("plain", "timed", "recorded")
PROMPT = 16
"""Tokens of every prompt: all of a round are computed in its first step, which is not counted."""
_RESAMPLES = 1000
Json = dict[str, Any]
Took = dict[str, list[float]]


class Switched(DeviceClock):
    """A clock that records no event while `quiet`."""

    quiet = False

    def mark(self, phase: str) -> None:
        if self.quiet:
            Clock.mark(self, phase)
        else:
            super().mark(phase)


class Dropped(StepLog):
    """Keeps nothing."""

    def add(self, *args: Any) -> None: ...


class Loop(StepLoop):
    """Notes what each step's record took, most of it while the next step runs on the device."""

    own: list[float]
    later: list[float]

    def _end_step(self) -> Cut:
        began = time.perf_counter()
        cut = super()._end_step()
        self.own.append(time.perf_counter() - began)
        return cut

    def _write_down(self, *args: Any) -> None:
        began = time.perf_counter()
        super()._write_down(*args)
        self.later.append(time.perf_counter() - began)


class Script:
    """Control without a socket: says a round's requests at once, and with the news of every step draws the next one's kind."""

    formation = 0

    def __init__(self, clock: Switched) -> None:
        self.clock = clock
        self.messages: list[Json] = []
        self.logs: dict[str, StepLog | None] = {"plain": None, "timed": Dropped(self.send), "recorded": StepLog(self.send)}
        self.loop: Loop | None = None
        self.choose: Callable[[], str] = lambda: "recorded"
        self.kind, self.requests, self.sent_bytes, self.records = "recorded", 0, 0, 0
        self.took: Took = {}
        self.own: Took = {}
        self.later: list[float] = []
        self._last: float | None = None

    def begin(self, loop: Loop, requests: int) -> None:
        """A round."""
        self.loop, self.requests, self._last = loop, requests, None
        loop.own, loop.later = [], []
        self._become(self.choose())

    def drain(self, *, wait: bool) -> list[Json]:
        said, self.messages = self.messages or ([{"op": "stop"}] if wait else []), []
        return said

    def send(self, message: Json) -> None:
        line = json.dumps({"seat": 0, "formation": 0, **message}, separators=(",", ":"))
        self.sent_bytes += len(line)
        self.records += message["ev"] == "records"
        if message["ev"] != "step" or self.loop is None:
            return
        now = time.monotonic()
        if self._last is not None and len(message["out"]) == self.requests and not message["began"]:
            self.took.setdefault(self.kind, []).append(now - self._last)
            self.own.setdefault(self.kind, []).extend(self.loop.own)
            self.later += self.loop.later
        self.loop.own.clear()
        self.loop.later.clear()
        self._become(self.choose())
        self._last = time.monotonic()

    def _become(self, kind: str) -> None:
        assert self.loop is not None
        if self.loop.log not in (None, self.logs[kind]):
            self.loop.log.settle()  # cuts are read in their order; no step's seconds run just now
        self.kind, self.loop.log, self.clock.quiet = kind, self.logs[kind], kind == "plain"


def serve(rank: Rank, script: Script, requests: int, tokens: int) -> None:
    """A round: a batch of requests, all at once, to the end."""
    params = asdict(SamplingParams(max_tokens=tokens, ignore_eos=True))
    script.messages = [{"op": "add", "id": i, "tokens": [i + 1] * PROMPT, "prompt_len": PROMPT, "seed": i, "params": params,
                        "wake": 1} for i in range(requests)]
    loop = Loop(rank, script, script.clock, record=False)  # type: ignore[arg-type]
    script.begin(loop, requests)
    loop.run()


def by_step(rank: Rank, clock: Switched, requests: int, tokens: int, rounds: int) -> Json:
    """Every step of a kind drawn at random."""
    script, coin = Script(clock), random.Random(1)
    script.choose = lambda: coin.choice(KINDS)
    for _ in range(rounds):
        serve(rank, script, requests, tokens)
    stream = np.random.default_rng(2)
    found = {kind: figures(script.took[kind]) for kind in KINDS}
    more = {kind: apart(script.took[kind], script.took["plain"], stream) for kind in KINDS[1:]}
    own = {kind: {"median_s": statistics.median(script.own[kind]), "mean_s": statistics.fmean(script.own[kind])}
           for kind in KINDS[1:]}
    later = statistics.median(script.later) if script.later else 0.0
    return {**found, "over_plain": more, "own_s": own, "later_s": later}


def by_round(rank: Rank, clock: Switched, requests: int, tokens: int, cycles: int) -> Json:
    """Every kind once in every cycle, a round each; the intervals are over cycles."""
    coin, took, medians = random.Random(3), Took(), {kind: list[float]() for kind in KINDS}
    for _ in range(cycles):
        for kind in coin.sample(KINDS, len(KINDS)):
            script = Script(clock)
            script.choose = lambda kind=kind: kind  # type: ignore[misc]
            serve(rank, script, requests, tokens)
            took.setdefault(kind, []).extend(script.took[kind])
            medians[kind].append(statistics.median(script.took[kind]))
    stream = np.random.default_rng(4)
    more = {}
    for kind in KINDS[1:]:
        gaps = np.subtract(medians[kind], medians["plain"])
        drawn = np.median(gaps[stream.integers(len(gaps), size=(_RESAMPLES, len(gaps)))], axis=1)
        base = statistics.median(medians["plain"])
        more[kind] = {"median": _told(float(np.median(gaps)), drawn, base)}
    return {**{kind: figures(took[kind]) for kind in KINDS}, "over_plain": more, "cycles": cycles}


def figures(seconds: Sequence[float]) -> Json:
    """Of steps of one kind: median, mean of the middle 80%, mean of all."""
    return {"median_s": statistics.median(seconds), "middle_s": float(_middle(np.asarray(seconds)[None])[0]),
            "mean_s": statistics.fmean(seconds), "steps": len(seconds)}


def apart(these: Sequence[float], those: Sequence[float], stream: np.random.Generator) -> Json:
    """How much longer these steps take than those, as `figures` has it, each with an 80% interval from resampling both."""
    a, b = np.asarray(these), np.asarray(those)
    found = {}
    for name, of in (("median", lambda x: np.median(x, axis=1)), ("middle", _middle), ("mean", lambda x: x.mean(axis=1))):
        drawn = np.concatenate([of(_resampled(a, stream)) - of(_resampled(b, stream)) for _ in range(_RESAMPLES // 50)])
        base = float(of(b[None])[0])
        found[name] = _told(float(of(a[None])[0]) - base, drawn, base)
    return found


def _resampled(x: np.ndarray, stream: np.random.Generator) -> np.ndarray:
    return x[stream.integers(len(x), size=(50, len(x)))]


def _middle(rows: np.ndarray) -> np.ndarray:
    """Mean of each row without its least and its largest tenth."""
    cut = rows.shape[1] // 10
    found: np.ndarray = np.sort(rows, axis=1)[:, cut:rows.shape[1] - cut].mean(axis=1)
    return found


def _told(gap: float, drawn: np.ndarray, base: float) -> Json:
    low, high = np.quantile(drawn, (0.1, 0.9)).tolist()
    return {"more_s": gap, "low_s": low, "high_s": high, "share": gap / base, "low": low / base, "high": high / base}


def mark_s(clock: Switched) -> Json:
    """Seconds of a mark of a step in a graph, apart from any step: of two, both make an event unless the clock is quiet."""
    found = {}
    for name, quiet in (("plain", True), ("events", False)):
        clock.quiet, spent = quiet, []
        for _ in range(500):
            clock.mark("idle")
            clock.take()
            began = time.perf_counter()
            clock.mark("graph")
            clock.mark("sample")
            spent.append((time.perf_counter() - began) / 2)
        found[name] = statistics.median(spent)
    clock.quiet = False
    return found


def lines(requests: int, row: Json) -> list[str]:
    """What was found, for people."""
    marks = {name: f"{seconds * 1e6:.2f} us" for name, seconds in row["mark_s"].items()}
    found = [f"{requests} requests: a mark takes {marks['plain']}, with an event {marks['events']}"]
    for way in ("by_step", "by_round"):
        told = row[way]
        found.append(f"  {way}: plain {told['plain']['median_s'] * 1e3:.4f} ms in the median of {told['plain']['steps']} steps")
        for kind, gaps in told["over_plain"].items():
            each = ", ".join(f"{name} {gap['share']:+.2%} ({gap['low']:+.2%} .. {gap['high']:+.2%})"
                             for name, gap in gaps.items())
            own = (f"; between steps {told['own_s'][kind]['median_s'] * 1e6:.1f} us, beside them {told['later_s'] * 1e6:.1f}"
                   if "own_s" in told else "")
            found.append(f"    {kind:9} {each}{own}")
    return found
