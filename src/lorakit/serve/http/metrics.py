"""What Prometheus reads at /metrics: what the HTTP front counts itself, and the engine's own counters at that moment.

Label values are bounded: an adapter has its own series only while fewer than `names` adapters have one, all later ones
share "other"; names come from the store, never from a request's text. The first `names` adapters to be used keep their
series, so that no counter ever falls.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorakit.errors import LorakitError
from lorakit.serve.request import About, AdapterInfo, Engine, Stats, Ticket, abouts

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


def family(prefix: str, name: str, about: About, labels: Sequence[str] = ()) -> CounterMetricFamily | GaugeMetricFamily:
    """An empty metric for a number of the engine's."""
    kind: Any = CounterMetricFamily if about.kind == "counter" else GaugeMetricFamily
    return kind(f"lorakit_{prefix}_{name}", about.text, labels=labels)  # type: ignore[no-any-return]


class _EngineCounters(Collector):
    """An engine's `Stats`, and its adapters' counters, as metrics; nothing is kept between two looks."""

    def __init__(self, engine: Engine, shown: Collection[str]) -> None:
        self.engine, self.shown = engine, shown

    def describe(self) -> list[Metric]:
        """Nothing: the registry need not ask the engine before it runs."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One snapshot."""
        stats = self.engine.stats()
        for name, about in metrics_of(Stats).items():
            found = family("engine", name, about, [about.label] if about.label else [])
            value = getattr(stats, name)
            for label, number in value.items() if about.label else [("", value)]:
                found.add_metric([label] if about.label else [], number)
            yield found
        yield GaugeMetricFamily("lorakit_engine_ready", "1 where requests are taken", value=float(self.engine.ready()))
        families = {
            name: family("adapter", name, about, ["adapter"]) for name, about in metrics_of(AdapterInfo).items()
        }
        for name in sorted(self.shown):
            with suppress(LorakitError):  # it has left the store, or it is the base
                info = self.engine.adapters.info(name)
                for field, one in families.items():
                    one.add_metric([name], getattr(info, field))
        yield from families.values()


def metrics_of(kind: type) -> dict[str, About]:
    """The numbers of `Stats` or `AdapterInfo` that are metrics."""
    return {name: about for name, about in abouts(kind).items() if about.kind}
