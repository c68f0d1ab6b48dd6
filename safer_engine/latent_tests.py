"""The latents stage's evidence about salience: latents chosen and tested on one half of the groups, shown by the other half."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safer_engine.payload_files import nullable

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from safer_engine.science.candidate_values import AtEqualLength
    from safer_engine.science.latent_acts import ResponseActs
    from safer_engine.science.salience import AxisSalience, Estimator, Headline, Salience
    from safer_engine.science.sign_flips import FlipTests
    from safer_engine.spec import SalienceSpec

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]

REPLICATION_LEVEL = 0.05
"""A discovery is found again where the other half gives the same sign with a two-sided p of t of at most this."""


@dataclass(frozen=True)
class Halved:
    """What chooses and tests latents, and what shows them.

    Attributes:
        selected: salience over the selection half, by axis or, where axes do not decide, over all its pairs (axis None).
        estimated: the same over the estimation half.
        tests: within the selection half.
    """

    selected: tuple[AxisSalience, ...]
    estimated: tuple[AxisSalience, ...]
    tests: FlipTests


@dataclass(frozen=True)
class LatentTests:
    """Per latent, within the axis that it is shown in; NaN where it was not tested there.

    Attributes:
        selected_S: salience in the selection half, which latents are ranked by.
        n_active_S: groups of that half in which the sides differ.
        p_S, q_S, q_by_S, p_max_t_S: see `science.sign_flips`.
        discovery_S: q at most salience.fdr.
        replicated_S: found again in the estimation half.
    """

    selected_S: Floats
    n_active_S: Ints
    p_S: Floats
    q_S: Floats
    q_by_S: Floats
    p_max_t_S: Floats
    discovery_S: Bools
    replicated_S: Bools

    @property
    def tested_S(self) -> Bools:
        """Which latents were tested."""
        import numpy as np

        return np.isfinite(self.p_S)


def within(axes_P: NDArray[Any], axis: str | None) -> Bools:
    """Which pairs are of an axis; all where axes do not count."""
    import numpy as np

    return np.ones(len(axes_P), dtype=np.bool_) if axis is None else np.asarray(axes_P == axis)


def selection_half(groups: Sequence[str], seed: int) -> Bools:
    """Whether each pair is of the half of the groups that chooses and tests."""
    import numpy as np

    from safer_engine.splits import selection_groups

    chosen = selection_groups(groups, seed)
    return np.fromiter((group in chosen for group in groups), dtype=np.bool_, count=len(groups))


def halve(
    acts: ResponseActs, groups_P: Ints, axes_P: NDArray[Any], half_P: Bools, eligible_S: Bools, settings: Any
) -> Halved | None:
    """Salience of both halves and the tests, per large axis or over all pairs; None where a half has no usable pair.

    Args:
        half_P: whether a pair is of the selection half.
        settings: `science.sign_flips.FlipSettings`.
    """
    import numpy as np

    from safer_engine.science.salience import MIN_AXIS_GROUPS
    from safer_engine.science.sign_flips import Scope, flip_tests

    names = np.unique(axes_P)
    halves = [_halves(acts, groups_P, str(name), axes_P == name, half_P) for name in names] if len(names) > 1 else []
    usable = [one for one in halves if one is not None and one[0].salience.n_groups >= MIN_AXIS_GROUPS // 2]
    if not usable:
        whole = _halves(acts, groups_P, None, np.ones(len(axes_P), dtype=np.bool_), half_P)
        usable = [] if whole is None else [whole]
    if not usable:
        return None
    scopes = [Scope(one.axis, np.flatnonzero(half_P & within(axes_P, one.axis))) for one, _ in usable]
    tests = flip_tests(acts, groups_P, "paired_mean", scopes, eligible_S, settings)
    return Halved(tuple(one for one, _ in usable), tuple(other for _, other in usable), tests)


def _halves(
    acts: ResponseActs, groups_P: Ints, axis: str | None, members_P: Bools, half_P: Bools
) -> tuple[AxisSalience, AxisSalience] | None:
    import numpy as np

    from safer_engine.science.salience import AxisSalience, salience, usable_pairs

    rows = [np.flatnonzero(members_P & half_P), np.flatnonzero(members_P & ~half_P)]
    if any(len(usable_pairs(acts, "paired_mean", one)) == 0 for one in rows):
        return None
    first, second = (AxisSalience(axis, salience(acts, groups_P, "paired_mean", one)) for one in rows)
    return first, second


def choose(halved: Halved, eligible_S: Bools, candidates: int, fdr: float) -> tuple[Headline, LatentTests]:
    """The order in which latents go on, by the selection half alone; figures are those of the estimation half.

    Discoveries go before other latents, and latents that are discoveries of another axis come last in an axis.
    """
    import numpy as np

    from safer_engine.science.salience import MIN_AXIS_GROUPS, AxisSalience, Headline, headline, picked

    found_AS = np.stack([one.q_S <= fdr for one in halved.tests.scopes])
    tiers = [np.where(own, 0, np.where(found_AS.any(axis=0), 2, 1)) for own in found_AS]
    ranked = [AxisSalience(one.axis, one.salience, tier) for one, tier in zip(halved.selected, tiers, strict=True)]
    top = headline(ranked[0], ranked, eligible_S, candidates, MIN_AXIS_GROUPS // 2)
    names = [one.axis for one in halved.selected]
    axis_S = np.zeros(len(eligible_S), dtype=np.int64)
    if len(names) > 1:
        axis_S = np.array([names.index(axis) for axis in top.axis_S], dtype=np.int64)
    shown = picked(halved.estimated[0].salience, halved.estimated, axis_S)
    tests = _tests_of(halved, axis_S, top.salience.salience_S, shown, fdr)
    axes = top.axis_S if len(names) > 1 else (names[0],) * len(eligible_S)
    return Headline(shown, axes, top.ranked), tests


def _tests_of(halved: Halved, axis_S: Ints, selected_S: Floats, shown: Salience, fdr: float) -> LatentTests:
    import numpy as np
    from scipy.stats import t as student

    columns = np.arange(len(axis_S))

    def pick(name: str) -> Any:
        return np.stack([getattr(one, name) for one in halved.tests.scopes])[axis_S, columns]

    df_S = np.array([max(1, one.salience.n_groups - 1) for one in halved.estimated])[axis_S]
    q_S = pick("q_S")
    with np.errstate(invalid="ignore"):
        again = (2 * student.sf(np.abs(shown.t_S), df_S) <= REPLICATION_LEVEL) & (shown.t_S * selected_S > 0)
    discovery = q_S <= fdr
    return LatentTests(
        selected_S, pick("n_active_S"), pick("p_S"), q_S, pick("q_by_S"), pick("p_max_t_S"), discovery, discovery & again
    )


@dataclass(frozen=True)
class CandidateEvidence:
    """What more is known of the candidates, row by row in their order.

    Attributes:
        length: at equal length.
        p_mixed_C, mixed_C: see `science.candidate_values.mixed_signs`, over subsets and prompt clusters.
        clusters: `clusters.arrow`; facts: of each cluster n_groups and terms.
    """

    length: AtEqualLength
    p_mixed_C: Floats
    mixed_C: Bools
    clusters: pa.Table
    facts: list[dict[str, Any]]


@dataclass(frozen=True)
class Shown:
    """What candidates are shown by: their axis each, the estimation half of the pairs, and how pairs fall into parts.

    Attributes:
        candidates: latents, in order; axes: of each.
        rows_P: whether a pair is of the estimation half.
        groups_P, axes_P, subsets_P: of each pair.
        longer_P: log length of the chosen response − that of the rejected one.
        cluster_P: prompt cluster of each pair, −1 for none; terms: words of each cluster.
    """

    candidates: Ints
    axes: tuple[str | None, ...]
    rows_P: Bools
    groups_P: Ints
    axes_P: NDArray[Any]
    subsets_P: NDArray[Any]
    longer_P: Floats
    cluster_P: Ints
    terms: tuple[tuple[str, ...], ...]


def candidate_evidence(acts: ResponseActs, shown: Shown, estimator: Estimator) -> CandidateEvidence:
    """Length, signs by part of the data, and clusters, of every candidate within its axis."""
    import numpy as np
    import pyarrow as pa

    from safer_engine.science.candidate_values import AtEqualLength, at_equal_length, candidate_values, group_means

    n = len(shown.candidates)
    columns = {name: np.full(n, np.nan) for name in ("salience_C", "lo_C", "hi_C", "t_C", "p_mixed")}
    bound, mixed = np.zeros(n, dtype=np.bool_), np.zeros(n, dtype=np.bool_)
    tables = []
    for axis in sorted(set(shown.axes), key=str):
        places = np.flatnonzero([one == axis for one in shown.axes])
        rows = np.flatnonzero(shown.rows_P & within(shown.axes_P, axis))
        values = candidate_values(acts, shown.groups_P, estimator, rows, shown.candidates[places])
        if values is None:
            continue
        usable = rows[(acts.n_positions_P2[rows] > 0).all(axis=1)] if estimator == "paired_mean" else rows
        length = at_equal_length(values, group_means(shown.longer_P, shown.groups_P, usable, values.groups_G))
        for name in ("salience_C", "lo_C", "hi_C", "t_C"):
            columns[name][places] = getattr(length, name)
        bound[places] = length.length_bound_C
        parts = list(_parts(acts, shown, estimator, rows, shown.candidates[places]))
        columns["p_mixed"][places], mixed[places] = _mixed(parts, len(places))
        tables += [_cluster_rows(shown.candidates[places], axis, part) for part in parts if part.cluster is not None]
    lengths = AtEqualLength(columns["salience_C"], columns["lo_C"], columns["hi_C"], columns["t_C"], bound)
    groups = [len(np.unique(shown.groups_P[shown.cluster_P == one])) for one in range(len(shown.terms))]
    facts = [{"cluster": one, "n_groups": groups[one], "terms": list(terms)} for one, terms in enumerate(shown.terms)]
    schema = _cluster_schema()
    table = pa.concat_tables([one.cast(schema) for one in tables]) if tables else schema.empty_table()
    return CandidateEvidence(lengths, columns["p_mixed"], mixed, table, facts)


@dataclass(frozen=True)
class _Part:
    """Candidates' salience in a part of their axis: a subset, or a prompt cluster (then its number)."""

    cluster: int | None
    salience: Salience


def _parts(acts: ResponseActs, shown: Shown, estimator: Estimator, rows: Ints, latents: Ints) -> Iterator[_Part]:
    import numpy as np

    from safer_engine.science.candidate_values import candidate_values, salience_of

    kinds: list[tuple[NDArray[Any], bool]] = [(shown.subsets_P[rows], False), (shown.cluster_P[rows], True)]
    for part_P, is_cluster in kinds:
        for one in np.unique(part_P).tolist():
            if is_cluster and one < 0:
                continue
            values = candidate_values(acts, shown.groups_P, estimator, rows[part_P == one], latents)
            if values is not None:
                yield _Part(int(one) if is_cluster else None, salience_of(values, estimator))


def _mixed(parts: Sequence[_Part], n: int) -> tuple[Floats, Bools]:
    import numpy as np

    from safer_engine.science.candidate_values import mixed_signs

    if not parts:
        return np.full(n, np.nan), np.zeros(n, dtype=np.bool_)
    return mixed_signs(np.stack([part.salience.t_S for part in parts]), np.array([part.salience.n_groups for part in parts]))


def clusters_table(evidence: CandidateEvidence | None) -> pa.Table:
    """`clusters.arrow`; without rows where there is no evidence."""
    return _cluster_schema().empty_table() if evidence is None else evidence.clusters


def _cluster_schema() -> pa.Schema:
    import pyarrow as pa

    numbers = {name: pa.float64() for name in ("salience", "salience_lo", "salience_hi", "t")}
    return pa.schema({"latent_id": pa.int32(), "axis": pa.string(), "cluster": pa.int32(), "n_groups": pa.int32(), **numbers})


def _cluster_rows(latents: Ints, axis: str | None, part: _Part) -> pa.Table:
    import pyarrow as pa

    one, n = part.salience, len(latents)
    return pa.table(
        {
            "latent_id": pa.array(latents, type=pa.int32()),
            "axis": pa.array([axis] * n, type=pa.string()),
            "cluster": pa.array([part.cluster] * n, type=pa.int32()),
            "n_groups": pa.array([one.n_groups] * n, type=pa.int32()),
            "salience": pa.array(one.salience_S, type=pa.float64()),
            "salience_lo": nullable(one.lo_S),
            "salience_hi": nullable(one.hi_S),
            "t": nullable(one.t_S),
        }
    )


def tests_columns(tests: LatentTests | None, n_latents: int) -> dict[str, pa.Array]:
    """The columns of `latents.arrow` about tests; null where nothing was tested."""
    import numpy as np
    import pyarrow as pa

    if tests is None:
        unknown = nullable(np.full(n_latents, np.nan))
        none = pa.nulls(n_latents, pa.bool_())
        numbers = dict.fromkeys(("salience_selection", "p", "q", "q_by", "p_max_t"), unknown)
        return {**numbers, "n_active": pa.nulls(n_latents, pa.int32()), "discovery": none, "replicated": none}
    untested = ~tests.tested_S
    return {
        "salience_selection": nullable(tests.selected_S),
        "p": nullable(tests.p_S),
        "q": nullable(tests.q_S),
        "q_by": nullable(tests.q_by_S),
        "p_max_t": nullable(tests.p_max_t_S),
        "n_active": pa.array(tests.n_active_S, type=pa.int32()),
        "discovery": pa.array(tests.discovery_S, mask=untested),
        "replicated": pa.array(tests.replicated_S, mask=~tests.discovery_S),
    }


def evidence_columns(evidence: CandidateEvidence | None, candidates: Ints, n_latents: int) -> dict[str, pa.Array]:
    """The columns of `latents.arrow` about candidates; null elsewhere."""
    import numpy as np
    import pyarrow as pa

    def spread(values_C: Floats) -> pa.Array:
        spread_S = np.full(n_latents, np.nan)
        spread_S[candidates] = values_C
        return nullable(spread_S)

    def flags(values_C: Bools, known_C: Bools) -> pa.Array:
        values_S, known_S = np.zeros(n_latents, dtype=np.bool_), np.zeros(n_latents, dtype=np.bool_)
        values_S[candidates], known_S[candidates] = values_C, known_C
        return pa.array(values_S, mask=~known_S)

    if evidence is None:
        unknown, none = nullable(np.full(n_latents, np.nan)), pa.nulls(n_latents, pa.bool_())
        numbers = dict.fromkeys(("salience_equal_length", "equal_length_lo", "equal_length_hi", "equal_length_t"), unknown)
        return {**numbers, "length_bound": none, "p_mixed": unknown, "mixed": none}
    length = evidence.length
    return {
        "salience_equal_length": spread(length.salience_C),
        "equal_length_lo": spread(length.lo_C),
        "equal_length_hi": spread(length.hi_C),
        "equal_length_t": spread(length.t_C),
        "length_bound": flags(length.length_bound_C, np.isfinite(length.salience_C)),
        "p_mixed": spread(evidence.p_mixed_C),
        "mixed": flags(evidence.mixed_C, np.isfinite(evidence.p_mixed_C)),
    }


def tests_facts(tests: FlipTests | None, found: LatentTests | None, spec: SalienceSpec) -> dict[str, Any] | None:
    """What the meta says of the tests: how many, how fine, how many discoveries, by which promise, how many found again."""
    if tests is None or found is None:
        return None
    discoveries = int(found.discovery_S.sum())
    return {
        "fdr": spec.fdr,
        "n_tests": tests.n_tests,
        "n_draws": tests.n_draws,
        "smallest_p": tests.smallest_p,
        "n_tested": int(found.tested_S.sum()),
        "n_discoveries": discoveries,
        "n_discoveries_by": int((found.q_by_S <= spec.fdr).sum()),
        "n_discoveries_max_t": int((found.p_max_t_S <= spec.fdr).sum()),
        "n_replicated": int(found.replicated_S.sum()),
        "replicated_share": int(found.replicated_S.sum()) / discoveries if discoveries else None,
    }
