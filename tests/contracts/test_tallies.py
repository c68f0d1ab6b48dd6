"""What stage runs came to, counted in SQL, on every database: every way in which a run ends, once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from service.errors import LeaseLost
from service.infra.metrics import ServiceCollector
from service.jobs.access import AccessStore, Limits
from service.jobs.clock import utc_after
from service.jobs.model import JobError
from service.jobs.requests import Finished
from service.jobs.tables import units
from tests.helpers.databases import Database

PASSING = JobError("labeller_error", "the endpoint was away", retryable=True)
KEY = "k" * 64
MADE = Finished(
    "computed", KEY, "c" * 64, {"peak_gpu_bytes": 1 << 30}, 500,
    figures={"tokens": 11, "sae_fvu": 0.2, "sae_dead_share": 0.0, "reward_recovered": 0.97}, rows={"kept": 8, "tie": 2},
)  # fmt: skip


def shown(db: Database, name: str) -> dict[tuple[str, ...], float]:
    """Samples of one metric: values of its labels, in the order of their names → value."""
    registry = CollectorRegistry()
    registry.register(ServiceCollector(db.store.facts))
    samples = [sample for family in registry.collect() for sample in family.samples if sample.name == f"safer_{name}"]
    return {tuple(value for _, value in sorted(sample.labels.items())): sample.value for sample in samples}


def runs(db: Database) -> dict[tuple[str, ...], float]:
    """(outcome, stage) → runs."""
    return shown(db, "stage_seconds_count")


def test_every_way_a_run_ends_is_counted_once(db: Database) -> None:
    db.submit("prepare", "pairs", "labels")
    db.store.finish(db.take(), Finished())
    db.store.fail(db.take(), PASSING)
    db.now_ready()
    db.store.give_back(db.take())
    lost = db.take()
    db.run_out(lost)
    db.store.reconcile()
    with pytest.raises(LeaseLost):
        db.store.finish(lost, Finished())
    db.store.finish(db.take(), Finished("cached", KEY, "c" * 64))
    db.store.finish(db.take(), Finished("absent", "a" * 64, "b" * 64))
    expected = {("computed", "prepare"), ("failed", "pairs"), ("stopped", "pairs"), ("lost", "pairs")}
    assert runs(db) == dict.fromkeys(expected | {("cached", "pairs"), ("absent", "labels")}, 1.0)
    assert shown(db, "stage_errors_total") == {("labeller_error", "pairs"): 1.0}


def test_seconds_are_those_of_the_database_since_the_lease(db: Database) -> None:
    db.submit("prepare")
    lease = db.take()
    db.change(units, units.c.id == lease.unit_id, started=utc_after(-40.0))
    db.store.finish(lease, Finished())
    (total,) = shown(db, "stage_seconds_sum").values()
    assert total == pytest.approx(40.0, abs=5.0)
    buckets = shown(db, "stage_seconds_bucket")  # (le, outcome, stage)
    assert (buckets["15.0", "computed", "prepare"], buckets["60.0", "computed", "prepare"]) == (0.0, 1.0)
    assert buckets["+Inf", "computed", "prepare"] == 1.0


def test_a_poisoned_unit_and_a_lost_artifact_are_errors_of_their_stage(db: Database) -> None:
    db.submit("prepare")
    for _ in range(3):
        db.run_out(db.take())
        db.store.reconcile()
    db.submit("pairs", "sae")
    db.store.finish(db.take(), Finished("computed", KEY, "c" * 64))
    assert db.store.compute_anew(db.take(), "pairs", JobError("artifact_error", "it is damaged"))
    assert shown(db, "stage_errors_total") == {("worker_died", "prepare"): 1.0, ("artifact_error", "sae"): 1.0}
    assert runs(db) == {("lost", "prepare"): 3.0, ("computed", "pairs"): 1.0, ("failed", "sae"): 1.0}


def test_parts_are_runs_and_what_is_parked_is_none(db: Database) -> None:
    db.submit("activations")
    whole = db.take()
    assert db.store.claim_key(whole, KEY)
    db.submit("activations")
    assert not db.store.claim_key(db.take(), KEY)
    assert runs(db) == {}
    db.store.split(whole, ["b", "c"])
    for _ in range(3):
        db.store.finish(db.take(), MADE if db.store.units(whole.job_id)[-1].kind == "join" else Finished())
    assert runs(db) == {("computed", "activations"): 4.0}
    assert shown(db, "stage_bytes_total") == {("activations",): 500.0}


def test_gpu_time_is_what_the_job_is_billed(db: Database) -> None:
    job = db.submit("sae@gpu", "labels@gpu", "report")
    lease = db.take("gpu")
    db.change(units, units.c.id == lease.unit_id, beat_at=utc_after(-60.0))
    db.store.heartbeat(lease)
    db.change(units, units.c.id == lease.unit_id, beat_at=utc_after(-30.0))
    db.store.finish(lease, Finished())
    lost = db.take("gpu")
    db.change(units, units.c.id == lost.unit_id, beat_at=utc_after(-500.0))
    db.run_out(lost)
    db.store.reconcile()
    db.store.finish(db.take("gpu"), Finished())
    lease = db.take()
    db.change(units, units.c.id == lease.unit_id, beat_at=utc_after(-60.0))
    db.store.finish(lease, Finished())
    counted = shown(db, "gpu_seconds_total")
    assert counted["sae",] == pytest.approx(90.0, abs=5.0)
    assert sum(counted.values()) == pytest.approx(db.get(job).gpu_seconds, abs=1e-6)


def test_an_artifact_is_described_once_by_who_computed_it(db: Database) -> None:
    for made in (MADE, replace(MADE, outcome="cached")):
        db.submit("sae")
        db.store.finish(db.take(), made)
    assert shown(db, "tokens_total") == {("sae",): 11.0}
    assert shown(db, "gpu_memory_peak_bytes") == {("sae",): float(1 << 30)}
    assert shown(db, "dataset_rows_total") == {("kept", "sae"): 8.0, ("tie", "sae"): 2.0}
    assert shown(db, "sae_fvu_sum") == {(): 0.2}
    assert shown(db, "sae_dead_share_count") == {(): 1.0}
    assert shown(db, "reward_recovered_bucket")["0.98",] == 1.0


def test_a_peak_of_memory_is_the_last_ones(db: Database) -> None:
    for peak in (5, 3):
        db.submit("sae")
        db.store.finish(db.take(), Finished("computed", KEY, "c" * 64, {"peak_gpu_bytes": peak}))
    assert shown(db, "gpu_memory_peak_bytes") == {("sae",): 3.0}


def test_figures_of_autoencoders_are_there_before_the_first(db: Database) -> None:
    assert shown(db, "sae_fvu_count") == {(): 0.0}
    assert shown(db, "sae_fvu_bucket")["+Inf",] == 0.0


def test_many_workers_count_at_once_and_none_is_forgotten(db: Database) -> None:
    AccessStore(db.engine, db.settings).set_limits("default", Limits(max_running=16), "test")
    leases = []
    for _ in range(16):
        db.submit("prepare")
        leases.append(db.take())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda lease: db.store.finish(lease, Finished(figures={"tokens": 2.0})), leases))
    assert runs(db) == {("computed", "prepare"): 16.0}
    assert shown(db, "tokens_total") == {("prepare",): 32.0}
