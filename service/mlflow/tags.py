"""The tags that tell MLflow what became of a model version: which they are, and the thread that writes them.

They are owed until MLflow has taken them, however long it is away. `safer_audit.verdict` is never older than what the other
tags say: it is taken back first when an audit begins, and written after the others when it has come.
"""

from __future__ import annotations

import logging
import threading
import time

from safer_engine.errors import SaferError
from service.errors import NotFound, Unavailable
from service.jobs.gate_model import GateRecord
from service.mlflow.registry import Registry, RegistryRefused
from service.mlflow.store import OwedTags, VersionStore

Tags = dict[str, str | None]
PREFIX = "safer_audit."
STATE, VERDICT, BASELINE = f"{PREFIX}state", f"{PREFIX}verdict", f"{PREFIX}baseline"
_NAMES = tuple(PREFIX + name for name in ("verdict", "audit", "url", "gate", "policy", "baseline", "reason", "error", "state"))
_POLL_SECONDS = 1.0
_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 300.0
_WRITE_SECONDS = 30.0
"""Less than a claim lasts: who holds it no longer writes nothing more."""
_LONGEST = 500
_LOG = logging.getLogger(__name__)


def pause(attempts: int) -> float:
    """Seconds until the next of several attempts in a row."""
    return min(_FIRST_PAUSE * 2.0 ** min(attempts, 20), _LONGEST_PAUSE)


def tags_of(state: str, verdict: str, **more: str | None) -> Tags:
    """All tags of a version; those not given are to be removed."""
    given = {"state": state, "verdict": verdict, **more}
    unknown = {name for name in given if PREFIX + name not in _NAMES}
    assert not unknown, unknown
    return {name: _cut(given.get(name.removeprefix(PREFIX))) for name in _NAMES}


def refused_tags(error: SaferError, state: str = "refused") -> Tags:
    """Tags of a version that cannot be audited, or not yet."""
    told = error.message + (f" ({error.hint})" if error.hint else "")
    return tags_of(state, "error" if state == "refused" else "pending", error=told)


def decided_tags(gate: GateRecord, **more: str | None) -> Tags:
    """Tags of a version whose gate is decided."""
    assert gate.verdict is not None, gate.id
    return tags_of(
        "done", gate.verdict, gate=gate.id, policy=policy_tag(gate.policy_name, gate.policy_digest), reason=gate.reason or None,
        error=gate.error.code if gate.error else None, **more,
    )  # fmt: skip


def policy_tag(name: str, digest: str) -> str:
    """A policy by name and the beginning of its digest."""
    return f"{name}@{digest[:12]}"


def _cut(text: str | None) -> str | None:
    if text is None:
        return None
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return plain if len(plain) <= _LONGEST else plain[: _LONGEST - 1] + "…"


class TagWriter:
    """Writes the tags that are owed. Several processes may run one: tags are taken by compare-and-set."""

    def __init__(self, versions: VersionStore, registry: Registry) -> None:
        self._versions = versions
        self._registry = registry

    def run(self, stop: threading.Event) -> None:
        """Write until told to stop."""
        while not stop.is_set():
            try:
                wrote = self.step()
            except Unavailable as error:
                _LOG.warning("tags of model versions wait: %s", error.message)
                wrote = False
            if not wrote:
                stop.wait(_POLL_SECONDS)

    def step(self) -> bool:
        """Write the tags of one version; whether any were owed. Raises Unavailable: the database is away."""
        owed = self._versions.take_tags()
        if owed is None:
            return False
        what = f"{owed.model} version {owed.version}"
        try:
            self._write(owed)
        except Unavailable as error:
            seconds = pause(owed.tags_attempts - 1)
            _LOG.warning("the tags of %s wait %.0f s: %s", what, seconds, error.message)
            self._versions.put_off_tags(owed, seconds)
        except (NotFound, RegistryRefused) as error:
            _LOG.warning("the tags of %s are given up: %s", what, error.message)
            self._versions.put_off_tags(owed, None)
        else:
            self._versions.settle_tags(owed)
        return True

    def _write(self, owed: OwedTags) -> None:
        until = time.monotonic() + _WRITE_SECONDS
        found = self._registry.version(owed.model, owed.version)
        if owed.made not in (None, found.created):
            raise NotFound("another version has its name by now")
        changed = {key: value for key, value in owed.tags.items() if found.tags.get(key) != value}
        for key in _order(owed.tags):
            if key in changed:
                if time.monotonic() > until:
                    raise Unavailable("MLflow takes too long")
                self._registry.set_tag(owed.model, owed.version, key, changed[key])


def _order(tags: Tags) -> list[str]:
    """A verdict is taken back before anything else is said, and given after everything but the state."""
    settled = tags.get(VERDICT) != "pending"
    rest = [name for name in tags if name not in (VERDICT, STATE)]
    return [*rest, VERDICT, STATE] if settled else [VERDICT, STATE, *rest]
