"""What a stage is, what it is given, and how its cache key is made."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel

from safer_engine.artifacts import Absent, Artifact
from safer_engine.errors import ArtifactError, Interrupted
from safer_engine.events import Observer
from safer_engine.sources.resolved import ResolvedInputs
from safer_engine.spec import AuditSpec, RuntimeSpec
from safer_engine.store import WorkArea, canonical_json, digest_bytes

A = TypeVar("A", bound=Artifact)

_LOCATIONS: dict[str, Any] = {
    "model": {"path": True, "adapter": True},
    "dataset": {"source": True},
    "evaluation": {"source": True},
    "sae": {"pretrain": {"corpus": True}, "given": True},
    "retraining": {"base": True},
    "labels": {"corrections": True, "labeller": {"path": True}},
    "suspicion": {"decisions": True},
}
"""Spec fields that say where an input lies; in keys, the input's content digest stands for them."""


@dataclass(frozen=True)
class Draft:
    """What a stage hands over: its payload is in the work area, its small facts are here (JSON values)."""

    meta: dict[str, Any] = field(default_factory=dict)


class SpecView:
    """The sections of a spec that a stage declared in `reads`, or single knobs of them (`causal.pairs`); any other raises."""

    def __init__(self, spec: BaseModel, reads: tuple[str, ...]) -> None:
        self._spec = spec
        self._reads = reads

    def __getattr__(self, section: str) -> Any:
        if section in self._reads:
            return getattr(self._spec, section)
        knobs = tuple(name.removeprefix(f"{section}.") for name in self._reads if name.startswith(f"{section}."))
        if not knobs:
            raise AttributeError(f"spec section {section!r} is not in this stage's `reads` {self._reads}")
        return SpecView(getattr(self._spec, section), knobs)


def stage_seed(base_seed: int, stage: str, unit: str) -> int:
    """A seed in [0, 2⁶³) that depends on spec.seed, a stage's name and the unit."""
    raw = hashlib.sha256(f"{base_seed}/{stage}/{unit}".encode()).digest()
    return int.from_bytes(raw[:8], "big") >> 1


@dataclass(frozen=True)
class StageContext:
    """What a stage is given besides its inputs."""

    stage: str
    spec: SpecView
    runtime: RuntimeSpec
    sources: ResolvedInputs
    work: WorkArea
    observer: Observer
    base_seed: int

    def seed(self, unit: str = "") -> int:
        """A seed in [0, 2⁶³) that depends on spec.seed, the stage and the unit."""
        return stage_seed(self.base_seed, self.stage, unit)

    def progress(self, done: float, total: float, unit: str) -> None:
        """Report progress; raises Interrupted when the observer asked to stop."""
        self.observer.progress(self.stage, done, total, unit)
        if self.observer.cancelled():
            raise Interrupted("stopped on request", "run the same command again to go on")

    def note(self, message: str) -> None:
        """Tell the reader something."""
        self.observer.note(self.stage, message)


@dataclass(frozen=True)
class Inputs:
    """The artifacts a stage consumes."""

    found: dict[type[Artifact], Artifact | Absent]

    def get(self, kind: type[A]) -> A:
        """The artifact of a type. Raises ArtifactError when it is absent or not consumed."""
        value = self.maybe(kind)
        if isinstance(value, Absent):
            raise ArtifactError(f"{kind.__name__} is absent: {value.reason}")
        return value

    def maybe(self, kind: type[A]) -> A | Absent:
        """The artifact of a type, or why there is none."""
        value = self.found.get(kind)
        if value is None:
            raise ArtifactError(f"{kind.__name__} is not among this stage's `consumes`")
        if not isinstance(value, (kind, Absent)):
            raise ArtifactError(f"{kind.__name__} was read as {type(value).__name__}")
        return value


class Stage(Protocol):
    """One step of the pipeline. `version` is bumped whenever results may change."""

    name: ClassVar[str]
    version: ClassVar[int]
    resource: ClassVar[Literal["cpu", "gpu"]]
    consumes: ClassVar[tuple[type[Artifact], ...]]
    produces: ClassVar[type[Artifact]]
    reads: ClassVar[tuple[str, ...]]
    """May be joined by `opens`: what `run` reads of the inputs themselves (see `opened_by`); and by `asked_by`: the one section
    (or knob, `section.knob`) that asks for the stage, so that without it no other section is part of the key."""

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft | Absent:
        """Publish payload files into `ctx.work` and return the facts, or say why there is nothing."""


INPUT_ROLES = ("model", "dataset", "evaluation", "corpus", "labeller", "base")


def opened_by(stage: Stage) -> tuple[str, ...]:
    """The inputs (fields of `ResolvedInputs`) whose content a stage reads, beyond their digests: all, where it does not say."""
    return tuple(getattr(stage, "opens", INPUT_ROLES))


@runtime_checkable
class PartedStage(Protocol):
    """What a stage offers besides when its work can be shared among machines.

    Parts publish into one work area, held shared. The first one is computed before any other begins, so it may leave facts
    that the others read. `Stage.run` joins them: it computes whatever it does not find there, and gives the same artifact
    however the work was shared.
    """

    def parts(self, spec: SpecView, runtime: RuntimeSpec, inputs: Inputs) -> tuple[str, ...]:
        """Names of the parts, the first one first; fewer than two where sharing is not worth it. Imports no torch."""

    def run_part(self, ctx: StageContext, inputs: Inputs, part: str) -> None:
        """Publish what one part is to find; what is there already is not computed again."""


def cache_key(stage: Stage, spec: AuditSpec, sources: ResolvedInputs, inputs: dict[str, str], project: str) -> str:
    """sha256 over everything that may change a stage's result, and nothing else.

    Args:
        spec: the resolved spec (no `auto` left that changes results).
        inputs: artifact type name → content digest of each consumed artifact.
    """
    document = {
        "project": project,
        "stage": stage.name,
        "version": stage.version,
        "seed": spec.seed,
        "reads": _read(stage.reads, spec, sources) if _asked_for(stage, spec) else {_section_of(stage): None},
        "inputs": inputs,
    }
    return digest_bytes(canonical_json(document))


def _asked_for(stage: Stage, spec: AuditSpec) -> bool:
    """Whether the section is there that asks for a stage, and the knob set that does."""
    section, _, knob = str(getattr(stage, "asked_by", "")).partition(".")
    value = getattr(spec, section) if section else None
    return not section or (value is not None and (not knob or bool(getattr(value, knob))))


def _section_of(stage: Stage) -> str:
    return str(getattr(stage, "asked_by", "")).partition(".")[0]


def _read(reads: tuple[str, ...], spec: AuditSpec, sources: ResolvedInputs) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in reads:
        section, dot, knob = name.partition(".")
        if dot:
            whole = _section(section, spec, sources)
            found.setdefault(section, {})[knob] = None if whole is None else whole[knob]
        else:
            found[section] = _section(section, spec, sources)
    return found


def _section(section: str, spec: AuditSpec, sources: ResolvedInputs) -> Any:
    value = getattr(spec, section)
    if not isinstance(value, BaseModel):
        return value
    dumped = value.model_dump(mode="json", exclude=_LOCATIONS.get(section))
    if dumped.get("allow_poisoned") is False:
        del dumped["allow_poisoned"]  # keys of data that are not poisoned are what they were
    content = sources.digest(section)
    return dumped if content is None else {**dumped, "content": content}
