"""Templates into pages: everything foreign escaped, no inline script or style, nothing from elsewhere."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from typing import Any

from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from service.jobs.model import JobKind

POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self' data:; frame-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
STATIC = {"pages.css": "text/css; charset=utf-8", "pages.js": "text/javascript; charset=utf-8"}
_DEEDS = {
    JobKind.AUDIT: "audit of", JobKind.VERIFY: "verification of", JobKind.TRAIN_RM: "training of",
    JobKind.COMPARE: "comparison of", JobKind.DRILL: "drill with",
}  # fmt: skip
_UNITS = ("B", "kB", "MB", "GB", "TB")


def render(name: str, context: dict[str, Any], status: int = 200) -> Response:
    """A page."""
    html = _environment().get_template(name).render({"static": static_address, **context})
    return HTMLResponse(html, status, {"Content-Security-Policy": POLICY})


@cache
def static_file(name: str) -> bytes:
    """One of our own files in `static/`."""
    return (resources.files("service.http.pages") / "static" / name).read_bytes()


def static_address(name: str) -> str:
    """Where a static file is, with its digest, so that a new version is fetched at once."""
    return f"/static/{name}?{hashlib.sha256(static_file(name)).hexdigest()[:12]}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_template), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    for each in (ago, clock, duration, left, filesize, percent, number, coded, input_name, deed):
        environment.filters[each.__name__] = each
    return environment


def _template(name: str) -> str:
    return (resources.files("service.http.pages") / "templates" / name).read_text(encoding="utf-8")


def deed(kind: JobKind) -> str:
    """What a job of a kind is, before the name of its model."""
    return _DEEDS[JobKind(kind)]


def ago(at: datetime) -> str:
    """How long ago something was."""
    return f"{duration((datetime.now(UTC) - at).total_seconds())} ago"


def clock(at: datetime | None) -> str:
    """A point in time, UTC."""
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if at else "–"


def duration(seconds: float | None) -> str:
    """A length of time, in its two largest units."""
    if seconds is None:
        return "–"
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def left(seconds: float) -> str:
    """An estimated length of time: no more digits than it is worth."""
    whole = round(seconds) if seconds < 20 else 5 * round(seconds / 5)
    return "a moment" if whole < 1 else f"about {whole} s" if whole < 60 else f"about {duration(whole)}"


def coded(text: str) -> Markup:
    """A sentence in which `…` is code; everything foreign in it escaped."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    marked = (Markup("<code>{}</code>").format(part) if place % 2 else escape(part) for place, part in enumerate(parts))
    return Markup("").join(marked)


def input_name(role: str) -> str:
    """What a recorded input of a job is called (see `JobRecord.inputs`)."""
    of, _, detail = role.partition(".")
    if role.startswith("u:"):
        return f"{role[2:]}, as uploaded"
    if detail:
        return f"{of}: {'precision' if detail == 'dtype' else detail}"
    return "rubric of labels" if role == "labels" else f"{role}, content"


def filesize(size: int) -> str:
    """A number of bytes."""
    value = float(size)
    for unit in _UNITS[:-1]:
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} {_UNITS[-1]}"


def percent(share: float | None) -> str:
    """A share."""
    return "–" if share is None else f"{100 * share:.0f} %"


def number(value: float | None) -> str:
    """A number, to three digits."""
    return "–" if value is None else f"{value:.3g}"
