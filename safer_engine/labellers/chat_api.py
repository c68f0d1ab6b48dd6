"""A labeller that asks a language model behind any OpenAI-compatible chat endpoint.

The key is read from the environment when a request is made, goes into that request's header and nowhere else: not into
the spec, a log, an artifact or an error. Redirects are not followed, so it is sent to no other host.
"""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from safer_engine.errors import LabellerError, SpecError
from safer_engine.labellers.endpoint_key import endpoint_key
from safer_engine.labellers.model_labeller import Answers, ModelLabeller, Reply
from safer_engine.labellers.prompts import Prompt
from safer_engine.labellers.rubric import Rubric
from safer_engine.spec_labels import ChatApiLabeller as ChatApiSpec

_RETRIED = frozenset({408, 409, 429})
_MISCONFIGURED = frozenset({401, 403, 404, 405})
_MAX_BODY = 1 << 20
_CHARACTERS_PER_TOKEN = 3


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


class ChatApiLabeller(ModelLabeller):
    """Asks a model behind an endpoint. `calls` counts requests, retries included."""

    def __init__(self, spec: ChatApiSpec, rubric: Rubric, answers: Answers, patience: Patience | None = None) -> None:
        super().__init__(rubric, answers)
        self.spec = spec
        self._patience = patience or Patience()
        self._url = chat_address(spec.base_url)
        self._client: httpx.Client | None = None

    @property
    def name(self) -> str:
        """See `Labeller.name`."""
        return f"chat_api:{self.spec.model}"

    @contextmanager
    def open(self) -> Iterator[None]:
        """See `ModelLabeller.open`."""
        with httpx.Client(timeout=self.spec.timeout, follow_redirects=False) as self._client:
            yield

    def asked(self, prompt: Prompt) -> dict[str, Any]:
        """See `ModelLabeller.asked`."""
        return {"url": self._url, **self._request(prompt)}

    def _refusal(self, prompt: Prompt) -> str | None:
        """Why one more request must not be made, if so."""
        if self.calls >= self.spec.max_calls:
            return f"max_calls = {self.spec.max_calls} was reached"
        limit = self.spec.max_cost
        if limit is not None and self.cost + self._price(_estimated(prompt), self.spec.max_tokens) > limit:
            return f"another call could exceed max_cost = {limit:g}"
        return None

    def _price(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.spec.price_in + tokens_out * self.spec.price_out) / 1e6

    def _request(self, prompt: Prompt) -> dict[str, Any]:
        spec = self.spec
        return {"model": spec.model, "messages": prompt.messages, "temperature": 0, "max_tokens": spec.max_tokens}

    def ask(self, prompt: Prompt) -> Reply:
        """Ask until there is an answer, retrying what may pass."""
        if reason := self._refusal(prompt):
            return Reply(None, reason, skipped=True)
        problem, retry_after = "", None
        for attempt in range(self.spec.retries + 1):
            if attempt:
                if reason := self._refusal(prompt):
                    return Reply(None, f"{problem}; not asked again: {reason}")
                self._patience.before_retry(attempt, retry_after)
            self.calls += 1
            try:
                status, retry_after, body = self._post(self._request(prompt))
            except (httpx.RequestError, _TooSlow) as error:
                problem, retry_after = f"no answer ({type(error).__name__.lstrip('_')})", None
                continue
            if status == 200:
                content = self._read(body, prompt)
                if content is not None:
                    return Reply(content)
                problem = "the body is no chat completion"
            else:
                problem = f"HTTP {status}"
                if status not in _RETRIED and status < 500:
                    self._refuse_misconfiguration(status)
                    return Reply(None, problem)
        return Reply(None, f"{problem} after {self.spec.retries + 1} attempts")

    def _post(self, request: dict[str, Any]) -> tuple[int, float | None, bytes]:
        """Status, Retry-After in seconds, and body of one request; the time limit holds for the whole of it."""
        deadline = time.monotonic() + self.spec.timeout
        body = bytearray()
        if self._client is None:
            raise LabellerError("the endpoint is asked outside of open()")
        with self._client.stream("POST", self._url, json=request, headers=self._headers()) as response:
            for part in response.iter_bytes():
                body += part
                if len(body) > _MAX_BODY or time.monotonic() > deadline:
                    raise _TooSlow
            return response.status_code, _retry_after(response.headers.get("retry-after")), bytes(body)

    def _headers(self) -> dict[str, str]:
        key = endpoint_key(self.spec)
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    def _read(self, body: bytes, prompt: Prompt) -> str | None:
        """The answer's text and its price; None where the body is no chat completion."""
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            document = None
        content = _content(document)
        tokens_in, tokens_out = _usage(document)
        self.cost += self._price(
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
