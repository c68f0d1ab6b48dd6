"""A drill as one self-contained HTML file: no network, no inline style or handler, everything foreign escaped."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from safer_engine.report import text
from safer_engine.report.html import asset
from safer_engine.report.model_drill import DrillDocument, Effect
from safer_engine.report.plots_drill import RULE_WORDS, found_plot, harm_plot, ranking, rules_of

RANKING_WORDS = {
    "suspicion": "suspicion", "margin": "reward margin", "pair_score": "pair score", "before": "suspicion before the poison",
}  # fmt: skip


def render_drill(found: DrillDocument) -> str:
    """The page of a drill."""
    style, script = asset("report.css") + asset("drill.css"), asset("report.js")
    page = (
        _environment()
        .get_template("drill.html.j2")
        .render(
            found=found,
            style=Markup(style),  # noqa: S704 (our own file)
            script=Markup(script),  # noqa: S704 (our own file)
            style_digest=_source_digest(style),
            script_digest=_source_digest(script),
            rules=rules_of(found),
            rule_words=RULE_WORDS,
            ranking_words=RANKING_WORDS,
            harm_plot=harm_plot,
            found_plot=found_plot,
            ranking=ranking,
            points=points,
            whole=whole,
            spec_text=json.dumps(found.spec, indent=1, ensure_ascii=False),
        )
    )
    return page if page.endswith("\n") else page + "\n"


def points(effect: Effect | None) -> str:
    """A change of accuracy in points, with its interval."""
    if effect is None:
        return "–"
    said = text.signed(100 * effect.change, 1)
    return said if effect.lo is None or effect.hi is None else f"{said} ({text.interval(100 * effect.lo, 100 * effect.hi, 1)})"


def whole(share: float | None) -> str:
    """A share as a whole percentage without its sign; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.0f}"


def _source_digest(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _template(name: str) -> str:
    return resources.files("safer_engine.report").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_template), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update({name: getattr(text, name) for name in ("count", "percent", "number")})
    environment.filters["foreign"] = text.marked
    return environment
