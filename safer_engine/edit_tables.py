"""Edit parquet files and `save_to_disk` folders: rows leave or are swapped, the schema and all other rows stay."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_engine.edit_manifest import Change
from safer_engine.errors import ArtifactError, DatasetRefused

if TYPE_CHECKING:
    import pyarrow as pa

Flip = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Places:
    """Where a dataset is read from, where it is written to, and where the changed rows lie as they were."""

    source: Path
    target: Path
    removed: Path


@dataclass(frozen=True)
class Kept:
    """A run of rows: from the table itself (`changed` False) or from the table of changed rows."""

    changed: bool
    start: int
    stop: int


def runs(n_rows: int, changes: list[Change]) -> Iterator[Kept]:
    """The rows of an edited table: kept ones by their place in the original, flipped ones by their place among changes."""
    place = 0
    for number, change in enumerate(changes):
        if change.row > place:
            yield Kept(False, place, change.row)
        if change.action == "flip":
            yield Kept(True, number, number + 1)
        place = change.row + 1
    if place < n_rows:
        yield Kept(False, place, n_rows)


def restoring_runs(n_rows: int, changes: list[Change]) -> Iterator[Kept]:
    """The rows of the original: unchanged ones by their place in the edited table, changed ones by theirs among changes."""
    place, dropped = 0, 0
    for number, change in enumerate(changes):
        if change.row > place:
            yield Kept(False, place - dropped, change.row - dropped)
        yield Kept(True, number, number + 1)
        dropped += change.action == "drop"
        place = change.row + 1
    if place < n_rows:
        yield Kept(False, place - dropped, n_rows - dropped)


def edit_parquet(places: Places, changes: list[Change], flip: Flip) -> int | None:
    """Write the edited file, and the file of changed rows as they were; returns the original's rows per row group."""
    import pyarrow.parquet as pq

    with _unzipped(places.source) as plain:
        file = pq.ParquetFile(plain, memory_map=True)
        table, layout = file.read(), _parquet_layout(file)
    original = _take(table, changes)
    flipped = _table_of([flip(row) for row in original.to_pylist()] if _any_flip(changes) else [], original)
    _write_parquet(_assembled(table, flipped, runs(table.num_rows, changes)), places.target, layout)
    _write_parquet(original, places.removed, layout)
    return layout.row_group


def count_parquet(path: Path) -> int:
    """Rows of a parquet file."""
    import pyarrow.parquet as pq

    with _unzipped(path) as plain, pq.ParquetFile(plain, memory_map=True) as file:
        return int(file.metadata.num_rows)


def restore_parquet(places: Places, row_group: int | None, changes: list[Change], n_rows: int) -> None:
    """Write the original rows in their order, with the schema of the edited file, which is the original's."""
    import pyarrow.parquet as pq

    with _unzipped(places.source) as plain:
        file = pq.ParquetFile(plain, memory_map=True)
        table, layout, original = file.read(), _parquet_layout(file), pq.read_table(places.removed)
    restored = _assembled(table, original, restoring_runs(n_rows, changes))
    _check_count(restored.num_rows, n_rows)
    _write_parquet(restored, places.target, replace(layout, row_group=row_group))


def edit_saved(places: Places, split: str | None, changes: list[Change], flip: Flip) -> str | None:
    """The same for a `save_to_disk` folder; other splits are copied. Returns the split that was edited, if there are several."""
    with _quiet():
        found, dataset, name = _open_saved(places.source, split)
        original = dataset.select([change.row for change in changes])
        flipped = _dataset_of([flip(row) for row in original] if _any_flip(changes) else [], original)
        edited = _joined(dataset, flipped, runs(len(dataset), changes))
        _save(found, name, edited, places.target)
        original.save_to_disk(str(places.removed))
    return name


def restore_saved(places: Places, split: str | None, changes: list[Change], n_rows: int) -> None:
    """Write the original rows of a `save_to_disk` folder in their order."""
    from datasets import load_from_disk

    with _quiet():
        found, dataset, name = _open_saved(places.source, split)
        original = load_from_disk(str(places.removed))
        restored = _joined(dataset, original, restoring_runs(n_rows, changes))
        _check_count(len(restored), n_rows)
        _save(found, name, restored, places.target)


@dataclass(frozen=True)
class _ParquetLayout:
    compression: str
    row_group: int | None


def _parquet_layout(file: Any) -> _ParquetLayout:
    meta = file.metadata
    if meta.num_row_groups == 0 or meta.num_columns == 0:
        return _ParquetLayout("snappy", None)
    name = str(meta.row_group(0).column(0).compression).lower()
    return _ParquetLayout("none" if name == "uncompressed" else name, meta.row_group(0).num_rows or None)


def _write_parquet(table: pa.Table, target: Path, layout: _ParquetLayout) -> None:
    import pyarrow.parquet as pq

    plain = target.with_name(f"{target.name}.plain") if target.suffix == ".gz" else target
    pq.write_table(table, plain, compression=layout.compression, row_group_size=layout.row_group)
    if plain != target:
        with plain.open("rb") as src, target.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as dst:
            shutil.copyfileobj(src, dst)
        plain.unlink()


@contextmanager
def _unzipped(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    if path.suffix != ".gz":
        yield path
        return
    with gzip.open(path, "rb") as handle:
        yield pa.BufferReader(handle.read())


def _take(table: pa.Table, changes: list[Change]) -> pa.Table:
    import pyarrow as pa

    return pa.concat_tables([table.slice(change.row, 1) for change in changes]) if changes else table.slice(0, 0)


def _table_of(rows: list[dict[str, Any]], like: pa.Table) -> pa.Table:
    import pyarrow as pa

    try:
        return pa.Table.from_pylist(rows, schema=like.schema)
    except pa.ArrowException as error:
        raise DatasetRefused(f"a flipped row does not fit the schema: {error}", "apply with --action drop") from error


def _assembled(table: pa.Table, changed: pa.Table, order: Iterator[Kept]) -> pa.Table:
    import pyarrow as pa

    parts = [(changed if run.changed else table).slice(run.start, run.stop - run.start) for run in order]
    return pa.concat_tables(parts) if parts else table.slice(0, 0)


def _open_saved(folder: Path, split: str | None) -> tuple[Any, Any, str | None]:
    """What `load_from_disk` gives, the dataset to edit, and its split where there are several."""
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(folder))
    if not isinstance(found, DatasetDict):
        return found, found, None
    name = split or next(iter(found))
    return found, found[name], name


def _dataset_of(rows: list[dict[str, Any]], like: Any) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows, features=like.features) if rows else like.select([])


def _joined(dataset: Any, changed: Any, order: Iterator[Kept]) -> Any:
    from datasets import concatenate_datasets

    shift = len(dataset)
    rows = [row + shift * run.changed for run in order for row in range(run.start, run.stop)]
    both = concatenate_datasets([dataset, changed]) if len(changed) else dataset
    return both.select(rows)


def _save(found: Any, split: str | None, dataset: Any, target: Path) -> None:
    from datasets import DatasetDict

    whole = dataset if split is None else DatasetDict({**found, split: dataset})
    whole.save_to_disk(str(target))


def _any_flip(changes: list[Change]) -> bool:
    return any(change.action == "flip" for change in changes)


def _check_count(found: int, expected: int) -> None:
    if found != expected:
        raise ArtifactError(f"{found} rows were restored, not {expected}", "the files were changed; go back to the dataset")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of the datasets library, which would be printed to the terminal."""
    import datasets

    before = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            datasets.enable_progress_bars()
