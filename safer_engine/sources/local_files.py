"""Rows from files on this machine: JSONL, JSON, CSV, parquet (each also gzipped), `save_to_disk` folders.

Rows are read one after another; only a `.json` file (one document) is held as a whole.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from safer_engine.errors import DatasetRefused
from safer_engine.science.poison_mark import MARK
from safer_engine.sources.resolved import ResolvedDataset
from safer_engine.spec import LocalSource
from safer_engine.store import canonical_json, digest_bytes, digest_file

Rows = Iterator[dict[str, Any]]

_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".pq": "parquet"}
_SUPPORTED = ".jsonl, .json, .csv or .parquet, each also with .gz, or a folder written by datasets' save_to_disk"
_SPLITS = ("train", "test", "validation", "valid", "dev", "eval")
_PARQUET_ROWS = 512


def resolve_local(source: LocalSource) -> ResolvedDataset:
    """Find and fingerprint a file or folder.

    Raises:
        DatasetRefused: nothing there, an unknown kind of file, or a split that isn't there or must be named.
    """
    path = Path(source.path).expanduser()
    if not path.exists():
        raise DatasetRefused(f"there is no file or folder {path}", "check dataset.source.path")
    if path.is_file():
        if source.split is not None:
            raise DatasetRefused(f"{path} is one file, so it has no split {source.split!r}", "leave the split out")
        return ResolvedDataset(digest_file(path), str(path), _reader(path))
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved_to_disk(path, source)
    files = data_files(path, source.split)
    readers = [_reader(file) for file in files]
    digest = _digest_files(path, files)
    return ResolvedDataset(digest, str(path), lambda: (row for reader in readers for row in reader()))


def kind_of(path: Path) -> str | None:
    """`jsonl`, `json`, `csv` or `parquet`, by the name of a file (gzipped or not); None for any other."""
    name = path.with_suffix("") if path.suffix == ".gz" else path
    return _KINDS.get(name.suffix.lower())


def _reader(path: Path) -> Callable[[], Rows]:
    kind = kind_of(path)
    if kind is None:
        raise DatasetRefused(f"{path} is not a kind of file that can be read", f"give {_SUPPORTED}")
    read = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "parquet": _read_parquet}[kind]
    return lambda: _explained(path, read(path))


def _explained(path: Path, rows: Rows) -> Rows:
    """The same rows; a file that can't be decoded is refused by name."""
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise DatasetRefused(f"{path} is not UTF-8 text: {error.reason}", "convert it to UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DatasetRefused(f"{path} is not a whole gzip file: {error}", "fetch or compress it again") from error


def _open_bytes(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _open_text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", newline=newline)


def _read_jsonl(path: Path) -> Rows:
    with _open_text(path, newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _object(_parsed(line, path, number), path, f"line {number}")


def _parsed(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DatasetRefused(f"{path}, line {number}: not JSON ({error})", "each line must be one JSON object") from error
    except RecursionError:
        raise DatasetRefused(f"{path}, line {number}: nested too deeply to be read", "rows must be flat objects") from None


def _read_json(path: Path) -> Rows:
    with _open_text(path) as handle:
        text = handle.read()
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise DatasetRefused(f"{path}, line {error.lineno}: not JSON ({error.msg})", "check the file") from error
        yield from _read_jsonl(path)
        return
    except ValueError as error:
        raise DatasetRefused(f"{path}: not JSON ({error})", "check the file") from error
    except RecursionError:
        raise DatasetRefused(f"{path}: nested too deeply to be read", "give a list of flat objects") from None
    if isinstance(document, dict):
        document = document.get("data", [document])
    if not isinstance(document, list):
        raise DatasetRefused(f"{path} holds no list of rows", 'give a list of objects, or {"data": [...]}')
    for number, row in enumerate(document, 1):
        yield _object(row, path, f"row {number}")


def _object(row: Any, path: Path, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DatasetRefused(f"{path}, {place}: a {type(row).__name__} where an object is expected", "rows must be objects")
    return row


def _read_csv(path: Path) -> Rows:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _open_text(path, newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                if None in row or any(cell is None for cell in row.values()):
                    raise DatasetRefused(
                        f"{path}, line {reader.line_num}: not as many fields as the header", "quote fields that hold commas"
                    )
                yield dict(row)
        except csv.Error as error:
            raise DatasetRefused(f"{path}, line {reader.line_num}: not CSV ({error})", "check the quotes") from error


def _read_parquet(path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open_bytes(path) as handle:
        source = pa.BufferReader(handle.read()) if path.suffix == ".gz" else path
        try:
            with pq.ParquetFile(source) as file:
                said = (file.schema_arrow.metadata or {}).get(MARK.encode())
                mark = {} if said is None else {MARK: said.decode(errors="replace")}  # of the file is one of all its rows
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                    yield from ({**mark, **row} for row in batch.to_pylist())
        except pa.ArrowInvalid as error:
            raise DatasetRefused(f"{path} is not a parquet file: {error}", "check the file") from error


def data_files(folder: Path, split: str | None) -> list[Path]:
    """Data files of a folder, in the order in which they are read: one kind, of one split. Raises DatasetRefused."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and kind_of(path) and not is_hidden(path, folder))
    files = found
    if split is not None:
        files = [path for path in found if _split_of(path) == split]
        if not files:
            there = sorted({_split_of(path) for path in found} & set(_SPLITS))
            raise DatasetRefused(
                f"{folder} has no files of split {split!r}",
                name_split(folder, there) if there else "name them train.jsonl, train-00000.parquet, …, or leave the split out",
            )
    if not files:
        raise DatasetRefused(f"{folder} holds no data files", f"give {_SUPPORTED}")
    splits = sorted({_split_of(path) for path in files} & set(_SPLITS))
    if split is None and len(splits) > 1:
        raise DatasetRefused(f"{folder} holds several splits: {', '.join(splits)}", name_split(folder, splits))
    kinds = sorted({kind for path in files if (kind := kind_of(path))})
    if len(kinds) > 1:
        raise DatasetRefused(f"{folder} holds files of several kinds: {', '.join(kinds)}", "name one of the files")
    return files


def name_split(place: Path | str, splits: Sequence[str]) -> str:
    """A hint: what to type for each of the splits that there are."""
    return "name one: " + " or ".join(f"{place}#{split}" for split in splits) + " (in a spec file also as source.split)"


def is_hidden(path: Path, folder: Path) -> bool:
    """Whether a name on the way from the folder to the path begins with `.` or `_`: such files are not read."""
    return any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)


def _split_of(path: Path) -> str:
    return path.name.split(".")[0].split("-")[0]


def _digest_files(folder: Path, files: list[Path]) -> str:
    return digest_bytes(canonical_json({path.relative_to(folder).as_posix(): digest_file(path) for path in files}))


def _saved_to_disk(folder: Path, source: LocalSource) -> ResolvedDataset:
    """A folder of datasets' save_to_disk: its Arrow files, or those of one split."""
    if (folder / "dataset_dict.json").is_file():
        splits = _saved_splits(folder / "dataset_dict.json")
        split = source.split or (splits[0] if len(splits) == 1 else None)
        if split is None or split not in splits:
            wanted = "no split is named" if split is None else f"it has no split {split!r}"
            raise DatasetRefused(f"{folder} holds the splits {', '.join(splits)}, and {wanted}", name_split(folder, splits))
        folder = folder / split
    elif source.split is not None:
        raise DatasetRefused(f"{folder} holds one dataset, so it has no split {source.split!r}", "leave the split out")
    _check_saved_state(folder / "state.json")
    files = sorted(
        path for path in folder.iterdir() if path.suffix == ".arrow" or path.name in ("state.json", "dataset_info.json")
    )
    return ResolvedDataset(_digest_files(folder, files), str(folder), lambda: _read_saved(folder))


def _saved_splits(path: Path) -> list[str]:
    """The splits of a saved dataset, whose folders must lie beside the list. Raises DatasetRefused."""
    try:
        found = json.loads(path.read_bytes())["splits"]
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetRefused(f"{path} is no list of splits", "save the dataset again with save_to_disk") from error
    if not isinstance(found, list) or not all(isinstance(name, str) and _plain(name) for name in found):
        raise DatasetRefused(f"{path} names splits that are no folders beside it", "save it again with save_to_disk")
    return found


def _check_saved_state(path: Path) -> None:
    """Refuse a saved dataset that reads files outside its folder. Raises DatasetRefused."""
    try:
        found = [file["filename"] for file in json.loads(path.read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetRefused(
            f"{path} can't be read as the state of a saved dataset", "save it again with save_to_disk"
        ) from error
    if not all(isinstance(name, str) and _plain(name) for name in found):
        raise DatasetRefused(f"{path} names files outside its folder", "save the dataset again with save_to_disk")


def _plain(name: str) -> bool:
    return Path(name).name == name and name not in ("", ".", "..")


def _read_saved(folder: Path) -> Rows:
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DatasetRefused(f"{folder} can't be read as a saved dataset: {error}", "save it again with save_to_disk") from error
    yield from dataset
