"""`safer-audit admin`: keys, jobs and stored artifacts, on the machine of the service and with its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.migrate import home_option
from cli.options import Amount, json_option
from cli.output import console, print_json, size, table
from cli.programs import ask

_ROLES = click.Choice(["submit", "read", "review", "redteam", "admin"])
_STATES = click.Choice(["queued", "running", "succeeded", "failed", "cancelled"])
_project_option = click.option("--project", default="default", show_default=True, help="Project.")


@click.group("admin")
@home_option
@click.pass_context
def admin_group(context: click.Context, home: Path | None) -> None:
    """Keys, jobs and stored artifacts, on the machine of the service and with its settings (SAFER_…)."""
    context.obj = home


@admin_group.group("keys")
def keys_group() -> None:
    """API keys of a project."""


@keys_group.command("create")
@_project_option
@click.option("--name", required=True, help="Whose it is, or what for.")
@click.option("--role", "roles", multiple=True, required=True, type=_ROLES, help="What it may do; may be repeated.")
@click.option("--days", type=Amount(), help="Days until it ends; default never.")
@click.option("--make-project", is_flag=True, help="Make the project if there is none.")
@json_option
@click.pass_obj
def create_key(home: Path | None, /, project: str, name: str, roles: tuple[str, ...], **given: Any) -> None:
    """Make a key. Its secret is shown this once: only a keyed hash of it is stored."""
    arguments = ["keys", "create", "--project", project, "--name", name]
    for role in roles:
        arguments += ["--role", role]
    arguments += ["--days", str(given["days"])] if given["days"] is not None else []
    arguments += ["--make-project"] if given["make_project"] else []
    answer = ask(arguments, home)
    if given["as_json"]:
        print_json(answer)
        return
    click.echo(answer["secret"])
    click.echo(
        f"key {answer['id']} of {answer['project']}: {', '.join(answer['roles'])}. Keep it now: it is not shown again.", err=True
    )


@keys_group.command("list")
@_project_option
@json_option
@click.pass_obj
def list_keys(home: Path | None, project: str, as_json: bool) -> None:
    """Keys of a project, revoked ones too."""
    answer = ask(["keys", "list", "--project", project], home)
    if as_json:
        print_json(answer)
        return
    rows = [
        (key["id"], key["name"], ",".join(key["roles"]), _day(key["created"]), _end(key), _day(key["last_used"]))
        for key in answer["items"]
    ]
    console().print(table("Keys", ("id", "name", "roles", "made", "ends", "last used"), rows))


@keys_group.command("revoke")
@click.argument("key_id", metavar="KEY")
@_project_option
@json_option
@click.pass_obj
def revoke_key(home: Path | None, key_id: str, project: str, as_json: bool) -> None:
    """End a key now."""
    answer = ask(["keys", "revoke", "--project", project, key_id], home)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"key {answer['id']} ({answer['name']}): revoked")


@admin_group.group("jobs")
def jobs_group() -> None:
    """Jobs of a project."""


@jobs_group.command("list")
@_project_option
@click.option("--state", "states", multiple=True, type=_STATES, help="Only jobs in this state; may be repeated.")
@click.option("--limit", "-n", type=click.IntRange(1), default=50, show_default=True, help="At most so many.")
@json_option
@click.pass_obj
def list_jobs(home: Path | None, project: str, states: tuple[str, ...], limit: int, as_json: bool) -> None:
    """Jobs, newest first."""
    arguments = ["jobs", "list", "--project", project, "--limit", str(limit)]
    for state in states:
        arguments += ["--state", state]
    answer = ask(arguments, home)
    if as_json:
        print_json(answer)
        return
    rows = [
        (job["id"], job["kind"], job["state"], _day(job["created"]), job["attempt"], (job["error"] or {}).get("code", ""))
        for job in answer["items"]
    ]
    console().print(table("Jobs", ("id", "kind", "state", "made", ">attempt", "error"), rows))


@jobs_group.command("requeue")
@click.argument("job_id", metavar="ID")
@_project_option
@json_option
@click.pass_obj
def requeue_job(home: Path | None, job_id: str, project: str, as_json: bool) -> None:
    """Let a failed or cancelled job go on; what it had finished is not computed again."""
    answer = ask(["jobs", "requeue", "--project", project, job_id], home)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"job {answer['id']}: {answer['state']}, attempt {answer['attempt']}")


@jobs_group.command("cancel")
@click.argument("job_id", metavar="ID")
@_project_option
@json_option
@click.pass_obj
def cancel_job(home: Path | None, job_id: str, project: str, as_json: bool) -> None:
    """Stop a job."""
    answer = ask(["jobs", "cancel", "--project", project, job_id], home)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"job {answer['id']}: {answer['state']}")


@jobs_group.command("reconcile")
@json_option
@click.pass_obj
def reconcile_jobs(home: Path | None, as_json: bool) -> None:
    """Look for lost messages and leases now, as the service does every half minute."""
    answer = ask(["jobs", "reconcile"], home)
    if as_json:
        print_json(answer)
    else:
        click.echo(", ".join(f"{name}: {len(value)}" for name, value in answer.items() if isinstance(value, list)))


@admin_group.group("store")
def store_group() -> None:
    """Stored artifacts."""


@store_group.command("gc")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
@click.pass_obj
def collect_garbage(home: Path | None, dry_run: bool, as_json: bool) -> None:
    """Remove what nothing needs any more: see docs/operations.md for what is kept how long."""
    answer = ask(["store", "gc", *(["--dry-run"] if dry_run else [])], home)
    if as_json:
        print_json(answer)
    else:
        _show_removed(answer)


@store_group.command("purge")
@click.argument("pair_ids", metavar="PAIR...", nargs=-1)
@click.option("--file", "file", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Pair ids, one a line.")
@_project_option
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
@click.pass_obj
def purge_pairs(home: Path | None, /, pair_ids: tuple[str, ...], file: Path | None, **given: Any) -> None:
    """Remove everything that holds these pairs, for a person whose data they are."""
    wanted = [*pair_ids, *(file.read_text("utf-8").splitlines() if file else [])]
    if not wanted:
        raise click.UsageError("name pairs, or a file of them with --file")
    arguments = ["store", "purge", "--project", given["project"], *(["--dry-run"] if given["dry_run"] else [])]
    answer = ask(arguments, home, "\n".join(wanted))
    if given["as_json"]:
        print_json(answer)
        return
    _show_removed(answer)
    click.echo(f"decisions about them: {answer['decisions']}; jobs concerned: {len(answer['jobs'])}")
    for job in answer["jobs"]:
        click.echo(f"  {job['id']}{' (not over: cancel it first)' if job['live'] else ''}")


def _show_removed(answer: dict[str, Any]) -> None:
    """Counts and bytes by kind and reason."""
    sums: dict[tuple[str, str], list[int]] = {}
    for item in answer["items"]:
        line = sums.setdefault((item["kind"], item["reason"]), [0, 0])
        line[0] += 1
        line[1] += item["size"]
    rows = [(kind, reason, count, size(total) if total else "") for (kind, reason), (count, total) in sorted(sums.items())]
    title = "Would be removed" if answer["dry_run"] else "Removed"
    if rows:
        console().print(table(title, ("what", "why", ">count", ">size"), rows))
    else:
        click.echo(f"{title}: nothing")


def _day(text: str | None) -> str:
    return text[:16].replace("T", " ") if text else "–"


def _end(key: dict[str, Any]) -> str:
    return f"revoked {_day(key['revoked'])}" if key["revoked"] else _day(key["expires"])
