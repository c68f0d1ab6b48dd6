"""Flags shared by `run`, `plan` and `check`, and how they become a spec."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from safer_engine.errors import SpecError
from safer_engine.spec_layers import BuiltSpec, Document, Layer, build_spec, parse_assignment, parse_source, read_document

Function = Callable[..., Any]
_PLACEHOLDERS: Document = {
    "model": {"path": "(required)"},
    "dataset": {"source": {"kind": "local", "path": "(required)"}},
}

_AUDIT_OPTIONS = (
    click.option("--model", "-m", help="Reward model: local folder or hub id, org/name@revision."),
    click.option("--dataset", "-d", help="Preference dataset: file, save_to_disk folder or hub id, org/name@revision#split."),
    click.option("--eval-dataset", "-e", help="Preference dataset that only measures."),
    click.option("--spec", "spec_file", type=click.Path(path_type=Path), help="audit.yaml; flags win over it."),
    click.option("--preset", type=click.Choice(["default", "paper"]), help="Where values not given come from."),
    click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any value of the spec, e.g. sae.k=32."),
    click.option("--sample", type=click.IntRange(2), help="Audit only this many pairs, drawn by whole groups."),
    click.option("--stratify", type=click.Choice(["axis", "subset"]), help="Keep the shares of this column in the sample."),
    click.option("--device", help="auto, cpu, cuda or cuda:N."),
    click.option("--seed", type=click.IntRange(0), help="Seed of everything random."),
    click.option("--no-text", is_flag=True, help="Leave the dataset's text out of the report."),
    click.option(
        "--trust-remote-code", is_flag=True, help="Run code shipped with the model. Only after you have read that code."
    ),
)


class NamedPath(click.Path):
    """A path that must have a name: an empty one, of a shell variable that is not set, would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.Path`."""
        if value == "":
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


class Amount(click.FloatRange):
    """A number above 0 that is one: `nan` and `inf` are none."""

    name = "number"

    def __init__(self) -> None:
        super().__init__(0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.FloatRange`."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a number above 0", param, ctx)
        return number


store_option = click.option(
    "--store",
    type=NamedPath(path_type=Path),
    envvar="SAFER_AUDIT_STORE",
    help="Artifact store; default ~/.cache/safer-audit/store.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress, no tables.")


def audit_options(function: Function) -> Function:
    """Add the flags that describe an audit; the function receives them as one `BuiltSpec` named `built`."""
    return _with_options(function, required=True)


def shown_options(function: Function) -> Function:
    """`audit_options` for a command that only shows the spec: where no model or dataset is given, a placeholder stands."""
    return _with_options(function, required=False)


def flag_options(function: Function) -> Function:
    """Add the flags that describe an audit; the function receives them as one dict named `flags`, for `build_from_flags`."""
    return _added(function, lambda flags: {"flags": flags})


def _with_options(function: Function, *, required: bool) -> Function:
    return _added(function, lambda flags: {"built": build_from_flags(required=required, **flags)})


def _added(function: Function, given: Callable[[dict[str, Any]], dict[str, Any]]) -> Function:
    def wrapped(**values: Any) -> Any:
        names = ("model", "dataset", "eval_dataset", "spec_file", "preset", "assignments", "sample", "stratify", "device")
        mine = {name: values.pop(name) for name in (*names, "seed", "no_text", "trust_remote_code")}
        return function(**given(mine), **values)

    wrapped.__name__, wrapped.__doc__ = function.__name__, function.__doc__
    wrapped.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
    for option in reversed(_AUDIT_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def build_from_flags(*, required: bool = True, **flags: Any) -> BuiltSpec:
    """The spec that a spec file and flags describe. Raises SpecError, also where `required` and no model or dataset is given."""
    layers = []
    if flags["spec_file"] is not None:
        layers.append(Layer(f"file {flags['spec_file']}", read_document(flags["spec_file"])))
    layers.append(Layer("flag", document_of_flags(flags)))
    assigned = [Layer(f"--set {text}", parse_assignment(text)) for text in flags["assignments"]]
    layers += [replace(layer, goes_on=place > 0) for place, layer in enumerate(assigned)]
    given = {
        name for name, key in (("model", "path"), ("dataset", "source")) if any(_names(x.document, name, key) for x in layers)
    }
    for section, flag in (("model", "--model"), ("dataset", "--dataset")):
        if section not in given and required:
            raise SpecError(f"no {section} is given", f"give {flag}, or a spec file with --spec")
        if section not in given:
            layers.insert(0, Layer("required", {section: _PLACEHOLDERS[section]}))
    return build_spec(layers)


def _names(document: Document, section: str, key: str) -> bool:
    value = document.get(section)
    return key in value if isinstance(value, dict) else value is not None


def document_of_flags(flags: dict[str, Any]) -> Document:
    """The part of a spec that flags give, without a spec file and --set."""
    document: Document = {}
    if flags["model"]:
        document["model"] = {"path": flags["model"]}
    for section, name in (("dataset", "dataset"), ("evaluation", "eval_dataset")):
        if flags[name]:
            document[section] = {"source": parse_source(flags[name])}
    for name in ("sample", "stratify"):
        if flags[name] is not None:
            document.setdefault("dataset", {})[name] = flags[name]
    runtime = {"device": flags["device"], "trust_remote_code": flags["trust_remote_code"] or None}
    if given := {key: value for key, value in runtime.items() if value is not None}:
        document["runtime"] = given
    if flags["no_text"]:
        document["report"] = {"text": False}
    for name in ("preset", "seed"):
        if flags[name] is not None:
            document[name] = flags[name]
    return document
