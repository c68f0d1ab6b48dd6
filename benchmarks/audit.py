"""How long a whole audit takes and how much memory: seconds and peak memory by stage at growing sizes.

    python -m benchmarks.audit --model RM --data preferences.jsonl.gz [--sizes 1000,3000,5000]
    python -m benchmarks.audit --paper-work --data preferences.jsonl.gz

Each size runs in a process and a store of its own, so a peak is that of the size. `--paper-work` repeats the work of the
paper's own scripts (fine-tune the SAE, activations of both sides, contexts, scores) in their setting: a random-weight Llama
of width 256 with 8 blocks, hook 6, d_sae 2 048, k 32, at most 1 024 tokens, batch 8, fp32, 100 pairs of about 367 tokens a text.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine_line import machine_line

PAPER_TOKENS = 367
PAPER_PAIRS = 100
STAGES = ("pairs", "activations", "sae", "latents", "labels", "pair_scores", "edits", "report")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="preference rows, JSONL (may be .gz)")
    parser.add_argument("--model", type=Path, help="reward model; not needed with --paper-work")
    parser.add_argument("--sizes", default="1000,3000,5000")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--paper-work", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = paper_work(arguments, Path(folder)) if arguments.paper_work else sizes(arguments, Path(folder))
    show(runs)
    print(json.dumps({"machine": machine_line(), "runs": runs}))


def sizes(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    if arguments.model is None:
        sys.exit("--model is needed")
    spec = {"model": {"max_length": arguments.max_length, "dtype": arguments.dtype}, "runtime": {"device": "cpu"}}
    return [
        one_run(
            arguments.model,
            take(arguments.data, int(size), folder / f"{size}.jsonl"),
            spec,
            folder / size,
            f"{int(size):,} pairs",
        )
        for size in arguments.sizes.split(",")
    ]


def paper_work(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    rows = read_rows(arguments.data)
    model = build_llama(folder / "llama", arguments.data)
    data = folder / "paper.jsonl"
    write_rows(data, window_of_mean_length(model, rows))
    spec = {
        "preset": "paper",
        "model": {"max_length": 1024, "dtype": "float32"},
        "hook": {"layer": 6},
        "sae": {"d_sae": 2048, "k": 32, "dtype": "float32"},
        "runtime": {"device": "cpu"},
    }
    return [one_run(model, data, spec, folder / "run", f"paper's work, {PAPER_PAIRS} pairs")]


def build_llama(folder: Path, data: Path) -> Path:
    """A random-weight Llama reward model of the paper scripts' measured shape, with a BPE trained on the data."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from benchmarks.extraction import read, trained_bpe

    tokenizer = trained_bpe(list(read(data, 10_000)))
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = LlamaConfig(
        **shape, vocab_size=8192, max_position_embeddings=1024, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def one_run(model: Path, data: Path, spec: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """One audit in a process of its own; seconds and peak memory of each stage come from its manifests."""
    folder.mkdir(parents=True)
    (folder / "audit.yaml").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "cli.main", "run", "--model", str(model), "--dataset", str(data), "--quiet"]
    command += ["--spec", str(folder / "audit.yaml"), "--store", str(folder / "store"), "--out", str(folder / "out")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report = json.loads((folder / "out" / "report.json").read_text())
    costs = {}
    for stage in STAGES:
        manifest = json.loads(next((folder / "store" / "manifests" / "default" / stage).glob("*.json")).read_text())
        costs[stage] = {"seconds": manifest["cost"]["seconds"], "peak_memory_bytes": manifest["cost"]["peak_memory_bytes"]}
    return {"name": name, "stages": costs, "n_pairs": report["dataset"].get("n_pairs")}


def show(runs: list[dict[str, Any]]) -> None:
    table = Table(title="audit: seconds (peak memory) by stage")
    table.add_column("stage")
    for run in runs:
        table.add_column(run["name"], justify="right")
    for stage in STAGES:
        table.add_row(stage, *(cell(run["stages"][stage]) for run in runs))
    table.add_row(
        "total", *(f"{sum(c['seconds'] for c in run['stages'].values()):.1f} s, {peak(run) / 1e6:,.0f} MB" for run in runs)
    )
    Console(width=140).print(table)
    if len(runs) > 1:
        print(f"peak memory, largest over smallest size: {peak(runs[-1]) / peak(runs[0]):.3f}")


def cell(cost: dict[str, float]) -> str:
    return f"{cost['seconds']:.1f} s, {cost['peak_memory_bytes'] / 1e6:,.0f} MB"


def peak(run: dict[str, Any]) -> float:
    return float(max(cost["peak_memory_bytes"] for cost in run["stages"].values()))


def window_of_mean_length(model: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The run of PAPER_PAIRS rows, ordered by length, whose mean length in tokens is nearest to the paper's."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    lengths = [text_tokens(tokenizer, row) for row in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    means = [sum(lengths[i] for i in order[s : s + PAPER_PAIRS]) / PAPER_PAIRS for s in range(len(order) - PAPER_PAIRS)]
    start = min(range(len(means)), key=lambda s: abs(means[s] - PAPER_TOKENS))
    return [rows[i] for i in sorted(order[start : start + PAPER_PAIRS])]


def text_tokens(tokenizer: Any, row: dict[str, Any]) -> float:
    prompt = "\n\n".join(turn["content"] for turn in row["prompt"])
    sides = [prompt + "\n\n" + row[side][-1]["content"] for side in ("chosen", "rejected")]
    return float(sum(len(tokenizer.encode(text).ids) for text in sides) / 2)


def take(data: Path, count: int, target: Path) -> Path:
    write_rows(target, read_rows(data)[:count])
    return target


def read_rows(path: Path) -> list[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
