"""`safer-audit apply` from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import run_main
from tests.helpers.edit_cases import local, rows, write_edits

ACTIONS = ["keep", "drop", "review", "flip", "keep", "drop"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(6)))
    write_edits(tmp_path / "edits.jsonl", local(data), ACTIONS, [i / 6 for i in range(6)])
    return tmp_path


def apply(place: Path, *more: str) -> int:
    names = ["--edits", str(place / "edits.jsonl"), "--dataset", str(place / "data.jsonl"), "--out", str(place / "clean.jsonl")]
    return run_main(["apply", *names, *more])


def test_apply_and_undo(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(place) == 0
    said = capsys.readouterr().out
    assert "4 of 6 rows, 2 dropped, 0 flipped" in said
    assert "1 row marked flip is left as it is: not applied; give --action drop,flip" in said
    assert "1 row marked review is left" in said
    assert len((place / "clean.jsonl").read_text().splitlines()) == 4
    assert run_main(["apply", "--undo", "--out", str(place / "clean.jsonl")]) == 0
    assert "restored, 6 rows" in capsys.readouterr().out
    assert (place / "clean.jsonl").read_bytes() == (place / "data.jsonl").read_bytes()


def test_json_output_and_flips(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(place, "--action", "drop,flip", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["dropped"], said["flipped"], said["left"], said["undone"]) == (2, 1, {"review": 1}, False)
    assert said["removed"] == str(place / "clean.removed.jsonl")
    assert run_main(["apply", "--undo", "--out", str(place / "clean.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] is None


def test_flips_alone_leave_the_drops(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(place, "--action", "flip") == 0
    assert "2 rows marked drop are left as they are: not applied; give --action drop,flip" in capsys.readouterr().out


def test_nothing_to_do_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_edits(place / "edits.jsonl", local(place / "data.jsonl"), ["keep"] * 5 + ["review"])
    assert apply(place) == 0
    said = capsys.readouterr().out
    assert "nothing is to be done" in said
    assert "1 row marked review" in said
    assert "undo" not in said
    assert (place / "clean.jsonl").read_bytes() == (place / "data.jsonl").read_bytes()
    assert run_main(["apply", "--undo", "--out", str(place / "clean.jsonl")]) == 0
    assert "nothing to undo" in capsys.readouterr().out


@pytest.mark.parametrize("budget", ["20%", "0.2", " 20 % "])
def test_a_budget_is_a_share_or_per_cent(place: Path, budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(place, "--budget", budget, "--json") == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--budget", "lots"], "is not a share"),
        (["--budget", "90%"], "out of range"),
        (["--action", "burn"], "cannot be applied"),
        (["--action", ","], "no action"),
        (["--column", "chosen"], "not OURS=THEIRS"),
        (["--column", "chosen=nowhere"], "which the first rows don't have"),
        (["--format", "odd"], "--format odd"),
        (["--winner", "1"], "not VALUE=a|b|tie"),
        (["--winner", "1=c"], "--winner 1"),
        (["--winner", "1=a"], "have no winner column"),
        (["--undo"], "takes --out alone"),
        (["--split", "train"], "no split"),
    ],
)
def test_what_is_wrong_is_said_with_exit_code_2(
    place: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert apply(place, *more) == 2
    assert said in capsys.readouterr().err
    assert not (place / "clean.jsonl").exists()


def test_the_split_of_a_folder_is_named_as_for_the_audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(6)))
    (data / "test.jsonl").write_text(json.dumps(rows(1)[0]) + "\n")
    edits, out = str(write_edits(tmp_path / "edits.jsonl", local(data, split="train"), ACTIONS)), str(tmp_path / "clean")
    assert run_main(["apply", "--edits", edits, "--dataset", str(data), "--out", out]) == 2
    assert f"{data}#test or {data}#train" in " ".join(capsys.readouterr().err.split())
    assert run_main(["apply", "--edits", edits, "--dataset", f"{data}#train", "--split", "test", "--out", out]) == 2
    assert run_main(["apply", "--edits", edits, "--dataset", f"{data}#train", "--out", out]) == 0
    assert len((tmp_path / "clean" / "train.jsonl").read_text().splitlines()) == 4


def test_meanings_of_winners_are_given_as_for_the_audit(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    values = [
        {"prompt": f"p{i}", "response_a": f"a{i}", "response_b": f"b{i}", "winner": [1, 2, 0, 1, 2, 1][i]} for i in range(6)
    ]
    data.write_text("".join(json.dumps(value) + "\n" for value in values))
    spec = local(data, winners={"1": "a", "2": "b", "0": "tie"})
    edits, out = str(write_edits(tmp_path / "edits.jsonl", spec, ACTIONS)), tmp_path / "clean.jsonl"
    names = ["apply", "--edits", edits, "--dataset", str(data), "--out", str(out), "--action", "drop,flip"]
    assert run_main(names) == 2, "0, 1 and 2 can mean several things"
    assert run_main([*names, "--winner", "1=a", "--winner", "2=b", "--winner", "0=tie"]) == 0
    assert [json.loads(line)["winner"] for line in out.read_text().splitlines()] == [1, 0, 2, 2]


def test_what_is_missing_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["apply", "--out", str(place / "o.jsonl")]) == 2
    assert "--edits is missing" in capsys.readouterr().err
