"""Stage `retraining`: margins by models that never saw a pair; planted wrong labels, crashes, keys, refusals."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safer_engine.artifacts import Absent, PairSet, RetrainedMargins
from safer_engine.demo_data import build_base
from safer_engine.errors import Interrupted, ModelRefused, NumericalError
from safer_engine.events import NullObserver
from safer_engine.pipeline import AuditRequest, plan, run
from safer_engine.science.stats import auroc
from safer_engine.sources.datasets import resolve_dataset
from safer_engine.sources.models import resolve_base, resolve_model
from safer_engine.sources.resolved import ResolvedInputs
from safer_engine.sources.retraining_base import resolve_retraining_base
from safer_engine.spec import AuditSpec, DatasetSpec, MemorySource, RuntimeSpec
from safer_engine.stages.pairs import PairsStage
from safer_engine.stages.retraining import NOT_ASKED, RetrainingStage
from safer_engine.store import LocalArtifactStore
from safer_engine.train_spec import build_train_spec
from safer_engine.training import train_reward_model
from tests.helpers.tiny_model import build_reward_model

FIRST = (PairsStage(), RetrainingStage())
N_PAIRS, N_FLIPPED = 96, 12
RECIPE: dict[str, Any] = {"epochs": 15, "batch": 16, "lr": 1e-2, "max_length": 48}
CPU = RuntimeSpec(device="cpu")
Row = dict[str, Any]


def planted(seed: int = 0) -> tuple[list[Row], set[str]]:
    """Kind answers are preferred to rude ones; some labels are the wrong way round. Every pair has a name of its own to be
    remembered by."""
    rng = np.random.default_rng(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    flipped = {f"p{i}" for i in rng.choice(N_PAIRS, N_FLIPPED, replace=False)}
    rows = []
    for i in range(N_PAIRS):
        name = f"q{letters[i // 26]}{letters[i % 26]} " * 3
        good, bad = f"{name} thank you gladly", f"{name} no go away"
        if f"p{i}" in flipped:
            good, bad = bad, good
        rows.append({"id": f"p{i}", "prompt": f"Question {name}?", "chosen": good, "rejected": bad})
    return rows, flipped


ROWS, FLIPPED = planted()


class Watcher(NullObserver):
    """Keeps what it is told; asks to stop, or breaks, after so many steps."""

    def __init__(self, stop_at: float | None = None, *, breaks: bool = False) -> None:
        self.stop_at, self.breaks = stop_at, breaks
        self.steps: list[float] = []
        self.totals: set[float] = set()
        self.outcomes: dict[str, str] = {}
        self.notes: list[str] = []

    def stage_finished(self, stage: str, outcome: str, seconds: float) -> None:
        self.outcomes[stage] = outcome

    def note(self, stage: str, message: str) -> None:
        self.notes.append(message)

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        if stage == "retraining" and unit == "steps":
            self.steps.append(done)
            self.totals.add(total)
            if self.breaks and self._reached():
                raise MemoryError("a crash")

    def cancelled(self) -> bool:
        return not self.breaks and self._reached()

    def _reached(self) -> bool:
        return self.stop_at is not None and bool(self.steps) and self.steps[-1] >= self.stop_at


class Bench:
    """A tiny model, a tiny base and a store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = build_reward_model(root / "model", "llama")
        texts = [row[side] for row in ROWS for side in ("prompt", "chosen", "rejected")]
        self.base = build_base(root / "base", texts, width=32, blocks=1)

    def request(self, rows: list[Row] = ROWS, **sections: Any) -> AuditRequest:
        document: dict[str, Any] = {
            "model": {"path": str(self.model), "dtype": "float32"},
            "dataset": {"source": {"kind": "memory"}, "min_pairs": 2},
            "retraining": {"base": str(self.base), "recipe": RECIPE},
            "runtime": {"device": "cpu", "checkpoint_seconds": 1e-6},
            **sections,
        }
        spec = AuditSpec.model_validate(document)
        data = resolve_dataset(DatasetSpec(source=MemorySource()), rows)
        base = resolve_retraining_base(spec.retraining, spec.runtime, None)
        return AuditRequest(spec, ResolvedInputs(resolve_model(spec.model, spec.runtime, None), data, base=base))

    def run(self, request: AuditRequest, store: str = "store", watcher: Watcher | None = None) -> Any:
        return run(request, LocalArtifactStore(self.root / store), watcher, stages=FIRST)[RetrainedMargins]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def made(bench: Bench) -> tuple[RetrainedMargins, Watcher]:
    watcher = Watcher()
    found = bench.run(bench.request(), watcher=watcher)
    assert isinstance(found, RetrainedMargins), found
    return found, watcher


def test_a_model_that_saw_the_wrong_labels_hides_them_and_one_that_did_not_finds_them(
    bench: Bench, made: tuple[RetrainedMargins, Watcher], tmp_path: Path
) -> None:
    table = made[0].margins.to_pandas().set_index("pair_id")
    wrong = np.asarray([name in FLIPPED for name in table.index])
    out_of_fold = table["margin"].to_numpy()
    in_sample = _in_sample_margins(bench, tmp_path)[table.index].to_numpy()
    assert (in_sample > 0).mean() > 0.97
    assert (in_sample[wrong] > 0).mean() > 0.9
    assert (out_of_fold[wrong] < 0).mean() > 0.8
    assert (out_of_fold[~wrong] > 0).mean() > 0.9
    assert auroc(wrong, -out_of_fold) > 0.95
    assert made[0].meta["accuracy"] == pytest.approx((out_of_fold > 0).mean())
    assert made[0].meta["accuracy_lo"] < made[0].meta["accuracy"] < made[0].meta["accuracy_hi"]


def _in_sample_margins(bench: Bench, folder: Path) -> Any:
    """Margins of one model trained on all pairs by the same recipe."""
    document = {"base": str(bench.base), "dataset": {"source": {"kind": "memory"}}, "recipe": RECIPE}
    spec = build_train_spec({**document, "runtime": {"device": "cpu", "batch_tokens": 4096}})
    out = train_reward_model(spec, folder / "rm", rows=ROWS).path
    spec_now = bench.request().spec.model_copy(update={"dataset": bench.request().spec.dataset})
    model = spec_now.model.model_copy(update={"path": str(out), "max_length": 48})
    return _margins_of(bench, spec_now.model_copy(update={"model": model}), folder)


def _margins_of(bench: Bench, spec: AuditSpec, folder: Path) -> Any:
    import pandas as pd

    from safer_engine.science.rm_training import pair_rewards
    from safer_engine.sources.model_loading import load_reward_model
    from safer_engine.training import token_pairs

    resolved = resolve_model(spec.model, spec.runtime, None)
    request = replace(bench.request(), spec=spec, sources=replace(bench.request().sources, model=resolved))
    pairs = run(request, LocalArtifactStore(folder / "store"), stages=(PairsStage(),))[PairSet]
    assert isinstance(pairs, PairSet)
    rm = load_reward_model(resolved, spec.model, spec.runtime)
    margins = pair_rewards(rm.model, token_pairs(pairs.pairs), rm.tokenizer.pad_token_id, 4096, False).margin
    return pd.Series(margins, index=pairs.pairs["pair_id"].to_pylist())


def test_what_is_written(made: tuple[RetrainedMargins, Watcher]) -> None:
    found, watcher = made
    table = found.margins
    assert table.column_names == ["pair", "pair_id", "fold", "margin"]
    assert table["pair"].to_pylist() == list(range(N_PAIRS))
    assert np.bincount(table["fold"].to_numpy()).tolist() == [N_PAIRS // 2] * 2
    assert table["margin"].null_count == found.meta["n_unread"] == 0
    n_steps = 2 * RECIPE["epochs"] * (N_PAIRS // 2 // RECIPE["batch"])
    assert found.meta["steps"] == n_steps
    assert watcher.steps == list(range(1, n_steps + 1))
    assert watcher.totals == {n_steps}
    assert list(found.stored.manifest.files) == ["retrained.arrow"]


def test_no_model_and_no_work_area_stays(bench: Bench, made: tuple[RetrainedMargins, Watcher]) -> None:
    kept = [path for path in (bench.root / "store").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) < 200_000
    assert not list((bench.root / "store").rglob("*.safetensors"))


QUICK = {"epochs": 1, "batch": 16, "lr": 1e-3, "max_length": 48}


def quick(bench: Bench, **sections: Any) -> AuditRequest:
    return bench.request(retraining={"base": str(bench.base), "recipe": QUICK, "folds": 3}, **sections)


def margins_of(found: RetrainedMargins | Absent) -> list[float]:
    assert isinstance(found, RetrainedMargins), found
    margins: list[float] = found.margins["margin"].to_pylist()
    return margins


@pytest.fixture(scope="module")
def whole(bench: Bench) -> list[float]:
    return margins_of(bench.run(quick(bench), "whole"))


def test_stopped_and_broken_it_goes_on_from_the_checkpoint_to_the_same_margins(bench: Bench, whole: list[float]) -> None:
    request = quick(bench)
    with pytest.raises(Interrupted):
        bench.run(request, "stopped", Watcher(2))
    with pytest.raises(MemoryError):
        bench.run(request, "stopped", broken := Watcher(6, breaks=True))
    assert broken.steps == [3, 4, 5, 6]
    last = Watcher()
    assert margins_of(bench.run(request, "stopped", last)) == whole
    assert last.steps[0] == 6, "step 6 was not in a checkpoint when it broke; the fold before it is not trained again"
    assert last.steps[-1] == 12


def test_another_suspicion_or_sae_does_not_train_again(bench: Bench, whole: list[float]) -> None:
    store = LocalArtifactStore(bench.root / "whole")

    def state(**sections: Any) -> str:
        return {stage.name: stage.state for stage in plan(quick(bench, **sections), store, FIRST)}["retraining"]

    assert state() == "cached"
    assert state(suspicion={"signals": {"latents": 1.0, "retrained": 3.0}, "folds": 7}) == "cached"
    assert state(sae={"kind": "topk", "k": 3}, salience={"candidates": 9}, causal={"pairs": 1}, report={"pairs": 1}) == "cached"
    assert state(seed=1) == "compute"
    other = bench.request(retraining={"base": str(bench.base), "recipe": {**QUICK, "lr": 2e-3}, "folds": 3})
    assert plan(other, store, FIRST)[1].state == "compute"


def test_where_the_base_lies_does_not_matter_but_what_it_holds_does(bench: Bench, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(bench.base, tmp_path / "moved")
    store = LocalArtifactStore(tmp_path / "store")
    run(quick(bench), store, None, stages=(PairsStage(),))  # a stage has a key once what it reads is there
    moved = bench.request(retraining={"base": str(tmp_path / "moved"), "recipe": QUICK, "folds": 3})
    keys = [plan(request, store, (PairsStage(), RetrainingStage()))[1] for request in (quick(bench), moved)]
    assert keys[0] == keys[1]
    assert keys[0].key is not None
    (tmp_path / "moved" / "generation_config.json").unlink(missing_ok=True)
    config = (tmp_path / "moved" / "config.json").read_text()
    (tmp_path / "moved" / "config.json").write_text(config + " ")
    changed = bench.request(retraining={"base": str(tmp_path / "moved"), "recipe": QUICK, "folds": 3})
    assert plan(changed, store, FIRST)[1].key != keys[0].key


def test_not_asked_for_nothing_is_trained(bench: Bench) -> None:
    request = bench.request(retraining=None)
    assert request.sources.base is None
    watcher = Watcher()
    found = bench.run(request, "off", watcher)
    assert isinstance(found, Absent)
    assert found.reason == NOT_ASKED
    assert watcher.outcomes["retraining"] == "absent"
    assert watcher.steps == []


def test_a_sample_is_the_one_under_audit_and_margins_are_joined_by_id(bench: Bench) -> None:
    sampled = {"source": {"kind": "memory"}, "min_pairs": 2, "sample": 40}
    request = quick(bench, dataset=sampled)
    store = LocalArtifactStore(bench.root / "sampled")
    found = run(request, store, stages=FIRST)
    pairs, margins = found[PairSet], found[RetrainedMargins]
    assert isinstance(pairs, PairSet)
    assert isinstance(margins, RetrainedMargins)
    assert margins.margins["pair_id"].to_pylist() == pairs.pairs["pair_id"].to_pylist()
    assert margins.margins.num_rows == 40
    assert margins.margins["margin"].null_count == 0


def test_a_training_that_diverges_says_what_to_do(bench: Bench) -> None:
    recipe = {**QUICK, "lr": 1e30, "epochs": 4}
    with pytest.raises(NumericalError, match="retraining without fold 0") as caught:
        bench.run(bench.request(retraining={"base": str(bench.base), "recipe": recipe}), "diverged")
    assert caught.value.hint is not None
    assert "retraining.recipe.lr" in caught.value.hint


def test_a_base_that_is_not_there_is_named(bench: Bench) -> None:
    with pytest.raises(ModelRefused, match=r"retraining\.base .*nowhere cannot be used"):
        bench.request(retraining={"base": str(bench.root / "nowhere")})


def test_the_base_is_what_train_rm_would_take(bench: Bench) -> None:
    assert bench.request().sources.base == resolve_base(str(bench.base), CPU, None)


def test_the_stage_is_imported_without_torch() -> None:
    code = "import sys, safer_engine.stages.retraining; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
