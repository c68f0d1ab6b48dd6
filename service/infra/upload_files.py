"""The bytes of uploads: parts as they come, whole files checked against their sha256, and files for workers.

A part is an object under `incoming/`, replaced by a later one of its number. Completing an upload hashes every file; its
parts become a blob, and the list of files, named by its digest, makes the upload exist. Which uploads are under way, and for
whom, is in the database; here is only what was received.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import unicodedata
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from safer_engine.errors import ArtifactError, SpecError
from safer_engine.publishing import write_failed
from safer_engine.store import digest_file
from service.errors import Conflict, NotFound, TooLarge
from service.infra.input_cache import InputCache
from service.infra.object_space import ObjectFacts, ObjectMissing, blob_name, plain
from service.infra.s3_client import LEAST_PART, S3Client
from service.infra.stores import Stores
from service.upload_names import UploadFile, file_list, upload_digest

_DONE = "done"
"""Name, beside the parts of a file, of what says that it is whole: its digest, which keeps it until the upload is complete."""
_LONGEST_NAME = 500


@dataclass(frozen=True)
class PartReceipt:
    """A part that was received. `digest`: sha256 of its bytes."""

    size: int
    digest: str


@dataclass(frozen=True)
class PartFacts:
    """A part that is there."""

    file: int
    part: int
    size: int


def checked_files(files: Iterable[UploadFile]) -> tuple[UploadFile, ...]:
    """The files, sorted by path, if their names may be used on any machine.

    Raises:
        SpecError: a name that leads out of its folder, is hidden, too long, not portable, given twice, or a folder of another.
    """
    found = tuple(sorted(files))
    seen: dict[str, str] = {}
    for file in found:
        _check_path(file.path)
        folded = unicodedata.normalize("NFC", file.path).casefold()
        if folded in seen:
            raise SpecError(f"{file.path!r} and {seen[folded]!r} are one name on some machines", "give each file its own name")
        seen[folded] = file.path
    for folded, path in seen.items():
        parts = folded.split("/")
        for length in range(1, len(parts)):
            if "/".join(parts[:length]) in seen:
                raise SpecError(f"{path!r} lies below a file of the same upload", "a name is a file or a folder")
    if not found:
        raise SpecError("an upload has no files", "name at least one")
    return found


def _check_path(path: str) -> None:
    parts = path.split("/")
    if not path or len(path.encode()) > _LONGEST_NAME:
        raise SpecError(f"a file name has {len(path.encode())} bytes", f"1 to {_LONGEST_NAME} are accepted")
    if any(part in ("", ".", "..") or part.startswith(".") or part != part.strip() or len(part.encode()) > 255 for part in parts):
        raise SpecError(f"{path!r} is no relative path of plain names", "no '..', no hidden files, no leading or trailing '/'")
    if any(unicodedata.category(letter)[0] == "C" or letter in '\\:*?"<>|' for letter in path):
        raise SpecError(f"{path!r} has letters that some machines do not keep in file names", "rename the file")


class UploadFiles:
    """The uploads of one project."""

    def __init__(self, stores: Stores, project: str) -> None:
        self.project = plain("project", project)
        self._stores = stores
        self._space = stores.space
        self._limit = stores.settings.upload_part_limit_bytes
        self._spool = stores.settings.folder / "cache" / "spool"

    @contextmanager
    def receive(self, upload_id: str, file: int, part: int) -> Iterator[PartSink]:
        """A sink for the bytes of one part, which counts once `PartSink.finish` was called. Raises SpecError for bad names."""
        name = self._part_name(upload_id, file, part)
        with PartSink(self._stores, name, self._limit, self._spool) as sink:
            yield sink

    def put_part(self, upload_id: str, file: int, part: int, chunks: Iterable[bytes], claim: PartReceipt) -> PartReceipt:
        """Receive a part whole.

        Args:
            claim: size and sha256 that the sender gave.

        Raises:
            SpecError: the bytes are not what was claimed; nothing is kept.
            TooLarge: more than a part may have.
        """
        with self.receive(upload_id, file, part) as sink:
            for chunk in chunks:
                sink.write(chunk)
            return sink.finish(claim)

    def presigned_part(self, upload_id: str, file: int, part: int, size: int, seconds: int = 3600) -> str | None:
        """A URL under which the sender may put exactly `size` bytes straight to S3; None where there is none. Never log it."""
        client = self._stores.s3
        if client is None or not self._stores.settings.presign:
            return None
        if size > self._limit:
            raise TooLarge(f"a part of {size} bytes is over the limit of {self._limit}", "send smaller parts")
        return client.presigned_put(self._part_name(upload_id, file, part), seconds, size)

    def parts(self, upload_id: str) -> tuple[PartFacts, ...]:
        """What is there of an upload, whichever way it came."""
        return tuple(facts for facts, _ in self._parts(upload_id))

    def complete(self, upload_id: str, files: Sequence[UploadFile]) -> str:
        """Check every file and make the upload exist; its digest. Doing it again is no error.

        Args:
            files: as they were declared: part (file, n) is of `files[file]`.

        Raises:
            Conflict: bytes of a file are missing, or it is not what was declared; its parts are then removed.
            SpecError: a name that may not be.
        """
        digest = upload_digest(checked_files(files))
        if not self.has(digest):
            by_file: dict[int, list[tuple[int, ObjectFacts]]] = {}
            for facts, found in self._parts(upload_id):
                by_file.setdefault(facts.file, []).append((facts.part, found))
            for index, file in enumerate(files):
                with self._stores.naming():
                    self._keep_file(upload_id, index, file, [found for _, found in sorted(by_file.get(index, []))])
            with self._stores.naming():
                self._require_blobs(upload_id, files)
                self._space.put(self._list_name(digest), file_list(files))
        self.abort(upload_id)
        return digest

    def abort(self, upload_id: str) -> None:
        """Remove what was received of an upload."""
        self._space.delete([found.name for found in self._space.listing(self._incoming(upload_id))])

    def received(self, upload_id: str | None = None) -> frozenset[str]:
        """Digests of the files that are whole of an upload that is not complete, or of all of the project."""
        prefix = f"incoming/{self.project}/" if upload_id is None else self._incoming(upload_id)
        found = set()
        for each in list(self._space.listing(prefix)):
            if each.name.endswith(f"/{_DONE}"):
                with suppress(ObjectMissing):  # completed or withdrawn meanwhile
                    found.add(self._space.get(each.name).decode())
        return frozenset(found)

    def has(self, digest: str) -> bool:
        """Whether this project has a complete upload of this digest."""
        return self._space.facts(self._list_name(digest)) is not None

    def files(self, digest: str) -> tuple[UploadFile, ...]:
        """The files of a complete upload. Raises NotFound."""
        try:
            listed = json.loads(self._space.get(self._list_name(digest)))
        except ObjectMissing:
            raise NotFound(f"there is no upload {digest[:12]}…", "upload the files again") from None
        return tuple(UploadFile(path, sha, size) for path, sha, size in listed)

    def stream(self, digest: str, path: str) -> Iterator[bytes]:
        """Bytes of one file of a complete upload, not checked again. Raises NotFound."""
        for file in self.files(digest):
            if file.path == path:
                return self._space.stream(blob_name(file.digest), 0, file.size)
        raise NotFound(f"upload {digest[:12]}… has no file {path[:100]!r}")

    def materialise(self, digest: str, folder: Path) -> None:
        """Write a complete upload's files into a new folder, each checked against its sha256.

        Raises:
            NotFound: there is no such upload.
            ArtifactError: a file is missing or damaged; the folder is not to be used.
            ResourceError: the disk is full.
        """
        files = self.files(digest)
        if upload_digest(checked_files(files)) != digest:
            raise ArtifactError(f"the list of upload {digest[:12]}… is damaged", "upload the files again")
        try:
            folder.mkdir(parents=True)
            for file in files:
                path = folder / file.path
                path.parent.mkdir(parents=True, exist_ok=True)
                self._fetch(file, path)
        except OSError as error:
            raise write_failed(folder, error) from error

    @contextmanager
    def on_disk(self, digest: str, cache: InputCache) -> Iterator[Path]:
        """The folder of a complete upload in this machine's cache, kept there until the context ends. Raises as `materialise`."""
        size = sum(file.size for file in self.files(digest))
        with cache.entry(digest, lambda folder: self.materialise(digest, folder), size) as path:
            yield path

    def remove(self, digest: str) -> None:
        """Remove a complete upload; its blobs go with the next collection."""
        self._space.delete([self._list_name(digest)])

    def complete_uploads(self) -> list[ObjectFacts]:
        """The lists of all complete uploads; `name` is the digest alone."""
        prefix = f"uploads/{self.project}/"
        found = self._space.listing(prefix)
        return [ObjectFacts(each.name.removeprefix(prefix).removesuffix(".json"), each.size, each.changed) for each in found]

    def _fetch(self, file: UploadFile, path: Path) -> None:
        try:
            self._space.fetch(blob_name(file.digest), path, file.size)
        except ObjectMissing:
            raise ArtifactError(f"{file.path} of an upload is missing from the store", "upload the files again") from None
        if digest_file(path) != file.digest:
            path.unlink()
            raise ArtifactError(f"{file.path} of an upload is damaged in the store", "upload the files again")

    def _keep_file(self, upload_id: str, index: int, file: UploadFile, parts: list[ObjectFacts]) -> None:
        """Make the parts of a file a blob, if they are what was declared."""
        done = f"{self._incoming(upload_id)}{index}/{_DONE}"
        if self._space.facts(done) is not None:
            return
        got = sum(part.size for part in parts)
        if got != file.size:
            raise Conflict(f"{file.path} has {got} of {file.size} bytes", "send the parts that are missing, then complete again")
        if not self._join(parts, file):
            self._space.delete([part.name for part in parts])
            raise Conflict(f"{file.path} is not what was declared: its sha256 differs", "send its parts again")
        self._space.put(done, file.digest.encode())
        self._space.delete([part.name for part in parts])

    def _require_blobs(self, upload_id: str, files: Sequence[UploadFile]) -> None:
        """See that no file that was kept by an earlier attempt has been collected since. Raises Conflict."""
        for index, file in enumerate(files):
            found = self._space.facts(blob_name(file.digest))
            if found is None or found.size != file.size:
                self._space.delete([f"{self._incoming(upload_id)}{index}/{_DONE}"])
                raise Conflict(f"{file.path} was received too long ago", "send its parts again, then complete again")

    def _join(self, parts: list[ObjectFacts], file: UploadFile) -> bool:
        """Hash the parts one after another and keep them as a blob; False when they are not the file that was declared."""
        client = self._stores.s3
        if client is not None and parts and all(part.size >= LEAST_PART for part in parts[:-1]):
            return self._join_in_s3(client, parts, file)
        self._spool.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._spool) as folder:
            whole, sha = Path(folder) / "file", hashlib.sha256()
            try:
                with whole.open("wb") as handle:
                    for part in parts:
                        for chunk in self._space.stream(part.name, 0, part.size):
                            sha.update(chunk)
                            handle.write(chunk)
                if sha.hexdigest() != file.digest:
                    return False
                self._space.put_file(blob_name(file.digest), whole)
            except OSError as error:
                raise write_failed(whole, error) from error
        return True

    def _join_in_s3(self, client: S3Client, parts: list[ObjectFacts], file: UploadFile) -> bool:
        """As `_join`. What is hashed is a copy that the sender cannot reach, whose URLs for the parts may still be good."""
        staged = f"staged/{self.project}/upload/{uuid.uuid4().hex}"
        try:
            client.join(parts, staged)
            sha = hashlib.sha256()
            for chunk in client.stream(staged, 0, file.size):
                sha.update(chunk)
            found = client.facts(staged)
            if found is None or found.size != file.size or sha.hexdigest() != file.digest:
                return False
            client.copy(found, blob_name(file.digest))
            return True
        finally:
            client.delete([staged])

    def _parts(self, upload_id: str) -> Iterator[tuple[PartFacts, ObjectFacts]]:
        prefix = self._incoming(upload_id)
        for found in self._space.listing(prefix):
            file, _, part = found.name.removeprefix(prefix).partition("/")
            if file.isdecimal() and part.isdecimal():
                yield PartFacts(int(file), int(part), found.size), found

    def _incoming(self, upload_id: str) -> str:
        return f"incoming/{self.project}/{plain('upload', upload_id)}/"

    def _part_name(self, upload_id: str, file: int, part: int) -> str:
        if file < 0 or part < 0:
            raise SpecError("files and parts are numbered from 0")
        return f"{self._incoming(upload_id)}{file}/{part}"

    def _list_name(self, digest: str) -> str:
        return f"uploads/{self.project}/{plain('digest', digest)}.json"


class PartSink:
    """Takes the bytes of one part as they come, into a temporary file; see `UploadFiles.receive`."""

    def __init__(self, stores: Stores, name: str, limit: int, spool: Path) -> None:
        self._stores = stores
        self._name = name
        self._limit = limit
        self._spool = spool
        self._sha = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> PartSink:
        self._spool.mkdir(parents=True, exist_ok=True)
        self._handle: IO[bytes] = tempfile.NamedTemporaryFile(dir=self._spool)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._handle.close()

    def write(self, chunk: bytes) -> None:
        """Take more bytes. Raises TooLarge, ResourceError."""
        self._size += len(chunk)
        if self._size > self._limit:
            raise TooLarge(f"a part is over the limit of {self._limit} bytes", "send smaller parts")
        self._sha.update(chunk)
        try:
            self._handle.write(chunk)
        except OSError as error:
            raise write_failed(Path(self._name), error) from error

    def finish(self, claim: PartReceipt) -> PartReceipt:
        """Keep the part, if it is what the sender claimed. Raises SpecError."""
        if self._size != claim.size:
            raise SpecError(f"the part has {self._size} bytes, not {claim.size}", "send it again")
        if self._sha.hexdigest() != claim.digest:
            raise SpecError("the part's sha256 is not the one that was given", "send it again")
        try:
            self._handle.flush()
        except OSError as error:
            raise write_failed(Path(self._name), error) from error
        self._stores.space.put_file(self._name, Path(self._handle.name))
        return PartReceipt(self._size, claim.digest)
