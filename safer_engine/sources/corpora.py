"""Find and fingerprint a text corpus: rows with a `text` column, or the lines of a text file."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safer_engine.errors import DatasetRefused, SpecError
from safer_engine.sources.hub_datasets import resolve_hub
from safer_engine.sources.local_files import resolve_local
from safer_engine.sources.poison_guard import guarded
from safer_engine.sources.resolved import ResolvedDataset
from safer_engine.spec import DatasetSource, HubSource, LocalSource
from safer_engine.store import digest_file


def resolve_corpus(source: DatasetSource) -> ResolvedDataset:
    """The corpus that `sae.pretrain.corpus` names, pinned like a dataset; `texts_of` reads it.

    The lines of a .txt file (.txt.gz too) are rows with a `text` column.

    Raises:
        DatasetRefused: it can't be found or read; the hint says what to do.
        SpecError: it is to be given in memory.
    """
    if isinstance(source, HubSource):
        return guarded(resolve_hub(source))
    if not isinstance(source, LocalSource):
        raise SpecError("sae.pretrain.corpus can't be given in memory", "name a file, a folder or a hub dataset")
    path = Path(source.path).expanduser()
    if not path.name.removesuffix(".gz").endswith(".txt"):
        return guarded(resolve_local(source))
    if not path.is_file():
        raise DatasetRefused(f"there is no file {path}", "check sae.pretrain.corpus")
    return ResolvedDataset(digest_file(path), str(path), lambda: _lines(path))


def texts_of(corpus: ResolvedDataset) -> Iterator[str]:
    """The texts of a corpus. Raises DatasetRefused when a row has none."""
    for number, row in enumerate(corpus.rows(), 1):
        text = row.get("text")
        if not isinstance(text, str):
            raise DatasetRefused(f"row {number} of {corpus.origin} has no `text`", "sae.pretrain.corpus needs a text column")
        yield text


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            yield from ({"text": line.rstrip("\n")} for line in lines)
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise DatasetRefused(f"{path} can't be read: {error}", "check sae.pretrain.corpus") from error
