"""An audit as it is compared: its report, its pairs, and what else is at hand of it."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from safer_engine.artifacts import Artifact, Latents, view
from safer_engine.errors import InputRefused, SaferError
from safer_engine.gate.documents import REPORT, Audit, EvaluationPair, load_audit
from safer_engine.report.model import ReportDocument
from safer_engine.store import ArtifactStore

SCORES = "pair_scores.parquet"
MAX_SCORES = 1 << 32
_HINT = "give the files as the audit wrote them"
_TEXTS = ("pair_id", "group", "axis", "subset")


@dataclass(frozen=True)
class Scored:
    """The audited pairs of an audit. `evidence`: pair_id → latent → contribution, positive for the label."""

    pairs: tuple[EvaluationPair, ...]
    evidence: dict[str, dict[int, float]]


@dataclass(frozen=True)
class LatentRow:
    """A latent of the SAE, candidate or not."""

    firing_rate: float | None
    salience: float | None
    salience_lo: float | None
    salience_hi: float | None
    axis: str | None


@dataclass(frozen=True)
class Side:
    """One of two audits.

    Attributes:
        origin: what the user named.
        scored: None where pair_scores.parquet is not at hand.
        latents: all latents, by id; None where the store does not have them.
    """

    origin: str
    audit: Audit
    scored: Scored | None = None
    latents: dict[int, LatentRow] | None = field(default=None, repr=False)

    @cached_property
    def report(self) -> ReportDocument:
        """Its report, validated. Raises InputRefused."""
        try:
            return ReportDocument.model_validate_json(json.dumps(self.audit.report))
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the report"
            raise InputRefused(
                f"the report of {self.origin} is not as this version writes it: {place}: {first['msg']}", _HINT
            ) from (None)

    @property
    def audited(self) -> Audit | None:
        """The audited pairs in the place of evaluation pairs, to be matched as those are; None where they are not at hand."""
        if self.scored is None:
            return None
        inputs = self.audit.report["provenance"]["inputs"]
        report = {"provenance": {"inputs": {**inputs, "evaluation": inputs.get("dataset")}}}
        return Audit(report, self.scored.pairs)


def load_side(path: Path, what: str, store: ArtifactStore | None) -> Side:
    """An audit of this machine.

    Args:
        path: report.json, or the folder that holds it.
        what: its name in messages.
        store: where figures of all latents may lie.

    Raises:
        InputRefused: it is no finished audit, or a file of it is damaged.
    """
    audit = load_audit(path, what)
    scores = (path if path.is_dir() else path.parent) / SCORES
    try:
        raw = _read(scores) if scores.is_file() else None
    except OSError as error:
        raise InputRefused(f"cannot read {scores}: {error.strerror}", _HINT) from None
    return Side(str(path), audit, None if raw is None else read_scores(raw, str(scores)), stored_latents(audit, store))


def is_audit(path: Path) -> bool:
    """Whether a path is a report, or a folder that holds one."""
    return path.is_file() or (path / REPORT).is_file()


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_SCORES:
        raise InputRefused(f"{path} has more than {MAX_SCORES:,} bytes", _HINT)
    return path.read_bytes()


def read_scores(raw: bytes, what: str) -> Scored:
    """The audited pairs from the bytes of pair_scores.parquet. Raises InputRefused."""
    import pyarrow as pa
    from pyarrow import parquet

    wanted = [*_TEXTS, "reward_margin", "evidence"]
    try:
        rows: list[dict[str, Any]] = parquet.read_table(io.BytesIO(raw), columns=wanted).to_pylist()
        pairs, evidence = [], {}
        for row in rows:
            if not all(isinstance(row[name], str) for name in _TEXTS) or not math.isfinite(row["reward_margin"]):
                raise ValueError("a row without its names or margin")
            pairs.append(EvaluationPair(**{name: row[name] for name in _TEXTS}, margin=float(row["reward_margin"])))
            evidence[row["pair_id"]] = {int(e["latent_id"]): float(e["contribution"]) for e in row["evidence"] or ()}
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise InputRefused(f"{what} is not as an audit wrote it: {str(error)[:200]}", _HINT) from None
    if len(evidence) != len(pairs):
        raise InputRefused(f"{what} repeats a pair_id", _HINT)
    if not all(math.isfinite(value) for found in evidence.values() for value in found.values()):
        raise InputRefused(f"{what} has evidence that is not finite", _HINT)
    return Scored(tuple(pairs), evidence)


def stored_latents(audit: Audit, store: ArtifactStore | None) -> dict[int, LatentRow] | None:
    """Figures of all latents, from the store of this machine where it has the audit's stage `latents`; None elsewhere."""
    stages = audit.report["provenance"].get("stages")
    found = [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    key = next((stage.get("cache_key") for stage in found if stage.get("stage") == "latents"), None)
    if store is None or not isinstance(key, str) or not key.isalnum():
        return None
    try:
        artifact = view(Latents, store.read("latents", key)) if store.has("latents", key) else None
        return latent_rows(artifact) if isinstance(artifact, Latents) else None
    except SaferError:
        return None  # damaged there: the report's candidates are compared


def latent_rows(latents: Artifact) -> dict[int, LatentRow]:
    """Rows of latents.arrow by id."""
    names = ("firing_rate", "salience", "salience_lo", "salience_hi", "axis")
    table = latents.table("latents.arrow").select(["latent_id", *names])
    return {row["latent_id"]: LatentRow(**{name: row[name] for name in names}) for row in table.to_pylist()}
