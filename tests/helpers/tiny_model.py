"""Tiny tokenizers and random-weight reward models, made on the spot: nothing is downloaded.

`build_tokenizer` and `build_reward_model` write a folder that Transformers loads like any other model. Both are
deterministic: the same arguments give the same files.
"""

from __future__ import annotations

import re
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from safer_engine.science.reward_model import RewardModel

TokenizerKind = Literal["llama", "bert"]

CORPUS = (
    "How do I reset the password of my account? Open the settings, choose security, and follow the link.",
    "I can't help with that. Making a weapon at home is dangerous and illegal; please talk to someone you trust.",
    "The capital of France is Paris. It lies on the Seine, and about two million people live there.",
    "Write a short poem about the sea: the waves come in, the waves go out, the gulls cry over the harbour.",
    "Sure! Here is a list of three fruits: apples, pears and plums. Would you like to know how to store them?",
    "First, mix the flour with water. Then let the dough rest for an hour; finally bake it until it is golden.",
    "I am sorry to hear that you feel this way. You are not alone, and a doctor or a friend may be able to help.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # 5",
    "Human: What should I say to my neighbour? Assistant: Tell them kindly, without anger, what troubles you.",
    "Whether the answer is right or wrong depends on the question, the context and what the reader needs.",
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A plain chat template for tests that need one."""

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_neox", "gpt2", "opt")
ENCODERS = ("bert", "roberta", "deberta", "modernbert", "distilbert", "electra")

_SPECIAL_IN_TEMPLATE = re.compile(r"<\|\w+\|>|<\w+_of_turn>|\[/?INST\]")


def build_tokenizer(folder: Path | str, kind: TokenizerKind, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Train a small fast tokenizer on a few sentences and save it.

    `llama`: byte-level BPE, `<s>` before the text, `</s>` and `<pad>` known. `bert`: WordPiece, `[CLS]` text `[SEP]`.
    Turn markers found in `chat_template` become special tokens.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    inner, names = _train_bpe() if kind == "llama" else _wordpiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    if chat_template is not None:
        markers = sorted(set(_SPECIAL_IN_TEMPLATE.findall(chat_template)))
        tokenizer.add_special_tokens({"additional_special_tokens": markers})
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def build_reward_model(
    folder: Path | str,
    arch: str = "llama",
    num_labels: int = 1,
    width: int = 32,
    blocks: int = 3,
    seed: int = 0,
    *,
    chat_template: str | None = None,
    **overrides: Any,
) -> Path:
    """Save a random-weight reward model of an architecture, with its tokenizer, as safetensors.

    `arch` is one of `DECODERS` or `ENCODERS`; `overrides` are fields of the Transformers config.
    Weights are drawn wide enough that rewards differ clearly between texts.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = Path(folder)
    tokenizer = build_tokenizer(folder, "llama" if arch in DECODERS else "bert", chat_template)
    config = _config(arch, len(tokenizer) + 8, width, blocks)
    settings = {"num_labels": num_labels, **_token_ids(tokenizer), **_dropout_free(config), **overrides}
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        _widen(model)
    model.save_pretrained(folder)
    return folder


@cache
def load_tiny(arch: str = "llama", num_labels: int = 1) -> RewardModel:
    """A loaded tiny reward model, made once per process. Tests must leave it as they found it."""
    from safer_engine.sources.model_loading import load_reward_model
    from safer_engine.sources.models import resolve_model
    from safer_engine.spec import ModelSpec, RuntimeSpec

    with tempfile.TemporaryDirectory() as folder:
        build_reward_model(folder, arch, num_labels)
        spec = ModelSpec(path=folder, dtype="float32", reward_index=0 if num_labels > 1 else None)
        runtime = RuntimeSpec(device="cpu")
        return load_reward_model(resolve_model(spec, runtime, None), spec, runtime)


def token_sequences(arch: str = "llama") -> list[NDArray[np.int32]]:
    """The corpus, beginnings of it and some joins as token ids of the tiny model: 20 sequences of very different lengths."""
    tokenizer = load_tiny(arch).tokenizer
    beginnings = [CORPUS[index][: 1 + 8 * index] for index in range(7)]
    texts = [*CORPUS, *(" ".join(CORPUS[: count + 1]) for count in range(1, 4)), *beginnings]
    return [np.asarray(ids, dtype=np.int32) for ids in tokenizer(texts).input_ids]


def _train_bpe() -> tuple[Any, dict[str, Any]]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    return inner, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def _wordpiece() -> tuple[Any, dict[str, Any]]:
    """A WordPiece tokenizer over the corpus's own words (the library's trainer breaks ties at random, so it is not used)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = sorted({word for text in CORPUS for word in re.findall(r"[a-z]{2,}", text.lower())})
    entries = [*special, *characters, *(f"##{character}" for character in characters), *words]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    cls, sep = vocabulary["[CLS]"], vocabulary["[SEP]"]
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return inner, names


def _config(arch: str, vocab: int, width: int, blocks: int) -> Any:
    from transformers import AutoConfig

    common = {"vocab_size": vocab, "hidden_size": width, "num_hidden_layers": blocks}
    sizes = {
        **common,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 1024,
    }
    grouped = {**sizes, "num_key_value_heads": 2, "head_dim": width // 4}
    table: dict[str, dict[str, Any]] = {
        "llama": grouped,
        "mistral": grouped,
        "qwen2": {**sizes, "num_key_value_heads": 2},
        "qwen3": grouped,
        "gemma2": {**grouped, "sliding_window": 16, "query_pre_attn_scalar": width // 4},
        "gpt_neox": sizes,
        "gpt2": {"vocab_size": vocab, "n_embd": width, "n_layer": blocks, "n_head": 4, "n_positions": 1024},
        "opt": {**common, "num_attention_heads": 4, "ffn_dim": 2 * width, "word_embed_proj_dim": width},
        "bert": sizes,
        "roberta": {**sizes, "max_position_embeddings": 1026},
        "deberta": {**sizes, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
        "modernbert": {**sizes, "local_attention": 16, "global_attn_every_n_layers": 2},
        "distilbert": {"vocab_size": vocab, "dim": width, "n_layers": blocks, "n_heads": 4, "hidden_dim": 2 * width},
        "electra": {**sizes, "embedding_size": width},
    }
    return AutoConfig.for_model({"deberta": "deberta-v2"}.get(arch, arch), **table[arch])


def _token_ids(tokenizer: Any) -> dict[str, int | None]:
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    return {name: getattr(tokenizer, name, None) for name in names}


def _dropout_free(config: Any) -> dict[str, float]:
    names = (
        "attention_dropout",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "attn_pdrop",
        "dropout",
        "resid_pdrop",
        "embd_pdrop",
    )
    return {name: 0.0 for name in names if hasattr(config, name)}


def _widen(model: Any) -> None:
    """Redraw every matrix wide (embeddings 0.5, head 3/√fan-in, others 1/√fan-in): attention and rewards far from constant."""
    import torch

    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            scale = 3.0 if name.endswith(("score.weight", "classifier.weight", "out_proj.weight")) else 1.0
            std = 0.5 if "embed" in name or "wte" in name or "wpe" in name else scale / weight.shape[-1] ** 0.5
            with torch.no_grad():
                weight.normal_(0.0, std)
