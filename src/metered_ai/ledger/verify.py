"""Recomputes every invariant of a ledger from its records, account by account."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from ..core import funds
from .accounts import Account, grant_funds
from .reading import Fetch
from .reports import Verification
from .rows import Row
from .statements import read_statements

__all__ = ["verify"]

_SQL = read_statements("verify.sql")
_PAGE = 500


def verify(snapshot: Callable[[], AbstractContextManager[Fetch]]) -> Verification:
    """Each violation becomes one sentence with its customer, meter and numbers. Each account is read as of one moment."""
    with snapshot() as fetch:
        broken = [f"the file is damaged: {text}" for (text,) in fetch(_SQL["file"], ()) if text != "ok"]
        broken += [
            f"a row of {table} names an account that does not exist" for table, *_ in fetch(_SQL["references"], ())
        ]
    totals = [0] * 7
    key = 0
    while True:
        with snapshot() as fetch:
            numbers = [no for (no,) in fetch(_SQL["accounts"], (key, _PAGE))]
        for no in numbers:
            with snapshot() as fetch:
                counts, sentences = _account(fetch, no)
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
            broken += sentences
        if len(numbers) < _PAGE:
            accounts, events, grants, open_holds, in_doubt, in_doubt_amount, debt = totals
            return Verification(accounts, events, grants, open_holds, in_doubt, in_doubt_amount, debt, tuple(broken))
        key = numbers[-1]


def _account(fetch: Fetch, no: int) -> tuple[list[int], list[str]]:
    (row,) = fetch(_SQL["account"], (no,))
    account = Account.of(row[13], row[14], row)
    counters = account.funds
    first, last = (no << 32) + 1, (no << 32) + 0xFFFFFFFF
    (sums,) = fetch(_SQL["event_sums"], (first, last))
    (holds,) = fetch(_SQL["hold_sums"], (no,))
    (doubt,) = fetch(_SQL["doubt"], (no,))
    service = fetch(_SQL["service_sums"], (no, first, last))
    grants = [(grant[8], grant_funds(grant)) for grant in fetch(_SQL["grants"], (no,))]
    limit = sum(grant.amount - grant.expired - grant.revoked for _, grant in grants)

    broken = []
    if service:
        # Its limit follows from what the service says.
        limit = counters.limit
    for what, stored, counted in (
        ("the limit is {}, its grants amount to {}", counters.limit, limit),
        ("used is {}, its limited events sum to {}", counters.used, sums[0]),
        ("unlimited_used is {}, its unlimited events sum to {}", account.unlimited_used, sums[1]),
        ("it counts {} events and has {}", account.events, sums[2]),
        ("held is {}, its open limited holds sum to {}", counters.held, holds[0]),
        ("unlimited_held is {}, its open unlimited holds sum to {}", account.unlimited_held, holds[1]),
        ("it counts {} open holds and has {}", account.open_holds, holds[2]),
        ("allocated is {}, its grants have spent {}", counters.allocated, sum(grant.spent for _, grant in grants)),
        ("kept is {}, its grants keep {}", counters.kept, sum(grant.kept for _, grant in grants)),
    ):
        if stored != counted:
            broken.append(what.format(stored, counted))
    broken += _counters(account, sums[3] or 0)
    for grant_id, grant in grants:
        broken += (f"grant {grant_id!r} {sentence}" for sentence in _grant(grant))
    due = funds.next_expiry(grant for _, grant in grants)
    if due is not None and (account.next_expiry is None or account.next_expiry > due):
        broken.append(f"its next expiry is noted for {account.next_expiry}, a grant expires at {due}")
    broken += _events_and_holds(fetch, no, first, last)
    if service:
        broken += _deliveries(fetch, service[0], sums[0] + sums[1], first, last)

    free = counters.limit - counters.used - counters.held
    counts = [1, sums[2], len(grants), holds[2], doubt[0], doubt[1], max(0, -free)]
    return counts, [f"customer {account.customer!r}, meter {account.meter!r}: {sentence}" for sentence in broken]


def _deliveries(fetch: Fetch, service: Row, used: int, first: int, last: int) -> Iterator[str]:
    """The service has been told of every event, or will be; and of none twice."""
    acknowledged, corrected, delivered, undelivered = service
    if acknowledged != delivered:
        yield f"the service has acknowledged {acknowledged}, deliveries sum to {delivered}"
    if used != delivered + undelivered + corrected:
        yield f"its events sum to {used}, of which {delivered} are delivered, {undelivered} are not and {corrected} were taken back"
    for (name,) in fetch(_SQL["events_untold"], (first, last)):
        yield f"usage event {name!r} is neither delivered nor in the outbox"
    for (name,) in fetch(_SQL["events_told_and_untold"], (first, last)):
        yield f"usage event {name!r} is delivered and in the outbox"


def _counters(account: Account, last_event_at: int) -> Iterator[str]:
    counters = account.funds
    for name, value in (
        ("limit", counters.limit),
        ("used", counters.used),
        ("held", counters.held),
        ("unlimited_used", account.unlimited_used),
        ("unlimited_held", account.unlimited_held),
        ("kept", counters.kept),
    ):
        if value < 0:
            yield f"{name} is {value}, below 0"
    if not 0 <= counters.allocated <= counters.used:
        yield f"grants have spent {counters.allocated} of {counters.used} used"
    if counters.kept > counters.held:
        yield f"expired grants keep {counters.kept} for open holds of {counters.held}"
    if last_event_at > account.last_event_at:
        yield f"an event is of {last_event_at}, after the last one noted ({account.last_event_at})"


def _grant(grant: funds.GrantFunds) -> Iterator[str]:
    parts = (
        f"{grant.spent} spent, {grant.expired} expired, {grant.revoked} revoked, {grant.kept} kept of {grant.amount}"
    )
    if (
        min(grant.spent, grant.expired, grant.revoked, grant.kept) < 0
        or grant.remainder < 0
        or grant.kept > grant.remainder
    ):
        yield f"does not add up: {parts}"
    if grant.is_over and grant.remainder != grant.kept:
        yield f"has expired and still has something left: {parts}"
    if not grant.is_over and grant.kept:
        yield f"keeps something although it has not expired: {parts}"


def _events_and_holds(fetch: Fetch, no: int, first: int, last: int) -> Iterator[str]:
    for (name,) in fetch(_SQL["doubled_events"], (no,)):
        yield f"there are several usage events {name!r}"
    for name, kind in fetch(_SQL["events_without_hold"], (first, last)):
        yield f"usage event {name!r} of kind {kind} names no hold"
    for (name,) in fetch(_SQL["events_out_of_order"], (first, last)):
        yield f"usage event {name!r} is not after the one before it"
    for (hold_id,) in fetch(_SQL["holds_open_and_ended"], (no,)):
        yield f"hold {hold_id!r} is open and has ended"
    for hold_id, state, events in _states(fetch, no):
        yield f"hold {hold_id!r} is {state} and has {events} usage events"


def _states(fetch: Fetch, no: int) -> Iterator[Row]:
    yield from fetch(_SQL["open_holds_with_events"], (no,))
    yield from fetch(_SQL["ended_holds_with_wrong_events"], (no,))
