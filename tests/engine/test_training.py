"""Training from files to a model folder: what is saved, resumption, refusals, adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safer_engine.demo_data import build_base, generate
from safer_engine.errors import DatasetRefused, Interrupted, ModelRefused, NumericalError, SpecError
from safer_engine.events import NullObserver
from safer_engine.model_training import optim_settings
from safer_engine.sources.base_models import load_base, load_base_tokenizer
from safer_engine.sources.model_loading import load_reward_model
from safer_engine.sources.models import resolve_base, resolve_model
from safer_engine.spec import ModelSpec, RuntimeSpec
from safer_engine.train_spec import TrainSpec, build_train_spec
from safer_engine.training import train_reward_model
from tests.helpers.tiny_model import build_reward_model

DATA = generate(seed=1, n_groups=24)
TEXTS = [row["chosen"][0]["content"] for row in DATA.rows]
RECIPE = {"epochs": 2, "batch": 8, "lr": 3e-3, "max_length": 64}
CPU = RuntimeSpec(device="cpu")


class StopsAt(NullObserver):
    """Asks to stop, or breaks, after some steps."""

    def __init__(self, step: int, breaks: bool = False) -> None:
        self.step, self.breaks, self.seen = step, breaks, 0.0

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        if stage == "train":
            self.seen = done
            if self.breaks and done >= self.step:
                raise MemoryError("a crash")

    def cancelled(self) -> bool:
        return not self.breaks and self.seen >= self.step


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("bases") / "llama", TEXTS, width=16, blocks=2)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT body as it comes from pre-training: no head, names without a prefix."""
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path_factory.mktemp("bases")
    built = build_reward_model(folder / "whole", "bert", width=16, blocks=2)
    AutoModel.from_pretrained(built).save_pretrained(folder / "bert")
    AutoTokenizer.from_pretrained(built).save_pretrained(folder / "bert")
    return folder / "bert"


def spec_for(base: Path, **document: Any) -> TrainSpec:
    memory = {"source": {"kind": "memory"}}
    runtime = {"device": "cpu", "checkpoint_seconds": 1e-6, "batch_tokens": 2048}
    apart = {**memory, "min_pairs": 2}
    full = {"base": str(base), "dataset": memory, "evaluation": apart, "recipe": RECIPE, "runtime": runtime, **document}
    return build_train_spec(full)


def train(base: Path, out: Path, observer: Any = None, rows: Any = DATA.rows, **document: Any) -> Any:
    return train_reward_model(spec_for(base, **document), out, observer, rows=rows, evaluation_rows=DATA.evaluation)


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(base, tmp_path_factory.mktemp("out") / "rm")


@pytest.mark.parametrize("kind", ["base", "encoder"])
def test_the_folder_is_a_reward_model_that_an_audit_accepts(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    result = train(request.getfixturevalue(kind), tmp_path / "rm")
    resolved = resolve_model(ModelSpec(path=str(result.path)), CPU, None)
    model = load_reward_model(resolved, ModelSpec(path=str(result.path)), CPU)
    assert model.tokenizer.pad_token_id is not None
    assert not list(result.path.parent.glob(".*.training"))
    on_disk = json.loads((result.path / "training.json").read_text())
    assert on_disk == result.record
    assert not result.cached
    assert result.record["pairs"]["n_pairs"] == len(DATA.rows)
    assert len(result.record["curve"]) == -(-len(DATA.rows) // 8) * 2
    slices = {(entry["axis"], entry["subset"]) for entry in result.record["evaluation"]["slices"]}
    assert {(None, None), ("chat", None), ("safety", None), ("safety", "refusal")} <= slices


class Notes(NullObserver):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, stage: str, message: str) -> None:
        self.said.append(message)


def test_few_evaluation_pairs_are_measured_and_none_holds_nothing_up(base: Path, tmp_path: Path) -> None:
    apart = {"source": {"kind": "memory"}, "min_pairs": 20}
    spec = spec_for(base, evaluation=apart, recipe={**RECIPE, "epochs": 1})
    few, none = Notes(), Notes()
    rows = [*DATA.rows[:4], *DATA.evaluation[:3]]
    record = train_reward_model(spec, tmp_path / "few", few, rows=DATA.rows, evaluation_rows=rows).record
    assert record["evaluation"]["slices"][0]["accuracy"]["n"] == 3
    assert record["health"]["evaluation"]["dropped"] == {"in_training_data": 4}
    assert any("only 3 of 7 evaluation pairs are usable" in note for note in few.said)
    record = train_reward_model(spec, tmp_path / "none", none, rows=DATA.rows, evaluation_rows=rows[:4]).record
    assert record["evaluation"] is None
    assert record["health"]["evaluation"]["n_kept"] == 0
    assert any("none of the 4 evaluation pairs is usable" in note for note in none.said)
    with pytest.raises(DatasetRefused, match="the evaluation set cannot be used"):
        train_reward_model(spec, tmp_path / "bad", rows=DATA.rows, evaluation_rows=[{"text": "a"}] * 5)


def test_training_lowers_the_loss(trained: Any) -> None:
    losses = [step["loss"] for step in trained.record["curve"]]
    assert losses[0] == pytest.approx(np.log(2), abs=0.1)
    assert np.mean(losses[-4:]) < 0.75 * np.mean(losses[:4])


def test_sequences_are_cut_at_the_length_asked_for(trained: Any) -> None:
    assert trained.record["pairs"]["max_length"] == 64
    longest = max(step["tokens"] for step in trained.record["curve"])
    assert longest <= 2 * 8 * 64


def test_the_second_call_computes_nothing(trained: Any, base: Path) -> None:
    before = (trained.path / "model.safetensors").stat().st_mtime_ns
    again = train(base, trained.path, StopsAt(0, breaks=True))
    assert again.cached
    assert again.record == trained.record
    assert (trained.path / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("breaks", [False, True])
def test_a_stopped_training_goes_on_to_the_same_weights(trained: Any, base: Path, tmp_path: Path, breaks: bool) -> None:
    with pytest.raises(MemoryError if breaks else Interrupted):
        train(base, tmp_path / "rm", StopsAt(9, breaks))
    assert not (tmp_path / "rm").exists()
    watcher = StopsAt(10**6)
    result = train(base, tmp_path / "rm", watcher)
    expected = saved_weights(trained.path)
    for name, weight in saved_weights(result.path).items():
        assert torch.equal(weight, expected[name]), name
    assert result.record["curve"] == trained.record["curve"]
    assert result.record["evaluation"] == trained.record["evaluation"]


def test_weights_depend_on_the_seed_and_not_on_the_order_of_rows(trained: Any, base: Path, tmp_path: Path) -> None:
    turned = train(base, tmp_path / "turned", rows=DATA.rows[::-1])
    assert torch.equal(saved_weights(turned.path)["score.weight"], saved_weights(trained.path)["score.weight"])
    other = train(base, tmp_path / "other", seed=5)
    assert not torch.equal(saved_weights(other.path)["score.weight"], saved_weights(trained.path)["score.weight"])


def test_a_taken_folder_is_refused(trained: Any, base: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="another training"):
        train(base, trained.path, seed=9)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SpecError, match="not a trained model"):
        train(base, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("merge", [True, False])
def test_adapters(base: Path, tmp_path: Path, merge: bool) -> None:
    result = train(base, tmp_path / "rm", lora={"rank": 2, "alpha": 4, "merge": merge})
    facts = result.record["model"]
    assert 0 < facts["n_trained"] < 0.5 * facts["n_parameters"]
    assert result.record["settings"]["lr"] == 3e-3
    if merge:
        spec = ModelSpec(path=str(result.path))
        before = saved_weights(base)["model.layers.0.self_attn.q_proj.weight"]
        after = saved_weights(result.path)["model.layers.0.self_attn.q_proj.weight"]
        embedding = "model.embed_tokens.weight"
        assert not torch.equal(before, after)
        assert torch.linalg.matrix_rank(after - before, rtol=1e-3) <= 2
        assert torch.equal(saved_weights(base)[embedding], saved_weights(result.path)[embedding])
    else:
        whole = build_headed(base, tmp_path / "headed")
        spec = ModelSpec(path=str(whole), adapter=str(result.path))
    loaded = load_reward_model(resolve_model(spec, CPU, None), spec, CPU)
    assert loaded.tokenizer is not None


def build_headed(base: Path, folder: Path) -> Path:
    """The base with some head, as an adapter's base model must have one."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_a_head_of_one_output_is_kept_and_any_other_replaced(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    build_headed(base, tmp_path / "one")
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).save_pretrained(tmp_path / "three")
    build_tokenizer_like(base, tmp_path / "three")
    for name, fresh in (("one", ()), ("three", ("score.weight",))):
        resolved = resolve_base(str(tmp_path / name), CPU, None)
        loaded = load_base(resolved, load_base_tokenizer(resolved, CPU), CPU, seed=0)
        assert loaded.fresh == fresh
        assert loaded.model.score.weight.shape == (1, 16)
        kept = torch.equal(loaded.model.score.weight, saved_weights(tmp_path / name)["score.weight"][:1])
        assert kept == (name == "one")


def build_tokenizer_like(base: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def test_a_base_without_part_of_its_body_is_refused(base: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(base, tmp_path / "torn")
    weights = saved_weights(base)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "torn" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelRefused, match=r"layers\.1\.mlp\.up_proj"):
        train(tmp_path / "torn", tmp_path / "rm")


@pytest.mark.parametrize(
    ("special", "names", "expected"),
    [
        (["<pad>", "</s>"], {"pad_token": "<pad>", "eos_token": "</s>"}, ("<pad>", "tokenizer")),
        (["<|right_pad|>", "</s>"], {"eos_token": "</s>"}, ("<|right_pad|>", "named")),
        (["<unk>", "</s>"], {"eos_token": "</s>", "unk_token": "<unk>"}, ("<unk>", "unk")),
        (["</s>"], {"eos_token": "</s>"}, ("</s>", "eos")),
        ([], {}, None),
    ],
)
def test_padding_is_a_token_the_base_knows(
    special: list[str], names: dict[str, str], expected: tuple[str, str] | None, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = build_reward_model(tmp_path, "llama", width=16, blocks=1)
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    inner.add_special_tokens(special)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    resolved = resolve_base(str(folder), CPU, None)
    if expected is None:
        with pytest.raises(ModelRefused, match="can pad"):
            load_base_tokenizer(resolved, CPU)
    else:
        ready = load_base_tokenizer(resolved, CPU)
        assert (ready.tokenizer.pad_token, ready.pad_origin) == expected


def test_refusals(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="no model folder"):
        train(tmp_path / "nowhere" / "base", tmp_path / "rm")
    with pytest.raises(DatasetRefused):
        train(base, tmp_path / "few", rows=DATA.rows[:3])
    with pytest.raises(NumericalError, match="diverged"):
        train(base, tmp_path / "wild", recipe={**RECIPE, "lr": 1e30})
    assert not list(tmp_path.glob("*wild*"))


def test_divergence_leaves_alone_what_waits_to_go_on(base: Path, tmp_path: Path) -> None:
    waiting = tmp_path / ".rm.training" / "work" / "default" / f"train-{'0' * 64}"
    waiting.mkdir(parents=True)
    with pytest.raises(NumericalError, match="diverged"):
        train(base, tmp_path / "rm", recipe={**RECIPE, "lr": 1e30})
    assert list(waiting.parent.iterdir()) == [waiting]


def test_rows_of_another_type_are_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="rows is a str"):
        train(base, tmp_path / "rm", rows="rows.jsonl")


def test_the_paper_preset_is_the_papers_recipe() -> None:
    memory = {"source": {"kind": "memory"}}
    recipe = build_train_spec({"base": "b", "dataset": memory, "preset": "paper"}).recipe
    assert (recipe.lr, recipe.epochs, recipe.weight_decay, recipe.warmup) == (2e-5, 2, 0.001, 0.03)
    assert (recipe.schedule, recipe.batch, recipe.max_length, recipe.truncation_side) == ("cosine", 128, 4096, "left")
    own = build_train_spec({"base": "b", "dataset": memory, "preset": "paper", "recipe": {"lr": 1e-4}}).recipe
    assert (own.lr, own.batch) == (1e-4, 128)


def test_defaults_depend_on_size_device_and_adapters() -> None:
    memory = {"source": {"kind": "memory"}}
    plain = build_train_spec({"base": "b", "dataset": memory})
    adapters = build_train_spec({"base": "b", "dataset": memory, "lora": {}})
    assert optim_settings(plain, 20_000_000, "cpu").lr == 5e-5
    assert optim_settings(plain, 1_000_000_000, "cpu").lr == 2e-5
    assert optim_settings(adapters, 1_000_000_000, "cpu").lr == 2e-4
    assert not optim_settings(plain, 1, "cpu").bfloat16
    assert optim_settings(plain, 1, "cuda:1").bfloat16


def test_unknown_knobs_are_named() -> None:
    with pytest.raises(SpecError, match=r"recipe\.epoch"):
        build_train_spec({"base": "b", "dataset": {"source": {"kind": "memory"}}, "recipe": {"epoch": 3}})
    with pytest.raises(SpecError, match="base"):
        build_train_spec({"dataset": {"source": {"kind": "memory"}}})
