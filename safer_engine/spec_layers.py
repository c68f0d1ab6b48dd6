"""From a spec file, a preset and flags to one validated spec, knowing where each value came from."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
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
    """One source of values.

    Attributes:
        name: what `spec show` prints as their origin.
        goes_on: whether the document is a part of that of the layer before, so that they make it up together.
    """

    name: str
    document: Document
    goes_on: bool = False


@dataclass(frozen=True)
class BuiltSpec:
    """A validated spec.

    Attributes:
        origins: the origin of each value that is not a default, by dotted path.
        contradictions: values from below the layer that names the preset, other than the preset has them, in words.
    """

    spec: AuditSpec
    origins: dict[str, str]
    contradictions: tuple[str, ...] = ()


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
    expanded = [replace(layer, document=expand(layer.document)) for layer in layers]
    naming = max((place for place, layer in enumerate(expanded) if "preset" in layer.document), default=-1)
    below = [layer.name for layer in expanded[: max(0, naming)]]
    if naming >= 0 and expanded[naming].document["preset"] == "paper":
        expanded.insert(0, Layer("preset paper", PAPER_PRESET))
    document: Document = {}
    origins: dict[str, str] = {}
    for layer in _whole(expanded):
        document = merge(document, layer.document)
    for layer in expanded:
        origins.update({path: layer.name for path, _ in leaves(layer.document)})
    origins = {path: origins[path] for path, _ in leaves(document)}
    try:
        spec = AuditSpec.model_validate(with_kinds(document))
    except ValidationError as error:
        raise SpecError(_explain(error), "see `safer-audit spec schema` for every key") from None
    lower = [path for path, name in origins.items() if name in below]
    departures = preset_departures(spec.model_dump(mode="json")).items()
    return BuiltSpec(spec, origins, tuple(text for key, text in departures if any(f"{p}.".startswith(f"{key}.") for p in lower)))


def _whole(layers: list[Layer]) -> Iterator[Layer]:
    """The layers, those that go on put together."""
    for place, layer in enumerate(layers):
        if layer.goes_on:
            continue
        document = layer.document
        for part in itertools.takewhile(lambda following: following.goes_on, layers[place + 1 :]):
            document = merge(document, part.document, whole=False)
        yield replace(layer, document=document)


def preset_departures(document: Document) -> dict[str, str]:
    """Values of a complete spec, as a document, other than its preset has them: key → both, in words."""
    if document["preset"] != "paper":
        return {}
    return {
        f"{section}.{key}": f"{section}.{key} is {_short(document[section][key])} (preset: {_short(meant)})"
        for section, values in PAPER_PRESET.items()
        for key, meant in values.items()
        if document[section][key] != meant
    }


def _short(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()


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
    place, _, split = text.rpartition("#")
    if place and split and Path(place).expanduser().is_dir():
        return {"kind": "local", "path": place, "split": split}
    if place and split and Path(place).expanduser().exists():
        raise SpecError(f"{place} is a file, and a file has no splits", f"leave out #{split}")
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
    """A spec file (YAML or JSON). A section of which the file has no more than the name is left out.

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
    return _without_empty(document, [AuditSpec])


def _without_empty(document: Document, models: list[type[BaseModel]]) -> Document:
    kept: Document = {}
    for key, value in document.items():
        inner = [found for model in models for found in _models_in(model, str(key))]
        full = _without_empty(value, inner) if inner and isinstance(value, dict) else value
        if not (inner and (value is None or (full == {} and value))):
            kept[key] = full
    return kept


def parse_assignments(texts: Iterable[str]) -> Document:
    """Several `section.key=value` as one document, in whatever order they come. Raises SpecError."""
    document: Document = {}
    for text in texts:
        document = merge(document, parse_assignment(text), whole=False)
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
    for section in ("dataset", "evaluation"):
        value = document.get(section)
        if isinstance(value, dict) and isinstance(value.get("source"), dict) and "path" in value["source"]:
            kinds[section] = {"source": {"kind": "local"}}
    return merge(kinds, document, whole=False)


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
