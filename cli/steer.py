"""`safer-audit steer`: rewards with a latent's activation scaled."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.options import audit_options, json_option, store_option
from cli.output import QuietObserver, TerminalObserver, console, print_json, table
from safer_engine.spec_layers import BuiltSpec

if TYPE_CHECKING:
    from safer_engine.steering import Steered


@click.command("steer")
@audit_options
@store_option
@click.option("--latent", type=click.IntRange(0), required=True, help="The latent whose activation is scaled.")
@click.option("--scale", type=click.FloatRange(-100, 100), help="One factor: 0 ablates, 2 doubles.")
@click.option("--dose", help="Several factors, comma-separated; default 0,0.5,1,2,4.")
@click.option("--over", metavar="DATASET", help="Another dataset in place of the audit's pairs, named as for --dataset.")
@click.option("--prompt", default="", help="With --chosen and --rejected: one pair in place of the audit's.")
@click.option("--chosen", help="A text for the chosen side.")
@click.option("--rejected", help="A text for the rejected side.")
@json_option
def steer_command(  # noqa: PLR0913, PLR0917 - one parameter per flag
    built: BuiltSpec,
    store: Path | None,
    latent: int,
    scale: float | None,
    dose: str | None,
    over: str | None,
    prompt: str,
    chosen: str | None,
    rejected: str | None,
    as_json: bool,
) -> None:
    """Rewards and margin with a latent scaled: a dose curve over the pairs whose residual streams were kept, or over others.

    Give the flags of the `run` that made the audit: its autoencoder is read from the store.
    """
    from safer_engine import api
    from safer_engine.spec import DatasetSpec
    from safer_engine.spec_layers import parse_source
    from safer_engine.steering import steer
    from safer_engine.store import LocalArtifactStore

    if (chosen is None) != (rejected is None):
        raise click.UsageError("--chosen and --rejected go together")
    if scale is not None and dose is not None:
        raise click.UsageError("give --scale or --dose, not both")
    if over is not None and chosen is not None:
        raise click.UsageError("give --over or --chosen and --rejected, not both")
    scales = [scale] if scale is not None else _scales(dose or "0,0.5,1,2,4")
    pairs: DatasetSpec | dict[str, str] | None = None
    if over is not None:
        pairs = DatasetSpec.model_validate({"source": parse_source(over)})
    elif chosen is not None and rejected is not None:
        pairs = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    request = api.prepare(built.spec)
    observer = QuietObserver() if as_json else TerminalObserver(console(err=True))
    with observer.showing():
        found = steer(request, LocalArtifactStore(store or api.default_store()), latent, scales, pairs, observer)
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    _print(found)


def _scales(text: str) -> list[float]:
    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise click.UsageError(f"--dose {text!r} is no list of numbers, such as 0,0.5,1,2,4") from error
    if not all(-100 <= scale <= 100 for scale in scales):
        raise click.UsageError("a dose is a number from -100 to 100")
    return scales


def _print(found: Steered) -> None:
    shown = console()
    shown.print(f"latent {found.latent_id}: fires in {found.n_fired} of {found.n_pairs} pairs", markup=False)
    reach = max((abs(dose.margin_change) for dose in found.doses), default=0.0)
    rows = []
    for dose in found.doses:
        ends = "–" if dose.margin_lo is None else f"{dose.margin_lo:+.4f} … {dose.margin_hi:+.4f}"
        bar = ("▲" if dose.margin_change > 0 else "▼") * round(12 * abs(dose.margin_change) / reach) if reach else ""
        means = (f"×{dose.scale:g}", f"{dose.chosen:.4f}", f"{dose.rejected:.4f}", f"{dose.margin:.4f}")
        rows.append((*means, f"{dose.margin_change:+.4f}", ends, f"{dose.accuracy:.1%}", bar))
    heads = ("dose", ">chosen", ">rejected", ">margin", ">change", "95 % interval", ">accuracy", "change")
    shown.print(table("Rewards with the latent scaled", heads, rows))
