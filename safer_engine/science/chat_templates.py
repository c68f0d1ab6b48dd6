"""What a chat template makes of a conversation, and where in it the response lies.

The response is found by rendering the same prompt with a placeholder as response: what the template writes before and
after the placeholder is its frame. Templates come with models and run as code, so a rendering may fail, and one that
never ends is stopped when a tokenizer is first looked at.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, TypeVar

from safer_engine.errors import ModelRefused
from safer_engine.science.drops import Drop, SideDropped
from safer_engine.science.messages import Message

PROBE_PROMPT = (Message("user", "How many are there?"),)
PROBE_RESPONSE = "There are forty two of them"
"""A short conversation that every tokenizer is tried on."""

_Outcome = TypeVar("_Outcome")
_PLACEHOLDERS = ("Qzx7placeholder7xzQ", "Wvk3otherwords3kvW")
_TEMPLATE_STEPS = 1_000_000
"""Lines a chat template may run to write the probes; real ones run some hundreds."""
_FIXED_DATE = (
    ("%-d", "26"), ("%d", "26"), ("%e", "26"), ("%-m", "7"), ("%m", "07"), ("%B", "July"), ("%b", "Jul"), ("%Y", "2024"),
    ("%y", "24"), ("%A", "Friday"), ("%a", "Fri"), ("%j", "208"), ("%H", "00"), ("%M", "00"), ("%S", "00"),
)  # fmt: skip
"""What a template that prints today's date is given: a rendering must not depend on the day."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A conversation as text, and the characters of the response's content in it."""

    text: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Frame:
    """What a chat template writes before and after a response to some prompt."""

    before: str
    after: str


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


def _render(tokenizer: Any, messages: Sequence[Message], *, open_turn: bool = False) -> str | SideDropped:
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


def frame_of(tokenizer: Any, prompt: Sequence[Message], placeholder: str = _PLACEHOLDERS[0]) -> Frame | SideDropped:
    """What the template writes round a response to `prompt`, or why it can't be told."""
    text = _render(tokenizer, [*prompt, Message("assistant", placeholder)])
    if isinstance(text, SideDropped):
        return text
    if text.count(placeholder) != 1:
        return SideDropped(Drop.UNRENDERABLE, "the chat template doesn't write the response exactly once")
    before, after = text.split(placeholder)
    return Frame(before, after)


def place(tokenizer: Any, prompt: Sequence[Message], response: str, frame: Frame) -> Layout | SideDropped:
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
            return Layout(text, len(frame.before), stop)
    opened = _render(tokenizer, prompt, open_turn=True)
    if isinstance(opened, str) and text.startswith(opened) and text.endswith(frame.after):
        start = len(opened)
        if squeezed(text[start:stop]) == squeezed(response):
            return Layout(text, start, stop)
    return SideDropped(Drop.UNRENDERABLE, "the chat template changes the response, so it can't be located")


def squeezed(text: str) -> str:
    """The text without its white space."""
    return "".join(text.split())


def _probed(probe: Callable[[], _Outcome | SideDropped]) -> _Outcome:
    """A rendering that must come out, in a bounded number of steps. Raises ModelRefused."""
    with _bounded_steps():  # once for each: an exception raised while tracing ends the tracing
        outcome = probe()
    if isinstance(outcome, SideDropped):
        raise ModelRefused(outcome.detail, "repair chat_template in the model's tokenizer, or remove it for plain text")
    return outcome


def check_template(tokenizer: Any) -> str:
    """A short conversation as the template writes it. Raises ModelRefused when responses can't be located in it."""
    probes = [partial(frame_of, tokenizer, PROBE_PROMPT, placeholder) for placeholder in _PLACEHOLDERS]
    frames = [_probed(probe) for probe in probes]
    text = _probed(partial(_render, tokenizer, [*PROBE_PROMPT, Message("assistant", PROBE_RESPONSE)]))
    if frames[0] != frames[1]:
        raise ModelRefused(
            "what the chat template writes round a response depends on the response",
            "repair chat_template in the model's tokenizer, or remove it for plain text",
        )
    return str(text)
