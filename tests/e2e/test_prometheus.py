"""A real Prometheus scrapes a running service: every metric, alert and query of the dashboard returns data."""

from __future__ import annotations

import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.client import GateRequest, Submission
from service.embedded import free_port
from service.jobs.clock import utc_after
from service.jobs.database import writing
from service.jobs.model import JobError, JobState, Lease
from service.jobs.requests import Finished
from service.jobs.tables import units
from tests.helpers.deployment import Deployment
from tests.helpers.metric_samples import base, labels_of_metrics
from tests.helpers.prometheus import API, WORKERS, Prometheus, alert_rules, dashboard_queries, prometheus_server
from tests.helpers.servers import S3, Redis, redis_server, wait_until
from tests.helpers.workplace import PROJECT, material, stop_group

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
_THRESHOLD = re.compile(r"\s(?:>=|<=|==|!=|>|<)\s[\d.]+")
_SELECTOR = re.compile(r"\b(?:safer_\w+|up)\b(?:\{[^}]*\})?")
_MANY = 100
"""So many 5xx answers are more than the alert bears in ten minutes."""
_OLD_SECONDS = 1000.0
_PATIENCE = 400.0


class Watched:
    """A service, the broker of its own, and the Prometheus that scrapes it.

    Attributes:
        fired: alerts that were seen to fire.
    """

    def __init__(self, folder: Path, s3: S3) -> None:
        ports = [free_port(), free_port()]
        self.files = material(folder / "of the client")
        self.broker: Redis = redis_server(folder)
        self.broker.start()
        settings = s3.settings("watched")
        self.place = Deployment(folder / "place", broker_url=self.broker.url, metrics_port=ports[0], max_failures=50, **settings)
        api = int(self.place.url.rpartition(":")[2])
        self.prometheus: Prometheus = prometheus_server(folder / "prometheus", {API: [api], WORKERS: [ports[0]]})
        self.fired: set[str] = set()

    def wait_for(self, query: str) -> None:
        """Wait until a query gives data."""
        wait_until(lambda: self.prometheus.has(query), f"data of {query}", _PATIENCE)

    def wait_for_alert(self, name: str) -> None:
        """Wait until an alert fires."""
        wait_until(lambda: name in self.prometheus.firing(), f"{name} fires", _PATIENCE)
        self.fired.add(name)

    def submit(self, **sections: object) -> str:
        """Submit an audit; the job's id."""
        return self.place.submit(self.files, **sections)

    def lease(self, job_id: str) -> Lease:
        """Take the open unit of a job from the database, as `worker --once` does, and do nothing with it."""
        now = {"ready_at": utc_after(-1.0)}
        with writing(self.place.engine) as connection:
            connection.execute(units.update().where(units.c.job_id == job_id, units.c.state == "ready").values(now))
        unit = self.place.jobs.units(job_id)[-1].id
        self.place.jobs.mark_sent(unit)
        lease = self.place.jobs.lease(unit, "a worker of the test")
        assert lease is not None
        return lease

    def lose(self, job_id: str) -> None:
        """Take a unit and never be heard of again; wait until that is noticed."""
        lease = self.lease(job_id)
        with writing(self.place.engine) as connection:
            connection.execute(units.update().where(units.c.id == lease.unit_id).values(lease_expires=utc_after(-1.0)))
        ready = {"ready", "sent"}
        wait_until(lambda: self.place.jobs.units(job_id)[-1].state in ready, "the lease is found to have run out")

    def close(self) -> None:
        """End every process."""
        self.prometheus.stop(signal.SIGKILL)
        self.place.close()
        self.broker.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, s3_moto: S3) -> Iterator[Watched]:
    made = Watched(tmp_path_factory.mktemp("watched"), s3_moto)
    try:
        yield made
    finally:
        made.close()


def test_every_metric_alert_and_query_returns_data_and_every_alert_fires(watched: Watched) -> None:
    place = watched.place
    place.start()
    watched.prometheus.start()
    watched.wait_for('safer_worker_free{queue="cpu"} == 1')
    watched.wait_for("safer_jobs_total")
    _while_the_broker_is_away(watched)
    watched.broker.start()
    _jobs_of_all_kinds(watched)
    watched.wait_for('safer_jobs_total{state="succeeded"} > 0')
    watched.wait_for("safer_gates_total > 0")
    watched.wait_for(f'safer_artifact_bytes_total{{job="{WORKERS}", op="put"}} > 10000')  # by the stages' own processes
    time.sleep(3.0)  # two more scrapes, so that what came last has a rate
    assert _without_data(watched.prometheus) == []
    assert watched.prometheus.names() >= {"up"}
    assert _unknown_labels(watched) == []
    _stop(watched)
    assert watched.fired == {rule["alert"] for rule in alert_rules()}


def _while_the_broker_is_away(watched: Watched) -> None:
    """Nobody gets a message: workers that ask the database go on, one of which has a GPU, one dies, and one fails."""
    place = watched.place
    watched.broker.stop()
    acted, waiting = watched.submit(seed=1), [watched.submit(seed=seed) for seed in (2, 3, 4)]
    alone = watched.submit(seed=5)
    _answered_with_5xx(place.url)
    watched.wait_for('safer_http_seconds_count{status="503"}')
    _answered_with_5xx(place.url)
    for job_id in waiting:  # their messages are lost, though a worker is free
        place.jobs.mark_sent(place.jobs.units(job_id)[-1].id)
    oldest = {"ready_at": utc_after(-_OLD_SECONDS)}
    with writing(place.engine) as connection:
        connection.execute(units.update().where(units.c.job_id == waiting[0]).values(oldest))
    watched.wait_for_alert("SaferQueueStuck")
    watched.wait_for_alert("SaferErrorsServed")
    watched.wait_for_alert("SaferMessagesLost")
    failed = JobError("numerical_error", "the model gives NaN", retryable=True)
    place.jobs.fail(watched.lease(acted), failed)
    watched.wait_for("safer_stage_errors_total")
    for _ in range(5):
        place.jobs.fail(watched.lease(acted), failed)
    watched.wait_for_alert("SaferStagesFail")
    for _ in range(7):
        watched.lose(acted)
    watched.wait_for_alert("SaferLeasesExpire")
    _computed_elsewhere(watched, acted)
    _computed_by_a_worker_that_is_gone(watched, alone)
    for job_id in (acted, alone, *waiting):
        place.jobs.request_cancel(PROJECT, job_id, "the test")


def _answered_with_5xx(url: str) -> None:
    for _ in range(_MANY):
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{url}/readyz", timeout=10)


def _computed_elsewhere(watched: Watched, job_id: str) -> None:
    """What a worker with a GPU would say of autoencoders that explain little: there is none here."""
    figures = {"sae_fvu": 0.9}
    for number in range(3):
        cost = {"peak_gpu_bytes": 1 << 30}
        done = Finished("computed", f"{number}" * 64, f"{number}" * 64, cost, 1000, figures=figures)
        watched.place.jobs.finish(watched.lease(job_id), done)
    watched.wait_for_alert("SaferSaePoor")


def _computed_by_a_worker_that_is_gone(watched: Watched, job_id: str) -> None:
    """A process that nobody ever scraped computes a stage, and the API tells of it."""
    before = 'safer_stage_seconds_count{stage="prepare", outcome="computed"}'
    known = sum(series.points[-1][1] for series in watched.prometheus.instant(before))
    while watched.place.jobs.stages(job_id)[0].outcome is None:
        assert watched.place.worker("--once", SAFER_METRICS_PORT=str(free_port())).wait(120) == 0
    watched.wait_for(f"{before} > {known:g}")


def _jobs_of_all_kinds(watched: Watched) -> None:
    """One succeeds, one finds everything there and is judged, one is refused, one is cancelled.

    The GPU queue is served on the CPU.
    """
    place = watched.place
    first, cancelled = watched.submit(seed=8), watched.submit(seed=9)
    place.cli("cancel", cancelled)
    wrong = watched.files["model"] / "config.json"
    refused = place.submit({"model": watched.files["model"], "dataset": wrong})
    with place.client() as client:
        spec = client.job(first).spec
        again = client.submit(Submission(spec)).id
        client.post_gate(GateRequest(audit=again))
    states = [place.wait(job_id).state for job_id in (first, again, refused, cancelled)]
    assert states == [JobState.SUCCEEDED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED], place.logs()[-3000:]


def _without_data(prometheus: Prometheus) -> list[str]:
    """Metrics, selectors and thresholds of alerts, and queries of the dashboard that give no number."""
    metrics = [f'{{__name__=~"{name}(_bucket|_count|_sum|_total)?"}}' for name in sorted(labels_of_metrics())]
    alerts = [query for rule in alert_rules() for query in (_THRESHOLD.sub("", rule["expr"]), *_SELECTOR.findall(rule["expr"]))]
    shown = [query for _, query in dashboard_queries()]
    strangers = {base(name) for name in prometheus.names() if name.startswith("safer_")} - set(labels_of_metrics())
    return [query for query in (*metrics, *alerts, *shown) if not prometheus.has(query)] + sorted(strangers)


def _unknown_labels(watched: Watched) -> list[str]:
    """Values of labels that are no words of the program's: an id, a name, a text."""
    plain = re.compile(r"[a-z][a-z_-]*|\d{3}|[\d.]+(e[+-]\d+)?|\+Inf|[A-Z]+|(/[a-z0-9_.{}:-]*)+")
    series = watched.prometheus.instant('{__name__=~"safer_.*"}')
    values = {value for each in series for name, value in each.labels.items() if name not in ("__name__", "instance", "job")}
    secret = {"default", watched.place.token, *(job.id for job in watched.place.jobs.find(PROJECT).items)}
    return sorted(value for value in values if not plain.fullmatch(value) or value in secret)


def _stop(watched: Watched) -> None:
    """End workers, then the API."""
    for worker in watched.place.workers:
        stop_group(worker, signal.SIGKILL)
    watched.wait_for_alert("SaferWorkersMissing")
    watched.place.api.stop(signal.SIGKILL)
    watched.wait_for_alert("SaferAuditDown")
