"""What people say in place of the labeller: read from a file or the spec, and only for the SAE they spoke of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from safer_engine.errors import SpecError
from safer_engine.labellers.rubric import Rubric, rubric_digest
from safer_engine.spec_labels import Correction, LabelSpec
from safer_engine.store import canonical_json, digest_bytes

_MAX_BYTES = 1 << 22
_HINT = "compare it with docs/labels.md, “Corrections by a person”"


def load_corrections(given: str | tuple[Correction, ...] | None) -> tuple[Correction, ...]:
    """The corrections of a spec, from their file where it names one.

    A YAML or JSON file holds `corrections`, a list, and may hold `sae` for all of them; a JSONL file an entry a line.

    Raises:
        SpecError: there is no such file, it cannot be read, or a latent is corrected twice.
    """
    found = _read(given) if isinstance(given, str) else tuple(given or ())
    seen: set[tuple[str, int]] = set()
    for correction in found:
        key = (correction.sae, correction.latent_id)
        if key in seen:
            raise SpecError(f"labels.corrections: latent {key[1]} of one SAE is corrected twice", "leave one of the entries out")
        seen.add(key)
    return found


def label_files_digest(spec: LabelSpec) -> str:
    """Digest of what the labels' section names: the rubric's file, and the corrections, wherever they stand. Raises SpecError."""
    corrections = load_corrections(spec.corrections)
    rubric = rubric_digest(spec.rubric)
    if not corrections:
        return rubric
    said = sorted((one.model_dump(mode="json") for one in corrections), key=lambda one: (one["sae"], one["latent_id"]))
    return digest_bytes(canonical_json({"rubric": rubric, "corrections": said}))


def check_directions(corrections: tuple[Correction, ...], rubric: Rubric) -> None:
    """Refuse a direction that the rubric does not have. Raises SpecError."""
    known = [direction.name for direction in rubric.directions]
    for correction in corrections:
        if correction.direction is not None and correction.direction not in known:
            raise SpecError(
                f"labels.corrections: latent {correction.latent_id}: the rubric {rubric.name} has no direction "
                f"{correction.direction!r}",
                f"use one of {', '.join(known) or '(it has none)'}, or leave it out",
            )


def _read(name: str) -> tuple[Correction, ...]:
    import yaml

    path = Path(name).expanduser()
    if not path.is_file():
        raise SpecError(
            f"there is no file of corrections {name!r}", "labels.corrections is the path of a YAML, JSON or JSONL file"
        )
    if path.stat().st_size > _MAX_BYTES:
        raise SpecError(f"the corrections {path} are larger than {_MAX_BYTES} bytes", _HINT)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            entries: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            entries = _entries(yaml.safe_load(text))
        return tuple(Correction.model_validate(entry) for entry in entries)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        if isinstance(error, ValidationError):
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "an entry"
            raise SpecError(f"corrections {path}: {where}: {first['msg']}", _HINT) from error
        raise SpecError(f"corrections {path} cannot be read: {error}", _HINT) from error


def _entries(document: Any) -> list[dict[str, Any]]:
    if (
        not isinstance(document, dict)
        or not isinstance(document.get("corrections"), list)
        or set(document) - {"sae", "corrections"}
    ):
        raise ValueError("it is not a mapping with `corrections`, a list, and perhaps `sae`")
    common = {"sae": document["sae"]} if "sae" in document else {}
    return [{**common, **entry} for entry in document["corrections"]]
