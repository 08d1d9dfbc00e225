"""Prometheus metrics of one service, in a registry of its own.

Names are vLLM's with the prefix `eptwin:`, so that dashboards carry over. No label ever holds anything a client sent:
the number of series is fixed by the plan and the routes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.types import FrontendStats

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
            80.0, 160.0, 640.0)
_TOKENS = tuple(float(2**i) for i in range(18))
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS = ("stop", "length", "abort", "error")


class ServiceMetrics:
    """What the gateway counts, and the engine's own numbers read at each scrape."""

    def __init__(self, model_name: str, stats: Callable[[], FrontendStats]) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests")
        self.generation_tokens = self._counter("generation_tokens", "Output tokens")
        self.ttft_s = self._histogram("time_to_first_token_seconds", "From the request to its first token", _SECONDS)
        self.itl_s = self._histogram("inter_token_latency_seconds", "Between two output tokens of a request", _SECONDS)
        self.tpot_s = self._histogram("request_time_per_output_token_seconds", "Mean of a request after its first token",
                                      _SECONDS)
        self.e2e_s = self._histogram("e2e_request_latency_seconds", "From the request to its last token", _SECONDS)
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self.request_generation_tokens = self._histogram("request_generation_tokens", "Output tokens of a request",
                                                         _TOKENS)
        success = Counter("eptwin:request_success", "Requests by how they ended", ["model_name", "finished_reason"],
                          registry=self.registry)
        self.ended = {reason: success.labels(model_name, reason) for reason in FINISH_REASONS}
        self._responses = Counter("eptwin:http_responses", "Responses by status class", ["model_name", "code"],
                                  registry=self.registry)
        self.responses = {code: self._responses.labels(model_name, f"{code}xx") for code in (2, 3, 4, 5)}
        self.registry.register(_EngineCollector(model_name, stats))

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"eptwin:{name}", text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"eptwin:{name}", text, ["model_name"], registry=self.registry,
                         buckets=buckets).labels(self._model_name)


class _EngineCollector(Collector):
    def __init__(self, model_name: str, stats: Callable[[], FrontendStats]) -> None:
        self._model_name, self._stats = model_name, stats

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        now = self._stats()
        labels = ["model_name", "pool", "role", "engine"]
        gauges = {
            "running": GaugeMetricFamily("eptwin:num_requests_running", "Requests in the running batch", labels=labels),
            "waiting": GaugeMetricFamily("eptwin:num_requests_waiting", "Requests waiting to run", labels=labels),
            "kv_usage": GaugeMetricFamily("eptwin:kv_cache_usage_perc", "Used share of the KV blocks, 1 is full",
                                          labels=labels),
        }
        steps = CounterMetricFamily("eptwin:engine_steps", "Steps of an instance", labels=labels)
        compiles = CounterMetricFamily("eptwin:compiles_after_start", "Kernels compiled while requests waited", labels=labels)
        drafts = {name: CounterMetricFamily(f"eptwin:spec_decode_num_{name}", text, labels=more) for name, text, more in (
            ("draft_tokens", "Speculated tokens", labels), ("accepted_tokens", "Speculated tokens that were right", labels),
            ("accepted_tokens_per_pos", "Speculated tokens that were right, by place", [*labels, "position"]))}
        for each in now.instances:
            values = [self._model_name, str(each.pool), each.role, str(each.instance)]
            for field, gauge in gauges.items():
                gauge.add_metric(values, getattr(each, field))
            steps.add_metric(values, each.steps)
            compiles.add_metric(values, each.compiles_after_start)
            drafts["draft_tokens"].add_metric(values, sum(each.drafted))
            drafts["accepted_tokens"].add_metric(values, sum(each.stood))
            for place, stood in enumerate(each.stood):
                drafts["accepted_tokens_per_pos"].add_metric([*values, str(place)], stood)
        moved = CounterMetricFamily("eptwin:kv_transfer_bytes", "KV bytes sent from prefill to decode",
                                    labels=["model_name"])
        moved.add_metric([self._model_name], now.kv_transfer_bytes)
        return [*gauges.values(), steps, compiles, *drafts.values(), moved]
