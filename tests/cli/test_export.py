"""`safer-audit export`: figures, digests and reasons of the audit, hostile names harmless; decisions come back."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from huggingface_hub import ModelCard

from cli.main import run_main
from safer_engine.decisions import load_decisions
from safer_engine.exports.evidence import schema_text
from safer_engine.exports.label_studio import chosen_is_a
from safer_engine.exports.model_card import BEGIN, END, TASK
from service.embedded import free_port
from tests.helpers import gate_reports as made
from tests.helpers.edit_cases import local, rows, write_edits
from tests.helpers.live_service import LiveService

ROOT = Path(__file__).parents[2]

HOSTILE = "x | <img src=x> ` [a](http://b) \u202e"
ROWS = made.pairs(0.9, 200, axis=HOSTILE)
NULLS = ("dataset", "reward_model", "sae", "features", "edits", "verification", "verdict")


def audit(folder: Path) -> Path:
    """A finished audit that measured accuracy alone."""
    timing = {"created": "2026-01-02T03:04:05Z", "total_seconds": 1.0, "peak_memory_bytes": None, "peak_gpu_bytes": None,
              "disk_bytes": 0, "planned": None, "stages": [], "runtime": {}}  # fmt: skip
    provenance: dict[str, Any] = {
        "tool": "safer-audit", "tool_version": "9.8.7", "seed": 3, "text_included": False, "progress": None, "timing": timing,
        "inputs": {"model": {"origin": HOSTILE, "revision": None, "digest": "ab" * 32}},
        "stages": [{"stage": "evaluation", "state": "computed", "version": 5, "content_digest": "cd" * 32},
                   {"stage": "sae", "state": "absent", "reason": f"not wanted {HOSTILE}"}],
        "not_computed": dict.fromkeys(NULLS, "not asked for"),
    }  # fmt: skip
    measured = {**made.evaluation(ROWS), "n_pairs": 200, "min_pairs": 20, "too_few": False, "margins": []}
    document = made.report(ROWS) | dict.fromkeys(NULLS) | {"provenance": provenance, "evaluation": measured}
    document["spec"]["preset"] = "standard"
    made.write(folder, document, ROWS)
    return folder


def test_evidence_says_what_the_audit_found_and_cites_its_files(at_home: Path) -> None:
    folder = audit(at_home / "audit")
    assert run_main(["export", str(folder), "--to", "evidence", "-o", "one"]) == 0
    found = json.loads((at_home / "one" / "evidence.json").read_text())
    assert (found["tool_version"], found["seed"], found["inputs"]["model"]["digest"]) == ("9.8.7", 3, "ab" * 32)
    assert found["accuracy"][0]["accuracy"]["estimate"] == pytest.approx(0.9)
    assert {"what": "verdict", "reason": "not asked for"} in found["not_made"]
    assert [n["what"] for n in found["not_made"]].count("stage sae") == 1
    assert [s["stage"] for s in found["stages"]] == ["evaluation"]
    expected = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("report.json", "evaluation.jsonl")}
    assert {f["name"]: f["sha256"] for f in found["files"]} == expected
    assert run_main(["export", str(folder / "report.json"), "--to", "evidence", "-o", "two"]) == 0
    for name in ("evidence.json", "evidence.md"):
        assert (at_home / "one" / name).read_bytes() == (at_home / "two" / name).read_bytes()


def test_foreign_names_stay_in_code_spans(at_home: Path) -> None:
    assert run_main(["export", str(audit(at_home / "audit")), "--to", "evidence"]) == 0
    text = (at_home / "evidence.md").read_text(encoding="utf-8")
    assert "0.900 (" in text
    assert "\u202e" not in text
    assert "``x \\| <img src=x> ` [a](http://b) ⟦RLO⟧``" in text
    assert "not wanted x \\| &lt;img src=x&gt;" in text


def test_what_is_no_finished_audit_is_refused(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = audit(at_home / "audit")
    document = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({**document, "unknown": 1}))
    assert run_main(["export", str(folder), "--to", "evidence", "-o", "out"]) == 2
    assert "not as an audit wrote it: unknown" in capsys.readouterr().err
    (folder / "report.json").write_text(json.dumps({**document, "spec": {}}))
    assert run_main(["export", str(folder), "--to", "evidence", "-o", "out"]) == 2
    assert "it has no spec.preset" in capsys.readouterr().err
    assert run_main(["export", "nowhere", "--to", "evidence", "-o", "out"]) == 2
    assert not (at_home / "out").exists()


def test_the_published_schema_is_current_and_holds(at_home: Path) -> None:
    published = json.loads((ROOT / "docs" / "evidence.schema.json").read_text(encoding="utf-8"))
    assert published == json.loads(schema_text()), "stale: python -m safer_engine.exports.evidence docs/evidence.schema.json"
    assert run_main(["export", str(audit(at_home / "audit")), "--to", "evidence"]) == 0
    jsonschema.validate(json.loads((at_home / "evidence.json").read_text()), published)


def test_a_new_model_card_has_results_that_the_hub_reads(at_home: Path) -> None:
    assert run_main(["export", str(audit(at_home / "audit")), "--to", "hf-card", "-o", "out"]) == 0
    text = (at_home / "out" / "model-card.md").read_text(encoding="utf-8")
    found = ModelCard(text)
    (overall,) = (one for one in found.data.eval_results or [] if one.dataset_config == "all")
    assert (overall.metric_type, overall.metric_value, overall.task_name) == ("accuracy", pytest.approx(0.9), TASK)
    assert overall.metric_args["lo_95"] < 0.9 < overall.metric_args["hi_95"]
    assert text.count(BEGIN) == text.count(END) == 1
    body = found.text
    assert "<img" not in body.replace("``x \\| <img src=x>", "")
    assert "\u202e" not in body


def test_a_card_keeps_what_is_its_own_and_is_the_same_the_second_time(at_home: Path) -> None:
    theirs = {"task": {"type": "text-classification"}, "dataset": {"name": "theirs", "type": "a/b"},
              "metrics": [{"type": "accuracy", "value": 0.5}]}  # fmt: skip
    own = yaml.safe_dump({"license": "mit", "model-index": [{"name": "mine", "results": [theirs]}]}, sort_keys=False)
    own = f"---\n{own}---\n# Mine\n\nWords of mine.\n"
    (at_home / "README.md").write_text(own)
    folder = str(audit(at_home / "audit"))
    assert run_main(["export", folder, "--to", "hf-card", "--card", "README.md"]) == 0
    once = (at_home / "README.md").read_text(encoding="utf-8")
    found = ModelCard(once)
    assert (found.data.license, found.data.model_name) == ("mit", "mine")
    assert "# Mine\n\nWords of mine." in once
    assert {one.dataset_name for one in found.data.eval_results or []} >= {"theirs"}
    assert run_main(["export", folder, "--to", "hf-card", "--card", "README.md"]) == 0
    assert (at_home / "README.md").read_text(encoding="utf-8") == once
    (at_home / "README.md").write_text(once + "More of mine.\n", encoding="utf-8")
    assert run_main(["export", folder, "--to", "hf-card", "--card", "README.md"]) == 0
    assert (at_home / "README.md").read_text(encoding="utf-8").endswith(f"{END}\nMore of mine.\n")


@pytest.mark.parametrize("text", ["---\n- a\n---\n", f"# Mine\n{BEGIN}\n", f"{END}\n{BEGIN}\n", "---\na: [\n---\n"])
def test_a_card_that_cannot_be_read_stays_as_it_is(at_home: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (at_home / "README.md").write_text(text)
    assert run_main(["export", str(audit(at_home / "audit")), "--to", "hf-card", "--card", "README.md"]) == 2
    assert (at_home / "README.md").read_text() == text
    assert "card" in capsys.readouterr().err


def test_mlflow_needs_an_address_without_a_password(
    at_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = str(audit(at_home / "audit"))
    for uri, code, words in (
        ([], 2, "no MLflow tracking server is named"),
        (["--tracking-uri", "file:/tmp/mlruns"], 2, "no address of an MLflow"),
        (["--tracking-uri", "http://me:hush@localhost"], 2, "holds a password"),
        (["--tracking-uri", f"http://127.0.0.1:{free_port()}"], 4, "cannot be reached"),
    ):
        assert run_main(["export", folder, "--to", "mlflow", *uri]) == code
        said = capsys.readouterr().err
        assert words in said
        assert "hush" not in said


@pytest.fixture
def reviewed(at_home: Path) -> Path:
    """An audit of eight rows: one kept, the others to be looked at, the later the more doubtful."""
    folder = audit(at_home / "audit")
    (at_home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    write_edits(folder / "edits.jsonl", local(at_home / "data.jsonl"), ["keep", *["review", "drop"] * 3, "flip"],
                [i / 10 for i in range(8)])  # fmt: skip
    document = json.loads((folder / "report.json").read_text())
    document["spec"]["dataset"] = {"source": {"kind": "local", "path": str(at_home / "data.jsonl")}}
    (folder / "report.json").write_text(json.dumps(document))
    return folder


def tasks_of(reviewed: Path, *more: str) -> list[dict[str, Any]]:
    assert run_main(["export", str(reviewed), "--to", "label-studio", "-o", "ls", *more]) == 0
    found: list[dict[str, Any]] = json.loads(Path("ls/label-studio-tasks.json").read_text(encoding="utf-8"))
    return found


def test_review_tasks_do_not_say_which_answer_was_chosen(reviewed: Path) -> None:
    tasks = tasks_of(reviewed)
    assert [task["data"]["pair_id"] for task in tasks] == [f"r{i}" for i in range(7, 0, -1)]  # most doubtful first
    for task in tasks:
        data, number = task["data"], task["data"]["pair_id"][1:]
        assert {data["answer_a"], data["answer_b"]} == {f"good {number}", f"bad {number}"}
        assert data["prompt"] == f"user: Frage {number} – ü"
        assert (data["answer_a"] == f"good {number}") is chosen_is_a(data["content_digest"])
        assert set(task) == {"data"}
    assert 0 < sum(task["data"]["answer_a"].startswith("good") for task in tasks) < 7
    names = re.findall(r"\$(\w+)", Path("ls/label-studio-config.xml").read_text())
    assert set(names) == {"prompt", "answer_a", "answer_b"}
    assert [task["data"]["pair_id"] for task in tasks_of(reviewed, "--actions", "drop", "--most", "2")] == ["r6", "r4"]


def answer(task: dict[str, Any], better: str | None, by: Any = 1, **more: Any) -> dict[str, Any]:
    """An annotation that says that the `good` or the `bad` answer is better, or something else."""
    said = better
    if better in ("good", "bad"):
        said = "A is better" if task["data"]["answer_a"].startswith(better) else "B is better"
    result = (
        [] if said is None else [{"from_name": "better", "to_name": "prompt", "type": "choices", "value": {"choices": [said]}}]
    )
    return {"completed_by": by, "result": result, **more}


def decide(reviewed: Path, export: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, dict[str, Any]]:
    Path("export.json").write_text(json.dumps(export))
    code = run_main(["decisions", "export.json", "--edits", str(reviewed / "edits.jsonl"), "-o", "decisions.jsonl"])
    said = capsys.readouterr().err
    found = load_decisions("decisions.jsonl") if code == 0 else ()
    return code, said, {one.content_digest: (one.wrong, one.by) for one in found}


def test_decisions_come_back_as_the_audit_reads_them(reviewed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = tasks_of(reviewed)
    given = [
        [answer(tasks[0], "good", {"id": 3, "email": "mara@example.org"})],
        [answer(tasks[1], "bad", 4)],
        [answer(tasks[2], "good", 1), answer(tasks[2], "bad", 2)],
        [answer(tasks[3], "bad", 1), answer(tasks[3], "Cannot tell", 2)],
        [answer(tasks[4], "Cannot tell")],
        [answer(tasks[5], "good", was_cancelled=True)],
        [],
    ]
    export = [{**task, "id": at, "annotations": found} for at, (task, found) in enumerate(zip(tasks, given, strict=True))]
    code, said, found = decide(reviewed, export, capsys)
    assert code == 0
    assert "5 rows: 2 labels wrong, 1 right, 2 left open (1 by disagreement); 1 without an answer" in said
    digests = [task["data"]["content_digest"] for task in tasks]
    assert found[digests[0]] == (False, "mara@example.org")
    assert found[digests[1]] == (True, "4")
    assert found[digests[2]] == (None, "1, 2")
    assert found[digests[3]] == (True, "1, 2")
    assert found[digests[4]] == (None, "1")
    flat = [
        {**task["data"], "id": at, "annotator": 9, "better": answer(task, "bad")["result"][0]["value"]["choices"][0]}
        for at, task in enumerate(tasks[:2])
    ]
    del flat[1]["better"]
    code, said, found = decide(reviewed, flat, capsys)
    assert (code, found) == (0, {digests[0]: (True, "9")})
    assert "1 without an answer" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda task: task["data"].update(content_digest="0" * 64), "no row of this audit"),
        (lambda task: task["annotations"][0]["result"][0]["value"].update(choices=["yes"]), "none of the answers"),
        (lambda task: task["annotations"][0]["result"][0]["value"].update(choices=["A is better", "B is better"]), "two answers"),
        (lambda task: task.update(annotations="x"), "not as Label Studio writes it"),
        (lambda task: task.pop("annotations"), "not as Label Studio writes it"),
        (lambda task: task.update(annotations=[]), "holds no answer"),
    ],
)
def test_what_is_no_export_of_the_audits_tasks_is_refused(
    reviewed: Path, change: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tasks_of(reviewed)[0]
    one = {**task, "annotations": [answer(task, "good")]}
    change(one)
    code, said, _ = decide(reviewed, [one], capsys)
    assert code == 2
    assert words in said
    assert not Path("decisions.jsonl").exists()


def test_tasks_are_of_the_dataset_that_was_audited(reviewed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = rows(8)
    changed[3]["chosen"] = "other"
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    assert run_main(["export", str(reviewed), "--to", "label-studio", "-d", "other.jsonl"]) == 2
    assert "row 4 is not what the audit read as r3" in capsys.readouterr().err
    assert run_main(["export", str(reviewed), "--to", "label-studio", "--actions", "burn"]) == 2
    (reviewed / "edits.jsonl").unlink()
    assert run_main(["export", str(reviewed), "--to", "label-studio"]) == 2
    assert "has no edits.jsonl beside report.json" in capsys.readouterr().err


def test_a_job_is_exported_as_its_folder_is(as_admin: Path, service: LiveService, capsys: pytest.CaptureFixture[str]) -> None:
    folder = audit(as_admin / "audit")
    files = {name: (folder / name).read_bytes() for name in ("report.json", "evaluation.jsonl")}
    job = service.world.finish(service.world.submit(), {"report": files})
    for asked, out in ((str(folder), "one"), (job.id, "two")):
        assert run_main(["export", asked, "--to", "evidence", "-o", out]) == 0
    for name in ("evidence.json", "evidence.md"):
        assert (as_admin / "one" / name).read_bytes() == (as_admin / "two" / name).read_bytes()
    capsys.readouterr()
    assert run_main(["export", "0" * 26, "--to", "evidence"]) == 2
    assert "no job" in capsys.readouterr().err


@pytest.mark.parametrize(
    "metadata",
    [
        {"model-index": [{"name": name, "results": []} for name in ("first", "second")]},
        {"model-index": [{"name": "mine", "results": [{"task": {"type": "x"}, "dataset": {"name": "n", "type": "t", "odd": 1},
                                                       "metrics": [{"type": "accuracy", "value": 1.0}]}]}]},
    ],
    ids=["two models", "an unknown field"],
)  # fmt: skip
def test_metadata_that_would_be_lost_are_refused(at_home: Path, metadata: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"---\n{yaml.safe_dump(metadata)}---\n# Mine\n"
    (at_home / "README.md").write_text(text)
    assert run_main(["export", str(audit(at_home / "audit")), "--to", "hf-card", "--card", "README.md"]) == 2
    assert "would be lost" in capsys.readouterr().err
    assert (at_home / "README.md").read_text() == text


def test_a_card_keeps_its_line_ends_its_mode_and_its_link(at_home: Path) -> None:
    (at_home / "real.md").write_bytes(b"---\r\nlicense: mit\r\n---\r\n# Mine\r\n")
    (at_home / "real.md").chmod(0o640)
    (at_home / "README.md").symlink_to("real.md")
    folder = str(audit(at_home / "audit"))
    assert run_main(["export", folder, "--to", "hf-card", "--card", "README.md"]) == 0
    once = (at_home / "real.md").read_bytes()
    assert once.count(b"\n") == once.count(b"\r\n") > 20
    assert (at_home / "README.md").is_symlink()
    assert (at_home / "real.md").stat().st_mode & 0o777 == 0o640
    assert run_main(["export", folder, "--to", "hf-card", "--card", "README.md"]) == 0
    assert (at_home / "real.md").read_bytes() == once


def test_a_report_that_names_no_dataset_is_refused(reviewed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads((reviewed / "report.json").read_text())
    del document["spec"]["dataset"]
    (reviewed / "report.json").write_text(json.dumps(document))
    assert run_main(["export", str(reviewed), "--to", "label-studio"]) == 2
    assert "does not say which dataset" in capsys.readouterr().err
