"""One arm of a drill: train on its data, audit the model, keep what it says; all else is removed unless it is to be kept.

An arm is finished when its record is there. Before that the training goes on from its checkpoint, and the audit from its store.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from safer_engine.drill_spec import DrillSpec
from safer_engine.errors import ArtifactError, DatasetRefused
from safer_engine.events import NullObserver, Observer
from safer_engine.publishing import publishing
from safer_engine.report.nodes import Count, Node
from safer_engine.science.poison import Poisonable, Rule, poisoned_rows
from safer_engine.science.poison_mark import MARK, SIGN, mark_text
from safer_engine.sources.resolved import ResolvedDataset
from safer_engine.spec import DatasetSpec, LocalSource

if TYPE_CHECKING:
    from safer_engine.api import AuditReport
    from safer_engine.science.pair_formats import Layout

STAGE = "drill"
_VERSION = 1
_AUDIT_STAGES = 14
RECORD = "record.json"
POISON = f"poisoned.{SIGN}.jsonl.gz"


class Scored(Node):
    """The pairs that a model was trained on, column by column, as its audit sees them; NaN is null."""

    pair_id: list[str]
    row: list[Count]
    group: list[str]
    axis: list[str]
    both_orders: list[bool]
    longer_by: list[int]
    margin: list[float]
    pair_score: list[float | None]
    suspicion: list[float | None]
    suspicious: list[bool]
    edited: list[bool]


class Measured(Node):
    """The evaluation pairs, column by column; `right`: the chosen response has the higher reward."""

    pair_id: list[str]
    group: list[str]
    axis: list[str]
    subset: list[str]
    right: list[bool]


class ArmRecord(Node):
    """All that is kept of an arm. `rule` and `budget` are null for a clean arm; `flipped`: ids of the pairs turned round."""

    version: int = _VERSION
    key: str
    rule: Rule | None
    budget: float | None
    seed: Count
    steps: Count
    flipped: list[str]
    pairs: Scored
    measured: Measured


@dataclass(frozen=True)
class Arm:
    """One training and audit. `rule` None: on the data as given."""

    seed: int
    rule: Rule | None = None
    budget: float | None = None

    @property
    def name(self) -> str:
        """For people and folders."""
        return f"{self.place}/seed-{self.seed}"

    @property
    def place(self) -> str:
        """Folder of all seeds."""
        return "clean" if self.rule is None else f"{self.rule}-{self.budget:g}"


@dataclass(frozen=True)
class Bench:
    """What all arms share: the drill's spec, its key, its folder and its clean data."""

    spec: DrillSpec
    key: str
    work: Path
    dataset: ResolvedDataset

    def record(self, arm: Arm) -> ArmRecord | None:
        """What a finished arm said; None for one that is not finished. Raises ArtifactError for a file that is no record."""
        path = self.work / arm.name / RECORD
        if not path.is_file():
            return None
        try:
            found = ArmRecord.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ArtifactError(f"{path} is not the record of an arm", "remove it, and run the same command again") from error
        if found.key != self.key:
            raise ArtifactError(f"{path} is of another drill", "choose another --out, or remove that folder")
        return found

    def run(self, arm: Arm, observer: Observer) -> ArmRecord:
        """Train and audit an arm, or read its record.

        Raises:
            InputRefused, SpecError, NumericalError, ResourceError: see training and audit. Interrupted: the same call goes on.
        """
        if (found := self.record(arm)) is not None:
            if not self.spec.keep_poison:
                _remove(self.work / arm.name)  # a kill may have come between the record and this
            return found
        folder = self.work / arm.name
        folder.mkdir(parents=True, exist_ok=True)
        data, flipped = (self.spec.dataset, ()) if arm.rule is None else self._poisoned(arm, folder)
        steps = self._train(arm, data, folder / _model_name(arm), observer)
        record = _read_audit(arm, self.key, steps, flipped, self._audit(arm, data, folder, observer))
        if arm.rule is not None:
            self._check_same(arm, record)
        with publishing(folder / RECORD) as path:
            path.write_text(record.model_dump_json(), encoding="utf-8")
        if not self.spec.keep_poison:
            _remove(folder)
        return record

    def _poisoned(self, arm: Arm, folder: Path) -> tuple[DatasetSpec, tuple[str, ...]]:
        """Write an arm's data, unless they are there, and say how they are read."""
        clean = self.record(Arm(arm.seed))
        assert clean is not None
        assert arm.rule is not None
        assert arm.budget is not None
        layout = _layout(self.dataset, self.spec.dataset)
        picked_P = self._poisonable(clean.pairs, layout).choose(
            arm.rule, arm.budget, self.spec.axis, self.spec.unit, arm.seed
        )  # fmt: skip
        at = np.flatnonzero(picked_P).tolist()
        flipped = tuple(clean.pairs.pair_id[place] for place in at)
        if not (folder / POISON).is_file():
            ids = dict(zip(clean.pairs.row, clean.pairs.pair_id, strict=True))
            rows = frozenset(clean.pairs.row[place] for place in at)
            _write(folder, poisoned_rows(self.dataset.rows(), layout, rows, ids, arm.rule, arm.budget), arm, flipped)
        source = LocalSource(path=str(folder / POISON))
        read = {"source": source, "format": layout.name, "allow_poisoned": True}
        return self.spec.dataset.model_copy(update=read), flipped

    def _poisonable(self, pairs: Scored, layout: Layout) -> Poisonable:
        from safer_engine.science.pair_formats import read_pairs

        n_pairs = Counter(pair.row for pair in read_pairs(self.dataset.rows(), layout))
        may = [n_pairs[row] == 1 and not both for row, both in zip(pairs.row, pairs.both_orders, strict=True)]
        return Poisonable(
            tuple(pairs.pair_id), np.asarray(pairs.group), np.asarray(pairs.axis), np.asarray(may),
            floats(pairs.pair_score), floats(pairs.margin), floats(pairs.longer_by),
        )  # fmt: skip

    def _train(self, arm: Arm, data: DatasetSpec, target: Path, observer: Observer) -> int:
        from safer_engine.base_trainings import training_spec
        from safer_engine.training import train_reward_model

        spec = self.spec
        training = training_spec(spec.base, spec.recipe, spec.lora, data, arm.seed, spec.runtime)
        return len(train_reward_model(training, target, observer).record["curve"])

    def _audit(self, arm: Arm, data: DatasetSpec, folder: Path, observer: Observer) -> AuditReport:
        from safer_engine import api

        recipe = self.spec.recipe
        reading = {"max_length": recipe.max_length, "truncation_side": recipe.truncation_side}
        document = {
            **self.spec.audit,
            "seed": arm.seed,
            "model": {"path": str(folder / _model_name(arm)), **reading},
            "dataset": data.model_dump(mode="json"),
            "evaluation": self.spec.evaluation.model_dump(mode="json"),
            "runtime": self.spec.runtime.model_dump(mode="json"),
        }
        return api.audit(document, store=folder / "store", observer=observer)

    def _check_same(self, arm: Arm, record: ArmRecord) -> None:
        """Arms differ in the direction of the flipped pairs, and in nothing else. Raises ArtifactError."""
        clean = self.record(Arm(arm.seed))
        assert clean is not None
        same = clean.pairs.pair_id == record.pairs.pair_id and clean.measured.pair_id == record.measured.pair_id
        if not same or clean.steps != record.steps:
            raise ArtifactError(f"the pairs of arm {arm.name} are not those of the clean arm", "give the rows ids of their own")


class ArmObserver(NullObserver):
    """Turns the course of a training and an audit into the share of arms that are finished."""

    def __init__(self, observer: Observer, arm: Arm, done: int, total: int) -> None:
        self._observer, self._arm, self._done, self._total = observer, arm, done, total
        self._stages = 0

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        """A training is counted as half of its arm."""
        if stage == "train" and unit == "steps" and total:
            self._tell(0.5 * done / total)

    def stage_finished(self, stage: str, outcome: str, seconds: float) -> None:
        """The stages of the audit are the other half."""
        self._stages += 1
        self._tell(0.5 + 0.5 * min(1.0, self._stages / _AUDIT_STAGES))

    def note(self, stage: str, message: str) -> None:
        """Only warnings are passed on: there are many arms."""
        if message.startswith("warning"):
            self._observer.note(STAGE, f"{self._arm.name}: {message}")

    def cancelled(self) -> bool:
        """As the one who watches the drill says."""
        return self._observer.cancelled()

    def _tell(self, share: float) -> None:
        self._observer.progress(STAGE, self._done + share, self._total, "arms")


def floats(values: Iterable[float | None]) -> NDArray[np.float64]:
    """Numbers with NaN for None."""
    return np.asarray([np.nan if value is None else value for value in values], dtype=np.float64)


def _model_name(arm: Arm) -> str:
    return "rm" if arm.rule is None else f"rm.{SIGN}"


def _layout(dataset: ResolvedDataset, spec: DatasetSpec) -> Layout:
    import itertools

    from safer_engine.science.pair_formats import SAMPLE_ROWS, recognise

    first = list(itertools.islice(dataset.rows(), SAMPLE_ROWS))
    return recognise(first, spec.format, spec.columns, spec.label, spec.winners)


def _write(folder: Path, rows: Iterable[dict[str, Any]], arm: Arm, flipped: tuple[str, ...]) -> None:
    """Poisoned rows as gzipped JSONL, and beside them what they are. Raises DatasetRefused, ResourceError."""
    assert arm.rule is not None
    assert arm.budget is not None
    about = {MARK: mark_text(arm.rule, arm.budget, flipped=True), "rule": arm.rule, "budget": arm.budget, "seed": arm.seed}
    with publishing(folder / POISON.replace(".jsonl.gz", ".about.json")) as path:
        path.write_text(json.dumps({**about, "flipped": list(flipped)}, indent=1), encoding="utf-8")
    name = POISON.removesuffix(".gz")
    with (
        publishing(folder / POISON) as path,
        path.open("wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename=name) as handle,
    ):
        for row in rows:
            handle.write((json.dumps(row, ensure_ascii=False, default=str) + "\n").encode())


def _read_audit(arm: Arm, key: str, steps: int, flipped: tuple[str, ...], report: AuditReport) -> ArmRecord:
    """What an arm's audit says of its pairs and of the evaluation pairs. Raises ArtifactError, DatasetRefused."""
    from safer_engine.artifacts import Edits, EvaluationSet, PairScores, PairSet
    from safer_engine.pair_tables import longer_by
    from safer_engine.science.arms import KEEP
    from safer_engine.verification_arms import edited_pairs

    pairs, scores, edits, apart = (report.artifacts.get(kind) for kind in (PairSet, PairScores, Edits, EvaluationSet))
    if not isinstance(apart, EvaluationSet):
        raise DatasetRefused("no evaluation pair can be used, so no harm can be measured", "give pairs of other prompts")
    if not isinstance(pairs, PairSet) or not isinstance(scores, PairScores) or not isinstance(edits, Edits):
        raise ArtifactError(f"the audit of arm {arm.name} is incomplete", "run the same command again")
    table, found = pairs.pairs, scores.scores
    if table["pair_id"].to_pylist() != found["pair_id"].to_pylist():
        raise ArtifactError(f"the audit of arm {arm.name} has scores of other pairs", "run the same command again")
    scored = Scored(
        **{name: table[name].to_pylist() for name in ("pair_id", "row", "group", "axis", "both_orders")},
        longer_by=longer_by(table).tolist(),
        margin=found["reward_margin"].to_pylist(),
        **{name: _nulls(found[name].to_pylist()) for name in ("pair_score", "suspicion")},
        suspicious=[status == "suspicious" for status in found["status"].to_pylist()],
        edited=(edited_pairs(pairs, scores, edits).edits_P != KEEP).tolist(),
    )
    rewards = {row["pair_id"]: row["reward_chosen"] > row["reward_rejected"] for row in apart.rewards.to_pylist()}
    columns = {name: apart.pairs[name].to_pylist() for name in ("pair_id", "group", "axis", "subset")}
    measured = Measured(**columns, right=[rewards[name] for name in columns["pair_id"]])
    return ArmRecord(
        key=key,
        rule=arm.rule,
        budget=arm.budget,
        seed=arm.seed,
        steps=steps,
        flipped=list(flipped),
        pairs=scored,
        measured=measured,
    )


def _nulls(values: list[float | None]) -> list[float | None]:
    return [None if value is None or not np.isfinite(value) else value for value in values]


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != RECORD:
            path.unlink()
