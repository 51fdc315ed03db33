"""
What each step does to the rows, inside a transaction that the caller began.

The usual way of a step is one statement that checks everything, and its consequences; everything unusual loads the rows,
decides, and writes them back. A refusal (MeteringError, ValueError) is raised before the step has written anything of its
own, so that it needs no undoing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from ..core import funds
from ..core.checks import check_name
from ..core.steps import (
    AddGrant,
    Enlarge,
    Place,
    Record,
    Release,
    Released,
    Renew,
    Revoke,
    Settle,
    SetUnlimited,
)
from ..errors import AlreadyBilledError, BillingUnavailableError, GrantConflictError, InsufficientCreditsError
from ..records import Grant, Hold, Usage, UsageEvent
from .accounts import (
    SQL,
    Account,
    Changes,
    Execute,
    OpenHold,
    check_total,
    fit,
    grant_funds,
    hold_of,
    saved,
)
from .inputs import ID_LIMIT
from .reports import Recovery
from .rows import Row, microseconds, moment, packed
from .settles import Settles

__all__ = ["TOMBSTONE_KEPT", "Book", "Sweep"]

_SECOND = 1_000_000
TOMBSTONE_KEPT = 7 * 86_400 * _SECOND
"""How long the id of a hold that was released before it was placed stays refused, in microseconds."""
_PRUNED_AT_ONCE = 500
_ORPHANS_AT_ONCE = 1_000
_NO_LEASE = (0, 0)
_RESERVE = SQL["reserve_fast"]


@dataclass(frozen=True, slots=True)
class Sweep:
    """Resolve these holds (account number, hold id) if they are orphans still; and remove what is of no use any more."""

    holds: tuple[tuple[int, str], ...]


class _Number(NamedTuple):
    """The number of an operation that a hold takes. `event` is set where another scope has billed it: a repeat."""

    operation: str
    scope: str
    number: int
    transaction_id: str
    event: UsageEvent | None


class Book(Settles):
    """Does steps, each as far as its rows go; the transaction is the caller's."""

    def __init__(self, execute: Execute, run: Execute, connection: Changes) -> None:
        super().__init__(execute, run, connection)
        self._ways: dict[type, Callable[[Any, int], Any]] = {
            Place: self._place,
            Enlarge: self._enlarge,
            Settle: self._settle,
            Release: self._release,
            Renew: self._renew,
            Record: self._record,
            AddGrant: self._add_grant,
            Revoke: self._revoke,
            SetUnlimited: self._set_unlimited,
            Sweep: self._sweep,
        }

    def do(self, step: object, now: int) -> object:
        """Do one step at the time `now`."""
        self.mark = self._connection.total_changes
        return self._ways[type(step)](step, now)

    # Place

    def _place(self, step: Place, now: int) -> Hold:
        account_no = self._numbers.get((step.customer, step.meter))
        if account_no is None or step.operation is not None:
            return self._place_slowly(step, now)
        owner_no = lease_until = None
        if step.owner is not None:
            owner_no, lease_until = self._leases.get(step.owner, _NO_LEASE)
            if lease_until < now + int(step.lease * _SECOND) * 2 // 3:
                return self._place_slowly(step, now)

        properties = packed(step.properties)
        amount, hold_id = step.amount, step.hold_id
        is_unlimited = account_no in self._unlimited
        limited, unlimited = (0, amount) if is_unlimited else (amount, 0)
        customer = step.customer
        account = (account_no, customer, step.meter, is_unlimited)
        limits = (limited, limited, unlimited, now, customer, step.max_holds)
        reserved = self._run(_RESERVE, (limited, unlimited, *account, *limits, hold_id, hold_id, hold_id))
        if reserved.rowcount != 1:
            return self._place_slowly(step, now)
        ends_at = now + int(step.max_call * _SECOND)
        self._insert(
            "new_open_hold",
            (account_no, hold_id, amount, is_unlimited, 0, now, ends_at, step.on_unknown),
            (owner_no, None, None, None, None, step.parent, step.endpoint, step.model, step.price_slug, properties),
        )
        return Hold(
            hold_id,
            step.customer,
            step.meter,
            amount,
            "open",
            moment(now),
            moment(ends_at if lease_until is None else min(ends_at, lease_until)),
            endpoint=step.endpoint,
            model=step.model,
            parent=step.parent,
            is_unlimited=is_unlimited,
        )

    def _place_slowly(self, step: Place, now: int) -> Hold:
        account = self._account(step.customer, step.meter, now)
        if account is not None:
            hold = self._open_hold(account, step.hold_id)
            if hold is not None:
                if hold.amount != step.amount and not hold.is_repeat:
                    raise ValueError(f"hold {step.hold_id!r} is open with amount {hold.amount}, not {step.amount}")
                return hold_of(account, hold)
            self._refuse_ended(account, step.hold_id)

        account, number = self._admit(step, account, now)

        properties = packed(step.properties)
        if account is None:
            account = self._new_account(step.customer, step.meter)
        owner_no, lease_until = self._lease(step.owner, int(step.lease * _SECOND), now)
        is_repeat = number is not None and number.event is not None
        hold = OpenHold(
            hold_id=step.hold_id,
            amount=0 if is_repeat else step.amount,
            is_unlimited=int(account.is_unlimited),
            is_repeat=int(is_repeat),
            placed_at=now,
            ends_at=now + int(step.max_call * _SECOND),
            on_unknown=step.on_unknown,
            owner_no=owner_no,
            transaction_id=number.transaction_id if number else None,
            operation=number.operation if number else None,
            scope=number.scope if number else None,
            number=number.number if number else None,
            parent=step.parent,
            endpoint=step.endpoint,
            model=step.model,
            price_slug=step.price_slug,
            properties=properties,
            lease_until=lease_until,
        )
        self._insert("new_open_hold", (account.no, *hold[:7]), hold[7:17])
        if number is not None:
            self._take_number(account, number.operation, number.scope, number.number)
        account.open_holds += 1
        if hold.is_unlimited:
            account.unlimited_held += hold.amount
        else:
            account.funds.held += hold.amount
        self._save(account)
        return hold_of(account, hold)

    def _admit(self, step: Place, account: Account | None, now: int) -> tuple[Account | None, _Number | None]:
        """Decide whether a hold may be placed, after the orphans that stand in its way have been resolved."""
        try:
            return account, self._admitted(step, account)
        except (InsufficientCreditsError, AlreadyBilledError):
            if account is None or not self._sweep_account(account, now):
                raise
        except BillingUnavailableError:
            if not self._sweep_customer(step.customer, now):
                raise
        account = self._account(step.customer, step.meter, now)
        return account, self._admitted(step, account)

    def _admitted(self, step: Place, account: Account | None) -> _Number | None:
        number = None if step.operation is None else self._number(step, account)
        open_holds = sum(row[2] for row in self._execute(SQL["accounts_of_customer"], (step.customer,)).fetchall())
        if open_holds >= step.max_holds:
            raise BillingUnavailableError(
                f"customer {step.customer!r} has {open_holds} open holds; max_holds allows {step.max_holds}"
            )
        if step.amount == 0 or (number is not None and number.event is not None):
            return number
        if account is None:
            raise InsufficientCreditsError(customer=step.customer, meter=step.meter, available=0, required=step.amount)
        if account.is_unlimited:
            check_total(account.unlimited_held + step.amount, account)
        elif account.funds.free < step.amount:
            raise InsufficientCreditsError(
                customer=step.customer,
                meter=step.meter,
                available=account.available,
                required=step.amount,
                held=account.funds.held,
                is_transient=step.amount <= account.funds.limit - account.funds.used,
            )
        return number

    def _number(self, step: Place, account: Account | None) -> _Number:
        """The lowest number of the operation that its scope has neither open nor settled, and who else has it."""
        operation = cast("str", step.operation)
        scope = step.hold_id if step.scope is None else step.scope
        number = 1
        if account is not None:
            key = (account.no, operation, scope)
            (freed,) = self._execute(SQL["lowest_freed_number"], key).fetchall()[0]
            (highest,) = self._execute(SQL["highest_number"], key).fetchall()[0]
            number = freed or (highest or 0) + 1
        name = operation if number == 1 else f"{operation}.{number}"
        check_name(name, "transaction_id", ID_LIMIT)
        event = None
        if account is not None:
            event = self._event(account, name)
            is_held = event is None and bool(
                self._execute(SQL["open_hold_by_transaction"], (account.no, name)).fetchall()
            )
            if step.on_repeat == "refuse" and (event is not None or is_held):
                raise AlreadyBilledError(customer=step.customer, meter=step.meter, transaction_id=name, event=event)
        return _Number(operation, scope, number, name, event)

    def _refuse_ended(self, account: Account, hold_id: str) -> None:
        ended = self._ended_hold(account, hold_id)
        if ended is None and self._event_of_hold(account, hold_id) is None:
            return
        state = "settled" if ended is None else "released" if ended.state == "tombstone" else ended.state
        raise BillingUnavailableError(f"hold {hold_id!r} has ended ({state}); nothing is reserved under its id again")

    def _lease(self, owner: str | None, lease: int, now: int) -> tuple[int | None, int | None]:
        """The owner's number and the end of its lease, extended if less than two thirds of it remain."""
        if owner is None:
            return None, None
        enough = now + lease * 2 // 3
        no, lease_until = self._leases.get(owner, (0, 0))
        if lease_until < enough:
            for row in self._execute(SQL["owner"], (owner,)).fetchall():
                no, lease_until = row
        if lease_until < enough:
            no, lease_until = self._renew_owner(owner, now + lease), now + lease
        self._leases[owner] = (no, lease_until)
        return no, lease_until

    # Enlarge

    def _enlarge(self, step: Enlarge, now: int) -> Hold:
        account = self._account(step.customer, step.meter, now)
        hold = None if account is None else self._open_hold(account, step.hold_id)
        if account is None or hold is None:
            if account is not None:
                self._refuse_ended(account, step.hold_id)
            raise BillingUnavailableError(
                f"hold {step.hold_id!r} is not known on meter {step.meter!r}; it cannot be enlarged"
            )
        if step.amount <= hold.amount or hold.is_repeat:
            return hold_of(account, hold)

        more = step.amount - hold.amount
        is_free = bool(hold.is_unlimited) or account.is_unlimited
        if not is_free and account.funds.free < more and self._sweep_account(account, now, but=hold.hold_id):
            account = self._account(step.customer, step.meter, now)
            assert account is not None
        if not is_free and account.funds.free < more:
            raise InsufficientCreditsError(
                customer=step.customer,
                meter=step.meter,
                available=account.available,
                required=more,
                held=account.funds.held,
                # Its own hold does not end for it.
                is_transient=step.amount <= account.funds.limit - account.funds.used,
            )
        check_total((account.unlimited_held if hold.is_unlimited else account.funds.held) + more, account)
        self._execute(SQL["open_hold_enlarged"], (account.no, hold.hold_id, step.amount))
        if hold.is_unlimited:
            account.unlimited_held += more
        else:
            account.funds.held += more
        self._save(account)
        return hold_of(account, hold._replace(amount=step.amount))

    # Release, Renew

    def _release(self, step: Release, now: int) -> Released:
        rows = self._execute(SQL["release_fast"], (step.customer, step.meter, step.hold_id, now)).fetchall()
        if rows:
            account_no, amount, is_unlimited, placed_at, *description = rows[0]
            self._execute(SQL["open_hold_taken"], (account_no, step.hold_id))
            self._execute(SQL["given_back_unlimited"] if is_unlimited else SQL["given_back"], (account_no, amount))
            self._insert(
                "new_ended_hold",
                (account_no, step.hold_id, "released", amount, is_unlimited, 0, placed_at, now, step.reason, step.sent),
                (None, None, None, None, None, *description),
            )
            return Released("released")

        account = self._account(step.customer, step.meter, now)
        if account is None:
            account = self._new_account(step.customer, step.meter)
        hold = self._open_hold(account, step.hold_id)
        if hold is not None:
            event_id = hold.transaction_id if hold.is_repeat and step.reason == "repeat" else None
            self._end_unused(account, hold, "released", now, reason=step.reason, sent=step.sent, event_id=event_id)
            return Released("released")
        if (
            self._ended_hold(account, step.hold_id) is not None
            or self._event_of_hold(account, step.hold_id) is not None
        ):
            return Released("again")
        tombstone = OpenHold(step.hold_id, 0, 0, 0, now, now, "release", *[None] * 11)
        self._end_row(account.no, tombstone, "tombstone", now, reason=step.reason, sent=step.sent)
        return Released("tombstone")

    def _renew(self, step: Renew, now: int) -> int:
        no = self._renew_owner(step.owner, now + int(step.lease * _SECOND))
        self._leases[step.owner] = (no, now + int(step.lease * _SECOND))
        return cast("int", self._execute(SQL["holds_of_owner"], (no,)).fetchall()[0][0])

    def _renew_owner(self, owner: str, lease_until: int) -> int:
        return cast("int", self._execute(SQL["owner_renewed"], (owner, lease_until)).fetchall()[0][0])

    # Record

    def _record(self, step: Record, now: int) -> UsageEvent:
        account = self._account(step.customer, step.meter, now)
        if account is not None:
            first = self._event(account, step.transaction_id)
            if first is not None:
                return first
        properties = packed(step.properties)
        if account is None:
            account = self._new_account(step.customer, step.meter)
        self._use(account, step.amount, account.is_unlimited)
        event = self._write_event(
            account,
            step.transaction_id,
            step.amount,
            now,
            basis="reported",
            kind="record",
            hold_id=None,
            is_unlimited=account.is_unlimited,
            price_slug=step.price_slug,
            properties=properties,
            usage=step.usage,
        )
        self._save(account)
        return event

    # Grants

    def _add_grant(self, step: AddGrant, now: int) -> Grant:
        account = self._account(step.customer, step.meter, now)
        if account is not None:
            first = self._grant(account, step.id)
            if first is not None:
                if first.amount != step.amount:
                    raise GrantConflictError(
                        f"grant {step.id!r} of customer {step.customer!r} on meter {step.meter!r} exists with amount "
                        f"{first.amount}, not {step.amount}; the first stands"
                    )
                return first
            check_total(account.funds.limit + step.amount, account)
        else:
            account = self._new_account(step.customer, step.meter)
        expires_at = None if step.expires_at is None else microseconds(step.expires_at, "expires_at")
        self._give(account, step.id, step.amount, expires_at, now)
        self._save(account)
        return cast("Grant", self._grant(account, step.id))

    def _revoke(self, step: Revoke, now: int) -> Grant:
        account = self._account(step.customer, step.meter, now)
        rows = [] if account is None else self._execute(SQL["grant"], (account.no, step.id)).fetchall()
        if account is None or not rows:
            raise ValueError(f"grant {step.id!r} of customer {step.customer!r} on meter {step.meter!r} does not exist")
        self._load_grants(account)
        no = rows[0][0]
        grant = next((grant for grant in account.funds.grants if grant.key == no), None)
        if grant is None:
            # Spent to the end; it comes back to be revoked.
            grant = grant_funds(rows[0])
            account.funds.grants.append(grant)
            cast("dict[int, Row]", account.loaded)[no] = saved(grant)
        funds.revoke(account.funds, grant, self._limited_holds(account), now)
        self._save(account)
        return cast("Grant", self._grant(account, step.id))

    def _set_unlimited(self, step: SetUnlimited, now: int) -> None:
        account = self._account(step.customer, step.meter, now)
        if account is None:
            if not step.is_unlimited:
                return
            account = self._new_account(step.customer, step.meter)
        if account.is_unlimited != step.is_unlimited:
            account.is_unlimited = step.is_unlimited
            self._save(account)

    # Orphans

    def _sweep(self, step: Sweep, now: int) -> Recovery:
        recovery = Recovery()
        account: Account | None = None
        for account_no, hold_id in step.holds:
            if account is None or account.no != account_no:
                if account is not None:
                    self._save(account)
                (row,) = self._execute(SQL["account_by_no"], (account_no,)).fetchall()
                account = Account.of(row[13], row[14], row)
                self._apply_expiries(account, now)
            hold = self._open_hold(account, hold_id)
            if hold is not None and hold.is_orphan(now):
                recovery += self._resolve(account, hold, now)
        if account is not None:
            self._save(account)
        self._execute(SQL["tombstones_pruned"], (now - TOMBSTONE_KEPT, _PRUNED_AT_ONCE))
        self._execute(SQL["owners_pruned"], (now - TOMBSTONE_KEPT,))
        return recovery

    def _sweep_account(self, account: Account, now: int, but: str | None = None) -> bool:
        """Resolve the orphans of one account and tell whether there were any. What this writes stands by itself."""
        rows = self._execute(SQL["orphans_of_account"], (account.no, "", now, _ORPHANS_AT_ONCE)).fetchall()
        found = False
        for (hold_id,) in rows:
            hold = self._open_hold(account, hold_id)
            if hold is not None and hold_id != but:
                self._resolve(account, hold, now)
                found = True
        if found:
            self._save(account)
            self.mark = self._connection.total_changes
        return found

    def _sweep_customer(self, customer: str, now: int) -> bool:
        found = False
        for no, _, open_holds in self._execute(SQL["accounts_of_customer"], (customer,)).fetchall():
            if open_holds:
                (row,) = self._execute(SQL["account_by_no"], (no,)).fetchall()
                account = Account.of(row[13], row[14], row)
                self._apply_expiries(account, now)
                found = self._sweep_account(account, now) or found
        return found

    def _resolve(self, account: Account, hold: OpenHold, now: int) -> Recovery:
        """End an orphan by its policy; the caller saves the account."""
        if hold.on_unknown == "release" or hold.is_repeat:
            self._end_unused(account, hold, "expired", now, reason="unknown", sent="unknown", saves=False)
            return Recovery(released=1, in_doubt=1)

        name = hold.transaction_id
        if name is None or self._event_row(account, name) is not None:
            name = self._free_name(account, fit(f"hold_{hold.hold_id}", 0))
        usage = (
            None if hold.model is None and hold.endpoint is None else Usage(model=hold.model, endpoint=hold.endpoint)
        )
        self._write_event(
            account,
            name,
            hold.amount,
            now,
            basis="held",
            kind="expired",
            hold_id=hold.hold_id,
            is_unlimited=bool(hold.is_unlimited),
            price_slug=hold.price_slug,
            parent=hold.parent,
            properties=hold.properties,
            usage=usage,
        )
        self._use_hold(account, hold, hold.amount)
        self._end_row(account.no, hold, "charged", now, reason="unknown", sent="unknown")
        return Recovery(charged=1, charged_amount=hold.amount)
