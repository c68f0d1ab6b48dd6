"""Metrics: the names are a contract, the labels are bounded."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from service.infra.metrics import HttpMetrics, ServiceCollector, ServiceFacts, WorkerMetrics
from service.jobs.requests import QueueFacts

SERVICE = {
    'safer_jobs_total{state="succeeded"} 3.0',
    "safer_jobs_running 2.0",
    'safer_queue_depth{queue="gpu"} 5.0',
    'safer_queue_oldest_seconds{queue="gpu"} 7.5',
    "safer_lease_expired_total 1.0",
    "safer_messages_resent_total 4.0",
}


def exposed(registry: CollectorRegistry) -> set[str]:
    return set(generate_latest(registry).decode().splitlines())


def test_service_metrics_are_what_sql_knows() -> None:
    registry = CollectorRegistry()
    queues = (QueueFacts("gpu", ready=2, sent=1, leased=2, oldest_seconds=7.5),)
    facts = ServiceFacts({"succeeded": 3}, 2, queues, lease_expired=1, messages_resent=4)
    registry.register(ServiceCollector(lambda: facts))
    assert exposed(registry) >= SERVICE


def test_without_a_database_there_is_a_gap_and_no_old_figure() -> None:
    registry = CollectorRegistry()
    registry.register(ServiceCollector(lambda: None))
    assert exposed(registry) == set()


def test_worker_metrics_follow_a_stage() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    metrics.finished("sae", "computed", 12.0, on_gpu=True)
    metrics.failed("sae", "numerical_error")
    meta = {"fvu": 0.2, "dead_share": 0.0, "recovered": {"covered": {"margin_variance": 0.97}}, "tokens": 11}
    metrics.artifact("sae", meta, 1 << 30)
    metrics.artifacts.observe("put", 100, 0.01)
    lines = exposed(registry)
    assert lines >= {
        'safer_stage_seconds_count{outcome="computed",stage="sae"} 1.0',
        'safer_stage_errors_total{code="numerical_error",stage="sae"} 1.0',
        'safer_tokens_total{stage="sae"} 11.0',
        'safer_gpu_memory_peak_bytes{stage="sae"} 1.073741824e+09',
        'safer_gpu_seconds_total{stage="sae"} 12.0',
        "safer_sae_fvu_sum 0.2",
        "safer_sae_dead_share_count 1.0",
        "safer_reward_recovered_sum 0.97",
        'safer_artifact_bytes_total{op="put"} 100.0',
        'safer_artifact_seconds_count{op="put"} 1.0',
    }


def test_requests_are_counted_by_template_and_unknown_ones_together() -> None:
    registry = CollectorRegistry()
    metrics = HttpMetrics(registry)
    metrics.observe("/v1/audits/{id}", "GET", 200, 0.004)
    metrics.observe(None, "GET", 404, 0.001)
    metrics.observe(None, "BREW", 405, 0.001)
    lines = exposed(registry)
    assert 'safer_http_seconds_count{method="GET",route="/v1/audits/{id}",status="200"} 1.0' in lines
    assert 'safer_http_seconds_count{method="other",route="other",status="405"} 1.0' in lines
