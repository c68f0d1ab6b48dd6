"""How a reward model reads a conversation: text, tokens, and which of them are the response.

There is one rule for all who render (audit, training, preview), `Renderer`:

- `chat`: the tokenizer has a chat template. The whole conversation is rendered by it, with a fixed date for templates
  that ask for one. Where the response lies is found by rendering the same prompt with a placeholder as response.
- `plain`: it has none. Prompt turns as "Human: …", blank line, "Assistant: ", then the response; then the special
  tokens that the tokenizer adds, and an end-of-sequence token for a decoder's tokenizer that adds none.

The response goes to the end of the sequence: its end-of-turn token and whatever the template writes after it belong to
it, so the last token, which a decoder's head reads, is always a response token.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from safer_engine.errors import ModelRefused
from safer_engine.science.drops import Drop
from safer_engine.science.messages import Message, role_marked

Truncation = Literal["left", "right", "drop"]
Messages = Sequence[Message]
_Outcome = TypeVar("_Outcome")

_PLACEHOLDERS = ("Qzx7placeholder7xzQ", "Wvk3otherwords3kvW")
_TEMPLATE_STEPS = 1_000_000
"""Lines a chat template may run to write the probes; real ones run some hundreds."""
_PROBE_PROMPT = (Message("user", "How many are there?"),)
_PROBE_RESPONSE = "There are forty two of them"
_FIXED_DATE = (
    ("%-d", "26"), ("%d", "26"), ("%e", "26"), ("%-m", "7"), ("%m", "07"), ("%B", "July"), ("%b", "Jul"), ("%Y", "2024"),
    ("%y", "24"), ("%A", "Friday"), ("%a", "Fri"), ("%j", "208"), ("%H", "00"), ("%M", "00"), ("%S", "00"),
)  # fmt: skip
"""What a template that prints today's date is given: a rendering must not depend on the day."""


class SideDropped(ValueError):
    """A side can't be read by the model; `reason` says why."""

    def __init__(self, reason: Drop, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True, eq=False)
class RenderedSide:
    """One side as the model reads it.

    Attributes:
        text: the exact text read (what is left of it after truncation).
        ids: [T] int32 token ids.
        offsets: [T, 2] int32 start and end character of each token in `text`; an empty span for tokens that were added.
        special: [T] bool, special tokens of the tokenizer.
        start, end: response tokens are ids[start:end]; end is T.
        truncated: tokens cut away.
    """

    text: str
    ids: NDArray[np.int32]
    offsets: NDArray[np.int32]
    special: NDArray[np.bool_]
    start: int
    end: int
    truncated: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """A conversation as text, and the characters of the response's content in it."""

    text: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Frame:
    """What a chat template writes before and after a response to some prompt."""

    before: str
    after: str


@dataclass(frozen=True)
class Renderer:
    """The one way from (prompt, response) to tokens; made by `make_renderer`.

    Attributes:
        template: which rule (see the module).
        prefix, suffix: token ids put before and after the tokens of the text.
        special_ids: ids that count as special tokens.
    """

    tokenizer: Any
    max_length: int
    truncation: Truncation
    template: Literal["chat", "plain"]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    special_ids: frozenset[int]

    def side(self, prompt: Messages, response: str) -> RenderedSide:
        """Render one side. Raises SideDropped when the model can't read it."""
        rendered = self.sides([(prompt, response)])[0]
        if isinstance(rendered, SideDropped):
            raise rendered
        return rendered

    def sides(self, requests: Sequence[tuple[Messages, str]]) -> list[RenderedSide | SideDropped]:
        """Render many sides in one call of the tokenizer; those that can't be read are SideDropped values, in place."""
        frames: dict[tuple[Message, ...], _Frame | SideDropped] = {}
        layouts = [self._lay_out(tuple(prompt), response, frames) for prompt, response in requests]
        texts = [layout.text for layout in layouts if isinstance(layout, _Layout)]
        encodings = iter(_encode(self.tokenizer, texts))
        return [self._cut(layout, *next(encodings)) if isinstance(layout, _Layout) else layout for layout in layouts]

    def _lay_out(
        self, prompt: tuple[Message, ...], response: str, frames: dict[tuple[Message, ...], _Frame | SideDropped]
    ) -> _Layout | SideDropped:
        if not response.strip():
            return SideDropped(Drop.EMPTY_SIDE, "the response is empty")
        if self.template == "plain":
            before = f"{role_marked(prompt)}\n\nAssistant: " if prompt else ""
            return _Layout(before + response, len(before), len(before) + len(response))
        if prompt not in frames:
            frames[prompt] = _frame(self.tokenizer, prompt)
        frame = frames[prompt]
        return frame if isinstance(frame, SideDropped) else _place(self.tokenizer, prompt, response, frame)

    def _cut(self, layout: _Layout, ids: NDArray[np.int32], offsets: NDArray[np.int32]) -> RenderedSide | SideDropped:
        """Find the response's tokens and fit all tokens into the limit."""
        content = np.flatnonzero((offsets[:, 1] > layout.start) & (offsets[:, 0] < layout.stop))
        if not len(content):
            return SideDropped(Drop.EMPTY_SIDE, "the tokenizer leaves nothing of the response")
        first, last = int(content[0]), int(content[-1])
        room = self.max_length - len(self.prefix) - len(self.suffix)
        excess = len(ids) - room
        if excess <= 0:
            return self._assemble(layout.text, ids, offsets, first, 0)
        if self.truncation == "left" and last >= excess + self._keeps_bos(ids):
            return self._without_left(layout.text, ids, offsets, first, excess)
        if self.truncation == "right" and first < room:
            return self._assemble(layout.text[: offsets[room - 1, 1]], ids[:room], offsets[:room], first, excess)
        return SideDropped(Drop.OVER_LONG, f"{excess} tokens over the limit, and what may be cut leaves no response")

    def _keeps_bos(self, ids: NDArray[np.int32]) -> int:
        """1 where the template wrote a beginning-of-sequence token, which stays when the left is cut; else 0."""
        return int(ids[0] == self.tokenizer.bos_token_id)

    def _without_left(
        self, text: str, ids: NDArray[np.int32], offsets: NDArray[np.int32], first: int, excess: int
    ) -> RenderedSide:
        bos = self._keeps_bos(ids)
        cut = excess + bos
        begin = int(offsets[cut, 0])
        kept_ids = np.concatenate([ids[:bos], ids[cut:]])
        kept_offsets = np.concatenate([np.zeros((bos, 2), dtype=np.int32), offsets[cut:] - np.int32(begin)])
        return self._assemble(text[begin:], kept_ids, kept_offsets, max(first - excess, bos), excess)

    def _assemble(
        self, text: str, ids: NDArray[np.int32], offsets: NDArray[np.int32], first: int, truncated: int
    ) -> RenderedSide:
        all_ids = np.concatenate([self.prefix, ids, self.suffix]).astype(np.int32)
        before = np.zeros((len(self.prefix), 2), dtype=np.int32)
        after = np.full((len(self.suffix), 2), len(text), dtype=np.int32)
        return RenderedSide(
            text=text,
            ids=all_ids,
            offsets=np.concatenate([before, offsets, after]),
            special=np.isin(all_ids, list(self.special_ids)),
            start=len(self.prefix) + first,
            end=len(all_ids),
            truncated=truncated,
        )


def make_renderer(
    tokenizer: Any,
    max_length: int,
    truncation: Truncation = "left",
    add_special_tokens: bool | Literal["auto"] = "auto",
) -> Renderer:
    """Find out how a tokenizer writes conversations, and check it on a short one.

    Args:
        tokenizer: a fast Transformers tokenizer.
        max_length: longest sequence in tokens, special tokens included.
        truncation: which end is cut from a longer one; `drop` drops the side.
        add_special_tokens: whether the tokenizer's own special tokens go round the text; `auto`: yes, unless a chat
            template already wrote special tokens. A token that is already there is never doubled.

    Raises:
        ModelRefused: slow tokenizer, a template that fails or hides the response, tokens that don't give the text back.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelRefused(
            "the model has no fast tokenizer, so tokens can't be traced to characters",
            "save one beside the model: AutoTokenizer.from_pretrained(…).save_pretrained(folder) writes tokenizer.json",
        )
    template: Literal["chat", "plain"] = "chat" if tokenizer.chat_template else "plain"
    special = frozenset(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    probe = _check_template(tokenizer) if template == "chat" else _PROBE_RESPONSE
    written = _encode(tokenizer, [probe])[0][0].tolist()
    add = not special.intersection(written) if (template, add_special_tokens) == ("chat", "auto") else bool(add_special_tokens)
    prefix, suffix = _added_tokens(tokenizer, written) if add else ((), ())
    if add and template == "plain" and not suffix and _wants_end_token(tokenizer):
        suffix = (int(tokenizer.eos_token_id),)
    renderer = Renderer(tokenizer, max_length, truncation, template, prefix, suffix, special)
    _check_tokens(renderer)
    return renderer


def render_pair(
    tokenizer: Any, prompt_messages: Messages, response: str, max_length: int, side: Truncation = "left"
) -> RenderedSide:
    """Render one (prompt, response): `make_renderer` and `Renderer.side` in one call.

    Raises:
        ModelRefused: see `make_renderer`.
        SideDropped: see `Renderer.side`.
    """
    return make_renderer(tokenizer, max_length, side).side(prompt_messages, response)


def mark_response(side: RenderedSide, opening: str = "⟦", closing: str = "⟧", between: str = "·") -> str:
    """The text that is read, response marked and its tokens kept apart: what a person checks before an audit."""
    response = side.offsets[side.start : side.end]
    boundaries = np.unique(response[response[:, 1] > response[:, 0]])
    if not len(boundaries):
        return side.text + opening + closing
    pieces = [side.text[a:b] for a, b in itertools.pairwise(boundaries)]
    return side.text[: boundaries[0]] + opening + between.join(pieces) + closing + side.text[boundaries[-1] :]


def _encode(tokenizer: Any, texts: list[str]) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Token ids and character spans of texts, without added tokens, truncation or padding."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)
    return [
        (np.array(one.ids, dtype=np.int32), np.array(one.offsets, dtype=np.int32).reshape(-1, 2)) for one in encoded.encodings
    ]


class _EndlessTemplate(RuntimeError):
    """A chat template took more steps than any sensible one."""


@contextmanager
def _bounded_steps(limit: int = _TEMPLATE_STEPS) -> Iterator[None]:
    """Raise _EndlessTemplate in a chat template that runs more than `limit` of its lines inside the block.

    Lines are counted by a trace function of this thread, so nothing is left running. What one line does (joining a text
    to itself over and over) is not bounded.
    """
    steps = itertools.count(1)

    def count(frame: FrameType, _event: str, _argument: Any) -> Callable[..., Any] | None:
        if frame.f_code.co_filename != "<template>":
            return None
        if next(steps) > limit:
            raise _EndlessTemplate(f"it does not end within {limit:,} steps")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


_FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""What a template can raise beside jinja2's own errors (RecursionError is a RuntimeError)."""


def _render(tokenizer: Any, messages: Messages, *, open_turn: bool = False) -> str | SideDropped:
    """A conversation as its chat template writes it."""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [message.as_dict() for message in messages],
            tokenize=False,
            add_generation_prompt=open_turn,
            chat_template=_dated(tokenizer.get_chat_template()),
        )
    except (TemplateError, *_FAILURES) as error:
        said = str(error) if isinstance(error, (TemplateError, _EndlessTemplate)) else f"{type(error).__name__}: {error}"
        return SideDropped(Drop.UNRENDERABLE, f"the chat template refuses the conversation: {said}")
    return str(text)


def _dated(template: str) -> str:
    """The template with its clock stopped."""
    if "strftime_now" not in template:
        return template
    replaced = "".join(f"|replace({code!r}, {value!r})" for code, value in _FIXED_DATE)
    return "{%- macro strftime_now(format) -%}{{- format" + replaced + " -}}{%- endmacro -%}" + template


def _frame(tokenizer: Any, prompt: Messages, placeholder: str = _PLACEHOLDERS[0]) -> _Frame | SideDropped:
    text = _render(tokenizer, [*prompt, Message("assistant", placeholder)])
    if isinstance(text, SideDropped):
        return text
    if text.count(placeholder) != 1:
        return SideDropped(Drop.UNRENDERABLE, "the chat template doesn't write the response exactly once")
    before, after = text.split(placeholder)
    return _Frame(before, after)


def _place(tokenizer: Any, prompt: Messages, response: str, frame: _Frame) -> _Layout | SideDropped:
    """Render a conversation and find its response: what stands between what the template writes round a placeholder.

    Where the template writes something else round this response (reasoning that it formats anew), the response begins
    where the opened assistant turn ends, provided that everything from there on is the response but for white space.
    """
    text = _render(tokenizer, [*prompt, Message("assistant", response)])
    if isinstance(text, SideDropped):
        return text
    stop = len(text) - len(frame.after)
    if text.startswith(frame.before) and text.endswith(frame.after) and stop > len(frame.before):
        written = text[len(frame.before) : stop]
        if written.strip() and (written in response or written.strip() == response.strip()):
            return _Layout(text, len(frame.before), stop)
    opened = _render(tokenizer, prompt, open_turn=True)
    if isinstance(opened, str) and text.startswith(opened) and text.endswith(frame.after):
        start = len(opened)
        if _squeezed(text[start:stop]) == _squeezed(response):
            return _Layout(text, start, stop)
    return SideDropped(Drop.UNRENDERABLE, "the chat template changes the response, so it can't be located")


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _probed(probe: Callable[[], _Outcome | SideDropped]) -> _Outcome:
    """A rendering that must come out, in a bounded number of steps. Raises ModelRefused."""
    with _bounded_steps():  # once for each: an exception raised while tracing ends the tracing
        outcome = probe()
    if isinstance(outcome, SideDropped):
        raise ModelRefused(outcome.detail, "repair chat_template in the model's tokenizer, or remove it for plain text")
    return outcome


def _check_template(tokenizer: Any) -> str:
    """A short conversation as the template writes it. Raises ModelRefused when responses can't be located in it."""
    probes = [partial(_frame, tokenizer, _PROBE_PROMPT, placeholder) for placeholder in _PLACEHOLDERS]
    frames = [_probed(probe) for probe in probes]
    text = _probed(partial(_render, tokenizer, [*_PROBE_PROMPT, Message("assistant", _PROBE_RESPONSE)]))
    if frames[0] != frames[1]:
        raise ModelRefused(
            "what the chat template writes round a response depends on the response",
            "repair chat_template in the model's tokenizer, or remove it for plain text",
        )
    return str(text)


def _added_tokens(tokenizer: Any, written: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Special tokens the tokenizer puts before and after a text, less those that `written` already begins or ends with."""
    inner = tokenizer(_PROBE_RESPONSE, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
    whole = tokenizer(_PROBE_RESPONSE, add_special_tokens=True, truncation=False, padding=False)["input_ids"]
    for at in range(len(whole) - len(inner) + 1):
        if whole[at : at + len(inner)] == inner:
            prefix, suffix = tuple(whole[:at]), tuple(whole[at + len(inner) :])
            doubled_start = bool(prefix) and tuple(written[: len(prefix)]) == prefix
            doubled_end = bool(suffix) and tuple(written[-len(suffix) :]) == suffix
            return () if doubled_start else prefix, () if doubled_end else suffix
    raise ModelRefused(
        "the tokenizer changes a text's tokens when it adds special tokens", "set model.add_special_tokens to false"
    )


def _wants_end_token(tokenizer: Any) -> bool:
    """A decoder's tokenizer with an end-of-sequence token that a model can tell from padding."""
    end = tokenizer.eos_token_id
    return end is not None and tokenizer.cls_token_id is None and end != tokenizer.pad_token_id


def _check_tokens(renderer: Renderer) -> None:
    """Refuse a tokenizer whose response tokens don't decode to the response."""
    probe = replace(renderer, max_length=1 << 20)
    side = probe.side(_PROBE_PROMPT, _PROBE_RESPONSE)
    ids = side.ids[side.start : side.end]
    if renderer.tokenizer.unk_token_id in ids:
        return
    read = _squeezed(str(renderer.tokenizer.decode(ids.tolist()))).casefold()
    if _squeezed(_PROBE_RESPONSE).casefold() not in read:
        raise ModelRefused(
            f"the tokens found for the response {_PROBE_RESPONSE!r} decode to {read!r}",
            "the tokenizer's offsets are unreliable: save it anew with a current version of Transformers",
        )
