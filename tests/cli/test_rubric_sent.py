"""A rubric file of this machine travels with a submission, as the text that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.inputs import with_rubric
from safer_engine.errors import SpecError
from safer_engine.labellers.corrections import label_files_digest
from safer_engine.labellers.rubric import load_rubric, rubric_digest, rubric_label
from safer_engine.spec_labels import LabelSpec

RUBRIC: dict[str, Any] = {
    "name": "medical",
    "title": "Medical advice",
    "question": "How relevant is it for medical advice?",
    "scale": {1: "Unrelated.", 2: "Loosely.", 3: "Partly.", 4: "Clearly.", 5: "Squarely."},
    "categories": [{"name": "referral", "direction": None, "weight": 0.9, "terms": ["see a doctor", "pharmacist*"]}],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "medical.yaml"
    found.write_text(yaml.safe_dump(RUBRIC))
    return found


def test_the_text_of_a_file_is_sent_and_is_the_same_rubric(path: Path) -> None:
    sent = with_rubric({"labels": {"rubric": str(path), "keep": 4}})["labels"]
    assert sent["keep"] == 4
    assert sent["rubric"] == path.read_text()
    path.unlink()
    assert load_rubric(sent["rubric"]).name == rubric_label(sent["rubric"]) == "medical"
    for other in ({}, {"labels": {"rubric": "length"}}, {"labels": sent}, {"labels": {"rubric": "upload:abc"}}):
        assert with_rubric(other) == other


def test_its_digest_is_in_the_key_and_is_that_of_the_file(path: Path) -> None:
    here, sent = LabelSpec(rubric=str(path)), LabelSpec(rubric=path.read_text())
    assert label_files_digest(here) == label_files_digest(sent) == rubric_digest(str(path))
    other = LabelSpec(rubric=path.read_text().replace("pharmacist", "chemist"))
    assert label_files_digest(other) != label_files_digest(sent)


def test_a_file_that_is_no_rubric_is_refused_before_anything_is_sent(path: Path) -> None:
    path.write_text(yaml.safe_dump({**RUBRIC, "scale": {1: "x"}}))
    with pytest.raises(SpecError, match="scale must describe"):
        with_rubric({"labels": {"rubric": str(path)}})


def test_a_text_may_not_unfold_and_is_bounded() -> None:
    text = yaml.safe_dump(RUBRIC)
    with pytest.raises(SpecError, match="aliases"):
        load_rubric(text.replace("Medical advice", "&a Medical advice").replace("How relevant is it for medical advice?", "*a"))
    with pytest.raises(SpecError, match="larger than"):
        load_rubric(text + "#" * (1 << 20))
    with pytest.raises(SpecError, match="given as text is not YAML"):
        load_rubric("a: [\n")
