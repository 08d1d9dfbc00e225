"""A live service against its twin: what its counters tell, what is made of that, and what the command says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fake_engine import FakeEngine, running_server

from runtime.bench import bench
from twin.cli import _code
from twin.spec.errors import EptwinError
from twin.spec.load import load_scenario
from twin.spec.workload import WorkloadSpec
from twin.validate.live import JUDGED, Samples, between, read_samples

STEP_S = 0.01
LOAD = WorkloadSpec.model_validate({"arrivals": {"kind": "closed_loop", "concurrency": 4}, "isl": {"mean": 50.0},
                                    "osl": {"kind": "uniform", "low": 5, "high": 15}, "requests": 400})


@contextmanager
def loaded(url: str) -> Iterator[None]:
    """Somebody uses the service meanwhile."""
    thread = threading.Thread(target=bench, args=(url, LOAD))
    thread.start()
    try:
        yield
    finally:
        thread.join()


def scrape(requests: int, *, ttft_s: float = 0.5, prefix: str = "eptwin") -> str:
    """What a service says that has served `requests` alike: 96 tokens in, 24 out, in two pools of counters."""
    lines = ["# HELP something"]
    each = {"time_to_first_token_seconds": (ttft_s, (0.25, 1.0)), "request_time_per_output_token_seconds": (0.02, (0.01, 0.04)),
            "e2e_request_latency_seconds": (0.96, (0.5, 1.0)), "inter_token_latency_seconds": (0.02, (0.01, 0.04)),
            "request_prompt_tokens": (96.0, (64.0, 128.0)), "request_generation_tokens": (24.0, (16.0, 32.0))}
    for name, (mean, edges) in each.items():
        for edge in (*edges, float("inf")):
            text = "+Inf" if edge == float("inf") else str(edge)
            lines.append(f'{prefix}:{name}_bucket{{model_name="a,le=\\"9\\"",le="{text}"}} {requests * (mean <= edge)}')
        lines += [f'{prefix}:{name}_{what}{{model_name="a"}} {value}' for what, value in
                  (("count", float(requests)), ("sum", requests * mean))]
    for engine in (0, 1):
        lines.append(f'{prefix}:generation_tokens_total{{engine="{engine}"}} {requests * 12.0}')
    return "\n".join([*lines, f"{prefix}:prompt_tokens_total {requests * 96.0}", "other:thing 3", ""])


@pytest.mark.parametrize("prefix", ["eptwin", "vllm"])
def test_what_was_done_between_two_readings(prefix: str) -> None:
    before, after = (read_samples(scrape(n, prefix=prefix)) for n in (10, 50))
    window = between(before, after, 20.0)
    assert window is not None
    assert window.finished == 40
    scenario = load_scenario("tiny_cpu")
    measured = window.measurement(scenario, scenario.plan)  # type: ignore[arg-type]
    assert measured.latencies.ttft_s.mean == pytest.approx(0.5)
    assert measured.latencies.tpot_s.count == 40
    assert measured.throughput.output_tok_per_s == pytest.approx(40 * 24 / 20)
    assert measured.counts.input_tokens == 40 * 96
    traffic = window.traffic(scenario.workload)
    assert traffic.arrivals.concurrency == 2, "Little's law: two requests a second that take 0.96 s"
    for lengths, mean, low, high in ((traffic.isl, 96, 64, 128), (traffic.osl, 24, 16, 32)):
        assert lengths is not None
        assert sum(lengths.values) / len(lengths.values) == pytest.approx(mean, rel=0.01)
        assert low <= min(lengths.values) and max(lengths.values) <= high
    opened = window.traffic(LOAD.model_copy(update={"arrivals": LOAD.arrivals.model_copy(
        update={"kind": "poisson", "rate_per_s": 1.0})}))
    assert opened.arrivals.rate_per_s == pytest.approx(2.0)
    assert between(after, before, 20.0) is None, "a service that was started again"


@pytest.mark.parametrize("text", ["", "<html>", scrape(3).replace("_sum{model_name=\"a\"} 1.5", "_sum{model_name=\"a\"} many")])
def test_what_is_no_scrape(text: str) -> None:
    with pytest.raises(EptwinError, match="metrics"):
        read_samples(text)


def test_numbers_that_are_none_and_traffic_that_cannot_be() -> None:
    for word in ("NaN", "+Inf"):
        with pytest.raises(EptwinError, match="in no number"):
            read_samples(scrape(3) + f"eptwin:prompt_tokens_total {word}\n")
        assert read_samples(scrape(3) + f"eptwin:some_gauge {word}\n") == read_samples(scrape(3))
    long = [read_samples(scrape(n).replace('"128.0"', '"1e12"').replace('"64.0"', '"1e11"')) for n in (1, 90)]
    window = between(long[0], {**long[1], ("request_prompt_tokens_sum", None): 1e14}, 1.0)
    assert window is not None
    with pytest.raises(EptwinError, match="cannot be"):
        window.traffic(LOAD)


def test_a_service_may_be_away_for_a_while(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str | None] = [scrape(10), None, scrape(3), scrape(20), scrape(40)]

    def reading(_: str) -> Samples:
        text = said.pop(0)
        if text is None:
            raise EptwinError("cannot reach it")
        return read_samples(text)

    monkeypatch.setattr("twin.commands.watch._scrape", reading)
    assert _code(["watch", "http://127.0.0.1:9", "tiny_cpu", "--every", "0.1", "--windows", "4", "--json"]) == 0
    told = capsys.readouterr()
    assert len(json.loads(told.out)["windows"]) == 2, "counted again from where it came back"
    assert "waiting for it" in told.err and "was away" in told.err


def test_the_command_compares_window_by_window(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPTWIN_API_KEY", "s3cret")
    with running_server(FakeEngine(STEP_S), api_key="s3cret") as (url, _):
        with loaded(url):
            arguments = ["watch", url, "tiny_cpu", "--every", "0.7", "--windows", "2"]
            assert _code([*arguments, "--json"]) == 0
            windows = json.loads(capsys.readouterr().out)["windows"]
            assert windows
            metrics = {m["name"]: m for m in windows[-1]["metrics"]}
            assert all(metrics[name]["predicted"] > 0 and metrics[name]["measured"] > 0 for name in JUDGED)
            assert 0.9 * STEP_S < metrics["tpot_s_mean"]["measured"] < 20 * STEP_S
            assert _code([*arguments, "--band", "0.00001"]) == 1, "the last window is out of so narrow a band"
            told = capsys.readouterr()
            assert "TTFT" in told.out and "(twin " in told.out and "over the band" in told.err
        monkeypatch.setenv("EPTWIN_API_KEY", "wrong")
        assert _code(["watch", url, "tiny_cpu"]) == 1
        assert "EPTWIN_API_KEY" in capsys.readouterr().err


def test_what_cannot_be_watched(capsys: pytest.CaptureFixture[str]) -> None:
    assert _code(["watch", "http://127.0.0.1:9", "tiny_cpu"]) == 1
    assert _code(["watch", "http://192.0.2.1", "tiny_cpu"]) == 2
    assert _code(["watch", "http://127.0.0.1:9", "r1_chat"]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in ("cannot reach", "--allow-remote", "--plan"))
    with running_server(FakeEngine(STEP_S)) as (url, _):
        assert _code(["watch", url, "tiny_cpu", "--every", "0.1", "--windows", "1"]) == 1
    told = capsys.readouterr().err
    assert "no request finished" in told and "no window" in told
