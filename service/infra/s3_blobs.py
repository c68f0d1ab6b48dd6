"""Payload files of an S3 store: in the bucket by sha256, and in a cache on this machine, verified when read."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from safer_engine.errors import ArtifactError
from safer_engine.store import FileEntry, digest_file
from service.infra.input_cache import InputCache
from service.infra.object_space import ObjectMissing, blob_name
from service.infra.s3_client import S3Client


class DamagedBlob(ArtifactError):
    """A payload file is missing from the bucket, or not as it was written."""


class S3Blobs:
    """Blobs of one bucket. Files that were handed out stay on disk until `close`."""

    def __init__(self, client: S3Client, cache: InputCache) -> None:
        self.client = client
        self._cache = cache
        self._lock = threading.Lock()
        self._held: dict[str, Path] = {}
        self._suspect: set[str] = set()

    def keep(self, path: Path) -> FileEntry:
        """Upload a file under its digest, and take it into the cache. It is always sent: that renews its age in the bucket."""
        entry = FileEntry(digest=digest_file(path), size=path.stat().st_size)
        self.client.put_file(blob_name(entry.digest), path)
        self._hold(entry.digest, self._cache.adopt(entry.digest, path))
        return entry

    def path(self, entry: FileEntry, name: str) -> Path:
        """A local file with these bytes; hashed once for each time it is taken from cache or bucket.

        Raises:
            DamagedBlob: the blob is missing from the bucket or damaged; nothing of it is left in the cache.
        """
        with self._lock:
            held = self._held.get(entry.digest)
        if held is not None:
            return held
        path = self._pin(entry, name)
        if digest_file(path) != entry.digest:  # changed on this machine's disk since it was fetched
            self._cache.drop(entry.digest)
            self._cache.unpin(entry.digest)
            path = self._pin(entry, name)
        return self._hold(entry.digest, path)

    def damage_of(self, entry: FileEntry, name: str) -> str:
        """What is wrong with a blob in the bucket, in words; "" where it is sound, as far as is known.

        Its size is looked at; it is read only where a reader has found it damaged.
        """
        with self._lock:
            suspect = entry.digest in self._suspect
        found = self.client.facts(blob_name(entry.digest))
        if found is None:
            return f"its file {name} is missing from the store"
        if found.size != entry.size or (suspect and self._digest(entry) != entry.digest):
            return f"its file {name} is not as it was written"
        with self._lock:
            self._suspect.discard(entry.digest)
        return ""

    def missing(self, entries: list[FileEntry]) -> list[FileEntry]:
        """Those whose blob is not in the bucket, or has another size."""
        facts = self.client.parallel(lambda entry: self.client.facts(blob_name(entry.digest)), entries)
        return [entry for entry, found in zip(entries, facts, strict=True) if found is None or found.size != entry.size]

    def close(self) -> None:
        """Let every file go."""
        with self._lock:
            held, self._held = self._held, {}
        for digest in held:
            self._cache.unpin(digest)

    def _hold(self, digest: str, path: Path) -> Path:
        """Remember a file that was pinned for us; once is enough."""
        with self._lock:
            again = digest in self._held
            self._held[digest] = path
        if again:
            self._cache.unpin(digest)
        return path

    def _pin(self, entry: FileEntry, name: str) -> Path:
        return self._cache.pin(entry.digest, lambda target: self._fetch(entry, name, target), entry.size)

    def _digest(self, entry: FileEntry) -> str:
        """sha256 of a blob as it is in the bucket."""
        sha = hashlib.sha256()
        for chunk in self.client.stream(blob_name(entry.digest), 0, entry.size):
            sha.update(chunk)
        return sha.hexdigest()

    def _fetch(self, entry: FileEntry, name: str, target: Path) -> None:
        try:
            self.client.fetch(blob_name(entry.digest), target, entry.size)
        except ObjectMissing:
            raise DamagedBlob(f"its file {name} is missing from the store") from None
        except ArtifactError as error:
            raise DamagedBlob(f"its file {name} is not as it was written") from error
        if digest_file(target) != entry.digest:
            target.unlink()
            with self._lock:
                self._suspect.add(entry.digest)
            raise DamagedBlob(f"its file {name} is not as it was written")
