"""The row layouts that are understood: how each turns one row into the two sides of one or several pairs.

A parser takes a row (a mapping of columns) and returns its pairs. It raises MalformedCell when a cell isn't what the
layout says and `NoPreference` when the row states a tie, `Unrated` when it states nothing; it never repairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

from safer_engine.science.messages import MalformedCell, Message, is_transcript, message_cell, normalised, text_cell, transcript
from safer_engine.science.winners import Winner

Row = Mapping[str, Any]
Label = Literal["safer", "better"]
RMBENCH_STYLES = ("concise", "detailed-plain", "detailed-markdown")
"""RM-Bench's styles, in the order of its lists."""
_MOST_PAIRS = 1024


class NoPreference(ValueError):
    """The row states that neither side is better."""


class Unrated(ValueError):
    """The row does not say which side is better."""


@dataclass(frozen=True, slots=True)
class Sides:
    """One pair of a row.

    Attributes:
        prompt: messages both sides share.
        chosen, rejected: what follows on each side; the last message is the response, of role assistant.
        style: which styles are compared, where the layout says.
        item: None, or which of the row's best-of-N questions the pair belongs to.
        strength: size of the preference, in the layout's own units.
        annotators: individual preferences, positive for the chosen side.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    style: str | None = None
    item: int | None = None
    strength: float | None = None
    annotators: tuple[int, ...] | None = None


Parser = Callable[[Row, Label], list[Sides]]


def split_sides(prompt: Any, chosen: Any, rejected: Any) -> Sides:
    """Three cells as prompt and sides.

    Sides are text, message lists or "Human: … Assistant: …" transcripts; sides that hold a whole conversation are split
    at the end of what they share. `prompt` is text, messages, a transcript, or None where the sides hold it.
    """
    sides = [_conversation(cell) for cell in (chosen, rejected)]
    lead = _prompt_messages(prompt)
    if sides[0] is None or sides[1] is None:
        if sides[0] is not sides[1]:
            raise MalformedCell("one side is text and the other a conversation")
        texts = text_cell(chosen), text_cell(rejected)
        if prompt is not None:
            return Sides(lead, _response(texts[0]), _response(texts[1]))
        return _split_texts(*texts)
    return _split_conversations(*(_with_lead(lead, side) for side in (sides[0], sides[1])))


def parse_trl(row: Row, label: Label) -> list[Sides]:
    """`[prompt,] chosen, rejected`: TRL's layouts, explicit or implicit prompt, conversational or plain."""
    if "prompt" in row and row["prompt"] is None and isinstance(row["chosen"], str) and not is_transcript(row["chosen"]):
        raise MalformedCell("the prompt is missing")
    return [split_sides(row.get("prompt"), row["chosen"], row["rejected"])]


def parse_anthropic(row: Row, label: Label) -> list[Sides]:
    """`chosen, rejected`: whole transcripts; their common turns are the prompt."""
    if not (is_transcript(row["chosen"]) and is_transcript(row["rejected"])):
        raise MalformedCell("a side is not a Human/Assistant transcript")
    return [split_sides(None, row["chosen"], row["rejected"])]


def parse_ultrafeedback(row: Row, label: Label) -> list[Sides]:
    """`prompt, chosen, rejected` as whole conversations, with `score_chosen`, `score_rejected`."""
    return parse_trl(row, label)


def parse_rewardbench(row: Row, label: Label) -> list[Sides]:
    """`prompt, chosen, rejected`, either side possibly a list: every chosen against every rejected.

    The pairs of one chosen response form a best-of-N item, numbered from 1, where there are several.
    """
    chosen, rejected = _alternatives(row["chosen"]), _alternatives(row["rejected"])
    if len(chosen) * len(rejected) > _MOST_PAIRS:
        raise MalformedCell(f"{len(chosen)} chosen and {len(rejected)} rejected responses in one row")
    several = len(chosen) * len(rejected) > 1
    return [
        replace(split_sides(row["prompt"], good, bad), item=i if several else None)
        for i, good in enumerate(chosen, 1)
        for bad in rejected
    ]


def parse_rmbench(row: Row, label: Label) -> list[Sides]:
    """`prompt, chosen, rejected` with one response per style on each side: every style against every style.

    `style` is "a:b": chosen in style a against rejected in style b, named by `RMBENCH_STYLES` where there are three, else
    by their places in the lists.
    """
    chosen, rejected = _alternatives(row["chosen"]), _alternatives(row["rejected"])
    if len(chosen) != len(rejected):
        raise MalformedCell(f"{len(chosen)} chosen and {len(rejected)} rejected styles")
    names = RMBENCH_STYLES if len(chosen) == len(RMBENCH_STYLES) else tuple(str(place) for place in range(len(chosen)))
    return [
        replace(split_sides(row["prompt"], good, bad), style=f"{a}:{b}")
        for a, good in zip(names, chosen, strict=True)
        for b, bad in zip(names, rejected, strict=True)
    ]


def parse_pku(row: Row, label: Label) -> list[Sides]:
    """`prompt, response_0, response_1` and which of them is safer or better (`label` says which column counts)."""
    preferred = row.get(f"{label}_response_id")
    number = None if preferred is None else _number(preferred)
    if number not in (0, 1):
        raise MalformedCell(f"{label}_response_id is {preferred!r}, not 0 or 1")
    first, second = row["response_0"], row["response_1"]
    good, bad = (second, first) if number else (first, second)
    return [split_sides(row["prompt"], text_cell(good), text_cell(bad))]


def parse_helpsteer3(row: Row, label: Label) -> list[Sides]:
    """`context, response1, response2, overall_preference`: −3 (the first is much better) … 3 (the second is), whole numbers."""
    preference = _number(row["overall_preference"])
    if abs(preference) > 3 or preference != int(preference):
        raise MalformedCell(f"overall_preference is {preference:g}, not a whole number from -3 to 3")
    if preference == 0:
        raise NoPreference
    first, second = text_cell(row["response1"]), text_cell(row["response2"])
    good, bad = (second, first) if preference > 0 else (first, second)
    annotators = _annotators(row.get("individual_preference"), 1 if preference > 0 else -1)
    return [replace(split_sides(row["context"], good, bad), strength=abs(preference), annotators=annotators)]


def parse_helpsteer2(row: Row, label: Label) -> list[Sides]:
    """`prompt, response_1, response_2, preference_strength`: −3 (the first is much better) … 3 (the second is), whole numbers."""
    preference = _number(row["preference_strength"])
    if abs(preference) > 3 or preference != int(preference):
        raise MalformedCell(f"preference_strength is {preference:g}, not a whole number from -3 to 3")
    if preference == 0:
        raise NoPreference
    first, second = text_cell(row["response_1"]), text_cell(row["response_2"])
    good, bad = (second, first) if preference > 0 else (first, second)
    annotators = _annotators(row.get("individual_preference"), 1 if preference > 0 else -1)
    return [replace(split_sides(row["prompt"], good, bad), strength=abs(preference), annotators=annotators)]


def with_opinions(row: Row, pairs: list[Sides]) -> list[Sides]:
    """The pairs with the row's own `strength` (or `margin`) and `annotators`, where its layout has none of its own."""
    strength, annotators = _strength(row), _annotators(row.get("annotators"), 1)
    return [
        replace(
            sides,
            strength=strength if sides.strength is None else sides.strength,
            annotators=annotators if sides.annotators is None else sides.annotators,
        )
        for sides in pairs
    ]


def parse_scored(row: Row, label: Label) -> list[Sides]:
    """Scored responses: `response_a, response_b, score_a, score_b`, or lists `responses, scores` (best against worst)."""
    if "responses" in row:
        responses, scores = row["responses"], row["scores"]
        for cell in (responses, scores):
            if not isinstance(cell, (list, tuple)):
                raise MalformedCell("responses and scores must be lists")
    else:
        responses, scores = [row["response_a"], row["response_b"]], [row["score_a"], row["score_b"]]
    if len(responses) != len(scores) or len(scores) < 2:
        raise MalformedCell(f"{len(responses)} responses and {len(scores)} scores")
    values = [_number(score) for score in scores]
    if max(values) == min(values):
        raise NoPreference
    best, worst = values.index(max(values)), values.index(min(values))
    sides = split_sides(row["prompt"], responses[best], responses[worst])
    return [replace(sides, strength=_difference(values[best], values[worst]))]


def parse_winner(row: Row, winner: Winner | None) -> list[Sides]:
    """`[prompt,] response_a, response_b` and a winner column, whose meaning is `winner`."""
    if winner is None:
        raise Unrated
    if winner == "tie":
        raise NoPreference
    first, second = row["response_a"], row["response_b"]
    if "prompt" in row and row["prompt"] is None and isinstance(first, str) and not is_transcript(first):
        raise MalformedCell("the prompt is missing")
    good, bad = (first, second) if winner == "a" else (second, first)
    return [split_sides(row.get("prompt"), good, bad)]


def is_text_list(cell: Any) -> TypeGuard[list[str]]:
    """Whether a cell is a non-empty list of texts (several responses, not one conversation)."""
    return isinstance(cell, (list, tuple)) and bool(cell) and all(isinstance(item, str) for item in cell)


def _alternatives(cell: Any) -> Sequence[Any]:
    return list(cell) if is_text_list(cell) else [cell]


def _response(text: str) -> tuple[Message, ...]:
    return (Message("assistant", text),)


def _conversation(cell: Any) -> tuple[Message, ...] | None:
    return transcript(cell) if is_transcript(cell) else message_cell(cell)


def _prompt_messages(cell: Any) -> tuple[Message, ...]:
    if cell is None or cell == "":
        return ()
    if is_transcript(cell) or (isinstance(cell, str) and cell.startswith("\n\nHuman:")):
        turns = transcript(cell)
        return turns[:-1] if turns[-1] == Message("assistant", "") else turns
    return message_cell(cell) or (Message("user", text_cell(cell)),)


def _with_lead(lead: tuple[Message, ...], side: tuple[Message, ...]) -> tuple[Message, ...]:
    """A side with the prompt before it, unless the side already holds the prompt."""
    spoken = {(message.role, normalised(message.content)) for message in side[:-1]}
    held = bool(lead) and all((message.role, normalised(message.content)) in spoken for message in lead)
    return side if held else lead + side


def _split_conversations(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> Sides:
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    for side in (chosen, rejected):
        if side[-1].role != "assistant":
            raise MalformedCell(f"a side that ends with a turn of the {side[-1].role}")
        if side[-1].extra and json.loads(side[-1].extra).keys() - {"name", "tool_call_id"}:
            raise MalformedCell("a response with tool calls or separate reasoning")
    tails = [(*side[shared:-1], Message("assistant", side[-1].content)) for side in (chosen, rejected)]
    return Sides(chosen[:shared], tails[0], tails[1])


def _split_texts(chosen: str, rejected: str) -> Sides:
    """Plain texts with the prompt inside: it is what they share, back to the last white space."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and not chosen[shared - 1].isspace():
        shared -= 1
    prompt = chosen[:shared].strip()
    lead = (Message("user", prompt),) if prompt else ()
    return Sides(lead, _response(chosen[shared:]), _response(rejected[shared:]))


def _number(cell: Any) -> float:
    """A finite number, also written as text (CSV)."""
    if isinstance(cell, bool) or not isinstance(cell, (int, float, str)):
        raise MalformedCell(f"{type(cell).__name__} where a number is expected")
    try:
        value = float(cell)
    except ValueError:
        raise MalformedCell(f"{str(cell)[:40]!r} where a number is expected") from None
    except OverflowError:
        raise MalformedCell("a number beyond all measure") from None
    if not math.isfinite(value):
        raise MalformedCell(f"{value} where a number is expected")
    return value


def _difference(larger: float, smaller: float) -> float:
    """A difference of scores; those whose difference is not finite are no scores."""
    found = larger - smaller
    if not math.isfinite(found):
        raise MalformedCell("scores whose difference is beyond all measure")
    return found


def _strength(row: Row) -> float | None:
    if row.get("score_chosen") is not None and row.get("score_rejected") is not None:
        return _difference(_number(row["score_chosen"]), _number(row["score_rejected"]))
    for name in ("strength", "margin"):
        if row.get(name) not in (None, ""):
            return _number(row[name])
    return None


def _annotators(cell: Any, sign: int) -> tuple[int, ...] | None:
    """Individual preferences (numbers, or mappings with a `score`) as whole numbers, turned towards the chosen side."""
    if cell is None or cell == "":
        return None
    if not isinstance(cell, (list, tuple)):
        raise MalformedCell("individual preferences must be a list")
    values = [_number(item.get("score") if isinstance(item, Mapping) else item) for item in cell]
    if any(abs(value) > 127 or value != int(value) for value in values):
        raise MalformedCell("individual preferences must be whole numbers from -127 to 127")
    return tuple(sign * int(value) for value in values)
