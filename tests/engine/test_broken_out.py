"""An --out that breaks while an audit runs: said at once, nothing lost, and the same command elsewhere finishes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cli.main import EXIT_FAILED, exit_code
from safer_engine import pipeline
from safer_engine.api import run_request
from safer_engine.artifacts import Absent, Artifact
from safer_engine.errors import ResourceError
from safer_engine.events import NullObserver
from safer_engine.pipeline import STAGES, AuditRequest
from safer_engine.report.interim import interim_reports
from safer_engine.report.write import REPORT_FILES
from safer_engine.stage import Stage
from safer_engine.store import LocalArtifactStore, ManifestDraft
from tests.helpers import fake_artifacts
from tests.helpers.fake_artifacts import FakeAudit


class Watcher(NullObserver):
    """Remembers what was said and how stages ended."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.outcomes: dict[str, str] = {}

    def note(self, stage: str, message: str) -> None:
        self.notes.append(f"{stage}: {message}")

    def stage_finished(self, stage: str, outcome: str, seconds: float) -> None:
        self.outcomes[stage] = outcome


@pytest.fixture
def audit(tmp_path: Path) -> FakeAudit:
    return fake_artifacts.build(tmp_path / "fake")


@pytest.fixture
def store(tmp_path: Path, audit: FakeAudit) -> LocalArtifactStore:
    """A store in which every stage but the report is committed."""
    kept = LocalArtifactStore(tmp_path / "store")
    for stage in STAGES[:-1]:
        found = audit.found[stage.produces]
        key = next(each.key for each in pipeline.plan(AuditRequest(audit.spec, audit.sources), kept) if each.name == stage.name)
        assert key is not None
        with kept.open_work(stage.name, key) as work:
            draft = ManifestDraft(stage.version, "Absent", {"reason": found.reason}) if isinstance(found, Absent) else None
            if isinstance(found, Artifact):
                for name in found.stored.manifest.files:
                    with work.publish(name) as path:
                        shutil.copyfile(found.path(name), path)
                draft = ManifestDraft(stage.version, stage.produces.__name__, found.meta)
            assert draft is not None
            kept.commit(stage.name, key, work, draft)
    return kept


def spoil(out: Path) -> None:
    """Put a file where the folder was: what no user, not even root, can write into."""
    shutil.rmtree(out, ignore_errors=True)
    out.write_text("in the way")


def test_an_interim_report_that_cannot_be_written_is_a_note_once(tmp_path: Path, audit: FakeAudit) -> None:
    watcher, out = Watcher(), tmp_path / "out"
    request = AuditRequest(audit.spec, audit.sources)
    write = interim_reports(request, LocalArtifactStore(tmp_path / "empty"), out, watcher)
    pairs, activations = STAGES[:2]
    spoil(out)
    write(pairs, {pairs.produces: audit.found[pairs.produces]})
    write(activations, {stage.produces: audit.found[stage.produces] for stage in (pairs, activations)})
    assert len(watcher.notes) == 1
    assert watcher.notes[0].startswith(f"pairs: no interim report: cannot write {out}")
    assert watcher.notes[0].endswith("the audit goes on")
    out.unlink()
    write(activations, {stage.produces: audit.found[stage.produces] for stage in (pairs, activations)})
    assert (out / "report.html").is_file()


def test_an_out_that_breaks_costs_the_files_and_not_the_audit(
    tmp_path: Path, audit: FakeAudit, store: LocalArtifactStore
) -> None:
    request, out = AuditRequest(audit.spec, audit.sources), tmp_path / "out"

    def break_out(stage: Stage, _found: pipeline.Found) -> None:
        if stage.name == "pairs":
            spoil(out)

    first = Watcher()
    with pytest.raises(ResourceError, match="cannot write") as raised:
        run_request(request, store, out, first, break_out)
    assert exit_code(raised.value) == EXIT_FAILED
    assert "with another --out, and only the files are written" in raised.value.hint
    assert first.outcomes["report"] == "computed"
    second = Watcher()
    run_request(request, store, tmp_path / "elsewhere", second)
    assert set(second.outcomes.values()) == {"cached"}
    assert {path.name for path in (tmp_path / "elsewhere").glob("report.*")} == {
        name for name in REPORT_FILES if name.startswith("report.")
    }


def test_an_out_that_was_removed_is_made_again(tmp_path: Path, audit: FakeAudit, store: LocalArtifactStore) -> None:
    out = tmp_path / "out"
    run_request(
        AuditRequest(audit.spec, audit.sources), store, out, on_artifact=lambda *_: shutil.rmtree(out, ignore_errors=True)
    )
    assert (out / "report.html").is_file()
    assert (out / "edits.jsonl").is_file()
