"""`safer-audit spec`: write, show or describe an audit spec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cli.options import json_option, shown_options
from cli.output import console, print_json, table
from safer_engine.errors import SpecError
from safer_engine.spec import AuditSpec
from safer_engine.spec_layers import BuiltSpec, Layer, build_spec, leaves


@click.group("spec")
def spec_group() -> None:
    """Write, show or describe an audit spec."""


@spec_group.command("init")
@click.argument("path", type=click.Path(path_type=Path), default=Path("audit.yaml"))
@click.option("--preset", type=click.Choice(["default", "paper"]), default="default", help="Whose values are shown.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def init_command(path: Path, preset: str, force: bool) -> None:
    """Write an audit.yaml with every value, commented out: it changes nothing until a line is uncommented."""
    if path.exists() and not force:
        raise SpecError(f"{path} exists", "choose another name, or use --force")
    try:
        path.write_text(commented_spec(preset), encoding="utf-8")
    except OSError as error:
        raise SpecError(
            f"cannot write {path}: {error.strerror}", "name a file in a folder that exists, and that this user may write to"
        ) from None
    click.echo(f"wrote {path}; give it to `safer-audit run --spec {path}`")


@spec_group.command("show")
@shown_options
@json_option
def show_command(built: BuiltSpec, as_json: bool) -> None:
    """The resolved spec, with the origin of each value."""
    document = built.spec.model_dump(mode="json")
    if as_json:
        print_json({"spec": document, "origins": built.origins})
        return
    rows = [(path, value_text(value), built.origins.get(path, "default")) for path, value in leaves(document)]
    console().print(table("Audit spec", ("key", "value", "origin"), rows))


@spec_group.command("schema")
@click.option("--markdown", is_flag=True, help="The same as a page for people (docs/spec.md).")
def schema_command(markdown: bool) -> None:
    """The JSON Schema of the spec."""
    if markdown:
        click.echo(spec_page(), nl=False)
    else:
        print_json(AuditSpec.model_json_schema())


def value_text(value: Any) -> str:
    """A value as YAML would write it, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).strip()
    return text.removesuffix("...").strip()


def commented_spec(preset: str = "default") -> str:
    """audit.yaml with every knob, its value in a preset, commented out, and its description."""
    example: dict[str, Any] = {
        "model": {"path": "path/to/reward-model"},
        "dataset": {"source": {"kind": "local", "path": "preferences.jsonl"}},
        "preset": preset,
    }
    spec = build_spec([Layer("example", example)]).spec
    lines = [
        "# An audit spec for safer-audit: every knob, its value and what it means.",
        "# A line counts once its # is taken away; what is left commented out has the value shown.",
        "# Flags of `safer-audit run` win over this file, and this file over the preset.",
        "",
    ]
    lines += _section_lines(spec, "")
    live = "#preset: paper", "preset: paper"
    return ("\n".join(lines) + "\n").replace(*live)


def spec_page() -> str:
    """docs/spec.md: every section and key with its default and description."""
    schema = AuditSpec.model_json_schema()
    lines = [
        "# The audit spec",
        "",
        "Written by `safer-audit spec schema --markdown`. Every knob of an audit, its default and what it means.",
        "",
    ]
    lines += [
        "`runtime` changes how fast results come, never which; all others enter the cache keys of the stages that read them.",
        "",
    ]
    for name, section in [("(top level)", schema), *sorted(schema["$defs"].items())]:
        fields = section.get("properties", {})
        if not fields:
            continue
        lines += [
            f"## {name}",
            "",
            section.get("description", "").split("\n")[0],
            "",
            "| key | default | meaning |",
            "| --- | --- | --- |",
        ]
        required = section.get("required", [])
        for key, field in fields.items():
            default = "required" if key in required else _default(field)
            meaning = str(field.get("description", "see the section below")).replace("|", "\\|")
            lines.append(f"| `{key}` | {default} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def _default(field: dict[str, Any]) -> str:
    value = field.get("default", field.get("const"))
    if isinstance(value, dict) or (value is None and "default" not in field):
        return ""
    return f"`{value_text(value)}`"


def _section_lines(section: BaseModel, indent: str) -> list[str]:
    lines: list[str] = []
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            lines += ["", f"{indent}{name}:"] if not indent else [f"{indent}{name}:"]
            lines += _section_lines(value, indent + "  ")
        else:
            lines += [f"{indent}# {comment}" for comment in _comment(info)]
            lines.append(f"{indent}#{name}: {value_text(_plain(value))}")
    return lines


def _comment(info: FieldInfo) -> list[str]:
    return [info.description] if info.description else []


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
