"""Receiving a file: streamed, resumed where it broke, and kept only when its digest is right."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from safer_engine.errors import ArtifactError
from safer_engine.publishing import write_failed
from service.client.connection import Connection, Patience
from service.client.files import TransferObserver
from service.errors import Unreachable

if TYPE_CHECKING:
    from service.schemas import ArtifactView


_DIRECT = "?redirect=true"
"""Asks for the object store's own address, which may be one that only the service reaches: a second attempt does without."""


def target_of(folder: Path, name: str) -> Path:
    """Where an artifact's file goes below a folder. Raises ArtifactError for a name that would leave it."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or any(part in ("..", ".") or "\0" in part for part in parts):
        raise ArtifactError(f"the service names a file {name!r}, which is not a relative path", "do not trust this service")
    return folder.joinpath(*parts)


def receive(
    connection: Connection, path: str, expected: ArtifactView, target: Path, observer: TransferObserver, patience: Patience
) -> bool:
    """Get a file into `target`. False: it was there already.

    What came of an interrupted transfer stays beside the target, named by the digest, and is gone on from.

    Raises:
        Unreachable: the connection broke, and broke again without a byte more.
        ArtifactError: the content is not what the service said.
        ResourceError: it cannot be written.
    """
    if _is_there(target, expected):
        return False
    observer.begin("receiving", expected.size)
    partial = target.with_name(f".{target.name}.{expected.digest[:16]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fill(connection, path, expected, partial, observer, patience)
        if partial.stat().st_size != expected.size or _digest(partial) != expected.digest:
            partial.unlink()
            raise ArtifactError(f"{expected.name} came with other content than the service promised", "download it again")
        partial.replace(target)
    except OSError as error:
        raise write_failed(target, error) from error
    return True


def read(connection: Connection, path: str, expected: ArtifactView) -> bytes:
    """A small file as a whole.

    Raises:
        Unreachable: the connection broke.
        ArtifactError: the content is not what the service said.
    """
    with connection.stream(path, {"Accept-Encoding": "identity"}) as response:
        content = response.read()
    if len(content) != expected.size or hashlib.sha256(content).hexdigest() != expected.digest:
        raise ArtifactError(f"{expected.name} came with other content than the service promised", "try again")
    return content


def _fill(
    connection: Connection, path: str, expected: ArtifactView, partial: Path, observer: TransferObserver, patience: Patience
) -> None:
    """Append to the partial file until it is whole; attempts count only while nothing comes."""
    failures = 0
    observer.advance(partial.stat().st_size if partial.exists() else 0)
    while True:
        have = partial.stat().st_size if partial.exists() else 0
        if have >= expected.size and (have or partial.exists()):
            return
        try:
            _append(connection, path if failures else f"{path}{_DIRECT}", expected, partial, have, observer)
        except Unreachable:
            came = partial.exists() and partial.stat().st_size > have
            failures = 0 if came else failures + 1
            if failures >= patience.attempts:
                raise
            time.sleep(patience.pause(failures))


def _append(
    connection: Connection, path: str, expected: ArtifactView, partial: Path, have: int, observer: TransferObserver
) -> None:
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with connection.stream(path, headers) as response:
        partial_content = response.status_code == 206
        if have and not partial_content:
            observer.advance(-have)
        with partial.open("ab" if partial_content else "wb") as file:
            for chunk in response.iter_raw():  # a chunk size would hold back, and lose, what came before a break
                file.write(chunk)
                observer.advance(len(chunk))
    if partial.stat().st_size < expected.size:
        raise Unreachable(f"the transfer of {expected.name} ended early", "run the command again: it goes on where it stopped")


def _is_there(target: Path, expected: ArtifactView) -> bool:
    return target.is_file() and target.stat().st_size == expected.size and _digest(target) == expected.digest


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
