"""Turns rows into records, and times into microseconds and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import Any

from ..records import Usage, UsageEvent

__all__ = ["Row", "event_of", "microseconds", "moment", "packed", "unpacked", "usage_columns"]

Row = tuple[Any, ...]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# Up to here (the year 2223) a float of seconds still tells each microsecond.
_EXACT = 8 * 10**15
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

_columns = attrgetter(*Usage.__slots__)
_NO_USAGE: Row = (None,) * 12


def moment(microseconds: int) -> datetime:
    """The time as the records show it, in UTC."""
    if 0 <= microseconds < _EXACT:
        return datetime.fromtimestamp(microseconds / 1_000_000, UTC)
    return _EPOCH + timedelta(microseconds=microseconds)


def microseconds(time: object, what: str) -> int:
    """Microseconds since 1970 of an aware datetime; a naive one is a ValueError, because nobody can know which hour it means."""
    if not isinstance(time, datetime) or time.utcoffset() is None:
        raise ValueError(f"{what} must be a datetime with a time zone, not {time!r}")
    return (time - _EPOCH) // _MICROSECOND


def packed(properties: Mapping[str, Any] | None) -> str | None:
    """Properties as JSON; what JSON cannot say is a ValueError."""
    if properties is None:
        return None
    try:
        return _encode(dict(properties))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"properties must be what JSON can hold: {error}") from error


def unpacked(text: str | None) -> dict[str, Any] | None:
    return None if text is None else json.loads(text)


def usage_columns(usage: Usage | None) -> Row:
    """The usage columns of an event: each field of `Usage`, in its order."""
    return _NO_USAGE if usage is None else _columns(usage)


def event_of(
    customer: str, meter: str, row: Row, reference: str | None = None, details: str | None = None
) -> UsageEvent:
    """A usage event from the columns that the statements select for one, in their order; and what a service made of it."""
    return UsageEvent(
        customer=customer,
        meter=meter,
        transaction_id=row[1],
        amount=row[2],
        created_at=moment(row[0]),
        basis=row[3],
        kind=row[4],
        hold_id=row[5],
        usage=Usage(*row[14:26]) if row[13] else None,
        request_id=row[8],
        attempts=row[9],
        properties=unpacked(row[12]),
        price_slug=row[10],
        parent=row[11],
        is_unlimited=bool(row[6]),
        is_late=bool(row[7]),
        reference=reference,
        delivered=unpacked(details),
    )
