"""`safer-audit edits`: what is recommended for the pairs of a job, and what reviewers decide."""

from __future__ import annotations

from heapq import nlargest
from pathlib import Path

import click

from cli.options import json_option
from cli.output import console, print_json, table
from cli.profile import connect

_CHANGES = ("drop", "flip", "review")
_ACTIONS = click.Choice(["keep", "review", "drop", "flip"])


class _ListByDefault(click.Group):
    """`edits ID --json` is `edits ID list --json`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See `click.Group`."""
        if len(args) > 1 and args[1].startswith("-") and args[1] not in self.get_help_option_names(ctx):
            args = [args[0], "list", *args[1:]]
        return super().parse_args(ctx, args)


@click.group("edits", cls=_ListByDefault, invoke_without_command=True)
@click.argument("job_id", metavar="ID")
@click.pass_context
def edits_group(context: click.Context, job_id: str) -> None:
    """Recommended edits of a job, and the decisions on them. Without a command: `list`."""
    context.obj = job_id
    if context.invoked_subcommand is None:
        context.invoke(list_edits)


@edits_group.command("list")
@click.option(
    "--action", "actions", multiple=True, type=_ACTIONS, help="Only rows with this recommendation; default all but keep."
)
@click.option("--open", "undecided", is_flag=True, help="Only rows that nobody has decided on.")
@click.option("--limit", "-n", type=click.IntRange(1), default=50, show_default=True, help="At most so many.")
@json_option
@click.pass_obj
def list_edits(
    job_id: str, actions: tuple[str, ...] = (), undecided: bool = False, limit: int = 50, as_json: bool = False
) -> None:
    """Recommendations, most suspicious first, with the last decision on each."""
    with connect() as client:
        every = client.edits(job_id, actions=actions or _CHANGES, decided=False if undecided else None)
        found = nlargest(limit, every, key=lambda edit: -1.0 if edit.suspicion is None else edit.suspicion)
    if as_json:
        print_json({"items": [edit.model_dump(mode="json") for edit in found]})
        return
    if not found:
        click.echo("no pair is so: `--action keep` lists those that nothing is recommended for", err=True)
        return
    rows = [
        (
            edit.pair_id,
            edit.axis,
            edit.action,
            "–" if edit.suspicion is None else f"{edit.suspicion:.3f}",
            f"{edit.decision.action} by {edit.decision.reviewer}" if edit.decision else "",
        )
        for edit in found
    ]
    console().print(table("Edits", ("pair", "axis", "recommended", ">suspicion", "decided"), rows))


@edits_group.command("show")
@click.argument("pair_id", metavar="PAIR")
@json_option
@click.pass_obj
def show_edit(job_id: str, pair_id: str, as_json: bool) -> None:
    """One pair: its recommendation, the evidence, and every decision on it."""
    with connect() as client:
        edit = client.edit(job_id, pair_id)
    if as_json:
        print_json(edit.model_dump(mode="json"))
        return
    facts = [("action", edit.action), ("suspicion", edit.suspicion), ("reward margin", edit.reward_margin), ("axis", edit.axis)]
    shown = console()
    shown.print(table(f"Pair {edit.pair_id}", ("", ""), [(name, value) for name, value in facts if value not in (None, "")]))
    rows = [(item.at.strftime("%Y-%m-%d %H:%M:%S"), item.action, item.reviewer, item.note) for item in edit.history]
    shown.print(table("Decisions" if rows else "No decision yet", ("at (UTC)", "action", "by", "note"), rows))


@edits_group.command("decide")
@click.argument("pair_id", metavar="PAIR")
@click.argument("action", type=_ACTIONS)
@click.option("--note", default="", help="Why; kept with the decision.")
@json_option
@click.pass_obj
def decide_edit(job_id: str, pair_id: str, action: str, note: str, as_json: bool) -> None:
    """Decide on a pair. A later decision counts in place of this one; both are kept."""
    with connect() as client:
        edit = client.decide(job_id, pair_id, action, note)  # type: ignore[arg-type] # click has checked it
    if as_json:
        print_json(edit.model_dump(mode="json"))
    else:
        click.echo(f"{edit.pair_id}: {action} (recommended: {edit.action})")


@edits_group.command("export")
@click.option("--out", "-o", type=click.Path(path_type=Path, file_okay=False), help="Also download it into this folder.")
@json_option
@click.pass_obj
def export_edits(job_id: str, out: Path | None, as_json: bool) -> None:
    """Make the decisions so far a file of the job that never changes."""
    from cli.transfers import fetch, into
    from safer_engine.publishing import require_writable

    with connect() as client:
        export = client.export_decisions(job_id)
        if out is not None:
            require_writable(out, "--out")
        path = fetch(client, job_id, into(out, [export]), None)[0].resolve() if out else None
    if as_json:
        print_json({**export.model_dump(mode="json"), "path": None if path is None else str(path)})
        return
    click.echo(f"{export.name}: sha256 {export.digest}", err=path is not None)
    if path is not None:
        click.echo(str(path))
        click.echo(f"apply them: safer-audit apply --edits {path}", err=True)
