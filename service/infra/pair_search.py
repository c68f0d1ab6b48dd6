"""Which files contain given pairs, by their ids."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from safer_engine.errors import ArtifactError
from service.infra.retention_records import named_by

NAMED = ("pair_id",)
"""What the engine calls a pair's id."""
GIVEN = ("pair_id", "id")
"""What datasets call it."""
_READABLE = (".arrow", ".parquet", ".jsonl", ".json", ".csv")


def searchable(name: str) -> bool:
    """Whether ids can be found in a file of this name; others are judged by what they were computed from."""
    return name.removesuffix(".gz").endswith(_READABLE)


def contains(path: Path, name: str, pair_ids: set[str], columns: Iterable[str] = NAMED) -> bool:
    """Whether a file names one of the pairs.

    Args:
        name: what the file is called; its end says how it is read.
        columns: names of columns, or of fields at any depth, that hold ids.

    Raises:
        ArtifactError: the file cannot be read as what its name says.
    """
    try:
        return any(named_by(value, pair_ids) for value in _values(path, name, set(columns)))
    except (ValueError, OSError, EOFError) as error:  # Arrow's and JSON's errors are ValueErrors
        raise ArtifactError(
            f"{name} cannot be searched: {type(error).__name__}", "remove the job or upload it belongs to"
        ) from error


def _values(path: Path, name: str, columns: set[str]) -> Iterator[str]:
    plain = name.removesuffix(".gz")
    if plain.endswith((".arrow", ".parquet")):
        yield from _table_values(path, plain.endswith(".parquet"), columns)
        return
    with path.open("rb") as packed, _unpacked(packed, name) as handle:
        if plain.endswith(".csv"):
            for row in csv.DictReader(handle):
                yield from (str(row[column]) for column in columns & row.keys())
        elif plain.endswith(".jsonl"):
            for line in handle:
                if line.strip():
                    yield from _fields(json.loads(line), columns)
        else:
            yield from _fields(json.load(handle), columns)


def _unpacked(packed: IO[bytes], name: str) -> IO[str]:
    return io.TextIOWrapper(gzip.GzipFile(fileobj=packed) if name.endswith(".gz") else packed, encoding="utf-8")


def _table_values(path: Path, parquet: bool, columns: set[str]) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if parquet:
        file = pq.ParquetFile(path)
        wanted = sorted(columns & set(file.schema_arrow.names))
        batches = file.iter_batches(columns=wanted) if wanted else iter(())
        yield from (str(value) for batch in batches for column in batch.columns for value in column.to_pylist())
        return
    with pa.memory_map(str(path)) as source:
        for batch in _batches(source):
            wanted = sorted(columns & set(batch.schema.names))
            yield from (str(value) for column in wanted for value in batch.column(column).to_pylist())


def _batches(source: Any) -> Iterator[Any]:
    """Record batches of an Arrow file, or of a stream, which is what folders of `datasets` hold under the same suffix."""
    import pyarrow as pa

    if source.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(source)
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        return
    source.seek(0)
    yield from pa.ipc.open_stream(source)


def _fields(value: Any, columns: set[str]) -> Iterator[str]:
    """Values under the wanted names, at any depth."""
    if isinstance(value, dict):
        yield from (str(value[column]) for column in columns & value.keys())
        inner: Iterable[Any] = value.values()
    else:
        inner = value if isinstance(value, list) else ()
    for each in inner:
        if isinstance(each, (dict, list)):
            yield from _fields(each, columns)
