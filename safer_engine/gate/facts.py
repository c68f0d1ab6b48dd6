"""Facts of a report: what a path leads to, as figures with intervals, or why there is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from safer_engine.errors import InputRefused, SpecError
from safer_engine.gate.intervals import Spread, apart_spread, share_spread, stretched_spread, wider_spread
from safer_engine.gate.paths import Step, parse_path
from safer_engine.gate.shapes import SHARES, fault_of_estimate

TALLIES = frozenset({"actions", "dropped", "not_scored", "statuses", "contested_by"})
"""Counts by name: a name that is not there was counted zero times."""
_NAMED = ("axis", "subset", "name", "arm", "reference", "latent_id")
_GAP = ("gap", "accuracy_longer", "accuracy_shorter")
"""A difference of two shares, and these, as they stand side by side in a report."""
_BESIDE = frozenset({"score", "kappa", "value", "change"})
"""Figures whose interval stands beside them as `lo` and `hi`."""
_MANY_DEGREES = 1e9


@dataclass(frozen=True)
class Figure:
    """A number, boolean or text of a report.

    Attributes:
        label: what tells it from others of the same path (`axis=safety`), empty where nothing does.
        slice: axis and subset of the slice it is of.
        spread: its interval; None for a figure that is exact, or as it stands.
        unsure: why there is no interval though there should be one.
        key: last key of its path.
        note: how it was come by, where that needs saying.
        n, n_groups: values and groups behind it, where the report says.
        absent: why it is null, as in `Missing`, where other figures of the same path are there; `unsure` says it in words.
        training_sd: of a change from several baselines, the standard deviation of their values.
    """

    value: float | bool | str
    label: str = ""
    slice: tuple[str | None, str | None] = (None, None)
    spread: Spread | None = None
    unsure: str = ""
    key: str = ""
    n: int | None = None
    n_groups: int | None = None
    note: str = ""
    absent: Literal["", "not_computed", "nothing"] = ""
    training_sd: float | None = None

    @property
    def number(self) -> float:
        """The value of a figure that is a number; a boolean counts 0 or 1. Raises SpecError for a text."""
        if isinstance(self.value, str):
            raise SpecError(f"the fact {self.key} is a text, which has no bounds", "use equals")
        return float(self.value)


@dataclass(frozen=True)
class Missing:
    """No figure. `kind`: `not_computed` (the report says so), `nothing` (no item is meant, or the data have no such thing)."""

    kind: Literal["not_computed", "nothing"]
    reason: str


@dataclass(frozen=True)
class _Node:
    """Where a walk down the document has come to. `trail`: keys, with [] for items of lists."""

    value: Any
    trail: str = ""
    item: dict[str, Any] = field(default_factory=dict)
    parent: Any = None


def find_facts(report: dict[str, Any], path: str) -> list[Figure] | Missing:
    """What a path leads to, at least one figure.

    Raises:
        SpecError: the report has no such place; the keys that it has there are named.
    """
    *inner, last = parse_path(path)
    nodes, absent = [_Node(report)], list[_Node]()
    for step in inner:
        found = [item for node in nodes for item in _items(_into(node, step, path))]
        nodes, absent = _there(found), absent + _null(found)
    found = [_into(node, last, path) for node in nodes]
    nodes, absent = _there(found), absent + _null(found)
    if not nodes:
        return _missing(report, absent[0]) if absent else Missing("nothing", f"nothing in the report is meant by {path}")
    return [_figure(node, last.key, path) for node in nodes] + [_no_figure(report, node, last.key) for node in absent]


def _into(node: _Node, step: Step, path: str) -> _Node:
    if not isinstance(node.value, dict):
        raise SpecError(f"{path}: {node.trail} has no parts, so no {step.key}", "see docs/report.schema.json")
    trail = f"{node.trail}.{step.key}".lstrip(".")
    if step.key not in node.value:
        if node.trail.rpartition(".")[2] in TALLIES:
            return _Node(0, trail, node.item, node.value)
        known = ", ".join(sorted(node.value)[:30]) or "nothing"
        raise SpecError(f"{path}: the report has no {trail}", f"there it has: {known}")
    value = node.value[step.key]
    if value is None and step.conditions is not None:
        return _Node(None, trail, node.item, node.value)
    if step.conditions is not None:
        if not isinstance(value, list):
            raise SpecError(f"{path}: {trail} is no list that brackets could choose from", "leave the brackets out")
        value = [item for item in value if step.chooses(item)]
    return _Node(value, trail, node.item, node.value)


def _items(node: _Node) -> Iterator[_Node]:
    if not isinstance(node.value, list):
        yield node
        return
    for item in node.value:
        own = {name: item[name] for name in _NAMED if item.get(name) is not None} if isinstance(item, dict) else {}
        yield _Node(item, f"{node.trail}[]", {**node.item, **own}, node.value)


def _there(nodes: Sequence[_Node]) -> list[_Node]:
    return [node for node in nodes if node.value is not None]


def _null(nodes: Sequence[_Node]) -> list[_Node]:
    return [node for node in nodes if node.value is None]


def _no_figure(report: dict[str, Any], node: _Node, key: str) -> Figure:
    """In place of one of several figures: it is null, and the others are not."""
    missing = _missing(report, node)
    place = (node.item.get("axis"), node.item.get("subset"))
    return Figure(0.0, _label(node), place, unsure=missing.reason, key=key, absent=missing.kind)


def _label(node: _Node) -> str:
    return ", ".join(f"{name}={value}" for name, value in node.item.items())


def _missing(report: dict[str, Any], node: _Node) -> Missing:
    """Why a place is null."""
    reasons = report["provenance"]["not_computed"]
    parts = node.trail.split(".")
    above = [".".join(parts[: length + 1]) for length in range(len(parts))]
    named = next((name for name in above if name in reasons), None)
    if named is not None:
        return Missing("not_computed", f"{named} is null in the report; provenance.not_computed there says why")
    return Missing("nothing", f"{node.trail} is null in the report: these data have none")


def _figure(node: _Node, key: str, path: str) -> Figure:
    label = _label(node)
    place = (node.item.get("axis"), node.item.get("subset"))
    value = node.value
    if isinstance(value, list):
        return Figure(float(len(value)), label, place, key=key)
    if isinstance(value, dict):
        return _gap(node, _estimate(value, label, place, key, path))
    if isinstance(value, bool | str):
        return Figure(value, label, place, key=key)
    if not isinstance(value, int | float):
        raise SpecError(f"{path} leads to no figure", "see docs/report.schema.json")
    beside = node.parent if isinstance(node.parent, dict) else {}
    if f"{key}_lo" in beside and f"{key}_hi" in beside:
        return _with_interval({"estimate": value, "lo": beside[f"{key}_lo"], "hi": beside[f"{key}_hi"]}, label, place, key)
    if key in _BESIDE and "lo" in beside and "hi" in beside:
        return _with_interval({"estimate": value, "lo": beside["lo"], "hi": beside["hi"]}, label, place, key)
    return Figure(float(value), label, place, key=key)


def _gap(node: _Node, figure: Figure) -> Figure:
    """A difference of shares is no surer than the two: a bootstrap that saw no error on one side has no width there."""
    if figure.key != _GAP[0] or figure.spread is None or not isinstance(node.parent, dict):
        return figure
    parts = [node.parent.get(name) for name in _GAP[1:]]
    longer, shorter = (_with_interval(p, "", (None, None), _GAP[1]) if isinstance(p, dict) else None for p in parts)
    if longer is None or shorter is None or longer.spread is None or shorter.spread is None:
        return replace(figure, spread=None, unsure="the two accuracies that it is the difference of have no interval")
    apart = apart_spread(longer.number, longer.spread, shorter.number, shorter.spread)
    return replace(figure, spread=wider_spread(figure.number, figure.spread, longer.number - shorter.number, apart))


def _estimate(value: dict[str, Any], label: str, place: tuple[str | None, str | None], key: str, path: str) -> Figure:
    if "estimate" in value:
        return _with_interval(value, label, place, key)
    if all(isinstance(part, int | float) and not isinstance(part, bool) for part in value.values()):
        return Figure(float(sum(value.values())), label, place, key=key)
    raise SpecError(f"{path} leads to a whole section, not to a figure", f"it has: {', '.join(sorted(value)[:30])}")


def _with_interval(value: dict[str, Any], label: str, place: tuple[str | None, str | None], key: str) -> Figure:
    if fault := fault_of_estimate(value, key):
        raise InputRefused(f"the figure {key} of a report {fault}", "give a report.json as the audit wrote it")
    estimate: float = value["estimate"]
    lo, hi, n, groups = (value.get(name) for name in ("lo", "hi", "n", "n_groups"))
    if lo is None or hi is None or (groups is not None and groups < 2):
        return Figure(float(estimate), label, place, None, "it has no interval: there are fewer than two groups", key, n, groups)
    if key in SHARES and n is not None and groups is not None:
        spread = share_spread(estimate, lo, hi, n, groups)
    else:
        spread = stretched_spread(estimate, lo, hi, _MANY_DEGREES if groups is None else groups - 1)
    return Figure(float(estimate), label, place, spread, "", key, n, groups)
