"""A labeller that asks a causal language model of Transformers on this machine. Nothing leaves it.

Greedy decoding, one prompt at a time: on one machine and CPU the same prompt gives the same answer. The model's own
generation settings are left aside. What a prompt holds of the data cannot become one of the model's control tokens: their
texts are broken up in it, and a prompt in which one is found all the same is not asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from safer_engine.errors import LabellerError, ModelRefused
from safer_engine.labellers.model_labeller import Answers, ModelLabeller, Reply
from safer_engine.labellers.prompts import Prompt
from safer_engine.labellers.rubric import Rubric
from safer_engine.sources.resolved import ResolvedModel
from safer_engine.spec_labels import LocalLmLabeller as LocalLmSpec


@dataclass(frozen=True)
class LocalModel:
    """The files of a causal language model, and the device it is to run on (`auto`: CUDA where there is one)."""

    files: ResolvedModel
    device: str = "auto"


class LocalLmLabeller(ModelLabeller):
    """Asks a model on this machine; it is loaded when it is first asked. `calls` counts answers it was asked for."""

    def __init__(self, spec: LocalLmSpec, rubric: Rubric, answers: Answers, model: LocalModel) -> None:
        self.spec = spec
        self._model = model
        self._reading = _Reading(model.files)
        super().__init__(rubric, answers, self._reading.control_tokens)

    @property
    def name(self) -> str:
        """See `Labeller.name`."""
        return f"local_lm:{self._model.files.origin}"

    @contextmanager
    def open(self) -> Iterator[None]:
        """See `ModelLabeller.open`. The model stays until the labeller goes."""
        yield

    def asked(self, prompt: Prompt) -> dict[str, Any]:
        """See `ModelLabeller.asked`."""
        spec = self.spec
        return {
            "model": self._model.files.digest,
            "dtype": spec.dtype,
            "max_tokens": spec.max_tokens,
            "messages": prompt.messages,
        }

    def ask(self, prompt: Prompt) -> Reply:
        """Ask, unless the prompt is too long or holds a control token."""
        if found := self._reading.smuggled(prompt):
            return Reply(None, f"the contexts hold {found} control tokens of the model")
        ids = self._reading.ids(prompt)
        room = min(self.spec.max_prompt, self._context - self.spec.max_tokens)
        if len(ids) > room:
            return Reply(None, f"the prompt has {len(ids)} tokens, {len(ids) - room} more than the model may be given")
        self.calls += 1
        return Reply(self._reading.text(self._generate(ids)))

    @property
    def _context(self) -> int:
        """Tokens that the model reads at once."""
        stated = getattr(self._loaded.config.get_text_config(), "max_position_embeddings", None)
        return stated if isinstance(stated, int) and stated > 0 else 1 << 30

    @cached_property
    def _loaded(self) -> Any:
        return _load(self._model, self.spec.dtype)

    def _generate(self, ids: Sequence[int]) -> list[int]:
        """The tokens of the answer, the one that ends it not included."""
        import torch

        ends = self._reading.ends
        batch = torch.tensor([list(ids)], device=self._loaded.device)
        try:
            with torch.inference_mode():
                made = self._loaded.generate(
                    batch,
                    attention_mask=torch.ones_like(batch),
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=self.spec.max_tokens,
                    eos_token_id=sorted(ends) or None,
                    pad_token_id=min(ends, default=0),
                )[0, len(ids) :].tolist()
        except torch.OutOfMemoryError as error:
            raise LabellerError(
                f"{self.name} has no room for a prompt of {len(ids)} tokens", "use a smaller model, dtype or contexts.window"
            ) from error
        stop = next((at for at, token in enumerate(made) if token in ends), len(made))
        return [int(token) for token in made[:stop]]


class _Reading:
    """How a model's tokenizer writes a request and reads an answer. Raises ModelRefused where it cannot."""

    def __init__(self, files: ResolvedModel) -> None:
        from transformers import AutoTokenizer

        from safer_engine.science.chat_templates import PROBE_PROMPT, frame_of, load_template
        from safer_engine.science.drops import SideDropped
        from safer_engine.sources.model_loading import first_lines

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(files.path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelRefused(
                f"the tokenizer of {files.origin} cannot be loaded: {first_lines(error)}", "save it again"
            ) from error
        named = zip(self._tokenizer.all_special_tokens, self._tokenizer.all_special_ids, strict=True)
        added = {token.content: number for number, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        unknown = self._tokenizer.unk_token_id  # stands for any text that the vocabulary lacks
        self._special = {text: number for text, number in {**dict(named), **added}.items() if number != unknown}
        self._template = load_template(self._tokenizer) if self._tokenizer.chat_template else None
        eos = self._tokenizer.eos_token_id
        self.ends: frozenset[int] = frozenset(() if eos is None else (eos,))
        if self._template is not None:
            frame = frame_of(self._template, PROBE_PROMPT)
            after = [] if isinstance(frame, SideDropped) else self._encoded(frame.after)
            self.ends |= {token for token in after[:1] if token in self._special.values()}

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts that the tokenizer reads as control tokens."""
        return tuple(sorted(self._special))

    def smuggled(self, prompt: Prompt) -> int:
        """Control tokens in what the messages say."""
        special = set(self._special.values())
        return sum(token in special for text in (prompt.system, prompt.user) for token in self._encoded(text))

    def ids(self, prompt: Prompt) -> list[int]:
        """A request as the model reads it: by its chat template where it has one, else as plain text."""
        if self._template is None:
            text = f"{prompt.system}\n\n{prompt.user}\n"
            return [int(token) for token in self._tokenizer(text, add_special_tokens=True)["input_ids"]]
        return self._encoded(self._written(prompt))

    def text(self, ids: Sequence[int]) -> str:
        """An answer as text."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _written(self, prompt: Prompt) -> str:
        """By the chat template; for one without a system turn, all in the user's."""
        from jinja2 import TemplateError

        from safer_engine.science.template_costs import TemplateOverrun

        assert self._template is not None
        whole = [{"role": "user", "content": f"{prompt.system}\n\n{prompt.user}"}]
        for messages in (prompt.messages, whole):
            try:
                text = self._template.render(messages, open_turn=True)
            except (TemplateError, TypeError, ValueError, LookupError, TemplateOverrun):
                continue
            if prompt.user in text and prompt.system in text:
                return text
        raise ModelRefused("the chat template of the labelling model does not write the request", "use another model")

    def _encoded(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer(text, add_special_tokens=False)["input_ids"]]


def _load(model: LocalModel, dtype: str) -> Any:
    """The model, ready to answer. Raises ModelRefused, SpecError."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from safer_engine.machine import resolve_device
    from safer_engine.sources.model_loading import first_lines, quiet, some

    device = resolve_device(model.device)
    automatic = torch.bfloat16 if device.startswith("cuda") else torch.float32
    try:
        with quiet():
            loaded, report = AutoModelForCausalLM.from_pretrained(
                model.files.path,
                dtype=automatic if dtype == "auto" else getattr(torch, dtype),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise ModelRefused(
            f"Transformers cannot load {model.files.origin}: {first_lines(error)}", "see the reason given"
        ) from error
    if missing := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise ModelRefused(
            f"{model.files.origin} is no causal language model: weights would be drawn at random: {some(missing)}",
            "give a model saved as AutoModelForCausalLM",
        )
    loaded.to(device).eval().requires_grad_(False)
    loaded.generation_config = GenerationConfig()
    return loaded
