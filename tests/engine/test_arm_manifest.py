"""A manifest of arms that could not be judged is refused when it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safer_engine.arm_manifest import read_manifest
from safer_engine.errors import InputRefused
from tests.helpers.manifests import manifest_of

Document = dict[str, Any]
WRONG: list[tuple[Callable[[Document], Any], str]] = [
    (lambda found: found["runs"].clear(), "no run of arm edits"),
    (lambda found: found["data"].pop(), "data that are not listed: random-0.jsonl"),
    (lambda found: found["digests"].pop("evaluation"), "no digest of the evaluation"),
    (lambda found: found["edited_axes"].clear(), "edited_axes"),
    (lambda found: found["spec"].pop("verification"), "lacks section verification"),
]


def test_a_whole_manifest_is_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(manifest_of().model_dump_json())
    assert read_manifest(tmp_path) == manifest_of()


@pytest.mark.parametrize(("spoil", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_manifest_that_lacks_something_is_refused(tmp_path: Path, spoil: Callable[[Document], Any], said: str) -> None:
    document = manifest_of().model_dump(mode="json")
    spoil(document)
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(InputRefused, match=said):
        read_manifest(tmp_path)
