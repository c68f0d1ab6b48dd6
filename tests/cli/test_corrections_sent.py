import json
from pathlib import Path

import pytest

from cli.inputs import with_corrections
from safer_engine.errors import SpecError
from safer_engine.labellers.corrections import check_directions, load_corrections
from safer_engine.labellers.rubric import load_rubric

ENTRY = {"latent_id": 3, "rating": 1, "explanation": "Commas.", "by": "Ana"}
SAE = "a" * 64


def test_a_file_of_corrections_is_read_into_the_spec(tmp_path: Path) -> None:
    path = tmp_path / "said.yaml"
    path.write_text(json.dumps({"sae": SAE, "corrections": [ENTRY]}))
    sent = with_corrections({"labels": {"corrections": str(path), "keep": 4}})
    assert sent["labels"]["keep"] == 4
    assert sent["labels"]["corrections"] == [{"sae": SAE, **ENTRY, "direction": None, "terms": []}]
    assert with_corrections({"labels": {"keep": 4}}) == {"labels": {"keep": 4}}
    lines = tmp_path / "said.jsonl"
    lines.write_text(json.dumps({"sae": SAE, **ENTRY}) + "\n\n")
    assert load_corrections(str(lines)) == load_corrections(str(path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps({"corrections": [ENTRY]}), "sae: Field required"),
        (json.dumps({"sae": SAE, "corrections": [{**ENTRY, "rating": 6}]}), "rating:"),
        (json.dumps({"sae": SAE, "corrections": [{**ENTRY, "why": "x"}]}), "why:"),
        (json.dumps({"sae": SAE, "corrections": [ENTRY, ENTRY]}), "corrected twice"),
        (json.dumps([ENTRY]), "cannot be read"),
        (json.dumps({"sae": SAE, "corrections": [3]}), "cannot be read"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_and_says_where(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "said.yaml"
    path.write_text(content)
    with pytest.raises(SpecError, match=said):
        load_corrections(str(path))
    with pytest.raises(SpecError, match="there is no file of corrections"):
        load_corrections(str(tmp_path / "none.yaml"))


def test_a_direction_that_the_rubric_lacks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "said.yaml"
    path.write_text(json.dumps({"sae": SAE, "corrections": [{**ENTRY, "direction": "upwards"}]}))
    with pytest.raises(SpecError, match="no direction 'upwards'"):
        check_directions(load_corrections(str(path)), load_rubric("safety"))
