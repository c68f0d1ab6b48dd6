"""The metrics. Their names are a contract; label values are bounded: no ids, no names of projects, models or people.

Two processes expose them. A worker counts what it does itself (`WorkerMetrics`, in a registry of its own). The API's
`/metrics` adds what SQL knows (`ServiceMetrics`), which therefore survives restarts: jobs by state, queues, leases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.jobs.requests import QueueFacts

_SECONDS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400)
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
_RECOVERED = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
OTHER = "other"


@dataclass(frozen=True)
class ServiceFacts:
    """What SQL knows of all jobs.

    Attributes:
        entered: state → how often a job came into it; never falls.
        running: jobs that run now.
        queues: how each queue stands.
        lease_expired, messages_resent: counted since the database was made.
    """

    entered: Mapping[str, int] = field(default_factory=dict)
    running: int = 0
    queues: Sequence[QueueFacts] = ()
    lease_expired: int = 0
    messages_resent: int = 0


class ServiceCollector(Collector):
    """Reads the facts when Prometheus asks. A database that is away leaves them out: a gap, never an old figure."""

    def __init__(self, facts: Callable[[], ServiceFacts | None]) -> None:
        self._facts = facts

    def collect(self) -> Iterable[Metric]:
        """The families below, with one sample per state or queue."""
        facts = self._facts()
        if facts is None:
            return
        jobs = CounterMetricFamily("safer_jobs", "Jobs that came into a state.", labels=["state"])
        for state, number in sorted(facts.entered.items()):
            jobs.add_metric([state], number)
        yield jobs
        yield GaugeMetricFamily("safer_jobs_running", "Jobs that are running.", value=facts.running)
        depth = GaugeMetricFamily("safer_queue_depth", "Units ready, sent or leased.", labels=["queue"])
        oldest = GaugeMetricFamily("safer_queue_oldest_seconds", "Age of the oldest unit nobody has taken.", labels=["queue"])
        for found in facts.queues:
            depth.add_metric([found.queue], found.depth)
            oldest.add_metric([found.queue], found.oldest_seconds)
        yield depth
        yield oldest
        yield CounterMetricFamily("safer_lease_expired", "Leases that ran out.", value=facts.lease_expired)
        yield CounterMetricFamily("safer_messages_resent", "Messages sent again.", value=facts.messages_resent)


class ArtifactMetrics:
    """Bytes and seconds of the artifact store, by operation (`get`, `put`)."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._bytes = Counter("safer_artifact_bytes", "Bytes read from or written to the store.", ["op"], registry=registry)
        self._seconds = Histogram(
            "safer_artifact_seconds", "Seconds of one file.", ["op"], buckets=_REQUEST_SECONDS, registry=registry
        )

    def observe(self, op: str, size: int, seconds: float) -> None:
        """One file was read or written."""
        self._bytes.labels(op).inc(size)
        self._seconds.labels(op).observe(seconds)


class HttpMetrics:
    """Seconds of requests, by route template, method and status."""

    def __init__(self, registry: CollectorRegistry) -> None:
        names = ["route", "method", "status"]
        self._seconds = Histogram(
            "safer_http_seconds", "Seconds of one request.", names, buckets=_REQUEST_SECONDS, registry=registry
        )

    def observe(self, route: str | None, method: str, status: int, seconds: float) -> None:
        """One request was answered. `route`: its template (`/v1/audits/{id}`), None where no route matched."""
        known = method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else OTHER
        self._seconds.labels(route or OTHER, known, str(status)).observe(seconds)


class WorkerMetrics:
    """What one worker did. Children report to their parent, which alone owns this."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.artifacts = ArtifactMetrics(registry)
        self._seconds = Histogram(
            "safer_stage_seconds", "Seconds of a stage run.", ["stage", "outcome"], buckets=_SECONDS, registry=registry
        )
        self._errors = Counter("safer_stage_errors", "Stage runs that failed.", ["stage", "code"], registry=registry)
        self._tokens = Counter("safer_tokens", "Tokens that a stage read.", ["stage"], registry=registry)
        self._gpu_bytes = Gauge("safer_gpu_memory_peak_bytes", "Peak of the last run.", ["stage"], registry=registry)
        self._gpu_seconds = Counter("safer_gpu_seconds", "Seconds on the GPU queue.", ["stage"], registry=registry)
        self._fvu = Histogram("safer_sae_fvu", "FVU of trained SAEs.", buckets=_SHARES, registry=registry)
        self._dead = Histogram("safer_sae_dead_share", "Share of dead latents.", buckets=_SHARES, registry=registry)
        self._recovered = Histogram(
            "safer_reward_recovered", "Margin variance recovered by the SAE.", buckets=_RECOVERED, registry=registry
        )

    def finished(self, stage: str, outcome: str, seconds: float, *, on_gpu: bool) -> None:
        """A stage run ended with `computed`, `cached`, `absent`, `failed` or `stopped`."""
        self._seconds.labels(stage, outcome).observe(seconds)
        if on_gpu:
            self._gpu_seconds.labels(stage).inc(seconds)

    def failed(self, stage: str, code: str) -> None:
        """A stage run failed with an error's code."""
        self._errors.labels(stage, code).inc()

    def artifact(self, stage: str, meta: Mapping[str, Any], gpu_peak_bytes: int | None) -> None:
        """A stage committed an artifact with these facts."""
        if gpu_peak_bytes is not None:
            self._gpu_bytes.labels(stage).set(gpu_peak_bytes)
        tokens = meta.get("tokens")
        if isinstance(tokens, int):
            self._tokens.labels(stage).inc(tokens)
        if stage == "sae":
            for name, metric in (("fvu", self._fvu), ("dead_share", self._dead)):
                if isinstance(meta.get(name), float):
                    metric.observe(meta[name])
            recovered = meta.get("recovered") or {}
            share = (recovered.get("covered") or {}).get("margin_variance") if isinstance(recovered, Mapping) else None
            if isinstance(share, float):
                self._recovered.observe(share)
