"""Which registered models are audited, and how: the file that SAFER_MLFLOW_TEMPLATE names."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safer_engine.errors import SpecError
from safer_engine.gate.policy import load_policy, parse_policy, policy_names
from service.schemas import MAX_LABELS, Labels, ProjectName

_OWN_LABELS = 3
"""Labels that every audit of a model version gets: `mlflow.model`, `mlflow.version`, and `mlflow.alias` where there is one."""
_MOST_LABELS = MAX_LABELS - _OWN_LABELS


class Entry(BaseModel):
    """How the versions of some registered models are audited."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[str, ...] = Field(("*",), min_length=1, description="Names of registered models; `*` stands for anything.")
    aliases: tuple[str, ...] | None = Field(None, description="Aliases that start an audit when they are set; null: any.")
    on_created: bool = Field(True, description="Whether a new version starts an audit.")
    project: ProjectName = Field("default", description="Project of the service that the audits belong to.")
    spec: dict[str, Any] = Field(description="The audit's spec (docs/spec.md), without `model.path`.")
    policy: str | dict[str, Any] = Field(
        "default", description="Policy of the gate: a built-in one by name, a file beside this one, or the policy itself."
    )
    baseline_alias: str | None = Field(None, description="The version that holds this alias is what others are compared with.")
    labels: Labels = Field(
        default_factory=dict, max_length=_MOST_LABELS, description="Of the audits, beside `mlflow.model` and `mlflow.version`."
    )
    priority: int = Field(0, ge=-100, le=100, description="Higher goes first within the project.")

    def fits(self, model: str) -> bool:
        """Whether it is meant for a registered model."""
        return any(fnmatchcase(model, pattern) for pattern in self.models)

    def wants(self, alias: str | None) -> bool:
        """Whether an alias that was set (None: a new version) starts an audit."""
        return self.on_created if alias is None else self.aliases is None or alias in self.aliases


class Template(BaseModel):
    """The file: the first entry whose `models` fit is taken; a model that none fits is not audited."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    audits: tuple[Entry, ...] = Field(min_length=1, description="Entries, in order.")

    def entry(self, model: str) -> Entry | None:
        """The entry for a registered model."""
        return next((entry for entry in self.audits if entry.fits(model)), None)


def read_template(path: Path) -> Template:
    """The template in a file. Raises SpecError naming what is wrong."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"SAFER_MLFLOW_TEMPLATE: {path} cannot be read: {error.strerror}", "docs/mlflow.md shows one") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"SAFER_MLFLOW_TEMPLATE: {path} is no YAML: {error}", "docs/mlflow.md shows one") from None
    try:
        found = Template.model_validate(document)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:5])
        raise SpecError(f"SAFER_MLFLOW_TEMPLATE: {path}: {told}", "docs/mlflow.md shows one") from None
    entries = tuple(entry.model_copy(update={"policy": _policy(entry.policy, path.parent)}) for entry in found.audits)
    return found.model_copy(update={"audits": entries})


def _policy(given: str | dict[str, Any], folder: Path) -> str | dict[str, Any]:
    """A policy that may be sent: the name of a built-in one, or a whole one. Raises SpecError."""
    if isinstance(given, dict):
        return parse_policy(yaml.safe_dump(given), "SAFER_MLFLOW_TEMPLATE: the policy").model_dump(mode="json")
    if given in policy_names():
        return given
    return load_policy(str(folder / given)).model_dump(mode="json")
