"""What a chat template makes of a conversation, and where in it the response lies.

The response is found by rendering the same prompt with a placeholder as response: what the template writes before and
after the placeholder is its frame. Templates come with models and run as code, so a rendering may fail, and one that
takes more work or memory than any sensible one is refused, whenever that shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from safer_engine.errors import ModelRefused
from safer_engine.science.drops import Drop, SideDropped
from safer_engine.science.messages import Message
from safer_engine.science.template_costs import TemplateOverrun

if TYPE_CHECKING:
    from safer_engine.science.template_sandbox import ChatTemplate

PROBE_PROMPT = (Message("user", "How many are there?"),)
PROBE_RESPONSE = "There are forty two of them"
"""A short conversation that every tokenizer is tried on."""

_Outcome = TypeVar("_Outcome")
_PLACEHOLDERS = ("Qzx7placeholder7xzQ", "Wvk3otherwords3kvW")


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


_FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""What a template can raise beside jinja2's own errors (RecursionError is a RuntimeError)."""
_LONGEST_REASON = 300
_REPAIR = "repair chat_template in the model's tokenizer, or remove it for plain text"


def load_template(tokenizer: Any) -> ChatTemplate:
    """A tokenizer's chat template. Raises ModelRefused when it can't be used."""
    from jinja2 import TemplateError

    from safer_engine.science.template_sandbox import ChatTemplate

    try:
        return ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map)
    except TemplateOverrun as error:
        raise _overrun(error) from error
    except (TemplateError, SyntaxError, *_FAILURES) as error:
        raise ModelRefused(f"the chat template can't be read: {_said(error)}", _REPAIR) from error


def _overrun(error: TemplateOverrun) -> ModelRefused:
    return ModelRefused(f"the chat template {error}", _REPAIR)


def _said(error: BaseException) -> str:
    from jinja2 import TemplateError

    said = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
    return said if len(said) <= _LONGEST_REASON else said[:_LONGEST_REASON] + "…"


def _render(template: ChatTemplate, messages: Sequence[Message], *, open_turn: bool = False) -> str | SideDropped:
    """A conversation as its chat template writes it. Raises ModelRefused for one that takes too much work or memory."""
    from jinja2 import TemplateError

    try:
        return template.render([message.as_dict() for message in messages], open_turn=open_turn)
    except TemplateOverrun as error:
        raise _overrun(error) from error
    except (TemplateError, *_FAILURES) as error:
        return SideDropped(Drop.UNRENDERABLE, f"the chat template refuses the conversation: {_said(error)}")


def frame_of(template: ChatTemplate, prompt: Sequence[Message], placeholder: str = _PLACEHOLDERS[0]) -> Frame | SideDropped:
    """What the template writes round a response to `prompt`, or why it can't be told."""
    text = _render(template, [*prompt, Message("assistant", placeholder)])
    if isinstance(text, SideDropped):
        return text
    if text.count(placeholder) != 1:
        return SideDropped(Drop.UNRENDERABLE, "the chat template doesn't write the response exactly once")
    before, after = text.split(placeholder)
    return Frame(before, after)


def place(template: ChatTemplate, prompt: Sequence[Message], response: str, frame: Frame) -> Layout | SideDropped:
    """Render a conversation and find its response: what stands between what the template writes round a placeholder.

    Where the template writes something else round this response (reasoning that it formats anew), the response begins
    where the opened assistant turn ends, provided that everything from there on is the response but for white space.
    """
    text = _render(template, [*prompt, Message("assistant", response)])
    if isinstance(text, SideDropped):
        return text
    stop = len(text) - len(frame.after)
    if text.startswith(frame.before) and text.endswith(frame.after) and stop > len(frame.before):
        written = text[len(frame.before) : stop]
        if written.strip() and (written in response or written.strip() == response.strip()):
            return Layout(text, len(frame.before), stop)
    opened = _render(template, prompt, open_turn=True)
    if isinstance(opened, str) and text.startswith(opened) and text.endswith(frame.after):
        start = len(opened)
        if squeezed(text[start:stop]) == squeezed(response):
            return Layout(text, start, stop)
    return SideDropped(Drop.UNRENDERABLE, "the chat template changes the response, so it can't be located")


def squeezed(text: str) -> str:
    """The text without its white space."""
    return "".join(text.split())


def _probed(outcome: _Outcome | SideDropped) -> _Outcome:
    """What must come out. Raises ModelRefused."""
    if isinstance(outcome, SideDropped):
        raise ModelRefused(outcome.detail, _REPAIR)
    return outcome


def check_template(template: ChatTemplate) -> str:
    """A short conversation as the template writes it. Raises ModelRefused when responses can't be located in it."""
    frames = [_probed(frame_of(template, PROBE_PROMPT, placeholder)) for placeholder in _PLACEHOLDERS]
    text = _probed(_render(template, [*PROBE_PROMPT, Message("assistant", PROBE_RESPONSE)]))
    if frames[0] != frames[1]:
        raise ModelRefused("what the chat template writes round a response depends on the response", _REPAIR)
    return str(text)
