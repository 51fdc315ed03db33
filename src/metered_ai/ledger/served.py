"""The half of a ledger that serves a remote billing service: balances heard, events claimed and marked, the outbox listed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

from ..core.checks import check_name
from ..core.delivery import Claimed, Mark, Question
from ..records import MAX_TOTAL, OutboxSummary, Undelivered
from .inputs import ID_LIMIT
from .rows import event_of, moment
from .serving import SQL, Ask, Bind, Claim, Hear, MarkSent, Replay
from .sweeping import Sweeping

__all__ = ["Served"]

_PAGE = 500
_STATES = ("waiting", "parked", "dead")


class Served(Sweeping):
    """What `ServiceLedger` asks for besides a ledger."""

    @property
    def service(self) -> str | None:
        """The name of the service that the ledger is bound to; None if it keeps its own credits."""
        with self._reading() as fetch:
            rows = fetch(SQL["service"], ())
        return rows[0][0] if rows else None

    def bind(self, service: str, /) -> None:
        """Open for this service and no other, for ever. ConfigurationError, naming both, where the ledger belongs to another."""
        self._carry_out(Bind(check_name(service, "service", 1024)))

    def ask(self, customer: str, meter: str, /) -> Question:
        """Note that a balance is about to be asked for, before the request is sent."""
        return cast("Question", self._carry_out(Ask(check_name(customer, "customer"), check_name(meter, "meter"))))

    def hear(
        self, question: Question, available: int | None, /, *, reference: str | None = None, limit: int | None = None
    ) -> bool:
        """Take in the answer. False, and nothing changed, where the answer to a later question is known already."""
        for what, value in (("available", available), ("limit", limit)):
            if value is not None and (type(value) is not int or not -MAX_TOTAL <= value <= MAX_TOTAL):
                raise ValueError(f"{what} must be a whole number of credits or None, not {value!r}")
        return cast("bool", self._carry_out(Hear(question, available, reference, limit)))

    def heard_ago(self, customer: str, meter: str, /) -> float | None:
        """Seconds since the balance in use was asked for; None where there is none, or the clock has been set back behind it."""
        check_name(customer, "customer")
        check_name(meter, "meter")
        with self._reading() as fetch:
            rows = fetch(SQL["asked_at"], (customer, meter))
        if not rows or rows[0][0] is None or rows[0][0] > self.now():
            return None
        ago: int = self.now() - rows[0][0]
        return ago / 1_000_000

    def claim(self, claim: str, lease: float, /, *, limit: int = 1, behind: int = 0) -> Claimed | float | None:
        """Claim what is due of one account, the next one behind `behind`; else the seconds until something is, None if nothing waits."""
        check_name(claim, "claim", ID_LIMIT)
        # Looked up outside of the write transaction: a claim that finds nothing locks nothing.
        with self._reading() as fetch:
            now = self.now()
            if not fetch(SQL["claimable"], (0, now)):
                ((due,),) = fetch(SQL["next_due"], ())
                return None if due is None else max(0, due - now) / 1_000_000
        return cast("Claimed | float | None", self._carry_out(Claim(claim, lease, limit, behind)))

    def mark(self, claimed: Claimed, marks: Sequence[Mark], /, *, give_up_after: float = 86400.0) -> tuple[str, ...]:
        """Note what became of a claim's events and end the claim. What each mark came to: its outcome, or `dead` for one too old."""
        return cast("tuple[str, ...]", self._carry_out(MarkSent(claimed, tuple(marks), give_up_after)))

    def has_namesake(self, customer: str, meter: str, transaction_id: str, /) -> bool:
        """Whether another customer has a usage event of this transaction id on the meter. Looks into every account."""
        check_name(transaction_id, "transaction_id", ID_LIMIT)
        with self._reading() as fetch:
            ((found,),) = fetch(SQL["namesake"], (customer, meter, transaction_id))
        return bool(found)

    def replay(
        self, customer: str | None = None, meter: str | None = None, transaction_id: str | None = None, /
    ) -> int:
        """Let parked and dead events wait again, and tell how many. A parked account is replayed as a whole, in order."""
        for what, value, limit in (
            ("customer", customer, ID_LIMIT + 1),
            ("meter", meter, ID_LIMIT + 1),
            ("transaction_id", transaction_id, ID_LIMIT),
        ):
            if value is not None:
                check_name(value, what, limit)
        return cast("int", self._carry_out(Replay(customer, meter, transaction_id)))

    def undelivered(
        self, customer: str | None = None, meter: str | None = None, /, *, state: str | None = None
    ) -> Iterator[Undelivered]:
        """What the service does not have yet, in order within each account. Read in pages."""
        if state is not None and state not in _STATES:
            raise ValueError(f"state must be one of {', '.join(_STATES)}, not {state!r}")
        for what, value in (("customer", customer), ("meter", meter)):
            if value is not None:
                check_name(value, what)
        return self._undelivered(customer, meter, state)

    def _undelivered(self, customer: str | None, meter: str | None, state: str | None) -> Iterator[Undelivered]:
        key = 0
        while True:
            with self._reading() as fetch:
                rows = fetch(SQL["undelivered"], (key, customer, meter, state, _PAGE))
            now = self.now()
            for row in rows:
                yield _undelivered_of(row, now)
            if len(rows) < _PAGE:
                return
            key = rows[-1][0]

    def undelivered_summary(self) -> OutboxSummary:
        """How much the service does not have yet, by state, and how old the oldest of it is."""
        with self._reading() as fetch:
            rows = fetch(SQL["undelivered_counts"], ())
        counts: dict[str, int] = {state: count for state, count, _ in rows}
        oldest = min((created_at for _, _, created_at in rows), default=None)
        age = None if oldest is None else max(0, self.now() - oldest) / 1_000_000
        return OutboxSummary(counts.get("waiting", 0), counts.get("parked", 0), counts.get("dead", 0), age)


def _undelivered_of(row: tuple[Any, ...], now: int) -> Undelivered:
    _, customer, meter, state, amount, attempts, reference, reason, due, *event = row
    found = event_of(customer, meter, tuple(event))
    return Undelivered(
        event=replace(found, reference=reference),
        state=state,
        amount=amount,
        attempts=attempts,
        reason=reason,
        age=max(0.0, (now - event[0]) / 1_000_000),
        not_before=moment(due) if state == "waiting" and due > now else None,
    )
