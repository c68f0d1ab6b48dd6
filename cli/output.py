"""How commands speak: tables and progress on a terminal, one JSON object with --json."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from unicodedata import category

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from safer_engine.events import NullObserver

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


class _Console(Console):
    """One that leaves it to the command what it comes to when nobody reads its output; rich itself would exit with 1."""

    def on_broken_pipe(self) -> None:
        if self.stderr:
            super().on_broken_pipe()
        raise BrokenPipeError


def console(*, err: bool = False) -> Console:
    """A console that keeps wide tables whole when the output is not a terminal."""
    stream = sys.stderr if err else sys.stdout
    return _Console(stderr=err, width=None if stream.isatty() else 120, highlight=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table; columns whose name begins with `>` are right-aligned. Cells are plain text, never markup."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for column in columns:
        side: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        made.add_column(column.lstrip(">"), justify=side, overflow="fold", no_wrap=column == "id")
    for row in rows:
        made.add_row(*(escape("" if cell is None else str(cell)) for cell in row))
    return made


def seen(text: str) -> str:
    """A text fit for a terminal: characters that move the cursor, change colours or turn the direction are written out."""
    return "".join(c if c == "\n" or category(c) not in _HIDDEN else f"⟦U+{ord(c):04X}⟧" for c in text)


def duration(seconds: float | None) -> str:
    """Seconds as a person writes them."""
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def left(seconds: float) -> str:
    """An estimate of what is left as a person says it: no more digits than it is worth."""
    whole = round(seconds) if seconds < 20 else 5 * round(seconds / 5)
    return "a moment left" if whole < 1 else f"about {whole} s left" if whole < 60 else f"about {duration(whole)} left"


def size(count: float | None) -> str:
    """Bytes as a person writes them."""
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class QuietObserver(NullObserver):
    """Shows nothing; remembers how each stage ended."""

    def __init__(self) -> None:
        self.outcomes: dict[str, tuple[str, float]] = {}

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Nothing to show."""
        yield

    def stage_finished(self, stage: str, outcome: str, seconds: float) -> None:
        """Remember it."""
        self.outcomes[stage] = (outcome, seconds)


class TerminalObserver(QuietObserver):
    """Shows stages as progress bars, or as lines where there is no terminal."""

    def __init__(self, shown: Console) -> None:
        super().__init__()
        self._console = shown
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<13}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=shown,
            transient=False,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_line = 0.0

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Show progress during the block."""
        if not self._console.is_terminal:
            yield
            return
        with self._progress:
            yield

    def stage_started(self, stage: str, key: str) -> None:
        """A new bar."""
        if self._console.is_terminal:
            self._tasks[stage] = self._progress.add_task(stage, total=None, count="")
        else:
            self._console.print(f"{stage}: started", markup=False)

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        """Move the bar; without a terminal a line every ten seconds."""
        count = f"{done:,.0f}/{total:,.0f} {unit}"
        if stage in self._tasks:
            self._progress.update(self._tasks[stage], completed=done, total=total, count=count)
        elif not self._console.is_terminal and time.monotonic() - self._last_line > 10:
            self._last_line = time.monotonic()
            self._console.print(f"{stage}: {count}", markup=False)

    def stage_finished(self, stage: str, outcome: str, seconds: float) -> None:
        """Close the bar."""
        super().stage_finished(stage, outcome, seconds)
        said = outcome if outcome in ("cached", "failed", "stopped") else duration(seconds)
        if outcome == "absent":
            said = "not computed"
        if self._console.is_terminal:
            task = self._tasks.get(stage)
            if task is None:
                task = self._tasks[stage] = self._progress.add_task(stage, total=1, count="")
            total = next(t.total for t in self._progress.tasks if t.id == task) or 1
            self._progress.update(task, total=total, completed=total if outcome not in ("failed", "stopped") else 0, count=said)
            self._progress.stop_task(task)
        else:
            self._console.print(f"{stage}: {said}", markup=False)

    def note(self, stage: str, message: str) -> None:
        """Print above the bars."""
        self._console.print(f"[{stage}] {message}", markup=False, style="yellow", soft_wrap=True)
