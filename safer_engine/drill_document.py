"""From the records of arms to the document of a drill."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import metadata

import numpy as np
from numpy.typing import NDArray

from safer_engine.drill_arms import Arm, ArmRecord, Bench, floats
from safer_engine.drill_spec import DrillSpec, RuleName
from safer_engine.errors import ArtifactError
from safer_engine.report.model_drill import At, Cell, DrillDocument, Effect, Flagged, Ranked
from safer_engine.science.crossed import Difference
from safer_engine.science.poison_harm import Found, accuracy, find, harm
from safer_engine.science.poison_mark import MARK, SIGN

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Shares of the axis's pairs that a person might look at."""
_FEW_SEEDS = 5
_FEW_PAIRS = 10
Flags = NDArray[np.bool_]


def document_of(spec: DrillSpec, bench: Bench, inputs: dict[str, str], wanted: Sequence[Arm]) -> DrillDocument:
    """What is finished so far, in the order of rules and budgets; at least the first seed of all of them."""
    clean = {seed: _there(bench, Arm(seed)) for seed in sorted({arm.seed for arm in wanted}) if bench.record(Arm(seed))}
    done = {arm: record for arm in wanted if (record := bench.record(arm)) is not None}
    cells = []
    for rule in spec.rules:
        for budget in spec.budgets:
            arms = [record for arm, record in done.items() if (arm.rule, arm.budget) == (rule, budget)]
            cells.append(_cell(spec.axis, rule, budget, [(clean[record.seed], record) for record in arms]))
    first = next(iter(clean.values()))
    right_SN = np.stack([record.measured.right for record in clean.values()]).astype(np.float64)
    own, rest = accuracy(right_SN, np.asarray(first.measured.axis), np.asarray(first.measured.subset), spec.axis)
    return DrillDocument(
        mark=f"Every row of poisoned data has the column {MARK}; their files and models are named {SIGN}.",
        tool_version=_version_of_tool(),
        spec=spec.model_dump(mode="json"),
        inputs=inputs,
        axis=spec.axis,
        n_pairs=len(first.pairs.pair_id),
        n_axis_pairs=first.pairs.axis.count(spec.axis),
        steps=first.steps,
        clean_accuracy=own,
        clean_rest_accuracy=rest,
        cells=cells,
        planned=len(wanted),
        done=len(done),
        notes=_notes(spec, cells, len(done), len(wanted)),
    )


def _there(bench: Bench, arm: Arm) -> ArmRecord:
    record = bench.record(arm)
    if record is None:
        raise ArtifactError(f"the record of arm {arm.name} is gone", "run the same command again")
    return record


def _cell(axis: str, rule: RuleName, budget: float, arms: list[tuple[ArmRecord, ArmRecord]]) -> Cell:
    """One rule with one budget, from (clean, poisoned) of each seed."""
    change_SN = np.stack(
        [np.asarray(poisoned.measured.right, dtype=np.float64) - np.asarray(clean.measured.right) for clean, poisoned in arms]
    )
    measured = arms[0][1].measured
    found = harm(change_SN, np.asarray(measured.group), np.asarray(measured.axis), np.asarray(measured.subset), axis)
    rankings = {
        name: [_ranking(name, axis, clean, poisoned) for clean, poisoned in arms]
        for name in ("suspicion", "margin", "pair_score", "before")
    }
    return Cell(
        rule=rule,
        budget=budget,
        seeds=len(arms),
        n_flipped=[len(poisoned.flipped) for _, poisoned in arms],
        chance=float(np.mean([_truth(axis, poisoned)[0].mean() for _, poisoned in arms])),
        axis=_effect(found.axis),
        rest=None if found.rest is None else _effect(found.rest),
        apart=None if found.apart is None else _effect(found.apart),
        rankings=[
            _ranked(name, [one for one in seeds if one is not None]) for name, seeds in rankings.items() if None not in seeds
        ],
        flagged=[_flagged(name, axis, [poisoned for _, poisoned in arms]) for name in ("suspicious", "edited")],
    )


def _truth(axis: str, record: ArmRecord) -> tuple[Flags, Flags]:
    """Which pairs of the axis were flipped, and which of all pairs are of the axis."""
    ours_P = np.asarray(record.pairs.axis) == axis
    wrong = set(record.flipped)
    return np.asarray([name in wrong for name in record.pairs.pair_id])[ours_P], ours_P


def _ranking(name: str, axis: str, clean: ArmRecord, poisoned: ArmRecord) -> Found | None:
    """One ranking of one seed; None where the audit has no such figure. A pair without suspicion comes last."""
    truth_A, ours_P = _truth(axis, poisoned)
    if name in ("suspicion", "before"):
        doubt_P = np.nan_to_num(floats((poisoned if name == "suspicion" else clean).pairs.suspicion), nan=-1.0)
    else:
        doubt_P = -floats(getattr(poisoned.pairs, name))
    doubt_A = doubt_P[ours_P]
    return find(truth_A, doubt_A, SHARES) if np.isfinite(doubt_A).all() else None


def _ranked(name: str, seeds: list[Found]) -> Ranked:
    at = [
        At(share=share, recall=_mean(one.at[share][0] for one in seeds), precision=_mean(one.at[share][1] for one in seeds))
        for share in SHARES
    ]
    return Ranked(
        name=name,
        average_precision=_mean(one.average_precision for one in seeds),
        by_seed=[one.average_precision for one in seeds],
        auroc=_mean(one.auroc for one in seeds),
        at_number=_mean(one.at_number for one in seeds),
        at=at,
    )


def _flagged(name: str, axis: str, records: list[ArmRecord]) -> Flagged:
    hits, counts, recalls = 0, 0, []
    for record in records:
        truth_A, ours_P = _truth(axis, record)
        named_A = np.asarray(getattr(record.pairs, name))[ours_P]
        found = int((named_A & truth_A).sum())
        hits, counts = hits + found, counts + int(named_A.sum())
        recalls.append(found / int(truth_A.sum()))
    precision = hits / counts if counts else None
    return Flagged(name=name, n=counts / len(records), recall=_mean(recalls), precision=precision)


def _effect(found: Difference) -> Effect:
    return Effect(
        change=found.estimate, lo=found.lo, hi=found.hi, p=found.p,
        n_seeds=found.n_seeds, n_groups=found.n_groups, n_pairs=found.n_items,
    )  # fmt: skip


def _mean(values: Iterable[float]) -> float:
    """The mean of shares, kept within [0, 1] against rounding."""
    return min(1.0, max(0.0, float(np.mean(list(values)))))


def _version_of_tool() -> str:
    try:
        return metadata.version("safer-audit")
    except metadata.PackageNotFoundError:
        return "unknown"


def _notes(spec: DrillSpec, cells: list[Cell], done: int, planned: int) -> list[str]:
    found = []
    if done < planned:
        found.append(f"{done} of {planned} poisoned arms are finished; the same command goes on.")
    if spec.seeds == 1:
        found.append("With one seed nothing tells how far a difference varies from training to training: it has no interval.")
    elif spec.seeds < _FEW_SEEDS:
        found.append(f"{spec.seeds} seeds: intervals are wide, and detection varies from seed to seed.")
    if "score" in spec.rules:
        found.append(
            "Poison by the pair score is chosen by a score of the kind that the detector reads: how well it is found says little "
            "about poison of another origin. The other rules stand beside it for that."
        )
    if spec.dataset.sample is not None and spec.seeds > 1:
        found.append("dataset.sample draws other pairs for every seed: the counts of pairs and steps are those of the first.")
    few = sum(min(cell.n_flipped) < _FEW_PAIRS for cell in cells)
    if few:
        found.append(
            f"In {few} of {len(cells)} cells fewer than ten pairs were flipped: their detection is a matter of few pairs."
        )
    return found
