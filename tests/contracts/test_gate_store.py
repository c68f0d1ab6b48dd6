"""Gates in the database: due with the end of their audit, judged once, told to the job and to those who asked."""

from __future__ import annotations

from typing import Any

import pytest

from safer_engine.errors import SpecError
from service.errors import Conflict, NotFound, QuotaExceeded
from service.jobs.clock import utc_after
from service.jobs.deliveries import CALLBACK, MAX_ATTEMPTS, DeliveryState, DeliveryStore, NewDelivery
from service.jobs.gate_model import AWAITED, GateQuery, GateRecord, GateState, NewGate, Outcome, TakenGate
from service.jobs.gates import GateStore
from service.jobs.model import JobError, JobKind, JobRecord, JobState
from service.jobs.tables import gate_deliveries, gates, projects
from tests.helpers.databases import Database, new_job

PASSED = Outcome("pass", "all checks passed", '{"verdict": "pass"}\n')
TOLD = (NewDelivery(CALLBACK, {"url": "https://example.org/x"}), NewDelivery("registry", {"name": "rm", "version": 3}))


def wanted(**given: Any) -> NewGate:
    """A gate with these fields."""
    return NewGate(**{"policy": {"version": 1}, "policy_name": "default", "policy_digest": "d" * 64, "deliveries": TOLD, **given})


@pytest.fixture
def store(db: Database) -> GateStore:
    return GateStore(db.engine, db.store)


@pytest.fixture
def deliveries(db: Database) -> DeliveryStore:
    return DeliveryStore(db.engine)


def create(store: GateStore, job: JobRecord, **given: Any) -> GateRecord:
    return store.create("default", wanted(**given), job.id).gate


def take(store: GateStore) -> TakenGate:
    taken = store.take()
    assert taken is not None
    return taken


def fail(db: Database) -> None:
    db.store.fail(db.take(), JobError("resource_exhausted", "no memory", ""))


def test_a_gate_is_due_when_its_audit_ends(db: Database, store: GateStore, deliveries: DeliveryStore) -> None:
    job = db.submit("prepare", "report")
    gate = create(store, job)
    assert (gate.state, gate.verdict, gate.reason) == (GateState.PENDING, None, "")
    assert store.take() is None
    assert (db.get(job).verdict, db.get(job).verdict_reason) == (None, AWAITED)
    db.run(job)
    taken = take(store)
    assert (taken.gate.id, taken.job.state, taken.attempts, taken.policy) == (gate.id, JobState.SUCCEEDED, 1, {"version": 1})
    assert store.take() is None
    assert deliveries.take(CALLBACK) == ()
    assert store.decide(taken, PASSED)
    found = store.get("default", gate.id)
    assert (found.state, found.verdict, found.reason) == (GateState.DECIDED, "pass", "all checks passed")
    assert found.decided is not None
    assert store.decision(gate.id) == PASSED.decision
    shown = db.get(job)
    assert shown.verdict == {
        "outcome": "pass", "gate": gate.id, "policy": "default", "policy_digest": "d" * 64, "baseline": None
    }  # fmt: skip
    assert shown.verdict_reason == "all checks passed"


def test_a_gate_on_an_audit_that_has_ended_is_due_at_once(db: Database, store: GateStore) -> None:
    gate = create(store, db.run(db.submit()))
    assert take(store).gate.id == gate.id


@pytest.mark.parametrize("end", ["fail", "cancel"])
def test_whatever_way_the_audit_ends(db: Database, store: GateStore, end: str) -> None:
    job = db.submit()
    gate = create(store, job)
    if end == "fail":
        fail(db)
    else:
        db.store.request_cancel("default", job.id, "test")
    assert take(store).gate.id == gate.id


def test_a_decision_is_written_once(db: Database, store: GateStore) -> None:
    job = db.run(db.submit())
    gate = create(store, job)
    slow = take(store)
    db.change(gates, gates.c.id == gate.id, due=utc_after(-1.0))
    quick = take(store)
    assert quick.attempts == 2
    assert store.decide(quick, PASSED)
    assert not store.decide(slow, Outcome("fail", "too late"))
    store.put_back(slow, 0.0)
    assert store.take() is None
    assert store.get("default", gate.id).verdict == "pass"
    assert db.get(job).verdict_reason == "all checks passed"
    counted = db.store.facts()
    assert counted is not None
    assert counted.gates == {"pass": 1, "fail": 0, "inconclusive": 0}


def test_what_passes_is_tried_again_and_counts_only_where_told(db: Database, store: GateStore) -> None:
    gate = create(store, db.run(db.submit()))
    store.put_back(take(store), 0.0)
    again = take(store)
    assert again.attempts == 1
    store.put_back(again, 0.0, counts=True)
    assert take(store).attempts == 2
    assert store.get("default", gate.id).state is GateState.PENDING


def test_an_audit_that_is_tried_again_is_judged_at_its_new_end(db: Database, store: GateStore) -> None:
    job = db.submit()
    gate = create(store, job)
    fail(db)
    early = take(store)
    db.store.retry("default", job.id, "test")
    assert not store.decide(early, Outcome("inconclusive", "it failed"))
    store.put_back(early, 0.0)
    assert store.take() is None
    assert db.get(job).verdict_reason == AWAITED
    db.run(job)
    late = take(store)
    assert (late.gate.id, late.job.state, late.attempts) == (gate.id, JobState.SUCCEEDED, 1)
    assert not store.decide(early, Outcome("inconclusive", "it failed"))
    assert store.decide(late, PASSED)


def test_a_retry_takes_the_verdict_of_the_attempt_before_away(db: Database, store: GateStore) -> None:
    job = db.submit()
    create(store, job)
    fail(db)
    assert store.decide(take(store), Outcome("inconclusive", "it failed", error=JobError("audit_failed", "it failed")))
    assert (db.get(job).verdict or {})["outcome"] == "inconclusive"
    db.store.retry("default", job.id, "test")
    assert (db.get(job).verdict, db.get(job).verdict_reason) == (None, JobRecord.verdict_reason)


def test_a_job_shows_the_newest_gate_whichever_is_judged_last(db: Database, store: GateStore) -> None:
    job = db.run(db.submit())
    older = create(store, job)
    db.change(gates, gates.c.id == older.id, created=utc_after(-60.0))
    create(store, job, policy_name="strict")
    first, second = sorted((take(store), take(store)), key=lambda taken: taken.gate.created)
    assert store.decide(second, Outcome("fail", "broken: a"))
    assert store.decide(first, PASSED)
    shown = db.get(job).verdict or {}
    assert (shown["outcome"], shown["policy"]) == ("fail", "strict")


def test_deliveries_are_owed_with_the_decision_and_settled_once(
    db: Database, store: GateStore, deliveries: DeliveryStore
) -> None:
    gate = create(store, db.run(db.submit()))
    assert {each.state for each in deliveries.of_gate(gate.id)} == {DeliveryState.WAITING}
    store.decide(take(store), PASSED)
    (owed,) = deliveries.take(CALLBACK)
    assert (owed.delivery.gate_id, owed.delivery.target, owed.delivery.attempts) == (gate.id, TOLD[0].target, 1)
    assert deliveries.take(CALLBACK) == ()
    deliveries.settle(owed.delivery.id, delivered=True)
    deliveries.settle(owed.delivery.id, delivered=False)  # of one who tried at the same time
    (other,) = deliveries.take("registry")
    assert other.delivery.target == TOLD[1].target
    assert [each.state for each in deliveries.of_gate(gate.id)] == [DeliveryState.DELIVERED, DeliveryState.PENDING]


def test_a_delivery_that_never_arrives_is_given_up(db: Database, store: GateStore, deliveries: DeliveryStore) -> None:
    gate = create(store, db.run(db.submit()))
    store.decide(take(store), PASSED)
    tried = 0
    while deliveries.take(CALLBACK):
        tried += 1
        db.change(gate_deliveries, gate_deliveries.c.gate_id == gate.id, due=utc_after(-1.0))
    assert tried == MAX_ATTEMPTS
    assert deliveries.of_gate(gate.id)[0].state is DeliveryState.FAILED


def test_job_and_gate_are_stored_together_or_not_at_all(db: Database, store: GateStore) -> None:
    made = store.create("default", wanted(), new_job("prepare", labels={"a": "b"}))
    assert made.created
    assert db.store.job(made.gate.job_id).labels == {"a": "b"}
    with pytest.raises(Conflict, match="no audit"):
        store.create("default", wanted(), new_job("prepare", kind=JobKind.TRAIN_RM))
    assert [job.id for job in db.store.find("default").items] == [made.gate.job_id]


def test_the_same_key_gives_the_same_gate(db: Database, store: GateStore) -> None:
    first = store.create("default", wanted(idempotency_key="k", body_digest="1"), new_job())
    again = store.create("default", wanted(idempotency_key="k", body_digest="1"), new_job())
    assert (again.gate, again.created) == (first.gate, False)
    assert store.earlier("default", "k", "1") == first.gate
    assert store.earlier("default", None, "1") is None
    assert len(db.store.find("default").items) == 1
    with pytest.raises(Conflict, match=first.gate.id):
        store.create("default", wanted(idempotency_key="k", body_digest="2"), new_job())


def test_what_cannot_be_judged_is_refused(db: Database, store: GateStore) -> None:
    training = db.submit(kind=JobKind.TRAIN_RM)
    with pytest.raises(Conflict, match="train-rm"):
        create(store, training)
    job = db.run(db.submit("prepare", priority=50))
    with pytest.raises(NotFound):
        store.create("another", wanted(), job.id)
    db.store.delete("default", job.id, "test")
    with pytest.raises(NotFound):
        create(store, job)


def test_pending_gates_are_bounded(db: Database, store: GateStore) -> None:
    db.change(projects, projects.c.name == "default", max_queued=2)
    job = db.submit()
    create(store, job)
    create(store, job)
    with pytest.raises(QuotaExceeded, match="2 gates pending"):
        create(store, job)


def test_baselines_by_id_and_label(db: Database, store: GateStore) -> None:
    old = db.run(db.submit(labels={"alias": "production", "team": "a/b"}))
    new = db.run(db.submit(labels={"alias": "production"}))
    waiting = db.submit(labels={"alias": "production"})
    training = db.submit(kind=JobKind.TRAIN_RM)
    assert store.baseline("default", old.id) == old.id
    assert store.baseline("default", "label:production") == new.id
    assert store.baseline("default", "label:alias=production", own=new.id) == old.id
    assert store.baseline("default", "label:team=a/b") == old.id
    for text in ("label:nothing", "production", "0" * 26):
        with pytest.raises(NotFound):
            store.baseline("default", text)
    for job in (waiting, training):
        with pytest.raises(Conflict, match="no finished audit"):
            store.baseline("default", job.id)
    with pytest.raises(SpecError):
        store.baseline("default", "label:=x")
    with pytest.raises(NotFound):
        store.baseline("other", old.id)


def test_a_listing_walks_all_gates_page_by_page(db: Database, store: GateStore) -> None:
    job = db.run(db.submit())
    made = [create(store, job, policy_name=f"p{n % 2}").id for n in range(5)]
    store.decide(take(store), PASSED)
    found, cursor = [], None
    while True:
        page = store.find("default", cursor=cursor, limit=2)
        found += [gate.id for gate in page.items]
        cursor = page.next
        if cursor is None:
            break
    assert sorted(found) == sorted(made)
    assert [gate.verdict for gate in store.find("default", GateQuery(verdicts=("pass",))).items] == ["pass"]
    assert len(store.find("default", GateQuery(states=(GateState.PENDING,))).items) == 4
    assert len(store.find("default", GateQuery(policy="p1")).items) == 2
    assert store.find("default", GateQuery(job_id="0" * 26)).items == ()
    assert store.find("another").items == ()
    with pytest.raises(NotFound):
        store.get("another", made[0])
    with pytest.raises(SpecError):
        store.find("default", cursor="nonsense")


def test_pending_gates_are_counted_by_what_they_wait_for(db: Database, store: GateStore) -> None:
    create(store, db.submit("prepare"))
    other = db.submit(priority=5)
    create(store, other)
    db.store.request_cancel("default", other.id, "test")
    facts = db.store.facts()
    assert facts is not None
    assert facts.gates_pending == {"audit": 1, "judge": 1}
