from pathlib import Path

import yaml

from safer_engine.labellers.rubric import Rubric, built_in_rubrics
from safer_engine.spec_labels import LabelSpec


def test_the_examples_in_the_documentation_are_valid() -> None:
    text = (Path(__file__).parents[2] / "docs" / "labels.md").read_text()
    blocks = [yaml.safe_load(part.split("```")[0]) for part in text.split("```yaml\n")[1:]]
    assert LabelSpec.model_validate(blocks[0]["labels"]).labeller.kind == "chat_api"
    assert LabelSpec.model_validate(blocks[1]["labels"]).labeller.kind == "local_lm"
    entries = [{"sae": blocks[2]["sae"], **entry} for entry in blocks[2]["corrections"]]
    assert LabelSpec.model_validate({"corrections": entries}).corrections
    assert Rubric.model_validate(blocks[3]).name == "medical"
    assert all(f"`{name}`" in text for name in built_in_rubrics())
