"""The flat names under which clients see the files of a job, and where each lies in the artifact store.

What a local run writes beside its report keeps its name (`report.html`, `edits.jsonl`, `sae/sae.json`); a trained model
is `model/<file>`; what is attached to a job without being a stage (`job.log`, `decisions.jsonl`) has its own; every other
payload file is `stages/<stage>/<file>`.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from safer_engine.store import Manifest
from service.jobs.model import JobKind

REPORT_FILES = ("report.html", "report.md", "report.json", "evaluation.jsonl", "features.parquet", "pair_scores.parquet")
_PLAIN = {"report": REPORT_FILES, "edits": ("edits.jsonl",), "comparison": ("comparison.html", "comparison.json"),
          "drill": ("drill.html", "drill.json")}  # fmt: skip
"""Stages whose files keep their names."""
SAE_FILES = ("sae.safetensors", "sae.json", "metrics.json")
LOG_STAGE, LOG_NAME = "log", "job.log"
DECISIONS_STAGE, DECISIONS_NAME = "decisions", "decisions.jsonl"
_ATTACHED = {(LOG_STAGE, LOG_NAME), (DECISIONS_STAGE, DECISIONS_NAME)}
_TYPES = {
    ".jsonl": "application/jsonl",
    ".parquet": "application/vnd.apache.parquet",
    ".arrow": "application/vnd.apache.arrow.file",
    ".safetensors": "application/octet-stream",
    ".log": "text/plain; charset=utf-8",
    ".md": "text/markdown; charset=utf-8",
    ".html": "text/html; charset=utf-8",
}


@dataclass(frozen=True)
class StoredFile:
    """A file that a job made.

    Attributes:
        name: as clients see it.
        stage, key, file: where it lies in the store.
        digest: sha256 of its content.
    """

    name: str
    stage: str
    key: str
    file: str
    size: int
    digest: str

    @property
    def media_type(self) -> str:
        """Content type, by the name."""
        suffix = "." + self.name.rpartition(".")[2]
        return _TYPES.get(suffix) or mimetypes.guess_type(self.name)[0] or "application/octet-stream"


def page_of(kind: JobKind) -> str:
    """The page that a job of a kind ends with."""
    return {JobKind.COMPARE: "comparison.html", JobKind.DRILL: "drill.html"}.get(kind, "report.html")


def flat_name(kind: JobKind, stage: str, file: str) -> str:
    """What clients call a payload file of a stage."""
    if stage in {"report", "comparison", "drill"} or (stage, file) == ("edits", "edits.jsonl") or (stage, file) in _ATTACHED:
        return file
    if stage == "sae" and file in SAE_FILES:
        return f"sae/{file}"
    if kind is JobKind.TRAIN_RM and stage == "training":
        return f"model/{file}"
    return f"stages/{stage}/{file}"


def stage_of(kind: JobKind, name: str) -> str | None:
    """The stage that makes a file of this name; None for what no stage makes. Undoes `flat_name`."""
    folder, _, file = name.rpartition("/")
    if not folder:
        return next((stage for stage, files in _PLAIN.items() if name in files), None)
    first, _, stage = folder.partition("/")
    if first == "stages" and stage:
        return stage.partition("/")[0]
    if folder == "sae" and file in SAE_FILES:
        return "sae"
    return "training" if first == "model" and kind is JobKind.TRAIN_RM else None


def files_of(kind: JobKind, manifests: Iterable[Manifest]) -> dict[str, StoredFile]:
    """The files of committed artifacts, by client name, in order; of two that share a name the later counts."""
    found = {file.name: file for manifest in manifests for file in _files(kind, manifest)}
    return dict(sorted(found.items()))


def _files(kind: JobKind, manifest: Manifest) -> Iterator[StoredFile]:
    for file, entry in manifest.files.items():
        name = flat_name(kind, manifest.stage, file)
        yield StoredFile(name, manifest.stage, manifest.key, file, entry.size, entry.digest)
