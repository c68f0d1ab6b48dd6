"""Loading a base model to train a reward head on: the body as saved, the head fresh and seeded."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_engine.errors import ModelRefused, SpecError
from safer_engine.sources.model_loading import HARMLESS, first_lines, head_roots, quiet, some
from safer_engine.sources.resolved import ResolvedModel
from safer_engine.spec import RuntimeSpec
from safer_engine.spec_recipe import LoraSpec

if TYPE_CHECKING:
    import torch

_HEAD_STD = 0.02


@dataclass(frozen=True)
class BaseTokenizer:
    """A tokenizer ready for training.

    Attributes:
        tokenizer: fast, with a padding token.
        config: the base's.
        pad_origin: where the padding token comes from: tokenizer, named (a token called so), unk or eos.
    """

    tokenizer: Any
    config: Any
    pad_origin: str


@dataclass(frozen=True)
class BaseModel:
    """A model with a reward head, float32, on the CPU.

    Attributes:
        model: maps input_ids, attention_mask to `.logits` [N, 1].
        fresh: parameters drawn from the seed; empty where the base already had a head with one output.
        stored_dtype: precision in which the base's weights were saved.
        n_parameters: of the whole model, adapters not counted.
    """

    model: Any
    fresh: tuple[str, ...]
    stored_dtype: torch.dtype
    n_parameters: int


def load_base_tokenizer(base: ResolvedModel, runtime: RuntimeSpec) -> BaseTokenizer:
    """Load a base's tokenizer and settle its padding token.

    Raises:
        ModelRefused: it cannot be loaded, is a slow one, or has no token that can pad.
    """
    from transformers import AutoConfig, AutoTokenizer

    options = {"local_files_only": True, "trust_remote_code": runtime.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(base.path, **options)
        tokenizer = AutoTokenizer.from_pretrained(base.path, **options)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ModelRefused(f"config or tokenizer of {base.origin} cannot be loaded: {first_lines(error)}") from error
    if not tokenizer.is_fast:
        raise ModelRefused(f"{base.origin} has a slow tokenizer, without character offsets", "save its fast version first")
    return BaseTokenizer(tokenizer, config, _settle_padding(tokenizer, base.origin))


def load_base(base: ResolvedModel, ready: BaseTokenizer, runtime: RuntimeSpec, seed: int) -> BaseModel:
    """Load a base with a head of one output, drawn from the seed unless the base has one.

    Raises:
        ModelRefused: Transformers cannot load it, or body weights are missing.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from safer_engine.science.rm_training import init_head

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": runtime.trust_remote_code}
    config = AutoConfig.from_pretrained(base.path, **options)
    stored = getattr(config, "dtype", None)
    config.num_labels = 1
    config.get_text_config().pad_token_id = ready.tokenizer.pad_token_id
    config.use_cache = False
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                base.path,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise ModelRefused(f"Transformers cannot load {base.origin}: {first_lines(error)}", "see the reason given") from error
    fresh = _fresh_weights(model, report, base.origin)
    init_head(model, fresh, _HEAD_STD, torch.Generator().manual_seed(seed))
    rows, largest = model.get_input_embeddings().weight.shape[0], max(ready.tokenizer.get_vocab().values())
    if largest >= rows:
        raise ModelRefused(f"the tokenizer knows token id {largest}, but the embeddings have {rows} rows", "resize them first")
    half = stored if stored in (torch.bfloat16, torch.float16) else torch.float32
    return BaseModel(model, fresh, half, sum(weight.numel() for weight in model.parameters()))


def add_lora(base: BaseModel, lora: LoraSpec, seed: int) -> Any:
    """The base with low-rank adapters on all its linear layers, and the whole head trained. Raises SpecError."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    settings = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules="all-linear"
    )
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks for it
            torch.manual_seed(seed)
            return get_peft_model(base.model, settings)
    except ValueError as error:
        raise SpecError(f"no low-rank adapters fit this base: {first_lines(error)}", "train without --lora") from error


def save_model(model: Any, base: BaseModel, ready: BaseTokenizer, folder: Path) -> None:
    """Save a trained model with its tokenizer, in the precision its base was stored in.

    The model itself is brought to that precision too, so that what is measured afterwards are the saved weights.
    """
    shutil.rmtree(folder, ignore_errors=True)
    model.to(base.stored_dtype)
    with quiet():
        model.save_pretrained(folder)
        ready.tokenizer.save_pretrained(folder)


def _settle_padding(tokenizer: Any, origin: str) -> str:
    """Give the tokenizer a padding token that it already knows: a new one would have no trained embedding."""
    if tokenizer.pad_token_id is not None:
        return "tokenizer"
    named = sorted(token.content for token in tokenizer.added_tokens_decoder.values() if "pad" in token.content.lower())
    candidates = {"named": named[0] if named else None, "unk": tokenizer.unk_token, "eos": tokenizer.eos_token}
    for where, token in candidates.items():
        if token is not None:
            tokenizer.pad_token = token
            return where
    raise ModelRefused(f"{origin} has no token that can pad sequences", "set pad_token in its tokenizer")


def _fresh_weights(model: Any, report: dict[str, Any], origin: str) -> tuple[str, ...]:
    """Weights of the head that were not loaded. Raises ModelRefused when weights of the body are missing."""
    mismatched = {name[0] if isinstance(name, tuple) else name for name in report["mismatched_keys"]}
    absent = set(report["missing_keys"]) | mismatched
    body = {name for name in absent if name.split(".")[0] not in head_roots(model) and not HARMLESS.search(name)}
    if body:
        raise ModelRefused(
            f"weights of {origin} are missing, which would be drawn at random: {some(body)}", "save the whole model again"
        )
    return tuple(sorted(absent))
