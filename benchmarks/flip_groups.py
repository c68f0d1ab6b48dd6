"""Flip the labels of whole groups of a preference file, and write down which: data with a known truth.

python -m benchmarks.flip_groups --data preferences.jsonl.gz --out flipped.jsonl.gz --truth truth.json --seed 0
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from safer_engine.errors import DatasetRefused

Row = dict[str, Any]
TARGETS = ("uniform", "margin", "length", "words")


@dataclass(frozen=True)
class Flipped:
    """Rows with some groups flipped; `groups` and `pairs` are the names of what was flipped."""

    rows: list[Row]
    groups: frozenset[str]
    pairs: frozenset[str]


def read_rows(path: Path) -> list[Row]:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """JSONL, gzipped without a date in its header, so that the same rows are the same file."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def flip_groups(
    rows: Sequence[Row], share: float, seed: int, axis: str | None = "safety", scores: Mapping[str, float] | None = None
) -> Flipped:
    """Exchange chosen and rejected in all pairs of a share of the groups.

    Args:
        share: of the groups that have the axis (of all groups where `axis` is None).
        seed: decides which; with scores, only among groups of equal score.
        scores: by pair id; the groups of highest mean are flipped, over their pairs that have one (an audit drops pairs that
            cannot be used); groups of no score come last. None: every group has the same chance.
    """
    pairs_of: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if axis is None or row.get("axis") == axis:
            pairs_of[row["group"]].append(row["id"])
    if not pairs_of:
        raise DatasetRefused(f"no pair has the axis {axis}", "name another with --axis")
    known = {group: [scores[pair] for pair in ids if pair in scores] for group, ids in pairs_of.items()} if scores else {}
    means = {group: float(np.mean(values)) if values else -np.inf for group, values in known.items()}
    order = sorted(pairs_of, key=lambda group: (-means.get(group, 0.0), hashlib.sha256(f"{seed}/flip/{group}".encode()).digest()))
    wrong = frozenset(order[: round(share * len(order))])
    flipped = frozenset(pair for group in wrong for pair in pairs_of[group])
    exchanged = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if row["id"] in flipped else dict(row) for row in rows
    ]
    return Flipped(exchanged, wrong, flipped)


def length_scores(rows: Sequence[Row]) -> dict[str, float]:
    """By pair id: how much longer the chosen response is, in characters."""
    return {row["id"]: float(len(_text(row["chosen"])) - len(_text(row["rejected"]))) for row in rows}


def word_scores(rows: Sequence[Row]) -> dict[str, float]:
    """By pair id: margin of a bag-of-words Bradley–Terry model fitted on these labels (another model's opinion)."""
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression

    bag = HashingVectorizer(n_features=1 << 16, alternate_sign=False, norm="l2")
    difference = bag.transform(_text(row["chosen"]) for row in rows) - bag.transform(_text(row["rejected"]) for row in rows)
    signs = np.where(np.arange(len(rows)) % 2 == 0, 1, -1)
    fitted = LogisticRegression(C=10.0, fit_intercept=False, max_iter=500).fit(difference.multiply(signs[:, None]).tocsr(), signs)
    return {row["id"]: float(margin) for row, margin in zip(rows, difference @ fitted.coef_[0], strict=True)}


def file_scores(path: Path) -> dict[str, float]:
    """By pair id: `margin` or `reward_margin` of a JSONL file, such as an audit's evaluation.jsonl or edits.jsonl."""
    rows = read_rows(path)
    name = "margin" if rows and "margin" in rows[0] else "reward_margin"
    return {row["pair_id"]: float(row[name]) for row in rows if row.get(name) is not None}


def truth_document(flipped: Flipped, seed: int, target: str, share: float) -> dict[str, Any]:
    return {
        "seed": seed,
        "target": target,
        "share": share,
        "groups": sorted(flipped.groups),
        "flipped": sorted(flipped.pairs),
    }


def _text(side: Any) -> str:
    text = side if isinstance(side, str) else side[-1]["content"]
    return re.sub(r"\s+", " ", text)


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="JSONL with id, group, axis.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSONL to write; gzipped if it ends in .gz.")
@click.option("--truth", type=click.Path(path_type=Path), required=True, help="JSON file for what was flipped.")
@click.option("--share", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="Share of the axis's groups.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--axis", default="safety", show_default=True)
@click.option("--target", type=click.Choice(TARGETS), default="uniform", show_default=True, help="Which groups are flipped.")
@click.option("--margins", type=click.Path(path_type=Path, exists=True), help="For --target margin: JSONL, pair_id and margin.")
def main(  # noqa: PLR0913 - one argument an option
    *, data: Path, out: Path, truth: Path, share: float, seed: int, axis: str, target: str, margins: Path | None
) -> None:
    """Flip whole groups and write the truth beside."""
    rows = read_rows(data)
    if target == "margin" and margins is None:
        raise click.UsageError("--target margin needs --margins")
    scorers: dict[str, Callable[[], dict[str, float] | None]] = {
        "uniform": lambda: None,
        "margin": lambda: file_scores(margins) if margins else None,
        "length": lambda: length_scores(rows),
        "words": lambda: word_scores(rows),
    }
    flipped = flip_groups(rows, share, seed, axis, scorers[target]())
    write_rows(out, flipped.rows)
    truth.parent.mkdir(parents=True, exist_ok=True)
    truth.write_text(json.dumps(truth_document(flipped, seed, target, share), indent=1) + "\n")
    click.echo(f"flipped {len(flipped.pairs)} pairs in {len(flipped.groups)} groups of {len(rows)} pairs")


if __name__ == "__main__":
    main()
