"""What the weight files of a model folder hold, read from their headers: names and shapes, no tensors, no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safer_engine.errors import ModelRefused

HEAD_NAMES = ("score", "classifier", "value_head", "v_head", "reward_head", "logits_proj")
"""First parts of the names under which reward heads are saved."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_MAX_HEADER = 100 << 20
_CONVERT = (
    'convert it once, where you trust its origin: python -c "from transformers import AutoModelForSequenceClassification as M; '
    "M.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder}-safetensors')\" and copy the tokenizer files"
)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a safetensors file, and the name it has there."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Names and shapes of the tensors in a safetensors file.

    Raises:
        ModelRefused: the file is not a complete safetensors file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError("its header length is impossible")
            header: dict[str, dict[str, Any]] = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        entries = {name: TensorEntry(path, name, tuple(item["shape"]), item["dtype"]) for name, item in header.items()}
        end = max((item["data_offsets"][1] for item in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it should have {8 + length + end} bytes and has {size}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelRefused(f"{path.name} is not a whole safetensors file: {error}", "download or save it again") from error
    return entries


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights, by the index where there is one.

    Raises:
        ModelRefused: there are none, a listed one is missing, or the weights are pickles.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelRefused(f"{INDEX} cannot be read: {error}", "download or save the model again") from error
        if strange := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise ModelRefused(f"{INDEX} names files outside its folder: {strange[0]!r}", "save the model again")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelRefused(f"weight files are missing: {', '.join(missing)}", "download the model again")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise ModelRefused(*_no_weights(folder))


def read_weights(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of a model folder. Raises ModelRefused (see `weight_files`, `read_header`)."""
    entries: dict[str, TensorEntry] = {}
    for path in weight_files(folder):
        entries.update(read_header(path))
    return entries


def head_tensors(entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors that belong to a reward head, by the first part of their name."""
    return {name: entry for name, entry in entries.items() if name.split(".")[0] in HEAD_NAMES}


def adapter_head(entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The whole head tensors saved with a PEFT adapter, under the names they have in the model."""
    found = {}
    for name, entry in entries.items():
        plain = name.removeprefix("base_model.model.").replace(".modules_to_save", "").replace(".default", "")
        if plain.split(".")[0] in HEAD_NAMES and "lora_" not in plain:
            found[plain] = entry
    return found


def n_outputs(head: dict[str, TensorEntry]) -> int:
    """Number of outputs of a reward head, from its final matrix.

    Raises:
        ModelRefused: the tensors do not show one number.
    """
    matrices = {name: entry for name, entry in head.items() if name.endswith(".weight") and len(entry.shape) == 2}
    final = {name: entry for name, entry in matrices.items() if name.endswith(("out_proj.weight", "summary.weight"))}
    direct = {name: entry for name, entry in matrices.items() if name.count(".") == 1}
    counts = {entry.shape[0] for entry in (final or direct).values()}
    if len(counts) != 1:
        raise ModelRefused(
            f"the head's weights {', '.join(sorted(head))} do not show its number of outputs", "save the model again"
        )
    return counts.pop()


def _no_weights(folder: Path) -> tuple[str, str]:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES and path.name != "training_args.bin")
    if (folder / "adapter_config.json").is_file():
        hint = "give its base model as model.path and this folder as model.adapter"
        return f"{folder} holds a PEFT adapter, not a whole model", hint
    if pickles:
        message = f"the weights are pickles ({', '.join(pickles[:3])}), which can run code when they are loaded"
        return message, _CONVERT.format(folder=folder)
    return f"{folder} holds no safetensors weights", f"expected {SINGLE} or {INDEX}"
