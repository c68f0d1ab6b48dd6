"""Garbage collection: what is too old, or used by nothing any more, is removed; what a job that has not ended uses never is.

============================================  ================================================================
activations                                   `retention_days` after they were committed
work areas                                    `retention_days` after they last changed
other artifacts                               kept for as long as a job that was not deleted refers to them
artifacts that were set aside as damaged      `retention_days` after that
blobs that no manifest, area or upload names  with what named them; where that failed, a day after they were written
uploads                                       incomplete: `upload_days`; complete: until they are removed
============================================  ================================================================
"""

from __future__ import annotations

import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safer_engine.errors import ArtifactError
from service.errors import NotFound
from service.infra.damaged import damaged_records
from service.infra.local_service_store import store_folder
from service.infra.object_space import ObjectFacts
from service.infra.removal import Removed, pointed, remove_blobs
from service.infra.retention_records import ACTOR, Place, RetentionRecords
from service.infra.stores import ServiceStore, Stores
from service.infra.upload_files import UploadFiles
from service.jobs.uploads import UploadState, UploadStore

if TYPE_CHECKING:
    from sqlalchemy import Engine

BULKY = frozenset(("activations",))
"""Stages whose artifacts are large and can be computed again."""
_DAY = 86400.0
_MANY = 10_000


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


def gc(
    stores: Stores,
    engine: Engine,
    dry_run: bool = False,
    now: float | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Collected:
    """Collect once, over all projects.

    Args:
        dry_run: only say what would be removed.
        now: seconds since the epoch, to collect as of then; by default each thing's age is by the clock that dated it.
        stopping: asked after each thing; where it says so, the rest is left to another run.

    Raises:
        Unavailable: database or store cannot be reached; what was removed stays removed, and another run goes on.
    """
    collection = _Collection(stores, engine, dry_run, now)
    found: list[Removed] = []
    for each in collection.all():
        found.append(each)
        if stopping():
            return Collected(tuple(found), dry_run)
    found += collection.blobs(frozenset((each.project, each.name) for each in found if each.kind == "artifact"))
    return Collected(tuple(found), dry_run)


class _Collection:
    def __init__(self, stores: Stores, engine: Engine, dry_run: bool, now: float | None) -> None:
        self._stores = stores
        self._engine = engine
        self._records = RetentionRecords(engine)
        self._dry = dry_run
        of_store = stores.space.now() if now is None else now
        self._long_ago = of_store - stores.settings.retention_days * _DAY
        self._yesterday = of_store - _DAY
        self._yesterday_here = (time.time() if now is None else now) - _DAY
        self._nameless: set[str] = set()

    def all(self) -> Iterator[Removed]:
        """Everything but blobs."""
        yield from self.uploads()
        for project in self._stores.projects():
            yield from self.of_project(project)
        yield from self.unfinished()

    def of_project(self, project: str) -> Iterator[Removed]:
        """Artifacts, work areas and stray bytes of one project."""
        used = self._records.in_use(project)
        yield from self._artifacts(project, used)
        yield from self._damaged(project)
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
        for path, before in self._unfinished_files():
            with suppress(FileNotFoundError):
                facts = path.stat()
                if stat.S_ISREG(facts.st_mode) and facts.st_mtime < before:
                    yield Removed("unfinished", "", path.name, "its writer was killed", facts.st_size)
                    if not self._dry:
                        path.unlink()

    def _unfinished_files(self) -> Iterator[tuple[Path, float]]:
        """Temporary files, each with the time before which it is old.

        On this machine, those of parts that came in; where the store is a folder, in it those of whatever was being written.
        """
        for path in (self._stores.settings.folder / "cache" / "spool").rglob("*"):
            yield path, self._yesterday_here
        if self._stores.s3 is None:
            for kind in ("blobs", "manifests", "uploads", "incoming"):
                for path in (store_folder(self._stores.settings) / kind).rglob(".*"):
                    yield path, self._yesterday

    def blobs(self, gone: frozenset[tuple[str, str]]) -> list[Removed]:
        """Blobs that nothing names. `gone`: project and place of artifacts that count as removed (on a dry run)."""
        return remove_blobs(self._stores, self._yesterday, frozenset(self._nameless), self._dry, gone)

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
            files = self._files(store, place)
            if self._dry or self._remove(project, place):
                self._nameless |= files
                yield Removed("artifact", project, f"{each.stage}/{each.key}", reason)

    def _files(self, store: ServiceStore, place: Place) -> frozenset[str]:
        """Digests of an artifact's files; of one that is damaged, none."""
        try:
            return frozenset(entry.digest for entry in store.manifest(*place).files.values())
        except ArtifactError:
            return frozenset()

    def _damaged(self, project: str) -> Iterator[Removed]:
        reason = f"set aside as damaged more than {self._stores.settings.retention_days:g} days ago"
        for each in damaged_records(self._stores, project):
            if each.changed < self._long_ago:
                yield Removed("damaged", project, f"{each.place[0]}/{each.place[1]}", reason)
                if not self._dry:
                    self._stores.space.delete([each.name])

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
            files = frozenset(pointed(self._stores, project, f"{area.stage}-{area.key}"))
            if self._dry or store.remove_work(*place):
                self._nameless |= files
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
                self._nameless.update(file.digest for file in files.files(found.name))
                yield Removed("upload", project, found.name, "it was removed")
                if not self._dry:
                    files.remove(found.name)
