"""Labellers: what a latent is about, from the contexts it fires in. One file is one kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safer_engine.errors import LabellerError
from safer_engine.labellers.base import Labeller
from safer_engine.labellers.rubric import Rubric
from safer_engine.spec_labels import ChatApiLabeller as ChatApiSpec
from safer_engine.spec_labels import Labeller as LabellerSpec
from safer_engine.spec_labels import LocalLmLabeller as LocalLmSpec

if TYPE_CHECKING:
    from safer_engine.labellers.local_lm import LocalModel
    from safer_engine.labellers.model_labeller import Answers


def make_labeller(spec: LabellerSpec, rubric: Rubric, answers: Answers, model: LocalModel | None = None) -> Labeller:
    """The labeller a spec asks for.

    Args:
        answers: where answers of a model are kept across restarts.
        model: the files of a local one.
    """
    if isinstance(spec, ChatApiSpec):
        from safer_engine.labellers.chat_api import ChatApiLabeller

        return ChatApiLabeller(spec, rubric, answers)
    if isinstance(spec, LocalLmSpec):
        from safer_engine.labellers.local_lm import LocalLmLabeller

        if model is None:
            raise LabellerError("the local labelling model was not found before the audit began")
        return LocalLmLabeller(spec, rubric, answers, model)
    from safer_engine.labellers.lexicon import LexiconLabeller

    return LexiconLabeller(rubric)
