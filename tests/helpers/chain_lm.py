"""A causal language model that says one thing: whatever comes before, each of its words has one that follows.

Its attention and feed-forward layers write nothing, so the next token depends on the last one alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
USER_ONLY = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
CONTROL = ["<unk>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
_LAST_WORD = "only."


def save_chain_lm(folder: Path, says: str, template: str | None = TEMPLATE) -> Path:
    """Save a model that answers `says`, its characters being its words, no character twice in a row of the same place.

    Args:
        template: chat template; without one the answer follows on the last word of the prompts of labellers.
    """
    answer = [f"{character}{at}" for at, character in enumerate(says)]
    vocabulary = {word: number for number, word in enumerate([*CONTROL, _LAST_WORD, *answer])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex(r"(?<=.)\d+$"), ""), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", additional_special_tokens=CONTROL[2:]
    )
    if template is not None:
        fast.chat_template = template
    size = len(vocabulary) + len(vocabulary) % 2
    config = LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        chain = [vocabulary[word] for word in answer]
        start = vocabulary[_LAST_WORD if template is None else "<|assistant|>"]
        end = vocabulary["</s>" if template is None else "<|end|>"]
        for before, after in zip([start, *chain], [*chain, end], strict=True):
            model.lm_head.weight[after, before] = 10.0
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
