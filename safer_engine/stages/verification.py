"""Stage `verification`: retrain with the recommended edits and with controls, and compare on pairs that none was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from safer_engine.artifacts import Absent, Artifact, Edits, PairScores, PairSet, Verification
from safer_engine.spec import RuntimeSpec
from safer_engine.spec_verification import LEAST_SEEDS, VerificationSpec
from safer_engine.stage import Draft, Inputs, SpecView, StageContext

if TYPE_CHECKING:
    from safer_engine.verification import Run

_READ = "read"
NOT_ASKED = "no model was retrained on the edited data: what the edits would change has not been measured"
NO_EDITS = "nothing is to be dropped or flipped: there are no edits to verify"
NOT_READ = "the base cannot read any pair that is to be dropped or flipped: no model can be trained with and without them"


class VerificationStage:
    """Yields `Absent` where it is not asked for, so that every report says that its edits are recommendations, not gains.

    Parts are the arms of the seeds that are trained in any case, after one that reads the pairs.
    """

    name: ClassVar[str] = "verification"
    version: ClassVar[int] = 6
    resource: ClassVar[Literal["cpu", "gpu"]] = "gpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = (PairSet, PairScores, Edits)
    produces: ClassVar[type[Artifact]] = Verification
    reads: ClassVar[tuple[str, ...]] = (
        "dataset", "evaluation", "verification", "edits", "retraining.recipe", "retraining.lora", "retraining.content",
    )  # fmt: skip
    asked_by: ClassVar[str] = "verification"
    opens: ClassVar[tuple[str, ...]] = ("dataset", "evaluation", "base")

    def parts(self, spec: SpecView, runtime: RuntimeSpec, inputs: Inputs) -> tuple[str, ...]:
        """See `PartedStage.parts`. Seeds that are trained only where the first ones decide nothing are left to `run`."""
        asked: VerificationSpec | None = spec.verification
        actions = {} if asked is None else inputs.get(Edits).meta["actions"]
        if asked is None or not actions.get("drop", 0) + actions.get("flip", 0):
            return ()
        seeds = min(asked.seeds, LEAST_SEEDS) if asked.early_stop else asked.seeds
        return (_READ, *(f"arm-{number}" for number in range(seeds * asked.n_arms)))

    def run_part(self, ctx: StageContext, inputs: Inputs, part: str) -> None:
        """See `PartedStage.run_part`. Raises as `run` does."""
        run = _opened(ctx, inputs)
        if not isinstance(run, Absent) and part != _READ:
            run.arm(int(part.removeprefix("arm-")), alone=True)

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft | Absent:
        """See `Stage.run`. Raises DatasetRefused, ModelRefused, SpecError, NumericalError, Interrupted."""
        run = _opened(ctx, inputs)
        if isinstance(run, Absent):
            return run
        from safer_engine.payload_files import write_table
        from safer_engine.verification import facts

        seen, tables = run.all(ctx.note)
        import pyarrow as pa

        with ctx.work.publish("arms.arrow") as path:
            write_table(path, pa.concat_tables([table.replace_schema_metadata(None) for table in tables]))
        columns = ["pair_id", "group", "axis", "subset"]
        with ctx.work.publish("measured.arrow") as path:
            write_table(path, run.measured.select(columns))
        return Draft(facts(seen, tables, run))


def _opened(ctx: StageContext, inputs: Inputs) -> Run | Absent:
    """What the arms share, their pairs read; or why there is nothing to train."""
    asked = ctx.spec.verification
    if asked is None or ctx.sources.base is None or ctx.sources.evaluation is None:
        return Absent(NOT_ASKED)
    from safer_engine.base_trainings import BaseTrainings, Watch, training_spec
    from safer_engine.science.outcomes import OutcomeRules
    from safer_engine.verification import Run
    from safer_engine.verification_arms import edited_at, edited_pairs

    pair_set, scores = inputs.get(PairSet), inputs.get(PairScores)
    pairs = edited_pairs(pair_set, scores, inputs.get(Edits))
    if not pairs.edited_axes:
        return Absent(NO_EDITS)
    recipe, lora = ctx.spec.retraining.recipe, ctx.spec.retraining.lora
    training = training_spec(ctx.sources.base.origin, recipe, lora, ctx.spec.dataset, ctx.base_seed, ctx.runtime)
    watch = Watch(lambda done, total, unit: ctx.observer.progress(ctx.stage, done, total, unit), ctx.observer.cancelled)
    bench = BaseTrainings.of(training, ctx.sources.base, ctx.work, watch, "retraining")
    read = bench.read(ctx.sources.dataset)
    pairs = pairs.read_by(read)
    if not pairs.edited_axes:
        return Absent(NOT_READ)
    measured = _evaluation(ctx, bench, pair_set)
    missing = set(pairs.edited_axes) - set(measured["axis"].to_pylist())
    if missing:
        return Absent(f"the evaluation pairs have none of {', '.join(sorted(missing))}, where pairs are edited")
    rules = OutcomeRules(asked.level, planned=asked.seeds, early_stop=asked.early_stop)
    swept = {budget: edited_at(pair_set, scores, ctx.spec.edits, budget).read_by(read) for budget in asked.budgets}
    return Run(bench, {None: pairs, **swept}, pairs.known(read), measured, rules)


def _evaluation(ctx: StageContext, bench: Any, dataset: PairSet) -> Any:
    """The usable evaluation pairs as the base reads them; published once. Raises DatasetRefused where there are none."""
    from safer_engine.errors import DatasetRefused
    from safer_engine.evaluation_pairs import EvaluationInput, read_evaluation

    name, source = "evaluation.arrow", ctx.sources.evaluation
    assert source is not None
    if not (ctx.work.scratch / name).is_file():
        with ctx.work.publish(name, scratch=True) as path:
            pulse = lambda done, total: ctx.progress(done, total, "pairs")  # noqa: E731
            given = EvaluationInput(source, ctx.spec.evaluation, ctx.base_seed, dataset)
            counts, short = read_evaluation(path, given, bench.renderer(), pulse)
        if short:
            ctx.note(f"warning: {short}")
        if not counts["n_kept"]:
            raise DatasetRefused(f"no evaluation pair can be used: {short}", "give pairs whose prompts are not in the dataset")
    return bench.table(name)
