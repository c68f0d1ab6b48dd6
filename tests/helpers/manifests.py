"""A manifest of exported arms, with one seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safer_engine.arm_manifest import ArmManifest

ARMS = ("as given", "edits", "margin", "random")


def manifest_of(folder: Path = Path("nowhere"), **dataset: Any) -> ArmManifest:
    """Of an audit of rm on rows.jsonl, measured on apart.jsonl, all in a folder; `dataset` are further values of that section."""
    names = {arm: f"{arm.replace(' ', '-')}-0" for arm in ARMS}
    source = {name: {"kind": "local", "path": str(folder / f"{name}.jsonl")} for name in ("rows", "apart")}
    return ArmManifest.model_validate({
        "spec": {
            "model": {"path": str(folder / "rm")}, "dataset": {"source": source["rows"], **dataset},
            "evaluation": {"source": source["apart"]}, "retraining": {"base": str(folder / "base"), "folds": 0},
            "verification": {"seeds": 1},
        },
        "digests": {"dataset": "a", "evaluation": "b"}, "steps": 1, "layout": "texts", "left_out": 0, "edited_axes": ["safety"],
        "data": [{"file": f"{name}.jsonl", "digest": "c", "pairs": 2, "dropped": 1, "flipped": 0} for name in names.values()],
        "runs": [
            {"arm": arm, "seed": 0, "training_seed": 0, "data": f"{name}.jsonl", "output": name} for arm, name in names.items()
        ],
    })  # fmt: skip
