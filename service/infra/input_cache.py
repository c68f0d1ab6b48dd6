"""Files and folders by content, kept on this machine under a limit of bytes; the least recently used go first.

Several processes may share a cache. An entry is made aside and takes its place whole; what a killed process left is removed
when the cache is next opened. An entry in use is pinned: each process writes the digests it uses into a file that it keeps
locked for as long as it lives, and eviction passes over what any living process has written.

::

    <folder>/<digest>            an entry: a file or a folder
    <folder>/.facts/<digest>     names, sizes and times of its files: an entry that differs is torn and is made anew
    <folder>/.making/            entries being made, and the locks of who makes them
    <folder>/.pins/              one file per process
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safer_engine.publishing import require_usable, sync, write_failed
from service.infra.object_space import plain


@dataclass(frozen=True)
class Kept:
    """An entry of the cache. `used`: seconds since the epoch."""

    digest: str
    size: int
    used: float


class InputCache:
    """A cache in one folder (see the module's picture); may be used by many threads."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Open a cache, and remove what killed processes left unfinished.

        Args:
            limit: bytes of all entries together. What is pinned is kept even beyond it.

        Raises:
            ResourceError: the folder cannot be made or written, here and now: no fault of what is to be cached.
        """
        self.folder = folder
        self.limit = limit
        self._facts, self._making, self._pins = (folder / name for name in (".facts", ".making", ".pins"))
        for each in (folder, self._facts, self._making, self._pins):
            require_usable(each, "the cache folder")
        self._counts: Counter[str] = Counter()
        self._own_lock = threading.RLock()
        self._pid, self._pin_path = 0, folder
        self._remove_unfinished()

    @contextmanager
    def entry(self, digest: str, make: Callable[[Path], None], size: int = 0) -> Iterator[Path]:
        """The entry of a digest, pinned until the context ends; made first where it is missing.

        Args:
            make: writes the file or folder at the path it is given, where there is nothing yet; what it raises is passed on.
            size: bytes to make room for.
        """
        path = self.pin(digest, make, size)
        try:
            yield path
        finally:
            self.unpin(digest)

    def pin(self, digest: str, make: Callable[[Path], None], size: int = 0) -> Path:
        """As `entry`, pinned until `unpin`, or until this process ends. Raises ResourceError when the disk is full."""
        plain("digest", digest)
        self._count(digest, 1)
        try:
            if not self._hit(digest):
                self._make_once(digest, make, size)
        except BaseException:
            self.unpin(digest)
            raise
        return self.folder / digest

    def unpin(self, digest: str) -> None:
        """Let an entry go that `pin` gave."""
        self._count(digest, -1)

    def adopt(self, digest: str, path: Path) -> Path:
        """Take a finished file, on the cache's file system, as the entry of a digest, and pin it."""
        return self.pin(digest, lambda target: os.replace(path, target), path.stat().st_size)

    def drop(self, digest: str) -> None:
        """Remove an entry that turned out to be damaged, pinned or not."""
        with self._exclusively():
            self._remove(digest)

    def entries(self) -> list[Kept]:
        """What is kept, least recently used first."""
        found = []
        for path in self._facts.glob("[!.]*"):
            with suppress(FileNotFoundError, ValueError):
                files = json.loads(path.read_bytes())
                found.append(Kept(path.name, sum(size for _, size, _ in files), path.stat().st_mtime))
        return sorted(found, key=lambda each: (each.used, each.digest))

    def shrink(self, room: int = 0) -> list[str]:
        """Evict what is over the limit, less `room` bytes; the digests that went."""
        with self._exclusively():
            kept = self.entries()
            over = sum(each.size for each in kept) + room - self.limit
            pinned = self._pinned() if over > 0 else frozenset()
            gone = []
            for each in kept:
                if over <= 0:
                    break
                if each.digest not in pinned:
                    self._remove(each.digest)
                    over -= each.size
                    gone.append(each.digest)
        return gone

    def _hit(self, digest: str) -> bool:
        """Whether the entry is there and whole; it counts as used just now."""
        facts = self._facts / digest
        try:
            whole: bool = json.loads(facts.read_bytes()) == _files(self.folder / digest)
        except (FileNotFoundError, ValueError):
            return False
        if whole:
            with suppress(FileNotFoundError):
                os.utime(facts)
        return whole

    def _make_once(self, digest: str, make: Callable[[Path], None], size: int) -> None:
        with self._making_of(digest):
            if self._hit(digest):
                return  # made while we waited
            self.shrink(size)
            temporary = self._making / f"{digest}.{uuid.uuid4().hex}"
            try:
                make(temporary)
                _sync_all(temporary)
                with self._exclusively():
                    self._remove(digest)
                    (self._facts / f".{digest}").write_text(json.dumps(_files(temporary)))
                    os.replace(temporary, self.folder / digest)
                    os.replace(self._facts / f".{digest}", self._facts / digest)
            except OSError as error:
                raise write_failed(self.folder / digest, error) from error
            finally:
                _remove_path(temporary)
        if not size:
            self.shrink()

    @contextmanager
    def _making_of(self, digest: str) -> Iterator[None]:
        """Hold the lock of who makes an entry; the lock's file is gone when nobody does."""
        path = self._making / f"{digest}.lock"
        while True:
            with path.open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _is_file_of(path, lock.fileno()):
                    continue  # removed by the one who held it before
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        with (self._making / ".index").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _count(self, digest: str, change: int) -> None:
        """Change how often this process pins an entry; what it pins is on disk before this returns."""
        with self._own_lock:
            before = self._counts[digest]
            self._counts[digest] = before + change
            if before and before + change:
                return
            if not before + change:
                del self._counts[digest]
            with self._exclusively():
                self._own_pins().write_text("\n".join(sorted(self._counts)))

    def _own_pins(self) -> Path:
        """This process's file of pins, locked for as long as it lives; a forked child gets its own."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._pin_path = self._pins / f"{self._pid}.{uuid.uuid4().hex}"
            self._pin_file = self._pin_path.open("w")
            fcntl.flock(self._pin_file, fcntl.LOCK_EX)
        return self._pin_path

    def _pinned(self) -> frozenset[str]:
        found: set[str] = set()
        for path in self._pins.iterdir():
            with suppress(FileNotFoundError), path.open() as handle:
                if path != self._pin_path and _is_free(handle.fileno()):
                    path.unlink(missing_ok=True)
                else:
                    found.update(handle.read().split())
        return frozenset(found)

    def _remove(self, digest: str) -> None:
        (self._facts / digest).unlink(missing_ok=True)
        _remove_path(self.folder / digest)

    def _remove_unfinished(self) -> None:
        for path in self._making.glob("*.*"):
            digest = path.name.split(".")[0]
            if digest and path.suffix != ".lock":
                with (self._making / f"{digest}.lock").open("a") as lock:
                    if _is_free(lock.fileno()):
                        _remove_path(path)
                        Path(lock.name).unlink(missing_ok=True)
        with self._exclusively():
            for path in self.folder.glob("[!.]*"):
                if not (self._facts / path.name).is_file():
                    _remove_path(path)


def _is_free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_file_of(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _files(root: Path) -> list[list[object]]:
    """[name, size, time of last change in ns] of a file, or of each file of a folder. Raises FileNotFoundError."""
    if root.is_file():
        found = [root]
    elif root.is_dir():
        found = sorted(path for path in root.rglob("*") if path.is_file())
    else:
        raise FileNotFoundError(root)
    return [[path.relative_to(root).as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in found]


def _sync_all(root: Path) -> None:
    for path in (root, *root.rglob("*")) if root.is_dir() else (root,):
        sync(path)


def _remove_path(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
