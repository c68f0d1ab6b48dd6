"""A labeller that asks a language model behind any OpenAI-compatible chat endpoint.

The key is read from the environment when a request is made, goes into that request's header and nowhere else: not into
the spec, a log, an artifact or an error. Redirects are not followed, so it is sent to no other host.
"""

from __future__ import annotations

import email.utils
import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx

from safer_engine.errors import LabellerError, SpecError
from safer_engine.labellers.base import Candidate, Labelling, LatentLabel, Progress, Window
from safer_engine.labellers.endpoint_key import endpoint_key
from safer_engine.labellers.prompts import UNCLEAR, Prompt, Unparsed, build_prompt, parse_answer
from safer_engine.labellers.rubric import Rubric
from safer_engine.spec_labels import ChatApiLabeller as ChatApiSpec

_RETRIED = frozenset({408, 409, 429})
_MISCONFIGURED = frozenset({401, 403, 404, 405})
_MAX_BODY = 1 << 20
_MAX_FAILURES_IN_A_ROW = 3
_CHARACTERS_PER_TOKEN = 3


class Answers(Protocol):
    """Answers kept by the hash of what was asked, so that nothing is paid for twice."""

    def get(self, key: str) -> str | None:
        """The stored answer, if any."""

    def put(self, key: str, answer: str) -> None:
        """Store an answer durably."""


@dataclass(frozen=True)
class Patience:
    """How long is waited between retries: `first` seconds, doubling, never over `longest` (a Retry-After neither)."""

    first: float = 0.5
    longest: float = 60.0
    sleep: Callable[[float], None] = time.sleep

    def before_retry(self, attempt: int, retry_after: float | None) -> None:
        """Wait before retry number `attempt` (1 is the first)."""
        wait = self.first * 2 ** (attempt - 1) if retry_after is None else retry_after
        self.sleep(min(max(0.0, wait), self.longest))


@dataclass(frozen=True)
class _Reply:
    """What came back: the answer's text, or why there is none."""

    content: str | None
    problem: str = ""


@dataclass
class _Ledger:
    """What has been asked and spent."""

    spec: ChatApiSpec
    calls: int = 0
    cost: float = 0.0

    def refusal(self, prompt: Prompt) -> str | None:
        """Why one more request must not be made, if so."""
        if self.calls >= self.spec.max_calls:
            return f"max_calls = {self.spec.max_calls} was reached"
        limit = self.spec.max_cost
        if limit is not None and self.cost + self.price(_estimated(prompt), self.spec.max_tokens) > limit:
            return f"another call could exceed max_cost = {limit:g}"
        return None

    def price(self, tokens_in: int, tokens_out: int) -> float:
        """Price of that many tokens."""
        return (tokens_in * self.spec.price_in + tokens_out * self.spec.price_out) / 1e6


class ChatApiLabeller:
    """Asks a model to rate each latent.

    Args:
        answers: where answers are kept; a key covers the endpoint, the model, the limits and the whole prompt.
    """

    def __init__(self, spec: ChatApiSpec, rubric: Rubric, answers: Answers, patience: Patience | None = None) -> None:
        self.spec = spec
        self.rubric = rubric
        self._answers = answers
        self._patience = patience or Patience()
        self._url = chat_address(spec.base_url)

    @property
    def name(self) -> str:
        """See `Labeller.name`."""
        return f"chat_api:{self.spec.model}"

    def label(self, candidates: Sequence[Candidate], background: Sequence[Window], progress: Progress) -> Labelling:
        """See `Labeller.label`. The background is not used.

        Raises:
            LabellerError: the endpoint refuses the key or the address, or fails several times in a row.
        """
        ledger, labels, failures = _Ledger(self.spec), list[LatentLabel](), 0
        with httpx.Client(timeout=self.spec.timeout, follow_redirects=False) as client:
            for done, candidate in enumerate(candidates):
                progress(done, len(candidates))
                label = self._label(client, candidate, ledger)
                failures = failures + 1 if label.status == "error" else 0
                if failures == min(_MAX_FAILURES_IN_A_ROW, len(candidates)):
                    raise LabellerError(
                        f"the labelling endpoint failed for {failures} latents in a row: {label.explanation}",
                        "see whether it is up; answers so far are kept, the same command goes on from there",
                    )
                labels.append(label)
        return Labelling(tuple(labels), ledger.calls, ledger.cost)

    def _label(self, client: httpx.Client, candidate: Candidate, ledger: _Ledger) -> LatentLabel:
        prompt = build_prompt(self.rubric, candidate)
        key = self._key(prompt)
        content = self._answers.get(key)
        if content is None:
            if reason := ledger.refusal(prompt):
                return LatentLabel(candidate.latent_id, "skipped", explanation=reason)
            reply = self._ask(client, prompt, ledger)
            if reply.content is None:
                return LatentLabel(candidate.latent_id, "error", explanation=reply.problem)
            content = reply.content
            self._answers.put(key, content)
        try:
            answer = parse_answer(content, self.rubric)
        except Unparsed as problem:
            return LatentLabel(candidate.latent_id, "unparsed", explanation=str(problem))
        direction = None if answer.direction == UNCLEAR else answer.direction
        return LatentLabel(candidate.latent_id, "labelled", answer.rating, answer.explanation, direction, tuple(answer.terms))

    def _key(self, prompt: Prompt) -> str:
        asked = {"url": self._url, **self._request(prompt), "rubric": self.rubric.model_dump(mode="json")}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _request(self, prompt: Prompt) -> dict[str, Any]:
        spec = self.spec
        return {"model": spec.model, "messages": prompt.messages, "temperature": 0, "max_tokens": spec.max_tokens}

    def _ask(self, client: httpx.Client, prompt: Prompt, ledger: _Ledger) -> _Reply:
        """Ask until there is an answer, retrying what may pass."""
        problem, retry_after = "", None
        for attempt in range(self.spec.retries + 1):
            if attempt:
                if reason := ledger.refusal(prompt):
                    return _Reply(None, f"{problem}; not asked again: {reason}")
                self._patience.before_retry(attempt, retry_after)
            ledger.calls += 1
            try:
                status, retry_after, body = self._post(client, self._request(prompt))
            except (httpx.RequestError, _TooSlow) as error:
                problem, retry_after = f"no answer ({type(error).__name__.lstrip('_')})", None
                continue
            if status == 200:
                content = self._read(body, prompt, ledger)
                if content is not None:
                    return _Reply(content)
                problem = "the body is no chat completion"
            else:
                problem = f"HTTP {status}"
                if status not in _RETRIED and status < 500:
                    self._refuse_misconfiguration(status)
                    return _Reply(None, problem)
        return _Reply(None, f"{problem} after {self.spec.retries + 1} attempts")

    def _post(self, client: httpx.Client, request: dict[str, Any]) -> tuple[int, float | None, bytes]:
        """Status, Retry-After in seconds, and body of one request; the time limit holds for the whole of it."""
        deadline = time.monotonic() + self.spec.timeout
        body = bytearray()
        with client.stream("POST", self._url, json=request, headers=self._headers()) as response:
            for part in response.iter_bytes():
                body += part
                if len(body) > _MAX_BODY or time.monotonic() > deadline:
                    raise _TooSlow
            return response.status_code, _retry_after(response.headers.get("retry-after")), bytes(body)

    def _headers(self) -> dict[str, str]:
        key = endpoint_key(self.spec)
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    def _read(self, body: bytes, prompt: Prompt, ledger: _Ledger) -> str | None:
        """The answer's text and its price; None where the body is no chat completion."""
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            document = None
        content = _content(document)
        tokens_in, tokens_out = _usage(document)
        ledger.cost += ledger.price(
            _estimated(prompt) if tokens_in is None else tokens_in,
            len(content or "") // _CHARACTERS_PER_TOKEN if tokens_out is None else tokens_out,
        )
        return content

    def _refuse_misconfiguration(self, status: int) -> None:
        if status in _MISCONFIGURED or 300 <= status < 400:
            raise LabellerError(
                f"the labelling endpoint answered HTTP {status}",
                "check labels.labeller.base_url and model, and that the key in "
                f"{self.spec.api_key_env or 'no variable (api_key_env is null)'} is valid",
            ) from None


class _TooSlow(Exception):
    """An answer that took longer, or was longer, than is waited for."""


def chat_address(base_url: str) -> str:
    """The chat address of a base URL. Raises SpecError when it is none, or carries credentials."""
    try:
        parts = urlsplit(base_url)
        httpx.URL(base_url)
    except (ValueError, httpx.InvalidURL):
        raise SpecError("labels.labeller.base_url is no URL") from None
    if "@" in parts.netloc:
        raise SpecError("labels.labeller.base_url carries a user name or password", "put the key into an environment variable")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise SpecError(f"labels.labeller.base_url = {base_url!r} is no http(s) address", "for example https://host/v1")
    return f"{base_url.rstrip('/')}/chat/completions"


def _estimated(prompt: Prompt) -> int:
    """Tokens of a prompt, rather too many than too few."""
    return (len(prompt.system) + len(prompt.user)) // _CHARACTERS_PER_TOKEN + 1


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a Retry-After header (seconds or a date); None when there is none to be read."""
    if value is None:
        return None
    if re.fullmatch(r"\d{1,9}(\.\d{1,6})?", value.strip()):
        return float(value)
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None


def _content(document: Any) -> str | None:
    """`choices[0].message.content`, empty where the model gave none; None where there is no such message."""
    try:
        message = document["choices"][0]["message"]
        content = message.get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    return content if isinstance(content, str) else ""


def _usage(document: Any) -> tuple[int | None, int | None]:
    """Tokens asked and answered, where the endpoint says so in numbers that can be."""
    usage = document.get("usage") if isinstance(document, dict) else None
    if not isinstance(usage, dict):
        return None, None
    found = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    known = [value if type(value) is int and 0 <= value < 1 << 31 else None for value in found]
    return known[0], known[1]
