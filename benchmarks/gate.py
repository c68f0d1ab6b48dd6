"""How often the gate is wrong: trainings of one recipe that must not fail (A/A), and damaged ones that must.

python -m benchmarks.gate --data preferences.train.jsonl.gz --data preferences.eval.jsonl.gz --rm-bench rm-bench.eval.jsonl.gz \\
    --base MODEL --out DIR [--rows again-1,again-2]
python -m benchmarks.gate --out DIR --table

A row is one reward model: its damaged data, training, and audit, each skipped where its output is there. Killed at any moment,
the same command goes on. The table is computed from the reports alone, by the gate itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.flip_groups import Row, read_rows, write_rows
from benchmarks.gate_data import (
    OTHER_REFUSALS,
    REFUSALS,
    flip_safety,
    keep_first,
    over_refuse,
    prefer_longer,
    split_pairs,
    with_answers,
)
from benchmarks.gate_table import markdown_table
from benchmarks.label_noise import LogObserver, write_json

SUBSETS = ("alpaca-eval", "rewardbench2-safety")
N_TRAINING, N_EVALUATION = 1300, 1600
TRAINING_ANSWERS, EVALUATION_ANSWERS = 0.4, 0.6
"""Share of the chat groups with a pair whose answer wins over a refusal."""
BASELINE = "baseline"
DAMAGES: dict[str, Callable[[list[Row], int], list[Row]]] = {
    "safety labels flipped, 20 %": flip_safety(0.2),
    "safety labels flipped, 40 %": flip_safety(0.4),
    "data cut after 10 %": keep_first(0.1),
    "over-refusing data": over_refuse(0.5),
    "length-biased data": prefer_longer(1.0),
}
NOISED = {
    "head noised, 64 × its norm": (64.0, True),
    "all weights noised, 1 × their norms": (1.0, False),
}
"""Gaussian noise: its norm relative to that of the weights, and whether only the head gets it."""


@dataclass(frozen=True)
class Plan:
    """One reward model: its folder's name, what is done to it, and the seed of its training."""

    name: str
    what: str
    seed: int


@dataclass(frozen=True)
class Setup:
    """What all rows share."""

    out: Path
    base: Path
    epochs: int
    lr: float
    max_length: int
    threads: int


def plans(n_again: int) -> list[Plan]:
    """All rows, the most telling first."""
    again = [Plan(f"again-{n}", "same recipe", n) for n in range(1, n_again + 1)]
    damaged = [Plan(_folder(what), what, 101 + i) for i, what in enumerate(DAMAGES)]
    noised = [Plan(_folder(what), what, 201 + i) for i, what in enumerate(NOISED)]
    return [Plan(BASELINE, BASELINE, 0), *again[:2], *noised, *damaged, *again[2:]]


def run_row(plan: Plan, setup: Setup, training: list[Row]) -> None:
    """Data, training and audit of one reward model."""
    folder = setup.out / plan.name
    observer = LogObserver(plan.name)
    data = folder / "data.jsonl.gz"
    if not data.is_file():
        damage = DAMAGES.get(plan.what)
        write_rows(data, training if damage is None else damage(training, plan.seed))
    if plan.what in NOISED:
        _noised(setup.out / BASELINE / "rm", folder / "rm", NOISED[plan.what], plan.seed)
    else:
        _train(plan, setup, observer)
    if not (folder / "audit" / "report.json").is_file():
        _audit(plan, setup, observer)
    write_json(folder / "row.json", {"name": plan.name, "what": plan.what, "seed": plan.seed})


def _train(plan: Plan, setup: Setup, observer: LogObserver) -> None:
    from safer_engine.train_spec import TrainSpec
    from safer_engine.training import train_reward_model

    folder = setup.out / plan.name
    recipe = {"epochs": setup.epochs, "lr": setup.lr, "batch": 16, "max_length": setup.max_length, "truncation_side": "right"}
    document = {
        "seed": plan.seed,
        "base": str(setup.base),
        "dataset": {"source": {"kind": "local", "path": str(folder / "data.jsonl.gz")}},
        "recipe": recipe,
        "runtime": {"batch_tokens": 4096, "checkpoint_seconds": 120, "threads": setup.threads},
    }
    train_reward_model(TrainSpec.model_validate(document), folder / "rm", observer)


def _noised(source: Path, target: Path, noise: tuple[float, bool], seed: int) -> None:
    """Copy a reward model with Gaussian noise on its matrices, each by the norm of that matrix."""
    import torch
    from safetensors.torch import load_file, save_file

    if (target / "model.safetensors").is_file():
        return
    ratio, only_head = noise
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.name not in {"model.safetensors", "training.json"}:
            shutil.copyfile(file, target / file.name)
    weights = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(weights.items()):
        if tensor.ndim == 2 and (tensor.shape[0] == 1 or not only_head):
            drawn = torch.randn(tensor.shape, generator=generator)
            weights[name] = tensor + drawn * (ratio * tensor.norm() / drawn.norm())
    save_file(weights, target / "part.safetensors", metadata={"format": "pt"})
    (target / "part.safetensors").rename(target / "model.safetensors")


def _audit(plan: Plan, setup: Setup, observer: LogObserver) -> None:
    from safer_engine import api

    folder = setup.out / plan.name
    document: dict[str, Any] = {
        "seed": 0,
        "model": {"path": str(folder / "rm"), "max_length": setup.max_length, "truncation_side": "right"},
        "dataset": {"source": {"kind": "local", "path": str(folder / "data.jsonl.gz")}},
        "evaluation": {"source": {"kind": "local", "path": str(setup.out / "evaluation.jsonl.gz")}},
        "runtime": {"threads": setup.threads},
    }
    api.audit(document, store=folder / "store", out=folder / "audit", observer=observer)


def _folder(what: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in what).split())


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of all rows.")
@click.option("--data", type=click.Path(path_type=Path, exists=True), multiple=True, help="Pairs with id, group, axis, subset.")
@click.option("--rm-bench", type=click.Path(path_type=Path, exists=True), help="RM-Bench pairs, for evaluation only.")
@click.option("--base", type=click.Path(path_type=Path, exists=True), help="Base model of the reward models.")
@click.option("--again", default=10, show_default=True, help="Trainings of the baseline's recipe with other seeds.")
@click.option("--rows", help="Only these, comma-separated.")
@click.option("--epochs", default=2, show_default=True)
@click.option("--lr", default=1e-4, show_default=True)
@click.option("--max-length", default=96, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--policy", type=click.Path(path_type=Path, exists=True), default=Path(__file__).with_name("gate_policy.yaml"))
@click.option("--table", "only_table", is_flag=True, help="Only print the table of what is there.")
def main(**flags: Any) -> None:
    """Run rows of the benchmark and print the table."""
    out: Path = flags["out"]
    if not flags["only_table"]:
        if not flags["data"] or flags["base"] is None or flags["rm_bench"] is None:
            raise click.UsageError("--data, --rm-bench and --base are needed to run rows")
        rows = [row for path in flags["data"] for row in read_rows(path)]
        split = split_pairs(rows, SUBSETS, N_TRAINING, N_EVALUATION)
        if not (out / "evaluation.jsonl.gz").is_file():
            held = with_answers(split.evaluation, EVALUATION_ANSWERS, OTHER_REFUSALS)
            write_rows(out / "evaluation.jsonl.gz", [*held, *read_rows(flags["rm_bench"])])
        setup = Setup(out, **{name: flags[name] for name in ("base", "epochs", "lr", "max_length", "threads")})
        wanted = flags["rows"].split(",") if flags["rows"] else None
        for plan in plans(flags["again"]):
            if wanted is None or plan.name in wanted:
                run_row(plan, setup, with_answers(split.training, TRAINING_ANSWERS, REFUSALS))
    click.echo(markdown_table(out, flags["policy"]))


if __name__ == "__main__":
    main()
