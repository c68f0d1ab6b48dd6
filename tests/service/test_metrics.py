"""Metrics: the names are a contract, the labels are bounded."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from service.infra.metrics import HttpMetrics, ServiceCollector, ServiceFacts, WorkerMetrics
from service.infra.stage_figures import Tally
from service.jobs.requests import QueueFacts

SERVICE = {
    'safer_jobs_total{state="succeeded"} 3.0',
    "safer_jobs_running 2.0",
    'safer_queue_depth{queue="gpu"} 5.0',
    'safer_queue_oldest_seconds{queue="gpu"} 7.5',
    "safer_lease_expired_total 1.0",
    'safer_messages_resent_total{queue="gpu"} 4.0',
    'safer_stage_errors_total{code="internal",stage="sae"} 2.0',
    'safer_stage_seconds_bucket{le="15.0",outcome="computed",stage="sae"} 3.0',
    'safer_stage_seconds_bucket{le="+Inf",outcome="computed",stage="sae"} 4.0',
    'safer_stage_seconds_sum{outcome="computed",stage="sae"} 50.0',
}


def exposed(registry: CollectorRegistry) -> set[str]:
    return set(generate_latest(registry).decode().splitlines())


def test_service_metrics_are_what_sql_knows() -> None:
    registry = CollectorRegistry()
    queues = (QueueFacts("gpu", ready=2, sent=1, leased=2, oldest_seconds=7.5),)
    tallies = [
        Tally("stage_seconds", "sae", "computed", 4, 3, 30.0),
        Tally("stage_seconds", "sae", "computed", 5, 1, 20.0),
        Tally("stage_errors", "sae", "internal", 0, 2, 2.0),
    ]
    facts = ServiceFacts({"succeeded": 3}, 2, queues, lease_expired=1, messages_resent={"gpu": 4}, tallies=tallies)
    registry.register(ServiceCollector(lambda: facts))
    assert exposed(registry) >= SERVICE


def test_without_a_database_there_is_a_gap_and_no_old_figure() -> None:
    registry = CollectorRegistry()
    registry.register(ServiceCollector(lambda: None))
    assert exposed(registry) == set()


def test_a_worker_tells_what_only_it_knows() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry, ("cpu", "gpu"))
    metrics.artifacts.observe("put", 100, 0.01)
    assert exposed(registry) >= {
        'safer_worker_free{queue="cpu"} 1.0',
        'safer_worker_free{queue="gpu"} 1.0',
        'safer_artifact_bytes_total{op="put"} 100.0',
        'safer_artifact_seconds_count{op="put"} 1.0',
    }
    metrics.free(False)
    assert 'safer_worker_free{queue="gpu"} 0.0' in exposed(registry)


def test_service_and_worker_tell_nothing_twice() -> None:
    registry = CollectorRegistry()
    WorkerMetrics(registry, ("cpu",))
    registry.register(ServiceCollector(ServiceFacts))
    names = [family.name for family in registry.collect()]
    assert len(set(names)) == len(names)


def test_requests_are_counted_by_template_and_unknown_ones_together() -> None:
    registry = CollectorRegistry()
    metrics = HttpMetrics(registry)
    metrics.observe("/v1/audits/{id}", "GET", 200, 0.004)
    metrics.observe(None, "GET", 404, 0.001)
    metrics.observe(None, "BREW", 405, 0.001)
    lines = exposed(registry)
    assert 'safer_http_seconds_count{method="GET",route="/v1/audits/{id}",status="200"} 1.0' in lines
    assert 'safer_http_seconds_count{method="other",route="other",status="405"} 1.0' in lines
