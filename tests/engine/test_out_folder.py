"""The folder of a report: nothing of a person's is ever lost there."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from safer_engine.api import export, run_request
from safer_engine.artifacts import Edits
from safer_engine.errors import ResourceError, SpecError
from safer_engine.events import NullObserver
from safer_engine.out_folder import OUT_FILES, RECORD, OutFolder
from safer_engine.pipeline import AuditRequest
from safer_engine.report.interim import write_interim
from safer_engine.spec import AuditSpec
from safer_engine.store import LocalArtifactStore, digest_bytes
from tests.helpers import fake_artifacts
from tests.helpers.fake_artifacts import FakeAudit


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> FakeAudit:
    return fake_artifacts.build(tmp_path_factory.mktemp("fake"))


def put(folder: OutFolder, name: str, text: str) -> None:
    with folder.publish(name) as path:
        path.write_text(text)


def spec_of(folder: Path, **more: Any) -> AuditSpec:
    dataset = {"source": {"kind": "local", "path": str(folder / "rows.jsonl")}}
    return AuditSpec.model_validate({"model": {"path": str(folder / "rm")}, "dataset": dataset, **more})


@pytest.mark.parametrize("name", OUT_FILES)
def test_a_file_that_no_audit_wrote_is_refused(tmp_path: Path, name: str) -> None:
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(SpecError, match=f"holds {name}, which no audit wrote there") as raised:
        OutFolder(tmp_path).check(spec_of(tmp_path))
    assert "another folder" in raised.value.hint
    mine.unlink()
    put(OutFolder(tmp_path), name, "ours")
    OutFolder(tmp_path).check(spec_of(tmp_path))


def test_a_link_or_folder_under_a_name_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.md").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SpecError, match=r"holds report\.md"):
        OutFolder(tmp_path).check(spec_of(tmp_path))
    (tmp_path / "report.md").unlink()
    (tmp_path / "sae").write_text("mine")
    with pytest.raises(SpecError, match="a file named sae"):
        OutFolder(tmp_path).check(spec_of(tmp_path))
    with pytest.raises(SpecError, match="is a file"):
        OutFolder(tmp_path / "sae").check(spec_of(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"record_version": 2, "files": {}}'])
def test_a_record_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(SpecError, match="no record") as raised:
        OutFolder(tmp_path).check(spec_of(tmp_path))
    assert "http" not in str(raised.value)


def test_an_input_where_a_file_would_be_written_is_refused_by_its_name(tmp_path: Path) -> None:
    sources = {name: {"kind": "local", "path": str(tmp_path / name)} for name in ("edits.jsonl", "evaluation.jsonl", "report.md")}
    for name in sources:  # as if an earlier audit had written them
        put(OutFolder(tmp_path), name, "x")
    documents: dict[str, dict[str, Any]] = {
        "evaluation": {"evaluation": {"source": sources["evaluation.jsonl"]}},
        "dataset": {"dataset": {"source": sources["edits.jsonl"]}},
        "corpus": {"sae": {"kind": "topk", "pretrain": {"corpus": sources["report.md"]}}},
        "rubric": {"labels": {"rubric": str(tmp_path / "report.md")}},
    }
    for part, more in documents.items():
        with pytest.raises(SpecError, match=f"would write over the {part} {tmp_path}"):
            OutFolder(tmp_path).check(spec_of(tmp_path, **more))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "edits.jsonl")
    linked = {"source": {"kind": "local", "path": str(tmp_path / "link.jsonl")}}
    with pytest.raises(SpecError, match="would write over the dataset"):
        OutFolder(tmp_path).check(spec_of(tmp_path, dataset=linked))


def test_a_folder_of_data_takes_no_report(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    spec = spec_of(tmp_path, dataset={"source": {"kind": "local", "path": str(data)}})
    for out in (data, data / "below" / "audit"):
        with pytest.raises(SpecError, match="lies in the dataset's folder"):
            OutFolder(out).check(spec)
    OutFolder(tmp_path).check(spec)
    OutFolder(tmp_path / "data-audit").check(spec)


def test_what_was_written_may_be_replaced_and_removed(tmp_path: Path) -> None:
    notes: list[str] = []
    folder = OutFolder(tmp_path, notes.append)
    put(folder, "report.md", "one")
    put(folder, "report.md", "two")
    assert (tmp_path / "report.md").read_text() == "two"
    put(folder, "sae/sae.json", "x")
    for name in ("report.md", "sae/sae.json", "never.txt"):
        folder.withdraw(name)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [RECORD]
    assert json.loads((tmp_path / RECORD).read_text()) == {"record_version": 1, "files": {}}
    assert notes == []


def test_what_a_person_changed_is_kept_under_a_number(tmp_path: Path) -> None:
    notes: list[str] = []
    folder = OutFolder(tmp_path, notes.append)
    put(folder, "edits.jsonl", "audit 1")
    for number, kept in enumerate(("edits.jsonl.bak", "edits.jsonl.bak2"), 1):
        (tmp_path / "edits.jsonl").write_text(f"decided {number}")
        put(folder, "edits.jsonl", f"audit {number + 1}")
        assert (tmp_path / kept).read_text() == f"decided {number}"
        assert notes[-1].endswith(f"kept as {kept}")
    (tmp_path / "edits.jsonl").write_text("decided 3")
    folder.withdraw("edits.jsonl")
    assert (tmp_path / "edits.jsonl.bak3").read_text() == "decided 3"
    assert not (tmp_path / "edits.jsonl").exists()


def test_the_same_file_again_leaves_what_a_person_made_of_it(tmp_path: Path) -> None:
    notes: list[str] = []
    folder = OutFolder(tmp_path / "out", notes.append)
    source = tmp_path / "edits"
    source.write_text("as recommended")
    for text in ("as decided", "as decided again"):
        folder.copy("edits.jsonl", source, digest_bytes(b"as recommended"))
        (folder.root / "edits.jsonl").write_text(text)
    folder.copy("edits.jsonl", source, digest_bytes(b"as recommended"))
    assert (folder.root / "edits.jsonl").read_text() == "as decided again"
    assert len(notes) == 2
    assert "stays as it is" in notes[0]
    assert {path.name for path in folder.root.iterdir()} == {RECORD, "edits.jsonl"}


def test_a_file_that_is_there_already_is_not_written_again(tmp_path: Path) -> None:
    folder, source = OutFolder(tmp_path / "out"), tmp_path / "source"
    source.write_text("x")
    folder.copy("report.md", source, digest_bytes(b"x"))
    before = (folder.root / "report.md").stat().st_ino
    folder.copy("report.md", source, digest_bytes(b"x"))
    assert (folder.root / "report.md").stat().st_ino == before


def test_a_file_that_came_meanwhile_is_kept(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("mine")
    put(OutFolder(tmp_path), "report.md", "ours")
    assert (tmp_path / "report.md.bak").read_text() == "mine"
    (tmp_path / "evaluation.jsonl").write_text("mine")
    OutFolder(tmp_path).withdraw("evaluation.jsonl")
    assert (tmp_path / "evaluation.jsonl").read_text() == "mine"


def test_a_write_that_fails_leaves_the_file_and_its_record(tmp_path: Path) -> None:
    folder = OutFolder(tmp_path)
    put(folder, "report.md", "one")
    with pytest.raises(ResourceError, match=f"cannot write {tmp_path / 'report.md'}: full"), folder.publish("report.md") as path:
        path.write_text("half")
        raise OSError(28, "full")
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.name != RECORD} == {"report.md": "one"}
    folder.check(spec_of(tmp_path))


def test_a_kill_between_record_and_file_is_no_change_by_a_person(tmp_path: Path) -> None:
    notes: list[str] = []
    folder = OutFolder(tmp_path, notes.append)
    put(folder, "report.md", "one")
    one, two = digest_bytes(b"one"), digest_bytes(b"two")
    (tmp_path / RECORD).write_text(json.dumps({"record_version": 1, "files": {"report.md": [one, two]}}))
    put(folder, "report.md", "three")
    assert (tmp_path / "report.md").read_text() == "three"
    assert notes == []


def _write(root: str, name: str) -> None:
    for number in range(20):
        put(OutFolder(Path(root)), name, f"{name} {number}")


def test_several_processes_keep_one_record(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    names = ("report.md", "report.json", "edits.jsonl")
    writers = [context.Process(target=_write, args=(str(tmp_path), name)) for name in names for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
        assert writer.exitcode == 0
    assert {path.name for path in tmp_path.iterdir()} == {*names, RECORD}
    OutFolder(tmp_path).check(spec_of(tmp_path))
    assert set(json.loads((tmp_path / RECORD).read_text())["files"]) == set(names)


def test_decisions_survive_the_same_audit_and_another(tmp_path: Path, audit: FakeAudit) -> None:
    notes: list[str] = []
    out = OutFolder(tmp_path / "out", notes.append)
    export(audit.found, out)
    edits = audit.found[Edits]
    assert isinstance(edits, Edits)
    file = out.root / "edits.jsonl"
    file.write_text(edits.path("edits.jsonl").read_text().replace('"review"', '"drop"'))
    decided = file.read_bytes()
    export(audit.found, out)
    assert file.read_bytes() == decided
    assert "stays as it is" in notes[-1]
    without = {kind: value for kind, value in audit.found.items() if kind is not Edits}
    write_interim(AuditRequest(audit.spec, audit.sources), without, out)
    assert not file.exists()
    assert (out.root / "edits.jsonl.bak").read_bytes() == decided


def test_a_refused_folder_is_left_as_it_is_and_nothing_is_computed(tmp_path: Path, audit: FakeAudit) -> None:
    class Seen(NullObserver):
        started = False

        def stage_started(self, stage: str, key: str) -> None:
            self.started = True

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.md").write_text("mine")
    watcher = Seen()
    with pytest.raises(SpecError, match=r"holds report\.md"):
        run_request(AuditRequest(audit.spec, audit.sources), LocalArtifactStore(tmp_path / "store"), tmp_path / "out", watcher)
    assert not watcher.started
    assert not (tmp_path / "store").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.md"]
