"""The key of a labelling endpoint, which is in the environment and nowhere else."""

from __future__ import annotations

import os
import re

from safer_engine.errors import SpecError
from safer_engine.spec_labels import ChatApiLabeller

_HEADER_VALUE = re.compile(r"[\x21-\x7e]+")


def endpoint_key(spec: ChatApiLabeller) -> str | None:
    """The key that a labeller sends; None where it needs none.

    Raises:
        SpecError: the environment variable that is to hold it holds no key.
    """
    name = spec.api_key_env
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        hint = f"set {name}, or set labels.labeller.api_key_env to null for an endpoint without a key"
        raise SpecError(f"the labeller needs a key, and the environment variable {name} holds none", hint)
    if not _HEADER_VALUE.fullmatch(key):
        raise SpecError(f"the environment variable {name} holds characters that no key has", f"set {name} anew")
    return key
