"""Conversations: messages, how cells of a dataset become messages, and what is compared between conversations."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles a message may have; `_ALIASES` names the other spellings that are understood."""

_ALIASES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "function": "tool"}
_ROLE_NAMES = {"system": "System", "developer": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}
_KEPT_FIELDS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
_TURN = re.compile(r"\n\n(Human|Assistant):")


class MalformedCell(ValueError):
    """A cell of a row isn't what its layout says. The row is dropped and counted, never repaired."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `extra`: further fields a chat template may use (tool calls, reasoning), as canonical JSON, or empty."""

    role: str
    content: str
    extra: str = ""

    def as_dict(self) -> dict[str, Any]:
        """What a chat template is given."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content}
        return {**fields, **json.loads(self.extra)} if self.extra else fields


def text_cell(value: Any) -> str:
    """A cell that must be text. Raises MalformedCell for anything else."""
    if not isinstance(value, str):
        raise MalformedCell(f"{type(value).__name__} where text is expected")
    return value


def message_cell(value: Any) -> tuple[Message, ...] | None:
    """A cell as messages: a list of role/content mappings, a mapping of equally long lists, or either as JSON text.

    Returns None where the cell is plain text. Raises MalformedCell for anything else.
    """
    if isinstance(value, str):
        value = _json_messages(value)
        if value is None:
            return None
    if isinstance(value, Mapping):
        value = _rows_of(value)
    if not isinstance(value, Sequence):
        raise MalformedCell(f"{type(value).__name__} where text or messages are expected")
    if not value:
        raise MalformedCell("an empty list of messages")
    return tuple(_message(item) for item in value)


def is_message_list(value: Any) -> bool:
    """Whether a cell holds messages (and is not plain text)."""
    try:
        return message_cell(value) is not None
    except MalformedCell:
        return False


def transcript(text: str) -> tuple[Message, ...]:
    r"""A "\n\nHuman: … \n\nAssistant: …" transcript as messages, white space round each turn stripped.

    Raises MalformedCell when it doesn't begin with a turn.
    """
    if not text.startswith("\n\n"):
        text = "\n\n" + text.lstrip()
    head, *pieces = _TURN.split(text)
    if head.strip() or not pieces:
        raise MalformedCell("a transcript that doesn't begin with Human: or Assistant:")
    names = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(names[name], content.strip()) for name, content in zip(pieces[::2], pieces[1::2], strict=True))


def is_transcript(value: Any) -> bool:
    """Whether a cell is a transcript: text whose first turn is marked `Human:`."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def role_marked(messages: Iterable[Message]) -> str:
    """Messages as text for people and for models without a chat template: "Human: …", blank line, "Assistant: …"."""
    return "\n\n".join(f"{_ROLE_NAMES[message.role]}: {message.content}" for message in messages)


def normalised(text: str) -> str:
    """Text for comparisons: runs of white space become one space, case is folded."""
    return " ".join(text.split()).casefold()


def first_user_turn(messages: Sequence[Message]) -> str:
    """Content of the first user message; of all messages, role-marked, where no user speaks."""
    for message in messages:
        if message.role == "user":
            return message.content
    return role_marked(messages)


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form, in hex."""
    return hashlib.sha256(_canonical(value)).hexdigest()


def content_digest(prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]) -> str:
    """sha256 of what a pair says: prompt, chosen, rejected (hex); ids, groups and the like don't enter."""
    return digest([[_plain(message) for message in part] for part in (prompt, chosen, rejected)])


def _plain(message: Message) -> list[str]:
    return [message.role, message.content, message.extra] if message.extra else [message.role, message.content]


def _canonical(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return text.encode("utf-8", "surrogatepass")


def _json_messages(text: str) -> Any:
    """The list of messages that a text holds as JSON (CSV files have no other way), else None."""
    if not text.startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # brackets thousands deep are text
        return None
    spoken = isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    return value if spoken and all({"role", "content"} <= item.keys() for item in value) else None


def _rows_of(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    lists = {name: values for name, values in columns.items() if isinstance(values, (list, tuple))}
    lengths = {len(values) for values in lists.values()}
    if len(lengths) != 1 or len(lists) != len(columns):
        raise MalformedCell("a mapping where text or messages are expected")
    return [{name: values[i] for name, values in lists.items()} for i in range(lengths.pop())]


def _message(item: Any) -> Message:
    if not isinstance(item, Mapping):
        raise MalformedCell(f"{type(item).__name__} in place of a message")
    role = item.get("role", item.get("from"))
    name = _ALIASES.get(role, role) if isinstance(role, str) else role
    if name not in ROLES:
        raise MalformedCell(f"a message of role {role!r}")
    extra = {field: item[field] for field in _KEPT_FIELDS if item.get(field)}
    content = _content(item.get("content", item.get("value")), empty_ok="tool_calls" in extra)
    return Message(name, content, _canonical(extra).decode() if extra else "")


def _content(value: Any, empty_ok: bool) -> str:
    if isinstance(value, str):
        return value
    if value is None and empty_ok:
        return ""
    if not isinstance(value, (list, tuple)):
        raise MalformedCell(f"a message whose content is {type(value).__name__}")
    return "".join(_text_part(part) for part in value)


def _text_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise MalformedCell("a message part that is not text")
