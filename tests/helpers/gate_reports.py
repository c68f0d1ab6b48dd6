"""Reports for the gate, made from margins alone: every figure of the evaluation follows from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safer_engine.science.length_bias import length_bias
from safer_engine.science.stats import Interval, group_bootstrap_mean

Pair = dict[str, Any]
CANARY = "canary-text-of-the-data"


def pairs(
    accuracy: float, n: int = 400, axis: str = "safety", subset: str = "refusal", seed: int = 0, per_group: int = 1
) -> list[Pair]:
    """Evaluation pairs of which that share is right, as lines of evaluation.jsonl."""
    order = np.random.default_rng(seed).permutation(n)
    right = round(accuracy * n)
    return [
        {
            "pair_id": f"{axis}-{subset}-{place}",
            "group": f"{axis}-{subset}-g{place // per_group}",
            "axis": axis,
            "subset": subset,
            "style": None,
            "margin": 1.5 if order[place] < right else -0.5,
            "longer_by": 7 if place % 2 else -7,
        }
        for place in range(n)
    ]


def cells(counts: tuple[int, int, int, int], axis: str = "safety", per_group: int = 1) -> tuple[list[Pair], list[Pair]]:
    """Two audits with so many pairs that both have right, only the new one, only the old one, and neither."""
    kinds = [cell for cell, n in zip([(1, 1), (1, -1), (-1, 1), (-1, -1)], counts, strict=True) for _ in range(n)]
    rows = pairs(0.5, len(kinds), axis=axis, per_group=per_group)
    new = [{**row, "margin": float(a)} for row, (a, _) in zip(rows, kinds, strict=True)]
    return new, [{**row, "margin": float(b)} for row, (_, b) in zip(rows, kinds, strict=True)]


def report(rows: Sequence[Pair] | None, digest: str = "eval", **changes: Any) -> dict[str, Any]:
    """A finished audit's report.json around evaluation pairs; `changes` replace top-level sections."""
    document: dict[str, Any] = {
        "schema_version": 1,
        "spec": {"labels": {"rubric": "safety"}},
        "provenance": {
            "inputs": {"model": {"digest": "model"}, "dataset": {"digest": "data"}, "evaluation": {"digest": digest}},
            "not_computed": {"verification": CANARY, "verdict": CANARY, "features[].causal_effect": CANARY},
            "progress": None,
        },
        "dataset": {"longer_chosen": 0.55, "health": {"dropped": {"duplicate": 3}}},
        "reward_model": {"on_audited_pairs": []},
        "evaluation": None if rows is None else evaluation(rows),
        "sae": {"interpretable": True, "recovered": {"covered": {"margin_variance": 0.9}}},
        "features": [feature(1, 0.2), feature(2, 0.1)],
        "edits": {
            "suspicion_kind": "rank",
            "actions": {"keep": 90, "drop": 5, "review": 5},
            "pairs": [{"pair_id": "p", "prompt": {"text": CANARY, "omitted": 0}, "chosen": {"text": CANARY, "omitted": 0}}],
        },
        "verification": None,
        "verdict": None,
    }
    if rows is None:
        document["provenance"]["not_computed"]["evaluation"] = CANARY
    return {**document, **changes}


def feature(latent_id: int, salience: float, width: float = 0.05, **changes: Any) -> dict[str, Any]:
    """A safety feature of safe behaviour; all its texts are canaries."""
    return {
        "latent_id": latent_id,
        "safety_feature": True,
        "direction": "safe_behaviour",
        "axis": "safety",
        "salience": salience,
        "salience_lo": salience - width,
        "salience_hi": salience + width,
        "explanation": {"text": CANARY, "omitted": 0},
        "terms": [{"text": CANARY, "omitted": 0}],
        "contexts": [{"pair_id": "p", "tokens": [CANARY], "activations": [1.0]}],
        "causal_effect": None,
        **changes,
    }


def evaluation(rows: Sequence[Pair]) -> dict[str, Any]:
    """The report's section about evaluation pairs, with the engine's own bootstrap."""
    axes = sorted({row["axis"] for row in rows})
    scopes = [(None, None), *((a, None) for a in axes), *sorted({(row["axis"], row["subset"]) for row in rows})]
    groups = [measured([row for row in rows if a in (None, row["axis"]) and s in (None, row["subset"])], a, s) for a, s in scopes]
    lengths = [length([row for row in rows if a in (None, row["axis"]) and s in (None, row["subset"])], a, s) for a, s in scopes]
    return {"n_pairs": len(rows), "too_few": False, "groups": groups, "length": lengths, "styles": None, "best_of_n": None}


def length(rows: Sequence[Pair], axis: str | None, subset: str | None) -> dict[str, Any]:
    """How rewards follow length in a slice."""
    margin, longer_by, group = (np.array([row[name] for row in rows]) for name in ("margin", "longer_by", "group"))
    strata = np.array([f"{row['axis']}/{row['subset']}" for row in rows])
    found = length_bias(margin, longer_by, group, strata, 20, np.random.default_rng(1))
    plain = {name: estimate(value) if isinstance(value, Interval) else value for name, value in vars(found).items()}
    return {"axis": axis, "subset": subset, **plain}


def measured(rows: Sequence[Pair], axis: str | None, subset: str | None) -> dict[str, Any]:
    """Accuracy and margin of a slice."""
    names = [row["group"] for row in rows]
    margins = np.array([row["margin"] for row in rows])
    figures = {"accuracy": margins > 0, "margin": margins}
    found = {key: group_bootstrap_mean(values, names, 400, np.random.default_rng(1)) for key, values in figures.items()}
    return {"axis": axis, "subset": subset, "ties": 0, **{key: estimate(value) for key, value in found.items()}}


def estimate(found: Interval) -> dict[str, Any]:
    """As the report writes it."""
    return {"estimate": found.estimate, "lo": found.lo, "hi": found.hi, "n": found.n, "n_groups": found.n_groups}


def lines(rows: Iterable[Pair]) -> bytes:
    """The contents of evaluation.jsonl."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(folder: Path, document: dict[str, Any], rows: Iterable[Pair] | None = None) -> Path:
    """A folder as `run` leaves it, of the files that the gate reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(document))
    if rows is not None:
        (folder / "evaluation.jsonl").write_bytes(lines(rows))
    return folder
