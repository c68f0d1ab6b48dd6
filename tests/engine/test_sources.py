"""Dataset sources: the same rows come out of every kind of file, and what can't be read is refused with a hint."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safer_engine.errors import DatasetRefused
from safer_engine.sources.datasets import resolve_dataset
from safer_engine.spec import DatasetSpec, LocalSource, MemorySource
from safer_engine.spec_layers import expand
from tests.helpers.hub_stand_in import HubStandIn, commit_of

Row = dict[str, Any]
ROWS: list[Row] = [
    {"id": "a", "prompt": "Wie geht's? 🙌", "chosen": 'Good,\n"really" good.', "rejected": "Bad."},
    {"id": "b", "prompt": "q\u2028r", "chosen": "x; y", "rejected": "z"},
]


def spec_of(path: Path, split: str | None = None) -> DatasetSpec:
    return DatasetSpec(source=LocalSource(path=str(path), split=split))


def read(path: Path, split: str | None = None) -> list[Row]:
    return list(resolve_dataset(spec_of(path, split)).rows())


def refusal(path: Path, split: str | None = None) -> DatasetRefused:
    with pytest.raises(DatasetRefused) as caught:
        read(path, split)
    assert caught.value.hint
    return caught.value


def as_jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def as_json(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")


def as_wrapped_json(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps({"data": rows, "version": 1}), encoding="utf-8")


def as_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(path: Path, rows: list[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


KINDS: list[tuple[str, Callable[[Path, list[Row]], None]]] = [
    ("rows.jsonl", as_jsonl),
    ("rows.json", as_json),
    ("rows.json", as_wrapped_json),
    ("rows.json", as_jsonl),
    ("rows.csv", as_csv),
    ("rows.parquet", as_parquet),
]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("name", "write"), KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, write: Any, zipped: bool) -> None:
    path = tmp_path / name
    write(path, ROWS)
    if zipped:
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        path = packed
    source = resolve_dataset(spec_of(path))
    assert list(source.rows()) == ROWS
    assert list(source.rows()) == ROWS, "rows can be read again"
    assert (source.origin, source.revision, len(source.digest)) == (str(path), None, 64)


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    path, copy = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    as_jsonl(path, ROWS)
    copy.write_bytes(path.read_bytes())
    before = resolve_dataset(spec_of(path)).digest
    assert resolve_dataset(spec_of(copy)).digest == before
    as_jsonl(path, ROWS[:1])
    assert resolve_dataset(spec_of(path)).digest != before


def test_bom_crlf_and_blank_lines_are_tolerated(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in ROWS]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"\r\n{lines[0]}\r\n\r\n  \r\n{lines[1]}".encode())
    assert read(path) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b'{"a": 1}\n\n{"a": 2,\n', "rows.jsonl, line 3: not JSON"),
        ("rows.jsonl", b'{"a": 1}\n[2]\n', "line 2: a list where an object"),
        ("rows.jsonl", b'{"a": "\xff"}\n', "not UTF-8"),
        ("rows.jsonl.gz", b"plain", "not a whole gzip file"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "not a whole gzip file"),
        ("rows.json", b'[{"a": 1},\n {"a": }]', "line 2: not JSON"),
        ("rows.json", b'{"data": 3}', "no list of rows"),
        ("rows.json", b'[{"a": 1}, 2]', "row 2: a int"),
        ("rows.csv", b"a,b\n1,2\n3\n", "line 3: not as many fields"),
        ("rows.csv", b"a,b\n1,2,3\n", "line 2: not as many fields"),
        ("rows.csv", b'a,b\n1,"2"x\n', "not CSV"),
        ("rows.parquet", b"nothing", "not a parquet file"),
        ("rows.xlsx", b"", "not a kind of file"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert words in refusal(tmp_path / name).message


def test_rows_before_a_broken_line_are_read_first(tmp_path: Path) -> None:
    """Rows stream: nothing after the first row is looked at until it is asked for."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nnot json\n')
    rows = resolve_dataset(spec_of(path)).rows()
    assert next(rows) == {"a": 1}
    with pytest.raises(DatasetRefused, match="line 2"):
        next(rows)


def test_long_csv_fields(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "x" * 300_000, "rejected": "y"}]
    as_csv(tmp_path / "rows.csv", rows)
    assert read(tmp_path / "rows.csv") == rows


def test_a_folder_of_files_is_read_in_order(tmp_path: Path) -> None:
    as_jsonl(tmp_path / "part-1.jsonl", ROWS[1:])
    as_jsonl(tmp_path / "part-0.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("words")
    (tmp_path / ".hidden.jsonl").write_text("not json")
    assert read(tmp_path) == ROWS
    before = resolve_dataset(spec_of(tmp_path)).digest
    (tmp_path / "part-0.jsonl").rename(tmp_path / "part-2.jsonl")
    assert resolve_dataset(spec_of(tmp_path)).digest != before, "the order of the files is content"


def test_splits_of_a_folder(tmp_path: Path) -> None:
    as_jsonl(tmp_path / "train-00000-of-00001.jsonl", ROWS[:1])
    as_jsonl(tmp_path / "test.jsonl", ROWS[1:])
    assert (read(tmp_path, "train"), read(tmp_path, "test")) == (ROWS[:1], ROWS[1:])
    assert "several splits: test, train" in refusal(tmp_path).message
    assert f"{tmp_path}#test or {tmp_path}#train" in refusal(tmp_path).hint
    assert "no files of split 'dev'" in refusal(tmp_path, "dev").message
    assert f"{tmp_path}#test or {tmp_path}#train" in refusal(tmp_path, "dev").hint
    as_csv(tmp_path / "validation.csv", ROWS)
    assert "several splits: test, train, validation" in refusal(tmp_path).message, "splits come before kinds of file"


def test_what_the_hint_says_can_be_typed(tmp_path: Path) -> None:
    as_jsonl(tmp_path / "train.jsonl", ROWS[:1])
    as_jsonl(tmp_path / "test.jsonl", ROWS[1:])
    words = refusal(tmp_path).hint.split()
    typed = [word for word in words if "#" in word]
    found = [DatasetSpec.model_validate(expand({"dataset": word})["dataset"]) for word in typed]
    assert [list(resolve_dataset(spec).rows()) for spec in found] == [ROWS[1:], ROWS[:1]]


def test_a_folder_whose_files_are_no_splits_says_how_to_name_them(tmp_path: Path) -> None:
    as_jsonl(tmp_path / "part-0.jsonl", ROWS)
    assert "leave the split out" in refusal(tmp_path, "train").hint


def test_folders_that_are_no_dataset(tmp_path: Path) -> None:
    assert "no data files" in refusal(tmp_path).message
    as_jsonl(tmp_path / "a.jsonl", ROWS)
    as_csv(tmp_path / "b.csv", ROWS)
    assert "several kinds: csv, jsonl" in refusal(tmp_path).message
    assert "no split" in refusal(tmp_path / "a.jsonl", "train").message
    assert "no file or folder" in refusal(tmp_path / "absent").message


def test_saved_to_disk(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    one, two = Dataset.from_list(ROWS), Dataset.from_list(ROWS[:1])
    one.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": one, "test": two}).save_to_disk(str(tmp_path / "several"))
    DatasetDict({"train": one}).save_to_disk(str(tmp_path / "single"))
    assert read(tmp_path / "one") == ROWS
    assert read(tmp_path / "several", "test") == ROWS[:1]
    assert read(tmp_path / "single") == ROWS
    folder = tmp_path / "several"
    assert "the splits train, test, and no split is named" in refusal(folder).message
    assert f"{folder}#train or {folder}#test" in refusal(folder).hint
    assert f"{folder}#train or {folder}#test" in refusal(folder, "dev").hint
    assert "no split 'dev'" in refusal(tmp_path / "several", "dev").message
    assert "one dataset" in refusal(tmp_path / "one", "train").message
    digests = {resolve_dataset(spec_of(tmp_path / name, split)).digest for name, split in (("one", None), ("several", "test"))}
    assert len(digests) == 2
    for file in (tmp_path / "one").glob("*.arrow"):
        file.unlink()
    assert "can't be read" in refusal(tmp_path / "one").message


def test_a_saved_dataset_that_reads_outside_its_folder_is_refused(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    (data,) = (tmp_path / "one").glob("*.arrow")
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "many"))
    (tmp_path / "many" / "dataset_dict.json").write_text('{"splits": ["../one"]}')
    assert "no folders beside it" in refusal(tmp_path / "many").message
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "dataset_info.json").write_bytes((tmp_path / "one" / "dataset_info.json").read_bytes())
    state = json.loads((tmp_path / "one" / "state.json").read_bytes())
    state["_data_files"] = [{"filename": f"../one/{data.name}"}]
    (tmp_path / "two" / "state.json").write_text(json.dumps(state))
    assert "outside its folder" in refusal(tmp_path / "two").message


def test_rows_in_memory() -> None:
    spec = DatasetSpec(source=MemorySource())
    source = resolve_dataset(spec, ROWS)
    assert list(source.rows()) == list(source.rows()) == ROWS
    assert resolve_dataset(spec, [dict(reversed(row.items())) for row in ROWS]).digest == source.digest
    assert resolve_dataset(spec, ROWS[:1]).digest != source.digest
    next(source.rows())["id"] = "changed"
    assert ROWS[0]["id"] == "a"


@pytest.mark.parametrize(
    ("rows", "words"),
    [(None, "no rows were given"), ([3], "row 1 is a int"), ([{"a": float("nan")}], "JSON"), ([{"a": {1, 2}}], "JSON")],
)
def test_rows_in_memory_that_are_refused(rows: Any, words: str) -> None:
    with pytest.raises(DatasetRefused, match=words):
        resolve_dataset(DatasetSpec(source=MemorySource()), rows)


HUB_CLIENT = """
import json, sys
from safer_engine.errors import DatasetRefused
from safer_engine.sources.datasets import resolve_dataset
from safer_engine.spec import DatasetSpec, HubSource

for request in json.loads(sys.argv[1]):
    try:
        found = resolve_dataset(DatasetSpec(source=HubSource(**request)))
        answer = {"digest": found.digest, "revision": found.revision, "rows": list(found.rows())}
    except DatasetRefused as refused:
        answer = {"refused": refused.message, "hint": refused.hint}
    print("answer", json.dumps(answer))
"""


def ask_hub(environment: dict[str, str], *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """What `resolve_dataset` answers in a process of its own: the client reads the endpoint when it is imported."""
    command = [sys.executable, "-c", HUB_CLIENT, json.dumps(requests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return [json.loads(line.removeprefix("answer ")) for line in done.stdout.splitlines() if line.startswith("answer ")]


def test_hub_datasets_are_pinned_fetched_and_found_again_offline(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "datasets" / "acme" / "prefs"
    (repository / "data").mkdir(parents=True)
    as_jsonl(repository / "data" / "train.jsonl", ROWS)
    as_jsonl(repository / "data" / "test.jsonl", ROWS[:1])
    commit = commit_of(repository)
    with HubStandIn(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "home")
        train, test, absent, unknown, split, name = ask_hub(
            environment,
            {"path": "acme/prefs"},
            {"path": "acme/prefs", "revision": "main", "split": "test"},
            {"path": "acme/absent"},
            {"path": "acme/prefs", "revision": "v9"},
            {"path": "acme/prefs", "split": "dev"},
            {"path": "a b/c"},
        )
        pinned = {"path": "acme/prefs", "revision": commit}
        offline = {**environment, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        cached, unpinned = ask_hub(offline, pinned, {"path": "acme/prefs"})
        assert any(request == f"GET /api/datasets/acme/prefs/revision/{commit}" for request in hub.requests)
    assert (train["rows"], train["revision"]) == (ROWS, commit)
    assert (test["rows"], test["revision"]) == (ROWS[:1], commit)
    assert train["digest"] != test["digest"]
    assert "no dataset 'acme/absent'" in absent["refused"]
    assert "no revision 'v9'" in unknown["refused"]
    assert "can't be read" in split["refused"]
    assert "acme/prefs#train or acme/prefs#test" in split["hint"]
    assert "not a dataset id" in name["refused"]
    assert (cached["rows"], cached["digest"]) == (ROWS, train["digest"])
    assert "can't be asked" in unpinned["refused"]
    assert "HF_HUB_OFFLINE" in unpinned["hint"]


def test_configurations_of_a_hub_dataset_are_named(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "datasets" / "acme" / "prefs"
    repository.mkdir(parents=True)
    as_jsonl(repository / "one.jsonl", ROWS)
    as_jsonl(repository / "two.jsonl", ROWS[:1])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("one", "two"))
    (repository / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with HubStandIn(tmp_path / "hub") as hub:
        missing, unknown, split, named = ask_hub(
            hub.environment(tmp_path / "home"),
            {"path": "acme/prefs"},
            {"path": "acme/prefs", "name": "three"},
            {"path": "acme/prefs", "name": "two", "split": "dev", "revision": "main"},
            {"path": "acme/prefs", "name": "two"},
        )
    assert "acme/prefs#one/train or acme/prefs#two/train" in missing["hint"]
    assert "acme/prefs#one/train or acme/prefs#two/train" in unknown["hint"]
    assert "acme/prefs@main#two/train (" in split["hint"]
    assert named["rows"] == ROWS[:1]


def test_a_hub_that_does_not_answer_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    with HubStandIn(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "home")
    (answer,) = ask_hub(environment, {"path": "acme/prefs"})
    assert "can't be asked" in answer["refused"]


def test_importing_the_sources_loads_no_heavy_library() -> None:
    code = (
        "import sys, safer_engine.sources.datasets, safer_engine.stages.pairs, safer_engine.preview;"
        "print([name for name in ('torch', 'transformers', 'pyarrow', 'datasets', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
