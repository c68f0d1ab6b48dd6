"""The tables of `docs/scale.md`, from the figures in `benchmarks/scale.json` and the formulas of `benchmarks.scale_model`.

    python -m benchmarks.scale_tables            # prints them
    python -m benchmarks.scale_tables --write    # puts them into the page, between its marks

Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.scale_model import PAIRS, SHAPES, Assumptions, Cost, Measured, Shape, acts_bytes, cost, flops, sizes_of

RESULTS = Path(__file__).with_name("scale.json")
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
CONTEXTS_PER_LATENT = 10
_PAIRS_PER_PART = 8 * 256
_DISK = "a disk for all activations, or `hook.positions: sentence_ends`"
_SERIAL = "fewer pairs (`dataset.sample`); more workers do not help"
_GPUS = "`runtime.device_map: auto` (written, never run)"
_TABLES = ("units", "events", "stages", "artifact_refs", "job_inputs", "jobs")
GIVEN = Assumptions()


@dataclass(frozen=True)
class Limit:
    """What holds an audit up.

    Attributes:
        pairs: from how many on.
    """

    what: str
    pairs: float
    remedy: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    arguments = parser.parse_args()
    made = tables(Measured(json.loads(RESULTS.read_text())))
    if arguments.write:
        PAGE.write_text(filled(PAGE.read_text(), made))
    else:
        print("\n\n".join(made.values()))


def tables(measured: Measured) -> dict[str, str]:
    """All tables by the name of their marks."""
    costs = [cost(shape, pairs, measured, GIVEN) for shape in SHAPES for pairs in PAIRS]
    service = measured.document["service"]
    return {
        "machine": f"Measured on: {service['machine']};\ndatabase: {service['database']}.",
        "stages": stages_table(measured),
        "totals": totals_table(measured),
        "memory": memory_table(measured),
        "models": models_table(costs, measured),
        "limits": limits_table(measured),
        "hours": hours_table(costs),
    }


def filled(page: str, made: dict[str, str]) -> str:
    """The page with each table between its marks. Raises KeyError for a mark without a table."""
    marks = re.compile(r"(<!-- table: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
    return marks.sub(lambda hit: f"{hit[1]}{made[hit[2]]}{hit[3]}", page)


def stages_table(measured: Measured) -> str:
    """By stage: a fixed part, and what a thousand more pairs add."""
    rows = []
    for stage in measured.runs[0]["stages"]:
        if stage == "after":
            continue
        per = 1000.0
        cpu, size, asked = (measured.line(stage, name) for name in ("cpu_seconds", "bytes", "statements"))
        requests = measured.requests(stage)
        rest = max(line.residual for line in (size, requests))
        peak = max(run["stages"][stage].get("peak_memory_bytes") or 0 for run in measured.runs)
        rows.append(
            [
                f"`{stage}`",
                f"{cpu.fixed:.1f} + {per * cpu.slope:.2f}",
                f"{size.fixed / 1e6:.2f} + {per * size.slope / 1e6:.2f}",
                f"{requests.fixed:.0f} + {requests.slope * per / 256:.1f}",
                f"{asked.fixed:.0f} + {per * asked.slope:.1f}",
                f"{peak / 1e6:,.0f}" if peak else "",
                f"{100 * rest:.0f} %",
            ]
        )
    head = ["stage", "CPU seconds", "MB of artifact", "S3 requests", "SQL statements", "peak MB", "off the line"]
    return markdown(head, rows)


def totals_table(measured: Measured) -> str:
    """What is counted for a whole job."""
    runs, idle = measured.runs, measured.document["service"]["idle"]
    kinds = sorted({kind for run in runs for stage in run["stages"].values() for kind in stage["s3"]})

    def requests(run: dict[str, object], kind: str) -> int:
        stages = run["stages"]
        assert isinstance(stages, dict)
        return sum(stage["s3"].get(kind, 0) for stage in stages.values())

    rows = [
        ["shards; units of work", *(f"{run['shards']}; {sum(s.get('units', 0) for s in run['stages'].values())}" for run in runs)]
    ]
    rows += [[f"S3 {kind}", *(str(requests(run, kind)) for run in runs)] for kind in kinds]
    rows += [["SQL rows that stay", *(", ".join(f"{n} {name}" for name, n in rows_of(run).items()) for run in runs)]]
    rows += [["Redis messages", *(str(run["redis"].get("hset", 0)) for run in runs)]]
    rows += [["all Redis commands", *(str(sum(run["redis"].values())) for run in runs)]]
    at_rest = "; ".join(f"{name} {rate:.1f}" for name, rate in sorted(idle.items()))
    table = markdown(["", *(f"{run['pairs']:,} pairs" for run in runs)], rows)
    return f"{table}\n\nAt rest, a second: {at_rest}."


def rows_of(run: dict[str, dict[str, int]]) -> dict[str, int]:
    """SQL rows of a job; those of the service itself are left out."""
    return {
        name: n for name, n in run["sql_rows"].items() if name in ("units", "events", "stages", "artifact_refs", "job_inputs")
    }


def memory_table(measured: Measured) -> str:
    """What one more unit takes in memory."""
    told = {
        "pairs": "`pairs`: names and fate of every pair",
        "residual_choice": "`activations`: the choice of pairs with whole residual streams (once a job)",
        "contexts": "`latents`: strongest contexts, ten of each latent a shard",
        "pair_scores": "`pair_scores`: everything",
        "edits": "`edits`: every line",
        "report": "`report`: every pair",
    }
    cases = measured.document["memory"]["cases"]
    rows = [[told[name], cases[name]["unit"], f"{cases[name]['bytes']:,.0f}"] for name in told]
    return markdown(["what", "unit", "bytes a unit"], rows)


def models_table(costs: Sequence[Cost], measured: Measured) -> str:
    """The table of large models; all of it estimates."""
    rows = []
    for one in costs:
        limits = limits_of(one.shape, measured)
        first = next((limit for limit in limits if limit.pairs < one.pairs), None)
        hours = one.gpu_hours
        rows.append(
            [
                one.shape.name,
                thousands(one.pairs),
                f"{hours['activations']:,.2f}" if hours["activations"] < 10 else f"{hours['activations']:,.0f}",
                f"{hours['sae'] + hours['latents']:,.1f}",
                str(one.gpus),
                amount(one.storage),
                thousands(one.requests),
                f"{one.rows:,.0f}; {one.messages:,.0f}",
                "no number" if one.workers is None else str(one.workers),
                first.what if first else f"nothing (next: {limits[0].what}, at {thousands(limits[0].pairs)})",
                first.remedy if first else "",
            ]
        )
    head = ["RM", "pairs", "GPU-hours reading", "GPU-hours SAE and latents", "GPUs a worker", "storage", "S3 requests"]
    head += ["SQL rows; messages", "workers for a day", "saturates first", "remedy"]
    return markdown(head, rows)


def limits_table(measured: Measured) -> str:
    """From how many pairs on each component holds an audit up, by model."""
    found = [limits_of(shape, measured) for shape in SHAPES]
    names = dict.fromkeys(limit.what for each in reversed(found) for limit in each)
    at = [{limit.what: thousands(limit.pairs) if limit.pairs else "always" for limit in each} for each in found]
    rows = [[name, *(each.get(name, "never") for each in at)] for name in names]
    return markdown(["component", *(shape.name for shape in SHAPES)], rows)


def hours_table(costs: Sequence[Cost]) -> str:
    """Hours of the stages that one worker computes alone."""
    names = list(costs[0].serial_hours)
    rows = [[one.shape.name, thousands(one.pairs), *(f"{one.serial_hours[name]:,.2f}" for name in names)] for one in costs]
    return markdown(["RM", "pairs", *(f"`{name}`" for name in names)], rows)


def limits_of(shape: Shape, measured: Measured) -> list[Limit]:
    """What holds an audit up, the first first. A straight line from a million pairs."""
    many = 1_000_000
    one = cost(shape, many, measured, GIVEN)
    d_sae = 8 * shape.d_in
    entries_a_shard = min(CONTEXTS_PER_LATENT * d_sae, 256 * one.entries / many)
    fragment = acts_bytes(256, 256 * one.entries / many) + 20 * entries_a_shard
    on_disk = one.bytes["activations"] + 2 * 4 * shape.d_in * many + fragment * many / 256
    hashed = one.bytes["pairs"] / measured.sha256 / many
    work = flops(shape, sizes_of(shape, _PAIRS_PER_PART, GIVEN), replace(GIVEN, evaluation_pairs=0))["activations"]
    reading = work / (GIVEN.flops * GIVEN.utilisation)
    contexts = 256 * GIVEN.gpu_host_bytes / (measured.memory("contexts") * entries_a_shard)
    held = {stage: GIVEN.cpu_bytes / measured.memory(stage) for stage in ("pairs", "pair_scores", "edits", "report")}
    found = [
        *([Limit(f"one GPU: the model needs {one.gpus}", 0, _GPUS)] if one.gpus > 1 else []),
        Limit("disk of the worker of `sae` and `latents`", many * GIVEN.home_bytes / on_disk, _DISK),
        Limit("memory of `latents` (contexts)", contexts, "more memory, or a larger `runtime.shard_pairs`"),
        *(Limit(f"memory of `{stage}`", pairs, "more memory for CPU workers") for stage, pairs in held.items()),
        Limit("a day: stages of one worker", many * 24 / sum(one.serial_hours.values()), _SERIAL),
        Limit("start of a part longer than its reading (hashing the pairs)", reading / hashed, "a larger `runtime.shard_pairs`"),
    ]
    return sorted(found, key=lambda limit: limit.pairs)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def thousands(number: float) -> str:
    """A count in two digits: 10 k, 1.2 M."""
    for size, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            shown = number / size
            return f"{shown:.1f}{name}".replace(".0 ", " ") if shown < 10 else f"{shown:,.0f}{name}"
    return f"{number:.0f}"


def amount(size: float) -> str:
    """Bytes in two digits."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}" if size < 10 * unit else f"{size / unit:,.0f} {name}"
    return f"{size / 1e3:.0f} kB"


if __name__ == "__main__":
    main()
