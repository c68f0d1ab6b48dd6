"""Removing pairs for the person whose data they are: everything that contains them, and everything computed from that.

Artifacts are searched for the ids; what consumed one that contains them goes too, since activations, a dictionary or the
words of a label may hold what was in the text. Uploaded datasets with the pairs go, and reviewers' decisions about them.
Not reached, and to be emptied by the operator: caches on other machines (`SAFER_HOME/cache`), old versions of objects in a
bucket that keeps versions, backups, and datasets that lie elsewhere (hub, folders).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safer_engine.errors import SpecError
from safer_engine.store import Manifest
from service.errors import Conflict
from service.infra.object_space import blob_name
from service.infra.pair_search import GIVEN, contains, searchable
from service.infra.retention import Removed, remove_blobs
from service.infra.retention_records import AffectedJob, Place, RetentionRecords
from service.infra.stores import Stores
from service.infra.upload_files import PREFIX, UploadFiles

if TYPE_CHECKING:
    from sqlalchemy import Engine

_TRAINED = "training"
"""Stage of a job whose artifact does not say what it was computed from."""


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
    reasons: dict[Place, str]
    uploads: frozenset[str]
    jobs: tuple[AffectedJob, ...]


def purge(stores: Stores, engine: Engine, project: str, pair_ids: Iterable[str], dry_run: bool = False) -> Purged:
    """Remove all that one project keeps of some pairs.

    Args:
        pair_ids: as reports and edits name them; the id of a row stands for all pairs made from it.

    Raises:
        SpecError: no ids.
        Conflict: a job that has not ended uses the pairs (not on a dry run): it is named; nothing was removed.
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
        purging.records.purged(project, wanted, found.uploads, found.jobs)
    return Purged(tuple(removed), found.jobs, decisions, dry_run)


class _Purge:
    def __init__(self, stores: Stores, records: RetentionRecords, project: str, dry_run: bool) -> None:
        self.records = records
        self._stores = stores
        self._store = stores.project(project)
        self._uploads = UploadFiles(stores, project)
        self._project = project
        self._dry = dry_run

    def search(self, pair_ids: set[str]) -> _Found:
        """Everything that holds the pairs or comes from them."""
        manifests = {(each.stage, each.key): self._store.manifest(each.stage, each.key) for each in list(self._store.committed())}
        reasons = {place: "contains the pairs" for place, manifest in manifests.items() if self._holds(manifest, pair_ids)}
        _add_derived(manifests, reasons)
        uploads = {digest for digest in self._datasets() if self._upload_holds(digest, pair_ids)}
        using = [job.id for job in self.records.jobs_of(self._project, reasons)]
        words = self.records.words_of_specs(self._project, using, PREFIX)
        uploads |= {word.removeprefix(PREFIX) for word in words} & self._datasets()
        jobs = self.records.jobs_of(self._project, reasons, (f"{PREFIX}{digest}" for digest in uploads))
        for place in self.records.places_of(self._project, (job.id for job in jobs)):
            if place[0] == _TRAINED and place in manifests:
                reasons.setdefault(place, "trained on the pairs")
        return _Found(reasons, frozenset(uploads), jobs)

    def remove(self, found: _Found) -> list[Removed]:
        """Remove it, with the blobs that nothing else names, and every work area that no job uses now."""
        removed, digests = [], {file.digest for each in found.uploads for file in self._uploads.files(each)}
        gone = frozenset((self._project, f"{stage}/{key}") for stage, key in found.reasons)
        for place, reason in sorted(found.reasons.items()):
            files = self._store.manifest(*place).files.values()
            digests.update(entry.digest for entry in files)
            if self._dry or self._remove_artifact(place):
                removed.append(Removed("artifact", self._project, "/".join(place), reason))
        removed += self._remove_work()
        for digest in sorted(found.uploads):
            removed.append(Removed("upload", self._project, digest, "contains the pairs"))
            if not self._dry:
                self._uploads.remove(digest)
        if self._dry:
            return removed
        self._stores.drop_cached(digests | found.uploads)
        return removed + remove_blobs(self._stores, float("inf"), self._dry, gone, frozenset(digests))

    def _remove_artifact(self, place: Place) -> bool:
        with self.records.removing(self._project, place) as free:
            if not free:
                raise Conflict(f"a job that began just now uses {place[0]}/{place[1][:12]}", "cancel it, and purge again")
            return self._store.delete(*place)

    def _remove_work(self) -> list[Removed]:
        used = self.records.in_use(self._project)
        areas = [area for area in list(self._store.work_areas()) if (area.stage, area.key) not in used]
        return [
            Removed("work", self._project, f"{area.stage}/{area.key}", "may hold the pairs", area.size)
            for area in areas
            if self._dry or self._store.remove_work(area.stage, area.key)
        ]

    def _holds(self, manifest: Manifest, pair_ids: set[str]) -> bool:
        stored = self._store.read(manifest.stage, manifest.key)
        try:
            return any(searchable(name) and contains(stored.path(name), name, pair_ids) for name in manifest.files)
        finally:
            self._store.close()

    def _datasets(self) -> set[str]:
        return {digest for digest in self.records.dataset_uploads(self._project) if self._uploads.has(digest)}

    def _upload_holds(self, digest: str, pair_ids: set[str]) -> bool:
        spool = self._stores.settings.folder / "cache" / "spool"
        spool.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=spool) as folder:
            for file in self._uploads.files(digest):
                if searchable(file.path):
                    path = Path(folder) / "file"
                    self._stores.space.fetch(blob_name(file.digest), path, file.size)
                    if contains(path, f"{PREFIX}{digest[:12]}…/{file.path}", pair_ids, GIVEN):
                        return True
                    path.unlink()
        return False


def _add_derived(manifests: dict[Place, Manifest], reasons: dict[Place, str]) -> None:
    """Add what was computed from what is there, at any remove."""
    tainted = {manifests[place].content_digest for place in reasons}
    grown = True
    while grown:
        grown = False
        for place, manifest in manifests.items():
            if place not in reasons and tainted & set(manifest.inputs.values()):
                reasons[place] = "computed from what contains the pairs"
                tainted.add(manifest.content_digest)
                grown = True
