"""Labellers: what a latent is about, from the contexts it fires in. One file is one kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safer_engine.labellers.base import Labeller
from safer_engine.labellers.rubric import Rubric
from safer_engine.spec_labels import ChatApiLabeller as ChatApiSpec
from safer_engine.spec_labels import LexiconLabeller as LexiconSpec

if TYPE_CHECKING:
    from safer_engine.labellers.chat_api import Answers


def make_labeller(spec: LexiconSpec | ChatApiSpec, rubric: Rubric, answers: Answers) -> Labeller:
    """The labeller a spec asks for.

    Args:
        answers: where paid answers are kept across restarts.
    """
    if isinstance(spec, ChatApiSpec):
        from safer_engine.labellers.chat_api import ChatApiLabeller

        return ChatApiLabeller(spec, rubric, answers)
    from safer_engine.labellers.lexicon import LexiconLabeller

    return LexiconLabeller(rubric)
