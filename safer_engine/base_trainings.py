"""Trainings from one base on parts of one dataset, one after another in a work area.

Pairs are read by the pipeline's own code with the base's tokenizer, once for all trainings; the models stay in memory, and only
what they say of pairs is kept. A training goes on from its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safer_engine.errors import Interrupted, NumericalError
from safer_engine.model_training import Told, Training, train
from safer_engine.pair_tables import survey, write_pairs
from safer_engine.sources.base_models import load_base_tokenizer
from safer_engine.sources.resolved import ResolvedDataset, ResolvedModel
from safer_engine.sources.tokenizers import load_renderer
from safer_engine.spec import DatasetSpec, ModelSpec, RuntimeSpec
from safer_engine.spec_recipe import LoraSpec, RecipeSpec
from safer_engine.stage import stage_seed
from safer_engine.store import WorkArea
from safer_engine.train_loop import CHECKPOINT, Checkpoints
from safer_engine.train_spec import TrainSpec
from safer_engine.training import token_pairs

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from safer_engine.science.rendering import Renderer
    from safer_engine.science.rm_training import PairRewards, RewardTrainer, TokenPairs
    from safer_engine.sources.base_models import BaseTokenizer

_PAIRS = "base-pairs.arrow"
_SCORED_AT_ONCE = 1024


@dataclass(frozen=True)
class Watch:
    """Who watches: `progress` is told (done, total, unit), `cancelled` asked between steps."""

    progress: Callable[[float, float, str], None]
    cancelled: Callable[[], bool]


@dataclass(frozen=True)
class Trained:
    """A trained model in memory, and what became of its training: architecture, n_parameters, fresh_head, steps, tokens."""

    trainer: RewardTrainer
    facts: dict[str, str]


def training_spec(
    base: str, recipe: RecipeSpec, lora: LoraSpec | None, dataset: DatasetSpec, seed: int, runtime: RuntimeSpec
) -> TrainSpec:
    """How each of the models is trained. A training needs more memory a token than a forward pass: batches are half as large."""
    smaller = runtime.model_copy(update={"batch_tokens": max(1, runtime.batch_tokens // 2)})
    return TrainSpec(seed=seed, base=base, dataset=dataset, recipe=recipe, lora=lora, runtime=smaller)


@dataclass(frozen=True)
class BaseTrainings:
    """Everything that the trainings share.

    Attributes:
        spec: recipe, seed, layout of the rows and runtime; its base, sources and evaluation are not read.
        section: of the audit's spec that asks for them, for errors.
    """

    spec: TrainSpec
    base: ResolvedModel
    work: WorkArea
    watch: Watch
    section: str
    ready: BaseTokenizer

    @classmethod
    def of(cls, spec: TrainSpec, base: ResolvedModel, work: WorkArea, watch: Watch, section: str) -> BaseTrainings:
        """Load the base's tokenizer. Raises ModelRefused."""
        return cls(spec, base, work, watch, section, load_base_tokenizer(base, spec.runtime))

    def renderer(self) -> Renderer:
        """Renders pairs as every one of the models reads them."""
        start = self.work.scratch / "start"
        self.ready.tokenizer.save_pretrained(start)
        self.ready.config.save_pretrained(start)
        recipe = self.spec.recipe
        read = ModelSpec(path=str(start), max_length=recipe.max_length, truncation_side=recipe.truncation_side)
        return load_renderer(start, read, self.spec.runtime.trust_remote_code)

    def read(self, dataset: ResolvedDataset) -> pa.Table:
        """The pairs as the base reads them, sampled as the audit samples; published once."""
        path = self.work.scratch / _PAIRS
        if not path.is_file():
            surveyed = survey(dataset, self.spec.dataset, stage_seed(self.spec.seed, "pairs", "sample"))
            total = len(surveyed.entries)
            with self.work.publish(_PAIRS, scratch=True) as target:
                write_pairs(target, dataset, surveyed, self.renderer(), lambda done: self.watch.progress(done, total, "pairs"))
        return self.table(_PAIRS)

    def table(self, name: str) -> pa.Table:
        """A table that was published in the scratch folder."""
        import pyarrow as pa

        with pa.memory_map(str(self.work.scratch / name)) as source:
            return pa.ipc.open_file(source).read_all()

    def train(
        self, name: str, pairs: TokenPairs, told: Told, *, seed: int | None = None, steps: int | None = None, own: str = ""
    ) -> Trained:
        """Train a model on pairs, from its last checkpoint.

        Args:
            name: of the training: a checkpoint of another is not read.
            seed: of the fresh head, the order and dropout; None: the spec's. steps: as in `OptimSettings`.
            own: name of its own checkpoint, where several trainings go on in the work area at one time.

        Raises:
            NumericalError: it diverged; its checkpoint is of no use and is not read again. Interrupted: the same call goes on.
        """
        spec = self.spec if seed is None else self.spec.model_copy(update={"seed": seed})
        checkpoints = Checkpoints(self.work, spec.runtime.checkpoint_seconds, name, own or CHECKPOINT)
        try:
            found = train(Training(spec, self.base, self.ready, pairs, steps), checkpoints, told)
        except NumericalError as error:
            checkpoints.forget()
            hint = f"lower {self.section}.recipe.lr, or train in float32 ({self.section}.recipe.dtype)"
            raise NumericalError(f"{self.section} {name}: {error.message}", hint) from error
        base, curve = found.base, found.curve
        facts: dict[str, Any] = {"architecture": type(base.model).__name__, "n_parameters": base.n_parameters}
        facts |= {"fresh_head": "yes" if base.fresh else "no", "steps": len(curve), "tokens": sum(s.tokens for s in curve)}
        return Trained(found.trainer, {key: str(value) for key, value in facts.items()})

    def rewards(self, trained: Trained, table: pa.Table) -> PairRewards:
        """Rewards of the pairs of a table, in runs of pairs between which a wish to stop is heard. Raises Interrupted."""
        import numpy as np

        from safer_engine.science.rm_training import PairRewards, pair_rewards

        settings, pad_id = trained.trainer.settings, self.ready.tokenizer.pad_token_id
        parts: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = [(np.zeros(0), np.zeros(0))]
        for start in range(0, table.num_rows, _SCORED_AT_ONCE):
            pairs = token_pairs(table.slice(start, _SCORED_AT_ONCE))
            found = pair_rewards(trained.trainer.model, pairs, pad_id, settings.batch_tokens, settings.bfloat16)
            parts.append((found.chosen, found.rejected))
            if self.watch.cancelled():
                raise Interrupted("stopped on request", "run the same command again to go on")
        chosen, rejected = (np.concatenate(side) for side in zip(*parts, strict=True))
        return PairRewards(chosen, rejected)


def facts_of(table: pa.Table) -> dict[str, str]:
    """The facts that a table was published with."""
    return {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
