"""
Any interleaving of questions, answers, holds, settles, sends and acknowledgements never lets more through than the service's number allows.

The model knows what a ledger cannot: the service's true number at every moment. A question is asked, read and heard in three steps, a
usage event is claimed, recorded and marked in three, and anything may happen in between, also the loss of an answer.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from metered_ai.core.delivery import Claimed, Mark
from metered_ai.core.steps import Place, Record, Release, Renew, Settle
from metered_ai.errors import InsufficientCreditsError
from metered_ai.ledger.memory import MemoryLedger
from metered_ai.testing import Clock

IS_LONG = os.environ.get("METERED_AI_LONG") == "1"

ADA = ("ada", "calls")
LEASE = 60.0
amounts = st.sampled_from([0, 1, 2, 3, 4, 5, 6])


class Spending(RuleBasedStateMachine):
    """
    One account. What the service gave in all is `given`; what it has recorded, `recorded`; so its number is the difference.

    The promise: what the ledger would let through is never more than what was given, less all that was used or is held by then. Only
    usage after the fact, which nobody asks for, may go beyond.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.ledger = MemoryLedger(clock=self.clock)
        self.ledger.bind("model")
        self.given = 0
        self.recorded: dict[str, int] = {}
        self.used: dict[str, int] = {}
        self.held: dict[str, int] = {}
        self.orphaned: dict[str, int] = {}
        self.questions = []
        self.claims: list[tuple[Claimed, bool]] = []
        self.count = 0
        self.owner = "p"

    def teardown(self) -> None:
        self.ledger.close()

    def told(self) -> int:
        return sum(self.recorded.values())

    @initialize(amount=st.sampled_from([30, 12, 5]))
    def start(self, amount: int) -> None:
        self.given = amount
        self.ledger.hear(self.ledger.ask(*ADA), amount)

    @rule(amount=st.integers(1, 9))
    def top_up(self, amount: int) -> None:
        self.given += amount

    # A balance is asked for, read at the service, and heard, each when it likes.

    @precondition(lambda self: len(self.questions) < 4)
    @rule()
    def ask(self) -> None:
        self.questions.append([self.ledger.ask(*ADA), None])

    @precondition(lambda self: any(number is None for _, number in self.questions))
    @rule(data=st.data())
    def read(self, data) -> None:
        open_ones = [question for question in self.questions if question[1] is None]
        data.draw(st.sampled_from(open_ones))[1] = self.given - self.told()

    @precondition(lambda self: any(number is not None for _, number in self.questions))
    @rule(data=st.data())
    def hear(self, data) -> None:
        question = data.draw(st.sampled_from([one for one in self.questions if one[1] is not None]))
        self.questions.remove(question)
        self.ledger.hear(question[0], question[1])

    # Calls.

    @rule(amount=amounts, policy=st.sampled_from(["release", "release", "charge"]))
    def place(self, amount: int, policy) -> None:
        self.count += 1
        before = sum(self.used.values()) + sum(self.held.values())
        hold_id = f"h{self.count}"
        try:
            self.ledger.run(Place(hold_id, *ADA, amount, self.owner, lease=1e8, max_call=1e8, on_unknown=policy))
        except InsufficientCreditsError:
            return
        self.held[hold_id] = amount

        assert amount == 0 or before + amount <= self.given

    @rule(amount=st.sampled_from([3, 5, 1]))
    def use(self, amount: int) -> None:
        """A whole call."""
        self.place(amount, "release")
        hold_id = f"h{self.count}"
        if hold_id in self.held:
            del self.held[hold_id]
            self.ledger.run(Settle(hold_id, *ADA, amount, f"gen_{hold_id}", "reported"))
            self.used[f"gen_{hold_id}"] = amount

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def settle(self, data) -> None:
        hold_id = data.draw(st.sampled_from(sorted(self.held)))
        amount = data.draw(st.integers(0, self.held.pop(hold_id)))
        self.ledger.run(Settle(hold_id, *ADA, amount, f"gen_{hold_id}", "reported"))
        self.used[f"gen_{hold_id}"] = amount

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data) -> None:
        hold_id = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[hold_id]
        self.ledger.run(Release(hold_id, *ADA, "provider_error", "yes"))

    @rule(amount=amounts)
    def record(self, amount: int) -> None:
        self.count += 1
        self.ledger.run(Record(*ADA, f"rec_{self.count}", amount))
        self.used[f"rec_{self.count}"] = amount

    @precondition(lambda self: self.held)
    @rule()
    def die(self) -> None:
        """The owner of every hold dies; those that are charged may be corrected later."""
        self.ledger.run(Renew(self.owner, 1e-6))
        self.clock.advance(1)
        self.ledger.recover()
        self.owner += "'"
        for hold in self.ledger.holds(state="charged"):
            if hold.id in self.held:
                self.used[f"hold_{hold.id}"] = self.orphaned[hold.id] = self.held[hold.id]
        self.held.clear()

    @precondition(lambda self: not self.held)
    @rule(amount=st.sampled_from([4, 6]), is_told=st.booleans())
    def orphan(self, amount: int, is_told: bool) -> None:
        """One that is charged, and told of or not."""
        self.place(amount, "charge")
        if self.held:
            self.die()
        if is_told:
            self.wait(3600)
            self.deliver()

    @precondition(lambda self: self.orphaned)
    @rule(data=st.data())
    def correct(self, data) -> None:
        """The truth about a charged orphan comes after all."""
        hold_id = data.draw(st.sampled_from(sorted(self.orphaned)))
        charged = self.orphaned.pop(hold_id)
        truth = data.draw(st.integers(0, 6))
        name = f"hold_{hold_id}"
        waiting = {one.event.transaction_id: one.attempts for one in self.ledger.undelivered()}
        self.ledger.run(Settle(hold_id, *ADA, truth, f"gen_{hold_id}", "reported"))
        if truth > charged:
            self.used[f"{name}.c1"] = truth - charged
        elif waiting.get(name) == 0:
            # Nobody has told the service yet, so that it is told the truth. Otherwise what was too much is its to give back.
            self.used[name] = truth

    # An event is claimed, recorded by the service, and marked; each answer may be lost, and each claim may run out.

    @rule()
    def claim(self) -> None:
        found = self.ledger.claim(f"c{self.count}-{len(self.claims)}", LEASE)
        if isinstance(found, Claimed):
            self.claims.append([found, False])

    @precondition(lambda self: any(not sent for _, sent in self.claims))
    @rule(data=st.data())
    def send(self, data) -> None:
        claim = data.draw(st.sampled_from([one for one in self.claims if not one[1]]))
        claim[1] = True
        (outgoing,) = claim[0].events
        # The first stands, as everywhere.
        self.recorded.setdefault(outgoing.event.transaction_id, outgoing.event.amount)

        assert self.recorded[outgoing.event.transaction_id] == outgoing.event.amount

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), is_lost=st.sampled_from([False, False, True]))
    def mark(self, data, is_lost: bool) -> None:
        claim = data.draw(st.sampled_from(self.claims))
        self.claims.remove(claim)
        claimed, is_sent = claim
        outcome = "delivered" if is_sent and not is_lost else "again"
        self.ledger.mark(claimed, [Mark(claimed.events[0].no, outcome)])

    @rule()
    def deliver(self) -> None:
        """All three, for everything that is due."""
        while isinstance(found := self.ledger.claim("all", LEASE), Claimed):
            (outgoing,) = found.events
            self.recorded.setdefault(outgoing.event.transaction_id, outgoing.event.amount)
            self.ledger.mark(found, [Mark(outgoing.no, "delivered")])

    @rule(seconds=st.sampled_from([1, 61, 3600]))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @invariant()
    def nothing_twice(self) -> None:
        spent = sum(self.used.values()) + sum(self.held.values())

        assert (self.ledger.balance(*ADA).available or 0) <= max(0, self.given - spent)

    @invariant()
    def sound(self) -> None:
        assert () == self.ledger.verify().broken

    @invariant()
    def told_the_truth(self) -> None:
        """What the service has recorded is what was used, under the same ids; nothing else."""
        for name, amount in self.recorded.items():
            assert self.used[name] == amount, name


class TestSpending(Spending.TestCase):
    settings = settings(
        max_examples=3000 if IS_LONG else 200,
        stateful_step_count=60 if IS_LONG else 40,
        derandomize=not IS_LONG,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
