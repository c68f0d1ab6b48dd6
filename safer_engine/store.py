"""Where artifacts live: committed immutably by cache key, verified when read.

Layout of `LocalArtifactStore`::

    blobs/ab/abcd…            payload files by sha256
    manifests/<project>/<stage>/<key>.json      created exclusively: no manifest, no artifact
    work/<project>/<stage>-<key>/payload|scratch   resumable, removed at commit
    locks/                    one lock file per work area
    damaged/                  manifests of artifacts that were damaged, as they were found
    reports/                  copies of pages, for a browser
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from safer_engine.cost import Cost, Planned
from safer_engine.errors import ArtifactError, DamagedArtifact, WorkBusy
from safer_engine.holding import hold
from safer_engine.publishing import link, publishing, require_writable, sync, write_failed

MANIFEST_VERSION = 1
PART_SCRATCH = "part-"
"""How names of scratch files begin that one part of a stage made and no other part needs: see `WorkArea.scratch`."""
_CHUNK = 1 << 20


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces; NaN and infinity are errors."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def digest_bytes(data: bytes) -> str:
    """sha256 in hex."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    sha = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            sha.update(chunk)
    return sha.hexdigest()


class FileEntry(BaseModel):
    """One payload file of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    digest: str
    size: int


class Manifest(BaseModel):
    """The record that makes an artifact exist."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    manifest_version: int = MANIFEST_VERSION
    project: str
    stage: str
    stage_version: int
    artifact: str
    key: str
    files: dict[str, FileEntry]
    meta: dict[str, Any]
    inputs: dict[str, str] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)
    cost: Cost = Field(default_factory=Cost)
    planned: Planned | None = None
    attempt: str = ""

    @property
    def content_digest(self) -> str:
        """Digest of what the artifact says (files and meta), whoever computed it, and however long it took or was to take."""
        files = {name: entry.digest for name, entry in self.files.items()}
        return digest_bytes(canonical_json({"artifact": self.artifact, "files": files, "meta": self.meta}))


@dataclass(frozen=True)
class ManifestDraft:
    """All of a manifest but the files, which the store fills in."""

    stage_version: int
    artifact: str
    meta: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    planned: Planned | None = None

    def manifest(self, project: str, stage: str, key: str, files: dict[str, FileEntry]) -> Manifest:
        """The manifest with its files, under an attempt id of its own."""
        drafted = {each.name: getattr(self, each.name) for each in fields(self)}
        return Manifest(project=project, stage=stage, key=key, files=files, attempt=uuid.uuid4().hex, **drafted)


class StoredArtifact(Protocol):
    """A committed artifact."""

    @property
    def manifest(self) -> Manifest:
        """Its record."""

    def path(self, name: str) -> Path:
        """A local, verified file of the payload. Raises ArtifactError when missing or damaged."""


class WorkArea(Protocol):
    """Resumable scratch of one stage run. Every file in it is complete: it appears only when published."""

    @property
    def scratch(self) -> Path:
        """Folder for state that is never committed.

        In an area that is held shared, files of other machines whose names begin with `PART_SCRATCH` need not be there.
        """

    def has(self, name: str) -> bool:
        """Whether a payload file was published."""

    def path(self, name: str) -> Path:
        """Path of a published payload file."""

    def publish(self, name: str, *, scratch: bool = False) -> Any:
        """Context manager: yields a temporary path, makes it durable under `name` on a clean exit."""

    def fetch(self, name: str) -> Path | None:
        """A scratch file, brought here where another machine published it; None where there is none."""

    def remove(self, name: str, *, scratch: bool = False) -> None:
        """Withdraw a published file, if it is there."""


@runtime_checkable
class ArtifactStore(Protocol):
    """Commits and reads artifacts by (stage, key) within one project."""

    project: str

    def has(self, stage: str, key: str) -> bool:
        """Whether the artifact is committed."""

    def read(self, stage: str, key: str) -> StoredArtifact:
        """A committed artifact. Raises ArtifactError when there is none."""

    def open_work(self, stage: str, key: str, shared: bool = False) -> Any:
        """Context manager: the work area of a key, held exclusively. Raises WorkBusy when another holds it.

        Args:
            shared: held together with others that ask for it shared: processes that make different parts of one artifact.
        """

    def commit(self, stage: str, key: str, work: WorkArea, draft: ManifestDraft) -> StoredArtifact:
        """Make the payload an artifact. The first commit wins; a later one gets the first's."""


@runtime_checkable
class MendingStore(Protocol):
    """A store that finds its damaged artifacts, and lets them be computed anew."""

    def set_aside(self, stage: str, key: str) -> str:
        """Move the manifest away if the artifact is damaged; what was found, in words, or "" where it is sound or not there."""


@dataclass(frozen=True)
class LocalStored:
    """A committed artifact in a local store."""

    manifest: Manifest
    store: LocalArtifactStore

    def path(self, name: str) -> Path:
        """See `StoredArtifact.path`; each blob is hashed once per process. Raises DamagedArtifact, which is then set aside."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise ArtifactError(f"artifact {self.manifest.stage} has no file {name!r}")
        if wrong := self.store.damage_of(entry, name):
            stage, key = self.manifest.stage, self.manifest.key
            with suppress(OSError):  # a store that is only read stays as it is
                self.store.set_aside(stage, key)
            raise DamagedArtifact(f"the artifact of stage {stage} is damaged: {wrong}", stage, key)
        return self.store.blob(entry)


@dataclass(frozen=True)
class LocalWork:
    """A work area in a local folder."""

    root: Path

    @property
    def payload(self) -> Path:
        """Folder of published payload files."""
        return self.root / "payload"

    @property
    def scratch(self) -> Path:
        """See `WorkArea.scratch`."""
        return self.root / "scratch"

    def has(self, name: str) -> bool:
        """See `WorkArea.has`."""
        return (self.payload / name).is_file()

    def path(self, name: str) -> Path:
        """See `WorkArea.path`."""
        return self.payload / name

    @contextmanager
    def publish(self, name: str, *, scratch: bool = False) -> Iterator[Path]:
        """See `WorkArea.publish`."""
        with publishing((self.scratch if scratch else self.payload) / name, staging=self.root) as temporary:
            yield temporary

    def fetch(self, name: str) -> Path | None:
        """See `WorkArea.fetch`."""
        return self.scratch / name if (self.scratch / name).is_file() else None

    def remove(self, name: str, *, scratch: bool = False) -> None:
        """See `WorkArea.remove`."""
        ((self.scratch if scratch else self.payload) / name).unlink(missing_ok=True)


class LocalArtifactStore:
    """An artifact store in a local folder (see the module's picture)."""

    def __init__(self, root: Path | str, project: str = "default") -> None:
        self.root = Path(root).expanduser()
        self.project = project
        self._verified: set[str] = set()

    def has(self, stage: str, key: str) -> bool:
        """See `ArtifactStore.has`; an artifact is there when its manifest can be read and its files have their sizes."""
        try:
            manifest = self._manifest(stage, key)
        except (FileNotFoundError, NotADirectoryError, DamagedArtifact):
            return False
        return not any(self._short(entry) for entry in manifest.files.values())

    def read(self, stage: str, key: str) -> LocalStored:
        """See `ArtifactStore.read`. Raises DamagedArtifact."""
        try:
            return LocalStored(self._manifest(stage, key), self)
        except FileNotFoundError:
            raise ArtifactError(f"no artifact of stage {stage} under key {key[:12]}") from None

    def set_aside(self, stage: str, key: str) -> str:
        """See `MendingStore`. All files are hashed. Of several processes that find the damage, one moves the manifest.

        A sound artifact that another process committed meanwhile is never moved: it is looked at under a lock.
        """
        if not (path := self._manifest_path(stage, key)).is_file():
            return ""
        locks = self.root / "locks"
        locks.mkdir(exist_ok=True)
        with (locks / "mending").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            wrong = self._damage(stage, key)
            if wrong:
                aside = self.root / "damaged" / self.project / stage / f"{key}.{uuid.uuid4().hex}.json"
                aside.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, aside)
                os.utime(aside)  # from now on it counts when it was set aside
                sync(path.parent)
        return wrong

    def blob(self, entry: FileEntry) -> Path:
        """Where the content of a payload file lies."""
        return self.root / "blobs" / entry.digest[:2] / entry.digest

    def damage_of(self, entry: FileEntry, name: str) -> str:
        """What is wrong with a payload file, in words; "" where it is as it was written. Hashed once per process."""
        if entry.digest in self._verified:
            return ""
        if not self.blob(entry).is_file():
            return f"its file {name} is missing from the store"
        if digest_file(self.blob(entry)) != entry.digest:
            return f"its file {name} is not as it was written"
        self._verified.add(entry.digest)
        return ""

    def _damage(self, stage: str, key: str) -> str:
        try:
            files = self._manifest(stage, key).files
        except FileNotFoundError:
            return ""
        except DamagedArtifact as error:
            return error.message
        self._verified.difference_update(entry.digest for entry in files.values())
        wrong = next((wrong for name, entry in sorted(files.items()) if (wrong := self.damage_of(entry, name))), "")
        return wrong and f"the artifact of stage {stage} is damaged: {wrong}"

    def _short(self, entry: FileEntry) -> bool:
        try:
            return self.blob(entry).stat().st_size != entry.size
        except OSError:
            return True

    def _manifest(self, stage: str, key: str) -> Manifest:
        """Raises FileNotFoundError, DamagedArtifact."""
        content = self._manifest_path(stage, key).read_bytes()
        try:
            return Manifest.model_validate_json(content)
        except ValueError as error:
            raise DamagedArtifact(
                f"the manifest of stage {stage} is damaged: it is no record of an artifact", stage, key
            ) from error

    @contextmanager
    def open_work(self, stage: str, key: str, shared: bool = False) -> Iterator[LocalWork]:
        """See `ArtifactStore.open_work`. Raises SpecError when the store's folder cannot be made or written."""
        root = self.root / "work" / self.project / f"{stage}-{key}"
        locks = self.root / "locks"
        require_writable(locks, "the artifact store's folder")
        with (locks / f"{self.project}-{stage}-{key}").open("w") as lock:
            if not hold(lock, shared):
                raise WorkBusy(f"another process is computing stage {stage}", "wait for it, or stop it")
            work = LocalWork(root)
            work.payload.mkdir(parents=True, exist_ok=True)
            work.scratch.mkdir(parents=True, exist_ok=True)
            if not shared:
                for leftover in root.glob(".*"):  # of a process that was killed while it published
                    leftover.unlink()
            yield work
            if self.has(stage, key) and (not shared or hold(lock)):
                shutil.rmtree(root, ignore_errors=True)

    def commit(self, stage: str, key: str, work: WorkArea, draft: ManifestDraft) -> LocalStored:
        """See `ArtifactStore.commit`."""
        if not isinstance(work, LocalWork):
            raise ArtifactError("a local store commits local work areas only")
        try:
            return self._commit(stage, key, work, draft)
        except OSError as error:
            raise write_failed(self.root, error) from error

    def _commit(self, stage: str, key: str, work: LocalWork, draft: ManifestDraft) -> LocalStored:
        files = {path.name: self._keep_blob(path) for path in sorted(work.payload.iterdir())}
        manifest = draft.manifest(self.project, stage, key, files)
        if not self.has(stage, key):
            self.set_aside(stage, key)
        self._create_exclusively(self._manifest_path(stage, key), canonical_json(manifest.model_dump(mode="json")))
        return self.read(stage, key)

    def _manifest_path(self, stage: str, key: str) -> Path:
        return self.root / "manifests" / self.project / stage / f"{key}.json"

    def _keep_blob(self, path: Path) -> FileEntry:
        kept = self.root / "blobs" / f".{uuid.uuid4().hex}"
        kept.parent.mkdir(parents=True, exist_ok=True)
        link(path, kept)  # first: whoever shares the work area may publish another file under this name meanwhile
        try:
            digest, size = digest_file(kept), kept.stat().st_size
            blob = self.blob(FileEntry(digest=digest, size=size))
            blob.parent.mkdir(exist_ok=True)
            if not (blob.is_file() and digest_file(blob) == digest):
                os.replace(kept, blob)
                sync(blob.parent)
        finally:
            kept.unlink(missing_ok=True)
        self._verified.add(digest)
        return FileEntry(digest=digest, size=size)

    def _create_exclusively(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        temporary.write_bytes(data)
        sync(temporary)
        try:
            os.link(temporary, path)
            sync(path.parent)
        except FileExistsError:
            pass  # the first commit wins; the caller reads it back
        finally:
            temporary.unlink(missing_ok=True)
