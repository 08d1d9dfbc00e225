"""Whether a simulation can still meet its objectives: one that cannot need not go on, where only that is asked."""

from __future__ import annotations

from twin.sim.request import Request
from twin.spec.workload import WorkloadSpec

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 100.0)
"""Those that a summary holds; objectives at others are interpolated between them."""
_BEYOND = 1.0 + 1e-9
"""A limit, with room for the rounding of an interpolation."""


class Misses:
    """Told of requests as they get on (`simulate(..., hopeless=)`), it says when an objective is missed for certain.

    Of N counted values, the one at place (N - 1) q is beyond the limit once more values are than have a place above it, whatever
    the others turn out to be. A refused request is reason enough. Cautious where N is not known: `requests` is the most there
    can be, so that no run is given up that would have met its objectives.
    """

    def __init__(self, workload: WorkloadSpec, requests: int) -> None:
        slo = workload.slo
        self.reason = ""
        self._warmup = int(requests * workload.warmup_fraction)
        counted = requests - self._warmup
        percent = max((known for known in PERCENTILES if known <= slo.percentile), default=PERCENTILES[0])
        self._most = counted - int((counted - 1) * percent / 100) - 1
        self._limits_s = {"TTFT": slo.ttft_s, "TPOT": slo.tpot_s, "E2E": slo.e2e_s}
        self._missed = dict.fromkeys(self._limits_s, 0)

    def __call__(self, what: str, request: Request) -> bool:
        if what == "reject":
            self.reason = "a request was not served"
        elif request.id >= self._warmup and request.first_token_s is not None:
            if what == "first_token":
                self._look("TTFT", request.first_token_s - request.arrival_s)
            elif request.finish_s is not None:
                self._look("E2E", request.finish_s - request.arrival_s)
                if request.osl > 1:
                    self._look("TPOT", (request.finish_s - request.first_token_s) / (request.osl - 1))
        return bool(self.reason)

    def _look(self, name: str, value_s: float) -> None:
        limit_s = self._limits_s[name]
        if limit_s is not None and value_s > limit_s * _BEYOND:
            self._missed[name] += 1
            if self._missed[name] > self._most:
                self.reason = f"{name} was over its objective in {self._missed[name]} requests already"
