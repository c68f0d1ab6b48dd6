"""Removing pairs for the person whose data they are: everything that contains them, and everything computed from that.

Artifacts are searched for the ids; what consumed one that contains them goes too, since activations, a dictionary or the
words of a label may hold what was in the text. What cannot be searched goes as well: work areas that no job uses, datasets
whose upload is not complete, artifacts that were set aside as damaged and what was computed from them, and every file of the
store that nothing names any more (in a bucket, those written within the last hour only where this purge took their name).
Uploaded datasets with the pairs go, models trained on them, and reviewers' decisions about the pairs.

Not reached, and to be emptied by the operator: caches on other machines (`SAFER_HOME/cache`), old versions of objects in a
bucket that keeps versions, backups, and datasets that lie elsewhere (hub, folders).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safer_engine.errors import ArtifactError, DamagedArtifact, SpecError
from safer_engine.store import Manifest
from service.errors import Conflict
from service.infra.damaged import DamagedRecord, damaged_records
from service.infra.local_service_store import store_folder
from service.infra.object_space import blob_name
from service.infra.pair_search import GIVEN, contains, searchable
from service.infra.removal import Removed, long_written, pointed, remove_blobs
from service.infra.retention_records import AffectedJob, Place, RetentionRecords
from service.infra.stores import Stores
from service.infra.upload_files import UploadFiles
from service.upload_names import UPLOAD

if TYPE_CHECKING:
    from sqlalchemy import Engine

_HOLDERS = {"pairs": "dataset", "evaluation": "evaluation"}
"""Stage whose artifact holds the pairs of an input → the input."""
_SPOOLED_SECONDS = 3600.0


@dataclass(frozen=True)
class Purged:
    """What a purge removed, or, on a dry run, would remove.

    Attributes:
        jobs: jobs whose results are affected; a failed one that is tried again computes what is missing.
        decisions: reviewers' decisions about the pairs.
    """

    removed: tuple[Removed, ...]
    jobs: tuple[AffectedJob, ...]
    decisions: int
    dry_run: bool


@dataclass(frozen=True)
class _Found:
    """What is to go.

    Attributes:
        reasons: artifacts, and why.
        uploads: complete datasets, by digest, and why; open_uploads: ids of those that are not complete.
    """

    reasons: dict[Place, str]
    uploads: dict[str, str]
    open_uploads: frozenset[str]
    jobs: tuple[AffectedJob, ...]


def purge(stores: Stores, engine: Engine, project: str, pair_ids: Iterable[str], dry_run: bool = False) -> Purged:
    """Remove all that one project keeps of some pairs.

    Args:
        pair_ids: as reports and edits name them; the id of a row stands for all pairs made from it.

    Raises:
        SpecError: no ids.
        Conflict: a job that has not ended uses the pairs (not on a dry run): it is named; nothing was removed. Or a process
            still works for a job that ended: the rest was removed.
        ArtifactError: something cannot be searched; nothing was removed.
        Unavailable: database or store cannot be reached; what was removed stays removed, and another run goes on.
    """
    wanted = {each for each in pair_ids if each}
    if not wanted:
        raise SpecError("no pair ids were given", "name at least one")
    purging = _Purge(stores, RetentionRecords(engine), project, dry_run)
    found = purging.search(wanted)
    live = [job.id for job in found.jobs if job.live]
    if live and not dry_run:
        raise Conflict(
            f"jobs that have not ended use the pairs: {', '.join(live)}", "cancel them, or wait for them, and purge again"
        )
    decisions = purging.records.count_decisions(project, wanted)
    removed = purging.remove(found)
    if not dry_run:
        purging.records.purged(project, wanted, {*found.uploads, *found.open_uploads}, found.jobs)
    if purging.held:
        raise Conflict(f"all is removed but what processes work on: {', '.join(purging.held)}", "stop them, and purge again")
    return Purged(tuple(removed), found.jobs, decisions, dry_run)


class _Purge:
    def __init__(self, stores: Stores, records: RetentionRecords, project: str, dry_run: bool) -> None:
        self.records = records
        self._stores = stores
        self._store = stores.project(project)
        self._uploads = UploadFiles(stores, project)
        self._project = project
        self._dry = dry_run
        self.held: list[str] = []

    def search(self, pair_ids: set[str]) -> _Found:
        """Everything that holds the pairs or comes from them."""
        manifests, holding = self._searched(pair_ids)
        reasons = dict.fromkeys(holding, "contains the pairs")
        suspects = self._unsearchable({each.content_digest for each in manifests.values()})
        _add_derived(manifests, reasons, suspects, self.records.contents_of_jobs(self._project))
        uploads = dict(self._datasets(pair_ids))
        words = self.records.uploads_of_specs(self._project, reasons)
        known = self.records.datasets(self._project) & {each.name for each in self._uploads.complete_uploads()}
        for digest in {word.removeprefix(UPLOAD) for word in words} & known:
            uploads.setdefault(digest, "used by a job on the pairs")
        inputs = self.records.inputs_of(self._project, {place: _HOLDERS[place[0]] for place in holding if place[0] in _HOLDERS})
        named = frozenset(f"{UPLOAD}{digest}" for digest in uploads)
        for place in self.records.trained_on(self._project, named, inputs):
            if place in manifests:
                reasons.setdefault(place, "trained on the pairs")
        jobs = self.records.jobs_of(self._project, reasons, named, inputs)
        return _Found(reasons, uploads, self.records.open_uploads(self._project, "dataset"), jobs)

    def remove(self, found: _Found) -> list[Removed]:
        """Remove it, with the blobs that nothing else names, and whatever may hold the pairs and cannot be searched."""
        nameless = {file.digest for each in found.uploads for file in self._uploads.files(each)}
        removed = []
        for place, reason in sorted(found.reasons.items()):
            nameless.update(entry.digest for entry in self._store.manifest(*place).files.values())
            if self._dry or self._remove_artifact(place):
                removed.append(Removed("artifact", self._project, "/".join(place), reason))
        removed += self._remove_damaged(nameless)
        removed += self._remove_work(nameless)
        removed += self._remove_uploads(found, nameless)
        if self._dry:
            return removed
        self._remove_unfinished()
        removed += remove_blobs(self._stores, long_written(self._stores), frozenset(nameless))
        self._stores.drop_cached(nameless | found.uploads.keys())
        return removed

    def _searched(self, pair_ids: set[str]) -> tuple[dict[Place, Manifest], set[Place]]:
        """Every sound artifact, and which of them contain the pairs; one that is found damaged is set aside."""
        manifests: dict[Place, Manifest] = {}
        holding: set[Place] = set()
        for each in list(self._store.committed()):
            place = (each.stage, each.key)
            try:
                manifest = self._store.manifest(*place)
                if self._holds(manifest, pair_ids):
                    holding.add(place)
                manifests[place] = manifest
            except DamagedArtifact as error:
                self._store.set_aside(*place)
                if self._store.has(*place):  # computed anew just now
                    raise ArtifactError(f"{error.message}, and was mended meanwhile", "purge again") from error
        return manifests, holding

    def _unsearchable(self, sound: set[str]) -> set[str]:
        """Content digests of artifacts that were set aside as damaged and may have held the pairs."""
        found: set[str] = set()
        for record in damaged_records(self._stores, self._project):
            if record.manifest is None:
                found |= self.records.content_digests(self._project, record.place)
            elif any(searchable(name) for name in record.manifest.files):
                found.add(record.manifest.content_digest)
        return found - sound

    def _remove_artifact(self, place: Place) -> bool:
        with self.records.removing(self._project, place) as free:
            if not free:
                raise Conflict(f"a job that began just now uses {place[0]}/{place[1][:12]}", "cancel it, and purge again")
            return self._store.delete(*place)

    def _remove_damaged(self, nameless: set[str]) -> Iterator[Removed]:
        for record in damaged_records(self._stores, self._project):
            nameless |= _files(record)
            yield Removed("damaged", self._project, "/".join(record.place), "may hold the pairs")
            if not self._dry:
                self._stores.space.delete([record.name])

    def _remove_work(self, nameless: set[str]) -> Iterator[Removed]:
        used = self.records.in_use(self._project)
        areas = {(area.stage, area.key): area.size for area in list(self._store.work_areas())}
        for place in sorted({*areas, *self._mirrored()} - used):
            stage, key = place
            nameless.update(pointed(self._stores, self._project, f"{stage}-{key}"))
            if not (self._dry or self._store.remove_work(stage, key)):
                self.held.append(f"{stage}/{key[:12]}")
            else:
                yield Removed("work", self._project, f"{stage}/{key}", "may hold the pairs", areas.get(place, 0))

    def _mirrored(self) -> Iterator[Place]:
        """Work areas of a bucket that this machine keeps a copy of."""
        root = self._stores.settings.folder / "cache" / "work" / self._project
        for folder in root.glob("*") if root.is_dir() else ():
            stage, _, key = folder.name.rpartition("-")
            if stage:
                yield stage, key

    def _remove_uploads(self, found: _Found, nameless: set[str]) -> Iterator[Removed]:
        for digest, reason in sorted(found.uploads.items()):
            yield Removed("upload", self._project, digest, reason)
            if not self._dry:
                self._uploads.remove(digest)
        received = set(self._stores.space.folders(f"incoming/{self._project}/"))
        for upload in sorted(received - self.records.open_uploads(self._project, "model")):
            nameless |= self._uploads.received(upload)
            size = sum(part.size for part in self._uploads.parts(upload))
            yield Removed("upload", self._project, upload, "not complete: may hold the pairs", size)
            if not self._dry:
                self._uploads.abort(upload)

    def _remove_unfinished(self) -> None:
        """Copies of uploads that are being joined, and what writers that were killed left in the folder or on this machine."""
        space = self._stores.space
        space.delete([found.name for found in list(space.listing(f"staged/{self._project}/upload/"))])
        spool = self._stores.settings.folder / "cache" / "spool"
        with self._stores.collecting():
            for path in self._half_written():
                path.unlink(missing_ok=True)
        for path in list(spool.rglob("*")):
            with suppress(FileNotFoundError):
                if path.is_file() and path.stat().st_mtime < time.time() - _SPOOLED_SECONDS:
                    path.unlink()

    def _half_written(self) -> Iterator[Path]:
        """Temporary files of a store that is a folder; nobody writes blobs now."""
        if self._stores.s3 is None:
            root = store_folder(self._stores.settings)
            models = self.records.open_uploads(self._project, "model")
            yield from list((root / "blobs").rglob(".*"))
            for path in list((root / "incoming" / self._project).rglob(".*")):
                if path.relative_to(root).parts[2] not in models:
                    yield path

    def _holds(self, manifest: Manifest, pair_ids: set[str]) -> bool:
        stored = self._store.read(manifest.stage, manifest.key)
        try:
            return any(searchable(name) and contains(stored.path(name), name, pair_ids) for name in manifest.files)
        finally:
            self._store.close()

    def _datasets(self, pair_ids: set[str]) -> Iterator[tuple[str, str]]:
        """Uploaded datasets that are to go; the lists of uploads that were removed are still there for a day."""
        datasets, models = self.records.datasets(self._project), self.records.models(self._project)
        for digest in [each.name for each in self._uploads.complete_uploads()]:
            if digest in datasets:
                if self._upload_holds(digest, pair_ids):
                    yield digest, "contains the pairs"
            elif digest not in models:
                yield digest, "no upload of the project: may hold the pairs"

    def _upload_holds(self, digest: str, pair_ids: set[str]) -> bool:
        spool = self._stores.settings.folder / "cache" / "spool"
        spool.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=spool) as folder:
            for file in self._uploads.files(digest):
                if searchable(file.path):
                    path = Path(folder) / "file"
                    self._stores.space.fetch(blob_name(file.digest), path, file.size)
                    if contains(path, f"{UPLOAD}{digest[:12]}…/{file.path}", pair_ids, GIVEN):
                        return True
                    path.unlink()
        return False


def _files(record: DamagedRecord) -> set[str]:
    return {entry.digest for entry in record.manifest.files.values()} if record.manifest is not None else set()


def _add_derived(
    manifests: dict[Place, Manifest], reasons: dict[Place, str], suspects: set[str], of_jobs: tuple[frozenset[str], ...]
) -> None:
    """Add what was computed from what is there, or from a suspect, at any remove.

    Args:
        of_jobs: content digests of the artifacts of each job. They say where an artifact came from that is gone: it is taken for
            tainted where a job had it together with one that is, and where no job knows it.
    """
    there = {each.content_digest for each in manifests.values()}
    there |= {entry.digest for each in manifests.values() for entry in each.files.values()}
    gone = {digest for each in manifests.values() for digest in each.inputs.values()} - there
    tainted = {manifests[place].content_digest for place in reasons} | suspects
    grown = True
    while grown:
        before = len(tainted)
        tainted |= {digest for digest in gone if _may_come_of(digest, tainted, of_jobs)}
        for place, manifest in manifests.items():
            if place not in reasons and tainted & set(manifest.inputs.values()):
                reasons[place] = "computed from what contains the pairs, or may have"
                tainted.add(manifest.content_digest)
        grown = len(tainted) > before


def _may_come_of(digest: str, tainted: set[str], of_jobs: tuple[frozenset[str], ...]) -> bool:
    knowing = [contents for contents in of_jobs if digest in contents]
    return not knowing or any(contents & tainted for contents in knowing)
