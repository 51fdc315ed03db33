"""Finds the newest usage events of an account without reading its history."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice

from ..billing import Billing
from ..records import UsageEvent

__all__ = ["newest_events"]

_PAGE = 500
"""At most so many events are read at a time, and not many times: what a page costs must not grow with a customer's history."""

_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


def newest_events(billing: Billing, customer: str, meter: str, count: int) -> list[UsageEvent]:
    """
    The newest `count` usage events of one account, newest first.

    A ledger lists them oldest first and finds a time at once. So the time from which on there are at least `count`, but not many more,
    is looked for by bisection; events of one account never share a microsecond.
    """

    def since(start: datetime) -> list[UsageEvent]:
        return list(islice(billing.ledger.usage_events(customer, meter, start), _PAGE + 1))

    found = since(_BEGINNING)
    if len(found) > _PAGE:
        early, late = found[-1].created_at, datetime.now(UTC) + timedelta(days=1)
        while late - early > timedelta(microseconds=1):
            middle = early + (late - early) / 2
            found = since(middle)
            if len(found) > _PAGE:
                early = middle
            elif len(found) < count:
                late = middle
            else:
                break
    return found[::-1][:count]
