"""The `safer-audit` command: commands loaded on use, one table of exit codes."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Any

import click

from safer_engine.errors import InputRefused, Interrupted, SaferError, SpecError
from service import errors as service

EXIT_OK = 0
EXIT_GATE_FAILED = 1
EXIT_USAGE = 2
EXIT_INCONCLUSIVE = 3
EXIT_FAILED = 4
EXIT_UNREACHABLE = 5
EXIT_INTERRUPTED = 130

_EXIT_CODES: tuple[tuple[type[SaferError], int], ...] = (
    (SpecError, EXIT_USAGE),
    (InputRefused, EXIT_USAGE),
    (Interrupted, EXIT_INTERRUPTED),
    (service.Unreachable, EXIT_UNREACHABLE),
    (service.Unavailable, EXIT_UNREACHABLE),
    (service.Malformed, EXIT_USAGE),
    (service.RequestInvalid, EXIT_USAGE),
    (service.NotFound, EXIT_USAGE),
    (service.Gone, EXIT_USAGE),
    (service.Conflict, EXIT_USAGE),
    (service.NotAuthenticated, EXIT_USAGE),
    (service.NotAllowed, EXIT_USAGE),
    (service.SourceNotAllowed, EXIT_USAGE),
    (service.QuotaExceeded, EXIT_USAGE),
    (service.TooLarge, EXIT_USAGE),
    (SaferError, EXIT_FAILED),
)

_HERE = {
    "run": ("cli.run", "run_command", "Audit a reward model on a preference dataset."),
    "plan": ("cli.plan", "plan_command", "What `run` would compute, and what it would take; computes nothing."),
    "check": ("cli.check", "check_command", "Preflight alone: what would be refused, dropped or truncated."),
    "train-rm": ("cli.train_rm", "train_rm_command", "Train a reward model with the Bradley–Terry loss."),
    "verify": ("cli.verify", "verify_command", "Retrain with the recommended edits and with controls: do they help?"),
    "compare": ("cli.compare", "compare_command", "Two reward models, or two audits, on the same pairs: what changed."),
    "drill": ("cli.drill", "drill_command", "Poison data, train on them, audit: harm and detection (red team; off by default)."),
    "steer": ("cli.steer", "steer_command", "Rewards with a latent of an audit scaled: a dose curve."),
    "apply": ("cli.apply", "apply_command", "Apply recommended edits to a dataset, or undo them."),
    "gate": ("cli.gate", "gate_group", "Whether a reward model may ship: a policy's rules on a finished audit."),
    "export": ("cli.export", "export_command", "A finished audit for others: evidence, model card, MLflow, Label Studio."),
    "decisions": ("cli.export", "decisions_command", "Decisions of reviewers back from Label Studio."),
    "spec": ("cli.spec", "spec_group", "Write, show or describe an audit spec."),
    "demo": ("cli.demo", "demo_command", "Plant wrong labels, train a small reward model on them, and find them."),
    "doctor": ("cli.doctor", "doctor_command", "What this machine has, and what is missing."),
}
_SERVICE = {
    "submit": ("cli.submit", "submit_command", "Have a service do an audit or a training; local files are uploaded."),
    "status": ("cli.status", "status_command", "How a job stands."),
    "watch": ("cli.watch", "watch_command", "A job's stages as they run, until it ends."),
    "list": ("cli.list", "list_command", "Jobs, newest first."),
    "cancel": ("cli.cancel", "cancel_command", "Ask a job to stop."),
    "retry": ("cli.retry", "retry_command", "Let a failed or cancelled job go on."),
    "logs": ("cli.logs", "logs_command", "What happened to a job."),
    "report": ("cli.report", "report_command", "A job's report."),
    "download": ("cli.download", "download_command", "The files that a job made."),
    "edits": ("cli.edits", "edits_group", "Recommended edits of a job, and the decisions on them."),
}
_OPERATOR = {
    "up": ("cli.up", "up_command", "Run the whole service on this machine, for yourself."),
    "serve": ("cli.serve", "serve_command", "Run the API and the dispatcher (production)."),
    "worker": ("cli.worker", "worker_command", "Run a worker (production)."),
    "migrate": ("cli.migrate", "migrate_command", "Bring the service's database up to date."),
    "admin": ("cli.admin", "admin_group", "Keys, jobs and stored artifacts, on the service's machine."),
}
_SECTIONS = {"Commands": _HERE, "Commands for a service": _SERVICE, "Commands that run a service": _OPERATOR}
_COMMANDS = {name: entry for section in _SECTIONS.values() for name, entry in section.items()}
"""Command → (module, attribute, one line). The modules import the engine inside their functions."""


class LazyGroup(click.Group):
    """Lists every command without importing any of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Commands in the order of use."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command asked for."""
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The lists in --help, from the tables above."""
        for title, commands in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, line) for name, (_, _, line) in commands.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="safer-audit", prog_name="safer-audit")
def main() -> None:
    """Audit what a reward model rewards.

    Exit codes: 0 ok, 1 gate failed, 2 usage or refused input, 3 inconclusive, 4 failed, 5 service unreachable,
    130 interrupted.
    """


def entry(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run_main(arguments))


def run_main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; every failure is one clear message on stderr."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = main.main(args=arguments, prog_name="safer-audit", standalone_mode=False)
    except (SaferError, click.ClickException, ModuleNotFoundError) as error:
        return _report(error)
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; run the same command again to go on", err=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception as error:  # the outermost edge: a bug becomes one message and code 4
        _trace()
        click.echo(f"error: {type(error).__name__}: {error}", err=True)
        click.echo("  this is a fault in safer-audit; SAFER_DEBUG=1 prints where. Nothing finished is lost.", err=True)
        return EXIT_FAILED
    return code if isinstance(code, int) else EXIT_OK


def exit_code(error: SaferError) -> int:
    """The exit code of an error."""
    return next(code for kind, code in _EXIT_CODES if isinstance(error, kind))


def _report(error: SaferError | click.ClickException | ModuleNotFoundError) -> int:
    _trace()
    if isinstance(error, click.ClickException):
        error.show()
        return EXIT_USAGE
    if isinstance(error, ModuleNotFoundError):
        click.echo(f"error: this command needs the package {error.name!r}, which is not installed", err=True)
        click.echo("  hint: install torch, then: pip install 'safer-audit[engine]'", err=True)
        return EXIT_FAILED
    from cli.output import seen

    click.echo(f"error [{error.code}]: {seen(error.message)}", err=True)
    if error.hint:
        click.echo(f"  hint: {seen(error.hint)}", err=True)
    return exit_code(error)


def _trace() -> None:
    if os.environ.get("SAFER_DEBUG"):
        traceback.print_exc()


def _interrupt(_signal: int, _frame: FrameType | None) -> Any:
    raise KeyboardInterrupt


if __name__ == "__main__":
    entry()
