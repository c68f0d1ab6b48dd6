"""Artifacts in a local folder, for a service on one machine."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safer_engine.errors import ArtifactError
from safer_engine.holding import hold
from safer_engine.publishing import require_usable, require_writable
from safer_engine.store import LocalArtifactStore, LocalStored, Manifest, ManifestDraft, WorkArea
from service.infra.object_space import FolderSpace, blob_name, plain
from service.infra.settings import Settings
from service.infra.stores import Committed, Usage, WorkFacts, usage_of


def store_folder(settings: Settings) -> Path:
    """The folder that the settings name."""
    return Path(settings.store.removeprefix("file://")).expanduser().absolute()


def check_folder(settings: Settings) -> None:
    """See that the folder can be written. Raises SpecError, ResourceError."""
    require_writable(store_folder(settings), "the artifact store's folder")


def _facts(path: Path) -> os.stat_result | None:
    """None where it vanished: somebody works there."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


@contextmanager
def collecting_lock(settings: Settings, shared: bool) -> Iterator[None]:
    """Hold the lock between those who write files and name them, who share it, and whoever removes files without a name."""
    with (_locks(settings) / "collecting").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


def _locks(settings: Settings) -> Path:
    folder = store_folder(settings) / "locks"
    require_usable(folder, "the artifact store's folder")
    return folder


class LocalServiceStore(LocalArtifactStore):
    """See `ServiceStore`. Several processes of one machine may use the folder at once."""

    def __init__(self, settings: Settings, project: str) -> None:
        super().__init__(store_folder(settings), plain("project", project))
        self._settings = settings
        self.space = FolderSpace(self.root)

    def commit(self, stage: str, key: str, work: WorkArea, draft: ManifestDraft) -> LocalStored:
        """See `ArtifactStore.commit`; no garbage is collected meanwhile."""
        with collecting_lock(self._settings, shared=True):
            return super().commit(stage, key, work, draft)

    def manifest(self, stage: str, key: str) -> Manifest:
        """See `ServiceStore.manifest`."""
        return self.read(stage, key).manifest

    def open_range(self, stage: str, key: str, name: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """See `ServiceStore.open_range`."""
        entry = self.manifest(stage, key).files.get(name)
        if entry is None:
            raise ArtifactError(f"artifact {stage} has no file {name!r}")
        return self.space.stream(blob_name(entry.digest), start, stop)

    def presigned(self, stage: str, key: str, name: str, content_type: str = "application/octet-stream") -> str | None:
        """See `ServiceStore.presigned`: a folder has no URLs."""
        return None

    def delete(self, stage: str, key: str) -> bool:
        """See `ServiceStore.delete`."""
        path = self._manifest_path(stage, key)
        there = path.is_file()
        path.unlink(missing_ok=True)
        return there

    def committed(self) -> Iterator[Committed]:
        """See `ServiceStore.committed`."""
        for found in self.space.listing(f"manifests/{self.project}/"):
            _, _, stage, file = found.name.split("/")
            yield Committed(stage, file.removesuffix(".json"), found.changed)

    def work_areas(self) -> Iterator[WorkFacts]:
        """See `ServiceStore.work_areas`."""
        root = self.root / "work" / self.project
        for area in self.space.folders(f"work/{self.project}/"):
            stage, _, key = area.rpartition("-")
            found = [facts for path in (root / area, *(root / area).rglob("*")) if (facts := _facts(path)) is not None]
            if stage and found:
                size = sum(each.st_size for each in found if stat.S_ISREG(each.st_mode))
                yield WorkFacts(stage, key, max(each.st_mtime for each in found), size)

    def remove_work(self, stage: str, key: str) -> bool:
        """See `ServiceStore.remove_work`."""
        with (_locks(self._settings) / f"{self.project}-{stage}-{key}").open("w") as lock:
            if not hold(lock):
                return False
            shutil.rmtree(self.root / "work" / self.project / f"{stage}-{key}", ignore_errors=True)
        return True

    def usage(self) -> Usage:
        """See `ServiceStore.usage`."""
        return usage_of(self.committed(), self.work_areas(), self.manifest)

    def close(self) -> None:
        """See `ServiceStore.close`: nothing is held."""

    def _manifest_path(self, stage: str, key: str) -> Path:
        return super()._manifest_path(plain("stage", stage), plain("key", key))
