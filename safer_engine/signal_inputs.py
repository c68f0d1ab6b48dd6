"""Artifacts in, the arrays that signals are made of out (`science.pair_scoring.SignalInputs`)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from safer_engine.artifacts import Absent, Activations, Labels, Latents, PairSet, RetrainedMargins
from safer_engine.errors import ArtifactError, NumericalError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from safer_engine.science.pair_deltas import LatentSums
    from safer_engine.science.pair_scoring import PaperFeatures, SignalInputs

Progress = Callable[[int, int], None]
_NOT_RETRAINED = Absent("no model was retrained")


def signal_inputs(  # noqa: PLR0913 - the artifacts, and what is asked of them
    pairs: PairSet,
    activations: Activations,
    latents: Latents | Absent,
    labels: Labels | Absent,
    *,
    retrained: RetrainedMargins | Absent = _NOT_RETRAINED,
    signals: Collection[str] = ("probe_cv",),
    progress: Progress | None = None,
) -> SignalInputs:
    """Everything the signals read, one row per pair in the order of `PairSet.pairs`.

    Args:
        retrained: margins of models that did not see the pairs.
        signals: those to be made. `probe_cv` reads the vectors that the reward head reads (twelve bytes a pair and dimension);
            `dense` pools the activations at the hook, which streams every shard.
        progress: told (shards done, shards) while pooling.

    Raises:
        ArtifactError: an artifact does not cover the pairs.
        NumericalError: a reward, an activation or a sum is not finite.
    """
    from safer_engine.science.pair_scoring import SignalInputs

    table = pairs.pairs
    sums = None if isinstance(latents, Absent) else read_latent_sums(latents)
    if sums is not None and sums.n_positions_P2.shape[0] != table.num_rows:
        raise ArtifactError(f"latents cover {sums.n_positions_P2.shape[0]} pairs of {table.num_rows}")
    return SignalInputs(
        groups_P=_strings(table, "group"),
        axes_P=_strings(table, "axis"),
        subsets_P=_strings(table, "subset"),
        margins_P=reward_margins(activations, table.num_rows),
        latents=sums,
        head_delta_PD=_head_delta(activations, table.num_rows) if "probe_cv" in signals else None,
        dense_delta_PD=mean_activation_delta(activations, table.num_rows, progress) if "dense" in signals else None,
        retrained_P=None if isinstance(retrained, Absent) else retrained_margins(retrained, table.num_rows),
        paper=None if isinstance(latents, Absent) or isinstance(labels, Absent) else paper_features(latents, labels),
    )


def reward_margins(activations: Activations, n_pairs: int) -> NDArray[np.float64]:
    """r(chosen) − r(rejected) of each pair, joined by `pair`."""
    import numpy as np

    table = activations.rewards
    margin = np.full(n_pairs, np.nan)
    margin[table["pair"].to_numpy()] = table["reward_chosen"].to_numpy() - table["reward_rejected"].to_numpy()
    if not np.isfinite(margin).all():
        raise NumericalError(f"{int((~np.isfinite(margin)).sum())} pairs have no finite reward margin")
    return margin


def retrained_margins(retrained: RetrainedMargins, n_pairs: int) -> NDArray[np.float64]:
    """r(chosen) − r(rejected) of each pair by a model that did not see it, joined by `pair`; NaN: that model cannot read it.

    In units of the root mean square margin of that model, for the models of two folds differ in scale.
    """
    import numpy as np

    table = retrained.margins
    margin = np.full(n_pairs, np.nan)
    if table.num_rows != n_pairs:
        raise ArtifactError(f"retrained margins cover {table.num_rows} pairs of {n_pairs}")
    margin[table["pair"].to_numpy()] = by_fold_scale(
        table["margin"].to_numpy(zero_copy_only=False), table["fold"].to_numpy(zero_copy_only=False)
    )
    return margin


def read_latent_sums(latents: Latents) -> LatentSums:
    """The sums of all latents over each response, in memory maps."""
    from safer_engine.payload_files import map_tensors
    from safer_engine.science.pair_deltas import latent_sums

    found = map_tensors(latents.path("acts.safetensors"))
    sides = [tuple(found[f"{side}_{part}"] for part in ("indptr", "indices", "sums")) for side in ("chosen", "rejected")]
    chosen, rejected = ((side[0], side[1], side[2]) for side in sides)
    return latent_sums(chosen, rejected, found["n_positions"], latents.latents.num_rows)


def paper_features(latents: Latents, labels: Labels) -> PaperFeatures | None:
    """The labelled safety features, signed by the salience that ranked them, and all latents rated as high; None when there
    are no features. Latents of mixed sign are in neither, for no one sign is theirs."""
    import numpy as np

    from safer_engine.science.pair_scoring import PaperFeatures

    column = "salience_paper" if latents.meta.get("estimator") == "paper" else "salience"
    table = latents.latents
    salience = dict(zip(table["latent_id"].to_pylist(), table[column].to_pylist(), strict=True))
    mixed = {latent for latent, is_mixed in zip(salience, table["mixed"].to_pylist(), strict=True) if is_mixed}
    marked = zip(labels.labels["latent_id"].to_pylist(), labels.labels["safety_feature"].to_pylist(), strict=True)
    kept = np.asarray(sorted(latent for latent, is_feature in marked if is_feature and latent not in mixed), dtype=np.int64)
    if len(kept) == 0:
        return None
    ratings = zip(labels.labels["latent_id"].to_pylist(), labels.labels["rating"].to_pylist(), strict=True)
    least = int(labels.meta["min_rating"])
    rated = sorted(latent for latent, rating in ratings if rating is not None and rating >= least and latent not in mixed)
    pool = np.asarray(rated, dtype=np.int64)
    return PaperFeatures(kept, np.sign(np.asarray([salience[int(latent)] for latent in kept], dtype=np.float64)), pool)


def mean_activation_delta(activations: Activations, n_pairs: int, progress: Progress | None = None) -> NDArray[np.float32]:
    """Δ [P, D] of the mean activation over each response's covered positions, shard by shard.

    The positions are those that count for the latents by default (`science.latent_acts.counted_positions`).
    """
    import numpy as np
    from safetensors import safe_open

    from safer_engine.science.latent_acts import FlagBits, counted_positions

    bits = FlagBits(Activations.FLAG_SPECIAL, Activations.FLAG_HIGH_NORM, Activations.FLAG_HEAD, Activations.FLAG_SENTENCE_END)
    total = np.zeros((2, n_pairs, int(activations.meta["d_in"])), dtype=np.float32)
    count = np.zeros((2, n_pairs), dtype=np.int64)
    names = activations.names("shard-")
    for done, name in enumerate(names, start=1):
        with safe_open(activations.path(name), framework="pt") as shard:
            x_BD = shard.get_tensor("x").float().numpy()
            pair_B, side_B = (shard.get_tensor(part).numpy().astype(np.int64) for part in ("pair", "side"))
            kept = counted_positions(shard.get_tensor("flags").numpy(), bits, "paired_mean", "all")
        place = (side_B * n_pairs + pair_B)[kept]
        runs = np.flatnonzero(np.diff(place, prepend=-1))
        if len(runs):
            total.reshape(2 * n_pairs, -1)[place[runs]] += np.add.reduceat(x_BD[kept], runs, axis=0, dtype=np.float64)
        count += np.bincount(place, minlength=2 * n_pairs).reshape(2, n_pairs)
        if progress is not None:
            progress(done, len(names))
    mean = total / np.maximum(count, 1)[:, :, None]
    if not np.isfinite(mean).all():
        raise NumericalError("a mean activation is not finite")
    return np.asarray(mean[0] - mean[1], dtype=np.float32)


def by_fold_scale(margin_P: NDArray[np.float64], fold_P: NDArray[np.int32]) -> NDArray[np.float64]:
    """Margins in units of the root mean square of their fold; NaN stays, and so does a fold whose margins are all 0."""
    import numpy as np

    scaled = np.array(margin_P, dtype=np.float64)
    for fold in np.unique(fold_P):
        rows = fold_P == fold
        square = scaled[rows & ~np.isnan(scaled)] ** 2
        if square.size and square.mean() > 0:
            scaled[rows] /= np.sqrt(square.mean())
    return scaled


def _head_delta(activations: Activations, n_pairs: int) -> NDArray[np.float32]:
    import numpy as np
    from safetensors.numpy import load_file

    head = load_file(activations.path("head.safetensors"))
    if len(head["chosen"]) != n_pairs:
        raise ArtifactError(f"head vectors cover {len(head['chosen'])} pairs of {n_pairs}")
    return np.asarray(head["chosen"] - head["rejected"], dtype=np.float32)


def _strings(table: Any, column: str) -> NDArray[Any]:
    import numpy as np

    return np.asarray(table[column].to_pylist(), dtype=np.str_)
