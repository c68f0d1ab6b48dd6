"""Edit JSONL, JSON and CSV files as text, so that what is not changed stays byte for byte.

A file is a run of bytes in which each row has a span. Rows are taken out by cutting spans, flipped by replacing them; every cut
is recorded with the bytes it took, so that undoing gives the very bytes back. Compression is a wrapping: cuts, digests and
restored bytes are those of the uncompressed content.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from safer_engine.edit_manifest import Splice, TextRecord
from safer_engine.errors import ArtifactError, DatasetRefused

Flip = Callable[[dict[str, Any]], dict[str, Any]]
_BOM = b"\xef\xbb\xbf"
_COPY = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class RowSpan:
    """Bytes [start, end) of a row; for lines the line's end is included."""

    start: int
    end: int


@dataclass(frozen=True)
class Cut:
    """Bytes [start, end) that change: taken out, or, for the flipped `row`, rewritten."""

    start: int
    end: int
    row: int | None = None


@dataclass(frozen=True)
class TextLayout:
    """Where the rows of a file lie. `kind` is jsonl, json or csv; `header` names the fields of a CSV file."""

    kind: str
    spans: tuple[RowSpan, ...]
    header: tuple[str, ...] = ()


@contextmanager
def open_content(path: Path, mode: str = "rb", *, zipped: bool | None = None) -> Iterator[BinaryIO]:
    """A file's uncompressed content; what is written to a `.gz` is the same bytes for the same content."""
    if not (path.suffix == ".gz" if zipped is None else zipped):
        with path.open(mode) as plain:
            yield cast(BinaryIO, plain)
    elif mode == "rb":
        with gzip.open(path, "rb") as unzipped:
            yield cast(BinaryIO, unzipped)
    else:
        with path.open(mode) as raw, gzip.GzipFile("", mode, fileobj=raw, mtime=0) as zipping:
            yield cast(BinaryIO, zipping)


def text_layout(path: Path, kind: str) -> TextLayout:
    """Find the span of every row.

    Args:
        kind: jsonl, json or csv. A `.json` file that holds one object a line is read as jsonl.

    Raises:
        DatasetRefused: the file is one JSON object, which has no rows to take out.
    """
    with open_content(path) as handle:
        if kind == "csv":
            return _csv_layout(handle)
        if kind == "json":
            content = handle.read()
            start = len(_BOM) if content.startswith(_BOM) else 0
            spans = _document_spans(content[start:].decode(), start)
            if spans is not None:
                return TextLayout("json", spans)
            return TextLayout("jsonl", tuple(_line_spans(io.BytesIO(content))))
        return TextLayout("jsonl", tuple(_line_spans(handle)))


def plan_cuts(layout: TextLayout, dropped: set[int], flipped: set[int]) -> list[Cut]:
    """What changes, in order. In a JSON list the commas between rows go with the rows."""
    spans = layout.spans
    cuts = [Cut(spans[row].start, spans[row].end, row) for row in flipped]
    if layout.kind != "json":
        return sorted(cuts + [Cut(spans[row].start, spans[row].end) for row in dropped], key=lambda cut: cut.start)
    previous: int | None = None
    for row in [row for row in range(len(spans)) if row not in dropped]:
        if previous is None and row > 0:
            cuts.append(Cut(spans[0].start, spans[row].start))
        elif previous is not None and previous != row - 1:
            cuts.append(Cut(spans[previous].end, spans[row - 1].end))
        previous = row
    if spans and previous != len(spans) - 1:
        cuts.append(Cut(spans[0].start if previous is None else spans[previous].end, spans[-1].end))
    return sorted(cuts, key=lambda cut: cut.start)


def write_edited(source: Path, target: Path, layout: TextLayout, cuts: list[Cut], flip: Flip, *, zipped: bool) -> TextRecord:
    """Copy a file with its cuts made; returns how to undo them."""
    splices: list[Splice] = []
    read, written, at, place = hashlib.sha256(), hashlib.sha256(), 0, 0
    with open_content(source) as src, open_content(target, "wb", zipped=zipped) as dst:
        for cut in cuts:
            at += _copy(src, dst, cut.start - place, read, written)
            original = src.read(cut.end - cut.start)
            read.update(original)
            replacement = b"" if cut.row is None else rewrite(original, layout, flip)
            dst.write(replacement)
            written.update(replacement)
            splices.append(Splice(at=at, length=len(replacement), original=original.decode("utf-8", "surrogateescape")))
            at += len(replacement)
            place = cut.end
        _copy(src, dst, None, read, written)
    return TextRecord(original_digest=read.hexdigest(), output_digest=written.hexdigest(), splices=splices)


def write_restored(edited: Path, target: Path, record: TextRecord, *, zipped: bool) -> None:
    """Copy an edited file with its cuts undone. Raises ArtifactError when the original bytes do not come out."""
    restored, ignored, place = hashlib.sha256(), hashlib.sha256(), 0
    with open_content(edited) as src, open_content(target, "wb", zipped=zipped) as dst:
        for splice in record.splices:
            _copy(src, dst, splice.at - place, ignored, restored)
            src.read(splice.length)
            original = splice.original.encode("utf-8", "surrogateescape")
            dst.write(original)
            restored.update(original)
            place = splice.at + splice.length
        _copy(src, dst, None, ignored, restored)
    if restored.hexdigest() != record.original_digest:
        raise ArtifactError(
            "the restored bytes are not those of the original", "the manifest was changed; go back to the dataset"
        )


def content_digest(path: Path) -> str:
    """sha256 of a file's uncompressed content."""
    sha = hashlib.sha256()
    with open_content(path) as handle:
        while chunk := handle.read(_COPY):
            sha.update(chunk)
    return sha.hexdigest()


def write_rows(source: Path, target: Path, layout: TextLayout, rows: list[int]) -> None:
    """Some rows of a file, as they stand, as a file of the same kind (uncompressed)."""
    spans = [layout.spans[row] for row in rows]
    place, pieces = 0, []
    with open_content(source) as src:
        for span in spans:
            _pass_over(src, span.start - place)
            pieces.append(src.read(span.end - span.start))
            place = span.end
    ended = [piece if piece.endswith((b"\n", b"\r")) else piece + b"\n" for piece in pieces]
    if layout.kind == "json":
        target.write_bytes(b"[\n" + b",\n".join(pieces) + b"\n]\n")
    elif layout.kind == "csv":
        target.write_bytes(_csv_record(list(layout.header), csv.QUOTE_MINIMAL, "\n") + b"".join(ended))
    else:
        target.write_bytes(b"".join(ended))


def rewrite(original: bytes, layout: TextLayout, flip: Flip) -> bytes:
    """A flipped row in the spelling of the original: same line end, escapes, spaces and quotes where they follow one rule."""
    text = original.decode()
    if layout.kind == "csv":
        return _rewrite_csv(text, layout.header, flip)
    body = text.strip(" \t\r\n")
    before, after = text[: text.index(body)], text[text.index(body) + len(body) :]
    row = json.loads(body)
    return (before + _respell(body, row, flip(row)) + after).encode()


def _copy(src: BinaryIO, dst: BinaryIO, count: int | None, read: Any, written: Any) -> int:
    """Copy `count` bytes, or all that are left."""
    done = 0
    while count is None or done < count:
        chunk = src.read(_COPY if count is None else min(_COPY, count - done))
        if not chunk:
            break
        dst.write(chunk)
        read.update(chunk)
        written.update(chunk)
        done += len(chunk)
    return done


def _pass_over(src: BinaryIO, count: int) -> None:
    while count > 0 and (chunk := src.read(min(_COPY, count))):
        count -= len(chunk)


def _line_spans(handle: BinaryIO) -> Iterator[RowSpan]:
    place = 0
    for line in handle:
        start = place + (len(_BOM) if place == 0 and line.startswith(_BOM) else 0)
        place += len(line)
        if line[len(line) - (place - start) :].decode().strip():
            yield RowSpan(start, place)


def _document_spans(text: str, offset: int) -> tuple[RowSpan, ...] | None:
    """Spans of the elements of a list, or of the list under `data`; None for text that is several JSON values."""
    decoder = json.JSONDecoder()
    start = _skip(text, 0)
    _, end = decoder.raw_decode(text, start)
    if _skip(text, end) != len(text):
        return None
    opening = start if text[start] == "[" else _data_list(text, start, decoder)
    spans, place, byte = [], _skip(text, opening + 1), offset
    counted = 0
    while text[place] != "]":
        _, end = decoder.raw_decode(text, place)
        first = byte + len(text[counted:place].encode())
        byte, counted = first + len(text[place:end].encode()), end
        spans.append(RowSpan(first, byte))
        place = _skip(text, end)
        place = _skip(text, place + 1) if text[place] == "," else place
    return tuple(spans)


def _data_list(text: str, start: int, decoder: json.JSONDecoder) -> int:
    place, found = _skip(text, start + 1), None
    while text[place] != "}":
        key, place = decoder.raw_decode(text, place)
        place = _skip(text, _skip(text, place) + 1)
        found = place if key == "data" else found
        _, place = decoder.raw_decode(text, place)
        place = _skip(text, place)
        place = _skip(text, place + 1) if text[place] == "," else place
    if found is None or text[found] != "[":
        raise DatasetRefused("the dataset is a single JSON object", "give a list of objects, or one object a line")
    return found


def _skip(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    assert found is not None
    return found.end()


def _csv_layout(handle: BinaryIO) -> TextLayout:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    begins = handle.read(len(_BOM)) == _BOM
    handle.seek(0)
    place = [len(_BOM) if begins else 0]
    with io.TextIOWrapper(handle, encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(_counted(lines, place), strict=True)
        header: tuple[str, ...] | None = None
        spans, start = [], place[0]
        for fields in reader:
            if fields and header is None:
                header = tuple(fields)
            elif fields:
                spans.append(RowSpan(start, place[0]))
            start = place[0]
    return TextLayout("csv", tuple(spans), header or ())


def _counted(lines: io.TextIOWrapper, place: list[int]) -> Iterator[str]:
    for line in lines:
        place[0] += len(line.encode())
        yield line


def _rewrite_csv(text: str, header: tuple[str, ...], flip: Flip) -> bytes:
    body = text.rstrip("\r\n")
    end = text[len(body) :]
    fields = next(csv.reader(io.StringIO(text, newline=""), strict=True))
    row = dict(zip(header, fields, strict=True))
    quoting = csv.QUOTE_ALL if _csv_record(fields, csv.QUOTE_ALL, end) == text.encode() else csv.QUOTE_MINIMAL
    flipped = flip(dict(row))
    return _csv_record([flipped[name] for name in header], quoting, end)


def _csv_record(fields: list[str], quoting: Any, end: str) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, quoting=quoting, lineterminator=end).writerow(fields)
    return out.getvalue().encode()


def _respell(body: str, row: dict[str, Any], flipped: dict[str, Any]) -> str:
    """JSON of the flipped row in the style (escapes, separators, indent) that gives the original text for the original row."""
    inner = re.match(r"\{\r?\n([ \t]*)", body)
    outer = body.rpartition("\n")[2].removesuffix("}") if inner else ""
    indent = inner[1].removeprefix(outer) if inner else None
    for escaped in (False, True):
        for separators in ((", ", ": "), (",", ":")):
            style: dict[str, Any] = {"ensure_ascii": escaped, "indent": indent}
            style |= {} if indent is not None else {"separators": separators}
            if _spelled(row, style, outer) == body:
                return _spelled(flipped, style, outer)
    return json.dumps(flipped, ensure_ascii=body.isascii())


def _spelled(value: Any, style: dict[str, Any], outer: str) -> str:
    return json.dumps(value, **style).replace("\n", "\n" + outer)
