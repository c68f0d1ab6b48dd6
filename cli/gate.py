"""`safer-audit gate`: whether a reward model may ship."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import json_option, quiet_option
from cli.output import console, print_json, table
from safer_engine.errors import SpecError

if TYPE_CHECKING:
    from safer_engine.gate.judge import Check, Decision

Function = Callable[..., Any]
_CODES = {"pass": 0, "fail": 1, "inconclusive": 3}
_MANY = 12
_STEP_SUMMARY = "GITHUB_STEP_SUMMARY"

_CHECK_OPTIONS = (
    click.option("--report", "report", type=click.Path(path_type=Path), help="report.json of a finished audit, or its folder."),
    click.option("--baseline", help="What it must not fall behind: report.json or its folder."),
    click.option(
        "--policy", "policy_name", default="default", show_default=True, help="A policy file, or a built-in one's name."
    ),
    click.option("--junit", type=click.Path(path_type=Path, dir_okay=False), help="Write a JUnit report to this file."),
    click.option(
        "--markdown",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Write a Markdown table; also to $GITHUB_STEP_SUMMARY.",
    ),
    json_option,
    quiet_option,
)


def _check_options(function: Function) -> Function:
    for option in reversed(_CHECK_OPTIONS):
        function = option(function)
    return function


@click.group("gate", invoke_without_command=True)
@_check_options
@click.pass_context
def gate_group(context: click.Context, /, **given: Any) -> int | None:
    """Whether a reward model may ship: a policy's rules on a finished audit. `gate` alone is `gate check`.

    Exit codes: 0 pass, 1 fail, 2 usage or refused input, 3 inconclusive, 4 failed, 5 service unreachable.
    """
    if context.invoked_subcommand is not None:
        _refuse_before(context)
        return None
    return run_check(**given)


@gate_group.command("check")
@_check_options
def check_command(**given: Any) -> int:
    """Apply a policy to a finished audit."""
    return run_check(**given)


@gate_group.command("init")
@click.argument("path", type=click.Path(path_type=Path), default=Path("policy.yaml"))
@click.option("--from", "name", default="default", show_default=True, help="The built-in policy to start from.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def init_command(path: Path, name: str, force: bool) -> None:
    """Write a policy file in which every value is explained."""
    from safer_engine.gate.policy import policy_text

    text = policy_text(name)
    if path.exists() and not force:
        raise SpecError(f"{path} exists", "choose another name, or use --force")
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise SpecError(f"cannot write {path}: {error.strerror}", "name a file in a folder that exists") from None
    click.echo(f"wrote {path}; give it to `safer-audit gate --policy {path}`")


@gate_group.command("policies")
@click.argument("name", required=False)
@json_option
def policies_command(name: str | None, as_json: bool) -> None:
    """The built-in policies, or one of them as a file."""
    from safer_engine.gate.policy import load_policy, policy_names, policy_text

    if name is not None:
        text = policy_text(name)
        print_json(load_policy(name).model_dump(mode="json")) if as_json else click.echo(text, nl=False)
        return
    known = [load_policy(each) for each in policy_names()]
    if as_json:
        print_json({"items": [{"name": p.name, "about": p.about, "rules": len(p.rules), "digest": p.digest} for p in known]})
        return
    rows = [(policy.name, policy.about, len(policy.rules), policy.digest[:12]) for policy in known]
    console().print(table("Built-in policies", ("name", "about", ">rules", "digest"), rows))


def run_check(**given: Any) -> int:
    """Judge, tell, and give the exit code that stands for the verdict."""
    from safer_engine.gate.documents import load_audit
    from safer_engine.gate.judge import judge
    from safer_engine.gate.policy import load_policy

    if given["report"] is None:
        raise SpecError("no audit is given", "give --report with a report.json, or the folder of an audit")
    policy = load_policy(given["policy_name"])
    audit = load_audit(given["report"], "--report")
    baseline = None if given["baseline"] is None else load_audit(Path(given["baseline"]), "--baseline")
    decision = judge(policy, audit, baseline, datetime.now(UTC).date())
    _write_files(decision, given["junit"], given["markdown"])
    _tell(decision, as_json=given["as_json"], quiet=given["quiet"])
    return _CODES[decision.verdict]


def _refuse_before(context: click.Context) -> None:
    """Options before a subcommand would be ignored, `--policy` of all things."""
    source = click.core.ParameterSource
    given = [name for name in context.params if context.get_parameter_source(name) not in (source.DEFAULT, None)]
    if given:
        raise SpecError(f"options before `{context.invoked_subcommand}` are not read", "put them after it")


def _write_files(decision: Decision, junit: Path | None, markdown: Path | None) -> None:
    from safer_engine.gate.outputs import as_junit, as_markdown
    from safer_engine.publishing import publishing, write_failed

    for path, text in ((junit, as_junit(decision)), (markdown, as_markdown(decision))):
        if path is not None:
            with publishing(path) as temporary:
                temporary.write_text(text, encoding="utf-8", newline="\n")
    summary = os.environ.get(_STEP_SUMMARY)
    if summary:
        try:
            with Path(summary).open("a", encoding="utf-8", newline="\n") as handle:
                handle.write(as_markdown(decision))
        except OSError as error:
            raise write_failed(Path(summary), error) from error


def _tell(decision: Decision, *, as_json: bool, quiet: bool) -> None:
    """Print the decision. A reader that goes away does not change it."""
    try:
        if as_json:
            from safer_engine.gate.outputs import as_json as text_of

            click.echo(text_of(decision), nl=False)
        elif quiet:
            click.echo(decision.verdict)
        else:
            _show(decision)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(decision: Decision) -> None:
    from safer_engine.gate.outputs import count_of, explanation, figure_of, name_of, rates, state_of, visible

    shown = console()
    kept, hidden = _worth_a_row(decision.checks)
    rows = [(state_of(c), name_of(c.id), visible(c.demand), figure_of(c), count_of(c), explanation(c)) for c in kept]
    columns = ("", "check", "demand", "figure", "n", "why")
    shown.print(table(f"Gate: policy {decision.policy.name}", columns, rows))
    for rule, count in hidden.items():
        shown.print(f"{rule}: {count} more checks passed or count for nothing (--json shows all)", markup=False)
    if decision.lost:
        shown.print(
            f"{len(decision.lost)} evaluation pairs that the baseline had right are wrong now (--json names them)", markup=False
        )
    shown.print(rates(decision), markup=False)
    shown.print(f"verdict: {decision.verdict}", markup=False, style="bold")


def _worth_a_row(checks: tuple[Check, ...]) -> tuple[list[Check], dict[str, int]]:
    """All checks, but of a rule with many only those that bear on the verdict; and how many are left out, by rule."""
    sizes = {check.rule: sum(other.rule == check.rule for other in checks) for check in checks}
    kept = [check for check in checks if sizes[check.rule] <= _MANY or check.effect != "none"]
    hidden = {rule: sizes[rule] - sum(check.rule == rule for check in kept) for rule in sizes}
    return kept, {rule: count for rule, count in hidden.items() if count}
