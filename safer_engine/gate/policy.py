"""Policies: the rules that a gate applies, as a document. Built-in ones by name, any other by its file."""

from __future__ import annotations

import hashlib
import json
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from safer_engine.errors import SpecError
from safer_engine.gate.paths import parse_path
from safer_engine.spec_layers import problems

MAX_BYTES = 1 << 20
_BOUNDS = (("min", "max"), ("equals",), ("max_drop", "max_rise"))

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
Number = Annotated[float, Field(strict=True)]
"""A number; neither a text nor true and false, which stand for one elsewhere."""
FactPath = Annotated[str, Field(max_length=500)]
Words = Annotated[str, Field(min_length=1, max_length=500)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Rule(_Strict):
    """What a fact of report.json must be: within bounds (`min`, `max`), a value (`equals`), or not far from the baseline's."""

    name: Name = Field(description="Short name, unique in the policy: letters, digits and hyphens.")
    about: str = Field("", max_length=500, description="Why the rule is there, for the reader.")
    fact: FactPath = Field(
        description="Path of the fact in report.json. A path to several makes a check of each; one that ends at a list counts."
    )
    share_of: FactPath | None = Field(None, description="Path of what the fact is divided by.")
    min: Number | None = Field(None, description="The least that is allowed.")
    max: Number | None = Field(None, description="The most that is allowed.")
    equals: bool | float | str | None = Field(None, description="The value that a fact without an interval must have.")
    max_drop: Number | None = Field(None, ge=0, description="How far the fact may lie below the baseline's.")
    max_rise: Number | None = Field(None, ge=0, description="How far the fact may lie above the baseline's.")
    min_n: int = Field(30, ge=1, description="Values behind a figure, below which it is not judged.")
    pass_when: Literal["proven", "not_disproven"] = Field(
        "proven",
        description="`proven`: passes when the whole interval is on the right side; `not_disproven`: unless all is on the wrong.",
    )
    optional: bool = Field(
        False,
        description="Skipped, and shown as such, without a baseline to compare with or a slice that it names; else inconclusive.",
    )
    needs: dict[FactPath, bool | float | str] = Field(
        default_factory=dict, description="Facts (path: value) without which the rule is inconclusive."
    )
    on_inconclusive: Literal["pass", "warn", "fail"] = Field(
        "warn",
        description="What an inconclusive rule does to the gate: nothing, makes it inconclusive (exit code 3), or fails it.",
    )

    @field_validator("fact", "share_of")
    @classmethod
    def _is_path(cls, text: str | None) -> str | None:
        if text is not None:
            parse_path(text)
        return text

    @field_validator("needs")
    @classmethod
    def _are_paths(cls, needs: dict[str, Any]) -> dict[str, Any]:
        for path in needs:
            parse_path(path)
        return needs

    @model_validator(mode="after")
    def _one_demand(self) -> Rule:
        given = [names for names in _BOUNDS if any(getattr(self, name) is not None for name in names)]
        if len(given) != 1:
            raise ValueError("give one demand: min and/or max, or equals, or max_drop and/or max_rise")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self

    @property
    def compares(self) -> bool:
        """Whether the rule is about the change since the baseline."""
        return self.max_drop is not None or self.max_rise is not None

    @property
    def needs_proof(self) -> bool:
        """Whether it passes only when the whole interval is on the right side."""
        return self.pass_when == "proven"  # noqa: S105 - no password


class Waiver(_Strict):
    """A rule, or one of its checks, that may be broken for a while."""

    rule: str = Field(description="Name of the rule, or of one of its checks: `name[axis=safety]`.", min_length=1, max_length=300)
    owner: Words = Field(description="Who answers for it.")
    reason: Words = Field(description="Why it is waived.")
    expires: date = Field(
        description="The last day (UTC) on which it holds. From the next on it fails the gate until it is removed."
    )


class Policy(_Strict):
    """The rules of a gate."""

    version: Literal[1] = Field(description="Of this format.")
    name: Name = Field("policy", description="Short name, shown with every decision.")
    about: str = Field("", max_length=500, description="What the policy is for.")
    false_alarms: float = Field(
        0.05, gt=0, le=0.5,
        description="How often the gate may fail a reward model that breaks no rule: shared among all checks with an interval.",
    )  # fmt: skip
    misses: float = Field(
        0.025, gt=0, le=0.5,
        description="The most often that a rule may pass a reward model that breaks it; 0.025 judges on 95 % intervals.",
    )  # fmt: skip
    rules: tuple[Rule, ...] = Field(min_length=1, max_length=200, description="All of them must pass.")
    waivers: tuple[Waiver, ...] = Field((), description="Rules that may be broken for a while.")

    @model_validator(mode="after")
    def _names_are_known(self) -> Policy:
        names = [rule.name for rule in self.rules]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"rules have the same name: {', '.join(twice)}")
        waived = [waiver.rule for waiver in self.waivers]
        if len(set(waived)) != len(waived):
            raise ValueError("a rule is waived twice")
        if unknown := sorted(name for name in waived if name.partition("[")[0] not in names):
            raise ValueError(f"waivers name rules that the policy does not have: {', '.join(unknown)}")
        return self

    @property
    def digest(self) -> str:
        """Of what the policy says, however it is written."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def policy_names() -> tuple[str, ...]:
    """Names of the policies that come with the package."""
    folder = resources.files("safer_engine.gate") / "policies"
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def policy_text(name: str) -> str:
    """A built-in policy as its commented file. Raises SpecError."""
    if name not in policy_names():
        raise SpecError(
            f"there is no policy {name!r}", f"built in are: {', '.join(policy_names())}; others are named by their file"
        )
    return (resources.files("safer_engine.gate") / "policies" / f"{name}.yaml").read_text(encoding="utf-8")


def load_policy(which: str) -> Policy:
    """A built-in policy by name, else that of a file.

    Raises:
        SpecError: there is none, or it is wrong; every problem is named.
    """
    if which in policy_names():
        return parse_policy(policy_text(which), f"built-in policy {which}")
    path = Path(which).expanduser()
    if not path.is_file():
        known = ", ".join(policy_names())
        raise SpecError(
            f"there is no policy {which!r}: no file, and not built in",
            f"built in are: {known}; `safer-audit gate init` writes one",
        )
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read policy {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if len(raw) > MAX_BYTES:
        raise SpecError(f"policy {path} has {len(raw):,} bytes, more than {MAX_BYTES:,}")
    return parse_policy(text, f"policy {path}")


def parse_policy(text: str, what: str) -> Policy:
    """A policy from YAML or JSON. `what` it is called in messages. Raises SpecError, which names every problem."""
    try:
        document = yaml.load(text, _OnceLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        said = " ".join(str(error).split()) or "nested too deeply"
        raise SpecError(f"{what} is not valid YAML: {said}") from None
    if not isinstance(document, dict):
        raise SpecError(f"{what} must be a mapping with version and rules, not {type(document).__name__}")
    try:
        return Policy.model_validate(document)
    except ValidationError as error:
        found = "; ".join(f"{problem.path or 'policy'}: {problem.message}" for problem in problems(error, Policy))
        raise SpecError(
            f"{what} is invalid: {found}", "docs/gate.md and docs/policy.schema.json say what a policy holds"
        ) from None


def policy_schema() -> dict[str, Any]:
    """JSON Schema of a policy."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Policy.model_json_schema()}


class _OnceLoader(yaml.SafeLoader):
    """Refuses keys that are given twice: the second would silently undo the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See `yaml.SafeLoader`."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge"]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)
