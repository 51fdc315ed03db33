"""How a hold ends in a usage event: at once, late, as a repeat, or as the correction of what an orphan was charged."""

from __future__ import annotations

import hashlib
import logging
from typing import Literal

from ..core import funds
from ..core.steps import Settle, Settled
from ..records import UsageEvent
from .accounts import SQL, Account, Accounts, EndedHold, OpenHold, check_total, fit
from .rows import event_of, moment, packed, unpacked, usage_columns
from .statements import read_statements

__all__ = ["Settles"]

_log = logging.getLogger("metered_ai.ledger")


_OUTBOX = read_statements("outbox.sql")
_SETTLE = SQL["settle_fast"]
_TAKEN = SQL["open_hold_taken"]
_USED = SQL["used"]
_USED_UNLIMITED = SQL["used_unlimited"]


class Settles(Accounts):
    """The step Settle; and grants, which a correction may give."""

    def _settle(self, step: Settle, now: int) -> Settled:
        account_no = self._numbers.get((step.customer, step.meter))
        if account_no is None:
            return self._settle_slowly(step, now)
        rows = self._run(_SETTLE, (step.hold_id, account_no, now, step.amount, step.transaction_id)).fetchall()
        if not rows:
            return self._settle_slowly(step, now)

        held, is_unlimited, own, events, last_event_at = rows[0]
        name = own or step.transaction_id
        created_at = max(now, last_event_at + 1)
        properties = packed(step.properties)
        self._insert(
            "new_event",
            (
                (account_no << 32) + events + 1,
                account_no,
                created_at,
                name,
                step.amount,
                step.basis,
                step.kind,
                is_unlimited,
                0,
                0 if step.usage is None else 1,
            ),
            (
                step.hold_id,
                step.fingerprint,
                step.request_id,
                step.attempts,
                step.price_slug,
                step.parent,
                properties,
                *usage_columns(step.usage),
            ),
        )
        self._run(_TAKEN, (account_no, step.hold_id))
        self._run(_USED_UNLIMITED if is_unlimited else _USED, (step.amount, held, events + 1, created_at, account_no))
        event = UsageEvent(
            step.customer,
            step.meter,
            name,
            step.amount,
            moment(created_at),
            step.basis,
            step.kind,
            step.hold_id,
            step.usage,
            step.request_id,
            step.attempts,
            unpacked(properties),
            step.price_slug,
            step.parent,
            is_unlimited == 1,
        )
        return Settled(event, "settled")

    def _settle_slowly(self, step: Settle, now: int) -> Settled:
        account = self._account(step.customer, step.meter, now)
        hold = None if account is None else self._open_hold(account, step.hold_id)
        if account is None or hold is None:
            return self._settle_late(step, account, now)

        name, found, outcome = self._event_name(step, account, hold.transaction_id)
        if found is not None:
            self._end_unused(account, hold, "released", now, reason="repeat", sent="yes", event_id=found.transaction_id)
            return Settled(found, outcome)

        check_total((account.unlimited_used if hold.is_unlimited else account.funds.used) + step.amount, account)
        # The event first: who writes the outbox looks for its hold.
        event = self._write_settled(step, account, name, now, is_unlimited=bool(hold.is_unlimited), is_late=False)
        self._use_hold(account, hold, step.amount)
        self._save(account)
        return Settled(event, "settled")

    def _settle_late(self, step: Settle, account: Account | None, now: int) -> Settled:
        """The hold has ended, or was never here. What was not recorded yet is recorded: the provider has been paid."""
        ended = None if account is None else self._ended_hold(account, step.hold_id)
        if account is not None:
            event = self._event_of_hold(account, step.hold_id)
            if ended is not None and ended.state == "charged" and event is not None:
                return self._correct(step, account, ended, event, now)
            if ended is not None and ended.event_id is not None:
                first = self._event(account, ended.event_id)
                if first is not None:
                    return Settled(first, "again" if ended.state == "settled" else "repeat")
            if event is not None:
                return Settled(event, "again")

        if account is None:
            account = self._new_account(step.customer, step.meter)
        name, found, outcome = self._event_name(step, account, None if ended is None else ended.transaction_id)
        if found is not None:
            self._note_repeat(step, account, ended, found, now)
            return Settled(found, outcome)

        is_unlimited = step.is_unlimited if ended is None or ended.state == "tombstone" else bool(ended.is_unlimited)
        self._use(account, step.amount, is_unlimited)
        event = self._write_settled(step, account, name, now, is_unlimited=is_unlimited, is_late=True)
        if ended is not None:
            self._execute(SQL["ended_hold_settled"], (account.no, step.hold_id, name))
            self._retake_number(account, ended)
        self._save(account)
        return Settled(event, "late")

    def _note_repeat(
        self, step: Settle, account: Account, ended: EndedHold | None, found: UsageEvent, now: int
    ) -> None:
        """Remember what a late settle repeated, so that it answers the same the next time."""
        if ended is not None:
            self._execute(SQL["ended_hold_repeated"], (account.no, step.hold_id, found.transaction_id))
            self._retake_number(account, ended)
            return
        self._end_row(
            account.no,
            OpenHold(step.hold_id, 0, int(step.is_unlimited), 0, now, now, "release", *[None] * 11),
            "released",
            now,
            reason="repeat",
            sent="yes",
            event_id=found.transaction_id,
        )

    def _correct(self, step: Settle, account: Account, ended: EndedHold, charged: UsageEvent, now: int) -> Settled:
        """The orphan was charged by policy and now the truth comes: what is missing is charged, what was too much is granted."""
        name = self._free_name(account, f"{fit(f'hold_{step.hold_id}', 3)}.c1")
        missing = step.amount - charged.amount
        is_unlimited = bool(ended.is_unlimited)
        if missing > 0:
            self._use(account, missing, is_unlimited)
        elif missing < 0 and not is_unlimited:
            check_total(account.funds.limit - missing, account)
        event = self._write_settled(
            step, account, name, now, is_unlimited=is_unlimited, is_late=True, kind="correction", amount=max(0, missing)
        )
        self._execute(SQL["ended_hold_settled"], (account.no, step.hold_id, name))
        # What was counted as unlimited use has taken no credits, so there are none to give back.
        if self._net(account, charged, name, missing, now) and missing < 0 and not is_unlimited:
            self._give(account, self._free_grant_id(account, f"correction_{step.hold_id}"), -missing, None, now)
        self._save(account)
        return Settled(event, "corrected")

    def _net(self, account: Account, charged: UsageEvent, name: str, missing: int, now: int) -> bool:
        """
        Tell a remote service the truth where it has not been told the charge: less, and at once. False where it knows the charge
        already: then what was too much is the service's to give back, and stands in the outbox for a person to see.
        """
        if not self._execute(_OUTBOX["service"], ()).fetchall():
            return True
        if missing >= 0:
            self._execute(_OUTBOX["known_now"], (account.no, charged.transaction_id))
            return True
        rows = self._execute(_OUTBOX["netted"], (account.no, charged.transaction_id, -missing)).fetchall()
        for no, amount in rows:
            self._execute(_OUTBOX["corrected"], (account.no, -missing))
            if amount == 0:
                self._execute(_OUTBOX["sent"], (no,)).fetchall()
                self._execute(_OUTBOX["new_delivery"], (no, 0, now, None, None))
        if rows:
            return True
        reason = (
            f"the service was told {charged.amount} as {charged.transaction_id!r}, the truth is {charged.amount + missing}: "
            f"give {-missing} back there, then replay this"
        )
        self._execute(_OUTBOX["owed_back"], (account.no, name, now, reason))
        _log.error("customer %r, meter %r: %s", account.customer, account.meter, reason)
        return False

    def _event_name(
        self, step: Settle, account: Account, own: str | None
    ) -> tuple[str, UsageEvent | None, Literal["replay", "repeat"]]:
        """What the event of a settle is called; or the event that there is already, and whether this is its replay or a repeat."""
        name = step.transaction_id if own is None else own
        row = self._event_row(account, name)
        if row is None:
            return name, None, "repeat"
        if step.is_explicit or own is not None:
            return name, event_of(account.customer, account.meter, row), "repeat"
        other = f"{fit(name, 9)}.{_hash(step.fingerprint or step.hold_id)}"
        last = f"{fit(name, 9)}.{_hash(step.hold_id)}"
        for candidate in (name, other, last):
            row = self._event_row(account, candidate)
            if row is None:
                _log.warning(
                    "transaction id %r came with two different answers (customer %r, meter %r); recorded as %r",
                    name,
                    account.customer,
                    account.meter,
                    candidate,
                )
                return candidate, None, "repeat"
            if step.fingerprint is not None and row[26] == step.fingerprint:
                return candidate, event_of(account.customer, account.meter, row), "replay"
        return self._free_name(account, last), None, "repeat"

    def _write_settled(
        self,
        step: Settle,
        account: Account,
        name: str,
        now: int,
        *,
        is_unlimited: bool,
        is_late: bool,
        kind: str | None = None,
        amount: int | None = None,
    ) -> UsageEvent:
        return self._write_event(
            account,
            name,
            step.amount if amount is None else amount,
            now,
            basis=step.basis,
            kind=kind or step.kind,
            hold_id=step.hold_id,
            is_unlimited=is_unlimited,
            is_late=is_late,
            fingerprint=step.fingerprint,
            request_id=step.request_id,
            attempts=step.attempts,
            price_slug=step.price_slug,
            parent=step.parent,
            properties=packed(step.properties),
            usage=step.usage,
        )

    def _give(self, account: Account, grant_id: str, amount: int, expires_at: int | None, now: int) -> None:
        self._load_grants(account)
        (no,) = self._execute(SQL["new_grant"], (account.no, grant_id, amount, now, expires_at)).fetchall()[0]
        funds.add(account.funds, funds.GrantFunds(no, amount, expires_at), self._limited_holds(account), now)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
