"""How figures and foreign texts are shown: numbers in words, hidden characters made visible."""

from __future__ import annotations

import re
from datetime import timedelta

from markupsafe import Markup, escape

from safer_engine.report.model import Estimate, Feature, Text
from safer_engine.report.nodes import Scalar

MINUS = "\u2212"
NARROW_SPACE = "\u202f"
NONE = "–"
_LONGEST = 1_200
_LONG_DIGEST = re.compile(r"^([a-z0-9]+:[0-9a-f]{10})[0-9a-f]{54}$")

# C0 but tab and newline, DEL, C1, soft hyphen; zero-width space, word joiner and invisible operators, byte order mark;
# direction marks, embeddings, overrides, isolates; line and paragraph separators; tags; what no text may hold.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ufffe\uffff\U000e0000-\U000e007f]"
)
_NAMES = {0x00: "NUL", 0x07: "BEL", 0x08: "BS", 0x0D: "CR", 0x1B: "ESC", 0x7F: "DEL", 0xAD: "SHY", 0x200B: "ZWSP", 0x200E: "LRM",
          0x200F: "RLM", 0x202A: "LRE", 0x202B: "RLE", 0x202C: "PDF", 0x202D: "LRO", 0x202E: "RLO", 0x2066: "LRI", 0x2067: "RLI",
          0x2068: "FSI", 0x2069: "PDI", 0xFEFF: "BOM"}  # fmt: skip


def visible(text: str) -> str:
    """The text with control and direction characters written out, so that it shows what it holds."""
    return _HIDDEN.sub(lambda match: f"⟦{_hidden_name(match.group())}⟧", text.replace("\r\n", "\n"))


def _hidden_name(character: str) -> str:
    return _NAMES.get(ord(character), f"U+{ord(character):04X}")


def marked(text: str) -> Markup:
    """Escaped HTML of a foreign text, hidden characters set apart."""
    escaped = str(escape(text.replace("\r\n", "\n")))
    return Markup(_HIDDEN.sub(lambda m: f'<span class="hidden-char">{_hidden_name(m.group())}</span>', escaped))  # noqa: S704


def shown(text: Text | None, limit: int | None = None) -> Markup:
    """A clipped text with a note of what was left out."""
    if text is None:
        return Markup("")
    kept = text.text if limit is None else text.text[:limit]
    omitted = text.omitted + len(text.text) - len(kept)
    note = Markup('<span class="cut">… {} more characters</span>').format(count(omitted)) if omitted else Markup("")
    return marked(kept) + note


def plain(text: Text | None, limit: int = 120) -> str:
    """A text on one line, clipped."""
    if text is None:
        return ""
    line = " ".join(visible(text.text[: 4 * limit]).split())
    cut = len(line) > limit or len(text.text) > 4 * limit or text.omitted
    return line[: limit - 1].rstrip() + "…" if cut else line


def name_of(feature: Feature, limit: int = 72) -> str:
    """A short name: the explanation where it is one, else the direction and the words that mark the contexts.

    Never a sentence cut in the middle: an explanation that is too long gives its first sentence, if that is short enough.
    Empty where there is no name, and where the labeller gave no rating: its explanation then says why there is none.
    """
    if feature.status not in (None, "labelled", "unverified"):
        return ""
    whole = plain(feature.explanation, _LONGEST)
    if whole and len(whole) <= limit and not whole.endswith("…"):
        return whole
    start = f"{words(feature.direction)}: " if feature.direction else ""
    for n in range(min(4, len(feature.terms)), 0, -1):
        name = start + ", ".join(plain(term, 30) for term in feature.terms[:n])
        if len(name) <= limit:
            return name
    first = re.match(r".+?[.!?](?= )", whole)
    return first.group() if first and len(first.group()) <= limit else ""


def count(value: float | int | None) -> str:
    """A whole number with narrow spaces between thousands."""
    return NONE if value is None else f"{round(value):,}".replace(",", NARROW_SPACE).replace("-", MINUS)


def number(value: float | None, digits: int = 3) -> str:
    """A figure with `digits` significant digits after the point where it is small; scientific where it is tiny."""
    if value is None:
        return NONE
    if value and (abs(value) < 10 ** (-digits) or abs(value) >= 1e6):
        return f"{value:.{max(1, digits - 1)}e}".replace("-", MINUS)
    return f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """A figure with its sign."""
    if value is None:
        return NONE
    return f"{value:+.{digits}f}".replace("-", MINUS)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    if value is None:
        return NONE
    return f"{100 * value:.{digits}f}{NARROW_SPACE}%".replace("-", MINUS)


def small_percent(value: float | None) -> str:
    """A share that may be tiny, as a percentage with two significant digits."""
    if value is None:
        return NONE
    digits = 1 if value >= 0.01 or value == 0 else 2 if value >= 0.001 else 3
    return percent(value, digits)


def share_interval(estimate: Estimate) -> str:
    """Ends of a share's interval."""
    if estimate.lo is None or estimate.hi is None:
        return NONE
    return f"{100 * estimate.lo:.1f}–{100 * estimate.hi:.1f}"


def interval(lo: float | None, hi: float | None, digits: int = 2) -> str:
    """Ends of an interval."""
    return NONE if lo is None or hi is None else f"{signed(lo, digits)} … {signed(hi, digits)}"


def duration(seconds: float | None) -> str:
    """Seconds as a person reads them."""
    if seconds is None:
        return NONE
    if seconds < 59.95:
        return f"{seconds:.1f}{NARROW_SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}{NARROW_SPACE}min {rest:02d}{NARROW_SPACE}s" if minutes < 60 else str(timedelta(seconds=round(seconds)))


def size(n_bytes: int | None) -> str:
    """Bytes in the largest fitting unit."""
    if n_bytes is None:
        return NONE
    value = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f}{NARROW_SPACE}{unit}" if unit in ("B", "kB") else f"{value:.1f}{NARROW_SPACE}{unit}"
        value /= 1000
    return f"{value:.1f}{NARROW_SPACE}TB"


def fact(value: Scalar) -> str:
    """A small fact of any type."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", MINUS)
    return NONE if value is None else visible(value)


def words(name: str) -> str:
    """An identifier as words."""
    return visible(name).replace("_", " ")


def base_name(origin: str) -> str:
    """The last part of a path or hub id; of a name that is a digest, its beginning."""
    return visible(_LONG_DIGEST.sub(r"\1…", origin.rstrip("/").rsplit("/", 1)[-1] or origin))
