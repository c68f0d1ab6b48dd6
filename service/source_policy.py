"""What a spec that comes from a client may name: checked when it is submitted, and again by the worker that opens it.

A client names uploads, models and datasets of the hub, and places that the operator allows by prefix
(`SAFER_ALLOWED_SOURCES`). Nothing else of a worker can be reached through a spec: no path, no code, no address, no variable
of its environment.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import PurePosixPath

from safer_engine.drill_spec import DrillSpec
from safer_engine.labellers.rubric import built_in_rubrics, is_text, load_rubric
from safer_engine.spec import AuditSpec, DatasetSource, DatasetSpec, HubSource, LocalSource, RuntimeSpec
from safer_engine.spec_labels import ChatApiLabeller, LocalLmLabeller
from safer_engine.spec_layers import Layer, build_spec
from safer_engine.train_spec import TrainSpec
from service.errors import SourceNotAllowed
from service.infra.settings import Settings
from service.upload_names import UPLOAD, named_upload

HUB = "hub:"
S3 = "s3://"
LABELLER_KEY_VARIABLE = "OPENAI_API_KEY"
"""The one environment variable that a spec may name for a labeller's key."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?(?:@[\w./-]+)?")
_SPLIT = re.compile(r"[\w-][\w.-]*")
_DATASET_ROLES = ("dataset", "evaluation", "corpus")
_DEVICE_MAPS = (None, "auto", "balanced", "balanced_low_0", "sequential")
_HINT = "upload it, or name one of a hub; what else may be named is the operator's choice (SAFER_ALLOWED_SOURCES)"


@dataclass(frozen=True)
class Place:
    """Something outside a spec that it names.

    Attributes:
        role: `model`, `adapter`, `base`, `dataset`, `evaluation`, `corpus` or `labeller`.
        field: dotted path in the spec.
        name: as the spec says it; `hub:` is put before the id of something on a hub.
    """

    role: str
    field: str
    name: str


def check_audit(spec: AuditSpec, settings: Settings) -> None:
    """Refuse what a client's audit may not name. Raises SourceNotAllowed, naming the field; SpecError."""
    _check_places(places_of(spec), settings)
    _check_runtime(spec.runtime, settings)
    rubric, labeller = spec.labels.rubric, spec.labels.labeller
    if not is_text(rubric) and rubric not in built_in_rubrics() and not _allowed(rubric, settings):
        raise SourceNotAllowed(
            f"labels.rubric: {rubric!r} is not built in", f"use one of {', '.join(built_in_rubrics())}, or give its text"
        )
    if is_text(rubric):
        load_rubric(rubric)  # one that is none is refused when it is submitted
    if isinstance(spec.labels.corrections, str):
        raise SourceNotAllowed("labels.corrections: a path says nothing to a service", "give the entries themselves in the spec")
    if isinstance(spec.suspicion.decisions, str):
        raise SourceNotAllowed("suspicion.decisions: a path says nothing to a service", "give the entries themselves in the spec")
    if spec.sae.given is not None:
        raise SourceNotAllowed("sae.given: a path says nothing to a service", "leave it out; `safer-audit run` takes one")
    if isinstance(labeller, ChatApiLabeller):
        _check_labeller(labeller, settings)


def check_training(spec: TrainSpec, settings: Settings) -> None:
    """Refuse what a client's training may not name. Raises SourceNotAllowed, naming the field."""
    _check_places(places_of(spec), settings)
    _check_runtime(spec.runtime, settings)


def check_drill(spec: DrillSpec, settings: Settings) -> None:
    """Refuse what a client's drill may not name. Raises SourceNotAllowed, naming the field; SpecError."""
    _check_places(places_of(spec), settings)
    _check_runtime(spec.runtime, settings)
    named = {"model": {"path": spec.base}, "dataset": spec.dataset.model_dump(mode="json")}
    audit = build_spec([Layer("spec.audit", {**spec.audit, **named})]).spec
    check_audit(audit, settings)
    if more := [place for place in places_of(audit) if place.role not in {"model", "dataset"}]:
        raise SourceNotAllowed(
            f"audit.{more[0].field}: the audits of a drill name no models or data of their own", "leave it out"
        )


def places_of(spec: AuditSpec | TrainSpec | DrillSpec) -> tuple[Place, ...]:
    """Everything outside that a spec names. Raises SourceNotAllowed for rows in memory, which a spec cannot carry."""
    found = []
    if isinstance(spec, TrainSpec | DrillSpec):
        found.append(_model("base", "base", spec.base))
    else:
        found.append(_model("model", "model.path", spec.model.path))
        if spec.model.adapter is not None:
            found.append(_model("adapter", "model.adapter", spec.model.adapter))
        if isinstance(spec.labels.labeller, LocalLmLabeller):
            found.append(_model("labeller", "labels.labeller.path", spec.labels.labeller.path))
        if spec.retraining is not None:
            found.append(_model("base", "retraining.base", spec.retraining.base))
        if spec.sae.pretrain is not None:
            found.append(_source("corpus", "sae.pretrain.corpus", spec.sae.pretrain.corpus))
    sections: tuple[tuple[str, DatasetSpec | None], ...] = (("dataset", spec.dataset), ("evaluation", spec.evaluation))
    found += [_source(name, f"{name}.source", section.source) for name, section in sections if section is not None]
    return tuple(found)


def upload_digests(spec: AuditSpec | TrainSpec | DrillSpec) -> dict[str, str]:
    """Digests of the uploads that a spec names, as job inputs: `u:<role>`, apart from the content digests known later."""
    return {f"u:{place.role}": digest for place in places_of(spec) if (digest := named_upload(place.name)) is not None}


def at_revisions(spec: AuditSpec, inputs: Mapping[str, str]) -> AuditSpec:
    """An audit whose hub inputs are named at the commits that a job found (`<role>.revision` of its inputs)."""
    found = spec.model_dump()
    for place in places_of(spec):
        revision = inputs.get(f"{place.role}.revision")
        if revision is None or not place.name.startswith(HUB):
            continue
        *above, last = place.field.split(".")
        section = reduce(getitem, above, found)
        if place.role in _DATASET_ROLES:
            section["revision"] = revision
        else:
            section[last] = f"{section[last].partition('@')[0]}@{revision}"
    return AuditSpec.model_validate(found)


def _model(role: str, field: str, name: str) -> Place:
    elsewhere = name.startswith((UPLOAD, S3, "/"))
    if not elsewhere and not (_HUB_ID.fullmatch(name) and ".." not in name):
        raise SourceNotAllowed(f"{field}: {name!r} is neither an upload nor a hub id (org/name@revision)", _HINT)
    return Place(role, field, name if elsewhere else HUB + name)


def _source(role: str, field: str, source: DatasetSource) -> Place:
    if isinstance(source, HubSource):
        if not _HUB_ID.fullmatch(source.path) or ".." in source.path or "@" in source.path:
            raise SourceNotAllowed(f"{field}.path: {source.path!r} is not a hub id", "write org/name")
        return Place(role, f"{field}.path", HUB + source.path)
    if not isinstance(source, LocalSource):
        raise SourceNotAllowed(f"{field}: rows in memory cannot be sent in a spec", "upload a file, and name the upload")
    if source.split is not None and not _SPLIT.fullmatch(source.split):
        raise SourceNotAllowed(f"{field}.split: {source.split!r} is not the name of a split", "name a split such as train")
    return Place(role, f"{field}.path", source.path)


def _check_places(places: tuple[Place, ...], settings: Settings) -> None:
    for place in places:
        if not _allowed(place.name, settings):
            shown = place.name.removeprefix(HUB)
            raise SourceNotAllowed(f"{place.field}: {shown!r} is not among the allowed sources", _HINT)


def _allowed(name: str, settings: Settings) -> bool:
    if name.startswith(UPLOAD):
        return UPLOAD in settings.allowed_sources and named_upload(name) is not None
    if name.startswith(HUB):
        bare = name.partition("@")[0]
        return any(prefix == HUB or _within(bare, prefix) for prefix in settings.allowed_sources if prefix.startswith(HUB))
    if name.startswith(S3):
        key = name.removeprefix(S3)
        plain = not key.startswith("/") and posixpath.normpath(key) == key.rstrip("/") and not set("?#%\\\x00") & set(key)
        return plain and any(_within(name, prefix) for prefix in settings.allowed_sources if prefix.startswith(S3))
    absolute = name.startswith("/") and ".." not in PurePosixPath(name).parts and "\x00" not in name
    return absolute and any(_within(name, prefix) for prefix in settings.allowed_sources if prefix.startswith("/"))


def _within(name: str, prefix: str) -> bool:
    """Whether a name is the prefix or lies below it, at a slash."""
    bare = prefix.rstrip("/")
    return name == bare or name.startswith(f"{bare}/")


def _check_runtime(runtime: RuntimeSpec, settings: Settings) -> None:
    if runtime.trust_remote_code and not settings.trust_remote_code:
        raise SourceNotAllowed(
            "runtime.trust_remote_code: models may not bring code here", "the operator may allow it: SAFER_TRUST_REMOTE_CODE"
        )
    if runtime.device_map not in _DEVICE_MAPS:
        raise SourceNotAllowed(f"runtime.device_map: {runtime.device_map!r} is not offered", "use auto, or leave it out")


def _check_labeller(labeller: ChatApiLabeller, settings: Settings) -> None:
    field = "labels.labeller"
    if labeller.base_url.rstrip("/") not in {url.rstrip("/") for url in settings.labeller_urls}:
        raise SourceNotAllowed(
            f"{field}.base_url: this endpoint is not offered", "the operator names those that are in SAFER_LABELLER_URLS"
        )
    if labeller.api_key_env not in (None, LABELLER_KEY_VARIABLE):
        raise SourceNotAllowed(
            f"{field}.api_key_env: only {LABELLER_KEY_VARIABLE} can be named", "leave it out: the service knows the key"
        )
