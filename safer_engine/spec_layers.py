"""From a spec file, a preset and flags to one validated spec, knowing where each value came from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from safer_engine.errors import SpecError
from safer_engine.spec import PAPER_PRESET, AuditSpec, merge

Document = dict[str, Any]
_HUB_ID = re.compile(r"^(?P<path>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?:#(?:(?P<name>[\w.-]+)/)?(?P<split>[\w.-]+))?$")


@dataclass(frozen=True)
class Layer:
    """One source of values, `name` being what `spec show` prints as their origin."""

    name: str
    document: Document


@dataclass(frozen=True)
class BuiltSpec:
    """A validated spec, and the origin of each value that is not a default, by dotted path."""

    spec: AuditSpec
    origins: dict[str, str]


@dataclass(frozen=True)
class SpecProblem:
    """What is wrong at one place of a document; `path` is empty for the whole."""

    path: str
    message: str


def build_spec(layers: list[Layer]) -> BuiltSpec:
    """Merge layers, later ones winning, over the preset that they name.

    Raises:
        SpecError: unknown keys (the known ones are listed), values out of range, sections missing.
    """
    expanded = [Layer(layer.name, expand(layer.document)) for layer in layers]
    preset = next((x.document["preset"] for x in reversed(expanded) if "preset" in x.document), "default")
    if preset == "paper":
        expanded.insert(0, Layer("preset paper", PAPER_PRESET))
    document: Document = {}
    origins: dict[str, str] = {}
    for layer in expanded:
        document = merge(document, layer.document)
        origins.update({path: layer.name for path, _ in leaves(layer.document)})
    try:
        spec = AuditSpec.model_validate(with_kinds(document))
    except ValidationError as error:
        raise SpecError(_explain(error), "see `safer-audit spec schema` for every key") from None
    return BuiltSpec(spec, origins)


def expand(document: Document) -> Document:
    """Write out the shorthands `model: M`, `dataset: D`, `evaluation: E` and `source: D`."""
    full = dict(document)
    if isinstance(full.get("model"), str):
        full["model"] = {"path": full["model"]}
    for section in ("dataset", "evaluation"):
        value = full.get(section)
        if isinstance(value, str):
            full[section] = {"source": parse_source(value)}
        elif isinstance(value, dict) and isinstance(value.get("source"), str):
            full[section] = {**value, "source": parse_source(value["source"])}
    return full


def parse_source(text: str) -> Document:
    """A dataset argument: an existing path, a folder with `#split`, else a hub id `org/name[@revision][#[config/]split]`.

    Raises:
        SpecError: neither.
    """
    if Path(text).expanduser().exists():
        return {"kind": "local", "path": text}
    folder, _, split = text.rpartition("#")
    if folder and split and Path(folder).expanduser().is_dir():
        return {"kind": "local", "path": folder, "split": split}
    found = hub_source(text)
    if found is None:
        raise SpecError(f"dataset {text!r} does not exist", "give a file, a folder[#split], or org/name[@revision][#split]")
    return found


def hub_source(text: str) -> Document | None:
    """A hub id `org/name[@revision][#[config/]split]` as a source; None for anything else. Looks at no file."""
    match = _HUB_ID.match(text)
    if match is None or Path(text).suffix in {".jsonl", ".json", ".parquet", ".csv", ".gz"}:
        return None
    return {"kind": "hub", **{key: value for key, value in match.groupdict().items() if value}}


def read_document(path: Path) -> Document:
    """A spec file (YAML or JSON).

    Raises:
        SpecError: it cannot be read, or is not a mapping.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"cannot read spec {path}: {error.strerror}", "make one with `safer-audit spec init`") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"spec {path} is not valid YAML: {error}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise SpecError(f"spec {path} must be a mapping of sections, not {type(document).__name__}")
    return document


def parse_assignment(text: str) -> Document:
    """`sae.k=32` as a document; the value is read as YAML.

    Raises:
        SpecError: no `=`, or the value is not YAML.
    """
    path, separator, value = text.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise SpecError(f"cannot read --set {text!r}", "write section.key=value, for example sae.k=32")
    try:
        document: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SpecError(f"value of --set {text!r} is not YAML: {error}") from None
    for key in reversed(keys):
        document = {key: document}
    return dict(document)


def leaves(document: Document, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every non-mapping value."""
    for key, value in document.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


def problems(error: ValidationError, root: type[BaseModel] = AuditSpec) -> list[SpecProblem]:
    """What is wrong with a document, each with the dotted path that the document has; unknown keys list the known ones.

    Args:
        root: the document's model.
    """
    found = []
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            known = _known_keys(item["loc"][:-1], root)
            message = f"unknown key; known here: {', '.join(known)}" if known else "unknown key"
        found.append(SpecProblem(".".join(_without_tags(item["loc"])), message))
    return found


def with_kinds(document: Document) -> Document:
    """The document with the default kind written into unions that name none."""
    kinds: Document = {}
    if isinstance(document.get("sae"), dict):
        kinds["sae"] = {"kind": "topk"}
    labels = document.get("labels")
    if isinstance(labels, dict) and isinstance(labels.get("labeller"), dict):
        kinds["labels"] = {"labeller": {"kind": "lexicon"}}
    return merge(kinds, document)


def _explain(error: ValidationError) -> str:
    return "the spec is invalid: " + "; ".join(f"{found.path or 'spec'}: {found.message}" for found in problems(error))


def _without_tags(location: tuple[int | str, ...]) -> list[str]:
    """An error's location as the document has it: pydantic adds the `kind` of a union after its field."""
    unions = {"sae", "source", "labeller", "corpus"}
    parts = [str(part) for part in location]
    return [part for before, part in zip(["", *parts], parts, strict=False) if before not in unions]


def _known_keys(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """Fields of the section at an error location; union tags count as path parts there."""
    candidates: list[type[BaseModel]] = [root]
    for part in location:
        following = [m for c in candidates for m in _models_in(c, str(part))]
        tagged = [c for c in candidates if c.model_fields.get("kind") and c.model_fields["kind"].default == part]
        candidates = following or tagged or candidates
    return sorted({name for c in candidates for name in c.model_fields})


def _models_in(model: type[BaseModel], field: str) -> list[type[BaseModel]]:
    if field not in model.model_fields:
        return []
    found: list[type[BaseModel]] = []
    pending: list[Any] = [model.model_fields[field].annotation]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        else:
            pending.extend(getattr(annotation, "__args__", ()))
    return found
