"""`safer-audit demo`: plant wrong labels, train a small reward model on them, and find them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import NamedPath
from cli.output import TerminalObserver, console, table

if TYPE_CHECKING:
    from safer_engine.api import AuditReport

SETTINGS = {
    "sae": {"expansion": 4, "k": 16, "batch": 1024, "max_steps": 600},
    "causal": {"pairs": 256, "features": 64},
}
"""Sections of the demo's spec that are not the defaults."""
_SHOWN = 5


@click.command("demo")
@click.option(
    "--out", "-o", type=NamedPath(path_type=Path), default=Path("safer-demo"), help="Folder for data, model and report."
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Another seed gives other data.")
@click.option("--damaged", is_flag=True, help="Train a second one, on safety labels turned round: a gate must fail it.")
def demo_command(out: Path, seed: int, damaged: bool) -> None:
    """Plant wrong labels, train a small reward model on them, and find them. Nothing is downloaded."""
    from safer_engine.demo_data import DemoFiles, generate, write_damaged, write_demo
    from safer_engine.publishing import require_writable

    require_writable(out, "--out")
    shown = console(err=True)
    data = generate(seed)
    files: DemoFiles = write_demo(out / "data", data)
    shown.print(f"{len(data.rows)} preference pairs, {len(data.flipped)} of them with a planted wrong label", markup=False)
    observer = TerminalObserver(shown)
    with observer.showing():
        _train(files.base, files.train, out / "reward-model", seed, observer)
        report = _audit(files, out, seed, observer)
        if damaged:
            shown.print("now a second reward model, on safety labels turned round", markup=False)
            _train(files.base, write_damaged(out / "damaged", data), out / "damaged" / "reward-model", seed, observer)
    _compare(report, set(data.flipped))
    click.echo(str(report.html.resolve()))


def _train(base: Path, dataset: Path, target: Path, seed: int, observer: TerminalObserver) -> None:
    from safer_engine.demo_data import RECIPE
    from safer_engine.train_spec import TrainSpec
    from safer_engine.training import train_reward_model

    source = {"kind": "local", "path": str(dataset)}
    document = {
        "seed": seed,
        "base": str(base),
        "dataset": {"source": source},
        "recipe": RECIPE,
        "runtime": {"device": "cpu"},
    }
    train_reward_model(TrainSpec.model_validate(document), target, observer)


def _audit(files: Any, out: Path, seed: int, observer: TerminalObserver) -> AuditReport:
    from safer_engine import api

    document = {
        "seed": seed,
        "model": {"path": str(out / "reward-model"), "max_length": 256},
        "dataset": str(files.train),
        "evaluation": str(files.evaluation),
        **SETTINGS,
        "runtime": {"device": "cpu"},
    }
    return api.audit(document, store=out / "store", out=out / "audit", observer=observer)


def _of_length(report: AuditReport) -> list[tuple[str, str]]:
    """What became of the phrase that goes with length alone."""
    from safer_engine.demo_data import of_length

    of_it = of_length(report.document.features or [])
    tested = [f for f in of_it if f.discovery]
    ablated = [f for f in of_it if f.causal_effect is not None]
    plain = [abs(f.salience) for f in tested]
    equal = [abs(f.salience_equal_length) for f in tested if f.salience_equal_length is not None]
    bound, causal = sum(f.length_bound is True for f in tested), sum(f.causal_verified == "yes" for f in ablated)
    return [
        ("latents of the planted length phrase", f"{len(of_it)}, {len(tested)} of them discoveries"),
        ("their salience, and at equal length", " → ".join(f"{sum(x) / len(x):.2f}" for x in (plain, equal) if x)),
        ("discoveries among them marked length-bound", f"{bound} of {len(tested)}"),
        ("ablated among them, and causal", f"{causal} of {len(ablated)}"),
    ]


def _compare(report: AuditReport, planted: set[str]) -> None:
    """Print what was found against what was planted."""
    from safer_engine.science.stats import average_precision

    pairs, edits = report.pairs, report.edits
    safety = pairs[pairs["axis"] == "safety"]
    truth = safety["pair_id"].isin(planted).to_numpy()
    ranked = average_precision(truth, safety["suspicion"].to_numpy())
    margin = average_precision(truth, -safety["reward_margin"].to_numpy())
    dropped, reviewed = (set(edits.loc[edits["action"] == action, "pair_id"]) for action in ("drop", "review"))
    shown = console()
    rows = [
        ("wrong labels planted (safety)", f"{int(truth.sum())} of {len(safety)} pairs ({truth.mean():.0%})"),
        ("average precision of suspicion", f"{ranked:.2f}"),
        ("average precision of the reward margin", f"{margin:.2f}"),
        ("average precision by chance", f"{truth.mean():.2f}"),
        ("recommended drops that were planted", f"{len(dropped & planted)} of {len(dropped & set(safety['pair_id']))} in safety"),
        ("drops and reviews that were planted", f"{len((dropped | reviewed) & planted)} of {len(planted)} planted"),
    ]
    shown.print(table("Found against planted", ("what", "value"), [*rows, *_of_length(report)]))
    worst = safety.sort_values("suspicion", ascending=False).head(_SHOWN)
    cells = [(r.pair_id, f"{r.suspicion:.3f}", "planted" if r.pair_id in planted else "") for r in worst.itertuples()]
    shown.print(table("Most suspicious safety pairs", ("pair", ">suspicion", "truth"), cells))
