"""`X-Credits-Remaining`: what is left, beside any answer of the application."""

from __future__ import annotations

from ..errors import InsufficientCreditsError
from ..records import Balance

__all__ = ["CREDITS_REMAINING", "credits_headers"]

CREDITS_REMAINING = "X-Credits-Remaining"


def credits_headers(balance: Balance | InsufficientCreditsError, /) -> dict[str, str]:
    """
    The header that tells what is available: of a balance, or of a refusal. `{"X-Credits-Remaining": "17"}`, or "unlimited".

    A browser lets scripts of another origin read it only where `Access-Control-Expose-Headers` names it.
    """
    available = balance.available
    return {CREDITS_REMAINING: "unlimited" if available is None else str(available)}
