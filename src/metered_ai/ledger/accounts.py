"""Accounts, holds, grants and events as a step in progress sees them: loaded, changed and written back in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import compress, repeat
from operator import is_not
from typing import Any, NamedTuple, Protocol

from ..core import funds
from ..records import MAX_TOTAL, Basis, Grant, Hold, Usage, UsageEvent
from .inputs import ID_LIMIT
from .rows import Row, event_of, moment, unpacked, usage_columns
from .statements import narrowed, read_statements

__all__ = [
    "SQL",
    "Account",
    "Accounts",
    "Changes",
    "EndedHold",
    "Execute",
    "OpenHold",
    "Rows",
    "check_total",
    "fit",
    "grant_funds",
    "hold_of",
    "saved",
]

SQL = read_statements("steps.sql")

_NUMBERS_AT_MOST = 10_000


class Rows(Protocol):
    """What a statement came to: its rows, and how many it changed."""

    @property
    def rowcount(self) -> int: ...
    def fetchall(self) -> list[Any]: ...


class Changes(Protocol):
    """A connection that counts the rows it has changed."""

    @property
    def total_changes(self) -> int: ...


Execute = Callable[[str, Sequence[Any]], Rows]
"""Runs one statement."""


@dataclass(slots=True)
class Account:
    """An account's row. The limited counters are in `funds`, whose grants are loaded only when something unusual happens to them."""

    customer: str
    meter: str
    no: int
    funds: funds.Funds = field(default_factory=funds.Funds)
    unlimited_used: int = 0
    unlimited_held: int = 0
    is_unlimited: bool = False
    open_holds: int = 0
    next_expiry: int | None = None
    events: int = 0
    last_event_at: int = 0
    loaded: dict[int, Row] | None = None

    @classmethod
    def of(cls, customer: str, meter: str, row: Row) -> Account:
        (
            no,
            limit,
            used,
            held,
            unlimited_used,
            unlimited_held,
            is_unlimited,
            open_holds,
            allocated,
            kept,
            due,
            events,
            last,
        ) = row[:13]
        counters = funds.Funds(limit, used, held, allocated, kept)
        return cls(
            customer,
            meter,
            no,
            counters,
            unlimited_used,
            unlimited_held,
            bool(is_unlimited),
            open_holds,
            due,
            events,
            last,
        )

    @property
    def available(self) -> int:
        return max(0, self.funds.free)


class OpenHold(NamedTuple):
    hold_id: str
    amount: int
    is_unlimited: int
    is_repeat: int
    placed_at: int
    ends_at: int
    on_unknown: str
    owner_no: int | None
    transaction_id: str | None
    operation: str | None
    scope: str | None
    number: int | None
    parent: str | None
    endpoint: str | None
    model: str | None
    price_slug: str | None
    properties: str | None
    lease_until: int | None

    def is_orphan(self, now: int) -> bool:
        """Its owner's lease is out, or the call took longer than any may."""
        return self.ends_at <= now or (self.owner_no is not None and (self.lease_until or 0) <= now)


class EndedHold(NamedTuple):
    state: str
    amount: int
    is_unlimited: int
    is_repeat: int
    reason: str | None
    event_id: str | None
    transaction_id: str | None
    operation: str | None
    scope: str | None
    number: int | None


class Accounts:
    """
    Reads and writes the rows of steps through `execute`, on `connection`.

    `mark` is how many rows had been changed when everything written stood by itself: an exception while more than `mark` has changed means that
    a step was cut in the middle, and the transaction must be rolled back.
    """

    def __init__(self, execute: Execute, run: Execute, connection: Changes) -> None:
        self._execute = execute
        # The same for statements with plain parameters, and faster.
        self._run = run
        self._connection = connection
        self.mark = 0
        # Owners' numbers and how long their leases last at least; true as long as nothing is rolled back.
        self._leases: dict[str, tuple[int, int]] = {}
        # Accounts' numbers, which never change; and those that were seen to be unlimited, which the statement that trusts it checks.
        self._numbers: dict[tuple[str, str], int] = {}
        self._unlimited: set[int] = set()
        self._narrow: dict[tuple[Any, ...], str] = {}

    # Holds

    def forget(self) -> None:
        """Forget what a rolled back transaction may have taught."""
        self._leases.clear()
        self._numbers.clear()

    def _use_hold(self, account: Account, hold: OpenHold, spent: int) -> None:
        """Take an open hold off the account and count what it cost; the caller saves the account."""
        self._execute(SQL["open_hold_taken"], (account.no, hold.hold_id))
        account.open_holds -= 1
        if hold.is_unlimited:
            account.unlimited_held -= hold.amount
            account.unlimited_used += spent
            return
        account.funds.held -= hold.amount
        account.funds.used += spent
        if account.funds.kept:
            self._load_grants(account)
            ended = funds.OldHold(hold.placed_at, hold.amount)
            funds.end_hold(account.funds, self._limited_holds(account), ended, spent)

    def _end_unused(
        self,
        account: Account,
        hold: OpenHold,
        state: str,
        now: int,
        *,
        reason: str,
        sent: str,
        event_id: str | None = None,
        saves: bool = True,
    ) -> None:
        """End an open hold that costs nothing. Its operation's number becomes free again, unless it ended as a repeat."""
        self._use_hold(account, hold, 0)
        self._end_row(account.no, hold, state, now, reason=reason, sent=sent, event_id=event_id)
        if hold.operation is not None and hold.scope is not None and hold.number is not None:
            if reason == "repeat":
                self._take_number(account, hold.operation, hold.scope, hold.number, is_kept=True)
            else:
                self._free_number(account, hold.operation, hold.scope, hold.number)
        if saves:
            self._save(account)

    def _end_row(
        self,
        account_no: int,
        hold: OpenHold,
        state: str,
        now: int,
        *,
        reason: str,
        sent: str,
        event_id: str | None = None,
    ) -> None:
        self._insert(
            "new_ended_hold",
            (
                account_no,
                hold.hold_id,
                state,
                hold.amount,
                hold.is_unlimited,
                hold.is_repeat,
                hold.placed_at,
                now,
                reason,
                sent,
            ),
            (event_id, *hold[8:17]),
        )

    def _insert(self, statement: str, always: Row, perhaps: Row) -> None:
        """Insert a row; of its last columns those that are None are left out."""
        is_given = tuple(map(is_not, perhaps, repeat(None)))
        shape = (statement, is_given)
        narrow = self._narrow.get(shape)
        if narrow is None:
            absent = [len(always) + position for position, given in enumerate(is_given) if not given]
            narrow = self._narrow[shape] = narrowed(SQL[statement], absent)
        self._run(narrow, (*always, *compress(perhaps, is_given)))

    def _take_number(self, account: Account, operation: str, scope: str, number: int, *, is_kept: bool = False) -> None:
        key = (account.no, operation, scope)
        self._execute(SQL["number_removed"], (*key, 1, number))
        self._execute(SQL["number_added"], (*key, 0, number, int(is_kept)))

    def _free_number(self, account: Account, operation: str, scope: str, number: int) -> None:
        key = (account.no, operation, scope)
        if self._execute(SQL["number_removed"], (*key, 0, number)).rowcount:
            self._execute(SQL["number_added"], (*key, 1, number, 0))

    def _retake_number(self, account: Account, ended: EndedHold) -> None:
        """A hold that had ended has come to something after all: its scope has used the number."""
        if ended.operation is not None and ended.scope is not None and ended.number is not None:
            self._take_number(account, ended.operation, ended.scope, ended.number, is_kept=True)

    def _open_hold(self, account: Account, hold_id: str) -> OpenHold | None:
        rows = self._execute(SQL["open_hold"], (account.no, hold_id)).fetchall()
        return OpenHold(*rows[0]) if rows else None

    def _ended_hold(self, account: Account, hold_id: str) -> EndedHold | None:
        rows = self._execute(SQL["ended_hold"], (account.no, hold_id)).fetchall()
        return EndedHold(*rows[0]) if rows else None

    # Accounts and grants

    def _account(self, customer: str, meter: str, now: int) -> Account | None:
        """The account, after what expires by now has been applied."""
        rows = self._execute(SQL["account"], (customer, meter)).fetchall()
        if not rows:
            return None
        account = Account.of(customer, meter, rows[0])
        if len(self._numbers) >= _NUMBERS_AT_MOST:
            self._numbers.clear()
        self._numbers[customer, meter] = account.no
        (self._unlimited.add if account.is_unlimited else self._unlimited.discard)(account.no)
        self._apply_expiries(account, now)
        return account

    def _new_account(self, customer: str, meter: str) -> Account:
        (no,) = self._execute(SQL["new_account"], (customer, meter)).fetchall()[0]
        return Account(customer, meter, no)

    def _apply_expiries(self, account: Account, now: int) -> None:
        if account.next_expiry is None or account.next_expiry > now:
            return
        self._load_grants(account)
        funds.expire(account.funds, self._limited_holds(account), now)
        self._save(account)
        self.mark = self._connection.total_changes

    def _load_grants(self, account: Account) -> None:
        if account.loaded is None:
            rows = self._execute(SQL["grants_with_remainder"], (account.no,)).fetchall()
            account.funds.grants = [grant_funds(row) for row in rows]
            account.loaded = {grant.key: saved(grant) for grant in account.funds.grants}

    def _limited_holds(self, account: Account) -> list[funds.OldHold]:
        return [funds.OldHold(*row) for row in self._execute(SQL["limited_holds"], (account.no,)).fetchall()]

    def _save(self, account: Account) -> None:
        counters = account.funds
        if account.loaded is not None:
            account.next_expiry = funds.next_expiry(counters.grants)
            for grant in counters.grants:
                if account.loaded.get(grant.key) != saved(grant):
                    self._execute(SQL["grant_saved"], (grant.key, *saved(grant)))
                    account.loaded[grant.key] = saved(grant)
        self._execute(
            SQL["account_saved"],
            (
                account.no,
                counters.limit,
                counters.used,
                counters.held,
                account.unlimited_used,
                account.unlimited_held,
                int(account.is_unlimited),
                account.open_holds,
                counters.allocated,
                counters.kept,
                account.next_expiry,
                account.events,
                account.last_event_at,
            ),
        )

    def _use(self, account: Account, amount: int, is_unlimited: bool) -> None:
        """Count use that no open hold covers."""
        if is_unlimited:
            check_total(account.unlimited_used + amount, account)
            account.unlimited_used += amount
        else:
            check_total(account.funds.used + amount, account)
            account.funds.used += amount

    def _grant(self, account: Account, grant_id: str) -> Grant | None:
        rows = self._execute(SQL["grant"], (account.no, grant_id)).fetchall()
        if not rows:
            return None
        _, amount, expires_at, spent, expired, revoked, _, _, created_at = rows[0]
        return Grant(
            customer=account.customer,
            meter=account.meter,
            id=grant_id,
            amount=amount,
            created_at=moment(created_at),
            expires_at=None if expires_at is None else moment(expires_at),
            spent=spent,
            expired=expired,
            revoked=revoked,
        )

    # Events

    def _write_event(
        self,
        account: Account,
        name: str,
        amount: int,
        now: int,
        *,
        basis: Basis,
        kind: str,
        hold_id: str | None,
        is_unlimited: bool,
        is_late: bool = False,
        fingerprint: str | None = None,
        request_id: str | None = None,
        attempts: int | None = None,
        price_slug: str | None = None,
        parent: str | None = None,
        properties: str | None = None,
        usage: Usage | None = None,
    ) -> UsageEvent:
        account.events += 1
        account.last_event_at = max(now, account.last_event_at + 1)
        columns = usage_columns(usage)
        self._insert(
            "new_event",
            (
                (account.no << 32) + account.events,
                account.no,
                account.last_event_at,
                name,
                amount,
                basis,
                kind,
                int(is_unlimited),
                int(is_late),
                int(usage is not None),
            ),
            (hold_id, fingerprint, request_id, attempts, price_slug, parent, properties, *columns),
        )
        return UsageEvent(
            customer=account.customer,
            meter=account.meter,
            transaction_id=name,
            amount=amount,
            created_at=moment(account.last_event_at),
            basis=basis,
            kind=kind,
            hold_id=hold_id,
            usage=usage,
            request_id=request_id,
            attempts=attempts,
            # As it will be read back, whatever the caller does to its mapping.
            properties=unpacked(properties),
            price_slug=price_slug,
            parent=parent,
            is_unlimited=is_unlimited,
            is_late=is_late,
        )

    def _event_row(self, account: Account, name: str) -> Row | None:
        rows = self._execute(SQL["event_by_transaction"], (account.no, name)).fetchall()
        return rows[0] if rows else None

    def _event(self, account: Account, name: str) -> UsageEvent | None:
        row = self._event_row(account, name)
        return None if row is None else event_of(account.customer, account.meter, row)

    def _event_of_hold(self, account: Account, hold_id: str) -> UsageEvent | None:
        rows = self._execute(SQL["event_by_hold"], (account.no, hold_id)).fetchall()
        return event_of(account.customer, account.meter, rows[0]) if rows else None

    def _free_name(self, account: Account, name: str) -> str:
        """The name itself, or with the lowest number that makes it free: somebody may have recorded under a name of ours."""
        candidate, number = name, 1
        while self._event_row(account, candidate) is not None:
            number += 1
            candidate = f"{fit(name, len(str(number)) + 1)}.{number}"
        return candidate

    def _free_grant_id(self, account: Account, grant_id: str) -> str:
        candidate, number = fit(grant_id, 0), 1
        while self._execute(SQL["grant"], (account.no, candidate)).fetchall():
            number += 1
            candidate = f"{fit(grant_id, len(str(number)) + 1)}.{number}"
        return candidate


def hold_of(account: Account, hold: OpenHold) -> Hold:
    return Hold(
        id=hold.hold_id,
        customer=account.customer,
        meter=account.meter,
        amount=hold.amount,
        state="open",
        placed_at=moment(hold.placed_at),
        expires_at=moment(hold.ends_at if hold.lease_until is None else min(hold.ends_at, hold.lease_until)),
        transaction_id=hold.transaction_id,
        endpoint=hold.endpoint,
        model=hold.model,
        parent=hold.parent,
        is_unlimited=bool(hold.is_unlimited),
        is_repeat=bool(hold.is_repeat),
    )


def grant_funds(row: Row) -> funds.GrantFunds:
    no, amount, expires_at, spent, expired, revoked, kept, is_over = row[:8]
    return funds.GrantFunds(no, amount, expires_at, spent, expired, revoked, kept, bool(is_over))


def saved(grant: funds.GrantFunds) -> Row:
    return (grant.spent, grant.expired, grant.revoked, grant.kept, int(grant.is_over), int(grant.remainder > 0))


def fit(name: str, room: int) -> str:
    """Cut the middle out of a name that would be too long with `room` characters behind it."""
    excess = len(name) + room - ID_LIMIT
    if excess <= 0:
        return name
    keep = len(name) - excess
    return name[: keep // 2] + name[len(name) - (keep - keep // 2) :]


def check_total(total: int, account: Account) -> None:
    if total > MAX_TOTAL:
        raise ValueError(
            f"the total {total} of customer {account.customer!r} on meter {account.meter!r} would be too large (limit {MAX_TOTAL})"
        )
