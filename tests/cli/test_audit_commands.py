"""What `check`, `plan` and `run` show of one small dataset whose counts are known."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from cli.main import run_main
from cli.options import build_from_flags
from cli.verify import with_verification
from safer_engine import demo_data
from tests.helpers.tiny_model import build_reward_model

SMALL = [
    part for value in ("sae.max_steps=20", "sae.min_steps=20", "sae.batch=128", "sae.k=4", "causal.pairs=4")
    for part in ("--set", value)
]  # fmt: skip
STAGES = [
    "pairs",
    "activations",
    "evaluation",
    "sae",
    "latents",
    "labels",
    "causal",
    "retraining",
    "pair_scores",
    "edits",
    "second_sae",
    "stability",
    "verification",
    "report",
]
ABSENT = {"evaluation", "retraining", "second_sae", "stability", "verification"}
KEPT, READ = 36, 40


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 usable pairs, one with an empty side, one with two equal sides, and two that occur twice."""
    folder = tmp_path_factory.mktemp("commands")
    rows: list[dict[str, Any]] = [dict(row) for row in demo_data.generate(seed=5, n_groups=20).rows][:KEPT]
    nothing = [{"role": "assistant", "content": " "}]
    spoilt = [{**rows[0], "id": "empty", "rejected": nothing}, {**rows[1], "id": "same", "rejected": rows[1]["chosen"]}]
    again = [{**row, "id": f"again-{n}"} for n, row in enumerate(rows[2:4])]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *spoilt, *again]))
    build_reward_model(folder / "rm", "llama")
    return folder


@pytest.fixture(scope="module")
def finished(material: Path) -> Path:
    """The folder of an audit that was run once, quietly."""
    out = material / "finished"
    assert run_main(["run", *flags(material, material / "store"), "--out", str(out), "--quiet", *SMALL]) == 0
    return out


def flags(material: Path, store: Path) -> list[str]:
    return ["-m", str(material / "rm"), "-d", str(material / "rows.jsonl"), "--store", str(store), "--device", "cpu"]


def rows_of(shown: str, title: str) -> dict[str, list[str]]:
    """First cell → other cells of a printed table; cells are two or more spaces apart."""
    lines = shown.split(f"{title} ", 1)[1].splitlines()[2:]
    table: dict[str, list[str]] = {}
    for line in lines:
        cells = re.split(r" {2,}", line.strip())
        if len(cells) < 2:
            break
        table[cells[0]] = cells[1:]
    return table


def test_check_counts_what_is_dropped_and_why(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["check", *flags(material, tmp_path)]) == 0
    shown = capsys.readouterr().out
    counts = rows_of(shown, "Dataset")
    assert counts["read"] == [str(READ)]
    assert counts["kept"] == [str(KEPT)]
    dropped = {"dropped: empty side": ["1"], "dropped: identical sides": ["1"], "dropped: duplicate": ["2"]}
    assert {name: cell for name, cell in counts.items() if name.startswith("dropped")} == dropped
    model = rows_of(shown, "Reward model")
    assert model["architecture"] == ["LlamaForSequenceClassification"]
    assert model["d in"] == ["32"]
    assert "tuple blocks" not in model
    assert rows_of(shown, "Batching and padding")["status"] == ["ok"]
    assert run_main(["check", *flags(material, tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    health = facts["health"]["dataset"]
    assert (health["n_in"], health["n_kept"]) == (READ, KEPT)
    assert health["dropped"] == {"duplicate": 2, "empty_side": 1, "identical_sides": 1}
    assert facts["health"]["evaluation"] is None
    assert facts["warnings"] == []


def test_check_warns_of_pairs_that_cannot_be_used(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (material / "rows.jsonl").open().readlines()[:KEPT]
    (tmp_path / "half.jsonl").write_text("".join([*good, *('{"prompt": "p", "chosen": 1, "rejected": 2}\n' for _ in good)]))
    asked = ["check", "-m", str(material / "rm"), "-d", str(tmp_path / "half.jsonl"), "--store", str(tmp_path / "s")]
    assert run_main([*asked, "--device", "cpu", "--json"]) == 0
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert warning.startswith("36 of 72 pairs could not be used (dropped: 36 malformed)")
    assert run_main([*asked, "--device", "cpu"]) == 0
    assert "warning: 36 of 72 pairs" in " ".join(capsys.readouterr().out.split())
    assert run_main([*asked, "--device", "cpu", "--sample", "30", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["warnings"]) == 1


def test_too_few_pairs_say_how_to_lower_the_limit(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "few.jsonl").write_text("".join((material / "rows.jsonl").open().readlines()[:5]))
    few = ["-m", str(material / "rm"), "-d", str(tmp_path / "few.jsonl"), "--store", str(tmp_path / "s"), "--device", "cpu"]
    assert run_main(["check", *few]) == 2
    said = capsys.readouterr().err
    assert "5 usable pairs of 5, fewer than 20" in said
    assert "lower the limit of 20 with --set dataset.min_pairs=2" in said
    assert run_main(["check", *few, "--set", "dataset.min_pairs=5"]) == 0
    assert "nothing is refused" in capsys.readouterr().out
    assert run_main(["check", *few, "--set", "dataset.min_pairs=1"]) == 2
    assert "greater than or equal to 2" in capsys.readouterr().err


def test_few_evaluation_pairs_are_warned_of_and_say_how_to_lower_the_limit(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [json.loads(line) for line in (material / "rows.jsonl").open().readlines()[:3]]
    asks = [[{"role": "user", "content": f"Quite another thing, number {n}?"}] for n in range(len(other))]
    apart = [{**row, "prompt": ask, "id": f"e{n}"} for n, (row, ask) in enumerate(zip(other, asks, strict=True))]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in apart))
    asked = ["check", *flags(material, tmp_path / "s"), "--eval-dataset", str(tmp_path / "eval.jsonl")]
    assert run_main(asked) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "warning: only 3 of 3 evaluation pairs are usable" in shown
    assert "--set evaluation.min_pairs=2 or more" in shown
    assert run_main([*asked, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["health"]["evaluation"]["n_in"] == 3
    assert len(facts["warnings"]) == 1


def test_plan_leaves_open_what_the_model_does_not_say(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(material / "rm", tmp_path / "rm")
    shutil.copyfile(material / "rows.jsonl", tmp_path / "rows.jsonl")
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    config["hidden_width"] = config.pop("hidden_size")
    (tmp_path / "rm" / "config.json").write_text(json.dumps(config))
    assert run_main(["plan", *flags(tmp_path, tmp_path / "s")]) == 0
    shown = capsys.readouterr().out
    plan = rows_of(shown, "Plan")
    for stage in ("activations", "sae", "latents", "labels"):
        assert plan[stage] == ["compute", "–", "–", "–", "–"]
    assert plan["pairs"][2] == "assumed"
    assert plan["total"] == ["–", "–", "–"]
    assert "does not say its width and depth" in shown
    assert run_main(["plan", *flags(tmp_path, tmp_path / "s"), "--json"]) == 0
    stages = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert [stages["sae"][name] for name in ("work", "seconds", "disk_bytes", "memory_bytes")] == [None] * 4


def test_plan_of_a_finished_audit_has_nothing_left(finished: Path, material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["plan", *flags(material, material / "store"), *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "extrapolated" not in shown
    plan = rows_of(shown, "Plan")
    assert [name for name in plan if name != "total"] == STAGES
    assert all(cells[:2] == ["cached", "–"] for name, cells in plan.items() if name != "total")
    assert plan["total"][0] == "0.0 s"
    assert run_main(["plan", *flags(material, material / "store"), *SMALL, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["workload"]["exact"]
    assert facts["workload"]["positions_exact"]
    (manifest,) = (material / "store" / "manifests").glob("*/activations/*.json")
    assert facts["workload"]["positions"] == json.loads(manifest.read_text())["meta"]["n_positions"]
    assert (facts["workload"]["n_pairs"], facts["workload"]["n_eval"]) == (KEPT, 0)
    assert [stage["seconds"] for stage in facts["stages"]] == [None] * len(STAGES)
    assert (finished / "report.json").is_file()


def test_run_shows_what_was_planned_beside_what_it_took(
    finished: Path, material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["run", *flags(material, material / "store"), "--out", str(tmp_path / "out"), *SMALL, "--set", "edits.budget=0.1"]
    assert run_main(again) == 0
    stages = rows_of(capsys.readouterr().out, "Stages")
    assert [name for name in stages if name != "total"] == STAGES
    assert stages["pairs"] == ["–", "cached", "–", "–"]
    assert stages["edits"][0].endswith(" s")
    assert stages["edits"][1].endswith(" s")
    assert stages["edits"][2] == "700.0 MB"
    assert stages["total"][2] == "700.0 MB"
    timing = json.loads((tmp_path / "out" / "report.json").read_text())["provenance"]["timing"]
    assert {cost["stage"] for cost in timing["stages"]} == set(STAGES) - ABSENT - {"report"}
    assert all(cost["planned"]["seconds"] >= 0 for cost in timing["stages"])
    first = json.loads((finished / "report.json").read_text())["provenance"]["timing"]
    assert [cost for cost in first["stages"] if cost["stage"] != "edits"] == [
        cost for cost in timing["stages"] if cost["stage"] != "edits"
    ]
    assert timing["planned"]["seconds"] == pytest.approx(sum(cost["planned"]["seconds"] for cost in timing["stages"]), abs=1e-6)


def test_run_json_counts_add_up(finished: Path, material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["run", *flags(material, material / "store"), "--out", str(tmp_path), *SMALL, "--json"]
    assert run_main(asked) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts)[:4] == ["schema_version", "report", "n_candidates", "n_safety_features"]
    assert list(facts)[4:] == ["dataset", "reward_model", "sae", "edits", "verification", "verdict"]
    assert facts["schema_version"] == 1
    assert facts["report"] == str((tmp_path / "report.html").resolve())
    assert (facts["dataset"]["health"]["n_in"], facts["dataset"]["n_pairs"]) == (READ, KEPT)
    assert sum(facts["edits"]["actions"].values()) == READ
    assert sum(facts["edits"]["not_scored"].values()) == READ - KEPT
    report = json.loads((finished / "report.json").read_text())
    assert facts["n_candidates"] == len(report["features"])
    assert facts["n_safety_features"] == sum(feature["safety_feature"] for feature in report["features"])


def test_verify_trains_the_arms_of_a_finished_audit(
    material: Path, finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the audit computed is cached; without a base nothing is trained; one seed says nothing of benefit."""
    monkeypatch.chdir(material)
    rows = [json.loads(line) for line in (material / "rows.jsonl").read_text().splitlines()]
    texts = [turn["content"] for row in rows for side in ("chosen", "rejected") for turn in row[side]]
    demo_data.build_base(material / "base", texts, width=16, blocks=1)
    apart = [dict(row) for row in demo_data.generate(seed=99, n_groups=40, flip_share=0.0).rows]
    (material / "apart.jsonl").write_text("".join(json.dumps(row) + "\n" for row in apart))
    given = [*flags(material, material / "store"), "-e", "apart.jsonl", "--set", "edits.budget=0.2", *SMALL]
    assert run_main(["verify", *given]) == 2
    assert "give --base" in capsys.readouterr().err
    small = ["--set", "retraining.recipe.epochs=1", "--set", "retraining.recipe.max_length=64"]
    assert run_main(["verify", *given, "--base", "base", "--seeds", "1", "-o", "verified", "--json", *small]) == 0
    found = json.loads(capsys.readouterr().out)["verification"]
    assert (found["outcome"], found["seeds"], found["planned"]) == ("inconclusive", 1, 1)
    assert found["pairs"]["edits"] == KEPT - sum(found["edits"].values())
    assert run_main(["verify", *given, "--base", "base", "--seeds", "1", "-o", "verified", *small]) == 0
    shown = capsys.readouterr()
    assert "Retrained: inconclusive" in shown.out
    assert rows_of(shown.out, "Stages")["verification"][1] == "cached"


def test_the_default_number_of_seeds_gives_way_to_a_spec_file(tmp_path: Path) -> None:
    spec = tmp_path / "eight.yaml"
    spec.write_text("verification: {seeds: 8}\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    names = ("preset", "sample", "stratify", "device", "seed", "no_text", "trust_remote_code")
    flags = {**dict.fromkeys(names), "model": "rm", "dataset": str(rows), "eval_dataset": str(rows), "assignments": ()}
    for file, seeds, wanted in ((spec, None, 8), (None, None, 5), (spec, 2, 2)):
        found = with_verification({**flags, "spec_file": file}, "base", seeds).spec
        assert found.verification is not None
        assert found.retraining is not None
        assert (found.verification.seeds, found.retraining.base, found.retraining.folds) == (wanted, "base", 0)


def test_the_folds_of_the_audit_stay_for_its_edits_follow_from_them(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    names = ("preset", "sample", "stratify", "device", "seed", "no_text", "trust_remote_code")
    flags = {**dict.fromkeys(names), "model": "rm", "dataset": str(rows), "eval_dataset": str(rows)}
    for file, assignments, wanted in (
        ("retraining: {base: base, folds: 3}", (), 3),
        ("retraining: {base: base}", (), 2),  # the default of the section
        ("retraining: {base: base}", ("retraining.folds=0",), 0),
        ("retraining: {recipe: {epochs: 2}}", (), 0),  # of itself no audit
        ("seed: 1", ("retraining.recipe.epochs=2",), 0),
        ("seed: 1", ("retraining.base=base",), 2),
    ):
        spec = tmp_path / "audit.yaml"
        spec.write_text(file + "\n")
        found = with_verification({**flags, "spec_file": spec, "assignments": assignments}, "base", 1).spec
        assert found.retraining is not None
        assert found.retraining.folds == wanted, (file, assignments)
        if file.startswith("retraining: {base"):
            made = build_from_flags(**{**flags, "spec_file": spec, "assignments": assignments}).spec
            assert made.suspicion == found.suspicion
