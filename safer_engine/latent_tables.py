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

    from safer_engine.science.contexts import Span, TopContexts
    from safer_engine.science.latent_acts import LatentTotals, ResponseActs
    from safer_engine.science.salience import Headline, Salience
    from safer_engine.spec import SalienceSpec

    Ints = NDArray[np.int64]

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Strata:
    """What salience is computed over.

    Attributes:
        groups_P: group of each pair, as integers.
        axes_P, subsets_P: axis and subset of each pair.
    """

    groups_P: Ints
    axes_P: NDArray[Any]
    subsets_P: NDArray[Any]

    @staticmethod
    def of(pairs: pa.Table) -> Strata:
        """The strata of a pair set."""
        import numpy as np

        columns = [np.asarray(pairs[name].to_pylist(), dtype=np.str_) for name in ("group", "axis", "subset")]
        return Strata(np.unique(columns[0], return_inverse=True)[1].astype(np.int64), columns[1], columns[2])


@dataclass(frozen=True)
class Ranking:
    """Salience of all latents and which of them go on.

    Attributes:
        headline: what latents are ranked and shown by; paper: the paper's contrast over all pairs.
        ranked: eligible latents, see `science.salience.headline`; candidates: the first of them.
        axes, subsets: tables of the candidates (`axes.arrow`, `subsets.arrow`).
    """

    headline: Headline
    paper: Salience
    ranked: Ints
    candidates: Ints
    axes: pa.Table
    subsets: pa.Table


def rank(acts: ResponseActs, totals: LatentTotals, strata: Strata, spec: SalienceSpec) -> Ranking:
    """Salience over all pairs, per axis and per subset, and the candidates."""
    import numpy as np

    from safer_engine.science.salience import AxisSalience, eligible_latents, headline, salience

    paper = salience(acts, strata.groups_P, "paper")
    by_axis: list[AxisSalience] = []
    if spec.estimator == "paper":
        overall = paper
    else:
        names = np.unique(strata.axes_P)
        found = ((axis, _within(acts, strata, strata.axes_P == axis, spec)) for axis in names)
        by_axis = [AxisSalience(str(axis), value) for axis, value in found if value is not None]
        overall = by_axis[0].salience if len(names) == 1 and by_axis else salience(acts, strata.groups_P, "paired_mean")
    eligible = eligible_latents(totals.firings_S, totals.n_positions, spec.min_rate, spec.max_rate)
    top = headline(overall, by_axis, eligible, spec.candidates)
    candidates = top.ranked[: spec.candidates]
    axes = [({"axis": one.axis}, one.salience) for one in by_axis]
    subsets = list(_by_subset(acts, strata, spec))
    return Ranking(top, paper, top.ranked, candidates, _strata_table(candidates, axes), _strata_table(candidates, subsets))


def facts(spec: SalienceSpec, totals: LatentTotals, ranking: Ranking) -> dict[str, Any]:
    """The stage's meta."""
    overall = ranking.headline.salience
    return {
        "estimator": spec.estimator,
        "n_latents": len(totals.firings_S),
        "n_never_fired": int((totals.firings_S == 0).sum()),
        "n_ranked": len(ranking.ranked),
        "n_candidates": len(ranking.candidates),
        "n_groups": overall.n_groups,
        "n_pairs_left_out": overall.n_left_out,
        "totals": {
            "chosen": float(ranking.paper.a_chosen_S.sum()),
            "rejected": float(ranking.paper.a_rejected_S.sum()),
            "positions": totals.n_positions,
            "firings": int(totals.firings_S.sum()),
        },
    }


def latents_table(totals: LatentTotals, ranking: Ranking) -> pa.Table:
    """`latents.arrow`."""
    import numpy as np
    import pyarrow as pa

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


def _by_subset(acts: ResponseActs, strata: Strata, spec: SalienceSpec) -> Iterator[tuple[dict[str, Any], Salience]]:
    for axis, subset in sorted(set(zip(strata.axes_P.tolist(), strata.subsets_P.tolist(), strict=True))):
        found = _within(acts, strata, (strata.axes_P == axis) & (strata.subsets_P == subset), spec)
        if found is not None:
            yield {"axis": axis, "subset": subset}, found


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
