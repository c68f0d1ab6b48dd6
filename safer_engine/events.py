"""What the engine tells whoever watches: stages, progress, notes."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Receives the course of an audit. Methods must return quickly and must not raise."""

    def stage_started(self, stage: str, key: str) -> None:
        """A stage begins to compute."""

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        """`done` of `total` `unit`s are finished."""

    def stage_finished(self, stage: str, outcome: str, seconds: float) -> None:
        """A stage ended: `computed`, `cached`, `absent` or `failed`."""

    def note(self, stage: str, message: str) -> None:
        """Something a person should read: a warning, a count of what was dropped."""

    def cancelled(self) -> bool:
        """Asked between units of work; true makes the engine stop with `Interrupted`."""


class NullObserver:
    """Watches nothing and never cancels."""

    def stage_started(self, stage: str, key: str) -> None:
        """Ignore."""

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        """Ignore."""

    def stage_finished(self, stage: str, outcome: str, seconds: float) -> None:
        """Ignore."""

    def note(self, stage: str, message: str) -> None:
        """Ignore."""

    def cancelled(self) -> bool:
        """Never."""
        return False
