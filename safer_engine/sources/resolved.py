"""Inputs found and fingerprinted: local paths and content digests, before any stage runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ResolvedModel:
    """A reward model on this machine.

    Attributes:
        path: folder with config, safetensors weights and tokenizer.
        digest: sha256 over names and contents of its files, and of the adapter's where there is one.
        origin: what the user named; revision is the resolved commit for a hub model.
        adapter_path: folder of the PEFT adapter, if any.
    """

    path: Path
    digest: str
    origin: str
    revision: str | None = None
    adapter_path: Path | None = None


@dataclass(frozen=True)
class ResolvedDataset:
    """A dataset on this machine.

    Attributes:
        digest: sha256 of its content.
        origin: what the user named.
        rows: opens the raw rows, in file order, one dict each; may be called again.
        revision: the resolved commit for a hub dataset.
    """

    digest: str
    origin: str
    rows: Callable[[], Iterator[dict[str, Any]]]
    revision: str | None = None


@dataclass(frozen=True)
class ResolvedInputs:
    """Everything an audit reads from outside."""

    model: ResolvedModel
    dataset: ResolvedDataset
    evaluation: ResolvedDataset | None = None
    corpus: ResolvedDataset | None = None
    """The text corpus of `sae.pretrain`."""
    extra: dict[str, str] = field(default_factory=dict)
    """Digests of further files by spec section: of `labels`, the rubric's and the corrections (`label_files_digest`); of
    `suspicion`, the decisions' (`decision_digests`), and of `sae`, the given SAE's (`given_digest`), where there are any."""
    labeller: ResolvedModel | None = None
    """The language model of a `local_lm` labeller."""
    base: ResolvedModel | None = None
    """What reward models are retrained from (`retraining.base`)."""

    def digest(self, section: str) -> str | None:
        """Content digest of what a spec section names outside itself, if anything."""
        named: dict[str, ResolvedModel | ResolvedDataset | None] = {
            "model": self.model,
            "dataset": self.dataset,
            "evaluation": self.evaluation,
            "sae": self.corpus,
            "retraining": self.base,
        }
        if section in named:
            found = named[section]
            return found.digest if found else self.extra.get(section)
        files = self.extra.get(section)
        if section == "labels" and self.labeller is not None:
            return hashlib.sha256(f"{files} {self.labeller.digest}".encode()).hexdigest()
        return files
