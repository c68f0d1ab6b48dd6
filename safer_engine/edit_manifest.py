"""The record beside an edited dataset from which it can be restored."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from safer_engine.errors import InputRefused
from safer_engine.publishing import sync, write_failed
from safer_engine.store import digest_bytes, digest_file

Kind = Literal["jsonl", "json", "csv", "parquet", "saved", "folder"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _inside(name: str) -> str:
    """A relative path that stays where it is looked up: a manifest must not name files elsewhere."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is not a path inside the dataset")
    return name


def _plain(name: str) -> str:
    if len(PurePosixPath(_inside(name)).parts) != 1:
        raise ValueError(f"{name!r} is not the name of a file")
    return name


class Change(_Part):
    """A row that was removed or flipped."""

    row: int
    pair_id: str
    content_digest: str
    action: Literal["drop", "flip"]


class Splice(_Part):
    """Where the edited text differs: the `length` bytes at byte `at` stand for `original`."""

    at: int
    length: int
    original: str


class TextRecord(_Part):
    """How to restore a text file. Digests are of the uncompressed content."""

    form: Literal["text"] = "text"
    original_digest: str
    output_digest: str
    splices: list[Splice]


class TableRecord(_Part):
    """How to restore a table: the original rows of all changes lie in the removed file, in their order."""

    form: Literal["table"] = "table"
    output_digest: str
    removed_digest: str
    split: str | None = None
    row_group: int | None = None


class CopyRecord(_Part):
    """Nothing changed: what was written is a copy. The digest is of the uncompressed content, or of a folder's files."""

    form: Literal["copy"] = "copy"
    output_digest: str


FileRecord = Annotated[TextRecord | TableRecord | CopyRecord, Field(discriminator="form")]


class FilePart(_Part):
    """One file of a folder: it holds the rows from `start` on; `removed` lies in the folder of removed rows."""

    name: Annotated[str, AfterValidator(_inside)]
    kind: Literal["jsonl", "json", "csv", "parquet"]
    start: int
    n_rows: int
    removed: Annotated[str, AfterValidator(_inside)] | None
    record: FileRecord


class FolderRecord(_Part):
    """How to restore a folder of files: file by file, in the order in which their rows are read."""

    form: Literal["folder"] = "folder"
    files: list[FilePart]


Record = TextRecord | TableRecord | CopyRecord | FolderRecord


class EditManifest(_Part):
    """`<out>.safer-edits.json`. `removed` is None where nothing changed; the digests are of folders, file names included."""

    manifest_version: Literal[1] = 1
    dataset: str
    kind: Kind
    removed: Annotated[str, AfterValidator(_plain)] | None
    edits_digest: str
    actions: list[str]
    budget: float | None
    n_rows: int
    changes: list[Change]
    record: Record = Field(discriminator="form")
    restored_digest: str | None = None
    out_digest: str | None = None
    removed_digest: str | None = None


def manifest_path(out: Path) -> Path:
    """Where the manifest of an edited dataset lies."""
    return out.with_name(f"{out.name}.safer-edits.json")


def removed_path(out: Path, kind: str) -> Path:
    """Where what was removed lies, in the dataset's own format."""
    if kind in ("saved", "folder"):
        return out.with_name(f"{out.name}.removed")
    stem = out.name.removesuffix(".gz")
    return out.with_name(f"{Path(stem).stem}.removed{Path(stem).suffix}")


def read_manifest(out: Path) -> EditManifest:
    """The manifest of an edited dataset. Raises InputRefused when there is none or it is damaged."""
    path = manifest_path(out)
    try:
        return EditManifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputRefused(f"cannot read {path}: {error.strerror or error}", "give the --out of an earlier apply") from error
    except ValidationError as error:
        raise InputRefused(
            f"{path} is damaged: {error.errors()[0]['msg']}", "restore the file, or go back to the dataset"
        ) from error


def digest_path(path: Path) -> str:
    """sha256 of a file, or of a folder's file names and contents. Raises OSError when it cannot be read."""
    if not path.is_dir():
        return digest_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return digest_bytes("\n".join(f"{file.relative_to(path).as_posix()} {digest_file(file)}" for file in files).encode())


@contextmanager
def publishing(final: Path) -> Iterator[Path]:
    """Yields a temporary path beside `final`; on a clean exit the file or folder written there takes its place at once."""
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}{''.join(final.suffixes[-2:])}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        _replace(temporary, final)
    except OSError as error:
        raise write_failed(final, error) from error
    finally:
        discard(temporary)


def _replace(temporary: Path, final: Path) -> None:
    """A file replaces a file at once; a folder (which cannot be replaced) is moved aside first, and back on failure."""
    if not (final.is_dir() or (final.exists() and temporary.is_dir())):
        os.replace(temporary, final)
        return
    aside = final.with_name(f".{final.name}.{uuid.uuid4().hex}.old")
    os.replace(final, aside)
    try:
        os.replace(temporary, final)
    except OSError:
        os.replace(aside, final)
        raise
    discard(aside)


def discard(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def _sync(path: Path) -> None:
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            sync(file)
