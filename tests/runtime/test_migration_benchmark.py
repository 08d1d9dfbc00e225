"""What the migration benchmark makes of steps: windows against their neighbours, so that drift of the machine cancels."""

from __future__ import annotations

import pytest

from benchmarks.migration import MIN_STEPS, SEQUENCES, figures_of, full_rounds


def step(number: int, wall_s: float, cpu_s: float, **more: int) -> list[dict[str, object]]:
    """Both ranks' records of one round."""
    common = {"round": number, "start": 0.0, "prefill_seqs": 0, "decode_seqs": SEQUENCES // 2, "cpu_s": cpu_s / 2, **more}
    return [{**common, "rank": 0, "end": wall_s}, {**common, "rank": 1, "end": wall_s * 0.9}]


def cycle(first: int, last: int, copies: int = 3) -> dict[str, object]:
    return {"first_round": first, "last_round": last, "copies": copies, "bytes": 10 * copies, "imbalance_before": 1.3,
            "imbalance_after": 1.0, "solve_s": 0.01, "thread_cpu_s": 0.2}


def test_a_migration_is_held_against_its_neighbours() -> None:
    """The machine gets twice as slow from one migration to the next; each costs its steps a quarter of the wall's seconds and
    a tenth of the processors'."""
    steps = []
    for number in range(1, 121):
        moving = 20 < number <= 40 or 80 < number <= 100
        slow = 1.0 if number <= 60 else 2.0
        steps += step(number, slow * (1.25 if moving else 1.0), 1.1 if moving else 1.0)
    found = figures_of(steps, [cycle(20, 40), cycle(80, 100), cycle(110, 112, copies=0)])
    assert found["windows"] == found["migrations"] == 2
    assert found["decisions"] == 3
    assert found["throughput_while_migrating"]["median"] == pytest.approx(0.8)
    assert found["throughput_by_processor_seconds"]["median"] == pytest.approx(1 / 1.1)
    assert found["steps"] == 80
    assert found["moving_thread_share"]["median"] == pytest.approx(2 * 0.2 / 20 / 1.0), "of one of two ranks"
    assert found["bytes"] == 60


def test_only_full_decode_steps_of_both_ranks_count() -> None:
    steps = [*step(1, 1.0, 1.0), *step(2, 1.0, 1.0, prefill_seqs=1), *step(3, 1.0, 1.0, decode_seqs=1), *step(4, 1.0, 1.0)[:1]]
    assert list(full_rounds(steps)) == [1]
    short = [one for n in range(1, 3 * MIN_STEPS) for one in step(n, 1.0, 1.0)]
    assert "windows" not in figures_of(short, [cycle(0, 3)]), "nothing before, and too few in it"
