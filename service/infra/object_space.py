"""Named objects that appear whole or not at all: what artifacts, work areas and uploads are laid out on.

Names, the same in a folder and in a bucket::

    blobs/ab/abcd…                                 bytes by sha256, of all projects
    manifests/<project>/<stage>/<key>.json         committed artifacts
    work/<project>/<stage>-<key>/payload|scratch/… resumable work
    uploads/<project>/<digest>.json                complete uploads: path, size and sha256 of each file, which is a blob
    incoming/<project>/<upload>/<file>/<part>      parts of uploads that are not complete
    damaged/<project>/<stage>/<key>.<id>.json      records of artifacts that were found damaged, as they were found
    staged/<project>/…                             what is being put together, in a bucket
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safer_engine.errors import ArtifactError, SpecError
from safer_engine.publishing import publishing

CHUNK = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class ObjectMissing(ArtifactError):
    """There is no object of this name."""


@dataclass(frozen=True)
class ObjectFacts:
    """One object.

    Attributes:
        changed: seconds since the epoch, by the clock of whoever keeps it.
    """

    name: str
    size: int
    changed: float


class ObjectSpace(Protocol):
    """Objects by name, with `/` between the parts of a name."""

    def now(self) -> float:
        """The time by the clock that `ObjectFacts.changed` is counted by. Raises SaferError where it cannot be told."""

    def facts(self, name: str) -> ObjectFacts | None:
        """Size and time of an object; None where there is none."""

    def get(self, name: str) -> bytes:
        """A small object. Raises ObjectMissing."""

    def stream(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Bytes [start, stop) of an object. Raises ObjectMissing."""

    def put(self, name: str, data: bytes) -> None:
        """Write a small object, in place of what was there."""

    def put_file(self, name: str, path: Path) -> None:
        """Write an object from a file."""

    def fetch(self, name: str, path: Path, size: int) -> None:
        """Write an object of known size to a new file. Raises ObjectMissing, ArtifactError when the size differs."""

    def listing(self, prefix: str) -> Iterator[ObjectFacts]:
        """Objects whose names begin with `prefix`, which ends with `/`."""

    def folders(self, prefix: str) -> list[str]:
        """The different next parts of names that begin with `prefix`, which ends with `/`; sorted."""

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there are no error."""


def blob_name(digest: str) -> str:
    """Name of the object with these bytes."""
    return f"blobs/{digest[:2]}/{digest}"


def plain(what: str, value: str) -> str:
    """The value, if it may be one part of an object's name. Raises SpecError."""
    if not _NAME.fullmatch(value):
        raise SpecError(f"{what} {value[:100]!r} is no plain name", "letters, digits, '.', '_' and '-', at most 100")
    return value


class FolderSpace:
    """Objects as files of a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        """The file of an object. Raises SpecError for a name that leads elsewhere."""
        if name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
            raise SpecError(f"{name[:100]!r} is no object's name")
        return self.root / name

    def now(self) -> float:
        """See `ObjectSpace.now`. The folder may lie on another machine, so its own time is asked for; that needs no space."""
        try:
            os.utime(self.root)
            return self.root.stat().st_mtime
        except FileNotFoundError:
            return time.time()  # there is nothing yet whose age could be asked for
        except OSError as error:
            raise SpecError(f"the artifact store's folder cannot be written: {error.strerror}", "run this as its user") from error

    def facts(self, name: str) -> ObjectFacts | None:
        """See `ObjectSpace.facts`."""
        try:
            found = self.path(name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return ObjectFacts(name, found.st_size, found.st_mtime)

    def get(self, name: str) -> bytes:
        """See `ObjectSpace.get`."""
        try:
            return self.path(name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise ObjectMissing(f"{name} is not in the store") from None

    def stream(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """See `ObjectSpace.stream`."""
        try:
            with self.path(name).open("rb") as handle:
                handle.seek(start)
                left = None if stop is None else stop - start
                while left is None or left > 0:
                    chunk = handle.read(CHUNK if left is None else min(CHUNK, left))
                    if not chunk:
                        return
                    left = None if left is None else left - len(chunk)
                    yield chunk
        except (FileNotFoundError, NotADirectoryError):
            raise ObjectMissing(f"{name} is not in the store") from None

    def put(self, name: str, data: bytes) -> None:
        """See `ObjectSpace.put`."""
        with publishing(self.path(name)) as temporary:
            temporary.write_bytes(data)

    def put_file(self, name: str, path: Path) -> None:
        """See `ObjectSpace.put_file`. The file becomes the object where both lie on one file system."""
        with publishing(self.path(name)) as temporary:
            link_or_copy(path, temporary)

    def fetch(self, name: str, path: Path, size: int) -> None:
        """See `ObjectSpace.fetch`."""
        try:
            link_or_copy(self.path(name), path)
        except FileNotFoundError:
            raise ObjectMissing(f"{name} is not in the store") from None
        if path.stat().st_size != size:
            path.unlink()
            raise ArtifactError(f"{name} in the store is damaged: its size differs")

    def listing(self, prefix: str) -> Iterator[ObjectFacts]:
        """See `ObjectSpace.listing`."""
        for folder, _, names in os.walk(self.root / prefix):
            for name in names:
                if name.startswith("."):
                    continue  # being written
                path = Path(folder) / name
                found = self.facts(path.relative_to(self.root).as_posix())
                if found is not None:
                    yield found

    def folders(self, prefix: str) -> list[str]:
        """See `ObjectSpace.folders`."""
        try:
            return sorted(entry.name for entry in os.scandir(self.root / prefix) if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def delete(self, names: Iterable[str]) -> None:
        """See `ObjectSpace.delete`. Folders left empty are removed too."""
        for name in names:
            path = self.path(name)
            path.unlink(missing_ok=True)
            for folder in path.relative_to(self.root).parents:
                if len(folder.parts) < 2:
                    break
                try:
                    (self.root / folder).rmdir()
                except OSError:
                    break  # not empty


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` another name of a file, or a copy of it where links do not reach. Raises OSError."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
