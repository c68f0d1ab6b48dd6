"""What labellers that ask a language model have in common: prompts, answers that are kept, and what becomes of bad ones."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from safer_engine.errors import LabellerError
from safer_engine.labellers.base import Candidate, Claim, Judged, Judgements, Labelling, LatentLabel, Progress, Window
from safer_engine.labellers.prompts import UNCLEAR, Prompt, Unparsed, build_check, build_prompt, parse_answer, parse_check
from safer_engine.labellers.rubric import Rubric

WINDOWS_PER_CHECK = 10
"""Passages of one request to check a label: many of them side by side would show by their likeness which are of a kind."""
_MAX_FAILURES_IN_A_ROW = 3


@dataclass(frozen=True)
class Kept:
    """An answer and what it took: requests, retries included, and their price."""

    content: str
    calls: int
    cost: float


class Answers(Protocol):
    """Answers kept by the hash of what was asked, so that nothing is paid for twice."""

    def get(self, key: str) -> Kept | None:
        """The stored answer, if any."""

    def put(self, key: str, answer: Kept) -> None:
        """Store an answer durably."""


@dataclass(frozen=True)
class Reply:
    """What came back: the answer's text, or why there is none; `skipped` where it was not asked for."""

    content: str | None
    problem: str = ""
    skipped: bool = False


class ModelLabeller(ABC):
    """Asks a language model to rate each latent, and to tell where it fires from the label.

    Args:
        answers: where answers are kept; a key covers the model, its settings, the rubric and the whole prompt.
        reserved: texts that the model reads as control tokens.
    """

    def __init__(self, rubric: Rubric, answers: Answers, reserved: Sequence[str] = ()) -> None:
        self.rubric = rubric
        self.calls, self.cost = 0, 0.0
        self._answers = answers
        self._counted = set[str]()
        self._reserved = tuple(reserved)

    @property
    @abstractmethod
    def name(self) -> str:
        """See `Labeller.name`."""

    @property
    def reads_in_order(self) -> bool:
        """See `Labeller.reads_in_order`."""
        return True

    @abstractmethod
    def asked(self, prompt: Prompt) -> dict[str, Any]:
        """All that the answer depends on, besides the rubric."""

    @abstractmethod
    def ask(self, prompt: Prompt) -> Reply:
        """Ask; counts into `calls` and `cost`. Raises LabellerError where nothing can be asked at all."""

    @abstractmethod
    def open(self) -> AbstractContextManager[object]:
        """What asking needs, for the time of a block."""

    def label(self, candidates: Sequence[Candidate], background: Sequence[Window], progress: Progress) -> Labelling:
        """See `Labeller.label`. The background is not used.

        Raises:
            LabellerError: it refuses to be asked, or fails several times in a row.
        """
        before, labels, failures = (self.calls, self.cost), list[LatentLabel](), 0
        with self.open():
            for done, candidate in enumerate(candidates):
                progress(done, len(candidates))
                label = self._label(candidate)
                failures = failures + 1 if label.status == "error" else 0
                self._stop_at(failures, len(candidates), label.explanation)
                labels.append(label)
        return Labelling(tuple(labels), self.calls - before[0], self.cost - before[1])

    def detect(self, claims: Sequence[Claim], progress: Progress) -> Judgements:
        """See `Labeller.detect`.

        Raises:
            LabellerError: as for `label`.
        """
        before, found, failures = (self.calls, self.cost), list[Judged](), 0
        with self.open():
            for done, claim in enumerate(claims):
                progress(done, len(claims))
                judged, failed = self._judge(claim)
                failures = failures + 1 if failed else 0
                self._stop_at(failures, len(claims), judged.problem)
                found.append(judged)
        return Judgements(tuple(found), self.calls - before[0], self.cost - before[1])

    def _stop_at(self, failures: int, n: int, problem: str) -> None:
        if failures == min(_MAX_FAILURES_IN_A_ROW, n):
            raise LabellerError(
                f"the labelling model {self.name} failed for {failures} latents in a row: {problem}",
                "see whether it is up; answers so far are kept, the same command goes on from there",
            )

    def _label(self, candidate: Candidate) -> LatentLabel:
        reply = self._kept(build_prompt(self.rubric, candidate, self._reserved))
        if reply.content is None:
            return LatentLabel(candidate.latent_id, "skipped" if reply.skipped else "error", explanation=reply.problem)
        try:
            answer = parse_answer(reply.content, self.rubric)
        except Unparsed as problem:
            return LatentLabel(candidate.latent_id, "unparsed", explanation=str(problem))
        direction = None if answer.direction == UNCLEAR else answer.direction
        return LatentLabel(candidate.latent_id, "labelled", answer.rating, answer.explanation, direction, tuple(answer.terms))

    def _judge(self, claim: Claim) -> tuple[Judged, bool]:
        """What is said of a claim's windows, and whether a request failed."""
        fires, problem, failed = list[bool | None](), "", False
        for start in range(0, len(claim.windows), WINDOWS_PER_CHECK):
            part = claim.windows[start : start + WINDOWS_PER_CHECK]
            reply = self._kept(build_check(claim.label, part, self._reserved))
            try:
                fires += [None] * len(part) if reply.content is None else parse_check(reply.content, len(part))
                problem, failed = reply.problem or problem, failed or (reply.content is None and not reply.skipped)
            except Unparsed as unparsed:
                fires += [None] * len(part)
                problem = str(unparsed)
        return Judged(tuple(fires), problem), failed

    def _kept(self, prompt: Prompt) -> Reply:
        """The answer that is kept, or else a new one, which is kept from now on.

        What an earlier attempt paid for a kept answer counts here too, so that limits hold across attempts; its requests
        without an answer do not.
        """
        asked = {**self.asked(prompt), "rubric": self.rubric.model_dump(mode="json")}
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        kept = self._answers.get(key)
        if kept is not None:
            if key not in self._counted:
                self._counted.add(key)
                self.calls, self.cost = self.calls + kept.calls, self.cost + kept.cost
            return Reply(kept.content)
        calls, cost = self.calls, self.cost
        reply = self.ask(prompt)
        if reply.content is not None:
            self._answers.put(key, Kept(reply.content, self.calls - calls, self.cost - cost))
            self._counted.add(key)
        return reply
