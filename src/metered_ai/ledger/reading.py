"""Balances and listings: what is read from a ledger's tables, in pages, never in a long transaction."""

from __future__ import annotations

import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any

from ..core import funds
from ..core.checks import check_name
from ..records import Balance, Grant, Hold, UsageEvent, UsageSum
from .accounts import Account, grant_funds
from .rows import Row, event_of, microseconds, moment
from .statements import Statement, read_statements

__all__ = ["Fetch", "Reading"]

_SQL = read_statements("reads.sql")
_PAGE = 500
_STATES = ("open", "released", "expired", "charged")
_SUMMED_BY = ("customer", "day", "meter", "model")

Fetch = Callable[[str, Sequence[Any]], list[Row]]
"""Runs one statement and returns all its rows."""


class Reading(ABC):
    """The reading half of a ledger that keeps tables."""

    @abstractmethod
    def now(self) -> int:
        """The ledger's clock: microseconds since 1970, UTC."""

    @abstractmethod
    def _reading(self) -> AbstractContextManager[Fetch]:
        """Statements run inside see what has been committed."""

    @abstractmethod
    def _snapshot(self) -> AbstractContextManager[Fetch]:
        """Statements run inside see one moment."""

    def balance(self, customer: str, meter: str, /) -> Balance:
        """The balance now. An unknown customer has 0; reading writes nothing."""
        check_name(customer, "customer")
        check_name(meter, "meter")
        with self._reading() as fetch:
            rows = fetch(_SQL["account"], (customer, meter))
        if not rows:
            return Balance(customer, meter, limit=0, used=0, held=0, available=0, debt=0)
        return self._balance(rows[0])

    def balances(self, customer: str, /) -> list[Balance]:
        """The balances of all meters the customer has an account on, by meter."""
        check_name(customer, "customer")
        return [self._balance(row) for row in self._accounts(customer, None)]

    def accounts(self, meter: str | None = None) -> Iterator[Balance]:
        """The balances of every account, in the order they were made. Read in pages."""
        _check_filters(None, meter)
        return (self._balance(row) for row in self._accounts(None, meter))

    def usage_events(
        self,
        customer: str | None = None,
        meter: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Iterator[UsageEvent]:
        """Usage events, oldest first within each account; `since` inclusive, `until` exclusive. Read in pages."""
        _check_filters(customer, meter)
        times = _times(since, until)
        return self._usage_events(customer, meter, *times)

    def _usage_events(
        self, customer: str | None, meter: str | None, since: int | None, until: int | None
    ) -> Iterator[UsageEvent]:
        for row in self._accounts(customer, meter):
            first, last = self._range(row, since, until)
            while first <= last:
                page_end = min(last, first + _PAGE - 1)
                with self._reading() as fetch:
                    events = fetch(_SQL["events"], (first, page_end))
                for event in events:
                    yield event_of(row[13], row[14], event, *event[26:28])
                first = page_end + 1

    def usage_event(self, customer: str, meter: str, transaction_id: str, /) -> UsageEvent | None:
        """One usage event by its transaction id."""
        check_name(customer, "customer")
        check_name(meter, "meter")
        check_name(transaction_id, "transaction_id", 255)
        with self._reading() as fetch:
            rows = fetch(_SQL["event"], (customer, meter, transaction_id))
        return event_of(customer, meter, rows[0], *rows[0][26:28]) if rows else None

    def usage(
        self,
        customer: str | None = None,
        meter: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        by: Sequence[str] = ("day", "meter", "model"),
    ) -> Iterator[UsageSum]:
        """
        Usage added up by any of customer, day (UTC), meter and model, in their order.

        Meters are always told apart, because the credits of two meters are two units. A correction is no further call.
        """
        _check_filters(customer, meter)
        times = _times(since, until)
        if isinstance(by, str):
            raise ValueError(f"by must be a sequence of names, not the str {by!r}")
        for name in by:
            if name not in _SUMMED_BY:
                raise ValueError(f"by may name {', '.join(_SUMMED_BY)}, not {name!r}")
        return self._usage(customer, meter, *times, frozenset(by))

    def _usage(
        self, customer: str | None, meter: str | None, since: int | None, until: int | None, by: frozenset[str]
    ) -> Iterator[UsageSum]:
        sums: dict[tuple[str, str, str, str], list[Any]] = {}
        for row in self._accounts(customer, meter):
            first, last = self._range(row, since, until)
            if first > last:
                continue
            with self._reading() as fetch:
                groups = fetch(_SQL["usage"], (first, last, "day" in by, "model" in by))
            for day, model, calls, *halves in groups:
                key_customer = row[13] if "customer" in by else None
                key = (key_customer or "", row[14], day or "", model or "")
                entry = sums.setdefault(key, [key_customer, row[14], day, model, 0, 0, 0, 0])
                amount, input_tokens, output_tokens = (
                    ((high or 0) << 32) + (low or 0) for high, low in zip(halves[::2], halves[1::2], strict=True)
                )
                for index, value in enumerate((amount, calls, input_tokens, output_tokens), 4):
                    entry[index] += value
        for key in sorted(sums):
            yield UsageSum(*sums[key])

    def holds(
        self, customer: str | None = None, meter: str | None = None, *, state: str | None = None
    ) -> Iterator[Hold]:
        """Open holds, and those that ended without being settled; `state` chooses one kind."""
        _check_filters(customer, meter)
        if state is not None and state not in _STATES:
            raise ValueError(
                f"state must be one of {', '.join(_STATES)}, not {state!r}; what was settled is among the usage events"
            )
        return self._holds(customer, meter, state)

    def _holds(self, customer: str | None, meter: str | None, state: str | None) -> Iterator[Hold]:
        for account in self._accounts(customer, meter):
            for statement in ("open_holds", "ended_holds"):
                if state is not None and (state == "open") != (statement == "open_holds"):
                    continue
                for row in self._pages(_SQL[statement], account[0], ""):
                    if state is None or state == row[2]:
                        yield _hold_of(account[13], account[14], row)

    def grants(self, customer: str | None = None, meter: str | None = None) -> Iterator[Grant]:
        """Grants, oldest first within each account; what they paid and what has expired is told as of now."""
        _check_filters(customer, meter)
        return self._grants(customer, meter)

    def _grants(self, customer: str | None, meter: str | None) -> Iterator[Grant]:
        for account in self._accounts(customer, meter):
            now = {grant.key: grant for grant in self._funds(account).grants}
            for no, grant_id, amount, created_at, expires_at, spent, expired, revoked in self._pages(
                _SQL["grants"], account[0], 0
            ):
                current = now.get(no)
                yield Grant(
                    customer=account[13],
                    meter=account[14],
                    id=grant_id,
                    amount=amount,
                    created_at=moment(created_at),
                    expires_at=None if expires_at is None else moment(expires_at),
                    spent=spent if current is None else current.spent,
                    expired=expired if current is None else current.expired,
                    revoked=revoked if current is None else current.revoked,
                )

    def _orphans(self, behind: tuple[int, str], limit: int) -> list[tuple[int, str]]:
        """Holds whose owner's lease is out or that took too long, behind a key, in the order of accounts."""
        with self._reading() as fetch:
            return [(no, hold_id) for no, hold_id in fetch(_SQL["orphans"], (*behind, self.now(), limit))]

    def _has_old_tombstone(self, before: int) -> bool:
        with self._reading() as fetch:
            return bool(fetch(_SQL["old_tombstone"], (before,)))

    def _accounts(self, customer: str | None, meter: str | None) -> Iterator[Row]:
        if customer is not None and meter is not None:
            with self._reading() as fetch:
                rows = fetch(_SQL["account"], (customer, meter))
            yield from rows
            return
        key: Any = 0 if customer is None else ""
        while True:
            with self._reading() as fetch:
                if customer is None:
                    rows = fetch(_SQL["accounts"], (key, _PAGE))
                else:
                    rows = fetch(_SQL["accounts_of_customer"], (customer, key, _PAGE))
            for row in rows:
                if meter is None or row[14] == meter:
                    yield row
            if len(rows) < _PAGE:
                return
            key = rows[-1][0] if customer is None else rows[-1][14]

    def _pages(self, statement: str, account_no: int, key: Any) -> Iterator[Row]:
        """All rows of an account, by a statement that reads a page behind a key, which is each row's first column."""
        while True:
            with self._reading() as fetch:
                rows = fetch(statement, (account_no, key, _PAGE))
            yield from rows
            if len(rows) < _PAGE:
                return
            key = rows[-1][0]

    def _range(self, account: Row, since: int | None, until: int | None) -> tuple[int, int]:
        """The numbers of an account's events of a time: the first, and the last (before the first if there are none)."""
        base, count = account[0] << 32, account[11]
        first = 1 if since is None else self._first_at(base, count, since)
        last = count if until is None else self._first_at(base, count, until) - 1
        return base + first, base + last

    def _first_at(self, base: int, count: int, time: int) -> int:
        """By bisection, because numbers and times grow together: the first event at `time` or later."""
        low, high = 1, count + 1
        with self._reading() as fetch:
            while low < high:
                middle = (low + high) // 2
                ((created_at,),) = fetch(_SQL["event_time"], (base + middle,))
                if created_at < time:
                    low = middle + 1
                else:
                    high = middle
        return low

    def _balance(self, row: Row) -> Balance:
        customer, meter = row[13], row[14]
        if row[10] is not None and row[10] <= self.now():
            # An expiry is due that no step has applied yet.
            counters = self._funds(row)
        else:
            counters = Account.of(customer, meter, row).funds
        limit, used = counters.limit, counters.used
        is_estimate = bool(row[15])
        if is_estimate and row[16] is not None:
            # The service says what is available; of the rest it knows at most what it gave in all, and never less than that.
            limit = max(row[16], counters.held + max(0, counters.free))
            used = limit - counters.held - counters.free
        return Balance(
            customer=customer,
            meter=meter,
            limit=None if row[6] else limit,
            used=used,
            held=counters.held,
            available=None if row[6] else max(0, counters.free),
            debt=max(0, -counters.free),
            unlimited_used=row[4],
            is_estimate=is_estimate,
        )

    def _funds(self, row: Row) -> funds.Funds:
        """An account's funds as of now, with what its grants have paid and what is due."""
        now = self.now()
        with self._snapshot() as fetch:
            (row,) = fetch(_SQL["account"], (row[13], row[14]))
            grants = fetch(_SQL["grants_with_remainder"], (row[0],))
            holds = fetch(_SQL["limited_holds"], (row[0],))
        counters = Account.of(row[13], row[14], row).funds
        counters.grants = [grant_funds(grant) for grant in grants]
        funds.expire(counters, [funds.OldHold(*hold) for hold in holds], now)
        funds.fold(counters)
        return counters


def rows_of(connection: sqlite3.Connection) -> Fetch:
    def fetch(statement: str, parameters: Sequence[Any]) -> list[Row]:
        if type(statement) is Statement and statement.spread is not None:
            parameters = statement.spread(parameters)
        return connection.execute(statement, parameters).fetchall()

    return fetch


def _check_filters(customer: str | None, meter: str | None) -> None:
    if customer is not None:
        check_name(customer, "customer")
    if meter is not None:
        check_name(meter, "meter")


def _times(since: datetime | None, until: datetime | None) -> tuple[int | None, int | None]:
    return (
        None if since is None else microseconds(since, "since"),
        None if until is None else microseconds(until, "until"),
    )


def _hold_of(customer: str, meter: str, row: Row) -> Hold:
    return Hold(
        id=row[0],
        customer=customer,
        meter=meter,
        amount=row[1],
        state=row[2],
        placed_at=moment(row[3]),
        expires_at=None if row[4] is None else moment(row[4]),
        ended_at=None if row[5] is None else moment(row[5]),
        reason=row[6],
        sent=row[7],
        transaction_id=row[8],
        endpoint=row[9],
        model=row[10],
        parent=row[11],
        is_unlimited=bool(row[12]),
        is_repeat=bool(row[13]),
    )
