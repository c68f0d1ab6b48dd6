"""`safer-audit compare`: two models from the command line to the page, two audits, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import run_main
from safer_engine import demo_data
from tests.helpers.live_service import LiveService
from tests.helpers.tiny_model import build_reward_model

SMALL = [
    *("--set", "sae.max_steps=20", "--set", "sae.min_steps=20", "--set", "sae.batch=256", "--set", "sae.k=8"),
    *("--set", "causal.pairs=12", "--set", "causal.features=4", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, reward models of one architecture (one, two) and of another (wide), and one compared with two."""
    folder = tmp_path_factory.mktemp("compare")
    demo_data.write_demo(folder / "data", demo_data.generate(seed=2, n_groups=40))
    for name, given in (("one", {"seed": 0}), ("two", {"seed": 1}), ("wide", {"width": 48})):
        build_reward_model(folder / name, "llama", **given)
    assert compare(folder, folder / "one", folder / "two", *flags(folder), out="first") == 0
    return folder


def flags(folder: Path) -> list[str]:
    data = folder / "data"
    return ["-d", str(data / "preferences.jsonl"), "-e", str(data / "evaluation.jsonl"), *SMALL]


def compare(folder: Path, a: Path, b: Path, *more: str, out: str) -> int:
    return run_main(["compare", str(a), str(b), *more, "--store", str(folder / "store"), "--out", str(folder / out)])


def document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "comparison.json").read_text())
    return found


def test_two_models_are_audited_with_one_sae(place: Path) -> None:
    found = document(place / "first")
    assert found["features"]["complete"]
    reports = [json.loads((place / "first" / name / "report.json").read_text()) for name in "ab"]
    assert reports[0]["sae"]["digest"] == reports[1]["sae"]["digest"] == found["features"]["sae_digest"]
    assert [found[name]["model_digest"] for name in "ab"] == [one["provenance"]["inputs"]["model"]["digest"] for one in reports]
    accuracies = [next(row for row in one["evaluation"]["groups"] if row["axis"] is None)["accuracy"] for one in reports]
    whole = found["evaluation"]["slices"][0]
    assert [whole["accuracy_a"], whole["accuracy_b"]] == pytest.approx([one["estimate"] for one in accuracies])
    assert (place / "first" / "comparison.html").read_text().startswith("<!doctype html>")


def test_finished_audits_are_compared_without_flags(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = place / "first" / "a", place / "first" / "b" / "report.json"
    assert compare(place, a, b, "--json", out="second") == 0
    assert json.loads(capsys.readouterr().out) == document(place / "second")
    assert {**document(place / "second"), "a": 0, "b": 0} == {**document(place / "first"), "a": 0, "b": 0}
    assert compare(place, a, b, out="second") == 0
    shown = capsys.readouterr().out
    assert "Preferences changed" in shown
    assert shown.splitlines()[-1] == str(place / "second" / "comparison.html")
    assert compare(place, a, b, "--quiet", out="second") == 0
    assert capsys.readouterr().out.splitlines() == [str(place / "second" / "comparison.html")]


def test_other_architectures_are_compared_by_rewards_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(place, place / "one", place / "wide", *flags(place), out="third") == 0
    found = document(place / "third")
    assert found["features"] is None
    assert "differ in d_in" in found["not_computed"]["features"]
    assert found["evaluation"]["n_common"] > 0
    assert "rewards alone are compared" in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused_with_a_way_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit, model = place / "first" / "a", place / "one"
    refused = [
        ((audit, model), [], "is a model, no finished audit"),
        ((audit, model), flags(place), "is a finished audit"),
        ((audit, audit), ["--seed", "3"], "no dataset is given"),
        ((audit, audit), ["--model", "m"], "leave --model out"),
        ((audit, place / "nowhere"), [], "cannot read B"),
    ]
    for (a, b), more, said in refused:
        assert compare(place, a, b, *more, out="fourth") == 2
        assert said in capsys.readouterr().err
    (place / "mine").mkdir()
    (place / "mine" / "comparison.html").write_text("my own")
    assert compare(place, audit, audit, out="mine") == 2
    assert (place / "mine" / "comparison.html").read_text() == "my own"


def test_jobs_of_a_service_are_compared_with_folders(
    place: Path, as_admin: Path, service: LiveService, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place / "first" / "b"
    names = ("report.json", "evaluation.jsonl", "pair_scores.parquet")
    job = service.world.finish(
        service.world.submit(labels={"alias": "new"}), {"report": {name: (folder / name).read_bytes() for name in names}}
    )
    for b, same in ((job.id, True), ("label:new", False)):
        out = as_admin / "out" / b.replace(":", "-")
        assert run_main(["compare", str(place / "first" / "a"), b, "--out", str(out), "-q"]) == 0
        found, known = document(out), document(place / "first")
        assert found["evaluation"] == known["evaluation"]
        assert (found["audited"] == known["audited"]) is same
        assert found["features"]["complete"] is False
    capsys.readouterr()
    assert run_main(["compare", str(place / "first" / "a"), "01M84Z1C6WFK4Q5X8GDP4NGT4H", "-q"]) == 2
