"""The files of a job, found through its stages' manifests."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import Request
from fastapi.responses import Response

from safer_engine.errors import ArtifactError
from safer_engine.store import Manifest
from service.artifact_names import StoredFile, files_of, stage_of
from service.errors import Gone, NotFound
from service.http.services import Services
from service.http.streaming import file_response
from service.infra.retention import BULKY
from service.infra.stores import ServiceStore
from service.jobs.model import JobRecord

AGAIN = "submit the job anew (`safer-audit submit`): what is still there is used, what is gone is computed again"


def job_files(services: Services, job: JobRecord) -> dict[str, StoredFile]:
    """What a job has made so far, by client name. Artifacts that retention removed are left out."""
    return files_of(job.kind, _manifests(services, job))


def job_file(services: Services, job: JobRecord, name: str) -> StoredFile:
    """One file. Raises NotFound, and Gone for one that was made and removed since."""
    found = job_files(services, job).get(name)
    if found is None:
        _refuse_removed(services, job, name)
        raise NotFound(f"the job has no file {name[:100]!r}", "it may not be made yet; GET …/artifacts lists what there is")
    return found


def _refuse_removed(services: Services, job: JobRecord, name: str) -> None:
    """Raises Gone where a stage of the job made the file, and its artifact is no longer there."""
    maker = stage_of(job.kind, name)
    done = [stage for stage in services.jobs.stages(job.id) if stage.name == maker and stage.content_digest and stage.key]
    if not done or done[0].outcome == "absent" or services.store(job.project).has(done[0].name, str(done[0].key)):
        return
    purge = services.jobs.last_event(job.id, "purged")
    if purge is not None:
        how = f"a purge of someone's data on {purge.at:%Y-%m-%d}"
    elif maker in BULKY:
        how = f"retention, {services.settings.retention_days:g} days after it was made"
    else:
        how = "garbage collection, or the operator"
    raise Gone(f"{name} of job {job.id} was removed by {how}", AGAIN)


def read_file(services: Services, job: JobRecord, file: StoredFile) -> bytes:
    """A small file's content. Raises ArtifactError."""
    return b"".join(services.store(job.project).open_range(file.stage, file.key, file.file))


def send_file(services: Services, request: Request, job: JobRecord, file: StoredFile, headers: dict[str, str]) -> Response:
    """A file, or the range of it that is asked for."""
    store = services.store(job.project)

    def open_range(start: int, stop: int) -> Iterator[bytes]:
        return store.open_range(file.stage, file.key, file.file, start, stop)

    return file_response(request, file, open_range, headers)


def _manifests(services: Services, job: JobRecord) -> Iterator[Manifest]:
    store = services.store(job.project)
    places = [(stage.name, stage.key) for stage in services.jobs.stages(job.id) if stage.content_digest and stage.key]
    places += [(reference.stage, reference.key) for reference in services.attachments.attached(job.id)]
    for stage, key in places:
        if (found := _manifest(store, stage, key)) is not None:
            yield found


def _manifest(store: ServiceStore, stage: str, key: str) -> Manifest | None:
    try:
        return store.manifest(stage, key)
    except ArtifactError:
        return None
