"""Datasets to edit, and the edits.jsonl an audit would have written for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safer_engine.edit_lines import FIELDS
from safer_engine.science.pair_formats import read_pairs, recognise
from safer_engine.science.pairs import Sampling, candidate, row_statuses, select
from safer_engine.sources.datasets import resolve_dataset
from safer_engine.spec import DatasetSpec, LocalSource


def local(path: Path, **more: Any) -> DatasetSpec:
    """A local dataset as a spec."""
    split = more.pop("split", None)
    return DatasetSpec(source=LocalSource(path=str(path), split=split), **more)


def write_edits(path: Path, dataset: DatasetSpec, actions: Sequence[str], suspicion: Sequence[float] | None = None) -> Path:
    """One line per row of the dataset with the given actions."""
    resolved = resolve_dataset(dataset)
    rows = list(resolved.rows())
    layout = recognise(rows, dataset.format, dataset.columns, dataset.label, dataset.winners)
    entries = select([candidate(pair) for pair in read_pairs(rows, layout)], Sampling())
    statuses = row_statuses(entries, [entry.reason for entry in entries])
    assert len(statuses) == len(actions)
    with path.open("w", encoding="utf-8") as handle:
        for number, (status, action) in enumerate(zip(statuses, actions, strict=True)):
            line = dict.fromkeys(FIELDS) | {
                "pair_id": status.pair_id,
                "content_digest": status.content_digest,
                "group": status.group,
                "axis": status.axis,
                "status": "scored" if status.reason is None else "not_scored",
                "reason": status.reason,
                "action": action,
                "suspicion": None if suspicion is None else suspicion[number],
                "signals": {},
                "evidence": [],
            }
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


def rows(n: int) -> list[dict[str, Any]]:
    """Plain preference rows with ids."""
    return [{"id": f"r{i}", "prompt": f"Frage {i} – ü", "chosen": f"good {i}", "rejected": f"bad {i}", "n": i} for i in range(n)]
