"""What a purge takes that cannot be searched, and what it leaves: in a folder and in S3, beside a real database."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from safer_engine.store import digest_bytes
from service.errors import Conflict
from service.infra.object_space import blob_name
from service.infra.purge import purge
from service.infra.retention import gc
from service.infra.stores import ServiceStore, Stores
from service.infra.upload_files import PartReceipt, UploadFiles
from service.jobs.gate_model import NewGate, Outcome
from service.jobs.gates import GateStore
from service.jobs.model import JobRecord
from service.jobs.requests import Finished
from service.jobs.tables import jobs as job_rows
from service.jobs.uploads import UploadState, UploadStore
from service.upload_names import UploadFile
from tests.helpers.databases import PEPPER, Database
from tests.helpers.store_world import KEY, OTHER_KEY, World, draft, put

NAMES_R1 = b'{"pair_id": "r1"}\n'
SPEC = {"dataset": {"source": {"path": "hub"}}}


@pytest.fixture(params=["folder", pytest.param("s3_moto", marks=pytest.mark.full)])
def world(request: pytest.FixtureRequest, folder: Path) -> World:
    return World(folder, None if request.param == "folder" else request.getfixturevalue(request.param), secret_pepper=PEPPER)


def walked(db: Database, store: ServiceStore, stages: dict[str, bytes], key: str = KEY) -> JobRecord:
    """A job whose artifacts, one file `<stage>.jsonl` each, were computed one from the other."""
    job = db.submit(*stages, spec=SPEC)
    before: dict[str, str] = {}
    for stage, content in stages.items():
        lease = db.take()
        assert db.store.claim_key(lease, key)
        manifest = put(
            store, {f"{stage}.bin" if b"pair_id" not in content else f"{stage}.jsonl": content}, key, stage, draft(stage, before)
        )
        before = {stage: manifest.content_digest}
        db.store.finish(lease, Finished(key=key, content_digest=manifest.content_digest, bytes=1))
    return job


def blobs(stores: Stores) -> set[bytes]:
    return {b"".join(stores.space.stream(found.name)) for found in stores.space.listing("blobs/")}


def receive(db: Database, stores: Stores, kind: str, data: bytes) -> str:
    """An upload of two files of which one is whole and one under way; its id."""
    rows, files = UploadStore(db.engine, db.settings), UploadFiles(stores, "default")
    listed = [UploadFile("a.jsonl", digest_bytes(data), len(data)), UploadFile("b.jsonl", "0" * 64, 100)]
    made = rows.create("default", kind, listed, "me")
    for index in (0, 1):
        files.put_part(made.id, index, 0, [data], PartReceipt(len(data), digest_bytes(data)))
    with pytest.raises(Conflict):
        files.complete(made.id, listed)
    return made.id


def test_files_go_with_the_artifact_unless_another_names_them(db: Database, stores: Stores, store: ServiceStore) -> None:
    walked(db, store, {"pairs": NAMES_R1, "activations": b"shared", "sae": b"own"})
    put(stores.project("other"), {"x": b"shared"}, KEY, "edits")
    purge(stores, db.engine, "default", ["r1"])
    assert blobs(stores) == {b"shared"}


def test_a_file_whose_artifact_is_gone_already_goes(db: Database, stores: Stores, store: ServiceStore) -> None:
    walked(db, store, {"pairs": NAMES_R1})
    store.delete("pairs", KEY)
    removed = purge(stores, db.engine, "default", ["r1"]).removed
    if stores.s3 is None:
        assert [each.kind for each in removed] == ["blob"]
        assert blobs(stores) == set()
    else:  # it might be about to be named
        assert blobs(stores) == {NAMES_R1}
        assert [each.kind for each in gc(stores, db.engine, now=time.time() + 90000).removed] == ["blob"]


@pytest.mark.parametrize("gone", ["pairs", "activations"])
def test_what_came_of_an_artifact_that_is_gone_goes(db: Database, stores: Stores, store: ServiceStore, gone: str) -> None:
    job = walked(db, store, {"pairs": NAMES_R1, "activations": b"1", "sae": b"2", "edits": NAMES_R1})
    walked(db, store, {"pairs": b'{"pair_id": "r9"}', "activations": b"3", "sae": b"4"}, OTHER_KEY)
    db.store.delete("default", job.id, "me")
    store.delete(gone, KEY)
    store.delete(gone, OTHER_KEY)
    purge(stores, db.engine, "default", ["r1"])
    assert not store.has("sae", KEY)
    assert store.has("sae", OTHER_KEY)


def test_damaged_artifacts_go_with_what_came_of_them(db: Database, stores: Stores, store: ServiceStore) -> None:
    walked(db, store, {"pairs": NAMES_R1, "sae": b"2"})
    walked(db, store, {"pairs": b'{"pair_id": "r9"}', "sae": b"4"}, OTHER_KEY)
    (digest,) = [entry.digest for entry in store.manifest("pairs", KEY).files.values()]
    stores.space.put(blob_name(digest), NAMES_R1.upper())
    stores.drop_cached([digest])
    done = purge(stores, db.engine, "default", ["r1"])
    assert {(each.kind, each.name) for each in done.removed} >= {("damaged", f"pairs/{KEY}"), ("artifact", f"sae/{KEY}")}
    assert list(stores.space.listing("damaged/")) == []
    assert NAMES_R1.upper() not in blobs(stores)
    assert store.has("sae", OTHER_KEY)


def test_datasets_under_way_go_and_models_stay(db: Database, stores: Stores) -> None:
    dataset, model = receive(db, stores, "dataset", NAMES_R1), receive(db, stores, "model", b"weights")
    done = purge(stores, db.engine, "default", ["r1"])
    assert [each.name for each in done.removed if each.kind == "upload"] == [dataset]
    assert blobs(stores) == {b"weights"}
    files, rows = UploadFiles(stores, "default"), UploadStore(db.engine, db.settings)
    assert files.parts(dataset) == ()
    assert len(files.parts(model)) == 1
    assert rows.get("default", model).state is UploadState.OPEN
    assert {each.name.split("/")[2] for each in stores.space.listing("incoming/")} == {model}


def test_a_model_of_a_deleted_job_goes_with_its_dataset(db: Database, stores: Stores, store: ServiceStore) -> None:
    audit = walked(db, store, {"pairs": NAMES_R1})
    jobs = [walked(db, store, {"training": each}, key) for each, key in ((b"theirs", KEY), (b"others", OTHER_KEY))]
    for job, digest in zip((audit, *jobs), ("d1", "d1", "d2"), strict=True):
        db.change(job_rows, job_rows.c.id == job.id, inputs={"dataset": digest})
    db.store.delete("default", jobs[0].id, "me")
    done = purge(stores, db.engine, "default", ["r1"])
    assert {each.name for each in done.removed if each.kind == "artifact"} == {f"pairs/{KEY}", f"training/{KEY}"}
    assert blobs(stores) == {b"others"}


def test_a_list_of_an_upload_that_nobody_has_goes(db: Database, stores: Stores) -> None:
    files = UploadFiles(stores, "default")
    files.put_part("u1", 0, 0, [NAMES_R1], PartReceipt(len(NAMES_R1), digest_bytes(NAMES_R1)))
    digest = files.complete("u1", [UploadFile("a.jsonl", digest_bytes(NAMES_R1), len(NAMES_R1))])
    purge(stores, db.engine, "default", ["r1"])
    assert not files.has(digest)
    assert blobs(stores) == set()


def test_work_that_a_process_still_does_is_named(db: Database, stores: Stores, store: ServiceStore) -> None:
    walked(db, store, {"pairs": NAMES_R1})
    with store.open_work("sae", KEY), pytest.raises(Conflict, match=f"sae/{KEY[:12]}"):
        purge(stores, db.engine, "default", ["r1"])
    assert not store.has("pairs", KEY)


def test_old_records_of_damage_are_collected(db: Database, stores: Stores, store: ServiceStore) -> None:
    put(store, {"p.json": json.dumps({"n": 1}).encode()}, KEY, "pairs")
    (digest,) = [entry.digest for entry in store.manifest("pairs", KEY).files.values()]
    stores.space.delete([blob_name(digest)])
    assert store.set_aside("pairs", KEY)
    assert gc(stores, db.engine).removed == ()
    assert [each.kind for each in gc(stores, db.engine, now=time.time() + 8 * 86400).removed] == ["damaged"]
    assert list(stores.space.listing("damaged/")) == []


def test_decisions_of_gates_that_name_the_pairs_go_and_verdicts_stay(db: Database, stores: Stores, store: ServiceStore) -> None:
    gates = GateStore(db.engine, db.store)
    job = db.get(walked(db, store, {"pairs": NAMES_R1}))
    new = NewGate({}, "default", "d" * 64)
    lost = {"r1": "r1", "part": "r1#2", "other": "r12"}
    made = {name: gates.create("default", new, job.id).gate.id for name in (*lost, "late")}
    for _ in lost:
        taken = gates.take()
        assert taken is not None
        named = next(pair for name, pair in lost.items() if made[name] == taken.gate.id)
        assert gates.decide(taken, Outcome("fail", "broken: x", json.dumps({"lost_pairs": [named]})))
    late = gates.take()
    assert late is not None
    purge(stores, db.engine, "default", ["r1"])
    assert [gates.decision(made[name]) is None for name in lost] == [True, True, False]
    assert {gates.record(made[name]).verdict for name in lost} == {"fail"}
    assert not gates.decide(late, Outcome("fail", "broken: x", json.dumps({"lost_pairs": ["r1"]})))
