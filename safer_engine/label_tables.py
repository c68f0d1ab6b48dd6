"""Between the tables of latents and labels and the values that labellers take and give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safer_engine.artifacts import Latents
from safer_engine.labellers.base import Candidate, Labelling, LatentLabel, Window
from safer_engine.store import WorkArea

if TYPE_CHECKING:
    import pyarrow as pa

    from safer_engine.spec_labels import LabelSpec


@dataclass(frozen=True)
class WorkAnswers:
    """Answers of a paid endpoint, one file each in the work area: a crash costs none of them."""

    work: WorkArea

    def get(self, key: str) -> str | None:
        """See `Answers.get`."""
        path = self.work.scratch / f"answer-{key}.txt"
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def put(self, key: str, answer: str) -> None:
        """See `Answers.put`."""
        with self.work.publish(f"answer-{key}.txt", scratch=True) as path:
            path.write_text(answer, encoding="utf-8", errors="replace", newline="")


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


def mark_features(labels: Sequence[LatentLabel], latents: Latents, spec: LabelSpec) -> dict[int, int]:
    """Rank, from 1, of each safety feature: rated at least `min_rating`, the first `keep` in the order of the candidates."""
    rated = {
        label.latent_id
        for label in labels
        if label.status == "labelled" and label.rating is not None and label.rating >= spec.min_rating
    }
    ordered = [latent for latent in _candidates(latents) if latent in rated]
    return {latent: rank for rank, latent in enumerate(ordered[: spec.keep], start=1)}


def labels_table(labels: Sequence[LatentLabel], marked: dict[int, int], labeller: str) -> pa.Table:
    """`labels.arrow`."""
    import pyarrow as pa

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
    }
    return pa.table({name: pa.array(values, type=kind) for name, (values, kind) in columns.items()})


def facts(found: Labelling, marked: dict[int, int], rubric: str, labeller: str) -> dict[str, Any]:
    """The stage's meta."""
    ratings = Counter(label.rating for label in found.labels if label.rating is not None)
    return {
        "rubric": rubric,
        "labeller": labeller,
        "counts": dict(sorted(Counter(label.status for label in found.labels).items())),
        "ratings": {str(rating): n for rating, n in sorted(ratings.items())},
        "calls": found.calls,
        "cost": found.cost,
        "n_safety_features": len(marked),
    }


def _candidates(latents: Latents) -> list[int]:
    """Candidate latents by rank."""
    table = latents.latents
    rows = zip(*(table[name].to_pylist() for name in ("rank", "latent_id", "candidate")), strict=True)
    return [latent for _, latent in sorted((rank, latent) for rank, latent, candidate in rows if candidate)]
