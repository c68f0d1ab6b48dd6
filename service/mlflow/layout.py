"""Which files among a model version's artifacts are the model: a Hugging Face folder, wherever it lies among them.

MLflow's `transformers` flavour splits it: weights in `model/`, the tokenizer in `components/tokenizer/`; the two are put
together again. `python_function` models hold it below `artifacts/`.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from safer_engine.errors import InputRefused
from service.mlflow.registry import ProxyFile

FOLDER_TAG = "safer_audit.folder"
"""Tag of a model version that says which folder of its artifacts is the model."""
_CONFIG, _WEIGHTS = "config.json", ".safetensors"
_TOKENIZERS = frozenset(("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model"))
_UNUSED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".ckpt")
"""Endings of files that are never read: weights that could carry code, or are in other formats."""
_MOST_FILES, _DEEPEST = 2000, 5
_EXPECTED = f"log a folder with {_CONFIG}, *{_WEIGHTS} and the tokenizer, as `save_pretrained` writes it"


@dataclass(frozen=True)
class ModelFile:
    """A file to fetch. `source`: its path in the artifact store; `name`: in the model's folder; size None: not known."""

    name: str
    source: str
    size: int | None


def walk(listing: Callable[[str], Sequence[ProxyFile]], folder: str) -> tuple[ProxyFile, ...]:
    """Every file below a folder. Raises InputRefused where there are too many."""
    found, folders = list[ProxyFile](), [(folder, 0)]
    while folders:
        here, depth = folders.pop()
        for each in listing(here):
            if not each.is_dir:
                found.append(each)
            elif depth < _DEEPEST:
                folders.append((each.path, depth + 1))
        if len(found) + len(folders) > _MOST_FILES:
            raise InputRefused(f"the version has over {_MOST_FILES} artifacts", f"name the model's folder: tag {FOLDER_TAG}")
    return tuple(sorted(found, key=lambda each: each.path))


def model_files(files: Sequence[ProxyFile], root: str, folder: str | None) -> tuple[ModelFile, ...]:
    """The files of the model.

    Args:
        root: folder of the version's artifacts.
        folder: below `root`, where it was told (`FOLDER_TAG`); None: the one nearest to the root that holds a model.

    Raises:
        InputRefused: there is no such folder, or several.
    """
    by_folder: dict[str, dict[str, ProxyFile]] = {}
    for file in files:
        parent, name = posixpath.split(posixpath.relpath(file.path, root))
        by_folder.setdefault(parent, {})[name] = file
    chosen = _chosen(by_folder, folder)
    found = dict(by_folder[chosen])
    if not _TOKENIZERS & found.keys():
        beside = posixpath.join(posixpath.dirname(chosen), "components", "tokenizer")
        found = {**by_folder.get(beside, {}), **found}
    wanted = {name: file for name, file in found.items() if not name.startswith(".") and not name.endswith(_UNUSED)}
    return tuple(ModelFile(name, file.path, file.size) for name, file in sorted(wanted.items()))


def _chosen(by_folder: dict[str, dict[str, ProxyFile]], told: str | None) -> str:
    whole = [name for name, held in by_folder.items() if _CONFIG in held and any(each.endswith(_WEIGHTS) for each in held)]
    if told is not None:
        bare = told.strip("/")
        if bare in whole:
            return bare
        raise InputRefused(f"{FOLDER_TAG}: {bare[:200]!r} is no folder with {_CONFIG} and *{_WEIGHTS}", _EXPECTED)
    if not whole:
        weights = any(name.endswith(_UNUSED) for held in by_folder.values() for name in held)
        more = "; weights in other formats are not read: save with safe_serialization=True" if weights else ""
        raise InputRefused(f"no folder of the version's artifacts holds {_CONFIG} and *{_WEIGHTS}", _EXPECTED + more)
    depth = min(_depth(name) for name in whole)
    nearest = sorted(name for name in whole if _depth(name) == depth)
    if len(nearest) > 1:
        names = ", ".join(nearest[:5])[:200]
        raise InputRefused(f"several folders hold a model: {names}", f"say which one: tag {FOLDER_TAG} of the version")
    return nearest[0]


def _depth(name: str) -> int:
    return name.count("/") + 1 if name else 0
