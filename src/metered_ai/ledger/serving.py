"""What a ledger does for a remote billing service that it is bound to, inside a transaction that the caller began."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..core.delivery import Claimed, Mark, Outgoing, Question
from ..core.steps import AddGrant, Enlarge, Place, Revoke, SetUnlimited
from ..errors import ConfigurationError
from ..records import MAX_TOTAL
from .accounts import Account
from .book import Book
from .rows import event_of
from .statements import read_script, read_statements

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SQL", "Ask", "Bind", "Claim", "Hear", "MarkSent", "Replay", "ServiceStep", "Serving"]

SQL = read_statements("outbox.sql")
_SECOND = 1_000_000


@dataclass(frozen=True, slots=True)
class Bind:
    """Bind the ledger to the service of this name, for ever."""

    service: str


@dataclass(frozen=True, slots=True)
class Ask:
    """A balance is about to be asked for."""

    customer: str
    meter: str


@dataclass(frozen=True, slots=True)
class Hear:
    """The answer to a question."""

    question: Question
    available: int | None
    reference: str | None
    limit: int | None


@dataclass(frozen=True, slots=True)
class Claim:
    """Hand out what is due of one account, behind this account's number if there is any."""

    claim: str
    lease: float
    limit: int
    behind: int


@dataclass(frozen=True, slots=True)
class MarkSent:
    """What became of a claim's events; ends the claim."""

    claimed: Claimed
    marks: tuple[Mark, ...]
    give_up_after: float


@dataclass(frozen=True, slots=True)
class Replay:
    """Let parked and dead events wait again."""

    customer: str | None
    meter: str | None
    transaction_id: str | None


ServiceStep = Bind | Ask | Hear | Claim | MarkSent | Replay


class Serving(Book):
    """A book that also knows the steps of a service. Where the ledger is not bound to one, it is a book and nothing else."""

    def serve(self, service: str | None) -> None:
        """
        Take the steps of a service, too, on behalf of this one.

        Where the ledger is bound, credits are given there and not here; and whoever does not come for that service may read and settle, but
        places no hold: nobody would keep its balances fresh.
        """
        ways: dict[type, Callable[[Any, int], Any]] = {
            Bind: self._bind,
            Ask: self._ask,
            Hear: self._hear,
            Claim: self._claim,
            MarkSent: self._mark,
            Replay: self._replay,
        }
        self._ways.update(ways)
        bound = self.bound_to()
        if bound is not None:
            self._refuse(
                (AddGrant, Revoke, SetUnlimited),
                f"the balances of this ledger are kept by {bound!r}: credits are given, taken back and made unlimited there",
            )
            if bound != service:
                self._refuse(
                    (Place, Enlarge),
                    f"this ledger is bound to {bound!r} and was opened without it: give Billing its service=",
                )
            else:
                self._ways[Place], self._ways[Enlarge] = self._place, self._enlarge

    def _refuse(self, kinds: tuple[type, ...], message: str) -> None:
        def refuse(step: Any, now: int) -> None:  # noqa: ARG001  as every step
            raise ConfigurationError(message)

        for kind in kinds:
            self._ways[kind] = refuse

    def bound_to(self) -> str | None:
        """The service that the ledger is bound to."""
        rows = self._execute(SQL["service"], ()).fetchall()
        return rows[0][0] if rows else None

    def _bind(self, step: Bind, now: int) -> None:
        name = self.bound_to()
        if name == step.service:
            self.serve(step.service)
            return
        if name is not None:
            raise ConfigurationError(
                f"the ledger is bound to {name!r} and cannot serve {step.service!r}: usage of the two would be mixed; "
                "use another ledger"
            )
        if self._execute(SQL["own_books"], ()).fetchall()[0][0]:
            raise ConfigurationError(
                f"the ledger has credits and usage of its own that {step.service!r} knows nothing of; use a new ledger for the service"
            )
        self._execute(SQL["bound"], (step.service, now))
        self._execute(SQL["accounts_bound"], ())
        self._keep_outbox()
        self.serve(step.service)

    def _keep_outbox(self) -> None:
        """Have every usage event written into the outbox, too, from now on."""
        for statement in read_script("binding.sql"):
            self._execute(statement, ())

    # Balances

    def _ask(self, step: Ask, now: int) -> Question:
        # An account that is not there yet is made by the answer: a customer whom the service does not know leaves no row.
        rows = self._execute(SQL["asked"], (step.customer, step.meter)).fetchall()
        number, acknowledged = rows[0] if rows else (0, 0)
        return Question(step.customer, step.meter, number, acknowledged, now)

    def _hear(self, step: Hear, now: int) -> bool:
        question = step.question
        account = self._account(question.customer, question.meter, now)
        if account is None:
            account = self._new_account(question.customer, question.meter)
        ((_, corrected, heard, asked_at),) = self._execute(SQL["service_account"], (account.no,)).fetchall()
        self._execute(SQL["answered"], (now,))
        if heard is not None and (question.number, question.asked_at) <= (heard, asked_at):
            return False

        account.is_unlimited = step.available is None
        if step.available is not None:
            # So that limit - used - held is what the service said, less what it had not acknowledged when asked, less open holds;
            # of what was used or held while unlimited nothing is in `used` and `held`.
            limit = step.available + question.acknowledged + corrected - account.unlimited_used - account.unlimited_held
            account.funds.limit = min(max(0, limit), MAX_TOTAL)
        self._save(account)
        self._refer(account, step.reference, now)
        self._execute(SQL["heard"], (account.no, question.number, question.asked_at, step.limit))
        return True

    def _refer(self, account: Account, reference: str | None, now: int) -> None:
        """Keep the service's word from now on, behind every hold that is open."""
        rows = self._execute(SQL["last_reference"], (account.no,)).fetchall()
        if not rows:
            self._execute(SQL["new_reference"], (account.no, 0, reference))
            self._execute(SQL["outbox_referred"], (account.no, reference))
            return
        since, last = rows[0]
        if last != reference:
            ((placed_at,),) = self._execute(SQL["last_placed"], (account.no,)).fetchall()
            self._execute(SQL["new_reference"], (account.no, max(now, since + 1, (placed_at or 0) + 1), reference))

    # Sending

    def _claim(self, step: Claim, now: int) -> Claimed | float | None:
        rows = self._execute(SQL["claimable"], (step.behind, now)).fetchall()
        if not rows and step.behind:
            rows = self._execute(SQL["claimable"], (0, now)).fetchall()
        if not rows:
            ((due,),) = self._execute(SQL["next_due"], ()).fetchall()
            return None if due is None else max(0, due - now) / _SECOND

        account_no, failures, is_heard, customer, meter = rows[0]
        due = self._execute(SQL["due"], (account_no, now, step.limit)).fetchall()
        if len(due) > 1:
            # Several go together only where nobody has tried them: of one that was tried before the service may know already.
            fresh = next((index for index, row in enumerate(due) if row[2] or row[4] is not None), len(due))
            due = due[: max(1, fresh)]
        self._execute(SQL["claimed"], (account_no, step.claim, now + int(step.lease * _SECOND)))
        events: list[Outgoing] = []
        for row in due:
            self._execute(SQL["tried"], (row[0], now))
            event = event_of(customer, meter, row[5:])
            own_id = event.transaction_id
            event = replace(event, transaction_id=row[4] or own_id, amount=row[1], reference=row[3])
            events.append(Outgoing(row[0], event, row[2] + 1, own_id))
        return Claimed(step.claim, account_no, customer, meter, failures, bool(is_heard), tuple(events))

    def _mark(self, step: MarkSent, now: int) -> tuple[str, ...]:
        account_no = step.claimed.account_no
        came_to = tuple([self._mark_one(account_no, mark, step.give_up_after, now) for mark in step.marks])
        pauses = [mark.pause for mark, outcome in zip(step.marks, came_to, strict=True) if outcome == "again"]
        if pauses:
            # After what went well: however many failed together, it is one failure.
            self._execute(SQL["failed"], (account_no, now + int(max(pauses) * _SECOND)))
        if self._execute(SQL["unclaimed"], (account_no, step.claimed.claim)).rowcount:
            marked = {mark.no for mark in step.marks}
            for outgoing in step.claimed.events:
                if outgoing.no not in marked:
                    self._execute(SQL["untried"], (outgoing.no,))
        return came_to

    def _mark_one(self, account_no: int, mark: Mark, give_up_after: float, now: int) -> str:
        if mark.outcome == "delivered":
            self._execute(SQL["answered"], (now,))
            # Whoever had the claim before may have marked it: once counts.
            for amount, reference in self._execute(SQL["sent"], (mark.no,)).fetchall():
                self._deliver(account_no, mark.no, amount, reference, mark.details, now)
        elif mark.outcome == "again":
            rows = self._execute(SQL["failing"], (mark.no, mark.reason, now)).fetchall()
            since = rows[0][0] if rows else None
            if since is not None and now - since >= give_up_after * _SECOND and self._answers(now):
                self._execute(SQL["dead"], (mark.no, mark.reason))
                self._execute(SQL["went_on"], (account_no,))
                return "dead"
        elif mark.outcome == "alone":
            # Not counted as a try: whatever else is asked of it, the service has told us that it does not have it.
            self._execute(SQL["answered"], (now,))
            self._execute(SQL["alone"], (mark.no, mark.send_as, mark.reason))
            self._execute(SQL["untried"], (mark.no,))
            self._execute(SQL["went_on"], (account_no,))
        elif mark.outcome == "aside":
            self._execute(SQL["answered"], (now,))
            self._execute(SQL["aside"], (mark.no, mark.reason))
            self._execute(SQL["went_on"], (account_no,))
        elif mark.outcome == "park":
            self._execute(SQL["reasoned"], (mark.no, mark.reason))
            self._execute(SQL["account_parked"], (account_no, mark.reason or "parked"))
            self._execute(SQL["outbox_parked"], (account_no,))
        elif mark.outcome == "dead":
            self._execute(SQL["answered"], (now,))
            self._execute(SQL["dead"], (mark.no, mark.reason))
            self._execute(SQL["went_on"], (account_no,))
        else:
            self._execute(SQL["reasoned"], (mark.no, mark.reason))
        return mark.outcome

    def _deliver(
        self, account_no: int, no: int, amount: int, reference: str | None, details: Mapping[str, str], now: int
    ) -> None:
        said = json.dumps(dict(details), ensure_ascii=False, separators=(",", ":"))
        self._execute(SQL["new_delivery"], (no, amount, now, reference, said))
        self._execute(SQL["acknowledged"], (account_no, amount))

    def _answers(self, now: int) -> bool:
        """The service has answered to somebody within the last hour: what fails is this event, not the service."""
        return any(
            now - answered_at < 3600 * _SECOND for _, answered_at in self._execute(SQL["service"], ()).fetchall()
        )

    def _replay(self, step: Replay, now: int) -> int:  # noqa: ARG002  as every step
        found = self._execute(SQL["put_aside"], (step.customer, step.meter, step.transaction_id)).fetchall()
        count = 0
        for no, _, state in found:
            if state == "dead":
                self._execute(SQL["revived"], (no,))
                count += 1
        for account_no in {account_no for _, account_no, state in found if state == "parked"}:
            # As a whole, so that its events keep their order.
            count += len(self._execute(SQL["unparked"], (account_no,)).fetchall())
            self._execute(SQL["account_unparked"], (account_no,))
        return count
