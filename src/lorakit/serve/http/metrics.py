"""What Prometheus reads at /metrics: what the HTTP front counts itself, and the engine's own counters at that moment.

Label values are bounded: an adapter has its own series only while fewer than `names` adapters have one, all later ones
share "other"; names come from the store, never from a request's text. The first `names` adapters to be used keep their
series, so that no counter ever falls.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorakit.errors import LorakitError
from lorakit.serve.request import Engine, Ticket

if TYPE_CHECKING:
    from collections.abc import Collection

log = logging.getLogger("lorakit.serve")

OTHER = "other"
LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 600.0)
GAPS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.5, 1.0, 5.0)


class Metrics:
    """The counters of one server.

    Args:
        names: adapters, and tenants, that have a series of their own.
    """

    def __init__(self, names: int = 100) -> None:
        self.names = names
        self.registry = CollectorRegistry()
        self._labels: dict[str, set[str]] = {"adapter": set(), "tenant": set()}
        self.requests = self._counter("requests", "HTTP requests answered", "endpoint", "code")
        self.refused = self._counter("refused", "requests answered with an error, by its code", "reason")
        self.tenant = self._counter("tenant_requests", "generation requests", "tenant")
        self.adapter = self._counter("adapter_requests", "answers asked of an adapter", "adapter")
        self.adapter_tokens = self._counter("adapter_tokens", "tokens generated with an adapter", "adapter")
        self.seconds = self._histogram("request_seconds", "from a request's arrival to its end", LATENCIES, "endpoint")
        self.first = self._histogram("first_token_seconds", "from submission to the first token", LATENCIES)
        self.queued = self._histogram("queue_seconds", "from submission to the batch", LATENCIES)
        self.gap = self._histogram("token_seconds", "mean time between the tokens of an answer", GAPS)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"lorakit_{name}", about, labels, registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"lorakit_{name}", about, labels, buckets=buckets, registry=self.registry)

    def watch(self, engine: Engine) -> None:
        """Show this engine's own counters as well."""
        self.registry.register(_EngineCounters(engine, self._labels["adapter"]))

    def label(self, kind: str, name: str) -> str:
        """The name as a label value, or "other" where enough names have one."""
        known = self._labels[kind]
        if name in known:
            return name
        if len(known) >= self.names:
            return OTHER
        known.add(name)
        return name

    def answered(self, endpoint: str, status: int, seconds: float, reason: str | None) -> None:
        """Count one HTTP answer. `endpoint` is a route of this server, `reason` the code of a Fault."""
        self.requests.labels(endpoint, str(status)).inc()
        self.seconds.labels(endpoint).observe(seconds)
        if reason is not None:
            self.refused.labels(reason).inc()

    def finished(self, blend: Mapping[str, float], tickets: Iterable[Ticket]) -> None:
        """Count the answers of one request, finished or not."""
        for ticket in tickets:
            usage = ticket.usage
            for name in blend or ("base",):
                label = self.label("adapter", name)
                self.adapter.labels(label).inc()
                self.adapter_tokens.labels(label).inc(usage.generated)
            if usage.started is not None:
                self.queued.observe(usage.started)
            if usage.first is not None:
                self.first.observe(usage.first)
                if usage.total is not None and usage.generated > 1:
                    self.gap.observe((usage.total - usage.first) / (usage.generated - 1))

    def text(self) -> bytes:
        """Everything in Prometheus' format."""
        return generate_latest(self.registry)


COUNTERS: dict[str, str] = {
    "steps": "forwards of the model",
    "prompt_tokens": "prompt tokens computed",
    "cached_tokens": "prompt tokens taken from the prefix cache",
    "generated_tokens": "tokens generated",
    "hits": "submissions whose adapters were all in memory",
    "misses": "submissions that had to wait for an adapter",
    "loads": "adapters read from disk",
    "evictions": "adapters dropped to make room",
}
GAUGES: dict[str, str] = {
    "running": "requests in the batch",
    "waiting": "requests in the queue",
    "loading": "requests in the queue that wait for their adapter",
    "limit": "requests that the queue holds",
    "cache_bytes": "key and value memory in use",
    "cache_limit": "key and value memory in all",
    "adapter_bytes": "memory of resident adapters",
    "adapter_limit": "the budget of resident adapters",
}
MAPPED: dict[str, tuple[str, str, bool]] = {
    "finished": ("why", "answers that ended", True),
    "refused": ("why", "answers refused at submission", True),
    "adapters": ("state", "adapters of the store", False),
}


class _EngineCounters(Collector):
    """An engine's `Stats`, and its adapters' counters, as metrics; nothing is kept between two looks."""

    def __init__(self, engine: Engine, shown: Collection[str]) -> None:
        self.engine, self.shown = engine, shown

    def describe(self) -> list[Metric]:
        """Nothing: the registry need not ask the engine before it runs."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One snapshot."""
        stats: Any = self.engine.stats()
        for name, about in COUNTERS.items():
            yield CounterMetricFamily(f"lorakit_engine_{name}", about, value=getattr(stats, name))
        for name, about in GAUGES.items():
            yield GaugeMetricFamily(f"lorakit_engine_{name}", about, value=getattr(stats, name))
        for name, (label, about, counts) in MAPPED.items():
            kind: Any = CounterMetricFamily if counts else GaugeMetricFamily
            family = kind(f"lorakit_engine_{name}", about, labels=[label])
            for key, value in getattr(stats, name).items():
                family.add_metric([key], value)
            yield family
        yield GaugeMetricFamily("lorakit_engine_ready", "1 where requests are taken", value=float(self.engine.ready()))
        yield from self._adapters()

    def _adapters(self) -> Iterator[Metric]:
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {
            "hits": CounterMetricFamily("lorakit_adapter_hits", "answers that found it in memory", labels=["adapter"]),
            "loads": CounterMetricFamily("lorakit_adapter_loads", "times that it was read", labels=["adapter"]),
            "evictions": CounterMetricFamily(
                "lorakit_adapter_evictions", "times that it was dropped", labels=["adapter"]
            ),
            "bytes": GaugeMetricFamily("lorakit_adapter_bytes", "memory that it takes", labels=["adapter"]),
        }
        for name in sorted(self.shown):
            try:
                info = self.engine.adapters.info(name)
            except LorakitError:
                continue  # it has left the store, or it is the base
            for field, family in families.items():
                family.add_metric([name], getattr(info, field))
        yield from families.values()
