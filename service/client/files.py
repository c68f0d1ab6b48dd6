"""Local files on their way to the service: what is sent, and the name that a spec gives them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from safer_engine.errors import DatasetRefused
from service.upload_names import UploadFile, upload_digest, upload_name

_CHUNK = 1 << 20
_LONGEST_TITLE = 200


class TransferObserver:
    """Is told how far reading and sending have come; shows nothing. Called from several threads."""

    def begin(self, what: str, total: int) -> None:
        """A phase begins: `reading`, `sending` or `receiving` so many bytes."""

    def advance(self, count: int) -> None:
        """So many bytes more; negative where some have to be sent again."""


@dataclass(frozen=True)
class LocalFile:
    """One file. `name`: relative path with `/`, as the service will know it."""

    path: Path
    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class LocalFiles:
    """The files of one input, sorted by name. `title`: what people call them."""

    files: tuple[LocalFile, ...]
    title: str = ""

    @property
    def digest(self) -> str:
        """What the service calls the digest of an upload of these files."""
        return upload_digest(UploadFile(file.name, file.digest, file.size) for file in self.files)

    @property
    def name(self) -> str:
        """What a spec names these files."""
        return upload_name(self.digest)

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(file.size for file in self.files)


def read_files(root: Path, paths: Iterable[Path], observer: TransferObserver) -> LocalFiles:
    """Take size and digest of files under `root` (of one file: `root` is its folder). Raises DatasetRefused for none."""
    chosen = sorted({path.relative_to(root).as_posix(): path for path in paths}.items())
    if not chosen:
        raise DatasetRefused(f"there are no files to send in {root}", "check the path")
    observer.begin("reading", sum(path.stat().st_size for _, path in chosen))
    called = chosen[0][1].name if len(chosen) == 1 else root.resolve().name
    title = "".join(letter for letter in called if letter.isprintable())[:_LONGEST_TITLE]
    return LocalFiles(tuple(_read(path, name, observer.advance) for name, path in chosen), title)


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder but hidden ones and those in hidden folders. Links to files are followed, to folders not."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".") and Path(parent, name).is_file()]
    return found


def _read(path: Path, name: str, advance: Callable[[int], None]) -> LocalFile:
    sha, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                sha.update(chunk)
                size += len(chunk)
                advance(len(chunk))
    except OSError as error:
        raise DatasetRefused(f"cannot read {path}: {error.strerror}", "check the file") from error
    return LocalFile(path, name, size, sha.hexdigest())
