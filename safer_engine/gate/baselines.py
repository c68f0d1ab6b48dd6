"""How a baseline among the audits of a service is named: by id, or by a label. Which audits may be baselines together."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass

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
    if not all(each.digest("model") for each in (audit, *baselines)):
        raise InputRefused(
            "several baselines are told apart by their models' digests, and a report has none",
            "give reports as the audit wrote them",
        )
    own, known = _identity(audit), sorted((_identity(each) for each in baselines), key=lambda each: (each.model, each.content))
    for one, other in itertools.combinations(known, 2):
        if one.same(other):
            raise InputRefused(
                f"two of the baselines are the same training: model {one.model[:_DIGITS]} and model {other.model[:_DIGITS]}",
                "give each training once: the spread between trainings is taken from them",
            )
    if any(own.same(each) for each in known):
        raise InputRefused(
            f"the reward model under judgement, {own.model[:_DIGITS]}, is one of the {len(known)} baselines",
            "leave it out: it is compared with what the other trainings come to",
        )
    return tuple(each.audit for each in known)


@dataclass(frozen=True)
class _Identity:
    """What tells a training from others. `content`: digest of its report."""

    audit: Audit
    model: str
    content: str
    margins: dict[str, float]

    def same(self, other: _Identity) -> bool:
        """The same model, report, or margins: one that was saved anew has another digest, and its rewards are the same."""
        if self.model == other.model or self.content == other.content:
            return True
        common = self.margins.keys() & other.margins.keys()
        differ = any(self.margins[name] != other.margins[name] for name in common)
        return len(common) > 1 and not differ and any(self.margins[name] for name in common)


def _identity(audit: Audit) -> _Identity:
    content = hashlib.sha256(json.dumps(audit.report, sort_keys=True).encode()).hexdigest()
    return _Identity(audit, audit.digest("model") or "", content, {pair.pair_id: pair.margin for pair in audit.pairs or ()})
