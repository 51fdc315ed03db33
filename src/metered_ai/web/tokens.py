"""Signed tokens that are short-lived: who holds one may see what it names, for minutes."""

from __future__ import annotations

import hmac
import json
import secrets
import threading
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

__all__ = ["LONGEST", "Tokens"]

LONGEST = 15 * 60
"""Seconds that a token is good for, at most."""

_SIZE = 4096
"""No token of ours is longer: what is, is not even looked at."""


class Tokens:
    """
    Signs and reads tokens with a key that never leaves this object (HMAC-SHA-256, compared in constant time).

    - What a token is for is signed with the rest, so that none serves another purpose.
    - It is good for `LONGEST` seconds at most, and a token that is `spent` is good once.
    - A token says nothing that its holder may not know: it is signed, not hidden.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._key = secrets.token_bytes(32)
        self._clock = clock
        self._spent: dict[str, float] = {}
        self._lock = threading.Lock()

    def sign(self, purpose: str, seconds: float, content: Mapping[str, Any] | None = None) -> str:
        """A token for one purpose, with what it allows in `content`."""
        payload = {
            "for": purpose,
            "id": secrets.token_urlsafe(12),
            "until": self._clock() + min(seconds, LONGEST),
            "content": dict(content or {}),
        }
        body = _encode(json.dumps(payload, separators=(",", ":")).encode())
        return f"{body}.{self._signature(body)}"

    def read(self, token: str, purpose: str) -> dict[str, Any] | None:
        """What a token allows; None if it is not ours, is over, is for something else, or was spent."""
        payload = self._payload(token, purpose)
        if payload is None or payload["id"] in self._spent:
            return None
        content: dict[str, Any] = payload["content"]
        return content

    def spend(self, token: str, purpose: str) -> dict[str, Any] | None:
        """`read`, once: whoever comes second gets None."""
        payload = self._payload(token, purpose)
        if payload is None:
            return None
        with self._lock:
            now = self._clock()
            self._spent = {each: until for each, until in self._spent.items() if until > now}
            if payload["id"] in self._spent:
                return None
            self._spent[payload["id"]] = payload["until"]
        content: dict[str, Any] = payload["content"]
        return content

    def _payload(self, token: str, purpose: str) -> dict[str, Any] | None:
        body, separator, signature = token.partition(".")
        if not separator or len(token) > _SIZE or not token.isascii():
            return None
        # Nothing of it is read before the signature is found good.
        if not hmac.compare_digest(self._signature(body), signature):
            return None
        payload: dict[str, Any] = json.loads(urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        if payload["for"] != purpose or payload["until"] <= self._clock():
            return None
        return payload

    def _signature(self, body: str) -> str:
        return _encode(hmac.new(self._key, body.encode(), sha256).digest())


def _encode(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()
