"""Applying edits to files of every format, and undoing them."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safer_engine.edit_files import ApplyRequest, EditResult, apply_edits, undo_edits
from safer_engine.edit_manifest import digest_path, manifest_path, read_manifest, removed_path
from safer_engine.errors import ArtifactError, DatasetRefused, InputRefused, ResourceError, SpecError
from safer_engine.sources.datasets import resolve_dataset
from safer_engine.spec import DatasetSpec, HubSource
from tests.helpers.edit_cases import local, rows, write_edits

SIX = ["keep", "drop", "review", "flip", "keep", "drop"]
BOTH = frozenset({"drop", "flip"})


def jsonl(values: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(value, ensure_ascii=False).encode() + b"\n" for value in values)


def flipped(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def edited(values: list[dict[str, Any]], actions: list[str], applied: frozenset[str]) -> list[dict[str, Any]]:
    """What must come out, written down independently."""
    out = []
    for row, action in zip(values, actions, strict=True):
        if action in applied and action == "drop":
            continue
        out.append(flipped(row) if action in applied and action == "flip" else row)
    return out


def run(path: Path, actions: list[str], out: Path, applied: Any = frozenset({"drop"}), **more: Any) -> EditResult:
    spec = local(path, **{key: more.pop(key) for key in ("columns", "format", "label", "split", "winners") if key in more})
    edits = write_edits(path.parent / "edits.jsonl", spec, actions, more.pop("suspicion", None))
    return apply_edits(ApplyRequest(edits, spec, out, applied, **more))


@pytest.mark.parametrize("applied", [frozenset({"drop"}), frozenset({"flip"}), BOTH])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".ndjson"])
def test_jsonl(tmp_path: Path, applied: frozenset[Any], suffix: str) -> None:
    data, out = tmp_path / f"data{suffix}", tmp_path / f"clean{suffix}"
    content = jsonl(rows(6))
    data.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    before = data.read_bytes()
    result = run(data, SIX, out, applied)
    written = gzip.decompress(out.read_bytes()) if suffix.endswith(".gz") else out.read_bytes()
    assert written == jsonl(edited(rows(6), SIX, applied))
    assert (result.dropped, result.flipped) == (2 * ("drop" in applied), 1 * ("flip" in applied))
    assert result.left == {a: n for a, n in (("review", 1), ("flip", 1), ("drop", 2)) if a not in applied}
    assert data.read_bytes() == before, "the original is only read"
    changed = [row for row, action in zip(rows(6), SIX, strict=True) if action in applied]
    assert result.removed is not None
    assert [json.loads(line) for line in result.removed.read_bytes().splitlines()] == changed
    back = undo_edits(out)
    assert (gzip.decompress(out.read_bytes()) if suffix.endswith(".gz") else out.read_bytes()) == content
    assert (back.n_rows, back.dropped, back.flipped) == (6, result.dropped, result.flipped)
    assert not manifest_path(out).exists()
    assert not result.removed.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([data.name, out.name, "edits.jsonl"]), (
        "nothing is left over"
    )


text = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
row_values = st.lists(
    st.fixed_dictionaries({"prompt": text, "chosen": text, "rejected": text, "extra": st.none() | text | st.floats(-9, 9)}),
    min_size=1,
    max_size=8,
)


def some_actions(n: int) -> st.SearchStrategy[list[str]]:
    """Any actions that leave a row."""
    actions = st.lists(st.sampled_from(["keep", "drop", "flip", "review"]), min_size=n, max_size=n)
    return actions.filter(lambda chosen: set(chosen) != {"drop"})


blank = st.sampled_from([b"", b"", b"\n", b"\r\n", b"  \n", b"\t\r\n", "\u00a0\n".encode(), "\u2028\n".encode()])


@given(
    values=row_values,
    data=st.data(),
    spelling=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    open_end=st.booleans(),
    zipped=st.booleans(),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_jsonl_comes_back_byte_for_byte(
    values: list[dict[str, Any]], data: st.DataObject, spelling: tuple[bool, bool, bool], open_end: bool, zipped: bool
) -> None:
    bom, escape, compact = spelling
    ends = data.draw(st.lists(st.sampled_from([b"\n", b"\r\n", b" \n"]), min_size=len(values), max_size=len(values)))
    gaps = data.draw(st.lists(blank, min_size=len(values) + 1, max_size=len(values) + 1))
    actions = data.draw(some_actions(len(values)))
    separators = (",", ":") if compact else None
    lines = [json.dumps(value, ensure_ascii=escape, separators=separators).encode() for value in values]
    content = b"\xef\xbb\xbf" * bom + b"".join(gap + line + end for gap, line, end in zip(gaps, lines, ends, strict=False))
    content = content.rstrip(b"\r\n ") if open_end else content + gaps[-1]
    suffix = ".jsonl.gz" if zipped else ".jsonl"
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / f"d{suffix}", Path(folder) / f"o{suffix}"
        path.write_bytes(gzip.compress(content) if zipped else content)
        run(path, actions, out, BOTH)
        written = gzip.decompress(out.read_bytes()) if zipped else out.read_bytes()
        found = [json.loads(line) for line in written.decode("utf-8-sig").split("\n") if line.strip()]
        assert found == edited(values, actions, BOTH)
        kept = [line for line, action in zip(lines, actions, strict=True) if action in ("keep", "review")]
        assert all(line in written for line in kept), "what is not changed stays as it was spelled"
        undo_edits(out)
        assert (gzip.decompress(out.read_bytes()) if zipped else out.read_bytes()) == content


@pytest.mark.parametrize(
    "dumped",
    [
        json.dumps,
        lambda v: json.dumps(v, indent=2),
        lambda v: json.dumps({"meta": {"data": [1]}, "data": v, "after": "]"}, indent="\t", ensure_ascii=False),
        lambda v: "\ufeff [ " + " , ".join(json.dumps(x) for x in v) + "\r\n]\n\n",
        lambda v: "\n".join(json.dumps(x) for x in v),
    ],
)
@pytest.mark.parametrize(
    "actions",
    [
        SIX,
        ["drop"] * 5 + ["keep"],
        ["keep"] * 6,
        ["drop", "drop", "keep", "keep", "drop", "drop"],
        ["flip"] + ["keep"] * 4 + ["drop"],
    ],
)
def test_json_documents(tmp_path: Path, dumped: Any, actions: list[str]) -> None:
    data, out = tmp_path / "data.json", tmp_path / "clean.json"
    data.write_bytes(dumped(rows(6)).encode())
    run(data, actions, out, BOTH)
    content = out.read_text(encoding="utf-8-sig")
    try:
        found = json.loads(content)
        found = found["data"] if isinstance(found, dict) and "data" in found else found
    except json.JSONDecodeError:
        found = [json.loads(line) for line in content.splitlines()]
    found = [found] if isinstance(found, dict) else found
    assert found == edited(rows(6), actions, BOTH)
    undo_edits(out)
    assert out.read_bytes() == data.read_bytes()


def test_indented_json_keeps_its_style(tmp_path: Path) -> None:
    data, out = tmp_path / "data.json", tmp_path / "clean.json"
    data.write_text(json.dumps(rows(6), indent=4, ensure_ascii=False))
    run(data, SIX, out, BOTH)
    assert out.read_text() == json.dumps(edited(rows(6), SIX, BOTH), indent=4, ensure_ascii=False)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_csv(tmp_path: Path, end: str, quoting: Any) -> None:
    values = [{**row, "n": str(row["n"]), "chosen": f'a "b"\n, {row["n"]}'} for row in rows(6)]
    handle = io.StringIO(newline="")
    writer = csv.DictWriter(handle, list(values[0]), quoting=quoting, lineterminator=end)
    writer.writeheader()
    for row in values:
        writer.writerow(row)
        handle.write(end if row["n"] == "2" else "")
    data, out = tmp_path / "data.csv", tmp_path / "clean.csv"
    data.write_bytes(("\ufeff" + handle.getvalue()).encode())
    result = run(data, SIX, out, BOTH)
    found = list(csv.DictReader(io.StringIO(out.read_bytes().decode("utf-8-sig"), newline="")))
    assert found == edited(values, SIX, BOTH)
    assert result.removed is not None
    removed = list(csv.DictReader(io.StringIO(result.removed.read_bytes().decode(), newline="")))
    assert removed == [row for row, action in zip(values, SIX, strict=True) if action in BOTH]
    undo_edits(out)
    assert out.read_bytes() == data.read_bytes()


parquet_schema = pa.schema(
    [
        pa.field("id", pa.large_string(), nullable=False),
        pa.field("prompt", pa.string()),
        pa.field("chosen", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        pa.field("rejected", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        pa.field("when", pa.timestamp("us", "UTC")),
        pa.field("kind", pa.dictionary(pa.int32(), pa.string())),
        pa.field("score", pa.decimal128(8, 3), metadata={"unit": "points"}),
    ],
    metadata={"made_by": "a test"},
)


@given(data=st.data(), group=st.integers(1, 5), zipped=st.booleans(), compression=st.sampled_from(["snappy", "zstd", "none"]))
@settings(max_examples=15, deadline=None)
def test_any_parquet_comes_back_with_its_schema(data: st.DataObject, group: int, zipped: bool, compression: str) -> None:
    n = data.draw(st.integers(1, 9))
    actions = data.draw(some_actions(n))
    values = [
        {
            "id": f"id-{i}",
            "prompt": data.draw(text) + str(i),
            "chosen": [{"role": "assistant", "content": data.draw(text) + "+"}],
            "rejected": [{"role": "assistant", "content": data.draw(text) + "-"}],
            "when": data.draw(st.none() | st.just(datetime.datetime(2026, 1, 1, i, tzinfo=datetime.UTC))),
            "kind": data.draw(st.sampled_from(["a", "b", None])),
            "score": data.draw(st.none() | st.just(decimal.Decimal(f"{i}.125"))),
        }
        for i in range(n)
    ]
    table = pa.Table.from_pylist(values, schema=parquet_schema)
    with tempfile.TemporaryDirectory() as folder:
        suffix = ".parquet.gz" if zipped else ".parquet"
        path, out = Path(folder) / f"d{suffix}", Path(folder) / f"o{suffix}"
        plain = Path(folder) / "plain.parquet"
        pq.write_table(table, plain, row_group_size=group, compression=compression)
        path.write_bytes(gzip.compress(plain.read_bytes()) if zipped else plain.read_bytes())
        result = run(path, actions, out, BOTH)
        for stage in ("edited", "restored"):
            content = gzip.decompress(out.read_bytes()) if zipped else out.read_bytes()
            file = pq.ParquetFile(pa.BufferReader(content))
            found = file.read()
            assert found.schema.equals(pq.read_table(plain).schema, check_metadata=True)
            if found.num_rows:
                assert file.metadata.row_group(0).column(0).compression == {"none": "UNCOMPRESSED"}.get(
                    compression, compression.upper()
                )
                assert file.metadata.row_group(0).num_rows == min(group, found.num_rows)
            if stage == "edited":
                assert found.to_pylist() == edited(values, actions, BOTH)
                n_changed = sum(action in BOTH for action in actions)
                assert (0 if result.removed is None else pq.read_table(result.removed).num_rows) == n_changed
                undo_edits(out)
            else:
                # rows, not chunks: the same values may be spelled by another dictionary in each
                assert found.to_pylist() == pq.read_table(plain).to_pylist()


@pytest.mark.parametrize("several", [False, True])
def test_saved_datasets(tmp_path: Path, several: bool) -> None:
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "prompt": datasets.Value("large_string"),
            "chosen": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "rejected": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "axis": datasets.ClassLabel(names=["safety", "chat"]),
        }
    )
    values = [
        {
            "id": f"r{i}",
            "prompt": f"p{i}",
            "chosen": [{"role": "assistant", "content": f"good {i}"}],
            "rejected": [{"role": "assistant", "content": f"bad {i}"}],
            "axis": i % 2,
        }
        for i in range(6)
    ]
    dataset = datasets.Dataset.from_list(values, features=features)
    whole = datasets.DatasetDict(train=dataset, test=dataset.select([0])) if several else dataset
    data, out = tmp_path / "data", tmp_path / "clean"
    whole.save_to_disk(str(data))
    split = {"split": "train"} if several else {}
    result = run(data, SIX, out, BOTH, **split)

    def read() -> Any:
        found = datasets.load_from_disk(str(out))
        if several:
            assert found["test"].to_list() == [values[0]]
            found = found["train"]
        assert found.features == features
        return found.to_list()

    assert read() == edited(values, SIX, BOTH)
    assert result.removed is not None
    assert [row["id"] for row in datasets.load_from_disk(str(result.removed))] == ["r1", "r3", "r5"]
    undo_edits(out)
    assert read() == values
    assert not result.removed.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "data", "edits.jsonl"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ""])
@pytest.mark.parametrize("actions", [["keep"] * 6, ["drop"] * 5 + ["keep"]])
def test_nothing_or_nearly_everything_changes(tmp_path: Path, suffix: str, actions: list[str]) -> None:
    data, out = tmp_path / f"data{suffix}", tmp_path / f"clean{suffix}"
    values = rows(6)
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(values), data)
    elif suffix == ".csv":
        data.write_text("\n".join([",".join(values[0]), *(",".join(map(str, row.values())) for row in values)]))
    elif suffix:
        data.write_bytes(json.dumps(values).encode() if suffix == ".json" else jsonl(values))
    else:
        datasets.Dataset.from_list(values).save_to_disk(str(data))
    result = run(data, actions, out)
    assert result.n_rows - result.dropped == actions.count("keep")
    if "drop" not in actions:
        assert result.removed is None
        assert sorted(path.name for path in tmp_path.iterdir() if "clean" in path.name) == [out.name, manifest_path(out).name]
        assert digest_path(out) == digest_path(data), "a copy, byte for byte"
    undo_edits(out)
    if suffix == ".parquet":
        assert pq.read_table(out).equals(pq.read_table(data))
    elif suffix:
        assert out.read_bytes() == data.read_bytes()
    else:
        assert datasets.load_from_disk(str(out)).to_list() == values


@pytest.mark.parametrize(("source", "target"), [(".jsonl", ".jsonl.gz"), (".parquet.gz", ".parquet")])
def test_a_copy_is_packed_as_its_name_says(tmp_path: Path, source: str, target: str) -> None:
    data, out = tmp_path / f"data{source}", tmp_path / f"clean{target}"
    pq.write_table(pa.Table.from_pylist(rows(6)), tmp_path / "plain")
    content = (tmp_path / "plain").read_bytes() if "parquet" in source else jsonl(rows(6))
    data.write_bytes(gzip.compress(content) if source.endswith(".gz") else content)
    assert run(data, ["keep"] * 6, out).removed is None
    assert (gzip.decompress(out.read_bytes()) if target.endswith(".gz") else out.read_bytes()) == content
    before = out.read_bytes()
    assert undo_edits(out).n_rows == 6
    assert (out.read_bytes(), manifest_path(out).exists()) == (before, False)


def test_nothing_to_do_replaces_what_an_earlier_apply_left(tmp_path: Path) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "clean.jsonl"
    data.write_bytes(jsonl(rows(6)))
    assert run(data, SIX, out).removed == removed_path(out, "jsonl")
    assert run(data, ["keep"] * 6, out, force=True).removed is None
    assert not removed_path(out, "jsonl").exists()


class TestFolders:
    """A folder of several files comes out as a folder of the same files."""

    NAMES = ("data/train-00000-of-00003", "data/train-00001-of-00003", "more/train-00002-of-00003")

    def write(self, folder: Path, suffix: str, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
        values, start = rows(sum(sizes)), 0
        for name, size in zip(self.NAMES, sizes, strict=True):
            path = folder / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            some, start = values[start : start + size], start + size
            if suffix == ".parquet":
                pq.write_table(pa.Table.from_pylist(some), path, row_group_size=2)
            elif suffix == ".csv":
                lines = [",".join(values[0]), *(",".join(map(str, row.values())) for row in some)]
                path.write_bytes("\r\n".join(lines).encode())
            elif suffix == ".json":
                path.write_text(json.dumps(some, indent=1))
            else:
                path.write_bytes(gzip.compress(jsonl(some)) if suffix == ".jsonl.gz" else jsonl(some))
        (folder / "README.md").write_text("a card")
        (folder / ".cache").mkdir()
        (folder / ".cache" / "x.jsonl").write_text("not data")
        pq.write_table(pa.Table.from_pylist(rows(2)), folder / "data" / "test-00000-of-00001.parquet")
        return values

    def files(self, folder: Path) -> dict[str, bytes]:
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            path.relative_to(folder).as_posix(): gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            for path in found
        }

    @pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"])
    def test_edits_go_to_the_file_of_their_row(self, tmp_path: Path, suffix: str) -> None:
        data, out = tmp_path / "data", tmp_path / "clean"
        values = self.write(data, suffix, (2, 2, 2))
        before = self.files(data)
        actions = ["keep", "drop", "keep", "review", "flip", "drop"]
        result = run(data, actions, out, BOTH, split="train")
        assert (result.n_rows, result.dropped, result.flipped, result.left) == (6, 2, 1, {"review": 1})
        written = self.files(out)
        assert list(written) == [name for name in before if not name.startswith(".cache")]
        untouched = [f"{self.NAMES[1]}{suffix}", "README.md", "data/test-00000-of-00001.parquet"]
        assert {name: written[name] for name in untouched} == {name: before[name] for name in untouched}
        found = list(resolve_dataset(local(out, split="train")).rows())
        assert [{**row, "n": int(row["n"])} for row in found] == edited(values, actions, BOTH)
        assert result.removed == tmp_path / "clean.removed"
        kept = list(resolve_dataset(local(result.removed)).rows())
        assert [row["id"] for row in kept] == ["r1", "r4", "r5"]
        plain = suffix.removesuffix(".gz")
        assert list(self.files(result.removed)) == [f"{self.NAMES[0]}{plain}", f"{self.NAMES[2]}{plain}"]
        undo_edits(out)
        restored = self.files(out)
        if suffix == ".parquet":
            for name in self.NAMES:
                assert pq.read_table(out / f"{name}.parquet").equals(pq.read_table(data / f"{name}.parquet"))
        else:
            assert restored == {name: before[name] for name in restored}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "data", "edits.jsonl"]

    @given(data=st.data(), suffix=st.sampled_from([".jsonl", ".jsonl.gz", ".parquet"]))
    @settings(max_examples=15, deadline=None)
    def test_any_edits_of_any_files_come_back(self, data: st.DataObject, suffix: str) -> None:
        sizes = data.draw(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 3)))
        actions = data.draw(some_actions(sum(sizes)))
        with tempfile.TemporaryDirectory() as name:
            source, out = Path(name) / "data", Path(name) / "clean"
            values = self.write(source, suffix, sizes)
            rows_before = list(resolve_dataset(local(source, split="train")).rows())
            result = run(source, actions, out, BOTH, split="train")
            assert list(resolve_dataset(local(out, split="train")).rows()) == edited(values, actions, BOTH)
            assert (result.removed is None) == (not BOTH.intersection(actions))
            undo_edits(out)
            assert list(resolve_dataset(local(out, split="train")).rows()) == rows_before
            if suffix != ".parquet":
                before = self.files(source)
                assert all(content == before[at] for at, content in self.files(out).items())

    def test_a_file_that_is_left_empty_stays(self, tmp_path: Path) -> None:
        self.write(tmp_path / "data", ".jsonl", (2, 1, 2))
        run(tmp_path / "data", ["keep", "keep", "drop", "keep", "keep"], tmp_path / "clean", split="train")
        assert (tmp_path / "clean" / f"{self.NAMES[1]}.jsonl").read_bytes() == b""
        undo_edits(tmp_path / "clean")
        assert self.files(tmp_path / "clean")[f"{self.NAMES[1]}.jsonl"] == jsonl(rows(5)[2:3])

    def test_nothing_to_do_is_a_copy(self, tmp_path: Path) -> None:
        self.write(tmp_path / "data", ".jsonl", (2, 2, 2))
        result = run(tmp_path / "data", ["keep"] * 6, tmp_path / "clean", split="train")
        assert (result.removed, (tmp_path / "clean.removed").exists()) == (None, False)
        assert undo_edits(tmp_path / "clean").n_rows == 6

    def test_a_changed_dataset_is_refused(self, tmp_path: Path) -> None:
        data = tmp_path / "data"
        self.write(data, ".jsonl", (2, 2, 2))
        edits = write_edits(tmp_path / "edits.jsonl", local(data, split="train"), SIX)
        (data / f"{self.NAMES[0]}.jsonl").rename(data / "data" / "train-00009-of-00003.jsonl")
        with pytest.raises(DatasetRefused, match="row 1 is not what the audit read as r0"):
            apply_edits(ApplyRequest(edits, local(data, split="train"), tmp_path / "clean"))
        (data / "data" / "train-00009-of-00003.jsonl").unlink()
        with pytest.raises(DatasetRefused, match="has 4 rows and the edits have 6"):
            apply_edits(ApplyRequest(edits, local(data, split="train"), tmp_path / "clean"))
        assert not (tmp_path / "clean").exists()

    @pytest.mark.parametrize("number", [0, 1])
    def test_an_edited_folder_that_was_changed_is_not_restored(self, tmp_path: Path, number: int) -> None:
        self.write(tmp_path / "data", ".jsonl", (2, 2, 2))
        out = tmp_path / "clean"
        run(tmp_path / "data", ["keep", "drop", "keep", "keep", "keep", "drop"], out, split="train")
        with (out / f"{self.NAMES[number]}.jsonl").open("a") as file:
            file.write("\n")
        with pytest.raises(InputRefused, match=f"train-0000{number}-of-00003.jsonl was changed since"):
            undo_edits(out)

    def test_files_that_were_added_stay(self, tmp_path: Path) -> None:
        self.write(tmp_path / "data", ".parquet", (2, 2, 2))
        run(tmp_path / "data", SIX, tmp_path / "clean", split="train")
        (tmp_path / "clean" / "NOTES.md").write_text("mine")
        undo_edits(tmp_path / "clean")
        assert (tmp_path / "clean" / "NOTES.md").read_text() == "mine"

    def test_refusals(self, tmp_path: Path) -> None:
        data = tmp_path / "place" / "data"
        self.write(data, ".jsonl", (2, 2, 2))
        for out in (data / "clean", data.parent, data):
            with pytest.raises(InputRefused, match="would replace the original"):
                run(data, SIX, out, split="train", force=True)
        with pytest.raises(InputRefused, match="is the name of a file"):
            run(data, SIX, tmp_path / "clean.jsonl", split="train")
        (tmp_path / "clean.removed").mkdir()
        with pytest.raises(InputRefused, match=r"clean\.removed is already there"):
            run(data, SIX, tmp_path / "clean", split="train")
        with pytest.raises(DatasetRefused, match="splits"):
            apply_edits(ApplyRequest(data.parent / "edits.jsonl", local(data), tmp_path / "other"))
        (data / f"{self.NAMES[0]}.jsonl.gz").write_bytes(gzip.compress(jsonl(rows(8)[6:])))
        with pytest.raises(DatasetRefused, match="packed and unpacked"):
            run(data, [*SIX, "keep", "keep"], tmp_path / "other", split="train")
        assert not (tmp_path / "other").exists()


class TestBudget:
    def test_each_axis_is_cut_anew(self, tmp_path: Path) -> None:
        data, out = tmp_path / "data.jsonl", tmp_path / "clean.jsonl"
        values = [{**row, "axis": "a" if row["n"] < 20 else "b"} for row in rows(60)]
        data.write_bytes(jsonl(values))
        result = run(data, ["drop"] * 59 + ["keep"], out, budget=0.1, suspicion=[i / 60 for i in range(60)])
        left = [json.loads(line)["n"] for line in out.read_text().splitlines()]
        assert [n for n in range(60) if n not in left] == [18, 19, 56, 57, 58, 59]
        assert result.left == {"review": 6}
        assert read_manifest(out).budget == 0.1

    def test_flips_come_back_only_where_the_audit_allowed_them_and_they_are_asked_for(self, tmp_path: Path) -> None:
        data = tmp_path / "data.jsonl"
        data.write_bytes(jsonl(rows(20)))
        actions, suspicion = ["keep"] * 19 + ["flip"], [i / 20 for i in range(20)]
        asked = run(data, actions, tmp_path / "a.jsonl", BOTH, budget=0.1, suspicion=suspicion)
        unasked = run(data, actions, tmp_path / "b.jsonl", budget=0.1, suspicion=suspicion)
        assert (asked.dropped, asked.flipped, unasked.dropped, unasked.flipped) == (0, 2, 2, 0)

    def test_a_budget_out_of_range_is_refused(self, tmp_path: Path) -> None:
        data = tmp_path / "data.jsonl"
        data.write_bytes(jsonl(rows(6)))
        with pytest.raises(SpecError, match="out of range"):
            run(data, SIX, tmp_path / "o.jsonl", budget=0.9)


class TestChangedDatasets:
    """A dataset that is not the audited one is refused before anything is written."""

    @pytest.fixture
    def case(self, tmp_path: Path) -> tuple[Path, Path, Path]:
        data = tmp_path / "data.jsonl"
        data.write_bytes(jsonl(rows(6)))
        return data, write_edits(tmp_path / "edits.jsonl", local(data), SIX), tmp_path / "out" / "clean.jsonl"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda v: v[:5], "has 5 rows and the edits have 6 lines"),
            (lambda v: [*v, {**v[0], "id": "new", "prompt": "x"}], "has 7 rows"),
            (lambda v: [v[1], v[0], *v[2:]], "row 1 is not what the audit read as r0"),
            (lambda v: [*v[:3], {**v[3], "chosen": "other"}, *v[4:]], "row 4 is not what the audit read as r3"),
            (lambda v: [*v[:5], {**v[5], "id": "renamed"}], "row 6 is not"),
            (lambda v: [flipped(v[0]), *v[1:]], "row 1 is not"),
        ],
    )
    def test_refused(self, case: tuple[Path, Path, Path], change: Any, message: str) -> None:
        data, edits, out = case
        data.write_bytes(jsonl(change(rows(6))))
        with pytest.raises(DatasetRefused, match=message) as caught:
            apply_edits(ApplyRequest(edits, local(data), out))
        assert "audited" in caught.value.hint
        assert not out.parent.exists()

    def test_columns_that_say_nothing_of_the_pair_may_change(self, case: tuple[Path, Path, Path]) -> None:
        data, edits, out = case
        data.write_bytes(jsonl([{**row, "note": "new"} for row in rows(6)]))
        assert apply_edits(ApplyRequest(edits, local(data), out)).dropped == 2

    def test_malformed_and_repeated_rows_are_kept_and_counted(self, tmp_path: Path) -> None:
        values: list[dict[str, Any]] = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows(6)]
        values[2] = values[1]
        values[4] = {"prompt": "p", "chosen": None, "rejected": 3}
        data, out = tmp_path / "data.jsonl", tmp_path / "clean.jsonl"
        data.write_bytes(jsonl(values))
        result = run(data, ["drop", "keep", "drop", "keep", "keep", "keep"], out)
        assert result.dropped == 2
        assert out.read_bytes() == jsonl([values[1], *values[3:]])

    def test_with_the_column_map_it_was_audited_with(self, tmp_path: Path) -> None:
        values = [
            {"key": row["id"], "ask": row["prompt"], "pair": {"win": row["chosen"], "lose": row["rejected"]}} for row in rows(6)
        ]
        columns = {"id": "key", "prompt": "ask", "chosen": "pair.win", "rejected": "pair.lose"}
        data, out = tmp_path / "data.jsonl", tmp_path / "clean.jsonl"
        data.write_bytes(jsonl(values))
        run(data, SIX, out, BOTH, columns=columns)
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert found[2]["pair"] == {"win": "bad 3", "lose": "good 3"}
        assert len(found) == 4
        with pytest.raises(DatasetRefused):
            apply_edits(ApplyRequest(tmp_path / "edits.jsonl", local(data), tmp_path / "other.jsonl"))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_with_a_winner_column(tmp_path: Path, suffix: str) -> None:
    winners = ["1", "2", "2", "1", "2", "0"]
    values = [
        {"id": f"r{i}", "ask": f"p{i}", "first": f"x{i}", "second": f"y{i}", "better": winner} for i, winner in enumerate(winners)
    ]
    data, out = tmp_path / f"data{suffix}", tmp_path / f"clean{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([{**value, "better": int(value["better"])} for value in values]), data)
    elif suffix == ".csv":
        data.write_text("\n".join([",".join(values[0]), *(",".join(value.values()) for value in values)]))
    else:
        data.write_bytes(jsonl(values))
    columns = {"prompt": "ask", "response_a": "first", "response_b": "second", "winner": "better"}
    spec = local(data, columns=columns, winners={"1": "a", "2": "b", "0": "tie"})
    edits = write_edits(tmp_path / "edits.jsonl", spec, ["flip", "drop", "flip", "keep", "keep", "keep"])
    apply_edits(ApplyRequest(edits, spec, out, frozenset({"drop", "flip"})))
    expected = [{**values[0], "better": "2"}, {**values[2], "better": "1"}, *values[3:]]
    assert [{**row, "better": str(row["better"])} for row in resolve_dataset(local(out)).rows()] == expected
    undo_edits(out)
    assert list(resolve_dataset(local(out)).rows()) == list(resolve_dataset(local(data)).rows())


class TestRefusals:
    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_bytes(jsonl(rows(6)))
        return path

    def test_an_existing_output_needs_force(self, data: Path, tmp_path: Path) -> None:
        out = tmp_path / "clean.jsonl"
        out.write_text("mine")
        with pytest.raises(InputRefused, match="already there"):
            run(data, SIX, out)
        assert out.read_text() == "mine"
        assert run(data, SIX, out, force=True).dropped == 2
        assert out.read_bytes() == jsonl(edited(rows(6), SIX, frozenset({"drop"})))

    def test_a_folder_is_replaced_with_force(self, tmp_path: Path) -> None:
        data, out = tmp_path / "data", tmp_path / "clean"
        datasets.Dataset.from_list(rows(6)).save_to_disk(str(data))
        run(data, SIX, out)
        run(data, ["drop"] * 5 + ["keep"], out, force=True)
        assert [row["n"] for row in datasets.load_from_disk(str(out))] == [5]

    @pytest.mark.parametrize("applied_before", [False, True])
    @pytest.mark.parametrize("kind", ["saved", "folder"])
    def test_a_folder_with_files_of_others_is_never_replaced(self, kind: str, applied_before: bool, tmp_path: Path) -> None:
        data, out = tmp_path / "data", tmp_path / "clean"
        if kind == "saved":
            datasets.Dataset.from_list(rows(6)).save_to_disk(str(data))
        else:
            data.mkdir()
            (data / "train.jsonl").write_bytes(jsonl(rows(6)))
        if applied_before:
            run(data, SIX, out)
            run(data, SIX, out, force=True)
        out.mkdir(exist_ok=True)
        (out / "thesis.tex").write_text("mine")
        with pytest.raises(InputRefused, match="apply did not write") as raised:
            run(data, SIX, out, force=True)
        assert "another --out" in raised.value.hint
        assert (out / "thesis.tex").read_text() == "mine"
        (out / "thesis.tex").rename(tmp_path / "thesis.tex")
        if applied_before:
            (tmp_path / "clean.removed" / "mine.txt").write_text("mine")
            with pytest.raises(InputRefused, match=r"clean\.removed holds files that apply did not write"):
                run(data, SIX, out, force=True)

    def test_a_file_named_as_the_removed_rows_is_never_replaced(self, data: Path, tmp_path: Path) -> None:
        out, mine = tmp_path / "clean.jsonl", tmp_path / "clean.removed.jsonl"
        mine.write_text("mine")
        for actions in (SIX, ["keep"] * 6):
            with pytest.raises(InputRefused, match=r"apply did not write .*clean\.removed\.jsonl"):
                run(data, actions, out, force=True)
        assert mine.read_text() == "mine"

    def test_the_original_is_never_the_output(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(InputRefused, match="would replace the original"):
            run(data, SIX, data, force=True)
        link = tmp_path / "link.jsonl"
        link.symlink_to(data)
        with pytest.raises(InputRefused, match="would replace the original"):
            run(data, SIX, link, force=True)

    def test_the_output_is_named_for_the_format(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(InputRefused, match="not a name for a jsonl file"):
            run(data, SIX, tmp_path / "clean.parquet")

    def test_only_local_files_are_edited(self, data: Path, tmp_path: Path) -> None:
        edits = write_edits(tmp_path / "edits.jsonl", local(data), SIX)
        hub = DatasetSpec(source=HubSource(path="org/name"))
        with pytest.raises(DatasetRefused, match="local files"):
            apply_edits(ApplyRequest(edits, hub, tmp_path / "o.jsonl"))
        with pytest.raises(DatasetRefused, match="no file or folder"):
            apply_edits(ApplyRequest(edits, local(tmp_path / "none.jsonl"), tmp_path / "o.jsonl"))
        (tmp_path / "data.txt").write_text("x")
        with pytest.raises(DatasetRefused, match="not a kind of file"):
            apply_edits(ApplyRequest(edits, local(tmp_path / "data.txt"), tmp_path / "o.txt"))

    def test_dropping_every_row_is_refused(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(InputRefused, match="every row"):
            run(data, ["drop"] * 6, tmp_path / "o.jsonl")

    def test_no_action_is_no_request(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match="no action"):
            run(data, SIX, tmp_path / "o.jsonl", frozenset())

    def test_a_single_json_object_has_no_rows_to_take_out(self, tmp_path: Path) -> None:
        data = tmp_path / "data.json"
        data.write_text(json.dumps(rows(1)[0], indent=1))
        with pytest.raises(DatasetRefused, match="single JSON object"):
            run(data, ["flip"], tmp_path / "o.json", BOTH)

    def test_a_failed_apply_leaves_nothing(self, tmp_path: Path) -> None:
        values = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": [f"b{i}", f"c{i}"]} for i in range(3)]
        data = tmp_path / "data.jsonl"
        data.write_bytes(jsonl(values))
        with pytest.raises(DatasetRefused, match="several pairs"):
            run(data, ["keep", "flip", "keep"], tmp_path / "o.jsonl", BOTH)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "edits.jsonl"]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_an_unwritable_place_is_a_resource_error(self, data: Path, tmp_path: Path) -> None:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(ResourceError):
            run(data, SIX, tmp_path / "locked" / "o.jsonl")

    def test_a_path_through_a_file_is_a_resource_error(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(ResourceError, match="cannot write"):
            run(data, SIX, tmp_path / "edits.jsonl" / "o.jsonl")


class TestUndo:
    @pytest.fixture
    def out(self, tmp_path: Path) -> Path:
        data = tmp_path / "data.jsonl"
        data.write_bytes(jsonl(rows(6)))
        run(data, SIX, tmp_path / "clean.jsonl", BOTH)
        return tmp_path / "clean.jsonl"

    def test_an_output_that_was_changed_is_refused(self, out: Path) -> None:
        before = out.read_bytes()
        out.write_bytes(before + b"\n")
        with pytest.raises(InputRefused, match="was changed since"):
            undo_edits(out)
        assert out.read_bytes() == before + b"\n"
        assert manifest_path(out).exists()

    def test_a_table_whose_removed_rows_were_changed_is_refused(self, tmp_path: Path) -> None:
        data, out = tmp_path / "data.parquet", tmp_path / "clean.parquet"
        pq.write_table(pa.Table.from_pylist(rows(6)), data)
        run(data, SIX, out)
        removed = removed_path(out, "parquet")
        pq.write_table(pa.Table.from_pylist(rows(2)), removed)
        with pytest.raises(InputRefused, match=r"removed\.parquet was changed"):
            undo_edits(out)
        removed.unlink()
        with pytest.raises(InputRefused, match="cannot read"):
            undo_edits(out)

    def test_a_manifest_that_was_changed_does_not_give_other_bytes(self, out: Path) -> None:
        path = manifest_path(out)
        before = out.read_bytes()
        path.write_text(path.read_text().replace("good 1", "evil 1"))
        with pytest.raises(ArtifactError, match="not those of the original"):
            undo_edits(out)
        assert out.read_bytes() == before

    @pytest.mark.parametrize("name", ["../data.jsonl", "..", "/etc/hosts", "a/b"])
    def test_a_manifest_that_names_files_elsewhere_is_refused(self, out: Path, name: str) -> None:
        document = json.loads(manifest_path(out).read_text())
        manifest_path(out).write_text(json.dumps({**document, "removed": name}))
        with pytest.raises(InputRefused, match="damaged"):
            undo_edits(out)

    @pytest.mark.parametrize("content", ["{", "{}", '{"manifest_version": 2}'])
    def test_a_damaged_manifest_is_refused(self, out: Path, content: str) -> None:
        manifest_path(out).write_text(content)
        with pytest.raises(InputRefused, match="damaged"):
            undo_edits(out)

    def test_without_a_manifest_or_output_there_is_nothing_to_undo(self, out: Path, tmp_path: Path) -> None:
        with pytest.raises(InputRefused, match="cannot read"):
            undo_edits(tmp_path / "other.jsonl")
        out.unlink()
        with pytest.raises(InputRefused, match="nothing at"):
            undo_edits(out)

    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_an_undo_that_was_broken_off_can_be_finished(
        self, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data, out = tmp_path / f"data{suffix}", tmp_path / f"done{suffix}"
        pq.write_table(pa.Table.from_pylist(rows(6)), data) if suffix == ".parquet" else data.write_bytes(jsonl(rows(6)))
        run(data, SIX, out)
        kept = {path: path.read_bytes() for path in (removed_path(out, suffix[1:]), manifest_path(out))}
        noted = manifest_path(out)
        seen: list[bytes] = []
        replace = os.replace

        def noting(source: Any, target: Any) -> None:
            replace(source, target)
            if Path(target) == noted:
                seen.append(noted.read_bytes())

        monkeypatch.setattr(os, "replace", noting)
        undo_edits(out)
        monkeypatch.undo()
        restored = out.read_bytes()
        for path, content in kept.items():
            path.write_bytes(seen[0] if path == noted else content)  # as a crash after the last replacement leaves it
        assert undo_edits(out).dropped == 2
        assert out.read_bytes() == restored
        assert not noted.exists()
        assert not removed_path(out, suffix[1:]).exists()

    def test_apply_after_undo_starts_afresh(self, out: Path, tmp_path: Path) -> None:
        undo_edits(out)
        with pytest.raises(InputRefused, match="already there"):
            run(tmp_path / "data.jsonl", SIX, out)
        assert run(tmp_path / "data.jsonl", SIX, out, force=True).dropped == 2
