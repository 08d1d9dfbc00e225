"""Traffic: distributions, prefix stability, streams that do not disturb one another, traces and their errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from twin.policy.arrivals import named_stream, sample_lengths, sample_requests
from twin.policy.traces import read_trace
from twin.spec.errors import SpecError
from twin.spec.workload import Arrivals, Lengths, WorkloadSpec

FIXED = Lengths(kind="fixed", mean=100.0)
PINNED = [0.5726423741726914, 0.24103714325602066, 0.7886136269459348, 0.08161758195929847]
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def workload(arrivals: Arrivals, **more) -> WorkloadSpec:
    return WorkloadSpec(arrivals=arrivals, **{"isl": FIXED, "osl": FIXED, **more})


def test_poisson_gaps_are_exponential_and_keep_the_rate():
    drawn = sample_requests(workload(Arrivals(kind="poisson", rate_per_s=4.0), requests=50_000), seed=1)
    gaps = np.diff(drawn.arrival_s)
    assert gaps.mean() == pytest.approx(0.25, rel=0.02)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.02)
    assert np.corrcoef(gaps[1:], gaps[:-1])[0, 1] == pytest.approx(0.0, abs=0.02)


def test_rates_share_their_randomness():
    slow = sample_requests(workload(Arrivals(kind="poisson", rate_per_s=1.0), requests=100), seed=3)
    fast = sample_requests(workload(Arrivals(kind="poisson", rate_per_s=8.0), requests=100), seed=3)
    np.testing.assert_allclose(slow.arrival_s, 8 * fast.arrival_s)


def test_duration_cuts_what_requests_would_not():
    arrivals = Arrivals(kind="poisson", rate_per_s=50.0)
    by_time = sample_requests(workload(arrivals, duration_s=200.0), seed=5)
    by_count = sample_requests(workload(arrivals, requests=len(by_time) + 1), seed=5)
    np.testing.assert_allclose(by_time.arrival_s, by_count.arrival_s[:-1], rtol=1e-12)
    assert by_time.arrival_s[-1] <= 200.0 < by_count.arrival_s[-1]


@pytest.mark.parametrize("lengths", [
    Lengths(kind="lognormal", mean=500.0, cv=1.0), Lengths(kind="uniform", low=10, high=990),
    Lengths(kind="geometric", mean=500.0), Lengths(kind="empirical", values=(100, 500, 900))])
def test_lengths_keep_their_mean_and_their_prefix(lengths):
    many = sample_lengths(lengths, named_stream(7, "isl"), 100_000)
    assert many.mean() == pytest.approx(500.0, rel=0.02)
    assert many.min() >= 1
    np.testing.assert_array_equal(many[:37], sample_lengths(lengths, named_stream(7, "isl"), 37))


def test_lognormal_keeps_its_coefficient_of_variation_and_geometric_its_shape():
    many = sample_lengths(Lengths(kind="lognormal", mean=500.0, cv=0.5), named_stream(7, "x"), 200_000)
    assert many.std() / many.mean() == pytest.approx(0.5, rel=0.02)
    many = sample_lengths(Lengths(kind="geometric", mean=4.0), named_stream(7, "x"), 200_000)
    assert (many == 1).mean() == pytest.approx(0.25, rel=0.02)
    assert many.var() == pytest.approx(4.0**2 - 4.0, rel=0.03)


def test_lengths_are_clipped():
    many = sample_lengths(Lengths(kind="lognormal", mean=100.0, cv=3.0, min_tokens=50, max_tokens=200),
                          named_stream(1, "isl"), 1000)
    assert many.min() == 50 and many.max() == 200


def test_streams_differ_by_name_and_seed_and_are_pinned():
    first = named_stream(0, "arrivals").random(4)
    assert not np.array_equal(first, named_stream(0, "lengths").random(4))
    assert not np.array_equal(first, named_stream(1, "arrivals").random(4))
    # Pinned: published results depend on these numbers.
    np.testing.assert_allclose(first, PINNED, rtol=1e-15)


def test_azure_trace(tmp_path: Path):
    file = tmp_path / "trace.csv"
    file.write_text(AZURE + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
                    "2023-11-16 18:15:51.9951690,96,9\n")
    drawn = sample_requests(WorkloadSpec(arrivals=Arrivals(kind="trace", file=str(file), format="azure", speedup=2.0),
                                         duration_s=2.3), seed=0)
    np.testing.assert_allclose(drawn.arrival_s, [0.0, 4.314579 / 2], atol=1e-6)
    assert drawn.isl.tolist() == [374, 396] and drawn.osl.tolist() == [44, 109]


def test_mooncake_trace_with_stated_output_lengths(tmp_path: Path):
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 1000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n\n'
                    '{"timestamp": 4500, "input_length": 10, "output_length": 2, "hash_ids": [0]}\n')
    drawn = sample_requests(WorkloadSpec(arrivals=Arrivals(kind="trace", file=str(file), format="mooncake"), osl=FIXED),
                            seed=0)
    assert drawn.arrival_s.tolist() == [0.0, 3.5]
    assert drawn.isl.tolist() == [6758, 10] and drawn.osl.tolist() == [100, 100]


BAD_ROWS = [
    ("azure", "TIME,In,Out\n", 1), ("azure", AZURE + "2023-11-16 18:15:46.68,374\n", 2),
    ("azure", AZURE + "yesterday,1,1\n", 2), ("azure", AZURE + "2023-11-16 18:15:46,0,1\n", 2),
    ("azure", AZURE + "2023-11-16 18:15:46,1,-1\n", 2), ("azure", AZURE + "2023-11-16 18:15:46,1,1e9\n", 2),
    ("azure", AZURE + "2023-11-16 18:15:46,1,1\n2023-11-16 18:15:45,1,1\n", 3),
    ("azure", AZURE + "2023-11-16 18:15:46,1," + "9" * 5000 + "\n", 2),
    ("mooncake", '{"timestamp": 0, "input_length": 1}\n', 1), ("mooncake", "[1]\n", 1), ("mooncake", "{\n", 1),
    ("mooncake", '{"timestamp": NaN, "input_length": 1, "output_length": 1}\n', 1),
    ("mooncake", '{"timestamp": 1e999, "input_length": 1, "output_length": 1}\n', 1),
    ("mooncake", '{"timestamp": true, "input_length": 1, "output_length": 1}\n', 1),
    ("mooncake", '{"timestamp": 0, "input_length": 1.5, "output_length": 1}\n', 1),
    ("mooncake", '{"timestamp": 0, "input_length": 1, "output_length": 1, "x": 1}\n', 1),
    ("mooncake", "[" * 100_000 + "\n", 1), ("mooncake", " " * 2 + "x" * (1 << 21), 1),
]


@pytest.mark.parametrize(("kind", "text", "line"), BAD_ROWS)
def test_bad_rows_name_their_line(tmp_path: Path, kind, text, line):
    file = tmp_path / "trace"
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        read_trace(file, kind, max_rows=10)
    assert caught.value.problems[0].line == line
    assert str(caught.value).startswith(f"{file}:{line}")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: p.write_bytes(b""), lambda p: p.write_text(AZURE),
                                  lambda p: p.write_bytes(b"\xff\xfe\x00")])
def test_what_is_no_trace_is_refused(tmp_path: Path, make):
    file = tmp_path / "trace"
    make(file)
    with pytest.raises(SpecError):
        read_trace(file, "azure", max_rows=10)
    with pytest.raises(SpecError):
        read_trace(tmp_path / "none", "azure", max_rows=10)


def test_traffic_without_a_request_or_an_end_is_refused():
    with pytest.raises(SpecError, match="no request"):
        sample_requests(workload(Arrivals(kind="poisson", rate_per_s=1e-6), duration_s=1.0), seed=0)
    with pytest.raises(SpecError, match="burst"):
        sample_requests(workload(Arrivals(kind="burst"), duration_s=1.0), seed=0)
    with pytest.raises(SpecError, match="more than"):
        sample_requests(workload(Arrivals(kind="deterministic", rate_per_s=1e6), duration_s=1e6), seed=0)
