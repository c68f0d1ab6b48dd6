"""A comparison's files."""

from __future__ import annotations

from pathlib import Path

from safer_engine.comparison.model import ComparisonDocument
from safer_engine.comparison.page import render_page
from safer_engine.errors import SpecError
from safer_engine.publishing import publishing

DOCUMENT, PAGE = "comparison.json", "comparison.html"


def require_ours(folder: Path) -> None:
    """Raise SpecError where the folder holds a file that would be replaced and that no comparison wrote."""
    path = folder / DOCUMENT
    if (folder / PAGE).exists() and not path.exists():
        raise SpecError(
            f"{folder} holds a {PAGE} without its {DOCUMENT}", "name another folder with --out, or move the file away"
        )
    if path.exists() and (not path.is_file() or b'"schema_version"' not in path.read_bytes()[:200]):
        raise SpecError(f"{path} is not as a comparison wrote it", "name another folder with --out, or move the file away")


def write_comparison(found: ComparisonDocument, folder: Path) -> Path:
    """Write comparison.json and comparison.html, each whole or not at all; the page's path. Raises ResourceError."""
    page = render_page(found)
    for name, content in ((DOCUMENT, found.model_dump_json(indent=1) + "\n"), (PAGE, page)):
        with publishing(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8", newline="\n")
    return folder / PAGE
