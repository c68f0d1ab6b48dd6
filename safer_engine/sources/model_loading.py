"""Loading a reward model from a checked folder, failing closed: no weight is left to chance."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_engine.errors import ModelRefused, ResourceError
from safer_engine.machine import resolve_device
from safer_engine.sources.resolved import ResolvedModel
from safer_engine.sources.weight_files import (
    ADAPTER,
    TensorEntry,
    adapter_head,
    head_tensors,
    n_outputs,
    read_header,
    read_weights,
)
from safer_engine.spec import ModelSpec, RuntimeSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from safer_engine.science.reward_model import RewardModel

HARMLESS = re.compile(
    r"(^|\.)(lm_head|embed_out|cls|pooler)\.|rotary_emb\.inv_freq$|position_ids$|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$"
)
"""Tensors a reward model may do without: language-model heads and tables that are computed anyway."""


def load_reward_model(resolved: ResolvedModel, spec: ModelSpec, runtime: RuntimeSpec) -> RewardModel:
    """Load a reward model ready for inference.

    Args:
        resolved: what `resolve_model` found.
        spec: dtype (`auto`: bfloat16 on CUDA, else float32), attention backend, reward_index or reward_weights.
        runtime: device, or device_map for a model over several GPUs.

    Raises:
        ModelRefused: unknown architecture; missing, unexpected or mismatched weights; a freshly initialised head;
            a tokenizer that does not fit the embeddings; a head with several outputs and no rule to combine them.
        SpecError: CUDA was asked for and there is none.
    """
    from safer_engine.science.reward_model import LoadFacts, inspect

    device = resolve_device(runtime.device)
    config = _load_config(resolved.path, runtime)
    entries = read_weights(resolved.path)
    from_adapter = _adapter_head(resolved.adapter_path)
    _settle_outputs(config, resolved.path, {**head_tensors(entries), **from_adapter})
    model, report = _load_model(resolved.path, config, spec, runtime, device)
    source = _check_weights(model, report, entries, from_adapter)
    if resolved.adapter_path is not None:
        model = _merge_adapter(model, resolved.adapter_path, from_adapter)
    tokenizer = _load_tokenizer(resolved.path, runtime, model)
    pad_id, pad_origin, head_pad_id = _settle_padding(model, tokenizer)
    if runtime.device_map is None:
        model.to(device)
    model.eval()
    model.requires_grad_(False)
    model.config.use_cache = False
    facts = LoadFacts(
        weights=reward_weights(model.config.num_labels, spec),
        head_source=source,
        pad_id=pad_id,
        pad_origin=pad_origin,
        head_pad_id=head_pad_id,
        attention=str(model.config._attn_implementation),
        adapter=resolved.adapter_path is not None,
    )
    return inspect(model, tokenizer, facts)


def reward_weights(n_outputs: int, spec: ModelSpec) -> tuple[float, ...]:
    """The weight of each output of the head in the reward.

    Raises:
        ModelRefused: several outputs and neither reward_index nor reward_weights, or one that does not fit.
    """
    if spec.reward_weights is not None:
        if len(spec.reward_weights) != n_outputs:
            raise ModelRefused(
                f"{len(spec.reward_weights)} reward weights were given for a head with {n_outputs} outputs",
                "give one weight each",
            )
        return spec.reward_weights
    if spec.reward_index is None and n_outputs > 1:
        raise ModelRefused(
            f"the head has {n_outputs} outputs, and nothing says which is the reward",
            "set model.reward_index, or model.reward_weights to combine them",
        )
    index = spec.reward_index or 0
    if index >= n_outputs:
        raise ModelRefused(f"reward_index is {index}, but the head has {n_outputs} outputs", f"choose 0 … {n_outputs - 1}")
    return tuple(1.0 if output == index else 0.0 for output in range(n_outputs))


def _load_config(folder: Path, runtime: RuntimeSpec) -> Any:
    from transformers import AutoConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=runtime.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelRefused(
            f"Transformers cannot read {folder / 'config.json'}: {error}", "is its model_type supported?"
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelRefused(
            f"{config.model_type} models have an encoder and a decoder",
            "audit a decoder or an encoder with a classification head",
        )
    return config


def _settle_outputs(config: Any, folder: Path, head: dict[str, TensorEntry]) -> None:
    """Let num_labels agree with the head's weights; where config.json says another number, refuse."""
    found = n_outputs(head)
    document = json.loads((folder / "config.json").read_bytes())
    stated = document.get("num_labels") or len(document.get("id2label") or ()) or None
    if stated is not None and stated != found:
        raise ModelRefused(f"config.json states {stated} outputs, the head's weights have {found}", "save the model again")
    config.num_labels = found


def _load_model(folder: Path, config: Any, spec: ModelSpec, runtime: RuntimeSpec, device: str) -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers import AutoModelForSequenceClassification

    automatic = torch.bfloat16 if device.startswith("cuda") else torch.float32
    dtype = automatic if spec.dtype == "auto" else getattr(torch, spec.dtype)
    options: dict[str, Any] = {} if spec.attention == "auto" else {"attn_implementation": spec.attention}
    if runtime.device_map is not None:
        options["device_map"] = runtime.device_map
    try:
        with quiet():
            return AutoModelForSequenceClassification.from_pretrained(  # type: ignore[no-any-return]
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=runtime.trust_remote_code,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise ResourceError(
                f"{folder} does not fit into the device's memory", "use runtime.device_map=auto or bfloat16"
            ) from error
        raise ModelRefused(f"Transformers cannot load {folder}: {first_lines(error)}", "see the reason given") from error


def _check_weights(
    model: nn.Module, report: dict[str, Any], entries: dict[str, TensorEntry], from_adapter: dict[str, TensorEntry]
) -> str:
    """Account for every weight; install a head saved under another name. Returns the name of the head's weights."""
    missing, unexpected = set(report["missing_keys"]), set(report["unexpected_keys"])
    own = head_tensors(entries)
    foreign = {name: entry for name, entry in own.items() if name in unexpected}
    head_missing = {name for name in missing if name in from_adapter or name.split(".")[0] in head_roots(model)}
    if report["mismatched_keys"]:
        raise ModelRefused(
            f"weights have other shapes than the model: {some(report['mismatched_keys'])}", "is config.json this model's?"
        )
    if body := missing - head_missing:
        raise ModelRefused(f"weights are missing, which would be drawn at random: {some(body)}", "save the whole model again")
    if extra := {name for name in unexpected if name not in foreign and not HARMLESS.search(name)}:
        raise ModelRefused(
            f"the files hold weights that the model has no place for: {some(extra)}", "is config.json this model's?"
        )
    if foreign and not head_missing:
        raise ModelRefused(f"the files hold a second head: {some(foreign)}", "save the model with the head that is its reward")
    unsettled = head_missing - set(from_adapter)
    if not unsettled:
        return min(from_adapter or own)
    if not foreign:
        raise ModelRefused(
            f"the reward head is not in the files and would be drawn at random: {some(unsettled)}",
            "save the model with its head; with LoRA, list the head in modules_to_save",
        )
    return _install_head(model, foreign, unsettled)


def head_roots(model: nn.Module) -> set[str]:
    """First parts of the names of modules outside the base model: the head's, and a pooler's that belongs to it."""
    base = str(getattr(model, "base_model_prefix", ""))
    return {name for name, _ in model.named_children() if name != base}


def _install_head(model: nn.Module, foreign: dict[str, TensorEntry], missing: set[str]) -> str:
    """Put a head saved under another name into the model's own linear layer, when the shapes fit."""
    import torch

    weights = [name for name in foreign if name.endswith(".weight")]
    linears = [(name, module) for name, module in model.named_children() if isinstance(module, torch.nn.Linear)]
    fits = len(weights) == len(linears) == 1 and foreign[weights[0]].shape == tuple(linears[0][1].weight.shape)
    biases = [name for name in foreign if name not in weights]
    covered = {f"{name}.{part}" for name, _ in linears for part in ("weight", "bias")}
    if missing - covered or not fits or len(biases) > 1 or not all(name.endswith(".bias") for name in biases):
        raise ModelRefused(
            f"the head {some(foreign)} does not fit the model's own head {', '.join(name for name, _ in linears) or '(none)'}",
            "save the model as AutoModelForSequenceClassification",
        )
    linear = linears[0][1]
    like = linear.weight
    linear.weight = torch.nn.Parameter(_read_tensor(foreign[weights[0]]).to(like.device, like.dtype))
    bias = torch.nn.Parameter(_read_tensor(foreign[biases[0]]).to(like.device, like.dtype)) if biases else None
    linear.register_parameter("bias", bias)
    return weights[0]


def _read_tensor(entry: TensorEntry) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(entry.file, framework="pt") as handle:
        tensor: torch.Tensor = handle.get_tensor(entry.name)
    return tensor


def _adapter_head(folder: Path | None) -> dict[str, TensorEntry]:
    return {} if folder is None else adapter_head(read_header(folder / ADAPTER))


def _merge_adapter(model: Any, folder: Path, head: dict[str, TensorEntry]) -> Any:
    """Merge a PEFT adapter; its own head, where it has one, must be what the merged model ends with."""
    import torch
    from peft import PeftModel

    try:
        with quiet():
            merged = PeftModel.from_pretrained(model, str(folder), local_files_only=True).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelRefused(
            f"the adapter {folder} cannot be merged: {first_lines(error)}", "is it an adapter of this model?"
        ) from error
    state = merged.state_dict()
    for name, entry in head.items():
        if name not in state or not torch.equal(state[name].cpu(), _read_tensor(entry).to(state[name].dtype)):
            raise ModelRefused(
                f"the adapter's head {name} did not reach the model", "save the adapter again with the installed peft"
            )
    return merged


def _load_tokenizer(folder: Path, runtime: RuntimeSpec, model: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=runtime.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelRefused(f"the tokenizer in {folder} cannot be loaded: {first_lines(error)}", "save it again") from error
    if not tokenizer.is_fast:
        raise ModelRefused("the tokenizer is a slow one, without character offsets", "save its fast version (tokenizer.json)")
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ModelRefused(
            f"the tokenizer knows token id {largest}, but the embeddings have {rows} rows",
            "use the tokenizer the model was trained with",
        )
    return tokenizer


def _settle_padding(model: Any, tokenizer: Any) -> tuple[int, str, int | None]:
    """The token that fills batches, where it comes from, and the pad token that the model's own head rule skips.

    A model whose config names no pad token reads the very last token, whatever fills the batch.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    text_config = model.config.get_text_config()
    stated = text_config.pad_token_id
    candidates = {
        "model": stated,
        "tokenizer": tokenizer.pad_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
    }
    usable = {origin: token for origin, token in candidates.items() if token is not None and 0 <= token < rows}
    origin, pad_id = next(iter(usable.items()), ("first", 0))
    text_config.pad_token_id = pad_id
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    return pad_id, origin, stated


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers without progress bars and load reports: what they say is checked here and raised where it matters."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def some(names: Any) -> str:
    """A few of some names (or of tuples that begin with one), sorted, and how many more there are."""
    ordered = sorted(str(name[0] if isinstance(name, tuple) else name) for name in names)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")


def first_lines(error: BaseException) -> str:
    """What an error says, on one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}…"
