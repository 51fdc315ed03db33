"""Reads dates as people write them."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

__all__ = ["read_date"]

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def read_date(text: str, what: str, now: datetime) -> datetime:
    """
    A moment: "2026-12-31", "2026-12-31 18:00", ISO 8601 with or without an offset, "now", or from now "+30d", "-12h" (s, m, h, d, w).

    What names no time zone is UTC; a date alone is its first moment. ValueError names the text.
    """
    given = text.strip()
    if given.lower() == "now":
        return now
    try:
        relative = re.fullmatch(r"([+-])(\d{1,9})\s*([smhdw])", given.lower())
        if relative is not None:
            sign, number, unit = relative.groups()
            return now + timedelta(**{_UNITS[unit]: int(f"{sign}{number}")})
        moment = datetime.fromisoformat(re.sub(r"\s*(?:utc|z)$", "+00:00", given, flags=re.IGNORECASE))
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(
            f'{what} must be a date such as "2026-12-31", "2026-12-31 18:00" or "+30d" (UTC), not {text!r}'
        ) from None
