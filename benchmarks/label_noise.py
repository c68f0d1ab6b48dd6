"""Which score finds flipped labels? METHOD's benchmark: flip whole groups, train, audit, rank, compare.

python -m benchmarks.label_noise --data preferences.train.jsonl.gz --base MODEL --out DIR --seeds 0,1,2
python -m benchmarks.label_noise … --unseen preferences.eval.jsonl.gz    (pairs whose labels the models were not trained on)
python -m benchmarks.label_noise --out DIR --table

Each step of a seed is skipped when its output is there: flipped data, trained reward model, audit store, scores. Killed at
any moment, the same command goes on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.flip_groups import (
    file_scores,
    flip_groups,
    length_scores,
    read_rows,
    truth_document,
    word_scores,
    write_rows,
)
from benchmarks.label_noise_rows import contradictions, label_bits, reliabilities, row_doubts
from benchmarks.label_noise_table import AXIS, keep, markdown_table
from safer_engine.errors import ArtifactError, SpecError
from safer_engine.events import Observer
from safer_engine.store import digest_file
from safer_engine.train_spec import TrainSpec

if TYPE_CHECKING:
    from safer_engine.api import AuditReport


_UNSEEN = "unseen-"


@dataclass(frozen=True)
class Cell:
    """One (target, share, seed) of the benchmark and its folder; `trained`: the model is that of another cell."""

    out: Path
    target: str
    share: float
    seed: int
    trained: Path | None = None

    @property
    def folder(self) -> Path:
        return self.out / f"{self.target}-{self.share:g}" / f"seed-{self.seed}"

    @property
    def data(self) -> Path:
        return self.folder / "flipped.jsonl.gz"

    @property
    def truth(self) -> Path:
        return self.folder / "truth.json"

    @property
    def model(self) -> Path:
        return self.trained or self.folder / "rm"

    def unseen(self) -> Cell:
        """The same model on other data, none of whose labels it was trained on."""
        return Cell(self.out, f"{_UNSEEN}{self.target}", self.share, self.seed, self.model)

    @property
    def scores(self) -> Path:
        return self.folder / "scores.parquet"

    @property
    def retrained(self) -> Path:
        """Margins of the models retrained on halves: pair_id, fold, margin."""
        return self.folder / "retrained.npz"

    @property
    def facts(self) -> Path:
        return self.folder / "facts.json"


@dataclass(frozen=True)
class Setup:
    """What all cells share. `audit`: sections of the audit spec that differ from the defaults."""

    data: Path
    base: Path
    evaluation: Path | None
    max_length: int
    epochs: int
    lr: float | None
    dtype: str
    device: str
    audit: dict[str, Any]
    retrain: bool
    unseen: Path | None = None
    margins: Path | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """How the reward models are trained."""
        return {"epochs": self.epochs, "max_length": self.max_length, "lr": self.lr, "dtype": self.dtype}


class LogObserver:
    """Writes progress as lines."""

    def __init__(self, name: str, every_seconds: float = 60.0) -> None:
        self.name, self.every, self.last = name, every_seconds, 0.0

    def stage_started(self, stage: str, key: str) -> None:
        self._say(f"{stage} started ({key[:8]})")

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        if time.monotonic() - self.last > self.every:
            self.last = time.monotonic()
            self._say(f"{stage} {done:g} of {total:g} {unit}")

    def stage_finished(self, stage: str, outcome: str, seconds: float) -> None:
        self._say(f"{stage} {outcome} in {seconds:.0f} s")

    def note(self, stage: str, message: str) -> None:
        self._say(f"{stage}: {message}")

    def cancelled(self) -> bool:
        return False

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {self.name} {text}", flush=True)


def flip(cell: Cell, setup: Setup) -> None:
    """Write the cell's flipped data and its truth."""
    if cell.truth.is_file():
        return
    rows = read_rows(setup.data)
    target = cell.target.removeprefix(_UNSEEN)
    if target == "margin":
        if setup.margins is None:
            raise click.UsageError("--target margin needs --margins: those of a reward model that learnt the labels as they are")
        chosen: dict[str, float] | None = file_scores(setup.margins)
    else:
        score = {"uniform": None, "length": length_scores, "words": word_scores}[target]
        chosen = score(rows) if score else None
    flipped = flip_groups(rows, cell.share, cell.seed, "safety", chosen)
    write_rows(cell.data, flipped.rows)
    write_json(cell.truth, truth_document(flipped, cell.seed, cell.target, cell.share))


def train(cell: Cell, setup: Setup, observer: Observer) -> dict[str, Any]:
    """Train the cell's reward model, or read the record of the one there."""
    from safer_engine.training import RECORD, train_reward_model

    path = cell.model / RECORD
    if not path.is_file():
        return train_reward_model(train_spec(cell, setup), cell.model, observer).record
    record: dict[str, Any] = json.loads(path.read_bytes())
    wanted = (cell.seed, setup.recipe, digest_file(cell.data))
    recipe = {name: record["spec"]["recipe"][name] for name in setup.recipe}
    found = (record["spec"]["seed"], recipe, _content(record, cell))
    if found != wanted:
        raise SpecError(f"{cell.model} was trained with {found}, not {wanted}", "remove it, or choose another --out")
    return record


def _content(record: dict[str, Any], cell: Cell) -> str | None:
    """Digest of the cell's data if the model was trained on it."""
    from safer_engine.sources.datasets import resolve_dataset

    now = resolve_dataset(TrainSpec.model_validate(record["spec"]).dataset).digest
    return digest_file(cell.data) if record["dataset"]["digest"] == now else None


def train_spec(cell: Cell, setup: Setup) -> TrainSpec:
    document: dict[str, Any] = {
        "seed": cell.seed,
        "base": str(setup.base),
        "dataset": {"source": {"kind": "local", "path": str(cell.data)}},
        "recipe": setup.recipe,
    }
    if setup.evaluation is not None:
        document["evaluation"] = {"source": {"kind": "local", "path": str(setup.evaluation)}}
    document["runtime"] = {"device": setup.device, "batch_tokens": 4096, "checkpoint_seconds": 120}
    return TrainSpec.model_validate(document)


def audit(cell: Cell, setup: Setup, observer: Observer) -> AuditReport:
    """Audit the cell's model on the data it was trained on."""
    from safer_engine import api

    return api.audit(audit_document(cell, setup, {}), store=cell.folder / "store", out=cell.folder / "audit", observer=observer)


def audit_document(cell: Cell, setup: Setup, more: dict[str, Any]) -> dict[str, Any]:
    document = {"seed": cell.seed, "runtime": {"device": setup.device}, **setup.audit, **more}
    document["model"] = {"path": str(cell.model), "max_length": setup.max_length}
    document["dataset"] = {"source": {"kind": "local", "path": str(cell.data)}}
    return document


def retrain(cell: Cell, setup: Setup, observer: Observer) -> None:
    """Train on halves of the cell's data and write the margins of what each left out."""
    import numpy as np

    from safer_engine import api
    from safer_engine.artifacts import RetrainedMargins

    document = audit_document(cell, setup, {"retraining": {"base": str(setup.base), "folds": 2, "recipe": setup.recipe}})
    report = api.audit(document, store=cell.folder / "store", out=cell.folder / "audit", observer=observer)
    found = report.artifacts[RetrainedMargins]
    if not isinstance(found, RetrainedMargins):
        raise ArtifactError(f"the models of {cell.folder} were not retrained", "run the benchmark again")
    temporary = cell.folder / f".retrained.{os.getpid()}.npz"
    columns = {name: found.margins[name].to_numpy(zero_copy_only=False) for name in ("pair_id", "fold", "margin")}
    np.savez(temporary, **{**columns, "pair_id": columns["pair_id"].astype(str)})
    os.replace(temporary, cell.retrained)


def retrained_margins(cell: Cell, pair_ids: Sequence[str]) -> Any:
    """Margins of the retrained models as the signal reads them, [P]; None where there are none."""
    import numpy as np

    from safer_engine.signal_inputs import by_fold_scale

    if not cell.retrained.is_file():
        return None
    with np.load(cell.retrained, allow_pickle=False) as stored:
        place = {name: at for at, name in enumerate(stored["pair_id"].tolist())}
        at_P = np.asarray([place[name] for name in pair_ids])
        return by_fold_scale(stored["margin"][at_P], stored["fold"][at_P])


def score(cell: Cell, report: AuditReport, record: dict[str, Any]) -> None:
    """Write every row's doubt of every pair beside the truth, and facts about reward model and SAE."""
    import numpy as np
    import pandas as pd

    from safer_engine.artifacts import Absent, Activations, Artifact, Labels, Latents, PairSet, SparseAutoencoder
    from safer_engine.signal_inputs import signal_inputs

    found = report.artifacts
    pairs, activations = found[PairSet], found[Activations]
    latents, labels, sae = found[Latents], found[Labels], found[SparseAutoencoder]
    if not isinstance(pairs, PairSet) or not isinstance(activations, Activations) or not isinstance(sae, Artifact):
        raise ArtifactError(f"the audit of {cell.folder} is incomplete", "run the benchmark again")
    assert isinstance(latents, (Latents, Absent))
    assert isinstance(labels, (Labels, Absent))
    inputs = signal_inputs(pairs, activations, latents, labels, signals=("probe_cv", "dense"))
    table = pairs.pairs
    inputs = replace(inputs, retrained_P=retrained_margins(cell, table["pair_id"].to_pylist()))
    truth = set(json.loads(cell.truth.read_bytes())["flipped"])
    columns = {name: table[name].to_pylist() for name in ("pair_id", "group", "axis", "subset")}
    doubts = row_doubts(inputs, columns["pair_id"], cell.seed)
    doubts["string match"] = contradictions(*(table[name].to_pylist() for name in ("prompt", "chosen", "rejected")))
    flipped_P = np.asarray([name in truth for name in columns["pair_id"]])
    frame = pd.DataFrame({**columns, "flipped": flipped_P, **doubts})
    temporary = cell.scores.with_name(f".{cell.scores.name}.{os.getpid()}")
    frame.to_parquet(temporary)
    os.replace(temporary, cell.scores)
    slices = (record["evaluation"] or {"slices": []})["slices"]
    accuracy = {f"{one['axis']}/{one['subset']}": one["accuracy"]["estimate"] for one in slices if one["subset"]}
    facts = {"accuracy": accuracy, "training_seconds": record["timing"]["training_seconds"], "sae": sae.meta}
    facts["label_bits"] = label_bits(inputs, doubts, AXIS, cell.seed)
    facts["probabilities"] = reliabilities(inputs, doubts, AXIS, flipped_P, cell.seed)
    write_json(cell.facts, facts)


def run_cell(cell: Cell, setup: Setup, again: bool) -> None:
    """All steps of a cell; `again` scores anew from the stored audit."""
    observer = LogObserver(f"{cell.target} {cell.share:g} seed {cell.seed}")
    flip(cell, setup)
    record = train(cell, setup, observer)
    observer.note("train", f"{record['timing']['training_seconds']:.0f} s")
    if setup.unseen is not None:
        other, elsewhere = cell.unseen(), replace(setup, data=setup.unseen)
        flip(other, elsewhere)
        if again or not other.scores.is_file():
            score(other, audit(other, elsewhere, observer), record)
        return
    if setup.retrain and not cell.retrained.is_file():
        retrain(cell, setup, observer)
    if again or not cell.scores.is_file():
        score(cell, audit(cell, setup, observer), record)
        observer.note("score", str(cell.scores))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of all cells.")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Preference pairs, JSONL with id, group, axis.")
@click.option("--base", type=click.Path(path_type=Path, exists=True), help="Base model of the reward models.")
@click.option("--eval-data", type=click.Path(path_type=Path, exists=True), help="Pairs that only measure the reward models.")
@click.option(
    "--unseen", type=click.Path(path_type=Path, exists=True), help="Flip, audit and rank these pairs with the cell's model."
)
@click.option("--seeds", default="0", show_default=True, help="Comma-separated; each decides flips, training and audit.")
@click.option("--target", type=click.Choice(["uniform", "margin", "length", "words"]), default="uniform", show_default=True)
@click.option(
    "--margins",
    type=click.Path(path_type=Path, exists=True),
    help="For --target margin: pair_id and margin, JSONL, such as an audit's edits.jsonl.",
)
@click.option("--share", type=float, default=0.1, show_default=True, help="Share of the safety groups that is flipped.")
@click.option("--max-length", default=128, show_default=True)
@click.option("--epochs", default=2, show_default=True)
@click.option("--lr", type=float, help="Learning rate; default that of train-rm.")
@click.option("--dtype", default="auto", show_default=True, help="Precision of the trainings, as of train-rm.")
@click.option("--device", default="auto", show_default=True)
@click.option("--audit", "audit_json", default="{}", help='Audit spec sections as JSON, e.g. {"sae": {"kind": "batch_topk"}}.')
@click.option("--train-only", is_flag=True, help="Stop after the reward models.")
@click.option("--retrain/--no-retrain", default=True, show_default=True, help="Two more trainings, on halves: the comparator.")
@click.option("--rescore", is_flag=True, help="Compute the scores anew, from the stored audits.")
@click.option("--keep", type=click.Path(path_type=Path), help="Copy what the table is made of here, small and without texts.")
@click.option("--table", "only_table", is_flag=True, help="Only print the table of what is there.")
def main(**flags: Any) -> None:
    """Run cells of the benchmark and print the table."""
    out: Path = flags["out"]
    if not flags["only_table"]:
        if flags["data"] is None or flags["base"] is None:
            raise click.UsageError("--data and --base are needed to run cells")
        names = ("data", "base", "max_length", "epochs", "lr", "dtype", "device", "retrain", "unseen", "margins")
        setup = Setup(
            evaluation=flags["eval_data"], audit=json.loads(flags["audit_json"]), **{name: flags[name] for name in names}
        )
        for seed in (int(text) for text in flags["seeds"].split(",")):
            cell = Cell(out, flags["target"], flags["share"], seed)
            if flags["train_only"]:
                flip(cell, setup)
                train(cell, setup, LogObserver(f"seed {seed}"))
            else:
                run_cell(cell, setup, flags["rescore"])
    if flags["keep"] is not None:
        keep(out, flags["keep"])
    if not flags["train_only"]:
        click.echo(markdown_table(out))


if __name__ == "__main__":
    main()
