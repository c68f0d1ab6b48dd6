"""`safer-audit run`: what it refuses before it computes anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import run_main
from safer_engine import demo_data
from tests.helpers.tiny_model import build_reward_model


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    rows = demo_data.generate(seed=5, n_groups=20).rows
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_reward_model(folder / "rm", "llama")
    return folder


def asked(material: Path, store: Path, out: str) -> list[str]:
    named = ["-m", str(material / "rm"), "-d", str(material / "rows.jsonl"), "--device", "cpu"]
    return ["run", *named, "--store", str(store), "--out", out]


def test_an_out_that_would_cost_files_is_a_usage_error(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evaluation.jsonl").write_bytes((material / "rows.jsonl").read_bytes())
    command = asked(material, tmp_path / "s", str(tmp_path))
    assert run_main([*command, "--eval-dataset", str(tmp_path / "evaluation.jsonl")]) == 2
    assert "would write over the evaluation" in capsys.readouterr().err
    assert (tmp_path / "evaluation.jsonl").read_bytes() == (material / "rows.jsonl").read_bytes()
    assert run_main(command) == 2
    assert "holds evaluation.jsonl, which no audit wrote there" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_an_empty_out_is_a_usage_error(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(asked(material, tmp_path / "s", "")) == 2
    assert "the path is empty" in capsys.readouterr().err
