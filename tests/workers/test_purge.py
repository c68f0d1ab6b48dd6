"""After a purge, nothing of the pair is in the store, on this machine or in the database, whatever jobs and accidents left."""

from __future__ import annotations

import gzip
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import select

from safer_engine import demo_data
from safer_engine.store import digest_bytes
from safer_engine.train_spec import TrainSpec
from service.http.edits import export_decisions
from service.http.services import open_services
from service.infra.purge import Purged, purge
from service.infra.retention import gc
from service.infra.stores import Stores
from service.infra.upload_files import PartReceipt, UploadFiles
from service.jobs.access import Principal, Role
from service.jobs.database import reading
from service.jobs.model import JobKind, JobRecord, JobState, StageState
from service.jobs.reviews import ReviewStore
from service.jobs.tables import METADATA
from service.jobs.uploads import UploadStore
from service.upload_names import UploadFile
from tests.helpers.servers import Redis, wait_until
from tests.helpers.store_world import fresh_prefix
from tests.helpers.workplace import PROJECT, SMALL, Workplace, audit_of, material

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
CANARY = "Quetzalcanary9431"
PERSON = "person-1"
DAY = 86400.0


@pytest.fixture(params=["folder", "s3_moto"])
def place(request: pytest.FixtureRequest, tmp_path: Path, redis: Redis) -> Iterator[Workplace]:
    redis.flush()
    given = {} if request.param == "folder" else request.getfixturevalue("s3_moto").settings(fresh_prefix())
    made = Workplace(tmp_path, broker_url=redis.url, **given)
    yield made
    made.close()


def upload(place: Workplace, name: str, data: bytes, complete: bool = True) -> str:
    """A dataset as a client uploads it; its name in specs."""
    rows, files = UploadStore(place.engine, place.settings), UploadFiles(place.stores, PROJECT)
    listed = [UploadFile(name, digest_bytes(data), len(data))]
    made = rows.create(PROJECT, "dataset", listed, "me")
    files.put_part(made.id, 0, 0, [data], PartReceipt(len(data), digest_bytes(data)))
    if not complete:
        return made.id
    rows.complete(PROJECT, made.id, "me") if files.complete(made.id, listed) else None
    return f"upload:{made.digest}"


def with_person(path: Path) -> bytes:
    """A dataset with one pair more."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    theirs = json.loads(json.dumps(rows[0]).replace(rows[0]["chosen"][0]["content"][:10], f"{CANARY} "))
    theirs = {**rows[0], "id": PERSON, "chosen": spoken(theirs["chosen"]), "rejected": spoken(theirs["rejected"])}
    return "".join(f"{json.dumps(row)}\n" for row in [*rows, theirs]).encode()


def spoken(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**turn, "content": f"{CANARY} {turn['content']} {CANARY}"} for turn in turns]


def objects(stores: Stores, home: Path) -> Iterator[tuple[str, bytes]]:
    """Every object of the store and every file of this machine; the database is read by its rows."""
    for found in stores.space.listing(""):
        yield found.name, b"".join(stores.space.stream(found.name))
    for path in home.rglob("*"):
        if path.is_file() and not path.name.startswith("service.db"):
            yield str(path), path.read_bytes()


def readable(data: bytes) -> bytes:
    """The bytes, and what a packed table says."""
    if data.startswith(b"PAR1"):
        return data + json.dumps(pq.read_table(io.BytesIO(data)).to_pylist(), default=str).encode()
    if data.startswith(b"ARROW1"):
        return data + json.dumps(pa.ipc.open_file(io.BytesIO(data)).read_all().to_pylist(), default=str).encode()
    return data + gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data


def holding(place: Workplace) -> list[str]:
    """What has text of the person, or their pair's id where text is kept."""
    found = [name for name, data in objects(place.stores, place.settings.folder) if CANARY.encode() in readable(data)]
    with reading(place.engine) as connection:
        for table in METADATA.sorted_tables:
            found += [table.name for row in connection.execute(select(table)) if CANARY in str(tuple(row))]
    return found


def training(place: Workplace, dataset: str) -> dict[str, Any]:
    texts = [row["chosen"][0]["content"] for row in demo_data.generate(seed=1, n_groups=20).rows]
    base = place.upload(demo_data.build_base(place.folder / "base", texts, width=16, blocks=2))
    document = {
        "base": base,
        "dataset": {"source": {"kind": "local", "path": dataset}},
        "recipe": {"epochs": 1, "batch": 16, "lr": 3e-3, "max_length": 64},
    }
    return TrainSpec.model_validate(document).model_dump(mode="json")


def stage_of(place: Workplace, job: JobRecord, name: str) -> Any:
    return next(row for row in place.jobs.stages(job.id) if row.name == name)


def reviewed(place: Workplace, job: JobRecord) -> None:
    """A decision about the pair with a note that quotes it, exported."""
    ReviewStore(place.engine).decide(PROJECT, job.id, PERSON, "drop", "reviewer", f"says {CANARY}")
    services = open_services(place.settings)
    export_decisions(services, Principal(PROJECT, "k", "reviewer", frozenset((Role.ADMIN,))), place.jobs.job(job.id))
    services.close()


def lived_in(place: Workplace) -> tuple[dict[str, JobRecord], str]:
    """Jobs that ended in every way on the person's data, one on other data, and what accidents left; and an open upload."""
    files = material(place.folder / "material")
    spec = audit_of(place, files)
    theirs = with_person(files["dataset"])
    dataset = upload(place, "preferences.jsonl", theirs)
    other = {
        **spec,
        "dataset": {"source": {"kind": "local", "path": upload(place, "others.jsonl", files["dataset"].read_bytes())}},
    }
    spec["dataset"] = {"source": {"kind": "local", "path": dataset}}
    place.worker()
    with place.dispatching():
        done = place.submit(spec)
        failed = place.submit({**spec, "seed": 5}, gpu_seconds_budget=0.001)
        spared = place.submit(other, gpu_seconds_budget=0.001)
        trained = place.submit(training(place, dataset), JobKind.TRAIN_RM)
        sae = {**SMALL["sae"], "max_steps": 100_000, "min_steps": 100_000}
        cancelled = place.submit({**spec, "seed": 7, "sae": sae})
        wait_until(lambda: stage_of(place, cancelled, "sae").started is not None, place.log(), 300)
        time.sleep(1.0)
        place.jobs.request_cancel(PROJECT, cancelled.id, "me")
        jobs = {"done": done, "failed": failed, "spared": spared, "trained": trained, "cancelled": cancelled}
        jobs = {name: place.wait(job, 300) for name, job in jobs.items()}
    reviewed(place, jobs["done"])
    return jobs, upload(place, "open.jsonl", theirs + b"\n", complete=False)


def accidents(place: Workplace, done: JobRecord) -> None:
    """One artifact collected, one damaged, one whose removal was cut short, and a work area that nobody goes on with."""
    found = gc(place.stores, place.engine, now=time.time() + 8 * DAY)
    assert {each.name.partition("/")[0] for each in found.of("artifact")} == {"activations"}
    report = stage_of(place, done, "report").key
    digest = place.store.manifest("report", report).files["report.md"].digest
    place.stores.space.delete([f"blobs/{digest[:2]}/{digest}"])
    place.stores.drop_cached([digest])
    assert place.store.set_aside("report", report)
    if place.stores.s3 is None:  # in a bucket, the files of such a one are left for an hour
        place.store.delete("latents", stage_of(place, done, "latents").key)
    with place.store.open_work("labels", "e" * 64) as work:
        for scratch in (True, False):
            with work.publish("answer", scratch=scratch) as path:
                path.write_text(CANARY)


def test_nothing_of_a_pair_is_left(place: Workplace) -> None:
    jobs, open_upload = lived_in(place)
    states = {name: job.state for name, job in jobs.items()}
    assert states == {
        "done": JobState.SUCCEEDED,
        "failed": JobState.FAILED,
        "spared": JobState.FAILED,
        "trained": JobState.SUCCEEDED,
        "cancelled": JobState.CANCELLED,
    }, place.log()
    assert stage_of(place, jobs["cancelled"], "sae").state is StageState.CANCELLED
    accidents(place, jobs["done"])
    before = holding(place)
    for kind in ("blobs/", "decisions"):
        assert any(name.startswith(kind) for name in before)
    assert any(f"incoming/{PROJECT}/{open_upload}" in name for name in before)
    told = purge(place.stores, place.engine, PROJECT, [PERSON], dry_run=True)
    assert holding(place) == before
    done = purge(place.stores, place.engine, PROJECT, [PERSON])
    assert holding(place) == []
    assert said(told) == said(done)
    assert {job.id for job in done.jobs} == {job.id for name, job in jobs.items() if name != "spared"}
    left = {each.stage for each in place.store.committed()}
    assert left == {"pairs", "log"}
    assert place.store.has("pairs", stage_of(place, jobs["spared"], "pairs").key)
    assert not place.store.has("training", stage_of(place, jobs["trained"], "training").key)


def said(purged: Purged) -> set[tuple[str, str]]:
    return {(each.kind, each.name) for each in purged.removed if each.kind != "blob"}
