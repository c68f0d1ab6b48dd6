"""What a runner of GitHub Actions does with the shell steps of an action or a workflow, as far as they can tell.

Expressions are looked up, steps are run by the same bash command with the same files to write to, and the log is read for
commands as the runner reads it. Steps that use other actions are not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_EXPRESSION = re.compile(r"\$\{\{\s*(.+?)\s*\}\}")
_COMMAND = re.compile(r"^\s*::([a-z-]+)(?: [^:]*)?::(.*)$")
_SHELL = ("bash", "--noprofile", "--norc", "-eo", "pipefail")


@dataclass(frozen=True)
class Done:
    """How a step ended.

    Attributes:
        commands: what the log tells the runner to do, as (command, what it is about).
    """

    code: int
    log: str
    outputs: dict[str, str]
    summary: str
    commands: list[tuple[str, str]] = field(default_factory=list)

    def said(self, command: str) -> list[str]:
        """What the log says by a command."""
        return [about for name, about in self.commands if name == command]


class Runner:
    """One machine with one workspace.

    Args:
        folder: empty; the workspace is `work` in it.
        action: the action's folder, as it was fetched by the runner.
    """

    def __init__(self, folder: Path, action: Path) -> None:
        self.folder = folder
        self.workspace = folder / "work"
        self.temporary = folder / "temp"
        self.action = action
        self.environment = {"HOME": str(folder / "home")}
        for each in (self.workspace, self.temporary, folder / "home"):
            each.mkdir(parents=True)

    def run(self, step: Mapping[str, Any], values: Mapping[str, str], **environment: str) -> Done:
        """Run a step's script. `values`: what its expressions stand for, each of which must be known."""
        script = self.folder / "script.sh"
        script.write_text(evaluated(step["run"], values), encoding="utf-8")
        files = {name: self.folder / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        for path in files.values():
            path.write_text("")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SAFER_", "GITHUB_", "PYTHON"))}
        environment = {
            **kept,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **self.environment,
            "GITHUB_ACTIONS": "true",
            "GITHUB_ACTION_PATH": str(self.action),
            "RUNNER_TEMP": str(self.temporary),
            **{name: str(path) for name, path in files.items()},
            **environment,
            **{name: evaluated(str(text), values) for name, text in step.get("env", {}).items()},
        }
        done = subprocess.run(
            [*_SHELL, str(script)], cwd=self.workspace, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=280,
        )  # fmt: skip
        log = done.stdout.decode()
        outputs = read_outputs(files["GITHUB_OUTPUT"].read_text(encoding="utf-8"))
        summary = files["GITHUB_STEP_SUMMARY"].read_text(encoding="utf-8")
        return Done(done.returncode, log, outputs, summary, read_commands(log))


def evaluated(text: str, values: Mapping[str, str]) -> str:
    """A text with its expressions replaced. Raises KeyError for one that is not known."""
    return _EXPRESSION.sub(lambda found: values[found[1]], text)


def expressions(text: str) -> list[str]:
    """The expressions in a text."""
    return _EXPRESSION.findall(text)


def read_outputs(text: str) -> dict[str, str]:
    """What was written to GITHUB_OUTPUT: `name=value`, or `name<<WORD`, lines, `WORD`."""
    found, lines = {}, iter(text.splitlines())
    for line in lines:
        name, separator, value = line.partition("=")
        if separator and "<<" not in name:
            found[name] = value
            continue
        name, _, word = line.partition("<<")
        assert word, f"not an output: {line!r}"
        found[name] = "\n".join(iter(lambda word=word: next(lines), word))  # type: ignore[misc]
    return found


def read_commands(log: str) -> list[tuple[str, str]]:
    """The commands in a log; between stop-commands and its word there are none."""
    found: list[tuple[str, str]] = []
    stopped = None
    for line in log.splitlines():
        if stopped is not None:
            stopped = None if line.strip() == f"::{stopped}::" else stopped
        elif match := _COMMAND.match(line):
            if match[1] == "stop-commands":
                stopped = match[2]
            found.append((match[1], match[2]))
    assert stopped is None, "the log ends with commands stopped"
    return found


def load(path: Path) -> dict[str, Any]:
    """A workflow or an action; the key `on` stays a text."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return {"on" if key is True else key: value for key, value in document.items()}
