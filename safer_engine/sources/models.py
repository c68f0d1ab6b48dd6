"""Finding a reward model: a local folder or a hub id becomes a folder that was checked and fingerprinted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safer_engine.errors import ModelRefused, ResourceError
from safer_engine.publishing import publishing
from safer_engine.sources.resolved import ResolvedModel
from safer_engine.sources.weight_files import ADAPTER, PICKLES, adapter_head, head_tensors, read_header, read_weights
from safer_engine.spec import ModelSpec, RuntimeSpec
from safer_engine.store import digest_bytes, digest_file

_SETTINGS = ("config.json", "adapter_config.json")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", ADAPTER)
_HUB_ID = re.compile(r"^(?P<name>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@(?P<revision>[\w./-]+))?$")
_OFFLINE = "download it where there is a network, or give the path of a local folder"


@dataclass(frozen=True)
class _Folder:
    path: Path
    revision: str | None


def resolve_model(spec: ModelSpec, runtime: RuntimeSpec, cache: Path | None) -> ResolvedModel:
    """Find a reward model (and its adapter), check what its files promise, and take their digest.

    Args:
        spec: `path` and `adapter` are local folders or hub ids with an optional `@revision`.
        cache: folder where file digests are remembered by path, size and time of change; None hashes anew.

    Raises:
        ModelRefused: not found, no config, tokenizer or head, pickled weights, remote code, or a damaged file.
    """
    found = _find(spec.path, runtime.trust_remote_code)
    adapter = None if spec.adapter is None else _find_adapter(spec.adapter)
    _check_settings(found.path, runtime.trust_remote_code)
    head = head_tensors(read_weights(found.path))
    if adapter is not None:
        head.update(_check_adapter(adapter.path))
    if not head:
        raise ModelRefused(
            f"{spec.path} has no reward head in its weights (a base or chat model?)",
            "give a model trained with a sequence-classification head, or train one: safer-audit train-rm",
        )
    files = [("model", path) for path in _wanted_files(found.path, runtime.trust_remote_code)]
    files += [("adapter", path) for path in _wanted_files(adapter.path, False)] if adapter is not None else []
    return ResolvedModel(
        path=found.path,
        digest=_digest(files, cache),
        origin=spec.path,
        revision=found.revision,
        adapter_path=None if adapter is None else adapter.path,
    )


def resolve_base(named: str, runtime: RuntimeSpec, cache: Path | None) -> ResolvedModel:
    """Find a model that a reward head is to be trained on: checked like a reward model, but need not have a head.

    Raises:
        ModelRefused: as for `resolve_model`.
    """
    found = _find(named, runtime.trust_remote_code)
    _check_settings(found.path, runtime.trust_remote_code)
    read_weights(found.path)
    files = [("model", path) for path in _wanted_files(found.path, runtime.trust_remote_code)]
    return ResolvedModel(path=found.path, digest=_digest(files, cache), origin=named, revision=found.revision)


def files_to_send(folder: Path, *, adapter: bool) -> list[Path]:
    """The files of a local model, or adapter, that an audit somewhere else needs. Raises ModelRefused as it would there."""
    if adapter:
        _check_adapter(folder)
    else:
        _check_settings(folder, False)
        read_weights(folder)
    return _wanted_files(folder, False)


def _find(named: str, code: bool) -> _Folder:
    local = Path(named).expanduser()
    if local.is_dir():
        return _Folder(local.resolve(), None)
    match = _HUB_ID.match(named)
    if match is None or local.is_absolute() or local.is_file():
        raise ModelRefused(f"there is no model folder {named}", "give a folder, or a hub id such as org/name@revision")
    return _from_hub(match["name"], match["revision"], code)


def _find_adapter(named: str) -> _Folder:
    """`_find`, whose refusals speak of a model, for the adapter."""
    try:
        return _find(named, False)
    except ModelRefused as error:
        raise ModelRefused(f"model.adapter {named} cannot be found: {error.message}", error.hint) from error


def _from_hub(name: str, revision: str | None, code: bool) -> _Folder:
    """Download config, tokenizer and safetensors weights of a hub model at the commit that `revision` names now."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    patterns = _patterns(code)
    try:
        info = HfApi().model_info(name, revision=revision)
        _check_listing(name, [file.rfilename for file in info.siblings or []])
        path = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        return _Folder(path, path.name)
    except HFValidationError as error:
        raise ModelRefused(f"{name} is neither a folder nor a hub id", "give a folder, or org/name@revision") from error
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None and status < 500:
            hint = "check the id and revision; a private or gated model needs HF_TOKEN in the environment"
            raise ModelRefused(f"the hub has no model {name}{f'@{revision}' if revision else ''} for you", hint) from error
        unreachable: Exception = error
    except (HTTPError, OSError) as error:
        unreachable = error
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
    except (LocalEntryNotFoundError, HTTPError, OSError, ValueError):
        raise ModelRefused(f"model {name} is not on this machine and the hub cannot be reached", _OFFLINE) from unreachable
    return _Folder(path, path.name)


def _check_listing(name: str, files: list[str]) -> None:
    """Refuse a hub repository whose weights are pickles before anything is downloaded."""
    top = [file for file in files if "/" not in file]
    if any(fnmatchcase(file, pattern) for file in top for pattern in _WEIGHTS):
        return
    pickles = [file for file in top if file.endswith(PICKLES)]
    if pickles:
        raise ModelRefused(
            f"the weights of {name} are pickles ({', '.join(pickles[:3])}), which can run code when they are loaded",
            "use a revision with safetensors weights (hubs often offer a conversion as a pull request), or convert a local copy",
        )


def _patterns(code: bool) -> list[str]:
    return [*_SETTINGS, *_TOKENIZER, *_WEIGHTS, *(["*.py"] if code else [])]


def _wanted_files(folder: Path, code: bool) -> list[Path]:
    patterns = _patterns(code)
    wanted = (path for path in folder.iterdir() if path.is_file() and any(fnmatchcase(path.name, p) for p in patterns))
    return sorted(wanted, key=lambda path: path.name)


def _check_settings(folder: Path, code: bool) -> None:
    config = _read_json(folder / "config.json")
    if config is None and (folder / "adapter_config.json").is_file():
        raise ModelRefused(
            f"{folder} holds a PEFT adapter, not a whole model",
            "give its base model as model.path and this folder as model.adapter",
        )
    if config is None:
        raise ModelRefused(f"{folder} has no config.json", "give the folder of a Hugging Face model")
    if not any(
        (folder / name).is_file() for name in _TOKENIZER if name not in ("tokenizer_config.json", "special_tokens_map.json")
    ):
        raise ModelRefused(f"{folder} has no tokenizer", "save the tokenizer the model was trained with into its folder")
    for name, document in (("config.json", config), ("tokenizer_config.json", _read_json(folder / "tokenizer_config.json"))):
        if document and document.get("auto_map") and not code:
            raise ModelRefused(
                f"{name} asks to run code that comes with the model (auto_map)",
                "read that code first; operators may then allow it with runtime.trust_remote_code",
            )


def _check_adapter(folder: Path) -> dict[str, Any]:
    """Head tensors of a PEFT adapter folder (often none)."""
    if _read_json(folder / "adapter_config.json") is None:
        raise ModelRefused(f"{folder} has no adapter_config.json", "give the folder that PEFT's save_pretrained wrote")
    if not (folder / ADAPTER).is_file():
        raise ModelRefused(f"{folder} has no {ADAPTER}", "save the adapter again with safe_serialization=True")
    return adapter_head(read_header(folder / ADAPTER))


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelRefused(f"{path} is not JSON: {error}", "download or save the model again") from error
    if not isinstance(document, dict):
        raise ModelRefused(f"{path} is not a JSON object", "download or save the model again")
    return document


def _digest(files: Iterable[tuple[str, Path]], cache: Path | None) -> str:
    lines = (f"{kind}/{path.name} {_file_digest(path, cache)}\n" for kind, path in files)
    return digest_bytes("".join(lines).encode())


def _file_digest(path: Path, cache: Path | None) -> str:
    """sha256 of a file; remembered while its path, size and time of change stay the same."""
    if cache is None:
        return digest_file(path)
    real = path.resolve()
    facts = real.stat()
    entry = cache / "digests" / hashlib.sha256(f"{real}|{facts.st_size}|{facts.st_mtime_ns}".encode()).hexdigest()
    known = entry.read_text() if entry.is_file() else ""
    if re.fullmatch(r"[0-9a-f]{64}", known):
        return known
    digest = digest_file(real)
    with contextlib.suppress(ResourceError), publishing(entry) as temporary:  # a digest that is not remembered is as good
        temporary.write_text(digest)
    return digest
