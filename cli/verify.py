"""`safer-audit verify`: retrain with the recommended edits and with controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.options import NamedPath, build_from_flags, flag_options, json_option, quiet_option, store_option
from cli.run import run_audit
from safer_engine.spec_layers import BuiltSpec


@click.command("verify")
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
    """
    built = with_verification(flags, base, seeds)
    if built.spec.verification is None:
        raise click.UsageError(
            "nothing says what to train from: give --base, or a spec file with sections retraining and verification"
        )
    run_audit(built, store, out, as_json=as_json, quiet=quiet)


def with_verification(flags: dict[str, Any], base: str | None, seeds: int | None) -> BuiltSpec:
    """The audit that flags describe, with its edits verified; a spec file wins over the default number of seeds."""
    asked = [] if base is None else [f"retraining.base={base}", "retraining.folds=0"]
    if base is not None or seeds is not None:
        asked.append("verification={}" if seeds is None else f"verification.seeds={seeds}")
    return build_from_flags(**{**flags, "assignments": (*asked, *flags["assignments"])})
