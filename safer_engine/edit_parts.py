"""Write and restore the files of an edited dataset: one file, a `save_to_disk` folder, or a folder of several files."""

from __future__ import annotations

import shutil
import zlib
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_engine.edit_manifest import (
    Change,
    CopyRecord,
    EditManifest,
    FilePart,
    FileRecord,
    FolderRecord,
    Kind,
    Record,
    TableRecord,
    TextRecord,
    digest_path,
    discard,
)
from safer_engine.edit_tables import Places
from safer_engine.errors import DatasetRefused, InputRefused

if TYPE_CHECKING:
    from safer_engine.science.pair_formats import Layout


@dataclass(frozen=True)
class Plan:
    """What changes in a dataset, or in one of its files.

    Attributes:
        changes: in the order of the rows, which are counted from the dataset's (the file's) first.
        split: the one that is edited, where a folder holds several.
    """

    kind: Kind
    changes: list[Change]
    n_rows: int
    layout: Layout
    split: str | None

    def flip(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its preference swapped. Raises DatasetRefused."""
        from safer_engine.science.flipping import flip_row

        return flip_row(row, self.layout)


def write(places: Places, plan: Plan) -> Record:
    """Write the edited dataset and, where something changes, the changed rows as they were; returns how to restore it.

    Raises:
        DatasetRefused: rows cannot be located or flipped.
    """
    if plan.kind == "folder":
        return _write_folder(places, plan)
    return _write_one(places, plan)


def restore(places: Places, manifest: EditManifest) -> None:
    """Write the original. Raises ArtifactError when it does not come out."""
    if isinstance(manifest.record, FolderRecord):
        _restore_folder(places, manifest, manifest.record)
    else:
        _restore_one(places, manifest.record, manifest.changes, manifest.n_rows)


def check_untouched(out: Path, removed: Path | None, manifest: EditManifest) -> None:
    """Raise InputRefused when what apply wrote cannot be read or was changed since."""
    try:
        changed = next(_changed(out, removed, manifest.record), None)
    except (OSError, EOFError, zlib.error) as error:
        raise InputRefused(f"cannot read what was edited: {error}", "put the files back as apply wrote them") from error
    if changed is not None:
        raise InputRefused(
            f"{changed} was changed since the edits were applied, so the original cannot be restored from it",
            "put it back as apply wrote it, or go back to the original dataset",
        )


def _write_one(places: Places, plan: Plan) -> FileRecord:
    from safer_engine import edit_tables

    if not plan.changes:
        return _copy(places)
    if plan.kind in ("jsonl", "json", "csv"):
        return _write_text(places, plan)
    split, row_group = None, None
    if plan.kind == "parquet":
        row_group = edit_tables.edit_parquet(places, plan.changes, plan.flip)
    else:
        split = edit_tables.edit_saved(places, plan.split, plan.changes, plan.flip)
    digests = digest_path(places.target), digest_path(places.removed)
    return TableRecord(output_digest=digests[0], removed_digest=digests[1], split=split, row_group=row_group)


def _copy(places: Places) -> CopyRecord:
    """The same bytes; packed or unpacked where the names differ in `.gz`."""
    from safer_engine.edit_text import open_content

    if places.source.is_dir():
        shutil.copytree(places.source, places.target)
    elif (places.source.suffix == ".gz") == (places.target.suffix == ".gz"):
        shutil.copyfile(places.source, places.target)
    else:
        with open_content(places.source) as src, open_content(places.target, "wb") as dst:
            shutil.copyfileobj(src, dst)
    return CopyRecord(output_digest=_content(places.target))


def _content(path: Path) -> str:
    from safer_engine.edit_text import content_digest

    return digest_path(path) if path.is_dir() else content_digest(path)


def _write_text(places: Places, plan: Plan) -> TextRecord:
    from safer_engine import edit_text

    text = edit_text.text_layout(places.source, plan.kind)
    if len(text.spans) != plan.n_rows:
        raise DatasetRefused(
            f"{len(text.spans)} rows were located in {places.source.name}, not {plan.n_rows}", "write it out anew"
        )
    dropped, flipped = ({change.row for change in plan.changes if change.action == action} for action in ("drop", "flip"))
    cuts = edit_text.plan_cuts(text, dropped, flipped)
    edit_text.write_rows(places.source, places.removed, text, [change.row for change in plan.changes])
    zipped = places.target.suffix == ".gz"
    return edit_text.write_edited(places.source, places.target, text, cuts, plan.flip, zipped=zipped)


def _restore_one(places: Places, record: Record, changes: list[Change], n_rows: int) -> None:
    from safer_engine import edit_tables, edit_text

    if isinstance(record, TextRecord):
        edit_text.write_restored(places.source, places.target, record, zipped=places.source.suffix == ".gz")
    elif isinstance(record, TableRecord) and places.source.is_dir():
        edit_tables.restore_saved(places, record.split, changes, n_rows)
    elif isinstance(record, TableRecord):
        edit_tables.restore_parquet(places, record.row_group, changes, n_rows)
    else:
        _copy(places)


def _write_folder(places: Places, plan: Plan) -> FolderRecord:
    """Every file by its own name: data files edited, all others (other splits, a dataset card) as they are."""
    from safer_engine.sources.local_files import data_files, is_hidden

    data = data_files(places.source, plan.split)
    for file in sorted(places.source.rglob("*")):
        if file.is_file() and file not in data and not is_hidden(file, places.source):
            _made(places.target / file.relative_to(places.source)).write_bytes(file.read_bytes())
    rows = [change.row for change in plan.changes]
    parts: list[FilePart] = []
    start = 0
    for file in data:
        counted = _count(file)
        first, last = bisect_left(rows, start), bisect_left(rows, start + counted)
        changes = _shifted(plan.changes[first:last], start)
        parts.append(_write_part(places, file, start, replace(plan, kind=_kind(file), changes=changes, n_rows=counted)))
        start += counted
    if start != plan.n_rows:
        raise DatasetRefused(f"{start} rows were located in {places.source.name}, not {plan.n_rows}", "write it out anew")
    return FolderRecord(files=parts)


def _write_part(places: Places, file: Path, start: int, plan: Plan) -> FilePart:
    name = file.relative_to(places.source).as_posix()
    kept = name.removesuffix(".gz")
    if kept != name and file.with_suffix("").exists():
        raise DatasetRefused(f"{places.source} holds {kept} packed and unpacked", "take one of them away, and audit the rest")
    removed = _made(places.removed / kept) if plan.changes else places.removed
    record = _write_one(Places(file, _made(places.target / name), removed), plan)
    assert plan.kind not in ("saved", "folder")
    return FilePart(
        name=name, kind=plan.kind, start=start, n_rows=plan.n_rows, removed=kept if plan.changes else None, record=record
    )


def _restore_folder(places: Places, manifest: EditManifest, record: FolderRecord) -> None:
    """The folder as it stands, with what changed put back."""
    shutil.copytree(places.source, places.target)
    for part in record.files:
        if part.removed is not None:
            end = part.start + part.n_rows
            changes = _shifted([change for change in manifest.changes if part.start <= change.row < end], part.start)
            target = places.target / part.name
            discard(target)
            inner = Places(places.source / part.name, target, places.removed / part.removed)
            _restore_one(inner, part.record, changes, part.n_rows)


def _changed(out: Path, removed: Path | None, record: Record) -> Iterator[Path]:
    """Files that are not as apply wrote them. Raises OSError, EOFError or zlib.error when one cannot be read."""
    if isinstance(record, FolderRecord):
        for part in record.files:
            kept = None if removed is None or part.removed is None else removed / part.removed
            yield from _changed(out / part.name, kept, part.record)
    elif isinstance(record, TableRecord):
        if digest_path(out) != record.output_digest:
            yield out
        if removed is None or digest_path(removed) != record.removed_digest:
            yield removed or out
    elif _content(out) != record.output_digest:
        yield out


def _shifted(changes: list[Change], start: int) -> list[Change]:
    return [change.model_copy(update={"row": change.row - start}) for change in changes]


def _kind(file: Path) -> Any:
    from safer_engine.sources.local_files import kind_of

    return kind_of(file)


def _count(file: Path) -> int:
    from safer_engine.edit_tables import count_parquet
    from safer_engine.edit_text import text_layout

    kind = _kind(file)
    return count_parquet(file) if kind == "parquet" else len(text_layout(file, kind).spans)


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
