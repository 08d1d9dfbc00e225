"""`eptwin watch`: a live service against its twin."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import click

from twin.commands.shared import json_option, overrides, say
from twin.plan.bounds import Bounds
from twin.sim import simulate
from twin.spec.check import check_plan
from twin.spec.errors import EptwinError, OutOfBand, SpecError
from twin.spec.load import load_plan, load_scenario
from twin.spec.options import a_number
from twin.spec.plan import Plan
from twin.spec.results import Comparison, RunResult
from twin.spec.scenario import Scenario
from twin.spec.units import format_s
from twin.spec.urls import API_KEY_VARIABLE, check_url, readable
from twin.validate.compare import compare
from twin.validate.live import JUDGED, Samples, Window, between, read_samples

_TIMEOUT_S = 10.0
_MOST_BYTES = 16 << 20
_LEAST, _MOST = 400, 4000
"""Requests of a simulation: as many as the search's."""


@click.command()
@click.argument("url")
@click.argument("scenario")
@click.option(
    "--plan", "plan_file", type=click.Path(path_type=Path), help="The plan it serves; default: the plan that the scenario states."
)
@overrides
@click.option("--every", "every_s", type=click.FloatRange(0.1, 86_400), callback=a_number, default=30.0,
              show_default=True, help="Seconds a window.")
@click.option("--windows", type=click.IntRange(0), default=0, help="Windows to watch; 0 (the default): until Ctrl-C.")
@click.option("--band", type=click.FloatRange(0, 10), callback=a_number,
              help="Exit 1 when the last window has an error larger than this.")
@click.option("--allow-remote", is_flag=True, help="Allow a URL that is not this machine.")
@json_option
def watch(
    url: str, scenario: str, plan_file: Path | None, overrides: tuple[str, ...], every_s: float, windows: int, band: float | None,
    allow_remote: bool, as_json: bool,
) -> None:  # fmt: skip
    """Watch the service at URL against the twin of SCENARIO's plan.

    Every window, the service's /metrics say how many requests came, how long they were and what they met. The twin is given
    that traffic (as Poisson arrivals, or as many users as the service must have had when SCENARIO's workload is a closed loop)
    and says what they should have met. Only counters are read: it costs the service nothing. The key, if it needs one,
    comes from EPTWIN_API_KEY.
    """
    question = load_scenario(scenario, overrides)
    plan = load_plan(plan_file, question.model) if plan_file else question.plan
    if plan is None:
        raise SpecError("this scenario states no plan", field="plan", hint="give --plan, what the service was started with")
    check_plan(plan, question.model, question.cluster, file=str(plan_file) if plan_file else None)
    base = check_url(url, allow_remote=allow_remote)
    found: list[Comparison] = []
    try:
        _watch(base, question, plan, every_s, windows, band, found, None if as_json else click.echo)
    except KeyboardInterrupt:
        say("interrupted")
    if as_json:
        click.echo(json.dumps({"windows": [one.model_dump(mode="json") for one in found]}, indent=1))
    if not found:
        raise EptwinError("no window in which a request finished")
    if found[-1].within_band is False:
        raise OutOfBand(f"the last window's largest error, {found[-1].max_abs_error:.0%}, is over the band of {band:.0%}")


def _watch(base: str, question: Scenario, plan: Plan, every_s: float, windows: int, band: float | None, found: list[Comparison],
           show: Callable[[str], None] | None) -> None:  # fmt: skip
    before: Samples | None = _scrape(base)  # a service that is not there at first is a mistake; later it may come back
    since, seen = time.monotonic(), 0
    while not windows or seen < windows:
        time.sleep(max(0.0, every_s - (time.monotonic() - since)))
        try:
            after = _scrape(base)
        except EptwinError as error:
            say(f"{error}; waiting for it")
            before, since, seen = None, time.monotonic(), seen + 1
            continue
        now = time.monotonic()
        window = None if before is None else between(before, after, now - since)
        before, since, seen = after, now, seen + 1
        if window is None:
            say("the service was started again, or was away")
        elif not window.finished:
            say(f"no request finished in {window.seconds:.3g} s")
        else:
            try:
                prediction = twin(question, plan, window)
            except EptwinError as error:
                say(f"no prediction of this window: {error}")
                continue
            found.append(compare(prediction, window.measurement(question, plan), band=band, judged=JUDGED))
            if show is not None:
                show(line(window, found[-1], prediction))


def twin(question: Scenario, plan: Plan, window: Window) -> RunResult:
    """What the plan should do under a window's traffic, from its steady state."""
    asked = question.model_copy(update={"workload": window.traffic(question.workload)})
    arrivals = asked.workload.arrivals
    if arrivals.kind == "closed_loop":
        count, in_flight = 4 * (arrivals.concurrency or 1), 0
    else:
        in_flight = Bounds(asked).in_flight(plan, arrivals.rate_per_s or 0.0)
        count = 2 * in_flight
    return simulate(asked, plan, max_requests=max(_LEAST, min(count, _MOST)), record_trace=False, in_flight=in_flight).result


def line(window: Window, comparison: Comparison, prediction: RunResult) -> str:
    """A window in one line."""
    parts = [f"{time.strftime('%H:%M:%S')}  {window.finished} requests in {window.seconds:.3g} s"]
    by_name = {metric.name: metric for metric in comparison.metrics}
    for name, title in zip(JUDGED, ("TTFT", "TPOT", "E2E", "output"), strict=True):
        one = by_name.get(name)
        if one is not None and one.measured is not None and one.predicted is not None:
            told = [format_s(v) if one.unit == "s" else f"{v:.4g} {one.unit}" for v in (one.measured, one.predicted)]
            error = "" if one.error is None else f", {one.error:+.0%}"
            parts.append(f"{title} {told[0]} (twin {told[1]}{error})")
    if prediction.steady.verdict == "not steady":
        parts.append(f"the twin is not steady: {prediction.steady.reason}")
    return " | ".join(parts)


def _scrape(base: str) -> Samples:
    """The service's counters. Redirects are not followed, and no proxy is asked."""
    parts = urlsplit(base)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    key = os.environ.get(API_KEY_VARIABLE, "").strip()
    connection = kind(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", f"{parts.path}/metrics", headers={"Authorization": f"Bearer {key}"} if key else {})
        answer = connection.getresponse()
        text = answer.read(_MOST_BYTES).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise EptwinError(f"cannot reach {base}: {readable(str(error)) or type(error).__name__}") from error
    finally:
        connection.close()
    if answer.status != 200:
        hint = f"; set {API_KEY_VARIABLE}" if answer.status in (401, 403) else ""
        raise EptwinError(f"{base}/metrics answers {answer.status}{hint}")
    return read_samples(text)
