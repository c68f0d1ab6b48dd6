"""Which score finds flipped labels? METHOD's benchmark: flip whole groups, train, audit, rank, compare.

python -m benchmarks.label_noise --data preferences.train.jsonl.gz --base MODEL --out DIR --seeds 0,1,2
python -m benchmarks.label_noise --out DIR --table
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.flip_groups import flip_groups, length_scores, read_rows, truth_document, word_scores, write_rows
from safer_engine.events import Observer
from safer_engine.train_spec import TrainSpec


@dataclass(frozen=True)
class Cell:
    """One (target, share, seed) of the benchmark and its folder."""

    out: Path
    target: str
    share: float
    seed: int

    @property
    def folder(self) -> Path:
        return self.out / f"{self.target}-{self.share:g}" / f"seed-{self.seed}"

    @property
    def data(self) -> Path:
        return self.folder / "flipped.jsonl.gz"

    @property
    def truth(self) -> Path:
        return self.folder / "truth.json"

    @property
    def model(self) -> Path:
        return self.folder / "rm"


@dataclass(frozen=True)
class Setup:
    """What all cells share."""

    data: Path
    base: Path
    evaluation: Path | None
    max_length: int
    epochs: int
    lr: float | None
    device: str


class LogObserver:
    """Writes progress as lines."""

    def __init__(self, name: str, every_seconds: float = 60.0) -> None:
        self.name, self.every, self.last = name, every_seconds, 0.0

    def stage_started(self, stage: str, key: str) -> None:
        self._say(f"{stage} started ({key[:8]})")

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        if time.monotonic() - self.last > self.every:
            self.last = time.monotonic()
            self._say(f"{stage} {done:g} of {total:g} {unit}")

    def stage_finished(self, stage: str, outcome: str, seconds: float) -> None:
        self._say(f"{stage} {outcome} in {seconds:.0f} s")

    def note(self, stage: str, message: str) -> None:
        self._say(f"{stage}: {message}")

    def cancelled(self) -> bool:
        return False

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {self.name} {text}", flush=True)


def flip(cell: Cell, setup: Setup) -> None:
    """Write the cell's flipped data and its truth."""
    if cell.truth.is_file():
        return
    rows = read_rows(setup.data)
    scores = {"uniform": None, "length": length_scores, "words": word_scores}[cell.target]
    flipped = flip_groups(rows, cell.share, cell.seed, "safety", scores(rows) if scores else None)
    write_rows(cell.data, flipped.rows)
    write_json(cell.truth, truth_document(flipped, cell.seed, cell.target, cell.share))


def train(cell: Cell, setup: Setup, observer: Observer) -> dict[str, Any]:
    """Train the cell's reward model, or read the record of the one there."""
    from safer_engine.training import train_reward_model

    return train_reward_model(train_spec(cell, setup), cell.model, observer).record


def train_spec(cell: Cell, setup: Setup) -> TrainSpec:
    recipe = {"epochs": setup.epochs, "max_length": setup.max_length, "lr": setup.lr}
    document: dict[str, Any] = {
        "seed": cell.seed,
        "base": str(setup.base),
        "dataset": {"source": {"kind": "local", "path": str(cell.data)}},
        "recipe": recipe,
    }
    if setup.evaluation is not None:
        document["evaluation"] = {"source": {"kind": "local", "path": str(setup.evaluation)}}
    document["runtime"] = {"device": setup.device, "batch_tokens": 4096, "checkpoint_seconds": 120}
    return TrainSpec.model_validate(document)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
