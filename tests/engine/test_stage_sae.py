"""The SAE stage on a real, tiny reward model: payload, resume after interruption and crash, what is left out."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from safer_engine import pipeline, sae_pretraining
from safer_engine.api import prepare
from safer_engine.artifacts import Absent, Activations, Artifact, PairSet, SparseAutoencoder
from safer_engine.errors import DatasetRefused, Interrupted, NumericalError, SpecError
from safer_engine.events import NullObserver
from safer_engine.pipeline import Found
from safer_engine.sae_files import ShardRows
from safer_engine.science.sae import Sae
from safer_engine.sources.model_loading import load_reward_model
from safer_engine.sources.models import resolve_model
from safer_engine.spec import AuditSpec, ModelSpec, RuntimeSpec
from safer_engine.splits import held_out_groups
from safer_engine.stages.activations import ActivationsStage
from safer_engine.stages.pairs import PairsStage
from safer_engine.stages.sae import SaeStage
from safer_engine.store import LocalArtifactStore, digest_file
from tests.helpers.tiny_model import CORPUS, build_reward_model

STAGES = (PairsStage(), ActivationsStage(), SaeStage())
SAE = {"kind": "topk", "d_sae": 48, "k": 4, "batch": 128, "min_steps": 40, "max_steps": 40, "dead_after": 1000}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows() -> list[dict[str, Any]]:
    found = []
    for number in range(40):
        prompt = f"Question {number}: {CORPUS[number % 10]}"
        answers = [f"{CORPUS[(number + shift) % 10]} {CORPUS[(number + 2 * shift) % 10]}" for shift in (1, 3)]
        found.append({"id": f"p{number}", "prompt": prompt, "chosen": answers[0], "rejected": answers[1], "group": f"g{number}"})
    return found


class Stops(NullObserver):
    """Asks to stop, or breaks down, in a given step of the SAE's training."""

    def __init__(self, at: int, crash: bool = False, error: BaseException | None = None) -> None:
        self.at, self.crash, self.asked = at, crash, False
        self.error = error or SystemError("the machine died")
        self.first: float | None = None

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        if stage == "sae" and unit == "steps":
            self.first = done if self.first is None else self.first
            self.asked = done >= self.at
            if self.asked and self.crash:
                raise self.error

    def cancelled(self) -> bool:
        return self.asked


@dataclass
class World:
    """A model, a folder for stores, and runs of the first three stages."""

    folder: Path

    def run(self, store: str = "store", observer: NullObserver | None = None, **sections: Any) -> Found:
        document = {
            "model": {"path": str(self.folder / "model"), "dtype": "float32"},
            "dataset": {"source": {"kind": "memory"}},
            "split": {"held_out": 0.25},
            "causal": {"pairs": 16},
            "sae": SAE,
            "runtime": {"device": "cpu", "shard_pairs": 7},
        }
        request = prepare(AuditSpec.model_validate({**document, **sections}), rows())
        return pipeline.run(request, LocalArtifactStore(self.folder / store), observer or NullObserver(), stages=STAGES)

    def sae(self, **arguments: Any) -> SparseAutoencoder:
        found = self.run(**arguments)[SparseAutoencoder]
        assert isinstance(found, SparseAutoencoder)
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    build_reward_model(folder / "model", "llama")
    return World(folder)


def digests(artifact: Artifact) -> dict[str, str]:
    return {name: entry.digest for name, entry in artifact.stored.manifest.files.items()}


def typed(found: Found, kind: type[Any]) -> Any:
    assert not isinstance(found[kind], Absent)
    return found[kind]


def test_payload_is_what_the_artifact_promises(world: World) -> None:
    found = world.run()
    artifact, activations = typed(found, SparseAutoencoder), typed(found, Activations)
    assert sorted(digests(artifact)) == ["curve.arrow", "metrics.json", "sae.json", "sae.safetensors"]
    tensors = load_file(artifact.path("sae.safetensors"))
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "W_enc": (32, 48), "b_enc": (48,), "W_dec": (48, 32), "b_dec": (32,),
    }  # fmt: skip
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    sae = Sae.restore(tensors, artifact.json("sae.json"))
    torch.testing.assert_close(sae.W_dec_SD.norm(dim=1), torch.ones(48))
    metrics = artifact.json("metrics.json")
    assert 0 < metrics["fvu"] < 0.9
    assert 0 < metrics["l0"] <= 4
    assert len(metrics["density"]) == 48
    assert metrics["dead_window"] == 1000
    assert 0 <= metrics["dead_share"] <= 1
    assert artifact.meta == {name: value for name, value in metrics.items() if name != "density"}
    curve = artifact.table("curve.arrow").to_pydict()
    assert curve["step"] == list(range(1, 41))
    assert curve["positions"][-1] == 40 * 128
    assert curve["loss"][-1] < curve["loss"][0]
    training = metrics["training"]
    assert training["n_positions"] + sum(training["left_out"].values()) == activations.meta["n_positions"]
    assert training["left_out"]["held_out"] > 0
    assert (training["batch"], training["steps"]) == (128, 40)


def test_measures_are_those_of_the_held_out_rows(world: World) -> None:
    found = world.run()
    artifact, activations, pairs = (typed(found, kind) for kind in (SparseAutoencoder, Activations, PairSet))
    groups = pairs.pairs.column("group").to_pylist()
    left_out = held_out_groups(groups, 0.25, 0)
    apart = np.array([group in left_out for group in groups])
    assert 0 < apart.sum() < len(apart)
    kept = []
    for name in activations.names("shard-"):
        shard = load_file(activations.path(name))
        usable = (shard["flags"] & (Activations.FLAG_SPECIAL | Activations.FLAG_HIGH_NORM)) == 0
        kept.append(shard["x"][usable & torch.from_numpy(apart)[shard["pair"].long()]])
    x = torch.cat(kept)
    sae = Sae.restore(load_file(artifact.path("sae.safetensors")), artifact.json("sae.json"))
    fvu = float((x - sae.reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum())
    assert artifact.meta["n_positions"] == len(x)
    assert artifact.meta["fvu"] == pytest.approx(fvu, rel=1e-4)


def test_training_never_sees_what_is_left_out(world: World) -> None:
    found = world.run()
    activations, pairs = typed(found, Activations), typed(found, PairSet)
    groups = pairs.pairs.column("group").to_pylist()
    left_out = held_out_groups(groups, 0.25, 0)
    apart = np.array([group in left_out for group in groups])
    reading = ShardRows(activations, apart)
    training, held_out = reading.training(), reading.held_out()
    seen = torch.cat([reading.load(chunk) for chunk in training.chunks])
    other = torch.cat([reading.load_held_out(chunk) for chunk in held_out.chunks])
    assert (len(seen), len(other)) == (training.n_rows, held_out.n_rows)
    assert training.sum_of_squares == pytest.approx(float(seen.double().square().sum()))
    whole = [load_file(activations.path(name)) for name in activations.names("shard-")]
    flags, pair, x = (torch.cat([shard[name] for shard in whole]) for name in ("flags", "pair", "x"))
    usable = (flags & (Activations.FLAG_SPECIAL | Activations.FLAG_HIGH_NORM)) == 0
    is_apart = torch.from_numpy(apart)[pair.long()]
    assert torch.equal(seen, x[usable & ~is_apart])
    assert torch.equal(other, x[usable & is_apart])


def test_reward_recovered_is_measured_and_judged(world: World) -> None:
    meta = world.sae().meta
    assert meta["recovered_pairs"] > 2
    for part in ("covered", "all"):
        values = meta["recovered"][part]
        assert -1 <= values["correlation"] <= 1
        assert 0 <= values["preference_kept"] <= 1
        assert values["margin_variance"] <= 1
        assert values["ablated_margin_change"] > 0
    assert meta["interpretable"] == (meta["recovered"]["covered"]["margin_variance"] >= 0.5)
    strict = world.sae(sae={**SAE, "interpretable_floor": 1.0}).meta
    assert strict["interpretable"] is False


def test_without_residuals_it_says_why(world: World) -> None:
    meta = world.sae(store="bare", causal={"pairs": 0}).meta
    assert meta["recovered"] is None
    assert "residual" in meta["recovered_reason"]
    assert meta["interpretable"] is False


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_interrupted_and_resumed_is_the_same_to_the_last_bit(world: World, kind: str, crash: bool) -> None:
    """Asked to stop, it keeps its place; broken down, it goes on from the last checkpoint (here: of every step)."""
    runtime = {"device": "cpu", "shard_pairs": 7, "checkpoint_seconds": 1e-9 if crash else 3600}
    arguments: dict[str, Any] = {"sae": {**SAE, "kind": kind}, "runtime": runtime}
    whole = world.sae(**arguments)
    store = f"resumed-{kind}-{crash}"
    for at in (7, 23):
        with pytest.raises(SystemError if crash else Interrupted):
            world.run(store=store, observer=Stops(at, crash), **arguments)
    last = Stops(10**6)
    resumed = world.sae(store=store, observer=last, **arguments)
    assert last.first == 24, "training went on from its checkpoint"
    assert digests(resumed) == digests(whole)


def test_the_steps_done_are_kept_when_a_key_breaks_the_training_off(world: World) -> None:
    """Without a checkpoint in time: only the breaking off itself can have saved one."""
    arguments: dict[str, Any] = {"runtime": {"device": "cpu", "shard_pairs": 7, "checkpoint_seconds": 3600}}
    with pytest.raises(KeyboardInterrupt):
        world.run(store="keys", observer=Stops(7, crash=True, error=KeyboardInterrupt()), **arguments)
    last = Stops(10**6)
    resumed = world.sae(store="keys", observer=last, **arguments)
    assert last.first == 8
    assert digests(resumed) == digests(world.sae(**arguments))


def test_numbers_that_broke_down_are_not_kept(world: World) -> None:
    arguments: dict[str, Any] = {"runtime": {"device": "cpu", "shard_pairs": 7, "checkpoint_seconds": 3600}}
    with pytest.raises(NumericalError):
        world.run(store="broken", observer=Stops(7, crash=True, error=NumericalError("not finite")), **arguments)
    last = Stops(10**6)
    world.sae(store="broken", observer=last, **arguments)
    assert last.first == 1


def test_a_second_run_is_skipped(world: World) -> None:
    world.run()
    observer = Stops(10**6)
    world.run(observer=observer)
    assert observer.first is None


def test_same_seed_same_bits_other_seed_others(world: World) -> None:
    first, again = world.sae(), world.sae(store="again")
    assert digests(first) == digests(again)
    assert digests(first)["sae.safetensors"] != digests(world.sae(store="other", seed=1))["sae.safetensors"]


def test_batch_topk_keeps_its_threshold(world: World) -> None:
    artifact = world.sae(sae={**SAE, "kind": "batch_topk"})
    assert float(load_file(artifact.path("sae.safetensors"))["threshold"]) > 0
    assert artifact.json("sae.json")["kind"] == "batch_topk"
    assert artifact.meta["l0"] == pytest.approx(4, rel=0.5)


def test_paper_preset_trains_on_layernorm_without_relu(world: World) -> None:
    paper = {
        "kind": "topk",
        "d_sae": 48,
        "k": 8,
        "normalisation": "layernorm",
        "relu": False,
        "loss": "nmse",
        "lr": 3e-4,
        "aux_k": 0,
    }
    artifact = world.sae(sae={**paper, "batch": 128, "min_steps": 20, "max_steps": 20, "renorm_every": 10})
    facts = artifact.json("sae.json")
    assert (facts["normalisation"]["kind"], facts["relu"]) == ("layernorm", False)
    assert artifact.meta["training"]["lr"] == 3e-4
    assert 0 < artifact.meta["nmse"] < 1.5


def test_something_is_held_out_however_small_the_share(world: World) -> None:
    found = world.run(store="none", split={"held_out": 1e-9}, causal={"pairs": 0})
    groups = typed(found, PairSet).pairs.column("group").to_pylist()
    assert len(held_out_groups(groups, 1e-9, 0)) == 2
    assert typed(found, SparseAutoencoder).meta["n_positions"] > 0


def test_importing_the_stage_needs_no_torch() -> None:
    code = "import sys, safer_engine.stages.sae; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_metrics_are_strict_json_and_what_the_manifest_tells(world: World) -> None:
    sae = world.sae()
    text = sae.path("metrics.json").read_text()
    metrics = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in metrics.json"))
    assert len(metrics.pop("density")) == SAE["d_sae"]
    assert metrics == sae.meta
    assert 0.0 <= metrics["fvu"] <= 1.0


def corpus(folder: Path, n: int = 120) -> str:
    path = folder / "corpus.txt"
    path.write_text("\n".join(f"{CORPUS[i % 10].splitlines()[0]} {i}" for i in range(n)) + "\n\n")
    return str(path)


def pretraining(folder: Path, **changes: Any) -> dict[str, Any]:
    spec = {"corpus": {"kind": "local", "path": corpus(folder)}, "tokens": 2500, "max_length": 24, **changes}
    return {**SAE, "pretrain": spec}


def test_pretraining_comes_first_and_is_told(world: World, tmp_path: Path) -> None:
    plain = world.sae().meta["pretraining"]
    assert plain["status"] == "skipped"
    assert "corpus" in plain["reason"]
    artifact = world.sae(sae=pretraining(tmp_path))
    facts = artifact.meta["pretraining"]
    path = tmp_path / "corpus.txt"
    assert facts["corpus"] == {"origin": str(path), "revision": None, "digest": digest_file(path)}
    assert facts["status"] == "done"
    assert facts["positions"] == facts["steps"] * 128 >= 2000
    assert facts["texts"] == facts["used"] + facts["too_short"]
    assert facts["rows"] * facts["length"] >= 2500
    assert artifact.meta["training"]["steps"] == 40
    curve = artifact.table("curve.arrow").to_pydict()
    assert curve["loss"][0] < world.sae().table("curve.arrow").to_pydict()["loss"][0], "it begins better than from scratch"


def test_pretraining_is_resumed_to_the_last_bit(world: World, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"sae": pretraining(tmp_path, tokens=2500)}
    whole = world.sae(store="pre-whole", **sections)
    for at in (5, 11):
        with pytest.raises(Interrupted):
            world.run(store="pre-resumed", observer=Stops(at), **sections)
    assert digests(world.sae(store="pre-resumed", **sections)) == digests(whole)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"kind": "memory"}, SpecError),
        ({"kind": "local", "path": "nowhere.txt"}, DatasetRefused),
    ],
)
def test_a_corpus_that_is_none_is_refused(
    world: World, tmp_path: Path, source: dict[str, Any], expected: type[Exception]
) -> None:
    if "path" in source:
        source = {**source, "path": str(tmp_path / source["path"])}
    with pytest.raises(expected, match="corpus|nowhere"):
        world.run(store=f"refused-{source['kind']}", sae=pretraining(tmp_path, corpus=source))


def test_a_corpus_without_text_or_too_small_is_refused(world: World, tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.jsonl"
    rows_file.write_text(json.dumps({"body": "text"}) + "\n")
    source = {"kind": "local", "path": str(rows_file)}
    with pytest.raises(DatasetRefused, match="text"):
        world.run(store="untexted", sae=pretraining(tmp_path, corpus=source))
    rows_file.write_text(json.dumps({"text": "two words"}) + "\n")
    with pytest.raises(DatasetRefused, match="no 24 tokens"):
        world.run(store="small", sae=pretraining(tmp_path, corpus=source))


def test_corpus_batches_open_anywhere(world: World, tmp_path: Path) -> None:
    rm = load_reward_model(
        resolve_model(ModelSpec(path=str(world.folder / "model")), RuntimeSpec(), None),
        ModelSpec(path="m"),
        RuntimeSpec(device="cpu"),
    )
    ids = np.random.default_rng(0).integers(5, 250, (90, 20)).astype(np.int32)
    packed = sae_pretraining._Corpus(ids, sae_pretraining.CorpusFacts(1, 1, 0, len(ids), 20))
    windows = sae_pretraining._Windows(rm, 2, packed, 1e9, 64, 3, 100)
    assert windows.rows == len(ids), "all fits into one window"
    small = dataclasses.replace(windows, batch=32)
    whole = list(itertools.islice(small.batches(0), 2 * small.per_window + 3))
    assert {tuple(batch.shape) for batch in whole} == {(32, 32)}
    for first in (1, small.per_window - 1, small.per_window, small.per_window + 2):
        assert torch.equal(next(small.batches(first)), whole[first])
    assert not torch.equal(whole[0], whole[small.per_window]), "the next round has another order"
    epoch = torch.cat(whole[: small.per_window])
    assert len(torch.unique(epoch, dim=0)) > 0.9 * len(epoch)
