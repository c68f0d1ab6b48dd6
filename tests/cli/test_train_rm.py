"""`safer-audit train-rm`: flags become a spec, the model appears, mistakes are told apart."""

from __future__ import annotations

import json
import shlex
import warnings
from pathlib import Path

import pytest

from cli.main import EXIT_OK, EXIT_USAGE, run_main
from cli.train_rm import train_document
from safer_engine.demo_data import build_base, generate

FLAGS = ("preset", "seed", "eval_dataset", "device", "lora", "epochs", "lr", "batch", "max_length", "dtype")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    data = generate(seed=1, n_groups=20)
    for name, rows in (("pairs", data.rows), ("apart", data.evaluation)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_base(folder / "base", [row["chosen"][0]["content"] for row in data.rows], width=16, blocks=1)
    return folder


def command(files: Path, out: Path, *more: str) -> list[str]:
    given = ["train-rm", "--base", str(files / "base"), "--dataset", str(files / "pairs.jsonl"), "--out", str(out)]
    return [*given, "--device", "cpu", "--epochs", "1", "--batch", "16", "--max-length", "48", *more]


def test_it_trains_and_says_how_to_audit(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apart = ["--eval-dataset", str(files / "apart.jsonl"), "--set", "evaluation.min_pairs=2"]
    assert run_main(command(files, tmp_path / "rm", *apart)) == EXIT_OK
    said = capsys.readouterr().out
    assert said.strip().splitlines()[-1] == str(tmp_path / "rm")
    assert "evaluation accuracy, safety / refusal" in said
    assert "--set model.max_length=48" in said
    assert run_main(command(files, tmp_path / "rm", *apart, "--json")) == EXIT_OK
    document = json.loads(capsys.readouterr().out)
    assert document["cached"] is True
    assert document["settings"]["batch"] == 16
    assert document["evaluation"]["slices"][0]["accuracy"]["n"] > 2


def test_adapters_are_trained_without_a_word(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        assert run_main(command(files, tmp_path / "rm", "--lora", "--quiet")) == EXIT_OK
    assert capsys.readouterr().out == f"{tmp_path / 'rm'}\n"


def test_a_command_is_printed_on_one_line(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep = tmp_path / ("long-" * 30) / "with blank"
    assert run_main(command(files, deep)) == EXIT_OK
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("audit it:")]
    asked = shlex.split(line.removeprefix("audit it:"))
    assert asked[:2] == ["safer-audit", "run"]
    assert asked[asked.index("--model") + 1] == str(deep)
    assert asked[-2:] == ["--set", "model.max_length=48"]


def test_flags_win_over_the_preset_and_set_over_flags(files: Path) -> None:
    flags = dict.fromkeys(FLAGS) | {"base": "b", "dataset": str(files / "pairs.jsonl"), "lora": True, "epochs": 3, "seed": 4}
    document = train_document({**flags, "preset": "paper", "assignments": ("recipe.epochs=5", "lora.rank=2")})
    assert document["recipe"] == {"epochs": 5}
    assert document["lora"] == {"rank": 2}
    assert (document["preset"], document["seed"]) == ("paper", 4)
    assert "evaluation" not in document


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--base": "nowhere/../x"}, "model"),
        ({"--dataset": "none.jsonl"}, "does not exist"),
        ({"--lr": "-1"}, "recipe.lr"),
        ({"--set": "recipe.speed=1"}, "recipe.speed"),
        ({"--device": "abacus"}, "abacus"),
        ({"--out": __file__ + "/rm"}, "is no folder"),
    ],
)
def test_mistakes_are_usage_errors(
    change: dict[str, str], said: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(files, tmp_path / "rm", *(part for pair in change.items() for part in pair))
    assert run_main(arguments) == EXIT_USAGE
    assert said in capsys.readouterr().err
    assert not (tmp_path / "rm").exists()
