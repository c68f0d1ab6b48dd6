"""Arms as datasets: they hold what the edits say, their scripts train, and what was trained is judged by the same rules."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from cli.main import run_main
from safer_engine.arm_import import parse_checkpoint
from safer_engine.arm_manifest import ArmManifest, read_manifest
from safer_engine.demo_data import build_base, generate, write_demo
from safer_engine.errors import InputRefused, SpecError
from safer_engine.spec import AuditSpec
from safer_engine.store import digest_file
from tests.helpers.tiny_model import build_reward_model

SMALL = [
    "sae.max_steps=20", "sae.min_steps=20", "sae.d_sae=96", "sae.k=4", "sae.batch=128", "causal.enabled=false",
    "edits.budget=0.1", "report.bootstrap=100", "model.max_length=64",
]  # fmt: skip
RECIPE = ["epochs=1", "batch=8", "lr=0.003", "max_length=64", "dtype=float32"]
OPENRLHF = {
    "pretrain", "dataset", "chosen_key", "rejected_key", "save_path", "max_epochs", "train_batch_size", "micro_train_batch_size",
    "learning_rate", "lr_warmup_ratio", "l2", "max_norm", "max_len", "seed", "apply_chat_template",
}  # fmt: skip
"""Options of OpenRLHF's train_rm (2025) that are used."""
TRL_OWN = {"max_length", "center_rewards_coefficient"}
"""Fields of TRL's RewardConfig (1.16) that TrainingArguments does not have."""
Row = dict[str, Any]


class Place:
    """A finished audit and its arms, exported."""

    def __init__(self, root: Path) -> None:
        self.root = root
        data = generate(seed=1, n_groups=40)
        write_demo(root, data)
        self.model = build_reward_model(root / "rm", "llama", width=16, blocks=2)
        texts = [row["chosen"][0]["content"] for row in data.rows]
        self.base = build_base(root / "base", texts, width=16, blocks=2)
        self.flags = ["-m", str(self.model), "-d", str(root / "preferences.jsonl"), "-e", str(root / "evaluation.jsonl")]
        self.flags += ["--device", "cpu", "--store", str(root / "store")]
        self.flags += [part for value in SMALL for part in ("--set", value)]
        assert run_main(["run", *self.flags, "--out", str(root / "out"), "-q"]) == 0

    def export(self, name: str, *more: str, base: Path | None = None) -> Path:
        out = self.root / name
        recipe = [part for value in RECIPE for part in ("--set", f"retraining.recipe.{value}")]
        asked = ["verify", "export-arms", *self.flags, "--base", str(base or self.base), *recipe, "--out", str(out), "-q", *more]
        assert run_main(asked) == 0
        return out

    @property
    def edits(self) -> list[Row]:
        return lines(self.root / "out" / "edits.jsonl")


def lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("arms"))


@pytest.fixture(scope="module")
def arms(place: Place) -> Path:
    return place.export("arms", "--seeds", "2")


def test_arms_hold_what_the_edits_say(place: Place, arms: Path) -> None:
    manifest = read_manifest(arms)
    given = {row["id"]: row for row in lines(place.root / "preferences.jsonl")}
    dropped = {row["pair_id"] for row in place.edits if row["action"] == "drop"}
    axis_of = {row["pair_id"]: row["axis"] for row in place.edits}
    assert dropped
    held = {path.name: lines(path) for path in arms.glob("*.jsonl")}
    assert set(held) == {"as-given.jsonl", "edits.jsonl", "margin.jsonl", "random-0.jsonl", "random-1.jsonl"}
    whole = {row["pair_id"] for row in held["as-given.jsonl"]}
    for row in held["as-given.jsonl"]:
        prompt = given[row["pair_id"]]["prompt"]
        assert row["chosen"] == [*prompt, *given[row["pair_id"]]["chosen"]]
        assert row["rejected"] == [*prompt, *given[row["pair_id"]]["rejected"]]
    assert whole - {row["pair_id"] for row in held["edits.jsonl"]} == dropped
    margins = {row["pair_id"]: row["reward_margin"] for row in place.edits if row["pair_id"] in whole}
    for name in ("margin.jsonl", "random-0.jsonl", "random-1.jsonl"):
        gone = whole - {row["pair_id"] for row in held[name]}
        assert sorted(axis_of[each] for each in gone) == sorted(axis_of[each] for each in dropped)
        if name == "margin.jsonl":
            for axis in {axis_of[each] for each in gone}:
                kept = [margins[each] for each in whole - gone if axis_of[each] == axis]
                assert max(margins[each] for each in gone if axis_of[each] == axis) <= min(kept)
    assert held["random-0.jsonl"] != held["random-1.jsonl"]
    for data in manifest.data:
        assert (data.pairs, data.digest) == (len(held[data.file]), digest_file(arms / data.file))
        assert data.dropped + data.pairs == len(whole)
    assert manifest.steps == -(-len(whole) // 8)
    assert len({run.training_seed for run in manifest.runs}) == 2


def test_an_export_is_the_same_each_time_and_never_overwrites(place: Place, arms: Path, capsys: Any) -> None:
    again = place.export("again", "--seeds", "2")
    for path in sorted(arms.rglob("*")):
        if path.is_file() and "models" not in path.parts and path.name != "verification.json":
            assert path.read_bytes() == (again / path.relative_to(arms)).read_bytes(), path.name
    asked = ["verify", "export-arms", *place.flags, "--base", str(place.base), "--out", str(arms)]
    assert run_main(asked) == 2
    assert "exists" in capsys.readouterr().err
    other = [*asked[:-1], str(place.root / "other")]
    assert run_main([*other, "--seed", "5"]) == 2
    assert "run it first" in capsys.readouterr().err
    assert run_main([*other, "--set", "dataset.allow_poisoned=true"]) == 2
    assert "their marks would be lost" in capsys.readouterr().err
    assert not (place.root / "other").exists()


def test_evaluation_pairs_that_cannot_judge_are_refused_before_anybody_trains(place: Place, capsys: Any) -> None:
    edited = read_manifest(place.export("judged", "--seeds", "1")).edited_axes
    left = [row for row in lines(place.root / "evaluation.jsonl") if row["axis"] != edited[0]]
    (place.root / "left.jsonl").write_text("".join(json.dumps(row) + "\n" for row in left))
    asked = ["verify", "export-arms", *place.flags, "--base", str(place.base), "-e", str(place.root / "left.jsonl")]
    assert run_main([*asked, "--out", str(place.root / "unjudged"), "-q"]) == 2
    assert f"the evaluation pairs have none of {edited[0]}" in capsys.readouterr().err
    assert not (place.root / "unjudged").exists()


def test_scripts_name_options_that_their_trainers_have(place: Place, arms: Path) -> None:
    known = {field.name for field in fields(TrainingArguments)} | TRL_OWN
    for path in (arms / "runs").iterdir():
        run = json.loads(path.read_text())
        assert set(run["trl"]) <= known
        TrainingArguments(output_dir=str(place.root), **{k: v for k, v in run["trl"].items() if k not in TRL_OWN})
        assert run["trl"]["per_device_train_batch_size"] * run["trl"]["gradient_accumulation_steps"] == 8
    commands = [
        shlex.split(line) for line in (arms / "train_openrlhf.sh").read_text().splitlines() if line.startswith("deepspeed")
    ]
    assert len(commands) == 8
    for command in commands:
        assert {word.removeprefix("--") for word in command if word.startswith("--")} - {"module"} == OPENRLHF
        assert (arms / command[command.index("--dataset") + 1]).is_file()
    for script in ("train_trl.py", "train_plain.py"):
        compile((arms / script).read_text(), script, "exec")


@pytest.fixture(scope="module")
def trained(arms: Path) -> dict[str, Path]:
    """Models of the plain script."""
    found = {}
    for name in ("as-given-0", "edits-0", "random-0"):
        command = [sys.executable, str(arms / "train_plain.py"), str(arms / "runs" / f"{name}.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[name.removesuffix("-0")] = Path(done.stdout.strip())
    return found


def test_models_of_another_trainer_are_judged_by_the_same_rules(
    place: Place, arms: Path, trained: dict[str, Path], capsys: Any
) -> None:
    named = [f"{arm}:0={path}" for arm, path in trained.items()]
    store = ["--store", str(place.root / "store")]
    assert run_main(["verify", "import", str(arms), *named, f"random:1={trained['random']}", *store, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((arms / "verification.json").read_text())
    assert (found["outcome"], found["seeds"], found["planned"], found["trained"]) == ("inconclusive", 1, 2, "elsewhere")
    assert found["left_out"] == ["random:1"]
    rows = lines(place.root / "evaluation.jsonl")
    for arm, path in trained.items():
        told = next(row for row in found["accuracy"] if row["arm"] == arm.replace("-", " ") and row["axis"] is None)
        assert told["accuracy"] == pytest.approx(accuracy(path, rows, found["n_evaluated"]), abs=1e-9)
    assert len({row["digest"] for row in found["checkpoints"]}) == 3
    assert run_main(["verify", "import", str(arms), *named, *store]) == 0
    assert "Retrained: inconclusive" in capsys.readouterr().out


def test_arms_are_judged_where_neither_the_audited_model_nor_the_base_is(
    place: Place, arms: Path, trained: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    named = [f"{arm}:0={path}" for arm, path in trained.items()]
    assert run_main(["verify", "import", str(arms), *named, "--store", str(place.root / "store"), "--json"]) == 0
    usual = json.loads(capsys.readouterr().out)
    (tmp_path / "moved").mkdir()
    for name in ("preferences", "evaluation"):
        shutil.copy(place.root / f"{name}.jsonl", tmp_path / "moved" / f"{name}.jsonl")
    read = read_manifest(arms)
    gone = read.spec.model_dump(mode="json")
    gone["model"]["path"] = gone["retraining"]["base"] = gone["dataset"]["source"]["path"] = str(tmp_path / "not here")
    gone["runtime"]["device"] = "cuda:7"
    (tmp_path / "manifest.json").write_text(read.model_copy(update={"spec": AuditSpec.model_validate(gone)}).model_dump_json())
    asked = ["verify", "import", str(tmp_path), *named, "--store", str(tmp_path / "store"), "--device", "cpu", "--json"]
    assert run_main(asked) == 2
    assert "not here" in capsys.readouterr().err
    moved = ["-d", str(tmp_path / "moved" / "preferences.jsonl"), "-e", str(tmp_path / "moved" / "evaluation.jsonl")]
    assert run_main([*asked, *moved]) == 0
    assert json.loads(capsys.readouterr().out) == usual
    assert run_main([*asked, "-d", moved[3], "-e", moved[3]]) == 2
    assert "the dataset is not what it was" in capsys.readouterr().err


def accuracy(path: Path, rows: list[Row], n: int) -> float:
    """Share of pairs that a model has right, by Transformers alone; axes and subsets count alike."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForSequenceClassification.from_pretrained(path).eval()
    right: dict[tuple[str, str | None], list[bool]] = {}
    for row in rows:
        rewards = []
        for side in ("chosen", "rejected"):
            text = tokenizer.apply_chat_template([*row["prompt"], *row[side]], tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][-64:]
            with torch.no_grad():
                rewards.append(float(model(torch.tensor([ids])).logits))
        right.setdefault((row["axis"], row.get("subset")), []).append(rewards[0] > rewards[1])
    assert sum(map(len, right.values())) == n  # so that the figures are over the same pairs
    return sum(sum(part) / len(part) for part in right.values()) / len(right)


def test_what_cannot_be_judged_is_refused(
    place: Place, arms: Path, trained: dict[str, Path], capsys: Any, tmp_path: Path
) -> None:
    given, edits, random = (f"{arm}:0={path}" for arm, path in trained.items())
    store = ["--store", str(place.root / "store")]
    for named, said in (
        ([given, edits], "no checkpoint of arm 'random'"),
        ([given, edits, f"random:0={trained['edits']}"], "one and the same model"),
        ([given, given, edits, random], "named twice"),
        ([given, edits, f"random:1={trained['random']}"], "no seed has all arms"),
        ([given, edits, f"random:0={tmp_path}"], str(tmp_path)),
    ):
        assert run_main(["verify", "import", str(arms), *named, *store]) == 2
        assert said in capsys.readouterr().err
    whole = read_manifest(arms)
    (tmp_path / "manifest.json").write_text(whole.model_copy(update={"edited_axes": ("law", "safety")}).model_dump_json())
    assert run_main(["verify", "import", str(tmp_path), given, edits, random, *store]) == 2
    assert "no model can be compared on law" in capsys.readouterr().err
    evaluation = place.root / "evaluation.jsonl"
    before = evaluation.read_bytes()
    try:
        evaluation.write_bytes(before[: before.rstrip().rindex(b"\n") + 1])
        assert run_main(["verify", "import", str(arms), given, edits, random, *store]) == 2
        assert "the evaluation is not what it was" in capsys.readouterr().err
    finally:
        evaluation.write_bytes(before)


def test_checkpoints_are_named_by_arm_and_seed(arms: Path) -> None:
    manifest = read_manifest(arms)
    assert parse_checkpoint("as-given:1=a=b", manifest).path == "a=b"
    assert parse_checkpoint("as given:0=x", manifest).arm == "as given"
    for wrong in ("edits=x", "edits:0", "edits:0=", "edits:-1=x", "edits:2=x", "edit:0=x", ":0=x"):
        with pytest.raises(SpecError):
            parse_checkpoint(wrong, manifest)


def test_a_broken_manifest_is_refused(arms: Path, tmp_path: Path) -> None:
    for text in ("{", "[]", '{"manifest_version": 2}', (arms / "manifest.json").read_text().replace('"steps": ', '"steps": -')):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(InputRefused, match="no manifest of arms"):
            read_manifest(tmp_path)
    with pytest.raises(InputRefused, match="cannot be read"):
        read_manifest(tmp_path / "nothing")
    whole = read_manifest(arms)
    assert ArmManifest.model_validate_json(whole.model_dump_json()) == whole


def test_a_base_without_a_chat_template_gets_texts(place: Place) -> None:
    base = build_reward_model(place.root / "plain", "bert", width=16, blocks=2)
    assert AutoTokenizer.from_pretrained(base).chat_template is None
    out = place.export("texts", "--seeds", "1", base=base)
    manifest = read_manifest(out)
    row = lines(out / "as-given.jsonl")[0]
    assert manifest.layout == "texts"
    assert isinstance(row["chosen"], str)
    given = next(each for each in lines(place.root / "preferences.jsonl") if each["id"] == row["pair_id"])
    assert row["chosen"].endswith(given["chosen"][-1]["content"][-30:])  # the model under audit reads the last 64 tokens
    assert row["rejected"].endswith(given["rejected"][-1]["content"][-30:])
    assert "--apply_chat_template" not in (out / "train_openrlhf.sh").read_text()
