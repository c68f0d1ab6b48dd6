"""What people decided on pairs: read from a file or the spec. Probabilities are checked and recalibrated by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from safer_engine.errors import SpecError
from safer_engine.science.edits import ACTIONS
from safer_engine.spec_suspicion import PairDecision
from safer_engine.store import canonical_json, digest_bytes

if TYPE_CHECKING:
    from safer_engine.spec import AuditSpec

_MAX_BYTES = 1 << 30
_HINT = "compare it with docs/formats.md, “Decisions of reviewers”"
_WRONG: dict[str, bool | None] = {"keep": False, "drop": True, "flip": True, "review": None}


def load_decisions(given: str | tuple[PairDecision, ...] | None) -> tuple[PairDecision, ...]:
    """The decisions of a spec, from their file where it names one, in the order of the digests.

    The file is JSONL: entries of `PairDecision`, or lines of an `edits.jsonl` that a service exported; of these the ones with a
    `decision` count.

    Raises:
        SpecError: there is no such file, it cannot be read, or a row was decided on twice.
    """
    found = _read(given) if isinstance(given, str) else tuple(given or ())
    seen: set[str] = set()
    for decision in found:
        if decision.content_digest in seen:
            raise SpecError(
                f"suspicion.decisions: the row {decision.content_digest} is decided on twice", "leave one of the entries out"
            )
        seen.add(decision.content_digest)
    return tuple(sorted(found, key=lambda one: one.content_digest))


def decision_digests(spec: AuditSpec) -> dict[str, str]:
    """The digest of the decisions by the spec section that names them, for `ResolvedInputs.extra`; empty without any.

    Who decided does not enter: it changes no result. Raises SpecError.
    """
    if spec.suspicion.decisions is None:
        return {}
    return {"suspicion": decisions_digest(load_decisions(spec.suspicion.decisions))}


def decisions_digest(decisions: tuple[PairDecision, ...]) -> str:
    """Digest of decisions."""
    return digest_bytes(canonical_json([[one.content_digest, one.wrong] for one in decisions]))


def _read(name: str) -> tuple[PairDecision, ...]:
    path = Path(name).expanduser()
    if not path.is_file():
        raise SpecError(f"there is no file of decisions {name!r}", "suspicion.decisions is the path of a JSONL file")
    if path.stat().st_size > _MAX_BYTES:
        raise SpecError(f"the decisions {path} are larger than {_MAX_BYTES} bytes", _HINT)
    found = []
    try:
        with path.open(encoding="utf-8") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip() and (decision := _entry(line, f"{path.name}:{number}")) is not None:
                    found.append(decision)
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"decisions {path} cannot be read: {error}", _HINT) from error
    if not found:
        raise SpecError(f"{path} holds no decision", _HINT)
    return tuple(found)


def _entry(line: str, where: str) -> PairDecision | None:
    try:
        value: Any = json.loads(line)
        if isinstance(value, dict) and "action" in value:
            return _of_edit(value)
        return PairDecision.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the entry"
        raise SpecError(f"{where}: {place}: {first['msg']}", _HINT) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise SpecError(f"{where} is no decision: {error}", _HINT) from error


def _of_edit(line: dict[str, Any]) -> PairDecision | None:
    """A line of `edits.jsonl`; None where nobody decided."""
    decision = line.get("decision")
    if decision is None:
        return None
    if not isinstance(decision, dict) or line["action"] not in ACTIONS:
        raise ValueError("`decision` is no object, or `action` is none of the four")
    by = str(decision.get("reviewer", ""))[:80]
    return PairDecision.model_validate({"content_digest": line.get("content_digest"), "wrong": _WRONG[line["action"]], "by": by})
