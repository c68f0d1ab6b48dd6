"""What the causal stage ablates, and its tables."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from safer_engine.payload_files import nullable
from safer_engine.science.causal_stats import (
    LEAST_POOLED,
    Agreement,
    Null,
    against_controls,
    agreement,
    nearest_controls,
    rank_correlation,
)
from safer_engine.science.stats import Interval, group_bootstrap_mean

if TYPE_CHECKING:
    import pyarrow as pa

    from safer_engine.causal_run import Ablated, Attribution
    from safer_engine.science.ablation import Edit
    from safer_engine.spec_causal import CausalSpec

Floats = NDArray[np.float64]
Strata = list[tuple[dict[str, str | None], NDArray[np.bool_]]]
"""Values of columns, and which of the kept pairs have them."""
_RESAMPLES = 1000
_LEAST_EACH = 32
_LEVEL = 0.05
_CHOSEN_BY_EFFECT = "attribution"
LEAST_GROUPS = 10
"""Groups in which a latent fires, for its effect to be tested."""


@dataclass(frozen=True)
class Choice:
    """What is ablated.

    Attributes:
        roles: reported latents in order → safety, salience or attribution. controls: control latents ablated.
        near_FC: controls of each tested latent, nearest first. sets: name → its latents.
    """

    roles: dict[int, str]
    controls: tuple[int, ...]
    near_FC: NDArray[np.int64]
    sets: dict[str, tuple[int, ...]]

    @property
    def n_tested(self) -> int:
        """Reported latents that come first and are held against controls: all but those chosen for their effect."""
        return sum(role != _CHOSEN_BY_EFFECT for role in self.roles.values())

    @property
    def single(self) -> tuple[int, ...]:
        """Latents ablated one by one: reported ones, then controls."""
        return (*self.roles, *self.controls)


@dataclass(frozen=True)
class Measured:
    """All that the tables are made of."""

    pairs: pa.Table
    latents: pa.Table
    attribution: Attribution
    choice: Choice
    ablated: Ablated

    @cached_property
    def groups_P(self) -> NDArray[Any]:
        """Prompt group of each kept pair."""
        return np.asarray(self.pairs["group"].take(self.ablated.pair_P).to_pylist(), dtype=np.str_)

    @cached_property
    def by_axis(self) -> Strata:
        """All kept pairs, then those of each axis."""
        return self._strata("axis")

    @cached_property
    def by_subset(self) -> Strata:
        """All kept pairs, then those of each subset of an axis."""
        return self._strata("axis", "subset")

    def _strata(self, *columns: str) -> Strata:
        kept = self.pairs.select(list(columns)).take(self.ablated.pair_P).to_pylist()
        keys = [tuple(row.values()) for row in kept]
        strata: Strata = [(dict.fromkeys(columns), np.ones(len(keys), dtype=bool))]
        for key in sorted(set(keys)):
            strata.append((dict(zip(columns, key, strict=True)), np.asarray([other == key for other in keys])))
        return strata


def choose(latents: pa.Table, labels: pa.Table | None, found: Attribution, spec: CausalSpec) -> Choice:
    """Safety features, then candidates by rank up to `spec.features`, then the largest attributions; and controls of the former.

    The largest attributions are among the controls: without them the pool would lack its own largest effects, and any feature
    would look large beside it. Chosen by their effect, they are not tested themselves.
    """
    rows = latents.select(["latent_id", "candidate", "rank"]).to_pylist()
    ranked = sorted((row["rank"], row["latent_id"]) for row in rows if row["candidate"] and row["rank"] is not None)
    kept = [] if labels is None else [row for row in labels.to_pylist() if row["safety_feature"]]
    safety = [row["latent_id"] for row in sorted(kept, key=lambda row: (row["rank"] or 0, row["latent_id"]))]
    roles: dict[int, str] = dict.fromkeys(safety[: spec.features], "safety")
    for _, latent in ranked:
        if len(roles) < spec.features:
            roles.setdefault(latent, "salience")
    tested = list(roles)
    by_size = np.argsort(-np.abs(found.margin_S), kind="stable")
    more = [int(i) for i in by_size if found.margin_S[i] != 0 and int(i) not in roles][: spec.attributed]
    roles |= dict.fromkeys(more, _CHOSEN_BY_EFFECT)
    pool = [int(i) for i in np.flatnonzero(found.fired_S > 0) if int(i) not in tested]
    rate_S, energy_S = (np.asarray(latents[name].to_pylist(), dtype=np.float64) for name in ("firing_rate", "energy"))
    each = max(_LEAST_EACH, -(-LEAST_POOLED // max(1, len(tested))))
    near_FC = nearest_controls(rate_S, energy_S, tested, pool, each)
    columns = [near_FC[:, column] for column in range(near_FC.shape[1])]
    controls = tuple(latent for latent in _first_distinct(columns, spec.controls + len(more)) if latent not in roles)
    controls = controls[: spec.controls]
    members = [row for row, latent in enumerate(tested) if roles[latent] == "safety"]
    sets = {"safety": tuple(tested[row] for row in members)} if members else {}
    sets |= _control_sets(near_FC[members], spec.control_sets) if members else {}
    return Choice(roles, controls, near_FC, sets)


def _first_distinct(columns: list[NDArray[np.int64]], n: int) -> tuple[int, ...]:
    """The first `n` distinct ids, nearest ones of every feature first."""
    return tuple(list(dict.fromkeys(int(i) for column in columns for i in column))[:n])


def _control_sets(near_FC: NDArray[np.int64], n: int) -> dict[str, tuple[int, ...]]:
    """Sets with a control for each feature, no latent in two of them; fewer where controls run out."""
    used: set[int] = set()
    sets: dict[str, tuple[int, ...]] = {}
    for number in range(1, n + 1):
        chosen: list[int] = []
        for row in near_FC:
            free = next((int(i) for i in row if int(i) not in used), None)
            if free is None:
                return sets
            used.add(free)
            chosen.append(free)
        sets[f"control-{number}"] = tuple(chosen)
    return sets


def edits_of(choice: Choice, found: Attribution) -> tuple[list[Edit], int]:
    """Edits in order: single latents, sets, then mean-ablation of reported ones; and how many come before these last."""
    from safer_engine.science.ablation import Edit

    edits = [Edit((latent,)) for latent in choice.single] + [Edit(latents) for latents in choice.sets.values()]
    means = [Edit((latent,), offset=float(found.mean_S[latent])) for latent in choice.roles]
    return [*edits, *means], len(edits)


def tables(found: Measured, seed: int) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """The payload's tables, and the stage's facts."""
    import pyarrow as pa

    choice, ablated = found.choice, found.ablated
    margin_PE = ablated.change_P2E[:, 0] - ablated.change_P2E[:, 1]
    n_single = len(choice.single)
    effect_E = margin_PE[:, :n_single].mean(axis=0)
    first_S = found.attribution.margin_S
    agreed = agreement(effect_E, first_S[list(choice.single)])
    null = against_controls(effect_E[: choice.n_tested], choice.near_FC, first_S, agreed)
    rng = np.random.default_rng(seed)
    rows = [row for index in range(n_single) for row in _effects(found, index, null, rng)]
    sets = [row for index in range(len(choice.sets)) for row in _set_rows(found, index, rng)]
    order_S = np.argsort(-np.abs(first_S), kind="stable")
    rank_S = np.empty(len(first_S), dtype=np.int32)
    rank_S[order_S] = np.arange(1, len(first_S) + 1)
    ids = pa.array(np.arange(len(first_S), dtype=np.int32))
    attribution = pa.table({"latent_id": ids, "attribution": nullable(first_S), "rank": rank_S})
    made = {
        "effects.arrow": pa.Table.from_pylist(rows, schema=_effects_schema()),
        "sets.arrow": pa.Table.from_pylist(sets, schema=_sets_schema()),
        "attribution.arrow": attribution,
    }
    verified = Counter(row["verified"] for row in rows if row["axis"] is None and row["role"] != "control")
    return made, _facts(found, effect_E, agreed, null, rng) | {"verified": dict(verified)}


def _facts(found: Measured, effect_E: Floats, agreed: Agreement, null: Null, rng: np.random.Generator) -> dict[str, Any]:
    choice = found.choice
    salience_S = np.asarray(found.latents["salience"].to_pylist(), dtype=np.float64)
    reported = [latent for latent, role in choice.roles.items() if role != "attribution"]
    margin_P = found.ablated.reward_P2[:, 0] - found.ablated.reward_P2[:, 1]
    correlation = rank_correlation(np.abs(salience_S[reported]), np.abs(effect_E[: len(reported)]), _RESAMPLES, rng)
    return {
        "n_pairs": len(found.ablated.pair_P),
        "n_features": len(choice.roles),
        "n_controls": len(choice.controls),
        "roles": dict(Counter(choice.roles.values())),
        "runs": found.ablated.runs,
        "margin": {"mean": float(margin_P.mean()), "sd": float(margin_P.std())},
        "agreement": asdict(agreed),
        "null": {"pooled": null.pooled, "distinct": null.distinct, "reason": null.reason},
        "correlation": None if correlation is None else asdict(correlation),
    }


def _mean(values: Floats, groups: NDArray[Any], rng: np.random.Generator) -> Interval:
    return group_bootstrap_mean(values, groups, _RESAMPLES, rng)


def _effects(found: Measured, index: int, null: Null, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Rows of one latent: all pairs, then each axis."""
    choice, groups = found.choice, found.groups_P
    latent = choice.single[index]
    reported = index < len(choice.roles)
    change_P2 = found.ablated.change_P2E[:, :, index]
    rows = []
    for names, within in found.by_axis:
        row: dict[str, Any] = {"latent_id": latent, "role": choice.roles.get(latent, "control"), **names}
        row |= {"n_pairs": int(within.sum()), "n_groups": len(set(groups[within].tolist()))}
        fired = within & (change_P2 != 0).any(axis=1)
        row |= {"n_fired": int(fired.sum()), "n_groups_fired": len(set(groups[fired].tolist()))}
        series = {"margin": change_P2[:, 0] - change_P2[:, 1], "chosen": change_P2[:, 0], "rejected": change_P2[:, 1]}
        for name, values in series.items():
            row |= _columns(name, _mean(values[within], groups[within], rng))
        if reported:
            row |= _mean_ablation(found, index, within, rng)
        if names["axis"] is None:
            row["attribution"] = float(found.attribution.margin_S[latent])
            row |= _judged(row, null, index) if index < choice.n_tested else {"verified": "not measured"}
        rows.append(row)
    return rows


def _columns(name: str, found: Interval) -> dict[str, Any]:
    return {name: found.estimate, f"{name}_lo": found.lo, f"{name}_hi": found.hi}


def _mean_ablation(found: Measured, index: int, within: NDArray[np.bool_], rng: np.random.Generator) -> dict[str, Any]:
    choice = found.choice
    at = len(choice.single) + len(choice.sets) + index
    margin_P = found.ablated.change_P2E[:, 0, at] - found.ablated.change_P2E[:, 1, at]
    run = within & ~np.isnan(margin_P)
    if not run.any():
        return {"n_mean": 0}
    return {**_columns("mean_margin", _mean(margin_P[run], found.groups_P[run], rng)), "n_mean": int(run.sum())}


def _judged(row: dict[str, Any], null: Null, index: int) -> dict[str, Any]:
    """Verified: the interval of the margin's change leaves out 0 and the adjusted p is at most 0.05.

    Where a latent fires in fewer than `LEAST_GROUPS` groups, resampling them says too little of how far the change varies.
    """
    p, adjusted = float(null.p_F[index]), float(null.adjusted_F[index])
    if np.isnan(p) or row["margin_lo"] is None or row["n_groups_fired"] < LEAST_GROUPS:
        return {"verified": "not measured"}
    apart = row["margin_lo"] > 0 or row["margin_hi"] < 0
    return {"p": p, "p_adjusted": adjusted, "verified": "yes" if apart and adjusted <= _LEVEL else "no"}


def _set_rows(found: Measured, index: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Pair accuracy with and without a set, and the change of the margin: all pairs, then each subset of an axis."""
    name = list(found.choice.sets)[index]
    at = len(found.choice.single) + index
    before_P = found.ablated.reward_P2[:, 0] - found.ablated.reward_P2[:, 1]
    margin_P = found.ablated.change_P2E[:, 0, at] - found.ablated.change_P2E[:, 1, at]
    after_P = before_P + margin_P
    right_P, still_P = (before_P > 0).astype(np.float64), (after_P > 0).astype(np.float64)
    rows, groups = [], found.groups_P
    for names, within in [*found.by_axis, *found.by_subset[1:]]:
        change = _mean((still_P - right_P)[within], groups[within], rng)
        row: dict[str, Any] = {"set": name, "n_latents": len(found.choice.sets[name]), "subset": None, **names}
        row |= {"n_pairs": change.n, "n_groups": change.n_groups}
        row |= {"accuracy": float(right_P[within].mean()), "ablated": float(still_P[within].mean())}
        rows.append(row | _columns("change", change) | _columns("margin", _mean(margin_P[within], groups[within], rng)))
    return rows


def _effects_schema() -> pa.Schema:
    import pyarrow as pa

    floats = [f"{name}{end}" for name in ("margin", "chosen", "rejected", "mean_margin") for end in ("", "_lo", "_hi")]
    whole = ("n_pairs", "n_groups", "n_fired", "n_mean")
    return pa.schema(
        [("latent_id", pa.int32()), ("role", pa.string()), ("axis", pa.string())]
        + [(name, pa.int32()) for name in (*whole, "n_groups_fired")]
        + [(name, pa.float64()) for name in (*floats, "attribution", "p", "p_adjusted")]
        + [("verified", pa.string())]
    )


def _sets_schema() -> pa.Schema:
    import pyarrow as pa

    floats = ("accuracy", "ablated", "change", "change_lo", "change_hi", "margin", "margin_lo", "margin_hi")
    return pa.schema(
        [("set", pa.string()), ("n_latents", pa.int32()), ("axis", pa.string()), ("subset", pa.string())]
        + [(name, pa.int32()) for name in ("n_pairs", "n_groups")]
        + [(name, pa.float64()) for name in floats]
    )
