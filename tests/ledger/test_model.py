"""Any sequence of steps leaves a ledger as it leaves the model in `model.py`."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from metered_ai.core.steps import AddGrant, Enlarge, Place, Record, Release, Renew, Revoke, Settle, SetUnlimited, Step
from metered_ai.errors import (
    AlreadyBilledError,
    BillingUnavailableError,
    GrantConflictError,
    InsufficientCreditsError,
)
from metered_ai.ledger import Ledger
from metered_ai.ledger.memory import MemoryLedger
from metered_ai.ledger.sqlite import SqliteLedger
from metered_ai.records import Balance, Grant, Hold, UsageEvent
from metered_ai.testing import Clock
from tests.ledger.model import Account, Model

IS_LONG = os.environ.get("METERED_AI_LONG") == "1"

# Making a failure small takes longer than finding it.
pytestmark = pytest.mark.timeout(3600)

amounts = st.integers(0, 12)
accounts = st.sampled_from([("ada", "calls"), ("ada", "calls"), ("ada", "calls"), ("ada", "images"), ("bob", "calls")])
owners = st.sampled_from(["p1", "p2", None])


def told(ledger: Ledger, step: Step) -> tuple[Any, ...]:
    """What the ledger answers, in the model's words."""
    try:
        result = ledger.run(step)
    except InsufficientCreditsError as error:
        return ("insufficient", error.available, error.required, error.held)
    except AlreadyBilledError as error:
        return ("billed", error.transaction_id, error.event.amount if error.event else None)
    except BillingUnavailableError:
        return ("unavailable",)
    except GrantConflictError:
        return ("conflict",)
    except ValueError:
        return ("unknown",)
    if isinstance(result, Hold):
        return ("held", result.amount, result.transaction_id, result.is_unlimited, result.is_repeat)
    if isinstance(result, UsageEvent):
        return ("recorded", result.amount)
    if isinstance(result, Grant):
        return ("revoked", result.revoked) if isinstance(step, Revoke) else ("granted", result.amount)
    if isinstance(result, int):
        return ("renewed", result)
    if result is None:
        return ()
    if isinstance(step, Settle):
        return (result.outcome, result.event.transaction_id, result.event.amount)
    return (result.outcome,)


def shown(balance: Balance) -> tuple[Any, ...]:
    return balance.limit, balance.used, balance.held, balance.available, balance.debt, balance.unlimited_used


class Books(RuleBasedStateMachine):
    """Steps of two customers in any order, done by a ledger and by the model."""

    holds = Bundle("holds")
    steps = Bundle("steps")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.folder = Path(tempfile.mkdtemp(prefix="metered-ai-"))
        self.ledger = self.make_ledger()
        self.model = Model()
        self.model.move(self.clock.now)
        self.count = 0

    def make_ledger(self) -> Ledger:
        return MemoryLedger(clock=self.clock)

    def teardown(self) -> None:
        self.ledger.close()
        shutil.rmtree(self.folder)

    def account(self, step: Place) -> Account:
        return self.model.account(step.customer, step.meter)

    def do(self, step: Step) -> Step:
        """Both do the step, and both say the same."""
        expected = self.model.do(step)
        actual = told(self.ledger, step)

        assert expected == actual, step
        if actual[:1] in {("insufficient",), ("billed",)}:
            # A refusal may or may not have buried the account's dead; from here on both have.
            self.sweep()
        return step

    @initialize(target=steps, amount=st.integers(1, 30))
    def start(self, amount: int) -> Step:
        return self.do(AddGrant("ada", "calls", amount, "g1"))

    # Holds

    @rule(
        target=holds,
        account=accounts,
        amount=amounts,
        owner=owners,
        policy=st.sampled_from(["release", "release", "charge"]),
        max_call=st.sampled_from([7200, 7200, 300]),
    )
    def place(self, account: tuple[str, str], amount: int, owner: str | None, policy: Any, max_call: int) -> Step:
        self.count += 1
        return self.do(Place(f"h{self.count}", *account, amount, owner, max_call=max_call, on_unknown=policy))

    @rule(
        target=holds,
        amount=amounts,
        owner=owners,
        scope=st.sampled_from(["s1", "s2", "s3"]),
        operation=st.sampled_from(["op", "op", "gen_1"]),
        # Two of one operation that were both charged as orphans would be named by the order of the sweep.
        mode=st.sampled_from([("refuse", "release"), ("refuse", "charge"), ("free", "release")]),
    )
    def place_operation(
        self, amount: int, owner: str | None, scope: str, operation: str, mode: tuple[Any, Any]
    ) -> Step:
        self.count += 1
        on_repeat, on_unknown = mode
        return self.do(
            Place(
                f"h{self.count}",
                "ada",
                "calls",
                amount,
                owner,
                on_unknown=on_unknown,
                operation=operation,
                scope=scope,
                on_repeat=on_repeat,
            )
        )

    @rule(placed=holds, amount=amounts)
    def enlarge(self, placed: Place, amount: int) -> None:
        hold = self.account(placed).holds.get(placed.hold_id)
        if hold and self.model.is_orphan(hold):
            # Whether the dead are buried before or after looking at the hold is for the ledger to choose.
            self.sweep()
        self.do(Enlarge(placed.hold_id, placed.customer, placed.meter, amount))

    @rule(
        target=steps,
        placed=holds,
        amount=amounts,
        answer=st.sampled_from(["gen_1", "gen_2", "gen_2", "gen_3"]),
        is_explicit=st.booleans(),
        fingerprint=st.sampled_from([None, "f1", "f2"]),
    )
    def settle(self, placed: Place, amount: int, answer: str, is_explicit: bool, fingerprint: str | None) -> Step:
        account = self.account(placed)
        ended = account.ended.get(placed.hold_id)
        hold = account.holds.get(placed.hold_id) or (ended.hold if ended else None)
        return self.do(
            Settle(
                placed.hold_id,
                placed.customer,
                placed.meter,
                amount,
                answer,
                "reported",
                is_explicit=is_explicit,
                fingerprint=fingerprint,
                is_unlimited=hold.is_unlimited if hold else account.is_unlimited,
            )
        )

    @rule(target=steps, placed=holds)
    def release(self, placed: Place) -> Step:
        return self.do(Release(placed.hold_id, placed.customer, placed.meter, "provider_error", "yes"))

    @rule(target=holds, account=accounts, amount=amounts)
    def release_too_soon(self, account: tuple[str, str], amount: int) -> Step:
        self.count += 1
        self.do(Release(f"h{self.count}", *account, "cancelled", "no"))
        return self.do(Place(f"h{self.count}", *account, amount, "p1"))

    @rule(placed=holds)
    def place_again(self, placed: Place) -> None:
        hold = self.account(placed).holds.get(placed.hold_id)
        if hold is None or hold.is_repeat or hold.amount == placed.amount:
            self.do(placed)

    @rule(step=steps)
    def again(self, step: Step) -> None:
        self.do(step)

    # Time

    @rule(seconds=st.sampled_from([1, 13, 29, 47, 61]))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)
        self.model.move(self.clock.now)

    @rule(owner=st.sampled_from(["p1", "p2"]))
    def crash(self, owner: str) -> None:
        """The owner is never heard of again; the other lives on."""
        self.do(Renew("p2" if owner == "p1" else "p1", 240))
        self.clock.advance(121)
        self.model.move(self.clock.now)

    @rule(owner=st.sampled_from(["p1", "p2"]))
    def renew(self, owner: str) -> None:
        self.do(Renew(owner, 120))

    @rule()
    def sweep(self) -> None:
        recovery = self.ledger.sweep()

        assert self.model.sweep() == (recovery.released, recovery.charged)

    @rule()
    def recover(self) -> None:
        recovery = self.ledger.recover()

        assert self.model.sweep() == (recovery.released, recovery.charged)

    # Credits

    @rule(
        target=steps,
        account=accounts,
        amount=st.integers(1, 15),
        name=st.sampled_from(["g1", "g2", "g3", "g4", "g5"]),
        seconds=st.sampled_from([None, None, -5, 10, 60, 100, 150, 300]),
    )
    def grant(self, account: tuple[str, str], amount: int, name: str, seconds: int | None) -> Step:
        expires_at = None if seconds is None else self.clock.at(seconds)
        return self.do(AddGrant(*account, amount, name, expires_at))

    @rule(account=accounts, name=st.sampled_from(["g1", "g2", "g3", "g4", "g5"]))
    def revoke(self, account: tuple[str, str], name: str) -> None:
        self.do(Revoke(*account, name))

    @rule(account=accounts, is_unlimited=st.sampled_from([True, False, False]))
    def set_unlimited(self, account: tuple[str, str], is_unlimited: bool) -> None:
        self.do(SetUnlimited(*account, is_unlimited))

    @rule(
        target=steps,
        account=accounts,
        amount=amounts,
        name=st.sampled_from(["rec", "gen_1", "gen_3", "op.2"]),
    )
    def record(self, account: tuple[str, str], amount: int, name: str) -> Step:
        return self.do(Record(*account, name, amount))

    # What must be equal after each

    @invariant()
    def same_balances(self) -> None:
        for (customer, meter), account in self.model.accounts.items():
            assert account.balance() == shown(self.ledger.balance(customer, meter)), (customer, meter)

    @invariant()
    def same_events(self) -> None:
        expected = {
            (customer, meter, event.id, event.amount, event.is_unlimited, event.is_late, event.kind)
            for (customer, meter), account in self.model.accounts.items()
            for event in account.events.values()
        }
        events = list(self.ledger.usage_events())

        assert len(expected) == len(events)
        assert expected == {
            (e.customer, e.meter, e.transaction_id, e.amount, e.is_unlimited, e.is_late, e.kind) for e in events
        }

    @invariant()
    def same_holds(self) -> None:
        expected = {
            (hold.step.hold_id, hold.amount, hold.number, hold.is_unlimited, hold.is_repeat)
            for account in self.model.accounts.values()
            for hold in account.holds.values()
        }

        assert expected == {
            (h.id, h.amount, h.transaction_id, h.is_unlimited, h.is_repeat) for h in self.ledger.holds(state="open")
        }

    @invariant()
    def sound(self) -> None:
        assert () == self.ledger.verify().broken


class SqliteBooks(Books):
    """The same on a file. Durability changes when a commit returns, never what it holds, so the quicker one will do."""

    def make_ledger(self) -> Ledger:
        return SqliteLedger(self.folder / "credits.db", durability="relaxed", clock=self.clock)


class TestMemory(Books.TestCase):
    settings = settings(
        max_examples=2000 if IS_LONG else 60,
        stateful_step_count=60 if IS_LONG else 30,
        # The same examples each time, so that nobody's commit turns red by chance; the long run looks further.
        derandomize=not IS_LONG,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


class TestSqlite(SqliteBooks.TestCase):
    settings = settings(TestMemory.settings, max_examples=400 if IS_LONG else 20)
