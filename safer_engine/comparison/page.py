"""The comparison as one self-contained HTML file, in the style of the audit's report: no network, everything foreign escaped."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from safer_engine.comparison import plots, words
from safer_engine.comparison.model import ComparisonDocument
from safer_engine.errors import ResourceError
from safer_engine.report import text
from safer_engine.report.html import MAX_BYTES, asset

_TEMPLATE = "comparison.html.j2"
_STEPS = ((200, 256, 60), (60, 64, 24), (20, 16, 8))
"""How many pairs, latents and slices the page shows, until it fits."""
_MOST_TEXT = 200


def render_page(found: ComparisonDocument) -> str:
    """The page, at most `MAX_BYTES` long: what does not fit is left out in steps, and the page says so.

    Raises:
        ResourceError: even the shortest form is too large.
    """
    style, script = asset("report.css"), asset("report.js")
    for pairs, latents, slices in _STEPS:
        page = _environment().get_template(_TEMPLATE).render(
            found=found,
            most_pairs=pairs,
            most_latents=latents,
            most_slices=slices,
            style=Markup(style),  # noqa: S704 (our own file)
            script=Markup(script),  # noqa: S704 (our own file)
            style_digest=_digest(style),
            script_digest=_digest(script),
            title=words.title(found),
            paragraph=words.paragraph(found),
            key_figures=words.key_figures(found),
            cautions=words.cautions(found),
        )  # fmt: skip
        if len(page.encode()) <= MAX_BYTES:
            return page if page.endswith("\n") else page + "\n"
    raise ResourceError(f"the page is over {MAX_BYTES} bytes even in its shortest form", "comparison.json holds everything")


def _digest(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FunctionLoader(_load), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters.update({name: getattr(text, name) for name in ("count", "number", "signed", "percent", "small_percent")})
    made.filters.update(foreign=_foreign, marked=text.marked)
    made.globals.update(
        changes_plot=plots.changes_plot, drift_plot=plots.drift_plot, shown_slices=words.shown_slices,
        slice_name=words.slice_name, ends=words.ends, interval=text.interval,
    )  # fmt: skip
    return made


def _load(name: str) -> str:
    return resources.files("safer_engine.report").joinpath("templates", name).read_text(encoding="utf-8")


def _foreign(value: str) -> Markup:
    return text.marked(value if len(value) <= _MOST_TEXT else value[: _MOST_TEXT - 1] + "…")
