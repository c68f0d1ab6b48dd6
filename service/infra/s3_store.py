"""Artifacts in S3. The layout is that of `object_space`; the manifest decides, as everywhere.

On one machine a work area is held by a file lock. Between machines, only the SQL lease of the stage's key keeps it exclusive:
a worker that has lost its lease may still publish, which does no harm, since files are whole and the first commit wins.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from safer_engine.errors import ArtifactError, DamagedArtifact, WorkBusy
from safer_engine.holding import hold
from safer_engine.publishing import require_usable
from safer_engine.store import FileEntry, Manifest, ManifestDraft, WorkArea
from service.errors import Unavailable
from service.infra.object_space import ObjectMissing, blob_name, plain
from service.infra.s3_blobs import DamagedBlob, S3Blobs
from service.infra.s3_commit import ManifestWriter, manifest_name
from service.infra.s3_work import S3Work
from service.infra.settings import Settings
from service.infra.stores import PRESIGNED_SECONDS, Committed, Usage, WorkFacts, usage_of


@dataclass(frozen=True)
class S3Stored:
    """A committed artifact in S3."""

    manifest: Manifest
    store: S3ArtifactStore

    def path(self, name: str) -> Path:
        """See `StoredArtifact.path`; fetched when this machine does not have it. Raises DamagedArtifact, which is set aside."""
        entry = _entry(self.manifest, name)
        try:
            return self.store.blobs.path(entry, name)
        except DamagedBlob as error:
            stage, key = self.manifest.stage, self.manifest.key
            self.store.set_aside(stage, key)
            raise DamagedArtifact(f"the artifact of stage {stage} is damaged: {error.message}", stage, key) from error


class S3ArtifactStore:
    """See `ServiceStore`."""

    def __init__(self, settings: Settings, blobs: S3Blobs, writer: ManifestWriter, project: str) -> None:
        self.project = plain("project", project)
        self._settings = settings
        self._client = blobs.client
        self._writer = writer
        self._folder = settings.folder / "cache" / "work"
        self.blobs = blobs

    def has(self, stage: str, key: str) -> bool:
        """See `ArtifactStore.has`."""
        return self._client.facts(self._manifest_name(stage, key)) is not None

    def read(self, stage: str, key: str) -> S3Stored:
        """See `ArtifactStore.read`."""
        return S3Stored(self.manifest(stage, key), self)

    def manifest(self, stage: str, key: str) -> Manifest:
        """See `ServiceStore.manifest`."""
        name = self._manifest_name(stage, key)
        try:
            return Manifest.model_validate_json(self._client.get(name))
        except ObjectMissing:
            raise ArtifactError(f"no artifact of stage {stage} under key {key[:12]}") from None
        except ValueError as error:
            raise DamagedArtifact(
                f"the manifest of stage {stage} is damaged: it is no record of an artifact", stage, key
            ) from error

    def set_aside(self, stage: str, key: str) -> str:
        """See `MendingStore`. Sizes are looked at; a file is hashed where this process found it damaged."""
        name = self._manifest_name(stage, key)
        wrong, content = self._damage(stage, key), self._content(name)
        if not wrong or content is None or wrong != self._damage(stage, key):
            return ""
        self._client.put(f"damaged/{self.project}/{stage}/{key}.{uuid.uuid4().hex}.json", content)
        self._client.delete([name])
        return wrong

    @contextmanager
    def open_work(self, stage: str, key: str, shared: bool = False) -> Iterator[S3Work]:
        """See `ArtifactStore.open_work`. Exclusive on this machine only."""
        prefix = self._work_prefix(stage, key)
        root = self._folder / self.project / f"{stage}-{key}"
        with self._locked(stage, key, shared) as lock:
            if not shared:
                for leftover in root.glob(".*"):  # of a process that was killed while it published
                    leftover.unlink()
            yield S3Work(self.blobs, prefix, root, shared)
            if self.has(stage, key):
                self._client.delete([found.name for found in self._client.listing(prefix)])
                if not shared or hold(lock):
                    shutil.rmtree(root, ignore_errors=True)

    def commit(self, stage: str, key: str, work: WorkArea, draft: ManifestDraft) -> S3Stored:
        """See `ArtifactStore.commit`. Raises Unavailable when a payload file is gone: it has to be published again."""
        if not isinstance(work, S3Work):
            raise ArtifactError("an S3 store commits its own work areas only")
        files = work.entries()
        missing = {entry.digest for entry in self.blobs.missing(list(files.values()))}
        gone = [name for name, entry in files.items() if entry.digest in missing]
        for name in gone:
            work.remove(name)
        if gone:
            raise Unavailable(f"{', '.join(gone)} of {stage} vanished from the store before the commit", "run it again")
        self.set_aside(stage, key)
        self._writer.create(draft.manifest(self.project, stage, key, files))
        return self.read(stage, key)

    def open_range(self, stage: str, key: str, name: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """See `ServiceStore.open_range`."""
        entry = _entry(self.manifest(stage, key), name)
        return self._client.stream(blob_name(entry.digest), start, entry.size if stop is None else min(stop, entry.size))

    def presigned(self, stage: str, key: str, name: str, content_type: str = "application/octet-stream") -> str | None:
        """See `ServiceStore.presigned`."""
        if not self._settings.presign:
            return None
        entry = _entry(self.manifest(stage, key), name)
        filename = plain("file", name.rpartition("/")[2])
        return self._client.presigned_get(blob_name(entry.digest), PRESIGNED_SECONDS, filename, content_type)

    def delete(self, stage: str, key: str) -> bool:
        """See `ServiceStore.delete`."""
        name = self._manifest_name(stage, key)
        there = self._client.facts(name) is not None
        self._client.delete([name])
        return there

    def committed(self) -> Iterator[Committed]:
        """See `ServiceStore.committed`."""
        for found in self._client.listing(f"manifests/{self.project}/"):
            _, _, stage, file = found.name.split("/")
            yield Committed(stage, file.removesuffix(".json"), found.changed)

    def work_areas(self) -> Iterator[WorkFacts]:
        """See `ServiceStore.work_areas`; payload files count from their blobs, once each."""
        areas: dict[tuple[str, str], WorkFacts] = {}
        for found in self._client.listing(f"work/{self.project}/"):
            stage, _, key = found.name.split("/")[2].rpartition("-")
            before = areas.get((stage, key), WorkFacts(stage, key, 0.0, 0))
            size = before.size + (0 if "/payload/" in found.name else found.size)
            areas[stage, key] = WorkFacts(stage, key, max(before.changed, found.changed), size)
        yield from areas.values()

    def remove_work(self, stage: str, key: str) -> bool:
        """See `ServiceStore.remove_work`."""
        try:
            with self._locked(stage, key, shared=False):
                self._client.delete([found.name for found in self._client.listing(self._work_prefix(stage, key))])
                shutil.rmtree(self._folder / self.project / f"{stage}-{key}", ignore_errors=True)
        except WorkBusy:
            return False
        return True

    def usage(self) -> Usage:
        """See `ServiceStore.usage`."""
        return usage_of(self.committed(), self.work_areas(), self.manifest)

    def close(self) -> None:
        """See `ServiceStore.close`."""
        self.blobs.close()

    def _content(self, name: str) -> bytes | None:
        try:
            return self._client.get(name)
        except ObjectMissing:
            return None

    def _damage(self, stage: str, key: str) -> str:
        """What is wrong with an artifact, in words; "" where it is sound or not there."""
        try:
            files = self.manifest(stage, key).files
        except DamagedArtifact as error:
            return error.message
        except ArtifactError:
            return ""
        names = sorted(files)
        found = self._client.parallel(lambda name: self.blobs.damage_of(files[name], name), names)
        wrong = next((each for each in found if each), "")
        return wrong and f"the artifact of stage {stage} is damaged: {wrong}"

    @contextmanager
    def _locked(self, stage: str, key: str, shared: bool) -> Iterator[IO[str]]:
        """Hold the area's lock of this machine. Raises WorkBusy."""
        locks = self._folder / ".locks"
        require_usable(locks, "the cache folder")
        with (locks / f"{self.project}-{stage}-{key}").open("w") as lock:
            if not hold(lock, shared):
                raise WorkBusy(f"another process is computing stage {stage}", "wait for it, or stop it")
            yield lock

    def _manifest_name(self, stage: str, key: str) -> str:
        return manifest_name(self.project, plain("stage", stage), plain("key", key))

    def _work_prefix(self, stage: str, key: str) -> str:
        return f"work/{self.project}/{plain('stage', stage)}-{plain('key', key)}/"


def _entry(manifest: Manifest, name: str) -> FileEntry:
    entry = manifest.files.get(name)
    if entry is None:
        raise ArtifactError(f"artifact {manifest.stage} has no file {name!r}")
    return entry
