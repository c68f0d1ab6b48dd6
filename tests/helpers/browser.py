"""A real browser, pages that are watched while they are open, and what is asked of every page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from tests.helpers.servers import missing

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
_HEIGHT = 900

UNREADABLE = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const rgba = (color) => {
    if (!known.has(color)) {
      canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; known.set(color, [r, g, b, a / 255]);
    }
    return known.get(color);
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const backdrop = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.unshift(rgba(getComputedStyle(at).backgroundColor));
    return layers.reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const luminance = (color) => {
    const [r, g, b] = color.map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const words = walker.currentNode.textContent.trim();
    if (!words || !node.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })) continue;
    if (node.closest("option, script, style, #tip, .visually-hidden, .skip")) continue;
    const style = getComputedStyle(node);
    const below = backdrop(node);
    const ink = over(rgba(node instanceof SVGElement ? style.fill : style.color), below);
    const [x, y] = [luminance(ink), luminance(below)].sort((p, q) => q - p);
    const ratio = (x + 0.05) / (y + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const name = `${node.tagName}.${node.getAttribute("class")}`;
    if (ratio < (large ? 3 : 4.5)) bad.push(`${ratio.toFixed(2)} ${name} ${words.slice(0, 40)}`);
  }
  return [...new Set(bad)];
}
"""
"""Finds the texts of a page whose contrast with their ground is below WCAG 2.2 level AA (1.4.3)."""

UNFOLD = "document.querySelectorAll('details').forEach((d) => { d.open = true; })"
"""Opens all that a page folds away."""


@contextmanager
def chromium() -> Iterator[Any]:
    """A Chromium from PATH. Skips, or fails where everything is required, without one."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        missing("Chromium (Debian: chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=list(_FLAGS))
        yield started
        started.close()


class WatchedPage:
    """A page in a browser session of its own.

    Attributes:
        page: of Playwright.
        complaints: what it wrote to the console, errors and dialogs (which are refused).
        requests: every address it asked for.
    """

    def __init__(self, browser: Any, *, width: int, scheme: str = "light", **given: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": _HEIGHT}, color_scheme=scheme, **given)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", self._refuse)
        self.page.on("request", lambda request: self.requests.append(request.url))

    def _refuse(self, dialog: Any) -> None:
        self.complaints.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()
