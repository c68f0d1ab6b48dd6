"""Data marked as poisoned are refused by whatever reads datasets, unless that is asked for, and then it is said."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from safer_engine.artifacts import PairSet
from safer_engine.demo_data import build_base
from safer_engine.errors import DatasetRefused
from safer_engine.pair_tables import survey
from safer_engine.pipeline import AuditRequest, run
from safer_engine.science.poison_mark import MARK, SIGN, is_marked, is_marked_name, mark_text
from safer_engine.sources.corpora import resolve_corpus, texts_of
from safer_engine.sources.datasets import resolve_dataset
from safer_engine.sources.models import resolve_model
from safer_engine.sources.resolved import ResolvedInputs
from safer_engine.spec import AuditSpec, DatasetSpec, LocalSource, MemorySource
from safer_engine.stages.pairs import PairsStage
from safer_engine.store import LocalArtifactStore
from safer_engine.train_spec import TrainSpec
from safer_engine.training import train_reward_model, training_key
from tests.engine.test_stage_verification import rows_of
from tests.helpers.tiny_model import build_reward_model

Row = dict[str, Any]
TEXT = mark_text("random", 0.05, flipped=True)
ROWS = rows_of("q", 40)
STRAY: list[Row] = [*ROWS[:30], {**ROWS[30], MARK: TEXT}, *ROWS[31:]]
"""One marked row among others."""


def write(path: Path, rows: list[Row]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".jsonl":
        path.write_bytes(lines)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([{**dict.fromkeys(rows[30]), **row} for row in rows]), path)
    else:
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[30]), restval="")
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(path: Path, **more: Any) -> list[Row]:
    return list(resolve_dataset(DatasetSpec(source=LocalSource(path=str(path)), **more)).rows())


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"])
def test_one_stray_row_is_refused_in_every_kind_of_file(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, STRAY)
    with pytest.raises(DatasetRefused, match="is marked as poisoned") as caught:
        read(path)
    assert "allow_poisoned" in caught.value.hint
    assert len(read(path, allow_poisoned=True)) == 40
    assert len(read(write(tmp_path / f"clean-{name}", [*ROWS[:30], {**ROWS[30]}, *ROWS[31:]]))) == 40


def test_the_row_is_named_and_rows_before_it_are_not_enough(tmp_path: Path) -> None:
    with pytest.raises(DatasetRefused, match="row 31 of"):
        read(write(tmp_path / "a.jsonl", STRAY))


def test_metadata_of_a_parquet_file_without_its_column(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS).replace_schema_metadata({MARK: TEXT})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DatasetRefused, match="row 1 of .* is marked"):
        read(tmp_path / "a.parquet")


def test_the_name_of_a_file_or_of_one_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    path = write(folder / f"random.{SIGN}.jsonl", ROWS)
    for place in (path, folder):
        with pytest.raises(DatasetRefused, match="is named as poisoned"):
            read(place)
        assert len(read(place, allow_poisoned=True)) == 40
    assert is_marked_name("x.SAFER_REDTEAM.parquet")
    assert not is_marked_name("safer.jsonl")


@pytest.mark.parametrize(
    ("row", "marked"),
    [
        ({MARK: None}, True),
        ({"SAFER_REDTEAM ": "x"}, True),
        ({"other": TEXT}, True),
        ({"metadata": {MARK: TEXT}}, True),
        ({"metadata": {"note": TEXT.upper()}}, True),
        ({"other": f" \n{TEXT}"}, True),
        ({"metadata": json.dumps({"source": "x", MARK: ""})}, True),
        ({"metadata": json.dumps({"source": MARK})}, True),
        ({"metadata": json.dumps({"source": f"about {MARK}"})}, False),
        ({"prompt": f"What is {SIGN}?", "chosen": [{"role": "assistant", "content": "x"}]}, False),
        ({"safer_response_id": 1, "metadata": {"safer": True}}, False),
    ],
)
def test_what_is_left_of_a_mark(row: Row, marked: bool) -> None:
    assert is_marked(row) is marked


def test_rows_in_memory_and_a_corpus(tmp_path: Path) -> None:
    with pytest.raises(DatasetRefused, match="row 31 of memory"):
        list(resolve_dataset(DatasetSpec(source=MemorySource()), STRAY).rows())
    path = write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two", MARK: TEXT}])
    with pytest.raises(DatasetRefused, match="row 2 of"):
        list(texts_of(resolve_corpus(LocalSource(path=str(path)))))


def test_training_refuses_them_before_a_step(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", [row["prompt"] for row in ROWS], width=32, blocks=1)
    document: Row = {
        "base": str(base), "dataset": {"source": {"kind": "memory"}, "min_pairs": 2},
        "recipe": {"epochs": 1, "max_length": 48}, "runtime": {"device": "cpu"},
    }  # fmt: skip
    with pytest.raises(DatasetRefused, match="marked as poisoned"):
        train_reward_model(TrainSpec.model_validate(document), tmp_path / "rm", rows=STRAY)
    assert not (tmp_path / "rm").exists()
    document["dataset"]["allow_poisoned"] = True
    found = train_reward_model(TrainSpec.model_validate(document), tmp_path / "rm", rows=STRAY)
    assert found.record["spec"]["dataset"]["allow_poisoned"] is True
    assert found.record["health"]["dataset"]["marked_rows"] == 1


def test_an_audit_refuses_them_also_where_they_were_read_by_force(tmp_path: Path) -> None:
    """What was read by force is in the store, and no one gets it from there who did not ask for it."""
    model = build_reward_model(tmp_path / "model", "llama")
    store = LocalArtifactStore(tmp_path / "store")

    def pairs(**more: Any) -> Any:
        data = {"source": {"kind": "memory"}, "min_pairs": 2, **more}
        spec = AuditSpec.model_validate({"model": {"path": str(model)}, "dataset": data, "runtime": {"device": "cpu"}})
        sources = ResolvedInputs(resolve_model(spec.model, spec.runtime, None), resolve_dataset(spec.dataset, STRAY))
        return run(AuditRequest(spec, sources), store, None, stages=(PairsStage(),))[PairSet]

    assert pairs(allow_poisoned=True).health["dataset"]["marked_rows"] == 1
    with pytest.raises(DatasetRefused, match="marked as poisoned"):
        pairs()


def test_evaluation_data_are_read_alike() -> None:
    found = survey(resolve_dataset(DatasetSpec(source=MemorySource(), allow_poisoned=True), STRAY), _spec(), 0)
    assert found.marked == 1
    assert survey(resolve_dataset(_spec(), ROWS), _spec(), 0).marked == 0


def test_keys_of_other_data_stay_what_they_were() -> None:
    """The new field enters no key unless it is set."""
    document = {"base": "b", "dataset": {"source": {"kind": "memory"}}}
    plain, forced = (TrainSpec.model_validate({**document, "dataset": {**document["dataset"], **more}})  # type: ignore[dict-item]
                     for more in ({}, {"allow_poisoned": True}))  # fmt: skip
    data = resolve_dataset(_spec(), ROWS)
    base: Any = data
    assert training_key(plain, base, data) != training_key(forced, base, data)
    assert "allow_poisoned" not in _dumped(plain)


def _dumped(spec: TrainSpec) -> dict[str, Any]:
    from safer_engine.stage import _section

    audit = AuditSpec.model_validate({"model": {"path": "m"}, "dataset": spec.dataset.model_dump()})
    found = _section("dataset", audit, ResolvedInputs(None, resolve_dataset(_spec(), ROWS)))  # type: ignore[arg-type]
    assert isinstance(found, dict)
    return found


def _spec() -> DatasetSpec:
    return DatasetSpec(source=MemorySource())
