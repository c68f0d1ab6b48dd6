"""Commands that are told to read marked data log it in the store's folder before they read; what cannot be logged is not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import run_main
from safer_engine.demo_data import build_base, generate
from safer_engine.redteam import LOG
from safer_engine.science.poison_mark import MARK, mark_text
from tests.helpers.manifests import manifest_of
from tests.helpers.tiny_model import build_reward_model

FORCED = ("--set", "dataset.allow_poisoned=true")
TOO_FEW = ("--set", "dataset.min_pairs=1000")
"""Ends a command as soon as it has read the pairs."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forced")
    found = generate(seed=1, n_groups=20)
    rows = [{**row, MARK: mark_text("random", 0.05, flipped=False)} for row in found.rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "apart.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found.evaluation))
    build_base(folder / "base", [row["chosen"][0]["content"] for row in found.rows], width=16, blocks=1)
    build_reward_model(folder / "rm", "llama")
    return folder


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAFER_AUDIT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("LOGNAME", "mara")
    return tmp_path / "store"


def asked(files: Path, command: str, out: Path) -> list[str]:
    data = ["-d", str(files / "rows.jsonl"), "-e", str(files / "apart.jsonl"), "--device", "cpu"]
    if command == "train-rm":
        return [command, "--base", str(files / "base"), "--out", str(out), *data]
    if command == "compare":
        return [command, str(files / "rm"), str(files / "rm"), "--out", str(out), *data]
    more = {"verify": ["--base", str(files / "base"), "--out", str(out)], "run": ["--out", str(out)], "check": []}[command]
    return [command, "-m", str(files / "rm"), *data, *more]


def lines(store: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store / LOG).read_text().splitlines()]


@pytest.mark.parametrize("command", ["run", "verify", "check", "compare", "train-rm"])
def test_a_forced_use_is_logged_and_no_other(
    files: Path, store: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*asked(files, command, tmp_path / "out"), *TOO_FEW]
    assert run_main(given) == 2
    assert "marked as poisoned" in capsys.readouterr().err
    assert not (store / LOG).exists()
    assert run_main([*given, *FORCED]) == 2
    assert "1000" in capsys.readouterr().err.replace(",", "")
    (line,) = lines(store)
    assert {name: line[name] for name in ("who", "action", "command", "sections")} == {
        "who": "mara", "action": "force", "command": command, "sections": "dataset",
    }  # fmt: skip
    assert len(line["digest"].removeprefix("sha256:")) == 64
    assert run_main([*given, *FORCED, "--set", "evaluation.allow_poisoned=true"]) == 2
    assert [(one["sections"], one["digest"] == line["digest"]) for one in lines(store)] == [
        ("dataset", True), ("dataset,evaluation", False),
    ]  # fmt: skip


def test_exports_and_imports_of_arms_are_logged(files: Path, store: Path, tmp_path: Path) -> None:
    export = ["verify", "export-arms", *asked(files, "verify", tmp_path / "arms")[1:]]
    (tmp_path / "manifest.json").write_text(manifest_of(files).model_dump_json())
    take = ["verify", "import", str(tmp_path), "edits:0=nowhere"]
    assert [run_main(command) for command in (export, take)] == [2, 2]
    assert not (store / LOG).exists()
    (tmp_path / "manifest.json").write_text(manifest_of(files, allow_poisoned=True).model_dump_json())
    assert [run_main(command) for command in ([*export, *FORCED], take)] == [2, 2]
    assert [(line["action"], line["command"]) for line in lines(store)] == [
        ("force", "verify export-arms"), ("force", "verify import"),
    ]  # fmt: skip


def test_what_cannot_be_logged_is_not_read(files: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (store / LOG).mkdir(parents=True)
    assert run_main([*asked(files, "train-rm", tmp_path / "rm"), *FORCED]) != 0
    assert LOG in capsys.readouterr().err
    assert not (tmp_path / "rm").exists()
