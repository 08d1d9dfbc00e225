"""The lab of network namespaces: gloo's schedules on the twin's network, and real bytes through shaped links."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.netlab.cases import LABS, Case, Move, draw
from benchmarks.netlab.lab import PREFIX, LabError, LabSpec, alone, require, shaping
from benchmarks.netlab.schedule import Constants, all_gather, all_reduce, all_to_all, ends_s, kv_transfer
from benchmarks.netlab.study import Timing, fit, halves, measure, predict
from twin.cost.network import Network

ROOT = Path(__file__).resolve().parents[2]
SPEC = LabSpec("test", hosts=4, nic_bit_per_s=100e6, nic_delay_s=4e-3)
RATE = 100e6 / 8 * SPEC.wire_share
NONE = Constants()


def last_s(messages, spec=SPEC, constants=NONE, burst_bytes=0.0):
    return float(ends_s(messages, Network(spec.cluster()), constants, burst_bytes).max())


def near(seconds):
    """The word of how much KV comes is short beside it."""
    return pytest.approx(seconds, rel=1e-4)


def test_a_message_waits_for_its_receivers_note():
    assert last_s(kv_transfer(0, 1, 1, 1e6)) == near(2 * 4e-3 + 2 * 4e-3 + 1e6 / RATE)
    assert last_s(kv_transfer(0, 1, 5, 1e6)) == near(2 * 4e-3 + 5 * (2 * 4e-3 + 1e6 / RATE))


def test_all_to_all_ends_with_its_fullest_link():
    traffic = np.array([[0, 9, 1, 0], [2, 0, 4, 1], [1, 1, 0, 6], [0, 1, 2, 0]]) * 1e5
    fullest = max(traffic.sum(axis=0).max(), traffic.sum(axis=1).max())
    assert last_s(all_to_all(traffic)) == pytest.approx(2 * 4e-3 + fullest / RATE)


def test_rings_carry_what_rings_must_and_pay_latency_each_time_round():
    n = 4
    gathered, reduced = all_gather(1e6, n), all_reduce(8e6, n)
    assert sum(m.n_bytes for m in gathered) == pytest.approx(n * (n - 1) * 1e6)
    assert sum(m.n_bytes for m in reduced) == pytest.approx(2 * (n - 1) * 8e6)
    assert last_s(all_gather(0.0, n)) == pytest.approx((n - 1) * 2 * 4e-3)
    assert last_s(all_reduce(0.0, n)) == pytest.approx(2 * (n - 1) * 2 * 4e-3)
    assert last_s(gathered) >= (n - 1) * 1e6 / RATE


def test_transfers_and_collectives_share_links():
    traffic = np.zeros((4, 4))
    traffic[0, 1] = 1e6
    both = all_to_all(traffic) + kv_transfer(0, 2, 1, 1e6, 12)
    assert last_s(both) == near(2 * 4e-3 + 2e6 / RATE), "they share rank 0's NIC"
    apart = all_to_all(traffic) + kv_transfer(2, 3, 1, 1e6, 12)
    assert last_s(apart) == near(4 * 4e-3 + 1e6 / RATE)


def test_a_bucket_lets_through_what_it_holds_once():
    assert last_s(kv_transfer(0, 1, 1, 1e6), burst_bytes=1e4) == near(4 * 4e-3 + (1e6 - 1e4) / RATE)
    assert last_s(kv_transfer(0, 1, 1, 5e3), burst_bytes=1e4) == near(4 * 4e-3)


def test_oversubscription_is_felt_between_leaves_only():
    spec = replace(SPEC, leaf_ports=2, oversubscription=4.0)
    assert last_s(kv_transfer(0, 1, 1, 1e6), spec) == near(4 * 4e-3 + 1e6 / RATE)
    assert last_s(kv_transfer(0, 2, 1, 1e6), spec) == near(4 * 4e-3 + 2e6 / RATE)


def test_the_fit_finds_the_constants_that_made_the_times():
    true = Constants(late_s=0.5e-3, begin_s=2e-3)
    cases = [case for shape in LABS[0] for case in draw(shape, np.random.default_rng(1))]
    timings = [Timing(LABS[0][0], case, part, (predict(Timing(LABS[0][0], case, part, (0.0,)), true),))
               for case in cases for part in (["collective"] if case.op != "none" else []) + (["kv"] if case.kv else [])]
    found = fit(timings)
    assert found.late_s == pytest.approx(true.late_s, abs=0.11e-3) and found.begin_s == pytest.approx(true.begin_s, abs=0.5e-3)
    fitted, reported = halves(timings, 0)
    assert {id(t.case) for t in fitted}.isdisjoint(id(t.case) for t in reported)
    assert len(fitted) + len(reported) == len(timings) and halves(timings, 0) == (fitted, reported)


def test_cases_are_drawn_from_their_seed_and_there_are_enough():
    first, again, other = (draw(LABS[1][0], np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first == again != other
    shaped = [c for lab in LABS for shape in lab for c in draw(shape, np.random.default_rng(0))
              if c.kind in ("all_to_all", "kv", "overlap")]
    assert len(shaped) >= 60


def test_every_pair_has_a_class_for_each_of_its_connections():
    lines = shaping("nic0", 1e8, [(0, 1), (0, 2)])
    assert sum(line.startswith("class") for line in lines) == 2 + 4
    assert all("ceil 100000000bit" in line for line in lines if "parent 1:1 " in line and line.startswith("class"))


def test_without_root_it_says_so():
    code = "import os; os.geteuid = lambda: 1000; from benchmarks.netlab.__main__ import main; raise SystemExit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1 and "needs root" in done.stderr and "Traceback" not in done.stderr


def test_real_bytes_through_shaped_links():
    try:
        require()
        with alone():
            pass
    except LabError as error:
        pytest.skip(f"no lab here: {error}")
    spec = LabSpec("test", hosts=2, nic_bit_per_s=50e6, nic_delay_s=10e-3)
    rows = 1500
    cases = [Case("overlap", "all_to_all", ((0, rows), (rows, 0)), kv=(Move(0, 1, 2, 750, 1024),))]
    collective, kv = measure([[spec]], 0, lambda _: None, only=lambda _: cases)
    total_s = 2 * rows * 1024 / (50e6 / 8 * spec.wire_share)
    for timing in (collective, kv):
        assert min(timing.repeats_s) == pytest.approx(predict(timing, Constants(0.5e-3)), rel=0.3)
    # both together cannot be faster than the link
    assert min(max(a, b) for a, b in zip(collective.repeats_s, kv.repeats_s, strict=True)) > 0.95 * total_s
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=20).stdout
    assert PREFIX not in left
