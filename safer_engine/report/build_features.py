"""The report's sections about the SAE and its features."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from safer_engine.artifacts import Labels, Latents, SparseAutoencoder, Stability
from safer_engine.label_tables import sae_digest
from safer_engine.report.columns import EXPLANATION_LIMIT, PHRASE_LIMIT, Floats, clipped, finite, histogram, maybe_finite, scalars
from safer_engine.report.model import Context, Feature, LatentsReport, SaeReport, SubsetSalience
from safer_engine.report.model_labels import LabelAgreement, LabelCost, LabelDetection, LabelsReport
from safer_engine.report.model_plots import Curve, Overview
from safer_engine.report.model_salience import ClusterSalience, PromptCluster, SalienceTests, SeedMatch, SeedStability
from safer_engine.spec import ReportSpec

_CURVE_POINTS = 240
_RATE_BINS, _SALIENCE_BINS = 56, 44
_LOWEST_RATE = 1e-6
_NAMED = ("kind", "d_in", "d_sae", "k")


def sae_section(
    sae: SparseAutoencoder, latents: Latents | None, stability: Stability | None = None, *, text: bool = True
) -> SaeReport:
    """What the SAE is, how faithful it is, and all its latents at once."""
    facts, metrics = sae.json("sae.json"), sae.json("metrics.json")
    return SaeReport(
        kind=facts["kind"],
        d_in=facts["d_in"],
        d_sae=facts["d_sae"],
        k=facts["k"],
        facts=scalars({**{n: v for n, v in facts.items() if n not in _NAMED}, "training": metrics.get("training", {})}),
        fvu=finite(metrics["fvu"], "FVU"),
        nmse=maybe_finite(metrics.get("nmse"), "NMSE"),
        l0=finite(metrics["l0"], "L0"),
        dead_share=finite(metrics["dead_share"], "the share of dead latents"),
        dead_window=metrics.get("dead_window"),
        silent_share=maybe_finite(metrics.get("silent_share"), "the share of silent latents"),
        n_positions=metrics["n_positions"],
        density=_density(metrics.get("density")),
        recovered=_recovered(metrics.get("recovered")),
        interpretable=metrics.get("interpretable"),
        digest=sae_digest(sae),
        curve=_curve(sae),
        latents=None if latents is None else _latents(latents, stability, text),
    )


def _density(rates: list[float] | None) -> Any:
    if not rates:
        return None
    logs = np.log10(np.maximum(np.asarray(rates, dtype=np.float64), _LOWEST_RATE))
    return histogram(logs, np.linspace(np.log10(_LOWEST_RATE), 0, 49))


def _recovered(measured: dict[str, Any] | None) -> dict[str, dict[str, float]] | None:
    if measured is None:
        return None
    return {
        which: {
            name: finite(value, f"reward recovered, {name}") for name, value in part.items() if isinstance(value, (int, float))
        }
        for which, part in measured.items()
        if isinstance(part, dict)
    }


def _curve(sae: SparseAutoencoder) -> Curve | None:
    if not sae.has("curve.arrow"):
        return None
    table = sae.table("curve.arrow")
    if table.num_rows == 0:
        return None
    kept = np.unique(np.linspace(0, table.num_rows - 1, min(_CURVE_POINTS, table.num_rows)).round().astype(int))
    rows = table.take(kept).to_pylist()
    return Curve(
        positions=[float(row["positions"]) for row in rows],
        loss=[round(finite(row["loss"], "a training loss"), 6) for row in rows],
        dead_share=[maybe_finite(row.get("dead_share"), "the share of dead latents") for row in rows],
    )


def _latents(latents: Latents, stability: Stability | None, text: bool) -> LatentsReport:
    table, meta = latents.latents, latents.meta
    rates = np.asarray(table.column("firing_rate").to_pylist(), dtype=np.float64)
    salience = np.asarray(table.column("salience").to_pylist(), dtype=np.float64)
    return LatentsReport(
        estimator=meta["estimator"],
        n_latents=table.num_rows,
        n_ranked=meta["n_ranked"],
        n_candidates=meta["n_candidates"],
        overview=_overview(rates, salience),
        tests=SalienceTests.model_validate(meta["tests"]) if meta.get("tests") else None,
        clusters=[_cluster(one, text) for one in meta.get("clusters", [])],
        stability=None if stability is None else _stability(stability.meta),
    )


def _stability(meta: dict[str, Any]) -> SeedStability:
    own = {name: value for name, value in meta.items() if name != "second_sae"}
    return SeedStability(**own, second_fvu=maybe_finite(meta["second_sae"].get("fvu"), "FVU of the second SAE"))


def _cluster(found: dict[str, Any], text: bool) -> PromptCluster:
    terms = [term[:PHRASE_LIMIT] for term in found["terms"]] if text else []
    return PromptCluster(cluster=found["cluster"], n_groups=found["n_groups"], terms=terms)


def _overview(rates: Floats, salience: Floats) -> Overview:
    """The grid spans what there is: a fixed one would crush small saliences into a line."""
    firing = (rates > 0) & np.isfinite(salience)
    logs, heights = np.log10(rates[firing]), salience[firing]
    low = float(np.floor(logs.min())) if len(logs) else -1.0
    limit = max(0.02, float(np.abs(heights).max()) * 1.12 if len(heights) else 0.02)
    x_edges = np.linspace(min(low, -1.0), 0, _RATE_BINS + 1)
    y_edges = np.linspace(-limit, limit, _SALIENCE_BINS + 1)
    counts, _, _ = np.histogram2d(np.clip(logs, x_edges[0], 0), heights, bins=[x_edges, y_edges])
    return Overview(
        log10_rate_edges=[round(float(e), 5) for e in x_edges],
        salience_edges=[round(float(e), 5) for e in y_edges],
        counts=[[int(c) for c in row] for row in counts],
        silent=int((~firing).sum()),
    )


def features_section(
    latents: Latents, labels: Labels | None, shown: ReportSpec, stability: Stability | None = None
) -> list[Feature]:
    """The candidates: safety features first, then by salience; contexts on the first `shown.features`."""
    table = latents.latents
    rows = [row for row in table.to_pylist() if row["candidate"]]
    labelled = {row["latent_id"]: row for row in labels.labels.to_pylist()} if labels is not None else {}
    rows.sort(key=lambda row: _order(row, labelled.get(row["latent_id"])))
    in_full = {row["latent_id"] for row in rows[: shown.features]}
    subsets, clusters = _subsets(latents), _clusters(latents)
    contexts = _contexts(latents, in_full) if shown.text else {}
    matches = {} if stability is None else {row["latent_id"]: _match(row) for row in stability.matches.to_pylist()}
    return [
        _feature(row, labelled.get(row["latent_id"]), shown.text).model_copy(
            update={
                "subsets": subsets.get(row["latent_id"], []),
                "clusters": clusters.get(row["latent_id"], []),
                "contexts": contexts.get(row["latent_id"], []),
                "second_seed": matches.get(row["latent_id"]),
            }
        )
        for row in rows
    ]


def _match(row: dict[str, Any]) -> SeedMatch:
    cosine = finite(row["match_cosine"], f"the counterpart of latent {row['latent_id']}")
    return SeedMatch(latent_id=row["match_id"], cosine=cosine, found_again=row["found_again"])


def labels_section(labels: Labels) -> LabelsReport:
    """Who labelled, and how the labels were checked."""
    meta = labels.meta
    return LabelsReport(
        labeller=meta["labeller"],
        rubric=meta["rubric"],
        statuses=meta["counts"],
        n_safety_features=meta["n_safety_features"],
        min_rating=meta["min_rating"],
        detection_floor=meta["detection_floor"],
        agreement=None if meta["agreement"] is None else LabelAgreement.model_validate(meta["agreement"]),
        no_agreement=meta["no_agreement"],
        n_again_unrated=meta["n_again_unrated"],
        n_corrected=meta["n_corrected"],
        n_corrections_unused=meta["n_corrections_of_others"] + meta["n_corrections_not_candidates"],
        spent={name: LabelCost.model_validate(spent) for name, spent in meta["spent"].items()},
    )


def _detection(label: dict[str, Any]) -> LabelDetection | None:
    score = maybe_finite(label.get("detection"), "a detection score")
    if score is None:
        return None
    lo, hi, recall, specificity = (
        finite(label[f"detection_{part}"], "a detection score") for part in ("lo", "hi", "recall", "specificity")
    )
    return LabelDetection(score=score, lo=lo, hi=hi, recall=recall, specificity=specificity, n=label["detection_n"])


def _order(row: dict[str, Any], label: dict[str, Any] | None) -> tuple[int, int, int]:
    safety = bool(label and label["safety_feature"])
    return (0 if safety else 1, (label["rank"] or 0) if safety and label else row["rank"], row["latent_id"])


def _feature(row: dict[str, Any], label: dict[str, Any] | None, text: bool) -> Feature:
    salience = finite(row["salience"], f"the salience of latent {row['latent_id']}")
    known = label or {}
    explanation = known.get("explanation") if text else None
    return Feature(
        latent_id=row["latent_id"],
        rank=row["rank"],
        safety_feature=None if label is None else bool(label["safety_feature"]),
        safety_rank=known.get("rank") if known.get("safety_feature") else None,
        status=known.get("status"),
        rating=known.get("rating"),
        explanation=clipped(explanation, EXPLANATION_LIMIT) if explanation else None,
        direction=known.get("direction") if text else None,
        terms=[clipped(term, PHRASE_LIMIT) for term in (known.get("terms") or [])[:12]] if text else [],
        labeller=known.get("labeller"),
        detection=_detection(known),
        detection_problem=(known.get("detection_problem") or "")[:PHRASE_LIMIT] or None,
        rating_again=known.get("rating_again"),
        status_again=known.get("status_again"),
        corrected_by=known.get("corrected_by"),
        fires_on="chosen" if salience >= 0 else "rejected",
        axis=row.get("axis"),
        salience=salience,
        salience_lo=maybe_finite(row["salience_lo"], "a salience's interval"),
        salience_hi=maybe_finite(row["salience_hi"], "a salience's interval"),
        t=maybe_finite(row["t"], "a t statistic"),
        salience_paper=maybe_finite(row["salience_paper"], "a salience"),
        firing_rate=finite(row["firing_rate"], "a firing rate"),
        responses=row["responses"],
        **_tested(row),
    )


_FIGURES = (
    "p", "q", "q_by", "p_max_t", "salience_selection", "salience_equal_length", "equal_length_lo", "equal_length_hi"
)  # fmt: skip
_FLAGS = ("discovery", "replicated", "length_bound", "mixed")


def _tested(row: dict[str, Any]) -> dict[str, Any]:
    """What tests say of a latent; nothing where its artifact has no tests."""
    figures = {name: maybe_finite(row.get(name), f"{name} of latent {row['latent_id']}") for name in _FIGURES}
    return {**figures, **{name: row.get(name) for name in _FLAGS}}


def _subsets(latents: Latents) -> dict[int, list[SubsetSalience]]:
    found: dict[int, list[SubsetSalience]] = defaultdict(list)
    if latents.has("subsets.arrow"):
        for row in latents.table("subsets.arrow").to_pylist():
            salience = maybe_finite(row["salience"], "a salience")
            if salience is not None:
                t = maybe_finite(row["t"], "a t statistic")
                found[row["latent_id"]].append(
                    SubsetSalience(axis=row["axis"], subset=row["subset"], n_groups=row["n_groups"], salience=salience, t=t)
                )
    return found


def _clusters(latents: Latents) -> dict[int, list[ClusterSalience]]:
    found: dict[int, list[ClusterSalience]] = defaultdict(list)
    if latents.has("clusters.arrow"):
        for row in latents.table("clusters.arrow").to_pylist():
            salience, t = finite(row["salience"], "a salience"), maybe_finite(row["t"], "a t statistic")
            one = ClusterSalience(cluster=row["cluster"], n_groups=row["n_groups"], salience=salience, t=t)
            found[row["latent_id"]].append(one)
    return found


def _contexts(latents: Latents, wanted: set[int]) -> dict[int, list[Context]]:
    found: dict[int, list[Context]] = defaultdict(list)
    if not latents.has("contexts.arrow"):
        return found
    rows = [row for row in latents.table("contexts.arrow").to_pylist() if row["latent_id"] in wanted]
    for row in sorted(rows, key=lambda row: (row["latent_id"], row["rank"])):
        found[row["latent_id"]].append(
            Context(
                pair_id=row["pair_id"],
                side=row["side"],
                position=row["position"],
                activation=round(finite(row["activation"], "an activation"), 4),
                tokens=[token[:PHRASE_LIMIT] for token in row["tokens"]],
                activations=[
                    None if a is None else round(a, 3) for a in (maybe_finite(v, "an activation") for v in row["activations"])
                ],
                focus=row["focus"],
            )
        )
    return found
