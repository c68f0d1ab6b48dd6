"""`safer-audit train-rm`: train a reward model with the Bradley–Terry loss."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import NamedPath, json_option, quiet_option
from cli.output import TerminalObserver, console, duration, print_json, table
from safer_engine.events import NullObserver
from safer_engine.spec import merge
from safer_engine.spec_layers import parse_assignments, parse_source

if TYPE_CHECKING:
    from safer_engine.training import TrainResult

_RECIPE = ("epochs", "lr", "batch", "max_length", "dtype")


@click.command("train-rm")
@click.option("--base", "-b", required=True, help="Encoder or decoder to start from: folder or hub id, org/name@revision.")
@click.option("--dataset", "-d", required=True, help="Preference dataset: file, save_to_disk folder or hub id.")
@click.option("--out", "-o", type=NamedPath(path_type=Path, file_okay=False), required=True, help="Model folder to make.")
@click.option("--eval-dataset", "-e", help="Preference dataset that only measures.")
@click.option("--preset", type=click.Choice(["default", "paper"]), help="Where values not given come from.")
@click.option("--lora", is_flag=True, help="Train low-rank adapters only, merged into the model at the end.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the pairs.")
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("--batch", type=click.IntRange(1), help="Pairs per optimiser step.")
@click.option("--max-length", type=click.IntRange(8), help="Longest sequence in tokens; give the audit the same.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), help="Precision of the forward and backward pass.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
@click.option("--seed", type=click.IntRange(0), help="Seed of the head and of the order of pairs.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any other value, e.g. recipe.warmup=0.1.")
@json_option
@quiet_option
def train_rm_command(out: Path, as_json: bool, quiet: bool, **flags: Any) -> None:
    """Train a reward model with the Bradley–Terry loss, ready to be audited.

    Interrupted or killed, the same command goes on from its last checkpoint; when the model is there, it does nothing.
    """
    from safer_engine.api import default_store
    from safer_engine.redteam import log_forced
    from safer_engine.train_spec import build_train_spec
    from safer_engine.training import train_reward_model

    spec = build_train_spec(train_document(flags))
    log_forced(Path(os.environ.get("SAFER_AUDIT_STORE") or default_store()), "train-rm", spec)
    shown = console(err=True)
    if quiet or as_json:
        result = train_reward_model(spec, out, NullObserver())
    else:
        observer = TerminalObserver(shown)
        with observer.showing():
            result = train_reward_model(spec, out, observer)
    if as_json:
        print_json({"path": str(result.path), "cached": result.cached, **result.record})
        return
    if not quiet:
        _print_summary(result, flags["dataset"])
    click.echo(str(result.path))


def train_document(flags: dict[str, Any]) -> dict[str, Any]:
    """The training spec that the command's flags describe, as a document. Raises SpecError."""
    document: dict[str, Any] = {"base": flags["base"], "dataset": {"source": parse_source(flags["dataset"])}}
    if flags["eval_dataset"]:
        document["evaluation"] = {"source": parse_source(flags["eval_dataset"])}
    document |= {name: flags[name] for name in ("preset", "seed") if flags[name] is not None}
    if recipe := {name: flags[name] for name in _RECIPE if flags[name] is not None}:
        document["recipe"] = recipe
    if flags["lora"]:
        document["lora"] = {}
    if flags["device"]:
        document["runtime"] = {"device": flags["device"]}
    return merge(document, parse_assignments(flags["assignments"]))


def _print_summary(result: TrainResult, dataset: str) -> None:
    record, shown = result.record, console()
    last = [step for step in record["curve"] if step["epoch"] > record["settings"]["epochs"] - 1]
    accuracy = sum(step["accuracy"] for step in last) / len(last)
    rows = [
        ("pairs", f"{record['pairs']['n_pairs']:,} in {record['pairs']['n_groups']:,} groups"),
        ("steps", f"{len(record['curve']):,}, in {duration(record['timing']['training_seconds'])}"),
        ("accuracy while training, last epoch", f"{accuracy:.3f}"),
    ]
    for score in (record["evaluation"] or {"slices": []})["slices"]:
        name = " / ".join(part for part in (score["axis"], score["subset"]) if part) or "all"
        found = score["accuracy"]
        spread = "" if found["lo"] is None else f"  ({found['lo']:.3f} … {found['hi']:.3f})"
        rows.append((f"evaluation accuracy, {name}", f"{found['estimate']:.3f}{spread}  of {found['n']}"))
    shown.print(table("Trained" if not result.cached else "Trained before", ("", ""), rows))
    limit = record["pairs"]["max_length"]
    given = shlex.join(["--model", str(result.path), "--dataset", dataset, "--set", f"model.max_length={limit}"])
    shown.print(f"audit it:  safer-audit run {given}", markup=False, soft_wrap=True)
