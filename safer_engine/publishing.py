"""Files that appear whole or not at all, and what is said where they cannot be written."""

from __future__ import annotations

import errno
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safer_engine.errors import ResourceError, SpecError

DISK_HINT = "free disk space and run again"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST)
_FORBIDDEN = (errno.EPERM, errno.EACCES, errno.EROFS)


@contextmanager
def publishing(final: Path, staging: Path | None = None) -> Iterator[Path]:
    """Yields a temporary path; on a clean exit the file written there takes its place at `final` at once, to last.

    Readers see the old file or the new one, never a part.

    Args:
        staging: folder for the temporary file, on the file system of `final`, whose own folder must be there. By default it
            is written beside `final`, whose folder is made where it is missing.

    Raises:
        ResourceError: an OSError while the file was written or put in its place.
    """
    temporary = (staging or final.parent) / f".{final.name}.{uuid.uuid4().hex}"
    try:
        if staging is None:
            final.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, final)
            sync(final.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise write_failed(final, error) from error
    except BaseException as error:  # of a library that says in its own way that the disk is full
        if not is_full(error):
            raise
        raise write_failed(final, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error


def withdraw(path: Path) -> None:
    """Remove a file, if it is there. Raises ResourceError."""
    try:
        path.unlink(missing_ok=True)
    except NotADirectoryError:
        return  # something else stands where its folder would be
    except OSError as error:
        raise write_failed(path, error) from error


def link(path: Path, other: Path) -> None:
    """Give a file another name, also while others replace it: of two names of one moment, the later file gets it.

    Linux refuses to link a file that was replaced after its name was looked up, with the error of a file that is not there.
    """
    while True:
        try:
            os.link(path, other)
        except FileNotFoundError:
            if not path.exists():
                raise
        else:
            return


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(folder: Path, what: str) -> None:
    """Make a folder, and see that a file can be made in it.

    Args:
        what: its name in the message, for example `--store`.

    Raises:
        SpecError: it is a file, lies below one, or this user may not write to it.
        ResourceError: the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # without a name that others, who tidy up there, could find and remove
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise SpecError(f"{what} {folder} is no folder: {error.strerror}", "name a folder, or a place for a new one") from error
    except OSError as error:
        if error.errno in _FULL:
            raise write_failed(folder, error) from error
        raise SpecError(
            f"{what} {folder} cannot be written: {error.strerror or error}", "name a folder that this user may write to"
        ) from error


def require_usable(folder: Path, what: str) -> None:
    """As `require_writable`, of a folder that the machine provides and no request names: a ResourceError, which may pass."""
    try:
        require_writable(folder, what)
    except SpecError as error:
        raise ResourceError(error.message, error.hint) from error


def keep_aside(path: Path) -> Path:
    """Rename a file to the first free of `NAME.bak`, `NAME.bak2`, …, and return that. Raises OSError."""
    number = 1
    while os.path.lexists(kept := path.with_name(f"{path.name}.bak{number if number > 1 else ''}")):
        number += 1
    os.rename(path, kept)
    return kept


def is_full(error: BaseException) -> bool:
    """Whether an error is, or comes from, a disk that is full; safetensors says so in words only."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in _FULL:
            return True
        if any(f"(os error {number})" in str(found) for number in _FULL):
            return True
        found = found.__cause__ or found.__context__
    return False


def write_failed(path: Path, error: OSError) -> ResourceError:
    """What to raise when a file cannot be written, with a hint that follows from the cause."""
    hint = "check the disk and run again"
    if error.errno in _FULL:
        hint = DISK_HINT
    elif error.errno in _NO_FOLDER:
        hint = "name a file in a folder that is there, or can be made"
    elif error.errno in _FORBIDDEN:
        hint = "let this user write there, or name another folder"
    return ResourceError(f"cannot write {path}: {error.strerror or error}", hint)
