"""The arms of a verification as datasets, for a trainer other than ours: `verify export-arms`.

Each arm holds the very pairs that `verify` would train it on: those of the audit that the base can read, dropped ones left out,
flipped ones the other way round. What is in a file depends on the audit and the seed alone.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from safer_engine.arm_manifest import MANIFEST, ArmData, ArmManifest, ArmRun
from safer_engine.artifacts import Edits, PairScores, PairSet
from safer_engine.base_trainings import BaseTrainings, Watch, training_spec
from safer_engine.errors import DatasetRefused, Interrupted, SpecError
from safer_engine.events import Observer
from safer_engine.finished import finished
from safer_engine.model_training import optim_settings
from safer_engine.pipeline import AuditRequest
from safer_engine.planning import model_size
from safer_engine.publishing import require_writable
from safer_engine.science.arms import ARMS, DROP, FLIP, Arm
from safer_engine.stage import stage_seed
from safer_engine.store import ArtifactStore, LocalArtifactStore, digest_file
from safer_engine.verification_arms import EditedPairs, edited_pairs

if TYPE_CHECKING:
    import pyarrow as pa

    from safer_engine.science.rm_training import OptimSettings

STEP = "export-arms"
SCRIPTS = ("train_trl.py", "train_plain.py")
RUNS, MODELS, OPENRLHF = "runs", "models", "train_openrlhf.sh"
_LARGEST_SEED = 2**31 - 1
_PAIRS_AT_ONCE = 4
_OTHER_BASE = "raise retraining.recipe.max_length, or name another base"
Row = dict[str, Any]


@dataclass(frozen=True)
class _Writing:
    """A file of an arm while it is written."""

    name: str
    arm: Arm
    codes: dict[str, int]
    file: IO[str]


def export_arms(request: AuditRequest, store: ArtifactStore, out: Path, observer: Observer) -> ArmManifest:
    """Write the arms, how to train them, and the manifest, into a new folder.

    Args:
        request: an audit with sections `retraining` and `verification`; the audit itself lies in `store`.

    Raises:
        SpecError: the audit is not in the store, edits nothing, or `out` is taken. ModelRefused, DatasetRefused, Interrupted.
    """
    spec = request.spec
    if spec.verification is None or spec.retraining is None or request.sources.base is None:
        raise SpecError("nothing says what the arms are trained from", "give --base")
    if spec.dataset.allow_poisoned:
        raise SpecError(
            "poisoned data are not written for another trainer: their marks would be lost", "leave out allow_poisoned"
        )
    if spec.verification.budgets:
        raise SpecError("a sweep of budgets is not written for another trainer", "leave out verification.budgets")
    if out.exists():
        raise SpecError(f"{out} exists", "name a folder that does not")
    require_writable(out.parent, "the folder for the arms")
    found = finished(request, store, (PairSet, PairScores, Edits))
    pairs = edited_pairs(found[PairSet], found[PairScores], found[Edits])
    if not pairs.edited_axes:
        raise SpecError("the audit recommends no drop and no flip", "there are no edits to verify")
    _require_measured(request, pairs, found[PairSet])
    observer.stage_started(STEP, "")
    recipe, lora = spec.retraining.recipe, spec.retraining.lora
    training = training_spec(request.sources.base.origin, recipe, lora, spec.dataset, spec.seed, spec.runtime)
    watch = Watch(lambda done, total, unit: observer.progress(STEP, done, total, unit), observer.cancelled)
    with TemporaryDirectory(prefix="safer-arms-", dir=out.parent) as temporary:
        folder, scratch = Path(temporary) / "arms", LocalArtifactStore(Path(temporary) / "work")
        folder.mkdir()
        with scratch.open_work(STEP, "0" * 64) as work:
            bench = BaseTrainings.of(training, request.sources.base, work, watch, "retraining")
            table = bench.read(request.sources.dataset)
            read, pairs = pairs.known(table), pairs.read_by(table)
            if not pairs.edited_axes:
                raise DatasetRefused("the base cannot read any pair that is to be dropped or flipped", _OTHER_BASE)
            if observer.cancelled():
                raise Interrupted("stopped on request", "run the same command again")
            manifest = _write_all(request, folder, pairs, read, found[Edits], chat=bool(bench.ready.tokenizer.chat_template))
        size = model_size(request.sources.base.path)
        settings = optim_settings(training, size.parameters if size else 0, "cuda")  # precision as on the GPU of a trainer
        base = request.sources.base.origin
        base = str(Path(base).expanduser().resolve()) if Path(base).expanduser().exists() else base
        _write_how(folder, manifest, base, settings, recipe.max_length, recipe.truncation_side)
        shutil.move(folder, out)
    observer.stage_finished(STEP, "computed", 0.0)
    return manifest


def _require_measured(request: AuditRequest, pairs: EditedPairs, dataset: PairSet) -> None:
    """Refuse evaluation pairs that cannot judge the edits, before anybody trains. Raises DatasetRefused."""
    from safer_engine.evaluation_pairs import survey_evaluation

    spec, source = request.spec, request.sources.evaluation
    assert spec.evaluation is not None
    assert source is not None
    surveyed = survey_evaluation(source, spec.evaluation, spec.seed, dataset.prompt_keys)
    there = {entry.axis for entry in surveyed.entries if entry.reason is None}
    if missing := sorted(set(pairs.edited_axes) - there):
        raise DatasetRefused(
            f"the evaluation pairs have none of {', '.join(missing)}, where pairs are edited",
            "give evaluation pairs of that axis whose prompts are not in the dataset",
        )


def _write_all(
    request: AuditRequest, folder: Path, pairs: EditedPairs, read: pa.Table, edits: Edits, *, chat: bool
) -> ArmManifest:
    spec = request.spec
    assert spec.verification is not None
    assert spec.retraining is not None
    seeds = range(spec.verification.seeds)
    own = [stage_seed(spec.seed, "verification", f"seed {seed}") for seed in seeds]
    files: list[tuple[str, Arm, NDArray[np.int8]]] = []
    for arm in ARMS:
        for seed in seeds if arm == "random" else seeds[:1]:
            name = f"{_slug(arm)}-{seed}.jsonl" if arm == "random" else f"{_slug(arm)}.jsonl"
            files.append((name, arm, pairs.of(arm, own[seed])))
    rows = _conversations(request, read) if chat else _texts(read)
    with ExitStack() as stack:
        writing = [
            _Writing(
                name, arm, dict(zip(pairs.pair_ids, codes.tolist(), strict=True)),
                stack.enter_context((folder / name).open("w", encoding="utf-8")),
            )
            for name, arm, codes in files
        ]  # fmt: skip
        counts = _write_rows(rows, writing)
    data = tuple(ArmData(file=one.name, digest=digest_file(folder / one.name), **counts[one.name]) for one in writing)
    named = {(one.arm, one.name): one.name for one in writing}
    runs = tuple(
        ArmRun(
            arm=arm,
            seed=seed,
            training_seed=own[seed] % _LARGEST_SEED,
            data=named[arm, f"{_slug(arm)}-{seed}.jsonl" if arm == "random" else f"{_slug(arm)}.jsonl"],
            output=f"{MODELS}/{_slug(arm)}-{seed}",
        )
        for seed in seeds
        for arm in ARMS
    )
    sources = request.sources
    digests = {name: found.digest for name in ("model", "dataset", "evaluation", "base") if (found := getattr(sources, name))}
    return ArmManifest(
        spec=spec,
        digests={**digests, "edits": edits.stored.manifest.content_digest},
        steps=math.ceil(read.num_rows / spec.retraining.recipe.batch) * spec.retraining.recipe.epochs,
        layout="conversations" if chat else "texts",
        left_out=len(pairs.pair_ids) - read.num_rows,
        edited_axes=pairs.edited_axes,
        data=data,
        runs=runs,
    )


def _write_rows(rows: Iterator[Row], writing: list[_Writing]) -> dict[str, dict[str, int]]:
    """Each row into each arm's file as the arm edits it; pairs, drops and flips of each file."""
    counts = {one.name: {"pairs": 0, "dropped": 0, "flipped": 0} for one in writing}
    for row in rows:
        turned = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        for one in writing:
            code, count = one.codes[row["pair_id"]], counts[one.name]
            count["pairs"] += code != DROP
            count["dropped"] += code == DROP
            count["flipped"] += code == FLIP
            if code != DROP:
                one.file.write(json.dumps(turned if code == FLIP else row, ensure_ascii=False) + "\n")
    return counts


def _texts(read: pa.Table) -> Iterator[Row]:
    """Pairs as our training renders them for a base without a chat template."""
    columns = ["pair_id", "group", "axis", "subset", "chosen_text", "rejected_text"]
    for batch in read.select(columns).to_batches():
        for row in batch.to_pylist():
            yield {**{name: row[name] for name in columns[:4]}, "chosen": row["chosen_text"], "rejected": row["rejected_text"]}


def _conversations(request: AuditRequest, read: pa.Table) -> Iterator[Row]:
    """Pairs as whole conversations, which a trainer renders with the base's chat template."""
    from safer_engine.pair_tables import survey
    from safer_engine.science.pair_formats import read_pairs

    wanted = set(read["pair_id"].to_pylist())
    surveyed = survey(request.sources.dataset, request.spec.dataset, stage_seed(request.spec.seed, "pairs", "sample"))
    pairs = read_pairs(request.sources.dataset.rows(), surveyed.layout)
    for entry, pair in zip(surveyed.entries, pairs, strict=True):
        if entry.reason is None and entry.pair_id in wanted:
            names = {name: getattr(entry, name) for name in ("pair_id", "group", "axis", "subset")}
            prompt = [message.as_dict() for message in pair.prompt]
            sides = {side: [*prompt, *(turn.as_dict() for turn in getattr(pair, side))] for side in ("chosen", "rejected")}
            yield {**names, **sides}


def _write_how(
    folder: Path, manifest: ArmManifest, base: str, settings: OptimSettings, max_length: int, truncation_side: str
) -> None:
    """Manifest, a file for each run, and scripts that train them."""
    pairs = {data.file: data.pairs for data in manifest.data}
    (folder / RUNS).mkdir()
    lines = ["#!/bin/sh", "# One training a line, with OpenRLHF's train_rm; see docs/verify.md.", 'cd "$(dirname "$0")"', ""]
    for run in manifest.runs:
        document = {
            "arm": run.arm, "seed": run.training_seed, "data": run.data, "pairs": pairs[run.data], "output": run.output,
            "base": base, "steps": manifest.steps,
            "trl": trl_settings(settings, manifest.steps, max_length, run.training_seed),
            "plain": {
                "batch": settings.batch, "lr": settings.lr, "weight_decay": settings.weight_decay, "warmup": settings.warmup,
                "clip": settings.clip, "max_length": max_length, "truncation_side": truncation_side,
                "pairs_at_once": _PAIRS_AT_ONCE,
            },
        }  # fmt: skip
        name = f"{_slug(run.arm)}-{run.seed}.json"
        (folder / RUNS / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        lines.append(openrlhf_line(document, settings, max_length, chat=manifest.layout == "conversations"))
    for script in SCRIPTS:
        source = resources.files("safer_engine") / "trainers" / f"{script}.txt"
        (folder / script).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / OPENRLHF).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def trl_settings(settings: OptimSettings, steps: int, max_length: int, seed: int) -> dict[str, Any]:
    """Arguments of TRL's RewardConfig."""
    return {
        "max_steps": steps,
        "learning_rate": settings.lr,
        "per_device_train_batch_size": math.gcd(settings.batch, _PAIRS_AT_ONCE),
        "gradient_accumulation_steps": settings.batch // math.gcd(settings.batch, _PAIRS_AT_ONCE),
        "weight_decay": settings.weight_decay,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": round(settings.warmup * steps),
        "max_grad_norm": settings.clip,
        "center_rewards_coefficient": settings.centring or None,
        "max_length": max_length,
        "bf16": settings.bfloat16,
        "seed": seed,
        "data_seed": seed,
        "gradient_checkpointing": False,
    }


def openrlhf_line(run: Row, settings: OptimSettings, max_length: int, *, chat: bool) -> str:
    """A command line of OpenRLHF's train_rm. It counts epochs, not steps: as many as come next to the steps.

    Its own schedule stays, for the other ones do not take what it passes to all.
    """
    import shlex

    epochs = max(1, round(run["steps"] * settings.batch / run["pairs"]))
    options: dict[str, object] = {
        "pretrain": run["base"], "dataset": run["data"], "chosen_key": "chosen", "rejected_key": "rejected",
        "save_path": run["output"], "max_epochs": epochs, "train_batch_size": settings.batch,
        "micro_train_batch_size": math.gcd(settings.batch, _PAIRS_AT_ONCE), "learning_rate": settings.lr,
        "lr_warmup_ratio": settings.warmup, "l2": settings.weight_decay,
        "max_norm": settings.clip, "max_len": max_length, "seed": run["seed"],
    }  # fmt: skip
    words = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    flags = ["--apply_chat_template"] if chat else []
    return shlex.join(["deepspeed", "--module", "openrlhf.cli.train_rm", *words, *flags])


def _slug(arm: Arm) -> str:
    return arm.replace(" ", "-")
