"""
A ledger in plain Python: no files, no threads, no short cuts. What it answers is what a real one must answer.

It looks at every grant and every hold each time, gives each use to its grant at once, and applies an expiry at its moment.
Outcomes are tuples that compare: ("held", …), ("insufficient", …), ("settled", …).
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, field
from typing import Any

from metered_ai.core.steps import AddGrant, Enlarge, Place, Record, Release, Renew, Revoke, Settle, SetUnlimited, Step

SECOND = 1_000_000


@dataclass
class Given:
    amount: int
    expires_at: int | None
    spent: int = 0
    expired: int = 0
    revoked: int = 0
    kept: int = 0
    is_over: bool = False

    @property
    def rest(self) -> int:
        return self.amount - self.spent - self.expired - self.revoked


@dataclass
class Held:
    step: Place
    amount: int
    placed_at: int
    is_unlimited: bool
    number: str | None = None
    is_repeat: bool = False

    @property
    def is_charged(self) -> bool:
        """Whether it is charged if its owner dies."""
        return self.step.on_unknown == "charge" and not self.is_repeat

    @property
    def answer(self) -> tuple[Any, ...]:
        return ("held", self.amount, self.number, self.is_unlimited, self.is_repeat)


@dataclass
class Billed:
    id: str
    amount: int
    is_unlimited: bool
    fingerprint: str | None = None
    is_late: bool = False
    kind: str = "call"


@dataclass
class Ended:
    """How a hold ended: settled, repeat, released, expired, charged or gone (released before it was placed)."""

    how: str
    hold: Held | None = None
    event: Billed | None = None


@dataclass
class Account:
    grants: dict[str, Given] = field(default_factory=dict)
    events: dict[str, Billed] = field(default_factory=dict)
    holds: dict[str, Held] = field(default_factory=dict)
    ended: dict[str, Ended] = field(default_factory=dict)
    is_unlimited: bool = False

    # What the account has

    @property
    def limit(self) -> int:
        return sum(grant.amount - grant.expired - grant.revoked for grant in self.grants.values())

    @property
    def used(self) -> int:
        return sum(event.amount for event in self.events.values() if not event.is_unlimited)

    @property
    def unlimited_used(self) -> int:
        return sum(event.amount for event in self.events.values() if event.is_unlimited)

    @property
    def held(self) -> int:
        return sum(hold.amount for hold in self.holds.values() if not hold.is_unlimited)

    @property
    def free(self) -> int:
        return self.limit - self.used - self.held

    def balance(self) -> tuple[Any, ...]:
        limit, available = (None, None) if self.is_unlimited else (self.limit, max(0, self.free))
        return limit, self.used, self.held, available, max(0, -self.free), self.unlimited_used

    # Which grant pays

    def by_expiry(self) -> list[Given]:
        return sorted(self.grants.values(), key=lambda grant: (grant.expires_at is None, grant.expires_at or 0))

    def pay(self) -> None:
        """Give what nobody has paid yet to the grants that live, soonest expiry first."""
        owed = self.used - sum(grant.spent for grant in self.grants.values())
        for grant in self.by_expiry():
            if not grant.is_over:
                part = min(owed, grant.rest)
                grant.spent += part
                owed -= part

    def expire(self, now: int) -> None:
        for grant in self.by_expiry():
            if not grant.is_over and grant.expires_at is not None and grant.expires_at <= now:
                grant.is_over = True
                grant.kept = grant.rest
                self.trim()

    def trim(self) -> None:
        """What expired grants keep is there for holds older than they; what those cannot use is gone."""
        before = 0
        for grant in self.by_expiry():
            if grant.is_over and grant.expires_at is not None:
                old = sum(
                    h.amount for h in self.holds.values() if not h.is_unlimited and h.placed_at < grant.expires_at
                )
                kept = min(grant.kept, max(0, old - before))
                grant.expired += grant.kept - kept
                grant.kept = kept
                before += kept

    def end(self, hold: Held, spent: int) -> None:
        """A hold that is no longer open has cost so much (and the event is there)."""
        if not hold.is_unlimited:
            for grant in self.by_expiry():
                if grant.kept and grant.expires_at is not None and grant.expires_at > hold.placed_at:
                    part = min(spent, grant.kept)
                    grant.kept -= part
                    grant.spent += part
                    spent -= part
            self.trim()
            self.pay()

    # Which id an event has

    def number(self, operation: str, scope: str) -> str:
        """The lowest number of the operation that no open hold of the scope has, and none that was charged or was a repeat."""
        ended = [end.hold for end in self.ended.values() if end.hold and end.how in {"settled", "charged", "repeat"}]
        taken = {hold.number for hold in [*self.holds.values(), *ended] if hold.step.scope == scope}
        numbers = (operation if count == 1 else f"{operation}.{count}" for count in itertools.count(1))
        return next(number for number in numbers if number not in taken)

    def is_held(self, number: str) -> bool:
        return any(hold.number == number for hold in self.holds.values())

    def answer(self, hold_id: str, asked: str, fingerprint: str | None) -> tuple[str, Billed | None]:
        """The id for an answer of the provider, or the event that is the same answer."""
        for suffix in ["", fingerprint or hold_id, hold_id]:
            name = f"{asked}.{hashlib.sha256(suffix.encode()).hexdigest()[:8]}" if suffix else asked
            event = self.events.get(name)
            if event is None:
                return name, None
            if fingerprint is not None and event.fingerprint == fingerprint:
                return name, event
        raise AssertionError("the hold's own suffix is taken")


class Model:
    def __init__(self) -> None:
        self.accounts: dict[tuple[str, str], Account] = {}
        self.leases: dict[str, int] = {}
        self.now = 0

    def account(self, customer: str, meter: str) -> Account:
        return self.accounts.setdefault((customer, meter), Account())

    def move(self, now: int) -> None:
        """It is now so late; what expires by then has expired."""
        self.now = now
        for account in self.accounts.values():
            account.expire(now)

    # Holds

    def is_orphan(self, hold: Held) -> bool:
        owner = hold.step.owner
        is_dead = owner is not None and self.leases.get(owner, 0) <= self.now
        return is_dead or hold.placed_at + round(hold.step.max_call * SECOND) <= self.now

    def resolve(self, account: Account) -> list[Held]:
        orphans = [hold for hold in account.holds.values() if self.is_orphan(hold)]
        for hold in orphans:
            hold_id = hold.step.hold_id
            del account.holds[hold_id]
            if hold.is_charged:
                name = hold.number if hold.number and hold.number not in account.events else f"hold_{hold_id}"
                event = Billed(name, hold.amount, hold.is_unlimited, kind="expired")
                account.events[name] = event
                account.ended[hold_id] = Ended("charged", hold, event)
                account.end(hold, hold.amount)
            else:
                account.ended[hold_id] = Ended("expired", hold)
                account.end(hold, 0)
        return orphans

    def sweep(self) -> tuple[int, int]:
        """How many orphans were released, and how many charged."""
        orphans = [hold for account in self.accounts.values() for hold in self.resolve(account)]
        charged = sum(hold.is_charged for hold in orphans)
        return len(orphans) - charged, charged

    def do(self, step: Step) -> tuple[Any, ...]:
        """What a ledger must answer to the step."""
        if isinstance(step, Renew):
            self.leases[step.owner] = self.now + round(step.lease * SECOND)
            holds = [hold for account in self.accounts.values() for hold in account.holds.values()]
            return ("renewed", sum(hold.step.owner == step.owner for hold in holds))
        account = self.account(step.customer, step.meter)
        match step:
            case Place():
                return self.place(account, step)
            case Enlarge():
                return self.enlarge(account, step.hold_id, step.amount)
            case Settle():
                return self.settle(account, step)
            case Release():
                return self.release(account, step.hold_id)
            case Record():
                return self.record(account, step.transaction_id, step.amount)
            case AddGrant():
                expires_at = None if step.expires_at is None else round(step.expires_at.timestamp() * SECOND)
                return self.grant(account, step.id, step.amount, expires_at)
            case Revoke():
                return self.revoke(account, step.id)
            case SetUnlimited():
                account.is_unlimited = step.is_unlimited
        return ()

    def place(self, account: Account, step: Place) -> tuple[Any, ...]:
        hold_id, amount = step.hold_id, step.amount
        if hold_id in account.holds:
            return account.holds[hold_id].answer
        if hold_id in account.ended:
            return ("unavailable",)

        refusal, number, is_repeat = self.admit(account, step)
        if refusal and self.resolve(account):
            refusal, number, is_repeat = self.admit(account, step)
        if refusal:
            return refusal

        if is_repeat:
            amount = 0
        lease = round(step.lease * SECOND)
        if step.owner is not None and (self.leases.get(step.owner, 0) - self.now) * 3 < lease * 2:
            self.leases[step.owner] = self.now + lease
        hold = Held(step, amount, self.now, account.is_unlimited, number, is_repeat)
        account.holds[hold_id] = hold
        return hold.answer

    def admit(self, account: Account, step: Place) -> tuple[tuple[Any, ...], str | None, bool]:
        """Why a hold cannot be placed, or (); its number, and whether it repeats what another scope has billed."""
        number = None
        if step.operation is not None and step.scope is not None:
            number = account.number(step.operation, step.scope)
            event = account.events.get(number)
            if step.on_repeat == "refuse" and (event or account.is_held(number)):
                return ("billed", number, event.amount if event else None), None, False
            if event:
                return (), number, True
        if step.amount and not account.is_unlimited and step.amount > account.free:
            return ("insufficient", max(0, account.free), step.amount, account.held), None, False
        return (), number, False

    def enlarge(self, account: Account, hold_id: str, amount: int) -> tuple[Any, ...]:
        hold = account.holds.get(hold_id)
        if hold is None:
            return ("unavailable",)
        more = 0 if hold.is_repeat else amount - hold.amount
        if more > 0 and not (hold.is_unlimited or account.is_unlimited) and more > account.free:
            self.resolve(account)
            if more > account.free:
                return ("insufficient", max(0, account.free), more, account.held)
        if not hold.is_repeat:
            hold.amount = max(amount, hold.amount)
        return hold.answer

    def settle(self, account: Account, step: Settle) -> tuple[Any, ...]:
        hold_id, amount, asked, is_explicit = step.hold_id, step.amount, step.transaction_id, step.is_explicit
        ended = account.ended.get(hold_id)
        if ended and ended.how in {"settled", "repeat"}:
            assert ended.event
            return ("again" if ended.how == "settled" else "repeat", ended.event.id, ended.event.amount)
        if ended and ended.how == "charged":
            assert ended.event
            assert ended.hold
            charged = ended.event
            event = Billed(
                f"hold_{hold_id}.c1",
                max(0, amount - charged.amount),
                charged.is_unlimited,
                is_late=True,
                kind="correction",
            )
            account.events[event.id] = event
            account.ended[hold_id] = Ended("settled", ended.hold, event)
            if amount < charged.amount and not charged.is_unlimited:
                self.grant(account, f"correction_{hold_id}", charged.amount - amount)
            account.pay()
            return ("corrected", event.id, event.amount)

        hold = account.holds.get(hold_id) or (ended.hold if ended else None)
        is_late = hold_id not in account.holds
        if hold and hold.number:
            asked, is_explicit = hold.number, True
        if is_explicit:
            name, same = asked, account.events.get(asked)
        else:
            name, same = account.answer(hold_id, asked, step.fingerprint)
        account.holds.pop(hold_id, None)
        if same:
            account.ended[hold_id] = Ended("repeat", hold, same)
            if hold and not is_late:
                account.end(hold, 0)
            return ("repeat" if is_explicit else "replay", same.id, same.amount)

        mode = hold.is_unlimited if hold else step.is_unlimited
        event = Billed(name, amount, mode, step.fingerprint, is_late)
        account.events[name] = event
        account.ended[hold_id] = Ended("settled", hold, event)
        if hold and not is_late:
            account.end(hold, amount)
        account.pay()
        return ("late" if is_late else "settled", name, amount)

    def release(self, account: Account, hold_id: str) -> tuple[Any, ...]:
        hold = account.holds.pop(hold_id, None)
        if hold:
            account.ended[hold_id] = Ended("released", hold)
            account.end(hold, 0)
            return ("released",)
        if hold_id in account.ended:
            return ("again",)
        account.ended[hold_id] = Ended("gone")
        return ("tombstone",)

    # Grants and records

    def record(self, account: Account, name: str, amount: int) -> tuple[Any, ...]:
        if name not in account.events:
            account.events[name] = Billed(name, amount, account.is_unlimited, kind="record")
            account.pay()
        return ("recorded", account.events[name].amount)

    def grant(self, account: Account, grant_id: str, amount: int, expires_at: int | None = None) -> tuple[Any, ...]:
        given = account.grants.get(grant_id)
        if given is not None:
            return ("granted", amount) if given.amount == amount else ("conflict",)
        account.grants[grant_id] = Given(amount, expires_at)
        account.pay()
        account.expire(self.now)
        return ("granted", amount)

    def revoke(self, account: Account, grant_id: str) -> tuple[Any, ...]:
        given = account.grants.get(grant_id)
        if given is None:
            return ("unknown",)
        given.revoked, given.spent, given.kept = given.amount - given.expired, 0, 0
        account.pay()
        return ("revoked", given.revoked)
