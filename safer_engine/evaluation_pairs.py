"""Evaluation data on their way to an `EvaluationSet`: what is refused, what is left out, what is only warned of.

A file that cannot be read as preference pairs is refused before anything is computed. Pairs that turn out not to be
usable are dropped and counted; however few are left, the dataset under audit is not held up by them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_engine.artifacts import PairSet
from safer_engine.errors import DatasetRefused
from safer_engine.pair_tables import Survey, drops, health, longer_by, remedy, survey, write_pairs
from safer_engine.sources.resolved import ResolvedDataset
from safer_engine.spec import DatasetSpec
from safer_engine.stage import stage_seed

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from safer_engine.science.evaluation import ScoredPairs
    from safer_engine.science.rendering import Renderer

NO_EVALUATION = "no evaluation set was given"


def survey_evaluation(
    source: ResolvedDataset, spec: DatasetSpec, base_seed: int, training_prompts: frozenset[bytes] = frozenset()
) -> Survey:
    """Read all evaluation rows once; pairs whose prompt is among `training_prompts` are left out.

    Args:
        base_seed: spec.seed. The sample depends on it alone, so that training and auditing a model measure on the same.

    Raises:
        DatasetRefused: unknown layout, ids given twice, an unknown column to stratify by, mostly malformed rows.
    """
    with named_evaluation():
        return survey(source, spec, stage_seed(base_seed, "pairs", "evaluation sample"), training_prompts)


@contextmanager
def named_evaluation() -> Iterator[None]:
    """Make a DatasetRefused from within say that it is about the evaluation set."""
    try:
        yield
    except DatasetRefused as error:
        message, hint = (re.sub(r"\bdataset\.(?=[a-z])", "evaluation.", text) for text in (error.message, error.hint))
        raise DatasetRefused(f"the evaluation set cannot be used: {message}", hint) from error


def write_evaluation_pairs(
    path: Path, source: ResolvedDataset, surveyed: Survey, renderer: Renderer, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Render the surveyed pairs as those of the dataset are, and write the usable ones; returns what became of them all.

    Args:
        progress: told the number of pairs looked at so far, and of all.

    Raises:
        DatasetRefused: the rows changed since the survey.
    """
    total = len(surveyed.entries)
    return health(surveyed, write_pairs(path, source, surveyed, renderer, lambda done: progress(done, total)))


@dataclass(frozen=True)
class EvaluationInput:
    """Evaluation rows and how they are read: `base_seed` is the spec's, pairs with a prompt of `dataset` are left out."""

    source: ResolvedDataset
    spec: DatasetSpec
    base_seed: int
    dataset: PairSet


def read_evaluation(
    path: Path, given: EvaluationInput, renderer: Renderer, progress: Callable[[int, int], None]
) -> tuple[dict[str, Any], str]:
    """Survey the evaluation pairs and write the usable ones.

    Returns:
        What became of them all, and what to say where they are few (see `shortage`).

    Raises:
        DatasetRefused: see `survey_evaluation`.
    """
    surveyed = survey_evaluation(given.source, given.spec, given.base_seed, given.dataset.prompt_keys)
    counts = write_evaluation_pairs(path, given.source, surveyed, renderer, progress)
    return counts, shortage(counts, given.spec.min_pairs)


def scored_pairs(
    table: pa.Table, chosen: NDArray[np.float64], rejected: NDArray[np.float64], *, lengths: bool = False
) -> ScoredPairs:
    """Pairs with their rewards as a benchmark scores them.

    Args:
        table: of pairs, see `PairSet`.
        chosen, rejected: rewards in the order of the table, [P].
        lengths: whether the lengths of the responses are wanted too.

    Raises:
        NumericalError: a reward is not finite.
    """
    from safer_engine.science.evaluation import ScoredPairs

    columns = {name: table[name].to_pylist() for name in ("pair_id", "group", "axis", "subset", "style", "item")}
    return ScoredPairs(**columns, reward_chosen=chosen, reward_rejected=rejected, longer_by=longer_by(table) if lengths else None)


def shortage(counts: dict[str, Any], minimum: int) -> str:
    """What to say of evaluation pairs of which fewer than `minimum`, or none, are usable; empty where there are enough.

    Args:
        counts: see `pair_tables.health`.
    """
    kept, read = counts["n_kept"], counts["n_in"]
    table = f"dropped: {drops(counts['dropped'])}"
    cure = remedy(counts["dropped"], "evaluation")
    if not kept:
        return f"none of the {read} evaluation pairs is usable ({table}): {cure}"
    if kept >= minimum:
        return ""
    found = f"only {kept} of {read} evaluation pairs {'is' if kept == 1 else 'are'} usable, fewer than {minimum} ({table})"
    return f"{found}: figures on them are unsure; {cure}, or lower the limit with --set evaluation.min_pairs=2 or more"
