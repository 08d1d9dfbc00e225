"""Seconds by phase, on the host and on a device that runs behind it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest

from runtime.board import PHASES
from runtime.clock import ON_DEVICE, Clock, DeviceClock
from runtime.measure import PARTS


@dataclass
class Device:
    """Work queued takes its time one after another; `done_s` is how far the device has come."""

    queued_s: float = 0.0
    done_s: float = 0.0
    made: int = 0
    asked: int = 0

    def work(self, seconds: float) -> None:
        self.queued_s += seconds

    def event(self) -> Event:
        self.made += 1
        return Event(self)


@dataclass
class Event:
    device: Device
    at_s: float = field(default=-1.0)

    def record(self) -> None:
        self.at_s = self.device.queued_s

    def query(self) -> bool:
        self.device.asked += 1
        return self.at_s <= self.device.done_s

    def elapsed_time(self, later: Event) -> float:
        assert self.at_s <= later.at_s <= self.device.done_s, "asking would wait for the device"
        return (later.at_s - self.at_s) * 1e3


def test_the_devices_seconds_count_where_its_work_was_queued() -> None:
    device = Device()
    clock = DeviceClock(None, 0, make_event=device.event)
    clock.mark("attention")
    device.work(5.0)  # before it serves: warm-up, capture
    clock.mark("idle")
    clock.take()
    for step in range(3):
        clock.mark("schedule")
        clock.mark("attention")
        device.work(1.0)
        with clock.within("experts"):
            clock.mark("gate")
            device.work(2.0)
        clock.mark("attention")
        device.work(0.5)
        clock.mark("sample")
        device.done_s = device.queued_s
        time.sleep(0.01)
        clock.mark("draft")
        device.work(4.0)
        parts = clock.take()
        assert parts["attention"] == pytest.approx(1.5)
        assert parts["experts"] == pytest.approx(2.0)
        assert "gate" not in parts
        assert parts.get("draft", 0.0) == pytest.approx(4.0 if step else 0.0), "what is not done yet counts in the next step"
        assert parts["sample"] == 0.0, "the host did not wait longer than the device worked"
        clock.mark("book")
    assert device.made < 12, "events are used again"


def test_a_step_is_read_while_the_next_one_runs() -> None:
    """Its times end at the cut; marks of the next step wait for theirs."""
    device = Device()
    clock = DeviceClock(None, 0, make_event=device.event)
    clock.mark("idle")
    clock.take()
    cuts = []
    for seconds in (1.0, 2.0, 3.0):
        clock.mark("graph")
        if cuts:
            device.done_s = device.queued_s
            assert clock.read(cuts.pop())["graph"] == pytest.approx(seconds - 1)
        device.work(seconds)
        clock.mark("sample")
        clock.mark("book")
        cuts.append(clock.cut())
    late = clock.cut()
    device.done_s = device.queued_s
    assert clock.read(late)["graph"] == pytest.approx(3.0)
    assert "graph" not in clock.read(cuts.pop()), "an older cut has nothing left on the device"
    clock.mark("graph")
    device.work(4.0)
    clock.mark("sample")
    device.done_s = device.queued_s
    assert clock.take()["graph"] == pytest.approx(4.0)


def graph_step(clock: DeviceClock, device: Device, seconds: float, waits: bool = True) -> dict[str, float]:
    """A step in a graph: the host waits for it and 5 ms longer, or does not wait at all."""
    clock.mark("schedule")
    clock.mark("graph")
    device.work(seconds)
    if waits:
        clock.mark("sample")
        time.sleep(seconds + 0.005)
    device.done_s = device.queued_s
    clock.mark("book")
    return clock.take()


def test_graphs_in_quick_succession_are_not_all_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    clock = DeviceClock(None, 0, make_event=device.event)
    clock.mark("idle")
    clock.take()
    monkeypatch.setattr("runtime.clock.TIMED_EVERY_S", 1e9)
    assert graph_step(clock, device, 0.02)["graph"] == pytest.approx(0.02)
    made = device.made
    untimed = [graph_step(clock, device, 0.02) for _ in range(3)]
    assert device.made == made and not clock._timing, "no events"
    for parts in untimed:
        assert parts["graph"] == pytest.approx(0.02, abs=5e-3) and parts["sample"] == pytest.approx(0.005, abs=5e-3)
    monkeypatch.setattr("runtime.clock.TIMED_EVERY_S", 0.0)
    assert graph_step(clock, device, 0.01)["graph"] == pytest.approx(0.01), "and now by the device again"


def test_graphs_that_nobody_waits_for_are_all_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    clock = DeviceClock(None, 0, make_event=device.event)
    clock.mark("idle")
    clock.take()
    monkeypatch.setattr("runtime.clock.TIMED_EVERY_S", 1e9)
    for seconds in (1.0, 2.0, 3.0):  # a TP follower's: the host's seconds say nothing of them
        assert graph_step(clock, device, seconds, waits=False)["graph"] == pytest.approx(seconds)


def test_the_device_is_asked_once_how_far_it_is() -> None:
    """However many layers a step has: the host's seconds are the step's."""
    device = Device()
    clock = DeviceClock(None, 0, make_event=device.event)
    clock.mark("idle")
    for layers in (1, 60):
        clock.take()
        for _ in range(layers):
            for phase in ("attention", "gate", "dispatch", "experts", "combine"):
                clock.mark(phase)
                device.work(0.5)
        clock.mark("sample")
        device.done_s = device.queued_s
        before = device.asked
        parts = clock.take()
        assert device.asked == before + 1
        assert parts["gate"] == pytest.approx(0.5 * layers)


def test_parts_make_the_whole() -> None:
    device = Device()
    for clock in (Clock(None, 0), DeviceClock(None, 0, make_event=device.event)):
        clock.mark("idle")
        clock.take()
        began = time.monotonic()
        for phase in ("schedule", "attention", "experts", "sample", "book"):
            clock.mark(phase)
            device.work(0.001)
            time.sleep(0.004)
            device.done_s = device.queued_s
        parts = clock.take()
        assert sum(parts.values()) == pytest.approx(time.monotonic() - began, abs=2e-2)
        assert parts["book"] >= 0.004


def test_every_phase_of_a_step_has_a_name_in_results() -> None:
    assert set(PHASES) >= ON_DEVICE
    assert set(PARTS) >= ON_DEVICE
    outside = {"start", "load", "capture", "warm-up", "reform", "idle", "done"}
    assert set(PHASES) - outside == set(PARTS)
