"""The metrics. Their names are a contract; label values are bounded: no ids, no names of projects, models or people.

What SQL knows (jobs, queues, leases, what stage runs came to) the API's `/metrics` tells (`ServiceCollector`): it survives
restarts, and holds for workers that nobody could ask, such as job pods. Every API process tells the same: take the largest,
not the sum. Beside it each process tells what it does itself: requests, transfers, queues it listens to; there take the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.infra.stage_figures import Tally, families
from service.jobs.requests import QueueFacts

_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
OTHER = "other"


@dataclass(frozen=True)
class ServiceFacts:
    """What SQL knows of all jobs.

    Attributes:
        entered: state → how often a job came into it; never falls.
        running: jobs that run now.
        queues: how each queue stands.
        lease_expired, messages_resent (by queue): counted since the database was made.
        tallies: what stage runs came to.
        gates: verdict → gates decided so, since the database was made.
        gates_pending: those that wait for the end of their `audit`, and those that wait for a `judge`.
    """

    entered: Mapping[str, int] = field(default_factory=dict)
    running: int = 0
    queues: Sequence[QueueFacts] = ()
    lease_expired: int = 0
    messages_resent: Mapping[str, int] = field(default_factory=dict)
    tallies: Sequence[Tally] = ()
    gates: Mapping[str, int] = field(default_factory=dict)
    gates_pending: Mapping[str, int] = field(default_factory=dict)


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
        resent = CounterMetricFamily("safer_messages_resent", "Messages sent again.", labels=["queue"])
        for queue, number in facts.messages_resent.items():
            resent.add_metric([queue], number)
        yield resent
        yield from families(facts.tallies)
        decided = CounterMetricFamily("safer_gates", "Gates decided.", labels=["verdict"])
        for verdict, number in facts.gates.items():
            decided.add_metric([verdict], number)
        yield decided
        pending = GaugeMetricFamily("safer_gates_pending", "Gates that wait for their audit, or for a judge.", labels=["for"])
        for what, number in facts.gates_pending.items():
            pending.add_metric([what], number)
        yield pending


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
    """What only a worker that stays knows: what moves between it and the artifact store, and whether it is free.

    Its children tell it what they moved. What its runs came to is counted in SQL (`service.infra.stage_figures`).
    """

    def __init__(self, registry: CollectorRegistry, queues: Sequence[str] = ()) -> None:
        self.artifacts = ArtifactMetrics(registry)
        about = "1 while this worker waits for a message of the queue, 0 while it is at work."
        gauge = Gauge("safer_worker_free", about, ["queue"], registry=registry)
        self._free = [gauge.labels(queue) for queue in queues]
        self.free(True)

    def free(self, free: bool) -> None:
        """Whether it waits for messages now, or is at work."""
        for each in self._free:
            each.set(free)
