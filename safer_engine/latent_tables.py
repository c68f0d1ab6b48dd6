"""Tables of the latents stage, from the figures of `science.salience` and `science.contexts`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safer_engine.payload_files import nullable

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from safer_engine.latent_tests import CandidateEvidence, LatentTests
    from safer_engine.science.contexts import Span, TopContexts
    from safer_engine.science.latent_acts import LatentTotals, ResponseActs
    from safer_engine.science.salience import Headline, Salience
    from safer_engine.science.sign_flips import FlipTests
    from safer_engine.spec import SalienceSpec

    Ints = NDArray[np.int64]

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Strata:
    """What salience is computed over.

    Attributes:
        groups_P: group of each pair, as integers.
        axes_P, subsets_P: axis and subset of each pair.
        longer_P: log tokens of the chosen response − log tokens of the rejected one (at least one token each).
        half_P: whether the pair's group is of the half that chooses and tests latents.
    """

    groups_P: Ints
    axes_P: NDArray[Any]
    subsets_P: NDArray[Any]
    longer_P: NDArray[np.float64]
    half_P: NDArray[np.bool_]

    @staticmethod
    def of(pairs: pa.Table, seed: int) -> Strata:
        """The strata of a pair set; `seed` divides its groups into halves."""
        import numpy as np

        from safer_engine.latent_tests import selection_half

        groups, axes, subsets = (np.asarray(pairs[name].to_pylist(), dtype=np.str_) for name in ("group", "axis", "subset"))
        tokens = [np.maximum(pairs[f"{side}_end"].to_numpy() - pairs[f"{side}_start"].to_numpy(), 1) for side in SIDES]
        return Strata(
            np.unique(groups, return_inverse=True)[1].astype(np.int64),
            axes,
            subsets,
            np.log(tokens[0] / tokens[1]),
            selection_half(groups.tolist(), seed),
        )


@dataclass(frozen=True)
class Ranking:
    """Salience of all latents and which of them go on.

    Attributes:
        headline: what latents are ranked by (`paired_mean`: in the half that chooses) and shown by (in the other half); paper:
            the paper's contrast over all pairs.
        ranked: eligible latents, see `latent_tests.choose`; candidates: the first of them.
        axes, subsets: tables of the candidates (`axes.arrow`, `subsets.arrow`).
        flips, tests: None where nothing was tested: the paper's estimator, or too few pairs.
        n_groups, n_left_out: groups, and pairs without a counted position on both sides.
    """

    headline: Headline
    paper: Salience
    ranked: Ints
    candidates: Ints
    axes: pa.Table
    subsets: pa.Table
    flips: FlipTests | None
    tests: LatentTests | None
    n_groups: int
    n_left_out: int


def rank(acts: ResponseActs, totals: LatentTotals, strata: Strata, spec: SalienceSpec, seed: int) -> Ranking:
    """Salience, tests and the candidates, per axis and per subset; `seed` is of the flips."""
    import numpy as np

    from safer_engine.latent_tests import choose, halve
    from safer_engine.science.salience import eligible_latents, headline, salience, usable_pairs
    from safer_engine.science.sign_flips import FlipSettings

    paper = salience(acts, strata.groups_P, "paper")
    eligible = eligible_latents(totals.firings_S, totals.n_positions, spec.min_rate, spec.max_rate)
    halved, tests = None, None
    if spec.estimator == "paired_mean":
        settings = FlipSettings(spec.fdr, spec.draws, seed)
        halved = halve(acts, strata.groups_P, strata.axes_P, strata.half_P, eligible, settings)
    if halved is not None:
        top, tests = choose(halved, eligible, spec.candidates, spec.fdr)
    else:
        whole = paper if spec.estimator == "paper" else salience(acts, strata.groups_P, "paired_mean")
        top = headline(whole, [], eligible, spec.candidates)
    candidates = top.ranked[: spec.candidates]
    rows_P = np.ones(len(strata.half_P), dtype=np.bool_) if halved is None else ~strata.half_P
    axes = [({"axis": one.axis}, one.salience) for one in ([] if halved is None else halved.estimated) if one.axis is not None]
    usable = usable_pairs(acts, spec.estimator, np.arange(len(strata.groups_P)))
    return Ranking(
        headline=top,
        paper=paper,
        ranked=top.ranked,
        candidates=candidates,
        axes=_strata_table(candidates, axes or list(_by(("axis",), acts, strata, spec, rows_P))),
        subsets=_strata_table(candidates, list(_by(("axis", "subset"), acts, strata, spec, rows_P))),
        flips=None if halved is None else halved.tests,
        tests=tests,
        n_groups=len(np.unique(strata.groups_P[usable])),
        n_left_out=len(strata.groups_P) - len(usable),
    )


def shown_half(strata: Strata, ranking: Ranking, pairs: pa.Table, clusters: int) -> Any:
    """What the candidates are shown by (`latent_tests.Shown`); the prompt of a group's first pair stands for the group."""
    import numpy as np

    from safer_engine.latent_tests import Shown
    from safer_engine.science.prompt_clusters import cluster_texts

    _, first = np.unique(strata.groups_P, return_index=True)
    texts = pairs["prompt"].take(first).to_pylist() if clusters else [""] * len(first)
    found = cluster_texts(texts, clusters)
    return Shown(
        candidates=ranking.candidates,
        axes=tuple(ranking.headline.axis_S[int(latent)] for latent in ranking.candidates),
        rows_P=np.ones(len(strata.half_P), dtype=np.bool_) if ranking.tests is None else ~strata.half_P,
        groups_P=strata.groups_P,
        axes_P=strata.axes_P,
        subsets_P=strata.subsets_P,
        longer_P=strata.longer_P,
        cluster_P=found.cluster_T[strata.groups_P],
        terms=found.terms,
    )


def facts(spec: SalienceSpec, totals: LatentTotals, ranking: Ranking, evidence: CandidateEvidence | None) -> dict[str, Any]:
    """The stage's meta."""
    from safer_engine.latent_tests import tests_facts

    return {
        "estimator": spec.estimator,
        "n_latents": len(totals.firings_S),
        "n_never_fired": int((totals.firings_S == 0).sum()),
        "n_ranked": len(ranking.ranked),
        "n_candidates": len(ranking.candidates),
        "n_groups": ranking.n_groups,
        "n_pairs_left_out": ranking.n_left_out,
        "tests": tests_facts(ranking.flips, ranking.tests, spec),
        "clusters": [] if evidence is None else evidence.facts,
        "totals": {
            "chosen": float(ranking.paper.a_chosen_S.sum()),
            "rejected": float(ranking.paper.a_rejected_S.sum()),
            "positions": totals.n_positions,
            "firings": int(totals.firings_S.sum()),
        },
    }


def latents_table(totals: LatentTotals, ranking: Ranking, evidence: CandidateEvidence | None) -> pa.Table:
    """`latents.arrow`."""
    import numpy as np
    import pyarrow as pa

    from safer_engine.latent_tests import evidence_columns, tests_columns

    d_sae = len(totals.firings_S)
    rank_S = np.zeros(d_sae, dtype=np.int32)
    rank_S[ranking.ranked] = np.arange(1, len(ranking.ranked) + 1, dtype=np.int32)
    shown = ranking.headline.salience
    return pa.table(
        {
            "latent_id": pa.array(np.arange(d_sae, dtype=np.int32)),
            "firing_rate": pa.array(totals.firings_S / max(1, totals.n_positions)),
            "responses": pa.array(totals.responses_S),
            "energy": pa.array(totals.energy_S),
            "a_chosen": pa.array(shown.a_chosen_S),
            "a_rejected": pa.array(shown.a_rejected_S),
            "salience": pa.array(shown.salience_S),
            "salience_lo": nullable(shown.lo_S),
            "salience_hi": nullable(shown.hi_S),
            "t": nullable(shown.t_S),
            "salience_paper": pa.array(ranking.paper.salience_S),
            "axis": pa.array(ranking.headline.axis_S, type=pa.string()),
            "candidate": pa.array(np.isin(np.arange(d_sae), ranking.candidates)),
            "rank": pa.array(rank_S, mask=rank_S == 0),
            **tests_columns(ranking.tests, d_sae),
            **evidence_columns(evidence, ranking.candidates, d_sae),
        }
    )


def contexts_table(pairs: pa.Table, contexts: TopContexts, spans: Sequence[Span], windows: Sequence[Any]) -> pa.Table:
    """`contexts.arrow`; `windows` are the activations of each context's tokens, NaN where not covered."""
    import numpy as np
    import pyarrow as pa

    texts = [window_tokens(pairs, int(response), span) for response, span in zip(contexts.responses_N, spans, strict=True)]
    acts = [pa.array(window, mask=np.isnan(window)).to_pylist() for window in windows]
    return pa.table(
        {
            "latent_id": pa.array(contexts.latents_N, type=pa.int32()),
            "rank": pa.array(contexts.ranks_N + 1, type=pa.int32()),
            "pair_id": pa.array([pairs["pair_id"][int(r) // 2].as_py() for r in contexts.responses_N], type=pa.string()),
            "side": pa.array([SIDES[int(r) % 2] for r in contexts.responses_N], type=pa.string()),
            "position": pa.array(contexts.positions_N, type=pa.int32()),
            "activation": pa.array(contexts.activations_N, type=pa.float32()),
            "tokens": pa.array(texts, type=pa.list_(pa.string())),
            "activations": pa.array(acts, type=pa.list_(pa.float32())),
            "focus": pa.array([span.focus for span in spans], type=pa.int32()),
        }
    )


def background_table(pairs: pa.Table, region: str, window: int, n: int, seed: int) -> pa.Table:
    """`background.arrow`: windows at positions drawn at random, at most one per pair, from the hook's region."""
    import numpy as np
    import pyarrow as pa

    from safer_engine.science.contexts import span_round

    rng = np.random.default_rng(seed)
    rows = []
    for pair in np.sort(rng.choice(pairs.num_rows, size=min(n, pairs.num_rows), replace=False)).tolist():
        side = int(rng.integers(2))
        length = len(pairs[f"{SIDES[side]}_ids"][pair])
        first, stop = (pairs[f"{SIDES[side]}_{end}"][pair].as_py() for end in ("start", "end"))
        low, high = (first, stop) if region == "response" and stop > first else (0, length)
        span = span_round(int(rng.integers(low, high)), length, window)
        tokens = window_tokens(pairs, 2 * pair + side, span)
        rows.append(
            {
                "pair_id": pairs["pair_id"][pair].as_py(),
                "side": SIDES[side],
                "position": span.start + span.focus,
                "tokens": tokens,
                "focus": span.focus,
            }
        )
    types = {"pair_id": pa.string(), "side": pa.string(), "position": pa.int32()}
    return pa.Table.from_pylist(rows, pa.schema({**types, "tokens": pa.list_(pa.string()), "focus": pa.int32()}))


def spans_of(pairs: pa.Table, contexts: TopContexts, window: int) -> list[Span]:
    """The tokens shown round each context's focus."""
    from safer_engine.science.contexts import span_round

    where = zip(contexts.responses_N.tolist(), contexts.positions_N.tolist(), strict=True)
    return [span_round(position, len(pairs[f"{SIDES[r % 2]}_ids"][r // 2]), window) for r, position in where]


def window_tokens(pairs: pa.Table, response: int, span: Span) -> list[str]:
    """The exact text of a span's tokens; response is 2 × pair + side."""
    from safer_engine.science.contexts import token_texts

    pair, side = response // 2, SIDES[response % 2]
    offsets = pairs[f"{side}_offsets"][pair].values.to_numpy()
    return token_texts(pairs[f"{side}_text"][pair].as_py(), offsets, span.start, span.stop)


def _within(acts: ResponseActs, strata: Strata, members: NDArray[np.bool_], spec: SalienceSpec) -> Salience | None:
    """Salience over some pairs; None when no per-response mean can be had of any."""
    import numpy as np

    from safer_engine.science.salience import salience

    rows = np.flatnonzero(members)
    has_means = bool((acts.n_positions_P2[rows] > 0).all(axis=1).any())
    known = has_means or spec.estimator == "paper"
    return salience(acts, strata.groups_P, spec.estimator, rows) if known else None


def _by(
    names: tuple[str, ...], acts: ResponseActs, strata: Strata, spec: SalienceSpec, rows_P: NDArray[np.bool_]
) -> Iterator[tuple[dict[str, Any], Salience]]:
    """Salience of each axis, or of each subset of each axis, over the pairs given."""
    import numpy as np

    columns = {"axis": strata.axes_P, "subset": strata.subsets_P}
    for labels in sorted(set(zip(*(columns[name].tolist() for name in names), strict=True))):
        members = np.logical_and.reduce([columns[name] == label for name, label in zip(names, labels, strict=True)])
        found = _within(acts, strata, members & rows_P, spec)
        if found is not None:
            yield dict(zip(names, labels, strict=True)), found


def _strata_table(candidates: Ints, found: Sequence[tuple[dict[str, Any], Salience]]) -> pa.Table:
    """One row per candidate and stratum."""
    import pyarrow as pa

    names = sorted({name for labels, _ in found for name in labels}) or ["axis"]
    parts = []
    for labels, value in found:
        one = value.of(candidates)
        texts = {name: pa.array([labels[name]] * len(candidates), type=pa.string()) for name in names}
        parts.append(
            pa.table(
                {
                    "latent_id": pa.array(candidates, type=pa.int32()),
                    **texts,
                    "n_groups": pa.array([one.n_groups] * len(candidates), type=pa.int32()),
                    "salience": pa.array(one.salience_S, type=pa.float64()),
                    "salience_lo": nullable(one.lo_S),
                    "salience_hi": nullable(one.hi_S),
                    "t": nullable(one.t_S),
                }
            )
        )
    numbers = {name: pa.float64() for name in ("salience", "salience_lo", "salience_hi", "t")}
    schema = pa.schema({"latent_id": pa.int32(), **dict.fromkeys(names, pa.string()), "n_groups": pa.int32(), **numbers})
    return pa.concat_tables([part.cast(schema) for part in parts]) if parts else schema.empty_table()
