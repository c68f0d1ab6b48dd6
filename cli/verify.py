"""`safer-audit verify`: retrain with the recommended edits and with controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cli.options import NamedPath, build_from_flags, flag_options, json_option, quiet_option, store_option
from cli.output import QuietObserver, TerminalObserver, console, print_json, table
from cli.run import run_audit
from safer_engine.spec import merge
from safer_engine.spec_layers import BuiltSpec, parse_assignments, read_document


@click.group("verify", invoke_without_command=True)
@flag_options
@store_option
@click.option("--base", help="Model to train from, as of `train-rm`: best the one that the audited reward model came from.")
@click.option("--seeds", type=click.IntRange(1, 100), help="Trainings of each of the four arms; default 5.")
@click.option("--out", "-o", type=NamedPath(path_type=Path), help="Folder for the report; default audits/MODEL-DATASET.")
@json_option
@quiet_option
def verify_command(  # noqa: PLR0913, PLR0917 - one parameter per flag
    flags: dict[str, Any], store: Path | None, base: str | None, seeds: int | None, out: Path | None, as_json: bool, quiet: bool
) -> None:
    """Measure what the recommended edits change: train with them, without them, and with as many others, and compare.

    Give the flags of the `run` that made the audit, with --eval-dataset and --base: what it computed is taken from the store. The
    report then has a section “Do the edits help?”. How models are trained: --set retraining.recipe.epochs=2 and the like. `plan`
    with --set retraining.base=BASE --set retraining.folds=0 --set verification.seeds=5 says beforehand what it takes.

    To train with another trainer: `verify export-arms`, then `verify import`.
    """
    if click.get_current_context().invoked_subcommand is None:
        run_audit(_asked(flags, base, seeds), store, out, as_json=as_json, quiet=quiet)


@verify_command.command("export-arms")
@flag_options
@store_option
@click.option("--base", help="Model to train from.")
@click.option("--seeds", type=click.IntRange(1, 100), help="Trainings of each arm; default 5.")
@click.option("--out", "-o", type=NamedPath(path_type=Path), required=True, help="A new folder for the arms.")
@json_option
@quiet_option
def export_command(  # noqa: PLR0913, PLR0917 - one parameter per flag
    flags: dict[str, Any], store: Path | None, base: str | None, seeds: int | None, out: Path, as_json: bool, quiet: bool
) -> None:
    """Write the arms as datasets, with scripts that train them with TRL, OpenRLHF or plain PyTorch; trains nothing.

    Give the flags of the `run` that made the audit, with --eval-dataset and --base, as for `verify`. What was trained is
    judged by `verify import`.
    """
    from safer_engine import api
    from safer_engine.arm_export import export_arms
    from safer_engine.redteam import log_forced
    from safer_engine.store import LocalArtifactStore

    request, kept = api.prepare(_asked(flags, base, seeds).spec), LocalArtifactStore(store or api.default_store())
    log_forced(kept.root, "verify export-arms", request.spec)
    observer = QuietObserver() if as_json or quiet else TerminalObserver(console(err=True))
    with observer.showing():
        manifest = export_arms(request, kept, out, observer)
    if as_json:
        print_json(manifest.model_dump(mode="json"))
        return
    if not quiet:
        rows = [(data.file, data.pairs, data.dropped, data.flipped) for data in manifest.data]
        shown = console()
        shown.print(table("Arms", ("file", ">pairs", ">dropped", ">flipped"), rows))
        left = f"; {manifest.left_out} pairs of the audit are in none, for the base cannot read them" if manifest.left_out else ""
        shown.print(f"{len(manifest.runs)} trainings of {manifest.steps} steps{left}", markup=False)
    click.echo(str(out.resolve()))


@verify_command.command("import")
@click.argument("manifest", type=NamedPath(path_type=Path))
@click.argument("checkpoints", nargs=-1, required=True, metavar="ARM:SEED=FOLDER…")
@click.option("--dataset", "-d", help="Where the audited dataset lies now; default: where it lay when the arms were written.")
@click.option("--eval-dataset", "-e", help="Where the evaluation pairs lie now; default as above.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@store_option
@click.option("--out", "-o", type=NamedPath(path_type=Path), help="Where verification.json goes; default beside the manifest.")
@json_option
@quiet_option
def import_command(  # noqa: PLR0913, PLR0917 - one parameter per flag
    manifest: Path,
    checkpoints: tuple[str, ...],
    dataset: str | None,
    eval_dataset: str | None,
    device: str,
    store: Path | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Evaluate reward models that another trainer made of exported arms, and judge them as `verify` does.

    MANIFEST is the folder that `verify export-arms` wrote. Arms are as-given, edits, margin and random; `margin` may be left
    out. Seeds that lack an arm are left out and named. Fewer seeds than the manifest plans are inconclusive. Of the audit only
    the two datasets are needed, with the content that they had.
    """
    from cli.run import print_verification
    from safer_engine import api
    from safer_engine.arm_import import import_arms, parse_checkpoint
    from safer_engine.arm_manifest import read_manifest
    from safer_engine.publishing import publishing
    from safer_engine.redteam import log_forced
    from safer_engine.report.build_verification import report_of
    from safer_engine.store import LocalArtifactStore

    read = read_manifest(manifest)
    named = [parse_checkpoint(text, read) for text in checkpoints]
    elsewhere = {name: where for name, where in (("dataset", dataset), ("evaluation", eval_dataset)) if where is not None}
    target = out or (manifest if manifest.is_dir() else manifest.parent) / "verification.json"
    kept = LocalArtifactStore(store or api.default_store())
    log_forced(kept.root, "verify import", read.spec)
    observer = QuietObserver() if as_json or quiet else TerminalObserver(console(err=True))
    with observer.showing():
        found = import_arms(read, named, kept, observer, elsewhere, device)
    with publishing(target) as path:
        path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if as_json:
        print_json(found)
        return
    if not quiet:
        shown = console()
        print_verification(shown, report_of(found))
        if found["left_out"]:
            shown.print(f"left out, for their seed lacks an arm: {', '.join(found['left_out'])}", markup=False)
    click.echo(str(target.resolve()))


def _asked(flags: dict[str, Any], base: str | None, seeds: int | None) -> BuiltSpec:
    built = with_verification(flags, base, seeds)
    if built.spec.verification is None:
        raise click.UsageError(
            "nothing says what to train from: give --base, or a spec file with sections retraining and verification"
        )
    return built


def with_verification(flags: dict[str, Any], base: str | None, seeds: int | None) -> BuiltSpec:
    """The audit that flags describe, with its edits verified; a spec file wins over the default number of seeds.

    The audit's own retraining stays as it is, for suspicion and edits follow from it; without one nothing else is retrained.
    """
    asked = [] if base is None else [f"retraining.base={base}"]
    if base is not None and not _retrains(flags):
        asked.append("retraining.folds=0")
    if base is not None or seeds is not None:
        asked.append("verification={}" if seeds is None else f"verification.seeds={seeds}")
    return build_from_flags(**{**flags, "assignments": (*asked, *flags["assignments"])})


def _retrains(flags: dict[str, Any]) -> bool:
    """Whether the audit that a spec file and assignments describe has a section `retraining`: one with a base."""
    document = {} if flags["spec_file"] is None else read_document(flags["spec_file"])
    section = merge(document, parse_assignments(flags["assignments"]), whole=False).get("retraining")
    return isinstance(section, dict) and bool(section.get("base"))
