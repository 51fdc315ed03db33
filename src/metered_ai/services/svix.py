"""Signatures of webhooks in the Svix scheme: HMAC-SHA256 over `id.timestamp.body`."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping

from ..errors import ConfigurationError

__all__ = ["check_signature"]

PAST, FUTURE = 300, 60
"""Seconds that a message may be older or newer than now."""


def check_signature(body: bytes, headers: Mapping[str, str], secret: str, now: float) -> None:
    """
    Return if one of the signatures in `svix-signature` is ours for this body, id and time, else raise ValueError.

    `secret` is `whsec_` and base64; ConfigurationError if it is not. A message is good from 300 s back to 60 s ahead of `now`.
    The scheme: https://docs.svix.com/receiving/verifying-payloads/how-manual
    """
    key = _key(secret)
    given = {name.lower(): value for name, value in headers.items()}
    message_id, sent, signatures = (given.get(f"svix-{name}", "") for name in ("id", "timestamp", "signature"))
    if not (message_id and sent and signatures):
        raise ValueError("this is no signed webhook: svix-id, svix-timestamp or svix-signature is missing")
    if not (sent.isascii() and sent.isdigit() and len(sent) <= 15):
        raise ValueError("the webhook's svix-timestamp is not a time in seconds")
    if not now - PAST <= int(sent) <= now + FUTURE:
        raise ValueError(f"the webhook was signed at {sent}, too far from now ({int(now)}): a replay, or a wrong clock")

    expected = hmac.new(key, f"{message_id}.{sent}.".encode() + body, hashlib.sha256).digest()
    is_good = False
    for signature in signatures.split(" "):
        version, _, value = signature.partition(",")
        if version == "v1":
            # Each is compared, so that the time taken tells nothing.
            is_good |= hmac.compare_digest(base64.b64encode(expected), value.encode())
    if not is_good:
        raise ValueError("the webhook's signature is not ours: another secret, or a forged or altered message")


def _key(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not key:
        raise ConfigurationError("a webhook secret is whsec_ followed by base64")
    return key
