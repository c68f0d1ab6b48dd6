"""`safer-audit gate`: whether a reward model may ship."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import flag_options, json_option, quiet_option
from cli.output import console, print_json, table
from safer_engine.errors import SpecError

if TYPE_CHECKING:
    from rich.console import Console

    from safer_engine.gate.judge import Check, Decision
    from safer_engine.gate.power import Plan
    from safer_engine.gate.together import Together

Function = Callable[..., Any]
_CODES = {"pass": 0, "fail": 1, "inconclusive": 3}
_MANY = 12
_SETTLED = ("policy_name", "baselines", "labels", "callback")
_STEP_SUMMARY = "GITHUB_STEP_SUMMARY"

_CHECK_OPTIONS = (
    click.option("--report", "report", type=click.Path(path_type=Path), help="report.json of a finished audit, or its folder."),
    click.option("--audit", "audit", metavar="ID", help="A job of the service, in place of --report."),
    click.option("--gate", "posted", metavar="ID", help="A gate that was posted: wait for the service's verdict on it."),
    click.option(
        "--baseline",
        "baselines",
        multiple=True,
        help="What it must not fall behind: report.json, its folder, a job's id, label:NAME=VALUE. Several times: "
        "trainings of one recipe, whose spread is allowed for.",
    ),
    click.option(
        "--policy", "policy_name", default="default", show_default=True, help="A policy file, or a built-in one's name."
    ),
    click.option(
        "--wait/--detach",
        default=True,
        show_default=True,
        help="Wait and judge here; or let the service judge, and leave with 3.",
    ),
    click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Of a job that is submitted."),
    click.option(
        "--callback", metavar="URL", help="Is told of the verdict (--detach), or of the end of a job that is submitted."
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
    function = flag_options(function)
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


@gate_group.command("plan")
@click.option("--policy", "policy_name", default="default", show_default=True, help="A policy file, or a built-in one's name.")
@click.option("--report", type=click.Path(path_type=Path), help="Plan with the evaluation set of this report.")
@click.option(
    "--baseline",
    multiple=True,
    help="Measure on this audit how right and wrong go together: report.json, its folder, a job's id.",
)
@click.option("--dataset", type=click.Path(path_type=Path), help="Plan with these rows: .jsonl, .json or .csv, also .gz.")
@click.option("--pairs", multiple=True, metavar="[AXIS[/SUBSET]=]N", help="Plan with so many evaluation pairs.")
@click.option("--accuracy", type=click.FloatRange(0, 1), help="Expected pair accuracy; default 0.9, or that of the report.")
@click.option(
    "--correlation", type=click.FloatRange(0, 1), help="Of right and wrong with the baseline; default 0.5, or as measured."
)
@click.option(
    "--design-effect", type=click.FloatRange(1), help="Pairs worth one independent pair; default 1, or that of the report."
)
@click.option(
    "--baselines", type=click.IntRange(2, 1000), help="So many trainings of one recipe as baselines; with --training-sd."
)
@click.option("--training-sd", type=click.FloatRange(0, 1), help="How far trainings of one recipe differ in an accuracy (SD).")
@click.option("--power", type=click.FloatRange(0.5, 0.999), default=0.8, show_default=True, help="The chance of being detected.")
@json_option
def plan_command(policy_name: str, power: float, as_json: bool, **data: Any) -> None:
    """What the rules on pair accuracy can detect with given evaluation data. Runs no model."""
    from cli.gate_sources import plan_data
    from safer_engine.gate.policy import load_policy
    from safer_engine.gate.power import plan
    from safer_engine.gate.together import GUESS

    given = data["correlation"]
    sizes, measured = plan_data(**data)
    made = plan(load_policy(policy_name), sizes, GUESS if given is None else given, power)
    if as_json:
        print_json({**asdict(made), "measured": [asdict(one) for one in measured]})
    else:
        _show_measured(measured, given)
        _show_plan(made, power)


def _show_measured(measured: Sequence[Together], given: float | None) -> None:
    from safer_engine.gate.outputs import name_of

    if not measured:
        return
    rows = []
    for one in measured:
        place = ", ".join(f"{k}={v}" for k, v in (("axis", one.axis), ("subset", one.subset)) if v is not None)
        together = "–" if one.correlation is None else f"{one.correlation:.2f}".replace("-", "−")
        figures = (f"{one.n:,}", f"{one.n_groups:,}", f"{one.n_differ:,}", together, f"{one.design_effect:.2f}")
        rows.append((name_of(place) or "all pairs", *figures))
    columns = ("slice", ">pairs", ">groups", ">right in one only", ">correlation", ">design effect")
    console().print(table("How right and wrong go together with the baseline", columns, rows))
    if given is not None:
        console().print(f"planned with a correlation of {given:g}, as given", markup=False)


def _show_plan(made: Plan, power: float) -> None:
    from safer_engine.gate.outputs import name_of

    shown = console()
    rows = []
    for check in made.checks:
        drop = check.kind == "change"
        fails = "never" if check.fails_at is None else f"{'drop ≥' if drop else '≤'} {check.fails_at:.3f}"
        passes = "never" if check.passes_at is None else f"{'drop ≤' if drop else '≥'} {check.passes_at:.3f}"
        said = check.warning if check.needed is None else f"{check.warning}; {check.needed:,} pairs would do"
        rows.append(
            (name_of(check.id), f"{check.n:,}", f"± {100 * check.half_width:.1f}", fails, passes, f"{check.p_pass:.0%}", said)
        )
    columns = ("check", ">pairs", ">points", "fails at", "passes at", ">pass as expected", "warning")
    shown.print(table(f"What can be detected with {power:.0%} power", columns, rows))
    if made.not_planned:
        shown.print(f"not planned from counts: {', '.join(made.not_planned)}", markup=False)
    warned = sum(bool(check.warning) for check in made.checks)
    shown.print(
        f"{warned} of {len(made.checks)} checks will often be inconclusive" if warned else "every check can decide", markup=False
    )


def run_check(**given: Any) -> int:
    """Judge, tell, and give the exit code that stands for the verdict; never a pass where it could not be told halfway."""
    try:
        return _checked(**given)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CODES["inconclusive"]


def _checked(**given: Any) -> int:
    from cli.gate_sources import progress_console, require_one_source

    require_one_source(given["report"], given["audit"], given["posted"], given["flags"])
    shown = progress_console(quiet=given["quiet"] or given["as_json"])
    if given["posted"] is not None:
        _refuse_with_gate()
    _refuse_unused(**given)
    if given["posted"] is not None:
        decision = _of_gate(given["posted"], shown, wait=given["wait"])
    elif not given["wait"]:
        return _post(shown, **given)
    else:
        decision = _judged(shown, **given)
    if decision is None:
        return _CODES["inconclusive"]
    _write_files(decision, given["junit"], given["markdown"])
    _tell(decision, as_json=given["as_json"], quiet=given["quiet"])
    return _CODES[decision.verdict]


def _judged(shown: Console | None, **given: Any) -> Decision:
    """The decision, made on this machine."""
    from cli.gate_sources import audit_of, baseline_of, submits, submitted
    from safer_engine.gate.judge import judge
    from safer_engine.gate.policy import load_policy

    policy, job_id = load_policy(given["policy_name"]), given["audit"]
    baselines = [baseline_of(each, job_id) for each in given["baselines"]]
    if submits(given["flags"]):
        job_id = submitted(given["flags"], given["labels"], given["callback"], shown).id
    audit = audit_of(given["report"], job_id, shown)
    return judge(policy, audit, baselines, datetime.now(UTC).date())


def _post(shown: Console | None, **given: Any) -> int:
    """Have the service judge, and leave. Nothing is decided yet, so nothing has passed."""
    from cli.gate_posted import post
    from safer_engine.gate.policy import load_policy

    gate = post(
        given["audit"] or (given["flags"], given["labels"]),
        load_policy(given["policy_name"]),
        given["baselines"],
        given["callback"],
        shown,
    )
    if given["as_json"]:
        print_json(gate.model_dump(mode="json"))
    else:
        click.echo(f"{gate.id}\n{gate.audit}")
        if not given["quiet"]:
            click.echo(f"nothing is decided yet; wait for the verdict: safer-audit gate --gate {gate.id}", err=True)
    return _CODES["inconclusive"]


def _of_gate(gate_id: str, shown: Console | None, *, wait: bool) -> Decision | None:
    """The service's decision; None while there is none."""
    from cli.gate_posted import decision_of

    decision = decision_of(gate_id, shown, wait=wait)
    if decision is None:
        click.echo("pending")
    return decision


def _refuse_with_gate() -> None:
    """What was settled when a gate was posted would be ignored now, `--policy` of all things."""
    context = click.get_current_context()
    wrong = [name for name in _SETTLED if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
    if wrong:
        told = ", ".join("--policy" if name == "policy_name" else f"--{name.removesuffix('s')}" for name in wrong)
        raise SpecError(f"{told} cannot be given with --gate", "a gate has the policy and baseline that it was posted with")


def _refuse_unused(**given: Any) -> None:
    """What would be left aside is refused: who gave it counts on it."""
    from cli.gate_sources import submits

    if given["report"] is not None and not given["wait"]:
        raise SpecError("--detach has the service judge, and --report is a file here", "name an audit of the service: --audit ID")
    if submits(given["flags"]):
        return
    if given["labels"] or any(value is not None and value is not False and value != () for value in given["flags"].values()):
        raise SpecError(
            "labels and values of the spec are for an audit to be made", "leave them out, or name --model and --dataset"
        )
    if given["callback"] is not None and given["wait"]:
        raise SpecError("--callback is told by the service, which judges nothing here", "give --detach, or leave it out")


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
    from safer_engine.gate.outputs import count_of, explanation, figure_of, lost_of, name_of, rates, state_of, visible

    shown = console()
    kept, hidden = _worth_a_row(decision.checks)
    rows = [(state_of(c), name_of(c.id), visible(c.demand), figure_of(c), count_of(c), explanation(c)) for c in kept]
    columns = ("", "check", "demand", "figure", "n", "why")
    shown.print(table(f"Gate: policy {decision.policy.name}", columns, rows))
    for rule, count in hidden.items():
        shown.print(f"{rule}: {count} more checks passed or count for nothing (--json shows all)", markup=False)
    if decision.lost:
        shown.print(f"{lost_of(decision)} (--json names them)", markup=False)
    shown.print(rates(decision), markup=False)
    shown.print(f"verdict: {decision.verdict}", markup=False, style="bold")


def _worth_a_row(checks: tuple[Check, ...]) -> tuple[list[Check], dict[str, int]]:
    """All checks, but of a rule with many only those that bear on the verdict; and how many are left out, by rule."""
    sizes = {check.rule: sum(other.rule == check.rule for other in checks) for check in checks}
    kept = [check for check in checks if sizes[check.rule] <= _MANY or check.effect != "none"]
    hidden = {rule: sizes[rule] - sum(check.rule == rule for check in kept) for rule in sizes}
    return kept, {rule: count for rule, count in hidden.items() if count}
