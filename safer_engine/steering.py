"""Rewards of pairs with a latent's activation scaled, with the autoencoder of an audit that was made."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

from safer_engine import pipeline
from safer_engine.artifacts import Activations, Artifact, PairSet, SparseAutoencoder
from safer_engine.errors import SpecError
from safer_engine.events import NullObserver, Observer
from safer_engine.finished import finished
from safer_engine.pipeline import AuditRequest
from safer_engine.spec import DatasetSpec
from safer_engine.store import ArtifactStore, LocalArtifactStore

_GIVEN = "given"


@dataclass(frozen=True)
class Dose:
    """Rewards with the latent's activation times `scale`, means over the pairs.

    Attributes:
        margin_lo, margin_hi: 95 % interval of the mean change of the margin, by groups; None where there is one group.
    """

    scale: float
    chosen: float
    rejected: float
    margin: float
    margin_change: float
    margin_lo: float | None
    margin_hi: float | None
    accuracy: float


@dataclass(frozen=True)
class Steered:
    """A dose curve of a latent; `n_fired`: pairs in which it fires on a side."""

    latent_id: int
    n_pairs: int
    n_fired: int
    doses: tuple[Dose, ...]


def steer(
    request: AuditRequest,
    store: ArtifactStore,
    latent: int,
    scales: Sequence[float],
    over: DatasetSpec | Mapping[str, str] | None = None,
    observer: Observer | None = None,
) -> Steered:
    """Scale a latent on the pairs whose residual streams the audit kept, on those of another dataset, or on one pair.

    Args:
        request: the audit, whose stages up to `sae` lie in `store`.
        over: another dataset, of which a sample is read (of its own size, or of `causal.pairs`); or one pair: prompt, chosen,
            rejected.
        observer: told of progress, as of a stage `steer`.

    Raises:
        SpecError: the audit is not in the store, kept no residual streams, or has no such latent. DatasetRefused: `over`.
    """
    import numpy as np

    from safer_engine.stages.latents import load_sae

    found = finished(request, store, (PairSet, Activations, SparseAutoencoder))
    stored = found[SparseAutoencoder]
    assert isinstance(stored, SparseAutoencoder)
    sae = load_sae(stored, request.spec.runtime.device)
    if not 0 <= latent < sae.shape.d_sae:
        raise SpecError(f"there is no latent {latent}", f"latents are 0 … {sae.shape.d_sae - 1}")
    layer = int(found[Activations].meta["hook_layer"])
    with TemporaryDirectory(prefix="safer-steer-") as folder:
        if isinstance(over, DatasetSpec):
            found = _of_dataset(request, over, folder)
        elif over is not None:
            found = _of_one(request, over, folder)
        pairs, activations = found[PairSet], found[Activations]
        if not activations.names("residual-"):
            raise SpecError("the audit kept no residual streams (causal.pairs is 0)", "give --chosen and --rejected")
        watched, began = observer or NullObserver(), time.monotonic()
        watched.stage_started("steer", "")
        read = (pairs, activations, sae)
        order, fired_P, reward_P2C = _rewards(request, read, (latent, layer, scales), watched, alone=isinstance(over, Mapping))
        watched.stage_finished("steer", "computed", time.monotonic() - began)
    groups = np.asarray(pairs.pairs["group"].take(order).to_pylist(), dtype=np.str_)
    doses = tuple(_dose(scale, reward_P2C[:, :, at + 1], reward_P2C[:, :, 0], groups) for at, scale in enumerate(scales))
    return Steered(latent, len(order), sum(fired_P), doses)


def _rewards(
    request: AuditRequest,
    read: tuple[PairSet, Activations, Any],
    what: tuple[int, int, Sequence[float]],
    observer: Observer,
    *,
    alone: bool,
) -> tuple[list[int], list[bool], Any]:
    """Row indices of pairs, whether the latent fires in each, and rewards [P, 2, 1 + scales]: as they are, then scaled."""
    import numpy as np

    from safer_engine import sae_files
    from safer_engine.science.ablation import Edit, reward_changes, sequence_of
    from safer_engine.science.hooks import upper_blocks
    from safer_engine.science.readings import token_ids
    from safer_engine.sources.model_loading import load_reward_model

    (pairs, activations, sae), (latent, layer, scales) = read, what
    rm = load_reward_model(request.sources.model, request.spec.model, request.spec.runtime)
    ids = (token_ids(pairs.pairs, "chosen"), token_ids(pairs.pairs, "rejected"))
    named = pairs.pairs["pair_id"].to_pylist()
    wanted_P = np.asarray([name == _GIVEN for name in named]) if alone else np.ones(len(named), dtype=np.bool_)
    rows = sae_files.ResidualRows(activations, wanted_P, ids)
    edits = [Edit((latent,), scale) for scale in scales]
    above = upper_blocks(rm, layer)
    order: list[int] = []
    fired: list[bool] = []
    rewards: list[list[list[float]]] = []
    n_pairs = min(max(request.spec.causal.pairs, 2 * alone), int(wanted_P.sum()))
    for name in activations.names("residual-"):
        for index, pair in rows.of(name):
            observer.progress("steer", len(order), n_pairs, "pairs")
            sides = [sequence_of(sae, *side) for side in zip(pair.h_TD, pair.ids_T, pair.covered_T, strict=True)]
            found = reward_changes(sides, sae, [edits] * 2, above, request.spec.runtime.batch_tokens)
            order.append(index)
            fired.append(any(latent in side.latents for side in sides))
            rewards.append([[one.reward, *(one.reward + one.change_E).tolist()] for one in found])
    return order, fired, np.asarray(rewards)


def _dose(scale: float, reward_P2: Any, before_P2: Any, groups_P: Any) -> Dose:
    import numpy as np

    from safer_engine.science.stats import group_bootstrap_mean

    margin_P, before_P = (values[:, 0] - values[:, 1] for values in (reward_P2, before_P2))
    change = group_bootstrap_mean(margin_P - before_P, groups_P, 1000, np.random.default_rng(0))
    means = (float(reward_P2[:, 0].mean()), float(reward_P2[:, 1].mean()), float(margin_P.mean()))
    return Dose(scale, *means, change.estimate, change.lo, change.hi, float((margin_P > 0).mean()))


def _of_dataset(request: AuditRequest, dataset: DatasetSpec, folder: str) -> dict[type[Artifact], Any]:
    """A sample of another dataset, rendered and read as the audit's pairs are."""
    n_pairs = request.spec.causal.pairs or type(request.spec.causal)().pairs
    return _read(request, {**dataset.model_dump(mode="json"), "sample": dataset.sample or n_pairs}, n_pairs, None, folder)


def _of_one(request: AuditRequest, row: Mapping[str, str], folder: str) -> dict[type[Artifact], Any]:
    """One pair, rendered and read as the audit's are, and beside it another that is not used: an audit asks for two groups."""
    other = {"prompt": f"Not {row['prompt']}", "chosen": row["rejected"], "rejected": row["chosen"]}
    rows = [{"id": _GIVEN, "group": "1", **row}, {"id": "other", "group": "2", **other}]
    return _read(request, {"source": {"kind": "memory"}}, 2, rows, folder)


def _read(
    request: AuditRequest, dataset: Mapping[str, Any], n_pairs: int, rows: list[dict[str, str]] | None, folder: str
) -> dict[type[Artifact], Any]:
    """Pairs and activations of other data by the audit's model, hook and rendering; `rows` of a dataset in memory."""
    from safer_engine import api

    left_out = {"dataset", "evaluation", "retraining", "verification"}
    document = request.spec.model_dump(mode="json", exclude=left_out)
    document["dataset"] = {**dataset, "min_pairs": 2}
    document["causal"]["pairs"] = n_pairs
    read = api.prepare(type(request.spec).model_validate(document), rows)
    read = dataclasses.replace(read, sources=dataclasses.replace(read.sources, model=request.sources.model))
    return dict(pipeline.run(read, LocalArtifactStore(folder), NullObserver(), stages=pipeline.STAGES[:2]))
