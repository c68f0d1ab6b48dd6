"""Whether parts of a report.json that the gate computes with are what an audit writes: a report may come from anywhere."""

from __future__ import annotations

_FIGURES = ("longer_chosen", "longer_preferred", "excess", "accuracy_longer", "accuracy_shorter", "gap", "correlation")
SHARES = frozenset({"accuracy", "accuracy_longer", "accuracy_shorter", "longer_chosen", "longer_preferred"})
"""Names of figures that are shares, in [0, 1]."""


def is_number(value: object) -> bool:
    """A number; JSON's true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: object) -> bool:
    """A whole number from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def fault_of_estimate(value: object, name: str) -> str:
    """What is wrong with a figure that has an interval; empty for nothing."""
    if not isinstance(value, dict) or not is_number(value.get("estimate")):
        return "has no estimate"
    lo, hi = value.get("lo"), value.get("hi")
    if not all(end is None or is_number(end) for end in (lo, hi)):
        return "has an interval that is not of numbers"
    if lo is not None and hi is not None and lo > hi:
        return "has an interval that ends before it begins"
    if not all(value.get(key) is None or is_count(value[key]) for key in ("n", "n_groups")):
        return "has counts that are no counts"
    if name in SHARES and not all(0 <= part <= 1 for part in (value["estimate"], lo, hi) if part is not None):
        return "is no share between 0 and 1"
    return ""


def fault_of_evaluation(evaluation: object) -> str:
    """What is wrong with a report's section on evaluation pairs, in a few words with the place; empty for nothing."""
    if not isinstance(evaluation, dict):
        return "evaluation is no section"
    for name, figures in (("groups", ("accuracy", "margin")), ("length", _FIGURES)):
        entries = evaluation.get(name, [] if name == "length" else None)
        if not isinstance(entries, list):
            return f"evaluation.{name} is no list"
        for place, entry in enumerate(entries):
            if fault := _fault_of_slice(entry, figures, nullable=name == "length"):
                return f"evaluation.{name}[{place}]{fault}"
    return ""


def _fault_of_slice(entry: object, figures: tuple[str, ...], *, nullable: bool) -> str:
    if not isinstance(entry, dict):
        return " is no slice"
    if not all(name in entry and isinstance(entry[name], str | None) for name in ("axis", "subset")):
        return " names no axis and subset"
    if nullable and not is_count(entry.get("n_equal")):
        return ".n_equal is no count"
    for name in figures:
        value = entry.get(name)
        if value is None and nullable:
            continue
        counted = isinstance(value, dict) and is_count(value.get("n")) and is_count(value.get("n_groups"))
        if fault := fault_of_estimate(value, name) or ("" if counted else "has counts that are no counts"):
            return f".{name} {fault}"
    return ""
