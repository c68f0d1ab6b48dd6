"""How a baseline among the audits of a service is named: by id, or by a label."""

from __future__ import annotations

from safer_engine.errors import SpecError

LABEL = "label:"
ALIAS = "alias"


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
