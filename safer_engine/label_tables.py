"""Between the tables of latents and labels and the values that labellers take and give."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from safer_engine.artifacts import Latents, SparseAutoencoder
from safer_engine.labellers.base import Candidate, Window
from safer_engine.labellers.rubric import rubric_label
from safer_engine.store import WorkArea

if TYPE_CHECKING:
    import pyarrow as pa

    from safer_engine.labellers.checking import CheckedLabel, CheckedLabels, HeldOut
    from safer_engine.labellers.model_labeller import Kept
    from safer_engine.spec_labels import Correction, LabelSpec


@dataclass(frozen=True)
class WorkAnswers:
    """Answers of a paid endpoint, one file each in the work area: a crash costs none of them."""

    work: WorkArea

    def get(self, key: str) -> Kept | None:
        """See `Answers.get`."""
        from safer_engine.labellers.model_labeller import Kept

        path = self.work.scratch / f"answer-{key}.json"
        return Kept(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def put(self, key: str, answer: Kept) -> None:
        """See `Answers.put`."""
        with self.work.publish(f"answer-{key}.json", scratch=True) as path:
            path.write_text(json.dumps(asdict(answer)), encoding="utf-8", newline="")


def candidate_windows(latents: Latents) -> list[Candidate]:
    """The candidates by rank, each with its contexts, strongest first; a candidate without any has no windows."""
    windows: dict[int, list[tuple[int, Window]]] = {}
    for row in latents.table("contexts.arrow").to_pylist():
        window = Window(tuple(row["tokens"]), row["focus"], tuple(row["activations"]))
        windows.setdefault(row["latent_id"], []).append((row["rank"], window))
    found = []
    for latent in _candidates(latents):
        ordered = sorted(windows.get(latent, []), key=lambda item: item[0])
        found.append(Candidate(latent, tuple(window for _, window in ordered)))
    return found


def background_windows(latents: Latents) -> list[Window]:
    """Windows at random positions."""
    if not latents.has("background.arrow"):
        return []
    return [Window(tuple(row["tokens"]), row["focus"]) for row in latents.table("background.arrow").to_pylist()]


def held_out_windows(latents: Latents) -> dict[int, HeldOut]:
    """Held-out windows of each candidate that has any, stripped of what would give them away."""
    from safer_engine.labellers.checking import HeldOut

    if not latents.has("checks.arrow"):
        return {}
    found: dict[int, list[tuple[Window, bool]]] = {}
    for row in latents.table("checks.arrow").to_pylist():
        window = Window(tuple(row["tokens"]), row["focus"])
        found.setdefault(row["latent_id"], []).append((window, row["activation"] is not None))
    return {
        latent: HeldOut(tuple(window for window, _ in rows), tuple(fires for _, fires in rows)) for latent, rows in found.items()
    }


@dataclass(frozen=True)
class Corrections:
    """What people say of this audit's candidates.

    Attributes:
        used: by latent.
        of_others: number of entries about another SAE; not_candidates: about latents of this one that are no candidates.
    """

    used: dict[int, Correction]
    of_others: int
    not_candidates: int


def matching_corrections(given: Sequence[Correction], sae: SparseAutoencoder, latents: Latents) -> Corrections:
    """The corrections that are about this SAE, by the digest of its weights, and its candidates."""
    digest, candidates = sae_digest(sae), set(_candidates(latents))
    mine = {one.latent_id: one for one in given if one.sae == digest}
    used = {latent: one for latent, one in mine.items() if latent in candidates}
    return Corrections(used, len(given) - len(mine), len(mine) - len(used))


def sae_digest(sae: SparseAutoencoder) -> str | None:
    """sha256 of an SAE's weights."""
    stored = sae.stored.manifest.files.get("sae.safetensors")
    return None if stored is None else stored.digest


def mark_features(labels: Sequence[CheckedLabel], latents: Latents, spec: LabelSpec) -> dict[int, int]:
    """Rank, from 1, of each safety feature: rated at least `min_rating`, the first `keep` in the order of the candidates."""
    rated = {
        one.label.latent_id
        for one in labels
        if one.label.status == "labelled" and one.label.rating is not None and one.label.rating >= spec.min_rating
    }
    ordered = [latent for latent in _candidates(latents) if latent in rated]
    return {latent: rank for rank, latent in enumerate(ordered[: spec.keep], start=1)}


def labels_table(checked: Sequence[CheckedLabel], marked: dict[int, int], labeller: str) -> pa.Table:
    """`labels.arrow`."""
    import pyarrow as pa

    labels, found = [one.label for one in checked], [one.detection for one in checked]
    columns: dict[str, tuple[Any, Any]] = {
        "latent_id": ([label.latent_id for label in labels], pa.int32()),
        "status": ([label.status for label in labels], pa.string()),
        "rating": ([label.rating for label in labels], pa.int8()),
        "explanation": ([label.explanation for label in labels], pa.string()),
        "direction": ([label.direction for label in labels], pa.string()),
        "terms": ([list(label.terms) for label in labels], pa.list_(pa.string())),
        "labeller": ([labeller for _ in labels], pa.string()),
        "safety_feature": ([label.latent_id in marked for label in labels], pa.bool_()),
        "rank": ([marked.get(label.latent_id) for label in labels], pa.int32()),
        "detection": ([one.score if one else None for one in found], pa.float64()),
        "detection_lo": ([one.lo if one else None for one in found], pa.float64()),
        "detection_hi": ([one.hi if one else None for one in found], pa.float64()),
        "detection_recall": ([one.recall if one else None for one in found], pa.float64()),
        "detection_specificity": ([one.specificity if one else None for one in found], pa.float64()),
        "detection_n": ([one.n_fires + one.n_silent if one else None for one in found], pa.int32()),
        "detection_problem": ([one.problem or None for one in checked], pa.string()),
        "rating_again": ([one.rating_again for one in checked], pa.int8()),
        "status_again": ([one.status_again for one in checked], pa.string()),
        "corrected_by": ([label.by for label in labels], pa.string()),
    }
    return pa.table({name: pa.array(values, type=kind) for name, (values, kind) in columns.items()})


def facts(found: CheckedLabels, marked: dict[int, int], spec: LabelSpec, labeller: str) -> dict[str, Any]:
    """The stage's meta."""
    labels = [one.label for one in found.labels]
    ratings = Counter(label.rating for label in labels if label.rating is not None)
    spent = found.spent.values()
    return {
        "rubric": rubric_label(spec.rubric),
        "labeller": labeller,
        "counts": dict(sorted(Counter(label.status for label in labels).items())),
        "ratings": {str(rating): n for rating, n in sorted(ratings.items())},
        "calls": sum(one.calls for one in spent),
        "cost": sum(one.cost for one in spent),
        "spent": {name: {"calls": one.calls, "cost": one.cost} for name, one in found.spent.items()},
        "n_safety_features": len(marked),
        "min_rating": spec.min_rating,
        "detection_floor": spec.detection_floor,
        "agreement": None if found.agreement is None else asdict(found.agreement),
        "no_agreement": found.no_agreement or None,
        "n_again": sum(one.status_again is not None for one in found.labels),
        "n_again_unrated": sum(one.status_again is not None and one.rating_again is None for one in found.labels),
        "n_corrected": sum(label.by is not None for label in labels),
    }


def remarks(meta: dict[str, Any], n: int) -> list[str]:
    """What the reader is to be told of the labels of n candidates."""
    found = []
    if unusable := sum(meta["counts"].get(status, 0) for status in ("unparsed", "error", "skipped")):
        found.append(f"{unusable} of {n} candidates got no label and cannot be safety features")
    if others := meta["n_corrections_of_others"]:
        found.append(f"corrections about another SAE, not used: {others}")
    if outside := meta["n_corrections_not_candidates"]:
        found.append(f"corrections about latents that are no candidates, not used: {outside}")
    return found


def _candidates(latents: Latents) -> list[int]:
    """Candidate latents by rank."""
    table = latents.latents
    rows = zip(*(table[name].to_pylist() for name in ("rank", "latent_id", "candidate")), strict=True)
    return [latent for _, latent in sorted((rank, latent) for rank, latent, candidate in rows if candidate)]
