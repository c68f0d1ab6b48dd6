"""One sample of every metric there is, for tests of what asks for them."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from service.infra.metrics import HttpMetrics, ServiceCollector, ServiceFacts, WorkerMetrics
from service.infra.stage_figures import FIGURES, Tally
from service.jobs.model import QUEUES
from service.jobs.requests import QueueFacts

ROOT = Path(__file__).parents[2]
_SUFFIX = re.compile(r"_(bucket|count|sum|total|created)$")


def base(sample: str) -> str:
    """The metric that a series belongs to."""
    return _SUFFIX.sub("", sample)


def sampled() -> CollectorRegistry:
    """A registry with at least one sample of every metric, of the API and of a worker."""
    registry = CollectorRegistry()
    worker, http = WorkerMetrics(registry, QUEUES), HttpMetrics(registry)
    worker.artifacts.observe("get", 1, 1.0)
    http.observe("/healthz", "GET", 200, 0.1)
    queues = tuple(QueueFacts(queue) for queue in QUEUES)
    tallies = [Tally(name, "sae", "computed", 0, 1, 1.0) for name in FIGURES]
    resent = dict.fromkeys(QUEUES, 0)
    facts = ServiceFacts({"queued": 1}, 0, queues, 0, resent, tallies, gates={"pass": 1}, gates_pending={"audit": 0})
    registry.register(ServiceCollector(lambda: facts))
    return registry


def labels_of_metrics() -> dict[str, set[str]]:
    """Metric → its labels."""
    samples = [sample for family in sampled().collect() for sample in family.samples]
    return {base(sample.name): set(sample.labels) - {"le"} for sample in samples}


def named_in_code() -> set[str]:
    """Metrics whose names stand in the code of the service and of the workers."""
    found = {f"safer_{name}" for name in FIGURES}
    for path in (*(ROOT / "service").rglob("*.py"), *(ROOT / "workers").rglob("*.py")):
        code = path.read_text(encoding="utf-8")
        if "prometheus_client" in code:
            found |= set(re.findall(r'"(safer_\w+)"', code))
    return {base(name) for name in found}
