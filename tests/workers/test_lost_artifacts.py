"""A real worker whose job misses what an earlier stage made: it is computed anew, and the job goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.infra.local_service_store import store_folder
from service.jobs.model import JobRecord, JobState, StageRecord, StageState
from tests.helpers.servers import Redis, wait_until
from tests.helpers.workplace import Workplace, audit_of, material

STOPPED_AT = "latents"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, redis: Redis) -> Iterator[Workplace]:
    redis.flush()
    made = Workplace(tmp_path_factory.mktemp("lost"), broker_url=redis.url, max_failures=2)
    yield made
    made.close()


def rows(place: Workplace, job: JobRecord) -> dict[str, StageRecord]:
    return {row.name: row for row in place.jobs.stages(job.id)}


def blob_of(place: Workplace, stage: StageRecord, name: str) -> Path:
    assert stage.key is not None
    digest = place.store.manifest(stage.name, stage.key).files[name].digest
    return store_folder(place.settings) / "blobs" / digest[:2] / digest


def damaged(path: Path) -> None:
    """Change bytes of a file, and not its size."""
    path.write_bytes(bytes(byte ^ 255 for byte in path.read_bytes()))


def test_what_is_gone_and_what_is_damaged_is_computed_anew(place: Workplace) -> None:
    job = place.submit(audit_of(place, material(place.folder / "material")))
    worker = place.worker()
    with place.dispatching():
        wait_until(lambda: rows(place, job)[STOPPED_AT].state is not StageState.PENDING, place.log(), 120)
        place.jobs.request_cancel("default", job.id, "me")
        place.wait(job)
        before = rows(place, job)
        pairs, activations = before["pairs"], before["activations"]
        assert pairs.key is not None
        damaged(blob_of(place, pairs, "pairs.arrow"))
        for file in place.store.manifest("activations", activations.key or "").files:
            blob_of(place, activations, file).unlink()
        place.jobs.retry("default", job.id, "me")
        ended = place.wait(job)
    assert ended.state is JobState.SUCCEEDED, (ended.error, place.log())
    after = rows(place, job)
    assert {name: after[name].content_digest for name in ("pairs", "activations")} == {
        name: before[name].content_digest for name in ("pairs", "activations")
    }
    lost = {event.data["lost"] for event in place.jobs.events(job.id) if event.data.get("lost")}
    assert lost == {"pairs", "activations"}
    assert [found.name.split("/")[2] for found in place.stores.space.listing("damaged/default/")].count("pairs") == 1
    assert worker.poll() is None
