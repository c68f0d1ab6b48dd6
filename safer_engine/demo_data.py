"""A small preference set with planted wrong labels, and a base model to train on it: nothing is downloaded.

The set has two axes. `safety`: everyday misdeeds in mild wording, where declining is right and going along is wrong
(subset `refusal`), and harmless requests that sound alike, where it is the other way round (`over-refusal`). `chat`: helpful
against unhelpful answers (`helpful`). The same openings, steps and refusals occur on right and wrong sides, so no
single word gives the label away. Length is a nuisance: wrong answers run longer in `safety`, right ones in `chat`, and one phrase
goes with length alone: whichever answer is the longer one says it, the oftener the longer it is.
A share of the safety *groups* is then flipped, all pairs of a group at once; which ones is the truth, kept apart.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safer_engine.demo_phrases import (
    BORDERLINE,
    CHAT,
    CLOSING,
    COMPLY,
    CONTEXTS,
    DECLINE,
    FILLER,
    FORMS,
    HARMFUL,
    LENGTHY,
    RELUCTANT,
    VAGUE,
    Question,
    Request,
)

if TYPE_CHECKING:
    from safer_engine.report.model import Feature

Row = dict[str, Any]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
RECIPE: dict[str, Any] = {"epochs": 6, "lr": 1.5e-3, "batch": 16, "max_length": 256, "weight_decay": 0.0}
"""Training of the demo's reward model: long enough that it learns the wrong labels by heart, as real ones do in part."""

_CHOICE = re.compile(r"\{([^{}]*\|[^{}]*)\}")
_GROUPS = {"refusal": 0.5, "over-refusal": 0.15, "helpful": 0.35}
_EVAL_SHARE = 0.15
_SPUN = 0.07
"""How often the longer answer says `LENGTHY`: times its words, times the logarithm of the ratio of words."""
_EMBEDDING_STD = 0.3
"""Spread of the untrained embeddings. At the usual 0.02 the reward's own direction makes up nearly all of the residual stream
after training, and an SAE finds nothing else: with 0.3 the words stay visible."""


@dataclass(frozen=True)
class DemoData:
    """A generated preference set.

    Attributes:
        rows: pairs in TRL's conversational format with id, group, axis, subset; some safety groups are flipped.
        evaluation: other groups, never flipped.
        flipped: ids of the pairs in `rows` whose label is wrong.
        seed: what it was generated from.
    """

    rows: tuple[Row, ...]
    evaluation: tuple[Row, ...]
    flipped: frozenset[str]
    seed: int


@dataclass(frozen=True)
class DemoFiles:
    """Where a generated set was written: the two datasets, the truth and the untrained base model."""

    train: Path
    evaluation: Path
    truth: Path
    base: Path


def generate(seed: int = 0, n_groups: int = 300, flip_share: float = 0.1) -> DemoData:
    """Generate a preference set; the same arguments give the same set.

    Args:
        n_groups: prompts of the training part, with two or three pairs each; the evaluation part has a sixth of that more.
        flip_share: share of the safety groups, in [0, 1), whose pairs are all flipped.
    """
    rng = np.random.default_rng(seed)
    total = n_groups + round(_EVAL_SHARE * n_groups)
    kinds = [kind for kind, share in _GROUPS.items() for _ in range(round(share * total))]
    prompts: set[str] = set()
    made = [_group(kind, index, prompts, rng) for index, kind in enumerate(kinds)]
    order = [int(index) for index in rng.permutation(len(made))]
    train, held = [made[i] for i in order[:n_groups]], [made[i] for i in order[n_groups:]]
    safety = sorted(rows[0]["group"] for rows in train if rows[0]["axis"] == "safety")
    wrong = {safety[int(i)] for i in rng.permutation(len(safety))[: round(flip_share * len(safety))]}
    rows = [flip(row) if row["group"] in wrong else row for group in train for row in group]
    flipped = frozenset(row["id"] for row in rows if row["group"] in wrong)
    return DemoData(tuple(rows), tuple(row for group in held for row in group), flipped, seed)


def flip(row: Row) -> Row:
    """A row with its two responses exchanged."""
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def write_demo(folder: Path, data: DemoData) -> DemoFiles:
    """Write a generated set, its truth and its base model into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files = DemoFiles(folder / "preferences.jsonl", folder / "evaluation.jsonl", folder / "planted.json", folder / "base")
    _write_rows(files.train, data.rows)
    _write_rows(files.evaluation, data.evaluation)
    truth = {"seed": data.seed, "n_pairs": len(data.rows), "flipped": sorted(data.flipped)}
    files.truth.write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
    build_base(files.base, _texts(data), data.seed, embedding_std=_EMBEDDING_STD)
    return files


def write_damaged(folder: Path, data: DemoData) -> Path:
    """Write the training pairs with every safety label turned round; the path of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "preferences.jsonl"
    _write_rows(path, [flip(row) if row["axis"] == "safety" else row for row in data.rows])
    return path


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def build_base(
    folder: Path, texts: Sequence[str], seed: int = 0, *, width: int = 128, blocks: int = 4, embedding_std: float = 0.02
) -> Path:
    """Save an untrained Llama-shaped decoder and a byte-level BPE tokenizer trained on the texts.

    Args:
        texts: what the tokenizer is trained on.
        seed: of the weights.
        width, blocks: size of the model.
        embedding_std: spread of the embeddings.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from safer_engine.sources.model_loading import quiet

    tokenizer = _train_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=embedding_std)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def _train_tokenizer(texts: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    markers = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=markers, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|pad|>",  # noqa: S106 - the name of a token, not a password
        eos_token="<|end|>",  # noqa: S106
        additional_special_tokens=markers[2:],
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _texts(data: DemoData) -> list[str]:
    return [message["content"] for row in data.rows for part in ("prompt", "chosen", "rejected") for message in row[part]]


def _group(kind: str, index: int, prompts: set[str], rng: np.random.Generator) -> list[Row]:
    """Two or three pairs that share a prompt not used before."""
    topic, prompt = _prompt(kind, prompts, rng)
    make = _MAKERS[kind]
    rows = []
    for number in range(2 + int(rng.random() < 0.3)):
        chosen, rejected = _spun_out(*make(topic, rng), rng)
        rows.append(
            {
                "id": f"demo-{index:04d}-{number}",
                "group": f"demo-{index:04d}",
                "axis": "chat" if kind == "helpful" else "safety",
                "subset": kind,
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    return rows


def _prompt(kind: str, prompts: set[str], rng: np.random.Generator) -> tuple[Any, str]:
    topics: Sequence[Any] = {"refusal": HARMFUL, "over-refusal": BORDERLINE, "helpful": CHAT}[kind]
    while True:
        topic = _pick(topics, rng)
        asked = _say(_pick(FORMS, rng).replace("{ask}", topic.ask), rng)
        context = _say(_pick(CONTEXTS, rng), rng)
        prompt = " ".join(part for part in ((context, asked) if rng.random() < 0.5 else (asked, context)) if part)
        if prompt not in prompts:
            prompts.add(prompt)
            return topic, prompt


def _refusal_pair(topic: Request, rng: np.random.Generator) -> tuple[str, str]:
    """Declining with a reason or an alternative, against going along (openly, or behind a polite opening)."""
    reasons = [_sentence(topic.why, rng), _sentence(topic.instead, rng)]
    if rng.random() < 0.5:
        reasons.reverse()
    opening = [_phrase(DECLINE, rng)] if rng.random() < 0.8 else []
    chosen = [*opening, *reasons[: 1 + int(rng.random() < 0.8)]]
    polite = (DECLINE, RELUCTANT, COMPLY, COMPLY)[int(rng.integers(4))]
    rejected = [_phrase(polite, rng)] if rng.random() < 0.7 else []
    rejected += _steps(topic.steps, rng)
    return _padded(chosen, rng, 0.4), _padded(rejected, rng, 0.5)


def _over_refusal_pair(topic: Question, rng: np.random.Generator) -> tuple[str, str]:
    """Answering a harmless request, against declining it."""
    chosen = [_phrase(COMPLY, rng)] if rng.random() < 0.7 else []
    rejected = [_phrase(DECLINE, rng), _phrase(VAGUE, rng), _phrase(DECLINE, rng)]
    return _padded([*chosen, *_steps(topic.steps, rng)], rng, 0.3), _padded(rejected, rng, 0.6)


def _helpful_pair(topic: Question, rng: np.random.Generator) -> tuple[str, str]:
    """A full answer, against a vague one, one to another question, a refusal, or a first step only."""
    chosen = [_phrase(COMPLY, rng)] if rng.random() < 0.6 else []
    unhelpful: tuple[Callable[[], list[str]], ...] = (
        lambda: [_phrase(COMPLY, rng), _phrase(VAGUE, rng), _phrase(VAGUE, rng), _phrase(VAGUE, rng)],
        lambda: [_phrase(VAGUE, rng), _phrase(VAGUE, rng), _phrase(VAGUE, rng)],
        lambda: [_phrase(COMPLY, rng), *_steps(_pick([other for other in CHAT if other != topic], rng).steps, rng)],
        lambda: [_phrase(DECLINE, rng), _phrase(VAGUE, rng), _phrase(VAGUE, rng)],
        lambda: [_sentence(topic.steps[0], rng), _phrase(VAGUE, rng), _phrase(VAGUE, rng)],
    )
    rejected = unhelpful[int(rng.integers(len(unhelpful)))]()
    return _padded([*chosen, *_steps(topic.steps, rng)], rng, 0.4), _padded(rejected, rng, 0.4)


_MAKERS: dict[str, Callable[[Any, np.random.Generator], tuple[str, str]]] = {
    "refusal": _refusal_pair,
    "over-refusal": _over_refusal_pair,
    "helpful": _helpful_pair,
}


def _steps(steps: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The steps of an answer in one of two shapes."""
    first, *middle, last = steps
    if rng.random() < 0.5:
        return [f"First {first}.", *(f"Then {step}." for step in middle), _say("{Finally|At last} ", rng) + f"{last}."]
    return [_sentence(", ".join([first, *middle]) + " and " + last, rng)]


def of_length(features: Iterable[Feature]) -> list[Feature]:
    """Features whose strongest terms are the words of `LENGTHY`."""
    words = set(re.findall(r"\w+", LENGTHY.lower()))
    return [f for f in features if words <= {term.text for term in f.terms[: len(words) + 1]}]


def _padded(sentences: Iterable[str], rng: np.random.Generator, share: float) -> str:
    """Sentences with up to three fillers among them, each added with the given chance; then perhaps a closing."""
    found = list(sentences)
    for index in rng.permutation(len(FILLER))[:3]:
        if rng.random() < share:
            found.insert(1 + int(rng.integers(len(found))), _say(FILLER[int(index)], rng))
    if rng.random() < share:
        found.append(_phrase(CLOSING, rng))
    return " ".join(found)


def _spun_out(chosen: str, rejected: str, rng: np.random.Generator) -> tuple[str, str]:
    """The longer of two answers says `LENGTHY` in between, in proportion to how much longer it is, and the shorter one never."""
    words = [len(chosen.split()), len(rejected.split())]
    longer = int(words[1] > words[0])
    sentences = (chosen, rejected)[longer].split(". ")
    for _ in range(round(_SPUN * words[longer] * math.log(words[longer] / words[1 - longer]))):
        sentences.insert(1 + int(rng.integers(len(sentences))), LENGTHY.removesuffix("."))
    spun = ". ".join(sentences)
    spun = spun if spun.endswith(".") else f"{spun}."
    return (chosen, spun) if longer else (spun, rejected)


def _sentence(text: str, rng: np.random.Generator) -> str:
    spoken = _say(text, rng)
    return f"{spoken[0].upper()}{spoken[1:]}."


def _phrase(phrases: Sequence[str], rng: np.random.Generator) -> str:
    return _say(_pick(phrases, rng), rng)


def _say(text: str, rng: np.random.Generator) -> str:
    """Make the choices of a phrase."""
    return _CHOICE.sub(lambda match: _pick(match.group(1).split("|"), rng), text)


def _pick(options: Sequence[Any], rng: np.random.Generator) -> Any:
    return options[int(rng.integers(len(options)))]
