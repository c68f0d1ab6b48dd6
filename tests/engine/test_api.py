"""The Python interface: what it takes, and the frames it gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from safer_engine.api import AuditReport, audit
from safer_engine.artifacts import Artifact, Edits, PairScores, Report
from safer_engine.errors import DatasetRefused, SpecError
from safer_engine.report.tables import scores_table
from safer_engine.sources.memory import plain_rows, resolve_memory
from safer_engine.spec import AuditSpec
from safer_engine.store import LocalArtifactStore, ManifestDraft
from tests.helpers import fake_artifacts
from tests.helpers.fake_artifacts import FakeAudit

ROWS = [{"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}", "axis": str(n % 2)} for n in range(30)]


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeAudit:
    return fake_artifacts.build(tmp_path_factory.mktemp("fake"))


def committed(store: LocalArtifactStore, kind: type[Artifact], stage: str, files: dict[str, bytes]) -> Artifact:
    with store.open_work(stage, "0" * 64) as work:
        for name, content in files.items():
            with work.publish(name) as path:
                path.write_bytes(content)
        return kind(store.commit(stage, "0" * 64, work, ManifestDraft(1, kind.__name__, {})))


def edit_line(pair_id: str, axis: str, suspicion: float | None) -> dict[str, Any]:
    figures = {"suspicion": suspicion, "pair_score": None, "reward_margin": suspicion}
    return {"pair_id": pair_id, "axis": axis, "group": "007", "status": "scored", "action": "keep", **figures}


def test_edits_keep_names_that_look_like_numbers_and_every_digit(tmp_path: Path) -> None:
    exact = [0.1 + 0.2, 1 / 3, None]
    lines = [edit_line(f"0{n}", "0", value) for n, value in enumerate(exact)]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    edits = committed(LocalArtifactStore(tmp_path), Edits, "edits", {"edits.jsonl": content})
    frame = AuditReport({Edits: edits}).edits
    assert frame["pair_id"].tolist() == ["00", "01", "02"]
    assert frame["axis"].tolist() == ["0"] * 3
    assert frame["group"].tolist() == ["007"] * 3
    assert frame["suspicion"].tolist()[:2] == exact[:2]
    assert np.isnan(frame["suspicion"].iloc[2])
    assert {str(frame[name].dtype) for name in ("suspicion", "pair_score", "reward_margin")} == {"float64"}


def test_edits_merge_with_pairs(fake: FakeAudit) -> None:
    scores = fake.found[PairScores]
    assert isinstance(scores, PairScores)
    pairs, edits = scores_table(scores).to_pandas(), AuditReport(fake.found).edits
    both = edits[edits["status"] == "scored"].merge(pairs, on=["pair_id", "axis"], suffixes=("", "_of_pairs"))
    assert len(both) == (edits["status"] == "scored").sum() > 0
    assert both["suspicion"].equals(both["suspicion_of_pairs"].rename("suspicion"))


def test_without_out_the_page_is_a_file_that_a_browser_opens_as_one(tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path / "store")
    report = AuditReport({Report: committed(store, Report, "report", {"report.html": b"<!doctype html>"})}, copies=tmp_path / "r")
    page = report.html
    assert page.name == "report.html"
    assert page.is_relative_to(tmp_path / "r")
    assert page.read_bytes() == b"<!doctype html>"
    before = page.stat().st_ino
    assert report.html == page
    assert page.stat().st_ino == before
    page.write_text("spoilt")
    assert report.html.read_bytes() == b"<!doctype html>"


def test_a_frame_gives_the_rows_it_was_made_from() -> None:
    messages = [{"role": "user", "content": "p"}]
    rows = [{"prompt": messages, "chosen": "c", "strength": 2, "style": None}, {"prompt": None, "chosen": "d", "strength": None}]
    frame = pd.DataFrame(rows)
    frame["prompt"] = pd.Series([np.array(messages, dtype=object), None])
    made = plain_rows(frame, "rows")
    assert made == [
        {"prompt": messages, "chosen": "c", "strength": 2.0, "style": None},
        {"prompt": None, "chosen": "d", "strength": None, "style": None},
    ]
    assert resolve_memory(plain_rows(pd.DataFrame(ROWS), "rows")).digest == resolve_memory(ROWS).digest


@pytest.mark.parametrize("rows", ["rows.jsonl", Path("rows.jsonl"), {"chosen": "a"}, 7, ["a", "b"], [("chosen", "a")]])
def test_rows_that_are_none_say_what_to_give(rows: Any, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="rows") as raised:
        audit(model="m", rows=rows, store=tmp_path)
    assert "DataFrame" in raised.value.hint


@pytest.mark.parametrize(("section", "keyword"), [("dataset", "rows"), ("evaluation", "evaluation_rows")])
@pytest.mark.parametrize("named", ["rows.jsonl", Path("rows.jsonl"), {"source": "rows.jsonl"}, {"source": {"kind": "local"}}])
def test_rows_beside_another_source_are_refused(section: str, keyword: str, named: Any, tmp_path: Path) -> None:
    document: dict[str, Any] = {"dataset": "d.jsonl", section: named}
    given: dict[str, Any] = {keyword: ROWS}
    with pytest.raises(SpecError, match=f"both {keyword} and the source of {section}"):
        audit({"model": "m", **document}, store=tmp_path, **given)
    spec = AuditSpec.model_validate(
        {"model": {"path": "m"}, **{name: {"source": {"kind": "local", "path": "x"}} for name in ("dataset", "evaluation")}}
    )
    with pytest.raises(SpecError, match=f"both {keyword} and the source of {section}"):
        audit(spec, store=tmp_path, **given)


def test_a_section_may_say_how_rows_are_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"dataset\.format"):
        audit(model="m", rows=ROWS, dataset={"format": "odd"}, store=tmp_path)


def test_paths_are_as_good_as_their_text(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for dataset in (data, {"source": data}, {"source": {"kind": "local", "path": data}}):
        for model in (tmp_path / "none", {"path": tmp_path / "none"}):
            with pytest.raises(Exception, match=f"{tmp_path / 'none'}") as raised:
                audit(model=model, dataset=dataset, store=tmp_path / "store")
            assert raised.typename == "ModelRefused"
    with pytest.raises(SpecError, match="the spec is a PosixPath"):
        audit(tmp_path / "audit.yaml")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="out is empty"):
        audit(model="m", rows=ROWS, store=tmp_path, out="")


def test_values_without_a_word_in_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetRefused, match="JSON has no word"):
        resolve_memory(plain_rows([{"chosen": object()}], "rows"))


@pytest.mark.parametrize(("given", "kept"), [(None, "AUTO"), ("COMPATIBLE", "COMPATIBLE")])
def test_products_of_matrices_do_not_depend_on_where_they_lie(given: str | None, kept: str) -> None:
    """On some processors the last bits of a resumed training do, unless MKL is told before its first call; a user may choose."""
    others = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    code = "import os, safer_engine; print(os.environ['MKL_CBWR'])"
    environment = others | ({"MKL_CBWR": given} if given else {})
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == kept
