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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from safer_engine.errors import ModelRefused
from safer_engine.science.chat_templates import (
    PROBE_PROMPT,
    PROBE_RESPONSE,
    Frame,
    Layout,
    check_template,
    frame_of,
    load_template,
    place,
    squeezed,
)
from safer_engine.science.drops import Drop, SideDropped
from safer_engine.science.messages import Message, role_marked

if TYPE_CHECKING:
    from safer_engine.science.template_sandbox import ChatTemplate

Truncation = Literal["left", "right", "drop"]
Messages = Sequence[Message]


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


@dataclass(frozen=True)
class Renderer:
    """The one way from (prompt, response) to tokens; made by `make_renderer`.

    Attributes:
        template: which rule (see the module).
        prefix, suffix: token ids put before and after the tokens of the text.
        special_ids: ids that count as special tokens.
        chat: the chat template, if there is one.
    """

    tokenizer: Any
    max_length: int
    truncation: Truncation
    template: Literal["chat", "plain"]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    special_ids: frozenset[int]
    chat: ChatTemplate | None = None

    def side(self, prompt: Messages, response: str) -> RenderedSide:
        """Render one side. Raises SideDropped when the model can't read it."""
        rendered = self.sides([(prompt, response)])[0]
        if isinstance(rendered, SideDropped):
            raise rendered
        return rendered

    def sides(self, requests: Sequence[tuple[Messages, str]]) -> list[RenderedSide | SideDropped]:
        """Render many sides in one call of the tokenizer; those that can't be read are SideDropped values, in place."""
        frames: dict[tuple[Message, ...], Frame | SideDropped] = {}
        layouts = [self._lay_out(tuple(prompt), response, frames) for prompt, response in requests]
        texts = [layout.text for layout in layouts if isinstance(layout, Layout)]
        encodings = iter(_encode(self.tokenizer, texts))
        return [self._cut(layout, *next(encodings)) if isinstance(layout, Layout) else layout for layout in layouts]

    def _lay_out(
        self, prompt: tuple[Message, ...], response: str, frames: dict[tuple[Message, ...], Frame | SideDropped]
    ) -> Layout | SideDropped:
        if not response.strip():
            return SideDropped(Drop.EMPTY_SIDE, "the response is empty")
        if self.chat is None:
            before = f"{role_marked(prompt)}\n\nAssistant: " if prompt else ""
            return Layout(before + response, len(before), len(before) + len(response))
        if prompt not in frames:
            frames[prompt] = frame_of(self.chat, prompt)
        frame = frames[prompt]
        return frame if isinstance(frame, SideDropped) else place(self.chat, prompt, response, frame)

    def _cut(self, layout: Layout, ids: NDArray[np.int32], offsets: NDArray[np.int32]) -> RenderedSide | SideDropped:
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
    chat = load_template(tokenizer) if tokenizer.chat_template else None
    special = frozenset(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    probe = check_template(chat) if chat is not None else PROBE_RESPONSE
    written = _encode(tokenizer, [probe])[0][0].tolist()
    add = not special.intersection(written) if (template, add_special_tokens) == ("chat", "auto") else bool(add_special_tokens)
    prefix, suffix = _added_tokens(tokenizer, written) if add else ((), ())
    if add and template == "plain" and not suffix and _wants_end_token(tokenizer):
        suffix = (int(tokenizer.eos_token_id),)
    renderer = Renderer(tokenizer, max_length, truncation, template, prefix, suffix, special, chat)
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


def _added_tokens(tokenizer: Any, written: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Special tokens the tokenizer puts before and after a text, less those that `written` already begins or ends with."""
    inner = tokenizer(PROBE_RESPONSE, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
    whole = tokenizer(PROBE_RESPONSE, add_special_tokens=True, truncation=False, padding=False)["input_ids"]
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
    side = probe.side(PROBE_PROMPT, PROBE_RESPONSE)
    ids = side.ids[side.start : side.end]
    if renderer.tokenizer.unk_token_id in ids:
        return
    read = squeezed(str(renderer.tokenizer.decode(ids.tolist()))).casefold()
    if squeezed(PROBE_RESPONSE).casefold() not in read:
        raise ModelRefused(
            f"the tokens found for the response {PROBE_RESPONSE!r} decode to {read!r}",
            "the tokenizer's offsets are unreliable: save it anew with a current version of Transformers",
        )
