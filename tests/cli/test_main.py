"""The command line's edge: exit codes, messages, and what it loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import jsonschema
import pytest

from cli import main as edge
from cli.main import LazyGroup, exit_code, run_main
from safer_engine import errors

ROOT = Path(__file__).parents[2]


def test_every_command_can_be_listed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name in ("run", "plan", "check", "train-rm", "apply", "spec", "demo", "doctor"):
        assert f"  {name} " in listed
        assert run_main([name, "--help"]) == 0
        assert "Usage: safer-audit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--version"], 0, "safer-audit, version 0.1.0"),
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["run", "--nonsense"], 2, "No such option"),
        (["spec", "show", "--preset", "paper"], 0, "(required)"),
        (["run", "-d", str(ROOT / "README.md")], 2, "give --model"),
        (["plan", "-m", "m"], 2, "give --dataset"),
        (["check"], 2, "give --model"),
        (["spec", "show", "-m", "m", "-d", "nowhere.jsonl"], 2, "does not exist"),
        (["spec", "show", "-m", "m", "--set", "sae.kk=3"], 2, "known here"),
        (["run", "-m", "nowhere", "-d", str(ROOT / "README.md")], 2, "hint:"),
    ],
)
def test_exit_codes(arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(arguments) == code
    shown = capsys.readouterr()
    assert said in shown.out + shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.SpecError("x"), 2),
        (errors.ModelRefused("x"), 2),
        (errors.DatasetRefused("x"), 2),
        (errors.ArtifactError("x"), 4),
        (errors.NumericalError("x"), 4),
        (errors.ResourceError("x"), 4),
        (errors.Interrupted("x"), 130),
    ],
)
def test_every_error_has_an_exit_code(error: errors.SaferError, code: int) -> None:
    assert exit_code(error) == code


def raising(error: BaseException) -> click.Command:
    @click.command()
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("odd"), 4, "this is a fault in safer-audit"),
        (KeyboardInterrupt(), 130, "run the same command again"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 4, "pip install 'safer-audit[engine]'"),
        (errors.DatasetRefused("empty", "add rows"), 2, "hint: add rows"),
    ],
)
def test_failures_become_one_message(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    group = LazyGroup("safer-audit")
    monkeypatch.setattr(LazyGroup, "get_command", lambda *_: raising(error))
    monkeypatch.setattr(edge, "main", group)
    assert run_main(["anything"]) == code
    shown = capsys.readouterr()
    assert said in shown.err
    assert "Traceback" not in shown.err


def test_light_commands_load_neither_torch_nor_the_service() -> None:
    script = (
        "import sys; from cli.main import run_main\n"
        "shown = ['spec', 'show', '-m', 'm', '-d', 'org/data']\n"
        "codes = [run_main(a) for a in (['--help'], shown, ['spec', 'schema'], ['apply', '--help'], ['submit', '--help'])]\n"
        "import service.client.client\n"
        "engine = ['torch', 'transformers', 'pyarrow', 'pandas']\n"
        "service = ['sqlalchemy', 'fastapi', 'celery', 'redis', 'boto3', 'pydantic_settings']\n"
        "heavy = [name for name in engine + service if name in sys.modules]\n"
        "print('RESULT', codes, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "RESULT [0, 0, 0, 0, 0] []"


def test_spec_show_names_origins(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "audit.yaml").write_text("sae: {k: 8}\nmodel: from-file\n")
    flags = ["--spec", str(tmp_path / "audit.yaml"), "-m", "org/rm@v1", "-d", "org/data#test", "--set", "hook.layer=3", "--json"]
    assert run_main(["spec", "show", *flags]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["spec"]["model"]["path"] == "org/rm@v1"
    assert shown["origins"]["model.path"] == "flag"
    assert shown["origins"]["hook.layer"] == "--set hook.layer=3"
    assert shown["origins"]["sae.k"] == f"file {tmp_path / 'audit.yaml'}"
    assert run_main(["spec", "schema"]) == 0
    jsonschema.validate(shown["spec"], json.loads(capsys.readouterr().out))


def test_spec_init_does_not_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "audit.yaml"
    assert run_main(["spec", "init", str(path)]) == 0
    assert run_main(["spec", "init", str(path)]) == 2
    assert "--force" in capsys.readouterr().err
    assert run_main(["spec", "init", str(path), "--force"]) == 0
    capsys.readouterr()
    assert run_main(["spec", "init", str(tmp_path / "nowhere" / "a.yaml")]) == 2
    assert "name a file in a folder that exists" in capsys.readouterr().err


def test_the_spec_page_is_what_the_code_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["spec", "schema", "--markdown"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "spec.md").read_text(), (
        "run: safer-audit spec schema --markdown > docs/spec.md"
    )


def test_doctor_finds_this_machine_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["doctor", "--json", "--store", str(tmp_path / "new" / "store")]) == 0
    found = {line["what"]: line["state"] for line in json.loads(capsys.readouterr().out)}
    assert found["python"] == found["engine"] == found["store"] == "ok"


@pytest.mark.parametrize("below", ["file/store", "file"])
def test_doctor_says_where_no_audit_can_run(below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert run_main(["doctor", "--json", "--store", str(tmp_path / below)]) == 4
    (store,) = [line for line in json.loads(capsys.readouterr().out) if line["what"] == "store"]
    assert store["state"] == "missing"
    assert "name another folder with --store" in store["detail"]


def test_a_demo_needs_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert run_main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--store", "--out"])
def test_places_that_cannot_be_written_are_refused_before_anything_is_computed(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safer_engine import demo_data
    from tests.helpers.tiny_model import build_reward_model

    demo_data.write_demo(tmp_path, demo_data.generate(seed=2, n_groups=20))
    build_reward_model(tmp_path / "rm", "llama")
    (tmp_path / "file").write_text("x")
    places = {"--store": str(tmp_path / "store"), "--out": str(tmp_path / "out"), flag: str(tmp_path / "file" / "below")}
    flags = ["-m", str(tmp_path / "rm"), "-d", str(tmp_path / "preferences.jsonl"), "--device", "cpu", "--quiet"]
    assert run_main(["run", *flags, *(part for pair in places.items() for part in pair)]) == 2
    said = capsys.readouterr().err
    assert "is no folder" in said
    assert "hint: name a folder" in said
    assert not (tmp_path / "store" / "manifests").exists()
