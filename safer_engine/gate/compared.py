"""Facts of a comparison with the baseline, for rules such as `fact: comparison.groups[axis=safety].changed`.

`comparison.groups`: slices of the common evaluation pairs (`safer_engine.science.comparison.SliceChange`).
`comparison.features`: safety features of the baseline whose figures both reports have, where both audits used the same SAE.
A is the baseline, B the audit under judgement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from safer_engine.errors import InputRefused, SpecError
from safer_engine.gate.documents import Audit, in_slice
from safer_engine.gate.facts import Figure, Missing, find_facts
from safer_engine.gate.intervals import REPORT_TAIL, Spread, apart_spread, stretched_spread
from safer_engine.gate.paired import Shared
from safer_engine.gate.paths import parse_path
from safer_engine.gate.shapes import is_number
from safer_engine.science.comparison import PairMargins, SliceChange, compare_pairs, margin_scales

SECTION = "comparison"
_GROUPS, _FEATURES = "groups", "features"
_MANY_DEGREES = 1e9
Place = tuple[str | None, str | None]


def is_comparison(path: str) -> bool:
    """Whether a fact is of the comparison with the baseline."""
    return parse_path(path)[0].key == SECTION


def margins_of(shared: Shared) -> list[PairMargins]:
    """The common pairs of an audit (B) and its only baseline (A)."""
    return [
        PairMargins(new.pair_id, new.group, new.axis, new.subset, old.margin, new.margin, old.longer_by, new.longer_by)
        for new, (old,) in shared.pairs
    ]


def compared_slices(shared: Shared) -> list[tuple[Place, SliceChange]]:
    """All common pairs, each axis and each subset. Raises NumericalError where a model's margins are all 0."""
    pairs = margins_of(shared)
    scales = margin_scales(pairs)
    axes = sorted({pair.axis for pair in pairs})
    places: list[Place] = [(None, None), *((axis, None) for axis in axes)]
    places += sorted({(pair.axis, pair.subset) for pair in pairs})
    by_id = {pair.pair_id: pair for pair in pairs}
    common = [new for new, _ in shared.pairs]
    return [(place, compare_pairs([by_id[one.pair_id] for one in in_slice(common, *place)], scales)) for place in places]


def comparison_facts(path: str, audit: Audit, baselines: Sequence[Audit], shared: Shared) -> list[Figure] | Missing:
    """What a path below `comparison` leads to.

    Raises:
        SpecError: there is no such place. InputRefused: figures of a report are not as an audit writes them.
    """
    if not baselines:
        return Missing("nothing", "no baseline was given")
    if len(baselines) > 1:
        return Missing("not_computed", "a comparison is with one baseline; several were given")
    section = parse_path(path)[1].key if len(parse_path(path)) > 1 else ""
    if section not in (_GROUPS, _FEATURES):
        raise SpecError(f"{path}: a comparison has no {section or 'figure of its own'}", f"it has {_GROUPS} and {_FEATURES}")
    if section == _GROUPS:
        if shared.reason or not shared.pairs:
            return Missing("not_computed", shared.reason or "no evaluation pair is in both audits")
        slices = [{"axis": axis, "subset": subset, **asdict(found)} for (axis, subset), found in compared_slices(shared)]
        return _found({_GROUPS: slices}, path)
    rows = _drifts(audit, baselines[0])
    return rows if isinstance(rows, Missing) else _found({_FEATURES: rows}, path)


def _found(section: dict[str, Any], path: str) -> list[Figure] | Missing:
    return find_facts({SECTION: section, "provenance": {"not_computed": {}}}, path)


def _drifts(audit: Audit, baseline: Audit) -> list[dict[str, Any]] | Missing:
    """Safety features of the baseline that are candidates of both."""
    digests = [_sae(each).get("digest") for each in (audit, baseline)]
    if digests[0] is None or digests[0] != digests[1]:
        return Missing("not_computed", "the two audits do not share an SAE, so their latents are not the same")
    if not all(_sae(each).get("interpretable") is True for each in (audit, baseline)):
        return Missing("not_computed", "reward recovered is below its floor in one audit: features are not interpreted")
    fvus = [_sae(each).get("fvu") for each in (audit, baseline)]
    if any(isinstance(fvu, int | float) and fvu >= 1 for fvu in fvus):
        return Missing("not_computed", "the SAE explains none of the variance of one model's activations (FVU of 1 or more)")
    new = {row["latent_id"]: row for row in _candidates(audit)}
    sds = margin_sd(baseline), margin_sd(audit)
    rows = [
        _drift(old, new[old["latent_id"]], *sds)
        for old in _candidates(baseline)
        if old.get("safety_feature") is True and old["latent_id"] in new
    ]
    return rows or Missing("nothing", "no safety feature of the baseline is a candidate of both audits")


def margin_sd(audit: Audit) -> float | None:
    """SD of the margins of the pairs that latents were ablated on; None where none were."""
    causal = audit.report.get("causal")
    found = causal.get("margin_sd") if isinstance(causal, dict) else None
    return float(found) if isinstance(found, int | float) and is_number(found) and found > 0 else None


def scaled_effect(row: dict[str, Any], sd: float | None) -> dict[str, Any]:
    """`effect`, `effect_lo`, `effect_hi`: a latent's causal effect in SDs of its model's margins; null where there is none.

    Raises:
        InputRefused: a figure is no number.
    """
    found: dict[str, Any] = {}
    for end in ("", "_lo", "_hi"):
        value = row.get(f"causal_effect{end}")
        if value is not None and not is_number(value):
            raise InputRefused("a causal effect of a report is no number", "give a report.json as the audit wrote it")
        found[f"effect{end}"] = None if value is None or sd is None else value / sd
    return found


def _drift(old: dict[str, Any], new: dict[str, Any], old_sd: float | None, new_sd: float | None) -> dict[str, Any]:
    same_axis = old.get("axis") == new.get("axis")
    rates = [each.get("firing_rate") for each in (old, new)]
    known = all(is_number(rate) for rate in rates)
    return {
        "latent_id": old["latent_id"],
        "axis": old.get("axis"),
        "direction": old.get("direction"),
        "still_safety_feature": new.get("safety_feature") is True,
        "firing_ratio": rates[1] / rates[0] if known and rates[0] else None,
        "salience_change": drift("salience", old, new) if same_axis else None,
        "effect_change": drift("effect", scaled_effect(old, old_sd), scaled_effect(new, new_sd)),
    }


def drift(name: str, old: dict[str, Any], new: dict[str, Any]) -> dict[str, float | None] | None:
    """new − old of a figure with `_lo` and `_hi` beside it; its interval takes the two as independent. None: one is not known.

    Raises:
        InputRefused: a figure is no number, or lies outside its interval.
    """
    values = [each.get(name) for each in (old, new)]
    if any(value is None for value in values):
        return None
    if not all(map(is_number, values)):
        raise InputRefused(f"the figure {name} of a report is no number", "give a report.json as the audit wrote it")
    before, after = (float(value) for value in values if value is not None)
    first, second = (_spread(each[name], each.get(f"{name}_lo"), each.get(f"{name}_hi"), name) for each in (old, new))
    if first is None or second is None:
        return {"estimate": after - before, "lo": None, "hi": None}
    ends = apart_spread(after, second, before, first)(REPORT_TAIL)
    return {"estimate": after - before, "lo": ends.lo, "hi": ends.hi}


def _spread(value: float, lo: Any, hi: Any, name: str) -> Spread | None:
    if lo is None or hi is None:
        return None
    if not is_number(lo) or not is_number(hi) or lo > hi:
        raise InputRefused(f"the interval of {name} in a report is none", "give a report.json as the audit wrote it")
    return stretched_spread(value, lo, hi, _MANY_DEGREES)


def _sae(audit: Audit) -> dict[str, Any]:
    found = audit.report.get("sae")
    return found if isinstance(found, dict) else {}


def _candidates(audit: Audit) -> list[dict[str, Any]]:
    found = audit.report.get("features")
    rows = found if isinstance(found, list) else []
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("latent_id"), int)]
