"""The few instructions of a Dockerfile that this repository uses, read into stages."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

_CARRIED_OUT = ("ARG", "COPY", "ENV", "FROM", "RUN", "USER", "WORKDIR")
_KNOWN = frozenset((*_CARRIED_OUT, "CMD", "EXPOSE", "HEALTHCHECK", "LABEL", "STOPSIGNAL"))


@dataclass(frozen=True)
class Instruction:
    """One instruction: its word in capitals, and the rest of its line."""

    word: str
    rest: str


@dataclass
class Stage:
    """What follows one FROM."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def last(self, word: str) -> str:
        """The rest of the last instruction with this word; empty where there is none."""
        return next((one.rest for one in reversed(self.instructions) if one.word == word), "")

    def environment(self) -> dict[str, str]:
        """What ENV sets."""
        lines = [one.rest for one in self.instructions if one.word == "ENV"]
        return dict(pair.split("=", 1) for line in lines for pair in shlex.split(line))

    def command(self) -> list[str]:
        """CMD, which must be a JSON list."""
        return [str(part) for part in json.loads(self.last("CMD"))]

    def health(self) -> list[str]:
        """The command of HEALTHCHECK, which must be a JSON list."""
        return [str(part) for part in json.loads(self.last("HEALTHCHECK").partition(" CMD ")[2])]


def read_stages(path: Path) -> list[Stage]:
    """The stages of a Dockerfile, in order. Raises ValueError at an instruction that is not understood."""
    stages: list[Stage] = []
    for line in _lines(path.read_text(encoding="utf-8")):
        word, _, rest = line.partition(" ")
        if word not in _KNOWN:
            raise ValueError(f"{path.name}: {word} is not understood")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(base, name))
        elif stages:
            stages[-1].instructions.append(Instruction(word, rest.strip()))
        elif word != "ARG":
            raise ValueError(f"{path.name}: {word} before FROM")
    return stages


def _lines(text: str) -> list[str]:
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return [line.strip() for line in re.sub(r"\\\n\s*", " ", kept).splitlines() if line.strip()]
