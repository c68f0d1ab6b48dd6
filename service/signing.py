"""Signatures of callbacks, so that a receiver knows who calls: HMAC-SHA256 in the manner of Standard Webhooks.

What is signed is `<id>.<seconds since the epoch>.<body>`; the header holds `v1,<base64 of the HMAC>`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable
from datetime import datetime

from pydantic import SecretStr

PREFIX = "whsec_"
_FEWEST, _MOST = 24, 64


def signing_key(secret: str) -> bytes:
    """The bytes of a secret. Raises ValueError, which does not quote it, for one that is not `whsec_` and base64."""
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True) if secret.startswith(PREFIX) else b""
    except (binascii.Error, ValueError):
        key = b""
    if not _FEWEST <= len(key) <= _MOST:
        raise ValueError(f"a secret is {PREFIX} followed by {_FEWEST} to {_MOST} random bytes in base64")
    return key


def signed_headers(key: bytes, message_id: str, at: datetime, body: bytes) -> dict[str, str]:
    """The headers that go with a body. `message_id`: the same when the message is sent again."""
    seconds = int(at.timestamp())
    mac = hmac.new(key, f"{message_id}.{seconds}.".encode() + body, hashlib.sha256).digest()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(seconds),
        "webhook-signature": f"v1,{base64.b64encode(mac).decode()}",
    }


def signer(secret: SecretStr | None, message_id: str, at: datetime) -> Callable[[bytes], dict[str, str]] | None:
    """Signs the body of a message, as `signed_headers` does; None where no secret is set."""
    if secret is None:
        return None
    return lambda body: signed_headers(signing_key(secret.get_secret_value()), message_id, at, body)
