"""Margins from reward models that never saw a pair: the dataset in folds, a training without each, rewards of what was left out.

The reward model under audit has learnt its own dataset, wrong labels included, so its margins hide them. A retrained margin is
truly out of fold: neither the pair nor any of its group was trained on.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_engine.artifacts import PairSet
from safer_engine.errors import ArtifactError
from safer_engine.events import Observer
from safer_engine.sources.resolved import ResolvedDataset, ResolvedInputs
from safer_engine.spec import AuditSpec, MemorySource, ModelSpec
from safer_engine.train_spec import TrainSpec
from safer_engine.training import train_reward_model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

STAGE = "retraining"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class RetrainedMargins:
    """What the retrained models say.

    Attributes:
        margins_P: r(chosen) − r(rejected) by the model that did not see the pair; NaN where that model could not read it.
        folds_P: the fold of each pair.
        training_seconds: of each fold's training.
    """

    margins_P: Floats
    folds_P: Ints
    training_seconds: tuple[float, ...]


def retrained_margins(
    spec: TrainSpec, dataset: ResolvedDataset, pairs: PairSet, folds_P: Ints, folder: Path, observer: Observer
) -> RetrainedMargins:
    """Train a reward model without each fold and score the fold with it; what is in the folder already is not done again.

    Args:
        spec: base, recipe and layout of the rows; its source and sample are not read.
        dataset: the rows that `pairs` were made of.
        folds_P: fold of each pair (`science.folds.group_folds`).
        folder: where the models and their rewards are kept.

    Raises:
        SaferError: as `train_reward_model`.
    """
    import numpy as np

    rows = list(dataset.rows())
    row_P = pairs.pairs["row"].to_numpy()
    margins, seconds = np.full(len(row_P), np.nan), []
    for fold in np.unique(folds_P).tolist():
        held_out = np.flatnonzero(folds_P == fold)
        seen = [rows[row] for row in sorted(set(row_P[folds_P != fold].tolist()))]
        model = folder / f"fold-{fold}"
        trained = train_reward_model(_over(spec), model, observer, rows=seen)
        seconds.append(float(trained.record["timing"]["training_seconds"]))
        margins[held_out] = _held_out_margins(spec, rows, row_P[held_out], model, observer)
    return RetrainedMargins(margins, folds_P, tuple(seconds))


def _over(spec: TrainSpec) -> TrainSpec:
    """The same over rows in memory, all of them."""
    dataset = spec.dataset.model_copy(update={"source": MemorySource(), "sample": None, "stratify": None})
    return spec.model_copy(update={"dataset": dataset, "evaluation": None})


def _held_out_margins(spec: TrainSpec, rows: Sequence[Row], row_N: Ints, model: Path, observer: Observer) -> Floats:
    """Margins of the pairs at those rows of the dataset, in their order; a row may hold several pairs."""
    import numpy as np

    wanted = sorted(set(row_N.tolist()))
    table, rewards = _score(spec, [rows[row] for row in wanted], model, observer)
    found: dict[tuple[int, int], float] = {}
    parts: Counter[int] = Counter()
    for at, margin in zip(table["row"].to_pylist(), rewards.tolist(), strict=True):
        row = wanted[at]
        found[row, parts[row]] = margin
        parts[row] += 1
    asked: Counter[int] = Counter(row_N.tolist())
    if uneven := [row for row in wanted if parts[row] not in (0, asked[row])]:
        raise ArtifactError(f"row {uneven[0]} has {parts[uneven[0]]} pairs for the retrained model and {asked[uneven[0]]} here")
    seen: Counter[int] = Counter()
    margins = np.full(len(row_N), np.nan)
    for place, row in enumerate(row_N.tolist()):
        margins[place] = found.get((row, seen[row]), np.nan)
        seen[row] += 1
    return margins


def _score(spec: TrainSpec, rows: Sequence[Row], folder: Path, observer: Observer) -> tuple[Any, Floats]:
    """The pair table of some rows as the model in a folder reads them, and its margins."""
    import numpy as np

    from safer_engine.pipeline import AuditRequest, run_stage
    from safer_engine.science.extraction import batch_plan, score
    from safer_engine.science.readings import token_ids
    from safer_engine.sources.memory import resolve_memory
    from safer_engine.sources.model_loading import load_reward_model
    from safer_engine.sources.models import resolve_model
    from safer_engine.stages.pairs import PairsStage
    from safer_engine.store import LocalArtifactStore

    recipe = spec.recipe
    read = ModelSpec(path=str(folder), max_length=recipe.max_length, truncation_side=recipe.truncation_side)
    model = resolve_model(read, spec.runtime, None)
    dataset = _over(spec).dataset.model_copy(update={"min_pairs": 2})
    audit = AuditSpec(seed=spec.seed, model=read, dataset=dataset, runtime=spec.runtime)
    scratch = folder.with_name(f".{folder.name}.scoring")
    store = LocalArtifactStore(scratch)
    try:
        request = AuditRequest(audit, ResolvedInputs(model, resolve_memory([dict(row) for row in rows])))
        table = PairSet(run_stage(PairsStage(), request, store, {}, observer)).pairs
        rm = load_reward_model(model, read, spec.runtime)
        both = zip(token_ids(table, "chosen"), token_ids(table, "rejected"), strict=True)
        total = 2 * table.num_rows
        pulse = lambda done: observer.progress(STAGE, done, total, "responses")  # noqa: E731
        found = score(rm, [ids for pair in both for ids in pair], batch_plan(rm, spec.runtime.batch_tokens), pulse)
        rewards = found.rewards_R.double().numpy().reshape(-1, 2)
        return table.select(["row"]).combine_chunks(), np.asarray(rewards[:, 0] - rewards[:, 1], dtype=np.float64)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
