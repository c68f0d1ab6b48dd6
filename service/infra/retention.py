"""Garbage collection: what is too old, or used by nothing any more, is removed; what a job that has not ended uses never is.

============================================  ================================================================
activations                                   `retention_days` after they were committed
work areas                                    `retention_days` after they last changed
other artifacts                               kept for as long as a job that was not deleted refers to them
blobs that no manifest, area or upload names  a day after they were written
uploads                                       incomplete: `upload_days`; complete: until they are removed
============================================  ================================================================
"""

from __future__ import annotations

import fcntl
import json
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safer_engine.errors import ArtifactError
from safer_engine.publishing import require_writable
from service.errors import NotFound
from service.infra.local_service_store import store_folder
from service.infra.object_space import ObjectFacts, ObjectMissing
from service.infra.retention_records import ACTOR, Place, RetentionRecords
from service.infra.stores import Stores
from service.infra.upload_files import UploadFiles
from service.jobs.uploads import UploadState, UploadStore

if TYPE_CHECKING:
    from sqlalchemy import Engine

BULKY = frozenset(("activations",))
"""Stages whose artifacts are large and can be computed again."""
_DAY = 86400.0
_MANY = 10_000


@dataclass(frozen=True)
class Removed:
    """One thing that was removed, or would be.

    Attributes:
        kind: `artifact`, `work`, `upload`, `blob` or `unfinished`.
        name: stage and key, id of the upload, or name of the object.
        size: bytes; of an artifact 0, since its blobs are counted by themselves.
    """

    kind: str
    project: str
    name: str
    reason: str
    size: int = 0


@dataclass(frozen=True)
class Collected:
    """What one collection removed, or, on a dry run, would remove."""

    removed: tuple[Removed, ...]
    dry_run: bool

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(each.size for each in self.removed)

    def of(self, kind: str) -> tuple[Removed, ...]:
        """What was removed of one kind."""
        return tuple(each for each in self.removed if each.kind == kind)


def gc(stores: Stores, engine: Engine, dry_run: bool = False, now: float | None = None) -> Collected:
    """Collect once, over all projects.

    Args:
        dry_run: only say what would be removed.
        now: seconds since the epoch, to collect as of then.

    Raises:
        Unavailable: database or store cannot be reached; what was removed stays removed, and another run goes on.
    """
    collection = _Collection(stores, engine, dry_run, time.time() if now is None else now)
    found = list(collection.uploads())
    found += [each for project in stores.projects() for each in collection.of_project(project)]
    found += collection.unfinished()
    found += collection.blobs(frozenset((each.project, each.name) for each in found if each.kind == "artifact"))
    return Collected(tuple(found), dry_run)


class _Collection:
    def __init__(self, stores: Stores, engine: Engine, dry_run: bool, now: float) -> None:
        self._stores = stores
        self._engine = engine
        self._records = RetentionRecords(engine)
        self._dry = dry_run
        self._long_ago = now - stores.settings.retention_days * _DAY
        self._yesterday = now - _DAY

    def of_project(self, project: str) -> Iterator[Removed]:
        """Artifacts, work areas and stray bytes of one project."""
        used = self._records.in_use(project)
        yield from self._artifacts(project, used)
        yield from self._work_areas(project, used)
        yield from self._strays(project, UploadFiles(self._stores, project))

    def unfinished(self) -> Iterator[Removed]:
        """What writers that were killed left in the bucket or in this machine's spool."""
        space = self._stores.space
        for prefix in ("staged/", "probe/"):
            for found in list(space.listing(prefix)):
                if found.changed < self._yesterday:
                    yield Removed("unfinished", "", found.name, "its writer was killed", found.size)
                    if not self._dry:
                        space.delete([found.name])
        if self._stores.s3 is not None and not self._dry:
            count = self._stores.s3.abort_uploads(self._yesterday)
            yield from (Removed("unfinished", "", "multipart upload", "its writer was killed") for _ in range(count))
        for path in self._unfinished_files():
            with suppress(FileNotFoundError):
                facts = path.stat()
                if stat.S_ISREG(facts.st_mode) and facts.st_mtime < self._yesterday:
                    yield Removed("unfinished", "", path.name, "its writer was killed", facts.st_size)
                    if not self._dry:
                        path.unlink()

    def _unfinished_files(self) -> Iterator[Path]:
        """Temporary files on this machine: of parts that came in, and, in a folder, of whatever was being written."""
        yield from (self._stores.settings.folder / "cache" / "spool").rglob("*")
        if self._stores.s3 is None:
            for kind in ("blobs", "manifests", "uploads", "incoming"):
                yield from (store_folder(self._stores.settings) / kind).rglob(".*")

    def blobs(self, gone: frozenset[tuple[str, str]]) -> list[Removed]:
        """Blobs that nothing names. `gone`: project and place of artifacts that count as removed (on a dry run)."""
        return remove_blobs(self._stores, self._yesterday, self._dry, gone)

    def _artifacts(self, project: str, used: frozenset[Place]) -> Iterator[Removed]:
        store = self._stores.project(project)
        referred = self._records.referred(project)
        committed = list(store.committed())
        if not self._dry:
            self._forget(project, referred - used - {(each.stage, each.key) for each in committed})
        for each in committed:
            place = (each.stage, each.key)
            if place in used or each.changed >= self._long_ago:
                continue
            if each.stage in BULKY:
                reason = f"older than {self._stores.settings.retention_days:g} days"
            elif place not in referred:
                reason = "no job refers to it"
            else:
                continue
            if self._dry or self._remove(project, place):
                yield Removed("artifact", project, f"{each.stage}/{each.key}", reason)

    def _forget(self, project: str, places: frozenset[Place]) -> None:
        """Tell the database of artifacts that are gone: their removal was cut short, or another hand did it."""
        store = self._stores.project(project)
        for place in places:
            if not store.has(*place):
                with self._records.removing(project, place):
                    pass

    def _remove(self, project: str, place: Place) -> bool:
        with self._records.removing(project, place) as free:
            if free:
                self._stores.project(project).delete(*place)
        return free

    def _work_areas(self, project: str, used: frozenset[Place]) -> Iterator[Removed]:
        store = self._stores.project(project)
        for area in list(store.work_areas()):
            place = (area.stage, area.key)
            if place in used or area.changed >= self._long_ago:
                continue
            if self._dry or store.remove_work(*place):
                yield Removed("work", project, f"{area.stage}/{area.key}", "not gone on with", area.size)

    def uploads(self) -> Iterator[Removed]:
        """Uploads that were not completed in time."""
        rows = UploadStore(self._engine, self._stores.settings)
        for upload in rows.expired(_MANY):
            files = UploadFiles(self._stores, upload.project)
            size = sum(part.size for part in files.parts(upload.id))
            yield Removed("upload", upload.project, upload.id, "not completed in time", size)
            if not self._dry:
                files.abort(upload.id)
                with suppress(NotFound):
                    rows.remove(upload.project, upload.id, ACTOR)

    def _strays(self, project: str, files: UploadFiles) -> Iterator[Removed]:
        """Bytes of uploads that the database does not know, or knows as removed."""
        open_ones = self._records.uploads(project, UploadState.OPEN)
        by_upload: dict[str, list[ObjectFacts]] = {}
        for found in self._stores.space.listing(f"incoming/{project}/"):
            by_upload.setdefault(found.name.split("/")[2], []).append(found)
        for upload, parts in by_upload.items():
            if upload not in open_ones and max(part.changed for part in parts) < self._yesterday:
                yield Removed("upload", project, upload, "it is not under way", sum(part.size for part in parts))
                if not self._dry:
                    files.abort(upload)
        complete = frozenset(self._records.uploads(project, UploadState.COMPLETE).values())
        for found in files.complete_uploads():
            if found.name not in complete and found.changed < self._yesterday:
                yield Removed("upload", project, found.name, "it was removed")
                if not self._dry:
                    files.remove(found.name)


def remove_blobs(
    stores: Stores,
    before: float,
    dry_run: bool,
    gone: frozenset[tuple[str, str]] = frozenset(),
    only: frozenset[str] | None = None,
) -> list[Removed]:
    """Remove blobs last written before a time that no manifest, work area or upload of any project names.

    Args:
        gone: project and `stage/key` of artifacts that are not to count.
        only: digests to look at; all by default.
    """
    with _no_commits(stores):
        old = [found for found in stores.space.listing("blobs/") if found.changed < before]
        if only is not None:
            old = [found for found in old if _digest_of(found) in only]
        named = _named(stores, gone) if old else frozenset()
        loose = [found for found in old if _digest_of(found) not in named]
        if not dry_run:
            # One that is written again meanwhile is young again.
            fresh = [stores.space.facts(found.name) for found in loose]
            stores.space.delete([found.name for found in fresh if found is not None and found.changed < before])
    return [Removed("blob", "", _digest_of(found), "nothing names it", found.size) for found in loose]


def _digest_of(found: ObjectFacts) -> str:
    return found.name.rpartition("/")[2]


def _named(stores: Stores, gone: frozenset[tuple[str, str]]) -> frozenset[str]:
    """Digests of every blob that an artifact, a work area or an upload names."""
    named: set[str] = set()
    for project in stores.projects():
        store = stores.project(project)
        if stores.s3 is not None:  # first: what a commit takes out of its work area is then in a manifest
            named.update(_pointed(stores, project))
        for each in store.committed():
            if (project, f"{each.stage}/{each.key}") not in gone:
                try:
                    named.update(entry.digest for entry in store.manifest(each.stage, each.key).files.values())
                except ArtifactError:
                    continue  # removed meanwhile, or damaged: then it names nothing that could be read
        uploads = UploadFiles(stores, project)
        named.update(file.digest for upload in uploads.complete_uploads() for file in uploads.files(upload.name))
    return frozenset(named)


def _pointed(stores: Stores, project: str) -> Iterator[str]:
    """Digests of blobs that work areas in a bucket point to."""
    for found in list(stores.space.listing(f"work/{project}/")):
        if "/payload/" in found.name:
            try:
                yield str(json.loads(stores.space.get(found.name))["digest"])
            except ObjectMissing:
                continue  # committed or withdrawn meanwhile


@contextmanager
def _no_commits(stores: Stores) -> Iterator[None]:
    """Keep commits into a folder away. In a bucket, the age of a blob does: publishing one makes it young."""
    if stores.s3 is not None:
        yield
        return
    locks = store_folder(stores.settings) / "locks"
    require_writable(locks, "the artifact store's folder")
    with (locks / "collecting").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
