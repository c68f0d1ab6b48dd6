"""Where artifacts are kept, as the settings say: a local folder or S3, seen by one project or as a whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from safer_engine.errors import ArtifactError, SaferError
from safer_engine.store import ArtifactStore, Manifest
from service.infra.input_cache import InputCache
from service.infra.object_space import FolderSpace, ObjectSpace, blob_name, plain
from service.infra.settings import Settings

if TYPE_CHECKING:
    from sqlalchemy import Engine

OnTransfer = Callable[[str, int, float], None]
"""Told of each file: `get` or `put`, bytes, seconds."""
PRESIGNED_SECONDS = 300


@dataclass(frozen=True)
class Usage:
    """What a project keeps, in bytes. A file that several artifacts share counts for each."""

    artifacts: int
    artifact_bytes: int
    work_bytes: int
    stages: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Readiness:
    """Whether the store can be used.

    Attributes:
        exclusive: what lets the first commit win: `link` (a folder), `conditional-put`, or `sql` where the S3 server
            ignores conditions; empty while unknown.
        detail: what is wrong, or where the artifacts are; nothing secret.
    """

    ok: bool
    exclusive: Literal["", "link", "conditional-put", "sql"]
    detail: str


@dataclass(frozen=True)
class Committed:
    """A committed artifact in a listing. `changed`: seconds since the epoch."""

    stage: str
    key: str
    changed: float


@dataclass(frozen=True)
class WorkFacts:
    """A work area in a listing. `changed`: when something in it last did, in seconds since the epoch."""

    stage: str
    key: str
    changed: float
    size: int


class ServiceStore(ArtifactStore, Protocol):
    """An `ArtifactStore` with what serving and retention need."""

    def manifest(self, stage: str, key: str) -> Manifest:
        """The record of a committed artifact. Raises ArtifactError when there is none."""

    def open_range(self, stage: str, key: str, name: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Bytes [start, stop) of a payload file, as they come. Raises ArtifactError."""

    def presigned(self, stage: str, key: str, name: str, content_type: str = "application/octet-stream") -> str | None:
        """A URL that gives the file to whoever has it, for some minutes; None where there is no such thing. Never log it."""

    def delete(self, stage: str, key: str) -> bool:
        """Remove an artifact's manifest; the caller removes its blobs (`removal`). Returns whether there was one."""

    def set_aside(self, stage: str, key: str) -> str:
        """See `MendingStore`."""

    def committed(self) -> Iterator[Committed]:
        """Every committed artifact of the project."""

    def work_areas(self) -> Iterator[WorkFacts]:
        """Every work area of the project."""

    def remove_work(self, stage: str, key: str) -> bool:
        """Remove a work area; False when a process on this machine holds it."""

    def usage(self) -> Usage:
        """What the project keeps; reads every manifest."""

    def close(self) -> None:
        """Let go of cached files. Paths that were handed out may vanish afterwards."""


class Stores:
    """The store of all projects."""

    def __init__(self, settings: Settings, engine: Engine | None = None, on_transfer: OnTransfer | None = None) -> None:
        """Open the store; connects to nothing yet. Raises SpecError when the cache folder of an S3 store cannot be written.

        Args:
            engine: the service's database; needed where an S3 server ignores conditional PUT.
        """
        self.settings = settings
        self._engine = engine
        self.space: ObjectSpace
        if settings.on_s3:
            from service.infra.s3_client import S3Client
            from service.infra.s3_commit import ManifestWriter

            self.s3: S3Client | None = S3Client(settings, on_transfer)
            self._writer = ManifestWriter(self.s3, engine)
            self._cache = InputCache(settings.folder / "cache" / "blobs", settings.artifact_cache_bytes)
            self.space = self.s3
        else:
            from service.infra.local_service_store import store_folder

            self.s3 = None
            self.space = FolderSpace(store_folder(settings))

    def project(self, name: str) -> ServiceStore:
        """The store as one project sees it. Raises SpecError for a name that is none."""
        plain("project", name)
        if self.s3 is not None:
            from service.infra.s3_blobs import S3Blobs
            from service.infra.s3_store import S3ArtifactStore

            return S3ArtifactStore(self.settings, S3Blobs(self.s3, self._cache), self._writer, name)
        from service.infra.local_service_store import LocalServiceStore

        return LocalServiceStore(self.settings, name)

    def projects(self) -> list[str]:
        """Projects that keep anything here."""
        found = (self.space.folders(f"{kind}/") for kind in ("manifests", "work", "uploads", "incoming", "damaged"))
        return sorted({name for names in found for name in names})

    def naming(self) -> AbstractContextManager[None]:
        """Write files and what names them within: none is collected in between. In a bucket, their age protects them."""
        if self.s3 is not None:
            return nullcontext()
        from service.infra.local_service_store import collecting_lock

        return collecting_lock(self.settings, shared=True)

    def collecting(self) -> AbstractContextManager[None]:
        """Find and remove files that nothing names within: in a folder nobody writes one or names one meanwhile."""
        if self.s3 is not None:
            return nullcontext()
        from service.infra.local_service_store import collecting_lock

        return collecting_lock(self.settings, shared=False)

    def drop_cached(self, digests: Collection[str]) -> None:
        """Remove files and uploads from this machine's caches, in use or not, and whatever the store does not have any more."""
        cache, projects = self.settings.folder / "cache", self.projects()
        for folder in (cache / "blobs", cache / "inputs"):
            if folder.is_dir():
                kept = InputCache(folder, self.settings.cache_bytes)
                for digest in {*digests, *(each.digest for each in kept.entries() if not self._keeps(each.digest, projects))}:
                    kept.drop(digest)

    def _keeps(self, digest: str, projects: Iterable[str]) -> bool:
        """Whether there is a blob, or an upload of any project, of this digest."""
        names = (blob_name(digest), *(f"uploads/{project}/{digest}.json" for project in projects))
        return any(self.space.facts(name) is not None for name in names)

    def readiness(self) -> Readiness:
        """Whether the store answers, and what decides a race of commits."""
        if self.s3 is not None:
            try:
                self.s3.check()
                return Readiness(True, self._writer.decide(), f"s3://{self.s3.bucket}")
            except SaferError as error:
                return Readiness(False, "", error.message)
        from service.infra.local_service_store import check_folder

        try:
            check_folder(self.settings)
        except SaferError as error:
            return Readiness(False, "", error.message)
        return Readiness(True, "link", "a local folder")


def usage_of(committed: Iterable[Committed], work: Iterable[WorkFacts], manifest: Callable[[str, str], Manifest]) -> Usage:
    """Add up a listing; an artifact that is removed meanwhile is left out."""
    stages: dict[str, int] = {}
    count = 0
    for each in committed:
        try:
            files = manifest(each.stage, each.key).files
        except ArtifactError:
            continue
        count += 1
        stages[each.stage] = stages.get(each.stage, 0) + sum(entry.size for entry in files.values())
    return Usage(count, sum(stages.values()), sum(each.size for each in work), stages)


def open_store(settings: Settings, project: str, engine: Engine | None = None) -> ServiceStore:
    """The store of one project. Raises SpecError for settings that cannot be used."""
    return Stores(settings, engine).project(project)
