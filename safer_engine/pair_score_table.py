"""The Arrow table of `PairScores`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from safer_engine.pair_verdicts import Standing
    from safer_engine.science.pair_scoring import PairScoring


def pair_score_table(pairs: pa.Table, margins_P: NDArray[np.float64], scoring: PairScoring, standing: Standing) -> pa.Table:
    """One row per pair, in the order of `PairSet.pairs`, as the docstring of `PairScores` lists it; NaN becomes null."""
    import numpy as np
    import pyarrow as pa

    n_pairs = pairs.num_rows
    no_score = np.full(n_pairs, np.nan)
    columns: dict[str, Any] = {
        "pair": pa.array(np.arange(n_pairs), pa.int32()),
        **{name: pairs[name].combine_chunks() for name in ("pair_id", "group", "axis", "subset")},
        "reward_margin": _floats(margins_P),
        "pair_score": _floats(no_score if scoring.pair_score_P is None else scoring.pair_score_P),
        "suspicion": _floats(scoring.suspicion_P),
        "suspicion_kind": pa.array([scoring.doubts[axis].kind for axis in pairs["axis"].to_pylist()], pa.string()),
        "suspicion_base": _floats(scoring.base_P),
        "status": pa.array(standing.statuses, pa.string()),
        "disputed_by": pa.array(standing.reasons, pa.list_(pa.string())),
        **{f"signal_{name}": _floats(scoring.signals[name]) for name in sorted(scoring.signals)},
        "evidence": _evidence(scoring),
    }
    return pa.table(columns)


def _floats(values: NDArray[np.float64]) -> Any:
    import numpy as np
    import pyarrow as pa

    return pa.array(values, pa.float64(), mask=np.isnan(values))


def _evidence(scoring: PairScoring) -> Any:
    import pyarrow as pa

    found = scoring.evidence
    item = pa.StructArray.from_arrays(
        [pa.array(found.latent_ids, pa.int32()), pa.array(found.contributions, pa.float64())], ["latent_id", "contribution"]
    )
    return pa.ListArray.from_arrays(pa.array(found.offsets, pa.int32()), item)
