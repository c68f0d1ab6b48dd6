from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from safer_engine.errors import ModelRefused
from safer_engine.science.hooks import rewards
from safer_engine.sources.model_loading import load_reward_model
from safer_engine.sources.models import resolve_model
from safer_engine.sources.weight_files import read_header
from safer_engine.spec import ModelSpec, RuntimeSpec
from tests.helpers.hub_stand_in import HubStandIn, commit_of
from tests.helpers.tiny_model import CORPUS, build_reward_model

CPU = RuntimeSpec(device="cpu")
WEIGHTS = "model.safetensors"


def spec_of(path: Path | str, **fields: Any) -> ModelSpec:
    return ModelSpec(**{"path": str(path), "dtype": "float32", **fields})


def load(path: Path, **fields: Any) -> Any:
    spec = spec_of(path, **fields)
    return load_reward_model(resolve_model(spec, CPU, None), spec, CPU)


def reward_of(rm: Any, text: str = CORPUS[0]) -> float:
    ids = rm.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return float(rewards(rm, ids)[0])


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **fields}))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return build_reward_model(tmp_path / "llama", "llama")


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return build_reward_model(tmp_path / "bert", "bert")


def test_the_digest_is_that_of_the_content(llama: Path, tmp_path: Path) -> None:
    first = resolve_model(spec_of(llama), CPU, None)
    copy = shutil.copytree(llama, tmp_path / "copy")
    (copy / "README.md").write_text("not read by the model")
    assert resolve_model(spec_of(copy), CPU, None).digest == first.digest
    assert (first.path, first.revision, first.origin) == (llama, None, str(llama))
    edit_weights(copy, lambda tensors: tensors["score.weight"].mul_(2))
    assert resolve_model(spec_of(copy), CPU, None).digest != first.digest


def test_file_digests_are_remembered_until_a_file_changes(llama: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = resolve_model(spec_of(llama), CPU, cache).digest
    assert first == resolve_model(spec_of(llama), CPU, None).digest
    remembered = list((cache / "digests").iterdir())
    for entry in remembered:
        entry.write_text("0" * 64)
    assert resolve_model(spec_of(llama), CPU, cache).digest != first
    assert len(list((cache / "digests").iterdir())) == len(remembered)
    for path in llama.iterdir():
        os.utime(path, ns=(1, 1))
    assert resolve_model(spec_of(llama), CPU, cache).digest == first


def test_a_damaged_memory_is_not_believed(llama: Path, tmp_path: Path) -> None:
    first = resolve_model(spec_of(llama), CPU, tmp_path).digest
    for entry in (tmp_path / "digests").iterdir():
        entry.write_text("torn")
    assert resolve_model(spec_of(llama), CPU, tmp_path).digest == first


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def adapter_only(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def headless(folder: Path) -> None:
    edit_weights(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("score")])


def torn(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-5])


@pytest.mark.parametrize(
    ("break_it", "message", "hint"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json", "folder of a Hugging Face model"),
        (lambda folder: (folder / "config.json").write_text("{"), "not JSON", "again"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object", "again"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer", "save the tokenizer"),
        (lambda folder: edit_json(folder / "config.json", auto_map={"AutoModel": "x.Y"}), "auto_map", "trust_remote_code"),
        (lambda folder: edit_json(folder / "tokenizer_config.json", auto_map={"A": "x.Y"}), "tokenizer_config.json asks", "code"),
        (lambda folder: (folder / WEIGHTS).unlink(), "no safetensors weights", WEIGHTS),
        (pickle_only, "pickles", "use_safetensors=False"),
        (adapter_only, "PEFT adapter", "model.adapter"),
        (headless, "no reward head", "train-rm"),
        (torn, "not a whole safetensors file", "again"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"abc"), "not a whole safetensors file", "again"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 64), "header length is impossible", "again"),
        (
            lambda folder: (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "m-1.safetensors"}}'),
            "missing",
            "again",
        ),
        (lambda folder: (folder / f"{WEIGHTS}.index.json").write_text("{}"), "cannot be read", "again"),
        (
            lambda folder: (folder / f"{WEIGHTS}.index.json").write_text(
                f'{{"weight_map": {{"a": "../{folder.name}/{WEIGHTS}"}}}}'
            ),
            "outside its folder",
            "again",
        ),
    ],
)
def test_unfit_folders_are_refused_with_a_hint(llama: Path, break_it: Callable[[Path], None], message: str, hint: str) -> None:
    break_it(llama)
    with pytest.raises(ModelRefused) as caught:
        resolve_model(spec_of(llama), CPU, None)
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "a b/c", "one/two/three"])
def test_paths_that_name_nothing_are_refused(path: str) -> None:
    with pytest.raises(ModelRefused, match="no model folder"):
        resolve_model(spec_of(path), CPU, None)


def test_remote_code_passes_where_the_operator_allows_it(llama: Path) -> None:
    edit_json(llama / "config.json", auto_map={"AutoModel": "x.Y"})
    (llama / "x.py").write_text("pass\n")
    trusting = RuntimeSpec(device="cpu", trust_remote_code=True)
    before = resolve_model(spec_of(llama), trusting, None).digest
    (llama / "x.py").write_text("print()\n")
    assert resolve_model(spec_of(llama), trusting, None).digest != before


def test_sharded_weights_are_read_through_their_index(llama: Path) -> None:
    whole = reward_of(load(llama))
    tensors = load_file(llama / WEIGHTS)
    (llama / WEIGHTS).unlink()
    files = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, llama / file, {"format": "pt"})
        files.update(dict.fromkeys(names, file))
    (llama / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert reward_of(load(llama)) == whole


def test_headers_are_read_without_tensors(llama: Path) -> None:
    entries = read_header(llama / WEIGHTS)
    assert {name: list(entry.shape) for name, entry in entries.items()} == {
        name: list(tensor.shape) for name, tensor in load_file(llama / WEIGHTS).items()
    }


# ---------------------------------------------------------------- hub

RESOLVE = """
import sys
from safer_engine.errors import ModelRefused
from safer_engine.sources.models import resolve_model
from safer_engine.spec import ModelSpec, RuntimeSpec
for name in sys.argv[1:]:
    try:
        found = resolve_model(ModelSpec(path=name), RuntimeSpec(), None)
        print(found.revision, found.digest, sorted(path.name for path in found.path.iterdir()), sep="|")
    except ModelRefused as refused:
        print("refused", refused.message, refused.hint, sep="|")
"""


def ask(environment: dict[str, str], *names: str) -> list[list[str]]:
    """What `resolve_model` says of each name, in a process of its own: the hub's address is read when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, *names], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [line.split("|") for line in done.stdout.strip().splitlines()]


def test_a_hub_model_is_fetched_pinned_and_found_again_without_the_hub(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    local = build_reward_model(hub / "models" / "org" / "rm", "bert")
    (local / "pytorch_model.bin").write_bytes(b"a pickle that nobody fetches")
    (local / "code.py").write_text("print()")
    pickle_only(build_reward_model(hub / "models" / "org" / "pickled", "bert"))
    commit = commit_of(local)
    with HubStandIn(hub) as server:
        environment = server.environment(tmp_path / "home")
        asked = ("org/rm", f"org/rm@{commit}", "org/pickled", "org/absent", "org/rm@v9")
        found, pinned, pickled, absent, unknown = ask(environment, *asked)
        assert not any("pytorch_model.bin" in request for request in server.requests)
    assert found[0] == commit
    assert found[1] == resolve_model(spec_of(local), CPU, None).digest
    assert "model.safetensors" in found[2]
    assert "pytorch_model.bin" not in found[2]
    assert "code.py" not in found[2]
    assert pinned == found
    assert (pickled[0], "pickles" in pickled[1], "safetensors" in pickled[2]) == ("refused", True, True)
    assert absent[0] == "refused"
    assert "no model org/rm@v9" in unknown[1]
    for without in (environment, {**environment, "HF_HUB_OFFLINE": "1"}):
        again, pinned, other = ask(without, "org/rm", f"org/rm@{commit}", "org/other")
        assert again == pinned == found
        assert (other[0], "cannot be reached" in other[1], "local folder" in other[2]) == ("refused", True, True)


# ---------------------------------------------------------------- loading


def test_a_loaded_model_gives_transformers_rewards_and_is_frozen(llama: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    rm = load(llama)
    theirs = AutoModelForSequenceClassification.from_pretrained(llama).requires_grad_(False)
    ids = rm.tokenizer(CORPUS[0], return_tensors="pt").input_ids
    assert reward_of(rm) == pytest.approx(float(theirs(input_ids=ids).logits[0, 0]), abs=1e-6)
    assert not rm.model.training
    assert not any(parameter.requires_grad for parameter in rm.model.parameters())
    assert rm.info.head_source == "score.weight"


def test_bfloat16_is_loaded_when_asked_for(llama: Path) -> None:
    rm = load(llama, dtype="bfloat16")
    assert rm.info.dtype == "bfloat16"
    assert reward_of(rm) == pytest.approx(reward_of(load(llama)), abs=0.2)


def test_eager_attention_gives_the_same_rewards(llama: Path) -> None:
    rm = load(llama, attention="eager")
    assert rm.info.attention == "eager"
    assert reward_of(rm) == pytest.approx(reward_of(load(llama)), abs=1e-5)


def rename_head(new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{new}.weight"] = tensors.pop("score.weight")

    return change


@pytest.mark.parametrize("name", ["v_head.summary", "v_head", "value_head", "reward_head", "classifier"])
def test_heads_of_other_names_are_understood(llama: Path, name: str) -> None:
    expected = reward_of(load(llama))
    edit_weights(llama, rename_head(name))
    rm = load(llama)
    assert reward_of(rm) == pytest.approx(expected, abs=1e-6)
    assert rm.info.head_source == f"{name}.weight"


def test_a_foreign_heads_bias_is_kept(llama: Path) -> None:
    expected = reward_of(load(llama))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        rename_head("v_head.summary")(tensors)
        tensors["v_head.summary.bias"] = torch.tensor([2.5])

    edit_weights(llama, change)
    assert reward_of(load(llama)) == pytest.approx(expected + 2.5, abs=1e-6)


def drop(*names: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            tensors.pop(name)

    return change


def put(**new: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name.replace("__", "."): value for name, value in new.items()})


@pytest.mark.parametrize(
    ("arch", "change", "message"),
    [
        ("llama", drop("model.layers.1.mlp.up_proj.weight"), "drawn at random: model.layers.1.mlp.up_proj.weight"),
        ("llama", put(model__layers__9__mlp__up_proj__weight=torch.zeros(2)), "no place for: model.layers.9"),
        ("llama", put(score__weight=torch.zeros(1, 31)), "other shapes|cannot load"),
        ("llama", put(v_head__weight=torch.zeros(1, 32)), "second head"),
        ("llama", put(score__weight=torch.zeros(3, 32)), "states 1 outputs, the head's weights have 3"),
        ("llama", put(score__weight=torch.zeros(7)), "do not show its number of outputs"),
        ("roberta", drop("classifier.dense.weight", "classifier.dense.bias"), "head is not in the files"),
        ("bert", drop("bert.pooler.dense.weight"), "drawn at random: bert.pooler.dense.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, arch: str, change: Any, message: str) -> None:
    folder = build_reward_model(tmp_path / "model", arch)
    edit_weights(folder, change)
    with pytest.raises(ModelRefused, match=message):
        load(folder)


def test_a_foreign_head_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = build_reward_model(tmp_path / "model", "deberta")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        drop("classifier.weight", "classifier.bias", "pooler.dense.weight", "pooler.dense.bias")(tensors)
        tensors["v_head.weight"] = torch.ones(1, 32)

    edit_weights(folder, change)
    with pytest.raises(ModelRefused, match="does not fit the model's own head"):
        load(folder)


def test_language_model_heads_beside_the_reward_head_are_ignored(llama: Path) -> None:
    expected = reward_of(load(llama))
    edit_weights(llama, put(lm_head__weight=torch.zeros(520, 32)))
    assert reward_of(load(llama)) == expected


def test_a_tokenizer_that_knows_more_tokens_than_the_embeddings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="token id 511, but the embeddings have 500 rows"):
        load(build_reward_model(tmp_path / "model", "llama", vocab_size=500))


def test_an_unknown_architecture_is_refused(llama: Path) -> None:
    edit_json(llama / "config.json", model_type="no-such-model")
    with pytest.raises(ModelRefused, match="Transformers cannot read"):
        load(llama)


def test_encoder_decoder_models_are_refused(llama: Path) -> None:
    edit_json(llama / "config.json", is_encoder_decoder=True)
    with pytest.raises(ModelRefused, match="an encoder and a decoder"):
        load(llama)


@pytest.mark.parametrize(("stated", "origin"), [(None, "tokenizer"), (-1, "tokenizer"), (2, "model")])
def test_padding_is_settled_without_moving_the_head(llama: Path, stated: int | None, origin: str) -> None:
    from transformers import AutoModelForSequenceClassification

    edit_json(llama / "config.json", pad_token_id=stated)
    rm = load(llama)
    assert (rm.info.pad_origin, rm.info.head_pad_id) == (origin, stated)
    theirs = AutoModelForSequenceClassification.from_pretrained(llama).requires_grad_(False)
    for tail in ([], [2], [rm.info.pad_id]):
        ids = np.array([5, 300, 7, *tail])
        batch = torch.tensor([ids.tolist()])
        expected = float(theirs(input_ids=batch).logits[0, 0])
        assert float(rewards(rm, batch)[0]) == pytest.approx(expected, abs=1e-6)


def test_without_any_pad_token_the_end_token_fills_batches(llama: Path) -> None:
    edit_json(llama / "config.json", pad_token_id=None)
    edit_json(llama / "tokenizer_config.json", pad_token=None)
    rm = load(llama)
    assert (rm.info.pad_origin, rm.info.pad_id, rm.info.head_pad_id) == ("eos", 2, None)
    assert rm.tokenizer.pad_token_id == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "3 outputs, and nothing says"),
        ({"reward_index": 3}, "reward_index is 3"),
        ({"reward_weights": (1.0, 2.0)}, "2 reward weights were given for a head with 3"),
    ],
)
def test_several_outputs_need_a_rule(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    folder = build_reward_model(tmp_path / "model", "bert", num_labels=3)
    with pytest.raises(ModelRefused, match=message):
        load(folder, **fields)


def test_several_outputs_are_picked_or_combined(tmp_path: Path) -> None:
    folder = build_reward_model(tmp_path / "model", "bert", num_labels=3)
    parts = [reward_of(load(folder, reward_index=index)) for index in range(3)]
    combined = reward_of(load(folder, reward_weights=(0.5, -1.0, 2.0)))
    assert combined == pytest.approx(0.5 * parts[0] - parts[1] + 2 * parts[2], abs=1e-6)


# ---------------------------------------------------------------- adapters


def save_adapter(base: Path, folder: Path, seed: int = 3, **options: Any) -> Any:
    """A LoRA adapter with random weights on a base; returns the unmerged model as the reference."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize("options", [{}, {"task_type": "SEQ_CLS"}, {"modules_to_save": ["score"]}])
def test_an_adapter_is_merged_with_its_head(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    reference = save_adapter(llama, tmp_path / "adapter", **options)
    rm = load(llama, adapter=str(tmp_path / "adapter"))
    ids = rm.tokenizer(CORPUS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = float(reference(input_ids=ids).logits[0, 0])
    assert reward_of(rm) == pytest.approx(expected, abs=1e-5)
    assert abs(expected - reward_of(load(llama))) > 1e-2
    assert rm.info.adapter


def test_the_adapters_head_stands_in_for_a_missing_one(llama: Path, tmp_path: Path) -> None:
    reference = save_adapter(llama, tmp_path / "adapter", modules_to_save=["score"])
    headless(llama)
    rm = load(llama, adapter=str(tmp_path / "adapter"))
    ids = rm.tokenizer(CORPUS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        assert reward_of(rm) == pytest.approx(float(reference(input_ids=ids).logits[0, 0]), abs=1e-5)


def test_the_adapter_is_part_of_the_digest(llama: Path, tmp_path: Path) -> None:
    digests = {resolve_model(spec_of(llama), CPU, None).digest}
    for seed in (1, 2):
        save_adapter(llama, tmp_path / f"adapter{seed}", seed)
        found = resolve_model(spec_of(llama, adapter=str(tmp_path / f"adapter{seed}")), CPU, None)
        assert found.adapter_path == tmp_path / f"adapter{seed}"
        digests.add(found.digest)
    assert len(digests) == 3


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_incomplete_adapter_is_refused(llama: Path, tmp_path: Path, name: str) -> None:
    save_adapter(llama, tmp_path / "adapter")
    (tmp_path / "adapter" / name).unlink()
    with pytest.raises(ModelRefused, match=name):
        resolve_model(spec_of(llama, adapter=str(tmp_path / "adapter")), CPU, None)


def test_a_missing_adapter_is_not_called_a_missing_model(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=r"model\.adapter .*nowhere cannot be found") as caught:
        resolve_model(spec_of(llama, adapter=str(tmp_path / "nowhere")), CPU, None)
    assert "give a folder" in caught.value.hint


def test_loading_says_nothing_of_its_own(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Transformers' progress bars and load reports: what they say is checked, and raised where it matters."""
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    logging.set_verbosity_info()
    capfd.readouterr()
    try:
        load(llama)
        edit_weights(llama, lambda tensors: tensors.update({"model.layers.0.mlp.spare.weight": torch.ones(4, 4)}))
        with pytest.raises(ModelRefused, match="no place for"):
            load(llama)
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
    finally:
        logging.set_verbosity(before[0])
        if not before[1]:
            logging.disable_progress_bar()
    assert capfd.readouterr() == ("", "")


def test_an_adapter_of_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    other = build_reward_model(tmp_path / "wide", "llama", width=48)
    save_adapter(other, tmp_path / "adapter")
    with pytest.raises(ModelRefused, match="cannot be merged"):
        load(llama, adapter=str(tmp_path / "adapter"))
