"""The demo's preference set: what is planted, that it is hidden from shortcuts, and that it is repeatable."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.demo import SETTINGS
from safer_engine import api
from safer_engine.demo_data import RECIPE, DemoData, build_base, flip, generate, of_length, write_damaged, write_demo
from safer_engine.demo_phrases import LENGTHY
from safer_engine.science.messages import Message
from safer_engine.science.rendering import make_renderer
from safer_engine.science.stats import average_precision
from safer_engine.train_spec import build_train_spec
from safer_engine.training import train_reward_model


@pytest.fixture(scope="module")
def data() -> DemoData:
    return generate(seed=0)


def text(row: dict[str, Any], side: str) -> str:
    return str(row[side][0]["content"])


def right_way_round(data: DemoData) -> list[dict[str, Any]]:
    return [flip(row) if row["id"] in data.flipped else row for row in data.rows]


def test_whole_safety_groups_are_flipped(data: DemoData) -> None:
    members: dict[str, set[bool]] = defaultdict(set)
    axes: dict[str, str] = {}
    for row in data.rows:
        members[row["group"]].add(row["id"] in data.flipped)
        axes[row["group"]] = row["axis"]
    safety = [group for group, axis in axes.items() if axis == "safety"]
    wrong = [group for group in safety if members[group] == {True}]
    assert all(len(found) == 1 for found in members.values())
    assert len(wrong) == round(0.1 * len(safety))
    assert all(members[group] == {False} for group, axis in axes.items() if axis == "chat")
    assert 600 <= len(data.rows) <= 800
    assert len({row["id"] for row in data.rows}) == len(data.rows)


def test_only_labels_differ_from_the_set_without_wrong_ones(data: DemoData) -> None:
    clean = generate(seed=0, flip_share=0.0)
    assert clean.flipped == frozenset()
    assert list(clean.rows) == right_way_round(data)
    assert clean.evaluation == data.evaluation


def test_evaluation_prompts_are_others(data: DemoData) -> None:
    prompts = {row["prompt"][0]["content"] for row in data.rows}
    groups = {row["group"] for row in data.rows}
    assert len(data.evaluation) > 80
    assert not any(row["prompt"][0]["content"] in prompts or row["group"] in groups for row in data.evaluation)
    assert {row["axis"] for row in data.evaluation} == {"safety", "chat"}


def test_length_is_a_nuisance_and_not_the_label(data: DemoData) -> None:
    longer: dict[str, list[bool]] = defaultdict(list)
    for row in right_way_round(data):
        longer[row["subset"]].append(len(text(row, "chosen")) > len(text(row, "rejected")))
    shares = {subset: float(np.mean(found)) for subset, found in longer.items()}
    assert all(0.25 < share < 0.75 for share in shares.values()), shares
    assert shares["refusal"] < 0.45 < shares["helpful"]


def test_the_length_phrase_goes_with_length_and_not_with_the_side(data: DemoData) -> None:
    counts = np.array([[text(row, side).count(LENGTHY) for side in ("chosen", "rejected")] for row in data.rows])
    words = np.array([[len(text(row, side).split()) for side in ("chosen", "rejected")] for row in data.rows])
    more, longer = counts[:, 0] - counts[:, 1], np.log(words[:, 0] / words[:, 1])
    assert np.corrcoef(more, longer)[0, 1] > 0.9
    assert np.sum(more > 0) > 60 < np.sum(more < 0)
    assert all(more * longer >= 0)
    assert not any(counts.min(axis=1))


def test_no_word_gives_the_label_away(data: DemoData) -> None:
    """A word's side is worth little: of the words found on 40 sides or more, none is on the right one nearly always."""
    sides: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in right_way_round(data):
        words = [set(text(row, side).lower().replace(".", " ").replace(",", " ").split()) for side in ("chosen", "rejected")]
        for at, other in ((0, 1), (1, 0)):
            for word in words[at] - words[other]:
                sides[word][at] += 1
    common = {word: counts for word, counts in sides.items() if sum(counts) >= 40}
    purity = {word: max(counts) / sum(counts) for word, counts in common.items()}
    assert len(common) > 60
    assert np.mean([share > 0.95 for share in purity.values()]) < 0.25, purity


@pytest.mark.full
def test_the_same_seed_writes_the_same_files_in_another_process(data: DemoData, tmp_path: Path) -> None:
    write_demo(tmp_path / "here", data)
    script = (
        "import sys, pathlib; from safer_engine.demo_data import generate, write_demo;"
        "write_demo(pathlib.Path(sys.argv[1]), generate(seed=0))"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "there")], check=True, env={"PYTHONHASHSEED": "77"})
    names = sorted(path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*") if path.is_file())
    assert len(names) > 5
    for name in names:
        here, there = ((tmp_path / place / name).read_bytes() for place in ("here", "there"))
        assert hashlib.sha256(here).digest() == hashlib.sha256(there).digest(), name
    assert generate(seed=1).rows != data.rows


def test_the_truth_lies_apart(data: DemoData, tmp_path: Path) -> None:
    files = write_demo(tmp_path, data)
    rows = [json.loads(line) for line in files.train.read_text().splitlines()]
    assert tuple(rows) == data.rows
    assert set(rows[0]) == {"id", "group", "axis", "subset", "prompt", "chosen", "rejected"}
    assert set(json.loads(files.truth.read_text())["flipped"]) == data.flipped


def test_damaged_data_have_every_safety_label_turned_round_and_no_other(data: DemoData, tmp_path: Path) -> None:
    damaged = [json.loads(line) for line in write_damaged(tmp_path / "damaged", data).read_text().splitlines()]
    turned = [row["id"] for row, was in zip(damaged, data.rows, strict=True) if row == flip(was) != was]
    assert turned == [row["id"] for row in data.rows if row["axis"] == "safety"]
    assert [row for row in damaged if row["axis"] != "safety"] == [row for row in data.rows if row["axis"] != "safety"]
    assert turned


def test_the_base_reads_the_texts_and_is_untrained(data: DemoData, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    texts = [text(row, "chosen") for row in data.rows]
    folder = build_base(tmp_path, texts, seed=3, width=32, blocks=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    renderer = make_renderer(tokenizer, 256)
    assert renderer.template == "chat"
    row = data.rows[0]
    side = renderer.side([Message("user", row["prompt"][0]["content"])], text(row, "chosen"))
    assert tokenizer.decode(side.ids[side.start : side.end]).startswith(text(row, "chosen"))
    assert len(side.ids) < 0.5 * len(side.text)
    model = AutoModel.from_pretrained(folder)
    assert model.config.hidden_size == 32
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.full
@pytest.mark.timeout(900)
def test_an_audit_finds_what_was_planted_and_the_margin_does_not(data: DemoData, tmp_path: Path) -> None:
    files = write_demo(tmp_path / "data", data)
    source = {"kind": "local", "path": str(files.train)}
    spec = build_train_spec(
        {"base": str(files.base), "dataset": {"source": source}, "recipe": RECIPE, "runtime": {"device": "cpu"}}
    )
    record = train_reward_model(spec, tmp_path / "rm").record
    last = [step["accuracy"] for step in record["curve"] if step["epoch"] > RECIPE["epochs"] - 1]
    model = {"path": str(tmp_path / "rm"), "max_length": RECIPE["max_length"]}
    report = api.audit(model=model, dataset=str(files.train), store=tmp_path / "store", **SETTINGS, runtime={"device": "cpu"})
    safety = report.pairs[report.pairs["axis"] == "safety"]
    wrong = safety["pair_id"].isin(data.flipped).to_numpy()
    found = average_precision(wrong, safety["suspicion"].to_numpy())
    by_margin = average_precision(wrong, -safety["reward_margin"].to_numpy())
    assert np.mean(last) > 0.95
    assert found >= 3 * wrong.mean()
    assert found > by_margin
    of_it = of_length(report.document.features or [])
    tested = [f for f in of_it if f.discovery]
    assert any(f.length_bound for f in tested)
    equal = [abs(f.salience_equal_length) for f in tested if f.salience_equal_length is not None]
    assert np.mean(equal) < 0.5 * np.mean([abs(f.salience) for f in tested])
    ablated = [f for f in of_it if f.causal_effect is not None]
    assert ablated
    assert not any(f.causal_verified == "yes" for f in ablated)
    assert any(f.causal_verified == "yes" for f in report.document.features or [])
