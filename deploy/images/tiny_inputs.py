"""Run in the worker's image: a tiny reward model, a preference set and a spec, in the folder that the first argument names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safer_engine.demo_data import build_base, generate
from safer_engine.train_spec import TrainSpec
from safer_engine.training import train_reward_model

_SPEC = {
    "sae": {"expansion": 2, "k": 4, "batch": 64, "max_steps": 10},
    "causal": {"pairs": 4},
    "report": {"bootstrap": 100, "features": 4, "pairs": 4},
    "runtime": {"threads": 1},
}


def main(folder: Path) -> None:
    """Write `model/`, `pairs.jsonl` and `spec.json`, which is YAML too."""
    folder.mkdir(parents=True)
    rows = generate(0, n_groups=20).rows
    base = build_base(folder / "base", [row["chosen"][0]["content"] for row in rows], width=16, blocks=2)
    document = {
        "base": str(base),
        "dataset": {"source": {"kind": "memory"}},
        "recipe": {"epochs": 1, "max_length": 64},
        "runtime": {"device": "cpu", "threads": 1},
    }
    model = train_reward_model(TrainSpec.model_validate(document), folder / "model", rows=rows).path
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"source": {"kind": "local", "path": str(pairs)}}
    spec = {**_SPEC, "model": {"path": str(model), "max_length": 64}, "dataset": source}
    (folder / "spec.yaml").write_text(json.dumps(spec), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
