"""What is collected, what is kept, what a purge finds: in a folder and in S3, beside a real database."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from safer_engine.errors import ArtifactError, SpecError
from safer_engine.store import Manifest, digest_bytes
from service.errors import Conflict
from service.infra.purge import purge
from service.infra.retention import Collected, gc
from service.infra.stores import ServiceStore, Stores
from service.infra.upload_files import PartReceipt, UploadFiles
from service.jobs.clock import utc_after
from service.jobs.model import JobError, JobRecord, JobState, StageState
from service.jobs.requests import Finished
from service.jobs.reviews import ReviewStore
from service.jobs.tables import uploads as upload_rows
from service.jobs.uploads import UploadState, UploadStore
from service.upload_names import UploadFile
from tests.helpers.databases import PEPPER, Database
from tests.helpers.store_world import KEY, OTHER_KEY, World, draft, put

DAY = 86400.0
THIRD_KEY = "c" * 64


@pytest.fixture(params=["folder", *(pytest.param(name, marks=pytest.mark.full) for name in ("s3_moto", "s3_rgw"))])
def world(request: pytest.FixtureRequest, folder: Path) -> World:
    return World(folder, None if request.param == "folder" else request.getfixturevalue(request.param), secret_pepper=PEPPER)


def run(
    db: Database, store: ServiceStore, made: dict[str, tuple[str, dict[str, bytes]]], last: JobState, **given: Any
) -> JobRecord:
    """A job that commits one artifact a stage, and ends, or has one more stage open."""
    stages = [*made, *([] if last is JobState.SUCCEEDED else ["report"])]
    job = db.submit(*stages, **given)
    for stage, (key, files) in made.items():
        lease = db.take()
        assert db.store.claim_key(lease, key)
        manifest = store.manifest(stage, key) if store.has(stage, key) else put(store, files, key, stage)
        size = sum(entry.size for entry in manifest.files.values())
        db.store.finish(lease, Finished(key=key, content_digest=manifest.content_digest, bytes=size))
    if last is JobState.FAILED:
        db.store.fail(db.take(), JobError("internal", "it broke"))
    assert db.get(job).state is last
    return job


def later(stores: Stores, db: Database, days: float = 8, dry_run: bool = False) -> Collected:
    return gc(stores, db.engine, dry_run, now=time.time() + days * DAY)


def test_large_artifacts_go_after_a_week_and_others_stay(world: World, db: Database, stores: Stores, store: ServiceStore) -> None:
    made = {"activations": (KEY, {"x": b"12345"}), "edits": (KEY, {"y": b"678"})}
    run(db, store, made, JobState.SUCCEEDED)
    for days in (0.0, 6.9):
        assert later(stores, db, days).removed == ()
    before = {each.name for each in stores.space.listing("")}
    told = later(stores, db, dry_run=True)
    assert {each.name for each in stores.space.listing("")} == before
    found = later(stores, db)
    assert found.removed == told.removed
    assert [(each.kind, each.name.partition("/")[0]) for each in found.removed] == [
        ("artifact", "activations"),
        ("blob", digest_bytes(b"12345")),
    ]
    assert found.size == 5
    assert not store.has("activations", KEY)
    assert store.read("edits", KEY).path("y").read_bytes() == b"678"
    assert later(stores, db).removed == ()


@pytest.mark.parametrize("state", [JobState.RUNNING, JobState.FAILED])
def test_a_job_that_has_not_ended_keeps_what_it_uses(db: Database, stores: Stores, store: ServiceStore, state: JobState) -> None:
    made = {"pairs": (KEY, {"p": b"1"}), "activations": (KEY, {"x": b"12345"}), "sae": (KEY, {"w": b"9"})}
    job = run(db, store, made, state)
    found = later(stores, db)
    if state is JobState.RUNNING:
        assert found.removed == ()
        assert store.has("activations", KEY)
        return
    assert [each.name for each in found.of("artifact")] == [f"activations/{KEY}"]
    assert [stage.state for stage in db.store.stages(job.id)] == [
        StageState.DONE,
        StageState.PENDING,
        StageState.DONE,
        StageState.FAILED,
    ]
    db.store.retry("default", job.id, "me")
    lease = db.take()
    assert lease.stage == "activations"
    manifest = put(store, {"x": b"12345"}, KEY, "activations")
    db.store.finish(lease, Finished(key=KEY, content_digest=manifest.content_digest))
    assert db.take().stage == "report"
    assert later(stores, db).removed == ()


def test_a_key_that_is_being_computed_is_left_alone(db: Database, stores: Stores, store: ServiceStore) -> None:
    put(store, {"x": b"1"}, KEY, "activations")
    with store.open_work("sae", OTHER_KEY) as work, work.publish("state", scratch=True) as path:
        path.write_bytes(b"12")
    first, second = db.submit("activations"), db.submit("sae")
    assert db.store.claim_key(db.take(), KEY)
    assert db.store.claim_key(db.take(), OTHER_KEY)
    assert later(stores, db).removed == ()
    for job in (first, second):
        db.store.request_cancel("default", job.id, "me")
    for unit in [unit for job in (first, second) for unit in db.store.units(job.id)]:
        assert unit.state == "leased"


def test_what_only_deleted_jobs_used_goes(db: Database, stores: Stores, store: ServiceStore) -> None:
    made = {"pairs": (KEY, {"p": b"shared"}), "edits": (OTHER_KEY, {"y": b"own"})}
    job = run(db, store, made, JobState.SUCCEEDED)
    run(db, store, {"pairs": (KEY, {"p": b"shared"})}, JobState.SUCCEEDED)
    db.store.delete("default", job.id, "me")
    assert later(stores, db, 6).removed == ()
    assert [each.name for each in later(stores, db).of("artifact")] == [f"edits/{OTHER_KEY}"]
    assert store.has("pairs", KEY)
    assert not store.has("edits", OTHER_KEY)


def test_old_work_and_loose_blobs_go(db: Database, stores: Stores, store: ServiceStore) -> None:
    with store.open_work("latents", KEY) as work:
        with work.publish("a.bin") as path:
            path.write_bytes(b"payload")
        with work.publish("state", scratch=True) as path:
            path.write_bytes(b"scratch")
    stores.space.put(f"blobs/{'f' * 2}/{'f' * 64}", b"loose")
    young = later(stores, db, 0.9)
    assert young.removed == ()
    assert [(each.kind, each.name) for each in later(stores, db, 2).removed] == [("blob", "f" * 64)]
    with store.open_work("latents", KEY) as work:
        assert work.path("a.bin").read_bytes() == b"payload"
    found = later(stores, db)
    assert [each.name for each in found.of("work")] == [f"latents/{KEY}"]
    with store.open_work("latents", KEY) as work:
        assert not work.has("a.bin")
        assert not (work.scratch / "state").exists()
    assert [each.name for each in stores.space.listing("blobs/")] == []


def test_blobs_of_any_project_and_upload_are_kept(db: Database, stores: Stores, store: ServiceStore) -> None:
    run(db, store, {"activations": (KEY, {"x": b"shared"})}, JobState.SUCCEEDED)
    put(stores.project("other"), {"x": b"shared"}, KEY, "edits")
    uploaded(db, stores, {"data.jsonl": b"uploaded"})
    db.submit("edits")
    keep_other = later(stores, db)
    assert [(each.kind, each.project) for each in keep_other.of("artifact")] == [("artifact", "default"), ("artifact", "other")]
    assert {each.name for each in keep_other.of("blob")} == {digest_bytes(b"shared")}
    assert b"".join(stores.space.stream(f"blobs/{digest_bytes(b'uploaded')[:2]}/{digest_bytes(b'uploaded')}")) == b"uploaded"


def test_artifacts_that_another_hand_removed_are_forgotten(db: Database, stores: Stores, store: ServiceStore) -> None:
    job = run(db, store, {"pairs": (KEY, {"p": b"1"}), "sae": (KEY, {"w": b"2"})}, JobState.FAILED)
    store.delete("pairs", KEY)
    later(stores, db, 0, dry_run=True)
    assert db.store.stages(job.id)[0].state is StageState.DONE
    later(stores, db, 0)
    assert [stage.state for stage in db.store.stages(job.id)] == [StageState.PENDING, StageState.DONE, StageState.FAILED]
    assert db.store.usage("default").bytes == 1


def uploaded(db: Database, stores: Stores, files: dict[str, bytes], kind: str = "dataset", complete: bool = True) -> str:
    """Upload files; the upload's digest, or its id while it is not complete."""
    rows, space = UploadStore(db.engine, db.settings), UploadFiles(stores, "default")
    listed = [UploadFile(path, digest_bytes(data), len(data)) for path, data in files.items()]
    upload = rows.create("default", kind, listed, "me")
    for index, data in enumerate(files.values()):
        space.put_part(upload.id, index, 0, [data], PartReceipt(len(data), digest_bytes(data)))
    if not complete:
        return upload.id
    digest = space.complete(upload.id, listed)
    rows.complete("default", upload.id, "me")
    assert digest == upload.digest
    return digest


def test_uploads_that_were_not_completed_in_time_go(db: Database, stores: Stores) -> None:
    late, early = (uploaded(db, stores, {name: b"1234"}, complete=False) for name in ("a", "b"))
    digest = uploaded(db, stores, {"c": b"kept"})
    db.change(upload_rows, upload_rows.c.id == late, expires=utc_after(-1.0))
    found = later(stores, db, 0)
    assert [(each.kind, each.name, each.size) for each in found.removed] == [("upload", late, 4)]
    files = UploadFiles(stores, "default")
    assert files.parts(late) == ()
    assert len(files.parts(early)) == 1
    assert files.has(digest)
    rows = UploadStore(db.engine, db.settings)
    assert rows.get("default", early).state is UploadState.OPEN
    assert later(stores, db, 2).removed == ()


def test_uploads_that_were_removed_go_with_their_bytes(db: Database, stores: Stores) -> None:
    digest = uploaded(db, stores, {"c": b"data"})
    rows = UploadStore(db.engine, db.settings)
    found = rows.find("default", digest)
    assert found is not None
    rows.remove("default", found.id, "me")
    assert later(stores, db, 0).removed == ()
    assert [each.kind for each in later(stores, db, 2).removed] == ["upload", "blob"]
    assert not UploadFiles(stores, "default").has(digest)


def test_what_killed_writers_left_goes_after_a_day(world: World, db: Database, stores: Stores) -> None:
    spool = world.folder / "one" / "cache" / "spool"
    spool.mkdir(parents=True)
    (spool / "tmp1").write_bytes(b"123")
    stores.space.put("staged/default/pairs/x.json", b"{}")
    if stores.s3 is None:
        (world.folder / "store" / "blobs").mkdir(parents=True)
        (world.folder / "store" / "blobs" / ".half").write_bytes(b"1")
    assert later(stores, db, 0.5).of("unfinished") == ()
    assert {each.name for each in later(stores, db, 2).of("unfinished")} >= {"staged/default/pairs/x.json", "tmp1"}
    assert later(stores, db, 2).of("unfinished") == ()
    assert list(spool.iterdir()) == []


def arrow(**columns: list[Any]) -> bytes:
    sink = io.BytesIO()
    table = pa.table(columns)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def pipeline(db: Database, store: ServiceStore, ids: list[str], key: str, dataset: str = "hub", **given: Any) -> JobRecord:
    """A job whose artifacts consume one another, over these pairs."""
    spec = {"dataset": {"source": {"path": dataset}}}
    stages = ("pairs", "activations", "edits", "report")
    job = db.submit(*stages, spec=spec, **given)
    manifest: Manifest | None = None
    files = {
        "pairs": {"pairs.arrow": arrow(pair_id=ids)},
        "activations": {"shard-00000.safetensors": key.encode()},
        "edits": {"edits.jsonl": "".join(json.dumps({"pair_id": each}) + "\n" for each in ids).encode()},
        "report": {
            "report.html": f"<p>{key}".encode(),
            "report.json": json.dumps({"pairs": [{"pair_id": each} for each in ids]}).encode(),
        },
    }
    for stage in stages:
        lease = db.take()
        assert db.store.claim_key(lease, key)
        inputs = {"Before": manifest.content_digest} if manifest else {}
        manifest = put(store, files[stage], key, stage, draft(stage, inputs))
        db.store.finish(lease, Finished(key=key, content_digest=manifest.content_digest, bytes=1))
    return job


def test_a_purge_finds_what_contains_the_pairs_and_what_came_of_it(db: Database, stores: Stores, store: ServiceStore) -> None:
    digest = uploaded(db, stores, {"data.jsonl": b'{"id": "r1", "chosen": "a"}\n{"id": "r2"}\n'})
    other_digest = uploaded(db, stores, {"data.jsonl": b'{"id": "r9"}\n'})
    mine = pipeline(db, store, ["r1", "r2"], KEY, f"upload:{digest}")
    other = pipeline(db, store, ["r9", "r10"], OTHER_KEY, f"upload:{other_digest}")
    ReviewStore(db.engine).decide("default", mine.id, "r1", "drop", "me")
    ReviewStore(db.engine).decide("default", mine.id, "r2", "keep", "me")
    told = purge(stores, db.engine, "default", ["r1"], dry_run=True)
    assert store.has("pairs", KEY)
    done = purge(stores, db.engine, "default", ["r1"])
    artifacts = [each.name for each in done.removed if each.kind == "artifact"]
    assert artifacts == [f"{stage}/{KEY}" for stage in ("activations", "edits", "pairs", "report")]
    assert [each.name for each in told.removed if each.kind == "artifact"] == artifacts
    assert [each.name for each in done.removed if each.kind == "upload"] == [digest]
    assert [(job.id, job.live) for job in done.jobs] == [(mine.id, False)]
    assert done.decisions == 1
    files = UploadFiles(stores, "default")
    assert (files.has(digest), files.has(other_digest)) == (False, True)
    for stage in ("pairs", "activations", "edits", "report"):
        assert not store.has(stage, KEY)
        assert store.has(stage, OTHER_KEY)
    left = b"".join(b"".join(stores.space.stream(found.name)) for found in stores.space.listing("blobs/"))
    assert b'r1"' not in left
    assert b"r9" in left
    assert [event.kind for event in db.store.events(mine.id)][-1] == "purged"
    assert [each for each in db.store.events(other.id) if each.kind == "purged"] == []
    assert purge(stores, db.engine, "default", ["r1"]).removed == ()


def test_a_purge_takes_parts_of_a_row_and_nothing_of_a_like_name(db: Database, stores: Stores, store: ServiceStore) -> None:
    pipeline(db, store, ["r1#1", "r1#2"], KEY)
    pipeline(db, store, ["r11", "r1x", "1"], OTHER_KEY)
    purge(stores, db.engine, "default", ["r1"])
    assert not store.has("report", KEY)
    assert store.has("report", OTHER_KEY)


def test_a_purge_waits_for_jobs_that_have_not_ended(db: Database, stores: Stores, store: ServiceStore) -> None:
    made = {"pairs": (KEY, {"pairs.arrow": arrow(pair_id=["r1"])})}
    job = run(db, store, made, JobState.RUNNING)
    assert [each.live for each in purge(stores, db.engine, "default", ["r1"], dry_run=True).jobs] == [True]
    with pytest.raises(Conflict, match=job.id):
        purge(stores, db.engine, "default", ["r1"])
    assert store.has("pairs", KEY)
    db.store.request_cancel("default", job.id, "me")
    purge(stores, db.engine, "default", ["r1"])
    assert not store.has("pairs", KEY)
    assert [stage.state for stage in db.store.stages(job.id)] == [StageState.PENDING, StageState.CANCELLED]


def test_a_purge_names_a_job_that_only_waits_on_the_upload(db: Database, stores: Stores) -> None:
    digest = uploaded(db, stores, {"data.jsonl": b'{"pair_id": "r1"}\n'})
    job = db.submit("pairs", spec={"dataset": {"source": {"path": f"upload:{digest}"}}})
    with pytest.raises(Conflict, match=job.id):
        purge(stores, db.engine, "default", ["r1"])


def test_a_purge_removes_work_and_models_trained_on_the_pairs(db: Database, stores: Stores, store: ServiceStore) -> None:
    digest = uploaded(db, stores, {"train.csv": b"id,chosen\nr1,a\n"})
    spec = {"dataset": {"source": {"path": f"upload:{digest}"}}}
    run(db, store, {"training": (KEY, {"model.safetensors": b"weights"})}, JobState.SUCCEEDED, spec=spec)
    run(db, store, {"training": (OTHER_KEY, {"model.safetensors": b"others"})}, JobState.SUCCEEDED)
    with store.open_work("labels", THIRD_KEY) as work, work.publish("answer", scratch=True) as path:
        path.write_bytes(b"about r1")
    done = purge(stores, db.engine, "default", ["r1"])
    assert {(each.kind, each.name) for each in done.removed} >= {("artifact", f"training/{KEY}"), ("work", f"labels/{THIRD_KEY}")}
    assert not store.has("training", KEY)
    assert store.has("training", OTHER_KEY)


def test_a_purge_empties_this_machines_caches(world: World, db: Database, stores: Stores, store: ServiceStore) -> None:
    pipeline(db, store, ["r1"], KEY)
    store.read("edits", KEY).path("edits.jsonl")
    store.close()
    purge(stores, db.engine, "default", ["r1"])
    cache = world.folder / "one" / "cache" / "blobs"
    assert [path for path in cache.glob("[!.]*") if b"r1" in path.read_bytes()] == []


def test_a_purge_that_cannot_look_into_something_removes_nothing(db: Database, stores: Stores, store: ServiceStore) -> None:
    pipeline(db, store, ["r1"], KEY)
    digest = uploaded(db, stores, {"data.jsonl": b"{half"})
    with pytest.raises(ArtifactError, match=digest[:12]):
        purge(stores, db.engine, "default", ["r1"])
    assert store.has("pairs", KEY)


@pytest.mark.parametrize("ids", [[], [""]])
def test_a_purge_wants_ids(db: Database, stores: Stores, ids: list[str]) -> None:
    with pytest.raises(SpecError):
        purge(stores, db.engine, "default", ids)


def test_gc_leaves_young_things_of_the_present(db: Database, stores: Stores, store: ServiceStore) -> None:
    run(db, store, {"activations": (KEY, {"x": b"1"})}, JobState.SUCCEEDED)
    assert gc(stores, db.engine).removed == ()
    if stores.s3 is None:
        old = time.time() - 30 * DAY
        for found in stores.space.listing("manifests/"):
            os.utime(db.settings.folder.parent / "store" / found.name, (old, old))
        assert [each.kind for each in gc(stores, db.engine).removed] == ["artifact", "blob"]
