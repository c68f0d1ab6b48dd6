"""Held-out windows of the candidates, with and without the latent: `checks.arrow`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from safer_engine.latent_tables import SIDES, window_tokens

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from safer_engine.latent_files import Fragment, ShardJob
    from safer_engine.science.contexts import TopContexts
    from safer_engine.science.held_out import Sequences


def held_out_windows(job: ShardJob, fragments: Sequence[Fragment], pairs: pa.Table, shown: TopContexts) -> pa.Table:
    """Draw held-out contexts of the candidates and match each with a window in which the latent does not fire.

    Args:
        pairs: `pairs.arrow`.
        shown: contexts of the candidates that a labeller is shown.
    """
    import numpy as np

    from safer_engine.science.contexts import sample_contexts, without_groups_of
    from safer_engine.science.held_out import draw_pool, match_windows

    spec, seed = job.ctx.spec.contexts, job.ctx.seed("held out")
    if spec.held_out == 0:
        return _table(pairs, [], spec.held_out_window)
    candidates = np.unique(shown.latents_N).astype(np.int64)
    sample = sample_contexts([one.sample for one in fragments], spec.per_latent + spec.held_out, job.groups_P, seed)
    contexts = without_groups_of(sample.of(candidates), shown, spec.held_out, job.groups_P)
    sequences = _sequences(pairs, job.groups_P, job.ctx.spec.hook.region)
    responses = draw_pool(sequences, spec.held_out, np.random.default_rng(job.ctx.seed("pool")))
    pool = job.pool(fragments, responses, candidates)
    rows: list[tuple[int, int, float | None, int, int]] = []
    for number, match in enumerate(match_windows(contexts, shown, pool, sequences, spec.held_out_window)):
        latent = int(contexts.latents_N[match.row])
        peak = (int(contexts.responses_N[match.row]), int(contexts.positions_N[match.row]))
        rows.append((latent, number, float(contexts.activations_N[match.row]), *peak))
        rows.append((latent, number, None, match.response, match.position))
    return _table(pairs, rows, spec.held_out_window)


def _sequences(pairs: pa.Table, groups_P: NDArray[np.int64], region: str) -> Sequences:
    import numpy as np
    import pyarrow.compute as pc

    from safer_engine.science.held_out import Sequences

    def both(chosen: object, rejected: object) -> NDArray[np.int64]:
        return np.stack([np.asarray(chosen), np.asarray(rejected)], axis=1).reshape(-1).astype(np.int64)

    subset = np.unique(np.asarray(pairs["subset"].to_pylist(), dtype=np.str_), return_inverse=True)[1]
    lengths = both(*(pc.list_value_length(pairs[f"{side}_ids"]) for side in SIDES))
    starts, stops = (both(*(pairs[f"{side}_{end}"] for side in SIDES)) for end in ("start", "end"))
    whole = region != "response"
    return Sequences(
        lengths_R=lengths,
        starts_R=np.zeros_like(starts) if whole else starts,
        stops_R=lengths if whole else stops,
        strata_R=both(2 * subset, 2 * subset + 1),
        groups_R=np.repeat(groups_P, 2),
    )


def _table(pairs: pa.Table, rows: Sequence[tuple[int, int, float | None, int, int]], window: int) -> pa.Table:
    import pyarrow as pa

    from safer_engine.science.contexts import span_round

    found = []
    for latent, match, activation, response, position in rows:
        pair, side = response // 2, SIDES[response % 2]
        span = span_round(position, len(pairs[f"{side}_ids"][pair]), window)
        found.append(
            {
                "latent_id": latent,
                "match": match,
                "activation": activation,
                "pair_id": pairs["pair_id"][pair].as_py(),
                "side": side,
                "position": position,
                "tokens": window_tokens(pairs, response, span),
                "focus": span.focus,
            }
        )
    numbers = {"latent_id": pa.int32(), "match": pa.int32(), "activation": pa.float32()}
    where = {"pair_id": pa.string(), "side": pa.string(), "position": pa.int32()}
    return pa.Table.from_pylist(found, pa.schema({**numbers, **where, "tokens": pa.list_(pa.string()), "focus": pa.int32()}))
