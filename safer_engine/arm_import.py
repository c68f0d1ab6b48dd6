"""Models of a verification that another trainer made: read, evaluated, and judged by the same rules: `verify import`.

Each checkpoint is read as every reward model is (safetensors, no code of its own), scores the evaluation pairs by the pipeline's
own stages, and is kept in the store: the same command computes nothing again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_engine import pipeline
from safer_engine.arm_manifest import ArmManifest
from safer_engine.artifacts import Absent, EvaluationSet
from safer_engine.errors import DatasetRefused, SpecError
from safer_engine.evaluation_pairs import scored_pairs
from safer_engine.events import Observer
from safer_engine.machine import resolve_spec
from safer_engine.pipeline import AuditRequest
from safer_engine.science.arms import ARMS, Arm
from safer_engine.science.evaluation import ScoredPairs
from safer_engine.science.outcomes import OutcomeRules
from safer_engine.sources.datasets import resolve_dataset
from safer_engine.sources.models import resolve_model
from safer_engine.sources.resolved import ResolvedDataset, ResolvedInputs, ResolvedModel
from safer_engine.spec import AuditSpec
from safer_engine.spec_layers import parse_source
from safer_engine.stages.evaluation import EvaluationStage
from safer_engine.stages.pairs import PairsStage
from safer_engine.store import ArtifactStore
from safer_engine.verification_answers import PAIRS, Answers, answer_facts, answers_of, judged_facts, judged_of

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1
NEEDED: tuple[Arm, ...] = ("as given", "edits", "random")
"""Arms without which nothing can be judged. `margin` may be left out."""
_OTHER_PAIRS = "give evaluation pairs of that axis whose prompts are not in the dataset"


@dataclass(frozen=True)
class Checkpoint:
    """A trained model of an arm and a seed."""

    arm: Arm
    seed: int
    path: str


def parse_checkpoint(text: str, manifest: ArmManifest) -> Checkpoint:
    """`ARM:SEED=FOLDER`; hyphens stand for spaces. Raises SpecError where the manifest has no such training."""
    name, separator, path = text.partition("=")
    arm, colon, seed = name.partition(":")
    found = {each.replace(" ", "-"): each for each in ARMS}
    if not (separator and colon and path and seed.isdecimal()):
        raise SpecError(f"cannot read {text!r}", "write ARM:SEED=FOLDER, such as edits:0=models/edits-0")
    known = found.get(arm.replace(" ", "-"))
    if known is None:
        raise SpecError(f"{text!r} names no arm", f"arms are {', '.join(found)}")
    if manifest.run(known, int(seed)) is None:
        raise SpecError(f"the manifest has no seed {seed}", f"seeds are 0 … {max(run.seed for run in manifest.runs)}")
    return Checkpoint(known, int(seed), path)


def import_arms(
    manifest: ArmManifest,
    checkpoints: Sequence[Checkpoint],
    store: ArtifactStore,
    observer: Observer,
    elsewhere: Mapping[str, str] | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate checkpoints and judge them. Neither the audited model nor the base is needed.

    Args:
        manifest: what `verify export-arms` wrote, on this machine or another.
        checkpoints: trained models, whole seeds of them.
        store: keeps what each model says of the evaluation pairs.
        observer: is told of stages.
        elsewhere: `dataset` or `evaluation` → file, folder or folder#split where it lies now, when that is not where it lay.
        device: auto, cpu, cuda or cuda:N: that of this machine, not the one that wrote the arms.

    Returns:
        What verification.json holds: the facts of `Verification` as far as they are known, `trained`: elsewhere, checkpoints with
        their digests, and `left_out`: checkpoints of seeds that lack an arm.

    Raises:
        SpecError: a training is named twice, no seed has all arms that are needed, or the manifest's data are not what they were.
        ModelRefused, DatasetRefused, NumericalError, ResourceError, Interrupted.
    """
    twice = [key for key, n in Counter((each.arm, each.seed) for each in checkpoints).items() if n > 1]
    if twice:
        raise SpecError(f"{twice[0][0]}:{twice[0][1]} is named twice", "give one checkpoint for each arm and seed")
    arms = tuple(arm for arm in ARMS if any(each.arm == arm for each in checkpoints))
    seeds = _whole_seeds(checkpoints, arms)
    spec, data = _opened(manifest, elsewhere or {}, device)
    used = [each for seed in seeds for arm in arms for each in checkpoints if (each.arm, each.seed) == (arm, seed)]
    resolved = [resolve_model(_read_as(spec, each.path).model, spec.runtime, None) for each in used]
    by_digest = Counter(model.digest for model in resolved)
    if max(by_digest.values()) > 1:
        same = [f"{each.arm}:{each.seed}" for each, model in zip(used, resolved, strict=True) if by_digest[model.digest] > 1]
        raise SpecError(f"{', '.join(same)} are one and the same model", "give each training's own folder")
    evaluated = [_evaluated(spec, data, each.path, model, store, observer) for each, model in zip(used, resolved, strict=True)]
    answers = _answers(evaluated, used, arms)
    edited = manifest.edited_axes
    if missing := sorted(set(edited) - set(answers[PAIRS].axes)):
        raise DatasetRefused(f"no model can be compared on {', '.join(missing)}, where pairs are edited", _OTHER_PAIRS)
    asked = spec.verification
    assert asked is not None
    planned = max(asked.seeds, len(seeds))
    judged = judged_of(answers[PAIRS], edited, OutcomeRules(asked.level, planned=planned, early_stop=asked.early_stop))
    by_arm = {data.file: data for data in manifest.data}
    edits = next(by_arm[run.data] for run in manifest.runs if run.arm == "edits")
    pairs = {arm: next(by_arm[run.data].pairs for run in manifest.runs if run.arm == arm) for arm in arms}
    return {
        "verification_version": VERSION,
        "trained": "elsewhere",
        **judged_facts(judged),
        **answer_facts(answers),
        "seeds": len(seeds),
        "planned": planned,
        "edited_axes": list(edited),
        "edits": {"drop": edits.dropped, "flip": edits.flipped},
        "pairs": pairs,
        "steps": manifest.steps,
        "n_evaluated": len(answers[PAIRS].axes_N),
        "checkpoints": [
            {"arm": each.arm, "seed": each.seed, "digest": model.digest, "pairs": pairs[each.arm]}
            for each, model in zip(used, resolved, strict=True)
        ],
        "left_out": [f"{each.arm}:{each.seed}" for each in checkpoints if each not in used],
        "digests": manifest.digests,
    }


def _whole_seeds(checkpoints: Sequence[Checkpoint], arms: tuple[Arm, ...]) -> list[int]:
    """Seeds that have every arm that any seed has. Raises SpecError where there is none, or an arm is missing."""
    missing = [arm for arm in NEEDED if arm not in arms]
    if missing:
        raise SpecError(f"no checkpoint of arm {missing[0]!r} is given", f"a verification needs {', '.join(NEEDED)}")
    there = {(each.arm, each.seed) for each in checkpoints}
    seeds = sorted(seed for seed in {each.seed for each in checkpoints} if all((arm, seed) in there for arm in arms))
    if not seeds:
        raise SpecError("no seed has all arms", f"give {', '.join(arms)} of one seed at least")
    return seeds


def _opened(manifest: ArmManifest, elsewhere: Mapping[str, str], device: str) -> tuple[AuditSpec, dict[str, ResolvedDataset]]:
    """The spec for this machine, and the manifest's data as they were. Raises SpecError where they changed, DatasetRefused."""
    document = manifest.spec.model_dump(mode="json")
    document["runtime"]["device"] = device
    for name, where in elsewhere.items():
        document[name]["source"] = parse_source(where)
    spec = resolve_spec(AuditSpec.model_validate(document))
    assert spec.evaluation is not None
    data = {"dataset": resolve_dataset(spec.dataset), "evaluation": resolve_dataset(spec.evaluation)}
    for name, found in data.items():
        if found.digest != manifest.digests[name]:
            raise SpecError(
                f"the {name} is not what it was when the arms were written",
                "name where it lies with --dataset or --eval-dataset, restore it, or export the arms again",
            )
    return spec, data


def _read_as(spec: AuditSpec, path: str) -> AuditSpec:
    """An audit of a checkpoint, which reads as long texts as it was trained on."""
    assert spec.retraining is not None
    recipe = spec.retraining.recipe
    shape = {"path": path, "adapter": None, "max_length": recipe.max_length, "truncation_side": recipe.truncation_side}
    return spec.model_copy(update={"model": spec.model.model_copy(update=shape)})


def _evaluated(
    spec: AuditSpec, data: dict[str, ResolvedDataset], path: str, model: ResolvedModel, store: ArtifactStore, observer: Observer
) -> EvaluationSet:
    own = AuditRequest(_read_as(spec, path), ResolvedInputs(model, data["dataset"], data["evaluation"]))
    found = pipeline.run(own, store, observer, stages=(PairsStage(), EvaluationStage()))[EvaluationSet]
    if isinstance(found, Absent):
        raise DatasetRefused(f"{Path(path).name}: {found.reason}", _OTHER_PAIRS)
    assert isinstance(found, EvaluationSet)
    return found


def _answers(evaluated: Sequence[EvaluationSet], used: Sequence[Checkpoint], arms: tuple[Arm, ...]) -> dict[str, Answers]:
    """What the models say of the pairs that each of them can read, seed by seed, by unit (see `answers_of`)."""
    names = sorted(set.intersection(*(set(each.pairs["pair_id"].to_pylist()) for each in evaluated)))
    if not names:
        raise DatasetRefused("no evaluation pair can be read by all models", "give models of one chat template and length")
    scored: dict[Arm, list[ScoredPairs]] = {arm: [] for arm in arms}
    read = _rows(evaluated[0].pairs, names)
    for each, one in zip(used, evaluated, strict=True):
        rewards = _rows(one.rewards, names)
        scored[each.arm].append(scored_pairs(read, *(rewards[f"reward_{side}"].to_numpy() for side in ("chosen", "rejected"))))
    return answers_of(scored)


def _rows(table: pa.Table, names: Sequence[str]) -> pa.Table:
    place = {name: at for at, name in enumerate(table["pair_id"].to_pylist())}
    return table.take([place[name] for name in names])
