"""Margins from reward models that never saw a pair: a training without each fold, rewards of what was left out.

The reward model under audit has learnt its own dataset, wrong labels included, so its margins hide them. A retrained margin is
truly out of fold: neither the pair nor any of its group was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safer_engine.artifacts import PairSet
from safer_engine.base_trainings import BaseTrainings, facts_of
from safer_engine.sources.resolved import ResolvedDataset
from safer_engine.training import token_pairs

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]


@dataclass(frozen=True)
class FoldedPairs:
    """The pairs under audit, and which of them are left out together.

    Attributes:
        folds_P: fold of each pair of `pairs` (`science.folds.group_folds`).
    """

    dataset: ResolvedDataset
    pairs: PairSet
    folds_P: Ints


@dataclass(frozen=True)
class FoldMargins:
    """What the retrained models say.

    Attributes:
        margins_P: r(chosen) − r(rejected) by the model that did not see the pair; NaN where that model cannot read it.
        steps, tokens: of all trainings together.
        base: architecture, n_parameters, fresh_head of the model they start from.
    """

    margins_P: Floats
    steps: int
    tokens: int
    base: dict[str, Any]


def fold_margins(bench: BaseTrainings, folded: FoldedPairs) -> FoldMargins:
    """Train a reward model without each fold and score the fold with it, from where the work area stands.

    Raises:
        ModelRefused, DatasetRefused, SpecError: what cannot be trained on.
        NumericalError: a training diverged.
        Interrupted: asked to stop; the same call goes on.
    """
    import numpy as np

    table = bench.read(folded.dataset)
    place = {name: row for row, name in enumerate(table["pair_id"].to_pylist())}
    row_P = np.asarray([place.get(name, -1) for name in folded.pairs.pairs["pair_id"].to_pylist()], dtype=np.int64)
    found = np.full(len(row_P), np.nan)
    folds = np.unique(folded.folds_P).tolist()
    readable = row_P >= 0
    parts: list[dict[str, str]] = []
    for fold in folds:
        held_P = readable & (folded.folds_P == fold)
        seen = table.take(row_P[readable & (folded.folds_P != fold)])
        part = _fold(bench, (len(parts), len(folds)), seen, table.take(row_P[held_P]))
        found[held_P] = part["margin"].to_numpy()
        parts.append(facts_of(part))
    sums = {name: sum(int(part[name]) for part in parts) for name in ("steps", "tokens")}
    facts = {"architecture": parts[0]["architecture"], "n_parameters": int(parts[0]["n_parameters"])}
    return FoldMargins(found, **sums, base={**facts, "fresh_head": parts[0]["fresh_head"] == "yes"})


def _fold(bench: BaseTrainings, at: tuple[int, int], seen: pa.Table, held: pa.Table) -> pa.Table:
    """Margins of what is held out, by a model trained on what is seen; published once, with facts of the training."""
    import pyarrow as pa

    (number, n_folds), watch = at, bench.watch
    name = f"fold-{number}.arrow"
    if not (bench.work.scratch / name).is_file():

        def told(done: int, total: int) -> bool:
            watch.progress(number * total + done, n_folds * total, "steps")
            return watch.cancelled()

        trained = bench.train(f"without fold {number}", token_pairs(seen), told)
        margins = bench.rewards(trained, held).margin
        schema = pa.schema([("pair_id", pa.string()), ("margin", pa.float64())], metadata=trained.facts)
        table = pa.table({"pair_id": held["pair_id"].combine_chunks(), "margin": margins})
        with bench.work.publish(name, scratch=True) as target, pa.ipc.new_file(str(target), schema) as writer:
            writer.write_table(table.cast(schema))
    return bench.table(name)
