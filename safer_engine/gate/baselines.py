"""How a baseline among the audits of a service is named: by id, or by a label. Which audits may be baselines together."""

from __future__ import annotations

import hashlib
import itertools
import json

from safer_engine.errors import InputRefused, SpecError
from safer_engine.gate.documents import Audit

LABEL = "label:"
ALIAS = "alias"
_DIGITS = 12


def label_of(text: str) -> tuple[str, str] | None:
    """Name and value of `label:NAME=VALUE`, or of `label:X`, which is short for `label:alias=X`; None for anything else.

    Raises:
        SpecError: it begins so, and cannot be read.
    """
    if not text.startswith(LABEL):
        return None
    name, separator, value = text.removeprefix(LABEL).partition("=")
    name, value = (name, value) if separator else (ALIAS, name)
    if not name or not value:
        raise SpecError(
            f"the baseline {text!r} cannot be read",
            f"write {LABEL}NAME=VALUE, or {LABEL}production for {LABEL}{ALIAS}=production",
        )
    return name, value


def told_apart(audit: Audit, baselines: tuple[Audit, ...]) -> tuple[Audit, ...]:
    """Baselines in an order that does not depend on how they were given. One is taken as it is.

    Several stand for what trainings of a recipe come to: one of them twice would make these look alike, and so would the one
    under judgement among them.

    Raises:
        InputRefused: two of them are the same audit or the same reward model, one is the audit under judgement or its reward
            model, or one does not say which model it is of.
    """
    if len(baselines) < 2:
        return baselines
    ordered = sorted(baselines, key=lambda each: (each.digest("model") or "", _content(each)))
    if not all(each.digest("model") for each in (audit, *ordered)):
        raise InputRefused(
            "several baselines are told apart by their models' digests, and a report has none",
            "give reports as the audit wrote them",
        )
    for one, other in itertools.combinations(ordered, 2):
        if _same(one, other):
            raise InputRefused(
                f"two of the baselines are the same training: both are of model {_model(one)}",
                "give each training once: the spread between trainings is taken from them",
            )
    if any(_same(audit, each) for each in ordered):
        raise InputRefused(
            f"the reward model under judgement, {_model(audit)}, is one of the {len(ordered)} baselines",
            "leave it out: it is compared with what the other trainings come to",
        )
    return tuple(ordered)


def _same(one: Audit, other: Audit) -> bool:
    """The same model, report, or margins: a model that was saved anew has another digest, and all its rewards are the same."""
    if one.digest("model") == other.digest("model") or _content(one) == _content(other):
        return True
    return one.pairs is not None and other.pairs is not None and len(one.pairs) > 1 and _margins(one) == _margins(other)


def _margins(audit: Audit) -> dict[str, float]:
    return {pair.pair_id: pair.margin for pair in audit.pairs or ()}


def _content(audit: Audit) -> str:
    return hashlib.sha256(json.dumps(audit.report, sort_keys=True).encode()).hexdigest()


def _model(audit: Audit) -> str:
    return (audit.digest("model") or "")[:_DIGITS]
