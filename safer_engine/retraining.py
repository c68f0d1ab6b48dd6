"""Margins from reward models that never saw a pair: a training without each fold, rewards of what was left out.

The reward model under audit has learnt its own dataset, wrong labels included, so its margins hide them. A retrained margin is
truly out of fold: neither the pair nor any of its group was trained on. Pairs are read by the pipeline's own code with the
base's tokenizer, once for all trainings; the models stay in memory, and only margins are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safer_engine.artifacts import PairSet
from safer_engine.errors import Interrupted, NumericalError
from safer_engine.pair_tables import survey, write_pairs
from safer_engine.sources.base_models import add_lora, load_base, load_base_tokenizer
from safer_engine.sources.resolved import ResolvedDataset, ResolvedModel
from safer_engine.spec import DatasetSpec, ModelSpec, RuntimeSpec
from safer_engine.spec_retraining import RetrainingSpec
from safer_engine.stage import stage_seed
from safer_engine.store import WorkArea
from safer_engine.train_loop import Checkpoints, train_to_end
from safer_engine.train_spec import TrainSpec
from safer_engine.training import optim_settings, token_pairs

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from safer_engine.science.rm_training import RewardTrainer
    from safer_engine.sources.base_models import BaseTokenizer

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

_PAIRS = "base-pairs.arrow"
_SCORED_AT_ONCE = 1024


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
class Watch:
    """Who watches: `progress` is told (done, total, unit), `cancelled` asked between steps."""

    progress: Callable[[float, float, str], None]
    cancelled: Callable[[], bool]


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


def training_spec(spec: RetrainingSpec, dataset: DatasetSpec, seed: int, runtime: RuntimeSpec) -> TrainSpec:
    """How each of the models is trained. A training needs more memory a token than a forward pass: batches are half as large."""
    smaller = runtime.model_copy(update={"batch_tokens": max(1, runtime.batch_tokens // 2)})
    return TrainSpec(seed=seed, base=spec.base, dataset=dataset, recipe=spec.recipe, lora=spec.lora, runtime=smaller)


def fold_margins(spec: TrainSpec, base: ResolvedModel, folded: FoldedPairs, work: WorkArea, watch: Watch) -> FoldMargins:
    """Train a reward model without each fold and score the fold with it, from where the work area stands.

    Args:
        spec: recipe, seed, layout of the rows and runtime; its base, sources and evaluation are not read.

    Raises:
        ModelRefused, DatasetRefused, SpecError: what cannot be trained on.
        NumericalError: a training diverged; its checkpoint is of no use and is not read again.
        Interrupted: asked to stop; the same call goes on.
    """
    import numpy as np

    bench = _Bench(spec, base, work, watch, load_base_tokenizer(base, spec.runtime))
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
        part = bench.fold(len(parts), len(folds), seen, table.take(row_P[held_P]))
        found[held_P] = part["margin"].to_numpy()
        parts.append(_facts_of(part))
    sums = {name: sum(int(part[name]) for part in parts) for name in ("steps", "tokens")}
    facts = {"architecture": parts[0]["architecture"], "n_parameters": int(parts[0]["n_parameters"])}
    return FoldMargins(found, **sums, base={**facts, "fresh_head": parts[0]["fresh_head"] == "yes"})


@dataclass(frozen=True)
class _Bench:
    """Everything that the trainings share."""

    spec: TrainSpec
    base: ResolvedModel
    work: WorkArea
    watch: Watch
    ready: BaseTokenizer

    def read(self, dataset: ResolvedDataset) -> pa.Table:
        """The pairs as the base reads them, sampled as the audit samples; published once."""
        import pyarrow as pa

        from safer_engine.sources.tokenizers import load_renderer

        path = self.work.scratch / _PAIRS
        if not path.is_file():
            start = self.work.scratch / "start"
            self.ready.tokenizer.save_pretrained(start)
            self.ready.config.save_pretrained(start)
            recipe = self.spec.recipe
            read = ModelSpec(path=str(start), max_length=recipe.max_length, truncation_side=recipe.truncation_side)
            renderer = load_renderer(start, read, self.spec.runtime.trust_remote_code)
            surveyed = survey(dataset, self.spec.dataset, stage_seed(self.spec.seed, "pairs", "sample"))
            total = len(surveyed.entries)
            with self.work.publish(_PAIRS, scratch=True) as target:
                write_pairs(target, dataset, surveyed, renderer, lambda done: self.watch.progress(done, total, "pairs"))
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()

    def fold(self, number: int, n_folds: int, seen: pa.Table, held: pa.Table) -> pa.Table:
        """Margins of what is held out, by a model trained on what is seen; published once, with facts of the training."""
        import pyarrow as pa

        name = f"fold-{number}.arrow"
        path = self.work.scratch / name
        if not path.is_file():
            margins, facts = self._trained(number, n_folds, seen, held)
            table = pa.table({"pair_id": held["pair_id"].combine_chunks(), "margin": margins})
            with self.work.publish(name, scratch=True) as target, pa.ipc.new_file(str(target), _schema(facts)) as writer:
                writer.write_table(table.cast(_schema(facts)))
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()

    def _trained(self, number: int, n_folds: int, seen: pa.Table, held: pa.Table) -> tuple[Floats, dict[str, str]]:
        from safer_engine.machine import resolve_device
        from safer_engine.science.rm_training import RewardTrainer, silence_dropout

        spec = self.spec
        base = load_base(self.base, self.ready, spec.runtime, spec.seed)
        model = add_lora(base, spec.lora, spec.seed) if spec.lora else base.model
        if not spec.recipe.dropout:
            silence_dropout(model)
        device = resolve_device(spec.runtime.device)
        model.to(device)
        settings = optim_settings(spec, base.n_parameters, device)
        trainer = RewardTrainer(model, token_pairs(seen), settings, self.ready.tokenizer.pad_token_id)

        def told(done: int, total: int) -> bool:
            self.watch.progress(number * total + done, n_folds * total, "steps")
            return self.watch.cancelled()

        checkpoints = Checkpoints(self.work, spec.runtime.checkpoint_seconds, f"fold-{number}")
        try:
            curve = train_to_end(trainer, checkpoints, told)
        except NumericalError as error:
            checkpoints.forget()
            hint = "lower retraining.recipe.lr, or train in float32 (retraining.recipe.dtype)"
            raise NumericalError(f"retraining without fold {number}: {error.message}", hint) from error
        facts = {"architecture": type(base.model).__name__, "n_parameters": base.n_parameters}
        facts |= {"fresh_head": "yes" if base.fresh else "no", "steps": len(curve), "tokens": sum(s.tokens for s in curve)}
        return self._scored(trainer, held), {name: str(value) for name, value in facts.items()}

    def _scored(self, trainer: RewardTrainer, held: pa.Table) -> Floats:
        """Margins in runs of pairs, between which a wish to stop is heard."""
        import numpy as np

        from safer_engine.science.rm_training import pair_rewards

        settings, pad_id = trainer.settings, self.ready.tokenizer.pad_token_id
        margins = [np.zeros(0)]
        for start in range(0, held.num_rows, _SCORED_AT_ONCE):
            pairs = token_pairs(held.slice(start, _SCORED_AT_ONCE))
            margins.append(pair_rewards(trainer.model, pairs, pad_id, settings.batch_tokens, settings.bfloat16).margin)
            if self.watch.cancelled():
                raise Interrupted("stopped on request", "run the same command again to go on")
        return np.concatenate(margins)


def _schema(facts: dict[str, str]) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([("pair_id", pa.string()), ("margin", pa.float64())], metadata=facts)


def _facts_of(table: pa.Table) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
