"""Orders to children: what they say, and what stands in the way of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from safer_engine.errors import ArtifactError
from safer_engine.pipeline import AuditRequest, stage_key
from safer_engine.stages.activations import ActivationsStage
from safer_engine.store import LocalArtifactStore, ManifestDraft
from service.jobs.model import JobKind, JobRecord, JobState, Lease, StageRecord, StageState, UnitKind
from workers.order import Order, audit_spec, make_order, parts_of, pinned_inputs

SPEC: dict[str, Any] = {
    "model": {"path": "org/rm"},
    "dataset": {"source": {"kind": "hub", "path": "org/pairs"}},
    "runtime": {"shard_pairs": 4},
}
PINS = {"model": "m", "model.revision": "c", "dataset": "d", "labels": "r", "model.dtype": "bfloat16", "sae.dtype": "float32"}


@pytest.fixture
def store(tmp_path: Path) -> LocalArtifactStore:
    found = LocalArtifactStore(tmp_path)
    with found.open_work("pairs", "p") as work:
        found.commit("pairs", "p", work, ManifestDraft(1, "PairSet", {"n_pairs": 100}))
    return found


def job(**changes: Any) -> JobRecord:
    import datetime

    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    return replace(JobRecord("j", "default", JobKind.AUDIT, JobState.RUNNING, 0, SPEC, now, inputs=PINS), **changes)


def lease(stage: str, kind: UnitKind = UnitKind.WHOLE, name: str = "") -> Lease:
    return Lease(1, 2, "j", "default", stage, kind, name, 1, "w", 1)


def rows(store: LocalArtifactStore) -> list[StageRecord]:
    digest = store.read("pairs", "p").manifest.content_digest
    done = {"key": "p", "content_digest": digest}
    return [
        StageRecord(1, "j", 0, "prepare", "cpu", StageState.DONE),
        StageRecord(2, "j", 1, "pairs", "cpu", StageState.DONE, **done),
        StageRecord(3, "j", 2, "activations", "gpu", StageState.OPEN),
    ]


def test_the_key_is_the_engines_and_depends_on_what_was_pinned(store: LocalArtifactStore) -> None:
    order = make_order(lease("activations"), job(), rows(store), store)
    spec = audit_spec(order)
    assert spec.model.dtype == "bfloat16"
    stage = ActivationsStage()
    digests = {stage.consumes[0]: store.read("pairs", "p").manifest.content_digest}
    assert order.key == stage_key(stage, AuditRequest(spec, pinned_inputs(spec, PINS)), store, digests)
    for pin in ("model", "model.dtype"):
        other = make_order(lease("activations"), job(inputs={**PINS, pin: "float32"}), rows(store), store)
        assert other.key != order.key
    moved = {**SPEC, "model": {"path": "elsewhere/rm"}, "runtime": {"shard_pairs": 8}}
    assert make_order(lease("activations"), job(spec=moved), rows(store), store).key == order.key


def test_a_retraining_goes_by_the_pinned_base_and_precision(store: LocalArtifactStore) -> None:
    spec = {**SPEC, "retraining": {"base": "org/base"}}
    pins = {**PINS, "base": "b", "retraining.dtype": "bfloat16"}
    order = make_order(lease("retraining"), job(spec=spec, inputs=pins), rows(store), store)
    settled = audit_spec(order)
    assert settled.retraining is not None
    assert settled.retraining.recipe.dtype == "bfloat16"
    base = pinned_inputs(settled, pins).base
    assert base is not None
    assert (base.digest, base.origin) == ("b", "org/base")
    for other in ({"base": "c"}, {"retraining.dtype": "float32"}):
        moved = make_order(lease("retraining"), job(spec=spec, inputs={**pins, **other}), rows(store), store)
        assert moved.key != order.key
    named = {**SPEC, "retraining": {"base": "elsewhere/base"}, "labels": {"keep": 3}}
    assert make_order(lease("retraining"), job(spec=named, inputs=pins), rows(store), store).key == order.key
    assert audit_spec(make_order(lease("retraining"), job(), rows(store), store)).retraining is None


def test_an_order_travels_as_json(store: LocalArtifactStore) -> None:
    order = make_order(lease("activations", UnitKind.PART, "shards-00001-00009"), job(), rows(store), store)
    assert order.part == "shards-00001-00009"
    assert order.keys == {"pairs": "p"}
    assert Order.from_json(order.to_json()) == order


def test_parts_follow_from_the_number_of_pairs(store: LocalArtifactStore) -> None:
    order = make_order(lease("activations"), job(), rows(store), store)
    assert len(parts_of(order, store)) == 1 + 3
    assert parts_of(replace(order, stage="labels"), store) == ()
    assert parts_of(replace(order, stage="prepare", key=None), store) == ()


def test_an_artifact_that_is_gone_is_said_with_a_way_on(store: LocalArtifactStore) -> None:
    order = make_order(lease("activations"), job(), rows(store), store)
    with pytest.raises(ArtifactError, match="pairs is gone") as found:
        parts_of(replace(order, keys={"pairs": "other"}), store)
    assert "submit the job as a new one" in found.value.hint
    with pytest.raises(ArtifactError, match="no artifact"):
        make_order(lease("activations"), job(), rows(store)[:1], store)
    with pytest.raises(ArtifactError, match="no stage"):
        make_order(lease("stage-of-tomorrow"), job(), rows(store), store)
