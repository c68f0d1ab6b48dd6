"""The report as one self-contained HTML file: no network, no inline style or handler, everything foreign escaped."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from safer_engine.errors import ResourceError
from safer_engine.report import plots, plots_causal, plots_sweep, plots_verification, summary, text
from safer_engine.report.build_doubts import SHOWN_BUDGETS
from safer_engine.report.doubt_text import CONTESTED_WORDS, decided, expected_at, how_chosen, sae_adds, sides, standing
from safer_engine.report.glossary import GLOSSARY
from safer_engine.report.harsh import mild_name, veiled_words
from safer_engine.report.label_words import about_labels, detection_words
from safer_engine.report.model import (
    AxisEdits,
    Context,
    Evaluation,
    Feature,
    Health,
    Length,
    Margins,
    Measured,
    ReportDocument,
    SaeReport,
    Score,
)
from safer_engine.report.open_parts import spec_value
from safer_engine.report.plots import Bar
from safer_engine.report.provenance import NO_PLAN
from safer_engine.report.svg import element

MAX_BYTES = 3_000_000
_LEVELS = 6
_FIRST_CARDS = 8
_CONTENTS = (
    ("overview", "Overview"), ("salience", "Salience"), ("features", "Features"), ("causal", "Causal effects"),
    ("sae", "Autoencoder"), ("margins", "Margins"), ("accuracy", "Accuracy"), ("pairs", "Suspicious pairs"),
    ("verification", "Verification"),
    ("data", "Data health"), ("cost", "Cost"), ("provenance", "Provenance"), ("glossary", "Words"),
)  # fmt: skip
_CANDIDATE_COLUMNS = (
    ("Latent", True), ("About", False), ("Rating", True), ("Detection", True), ("Status", False), ("Salience", True),
    ("q", True), ("At equal length", True), ("Marks", False), ("Fires at", True), ("Responses", True),
)  # fmt: skip
_STYLES = ("concise", "detailed plain", "detailed markdown")
_DATA_FACTS = {
    "groups": "grouping", "n_rows": "input rows", "sides_truncated": "texts truncated", "marked_rows": "rows marked as poisoned",
}  # fmt: skip
_MEASURES = {"correlation": "correlation of rewards", "preference_kept": "preferences kept", "margin_variance": "margin variance"}


@dataclass(frozen=True)
class Limits:
    """How much a page shows: cards, contexts on each, pairs, characters of a text, rows of the table, margin plots."""

    cards: int
    contexts: int
    pairs: int
    text: int
    rows: int
    margins: int


_LIMITS = (
    Limits(cards=256, contexts=20, pairs=500, text=6_000, rows=2_000, margins=24),
    Limits(cards=64, contexts=10, pairs=120, text=3_000, rows=512, margins=24),
    Limits(cards=32, contexts=6, pairs=60, text=2_000, rows=256, margins=16),
    Limits(cards=16, contexts=3, pairs=30, text=1_000, rows=128, margins=12),
    Limits(cards=8, contexts=1, pairs=10, text=400, rows=32, margins=6),
)


def render_html(report: ReportDocument) -> str:
    """The page, at most `MAX_BYTES` long: what does not fit is left out in steps, and the page says so.

    Raises:
        ResourceError: even the shortest form is too large.
    """
    for step, limits in enumerate(_LIMITS):
        page = _render(report, limits, shortened=step > 0)
        if len(page.encode()) <= MAX_BYTES:
            return page
    raise ResourceError(
        f"the report page is over {MAX_BYTES} bytes even in its shortest form",
        "audit fewer axes and subsets, or shorten their names; report.json holds everything",
    )


def _render(report: ReportDocument, limits: Limits, *, shortened: bool) -> str:
    template = _environment().get_template("report.html.j2")
    page = template.render(_context(report, limits, shortened=shortened))
    return page if page.endswith("\n") else page + "\n"


def _context(report: ReportDocument, limits: Limits, *, shortened: bool) -> dict[str, Any]:
    style, script = asset("report.css"), asset("report.js")
    note = f"Shortened to keep this file under {MAX_BYTES // 1_000_000} MB: report.json and the parquet files hold the rest."
    return {
        "report": report,
        "limits": limits,
        "shortened": note if shortened else "",
        "title": summary.title(report),
        "key_figures": summary.key_figures(report),
        "paragraph": summary.paragraph(report),
        "cautions": summary.cautions(report),
        "contents": _CONTENTS,
        "glossary": GLOSSARY,
        "style": Markup(style),  # noqa: S704 (our own file)
        "script": Markup(script),  # noqa: S704 (our own file)
        "style_digest": _source_digest(style),
        "script_digest": _source_digest(script),
        "why": lambda path: report.provenance.not_computed.get(path, "not computed"),
        "style_names": _STYLES,
        "spec_text": json.dumps(report.spec, indent=1, ensure_ascii=False),
        "machine": _machine(report),
        **_ids(),
        **_feature_context(report, limits),
        **_pair_context(report, limits),
        **_figure_context(report),
    }


def _ids() -> dict[str, Callable[[], str]]:
    """Ids of veiled blocks: `next_id` makes one, `this_id` repeats it."""
    counter = itertools.count(1)
    current = {"id": ""}

    def next_id() -> str:
        current["id"] = f"veiled-{next(counter)}"
        return current["id"]

    return {"next_id": next_id, "this_id": lambda: current["id"]}


def _feature_context(report: ReportDocument, limits: Limits) -> dict[str, Any]:
    features = report.features or []
    wanted = int(spec_value(report, "report", "features"))
    cards = features[: min(wanted, limits.cards)]
    first = sum(bool(feature.safety_feature) for feature in cards) or _FIRST_CARDS
    latents = report.sae.latents if report.sae is not None else None
    return {
        "cards": cards[:first],
        "more_cards": cards[first:],
        "carded": frozenset(feature.latent_id for feature in cards),
        "labelled": any(feature.safety_feature is not None for feature in features),
        "listed": features[: limits.rows],
        "candidate_columns": _CANDIDATE_COLUMNS,
        "salience_reach": max([0.05, *(abs(s) for card in cards for s in card.saliences)]),
        "latents_tested": latents is not None and latents.tests is not None,
        "cluster_names": {c.cluster: ", ".join(f"“{t}”" for t in c.terms) for c in (latents.clusters if latents else [])},
        "tokens": token_markup,
        "words_of": veiled_words,
        "detection_words": detection_words,
        "about_labels": "" if report.labels is None else about_labels(report.labels),
    }


def _pair_context(report: ReportDocument, limits: Limits) -> dict[str, Any]:
    edits = report.edits
    pairs = edits.pairs[: limits.pairs] if edits is not None else []
    filters = [
        ("axis", sorted({pair.axis for pair in pairs})),
        ("action", sorted({pair.action or "undecided" for pair in pairs})),
    ]
    return {
        "shown_pairs": pairs,
        "flagged": [pair for pair in pairs if pair.action != "keep"],
        "kept": [pair for pair in pairs if pair.action == "keep"],
        "pair_filters": [(field, values) for field, values in filters if len(values) > 1],
        "edits_slices": _slices(edits.by_axis) if edits is not None else [],
        "names": {feature.latent_id: mild_name(feature) for feature in report.features or []},
        "sides": sides,
        "undoubted": lambda pair: summary.undoubted(pair, edits.budget if edits is not None else None),
        "doubt_budgets": SHOWN_BUDGETS,
        "contested_words": CONTESTED_WORDS,
        "decided": decided,
        "standing": standing,
        "expected_at": expected_at,
        "how_chosen": how_chosen,
        "sae_adds": sae_adds,
        "agreeing": lambda votes: sum(vote > 0 for vote in votes),
        "has_text": any(pair.prompt is not None for pair in pairs) or any(f.contexts for f in report.features or []),
    }


def _figure_context(report: ReportDocument) -> dict[str, Any]:
    longest = max((cost.seconds for cost in report.provenance.timing.stages), default=0.0)
    return {
        "salience_plot": plots.salience_plot,
        **plots_causal.IN_TEMPLATES,
        **plots_verification.IN_TEMPLATES,
        **plots_sweep.IN_TEMPLATES,
        "salience_spark": plots.salience_spark,
        "curve_plot": plots.curve_plot,
        "density_plot": plots.density_plot,
        "margin_plot": plots.margin_plot,
        "interval_plot": plots.interval_plot,
        "recovered_plot": lambda sae: _recovered_plot(sae, float(spec_value(report, "sae", "interpretable_floor"))),
        "meter": lambda share: _strip(share, 74, "meter"),
        "no_plan": NO_PLAN,
        "cost_bar": lambda seconds: _strip(seconds / longest if longest else 0.0, 144, "cost-bar"),
        "stack": _stack,
        "slices": _slices,
        "slice_name": _slice_name,
        "margin_label": _margin_label,
        "accuracy_scale": _accuracy_scale,
        "margin_scale": _margin_scale,
        "interval": text.interval,
        "benchmark_tables": _benchmark_tables,
        "health_parts": _health_parts(report),
        "dataset_facts": _dataset_facts(report),
    }


def token_markup(context: Context, feature: Feature) -> Markup:
    """A context's tokens, shaded by activation relative to the feature's strongest one; the focus is marked."""
    peak = max([c.activation for c in feature.contexts] + [1e-9])
    parts: list[Markup] = []
    silent: list[str] = []
    for index, (token, activation) in enumerate(zip(context.tokens, context.activations, strict=True)):
        level = math.ceil(_LEVELS * min(1.0, max(0.0, activation or 0.0) / peak))
        focus = index == context.focus
        if level == 0 and not focus:
            silent.append(token)
            continue
        parts += [text.marked("".join(silent)), _token(token, activation, level, focus=focus)]
        silent = []
    return Markup("").join([*parts, text.marked("".join(silent))])


def _token(token: str, activation: float | None, level: int, *, focus: bool) -> Markup:
    kind = f"a{level}" + (" focus" if focus else "")
    return Markup('<b class="{}" data-tip="{}">{}</b>').format(kind, text.number(activation, 2), text.marked(token))


def _recovered_plot(sae: SaeReport, floor: float) -> Markup:
    parts = sae.recovered or {}
    bars = [
        Bar(
            name=f"{_MEASURES[name]}, {which} positions",
            value=value,
            reference=measures.get(f"ablated_{name}"),
            floor=floor if (which, name) == ("covered", "margin_variance") else None,
        )
        for which, measures in parts.items()
        for name, value in measures.items()
        if name in _MEASURES
    ]
    return plots.bars_plot(bars, "Reward recovered: " + ", ".join(f"{bar.name} {text.percent(bar.value)}" for bar in bars))


def _strip(share: float, width: int, class_: str) -> Markup:
    """A thin bar of a share in [0, 1]."""
    filled = round(width * min(1.0, max(0.0, share)), 1)
    track = element("rect", x=0, y=0, width=width, height=8, rx=4, class_="track") if class_ == "meter" else Markup("")
    bar = element("rect", x=0, y=0, width=filled, height=8, rx=4, class_="fill")
    return element("svg", [track, bar], viewBox=f"0 0 {width} 8", class_=class_, aria_hidden="true", preserveAspectRatio="none")


def _stack(health: Health) -> Markup:
    """Kept and dropped pairs as one bar."""
    parts, start = [], 0.0
    for index, n in enumerate([health.n_kept, *health.dropped.values()]):
        width = 1000 * n / max(1, health.n_in)
        parts.append(element("rect", x=round(start, 1), y=0, width=round(width, 1), height=10, class_=f"s{min(index, 4)}"))
        start += width
    return element("svg", parts, viewBox="0 0 1000 10", preserveAspectRatio="none", aria_hidden="true")


def _slices(rows: Sequence[Any]) -> list[Any]:
    """Rows to show: a subset that is its whole axis says nothing new, and neither does a single axis beside all."""
    subsets: dict[str | None, int] = {}
    for row in rows:
        subsets[row.axis] = subsets.get(row.axis, 0) + (row.subset is not None)
    axes = [axis for axis in subsets if axis is not None]
    return [
        row
        for row in rows
        if not (row.subset is not None and subsets[row.axis] == 1)
        and not (len(axes) == 1 and None in subsets and row.subset is None and row.axis is not None)
    ]


def _slice_name(row: Measured | Margins | Score | Length | AxisEdits) -> str:
    if row.subset is not None:
        return f"{row.axis} / {row.subset}" if isinstance(row, Margins) else row.subset
    return row.axis if row.axis is not None else "all pairs"


def _margin_label(part: Margins) -> str:
    total = sum(part.histogram.counts)
    below = sum(n for n, right in zip(part.histogram.counts, part.histogram.edges[1:], strict=True) if right <= 0)
    return f"Histogram of {total} reward margins of {_slice_name(part)}; {below} are below zero"


def _accuracy_scale(rows: Sequence[Measured]) -> tuple[float, float]:
    """From a round figure below the lowest interval to 1, so that slices can be compared."""
    low = min(row.accuracy.lo if row.accuracy.lo is not None else row.accuracy.estimate for row in rows)
    return max(0.0, math.floor(min(low, 0.5) * 10) / 10), 1.0


def _margin_scale(rows: Sequence[Measured]) -> tuple[float, float]:
    ends = [end for row in rows for end in (row.margin.lo, row.margin.hi, row.margin.estimate) if end is not None]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    return (low, high) if high > low else (low - 1, high + 1)


def _benchmark_tables(evaluation: Evaluation) -> list[tuple[str, list[Score]]]:
    named = (
        ("Best of N (as RewardBench 2 scores)", evaluation.best_of_n),
        ("Styles (as RM-Bench scores)", evaluation.styles),
    )
    return [(name, _slices(scores)) for name, scores in named if scores]


def _health_parts(report: ReportDocument) -> list[tuple[str, Health]]:
    data = report.dataset
    if data is None:
        return []
    parts = [("Audited pairs", data.health)]
    return parts if data.evaluation_health is None else [*parts, ("Evaluation pairs", data.evaluation_health)]


def _dataset_facts(report: ReportDocument) -> dict[str, Any]:
    data = report.dataset
    if data is None:
        return {}
    return {
        "groups": data.n_groups,
        "tokens": data.tokens,
        "in both orders": data.n_both_orders,
        "chosen is longer": text.percent(data.longer_chosen),
        **{_DATA_FACTS.get(name, name): value for name, value in data.health.facts.items()},
    }


def _machine(report: ReportDocument) -> dict[str, Any]:
    """Machine and versions of the last stage that was computed: those of others are in report.json."""
    machines = [stage.machine for stage in report.provenance.stages if stage.machine]
    if not machines:
        return {}
    known = machines[-1]
    return {**{k: v for k, v in known.items() if not isinstance(v, dict)}, **known.get("versions", {})}


def asset(name: str) -> str:
    """A file shipped beside this module."""
    return resources.files("safer_engine.report").joinpath("assets", name).read_text(encoding="utf-8")


def _source_digest(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _template(name: str) -> str:
    return resources.files("safer_engine.report").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_template), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    names = (
        "count",
        "number",
        "signed",
        "percent",
        "small_percent",
        "share_interval",
        "duration",
        "size",
        "fact",
        "words",
        "shown",
    )
    environment.filters.update({name: getattr(text, name) for name in names})
    environment.filters["foreign"] = _foreign
    environment.filters["name_of"] = text.name_of
    environment.filters["mild_name"] = mild_name
    environment.filters["visible"] = text.visible
    return environment


def _foreign(value: str, limit: int = 2_000) -> Markup:
    """A name or message from outside: escaped, hidden characters marked, clipped."""
    return text.marked(value if len(value) <= limit else value[: limit - 1] + "…")
