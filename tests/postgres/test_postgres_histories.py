"""What processes and threads see of one account could have happened one after the other: recorded histories, and forged ones."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace

import pytest

from metered_ai import BillingUnavailableError, InsufficientCreditsError
from metered_ai.core.steps import AddGrant, Place, Release, Settle
from metered_ai.ledger.postgres import PostgresLedger
from metered_ai.ledger.postgres import ledger as postgres_ledger
from tests.postgres.histories import NEVER, UNKNOWN, Operation, explain
from tests.proof.children import LONG

HISTORIES = 100 if LONG else 6
METER = "generations"


def op(kind, *arguments, at, answer):
    """An operation from `at[0]` to `at[1]`."""
    return Operation(kind, arguments, answer, *at)


TRUE = {
    "one after the other": [
        op("grant", "g", 10, at=(0, 1), answer="granted"),
        op("place", "a", 6, at=(2, 3), answer="placed"),
        op("place", "b", 6, at=(4, 5), answer=("refused", 4)),
        op("settle", "a", 8, at=(6, 7), answer="settled"),
        op("balance", at=(8, 9), answer=(10, 8, 0)),
    ],
    "a read beside a hold sees it or does not": [
        op("grant", "g", 10, at=(0, 1), answer="granted"),
        op("place", "a", 6, at=(2, 9), answer="placed"),
        op("balance", at=(3, 4), answer=(10, 0, 0)),
        op("balance", at=(5, 6), answer=(10, 0, 6)),
    ],
    "settled and released at once": [
        op("grant", "g", 10, at=(0, 1), answer="granted"),
        op("place", "a", 6, at=(2, 3), answer="placed"),
        op("settle", "a", 6, at=(4, 9), answer="late"),
        op("release", "a", at=(5, 8), answer="released"),
    ],
    "what nobody knows of may have been done late": [
        op("grant", "g", 10, at=(0, 1), answer="granted"),
        op("place", "a", 6, at=(2, NEVER), answer=UNKNOWN),
        op("balance", at=(3, 4), answer=(10, 0, 0)),
        op("place", "b", 6, at=(5, 6), answer=("refused", 4)),
    ],
}

FORGED = {
    "spent twice": [
        op("grant", "g", 10, at=(0, 1), answer="granted"),
        op("place", "a", 6, at=(2, 9), answer="placed"),
        op("place", "b", 6, at=(3, 8), answer="placed"),
    ],
    "refused although it fitted": [
        op("grant", "g", 10, at=(0, 1), answer="granted"),
        op("place", "a", 6, at=(2, 3), answer=("refused", 4)),
    ],
    "a read of the past": [
        op("grant", "g", 10, at=(0, 1), answer="granted"),
        op("place", "a", 6, at=(2, 3), answer="placed"),
        op("settle", "a", 6, at=(4, 5), answer="settled"),
        op("balance", at=(6, 7), answer=(10, 0, 6)),
    ],
    "a read that goes back": [
        op("grant", "g", 10, at=(0, 1), answer="granted"),
        op("place", "a", 6, at=(2, 9), answer="placed"),
        op("balance", at=(3, 4), answer=(10, 0, 6)),
        op("balance", at=(5, 6), answer=(10, 0, 0)),
    ],
    "settled twice": [
        op("grant", "g", 10, at=(0, 1), answer="granted"),
        op("place", "a", 6, at=(2, 3), answer="placed"),
        op("settle", "a", 6, at=(4, 9), answer="settled"),
        op("settle", "a", 6, at=(5, 8), answer="settled"),
    ],
    "a read of half a settle": [
        op("grant", "g", 10, at=(0, 1), answer="granted"),
        op("place", "a", 6, at=(2, 3), answer="placed"),
        op("settle", "a", 6, at=(4, 9), answer="settled"),
        op("balance", at=(5, 6), answer=(10, 6, 6)),
    ],
    "a lost grant": [
        op("grant", "g", 10, at=(0, 1), answer="granted"),
        op("grant", "h", 10, at=(2, 9), answer="granted"),
        op("grant", "i", 10, at=(3, 8), answer="granted"),
        op("balance", at=(10, 11), answer=(20, 0, 0)),
    ],
}


@pytest.mark.parametrize("name", TRUE)
def test_true(name):
    """What can have happened is explained."""
    assert explain(TRUE[name]) is not None


@pytest.mark.parametrize("name", FORGED)
def test_forged(name):
    """What cannot have happened is found out."""
    assert explain(FORGED[name]) is None


class Caller:
    """Asks one account, and notes what it asked, when, and what came back."""

    def __init__(self, ledger, customer, name, dice):
        self.ledger = ledger
        self.customer = customer
        self.name = name
        self.dice = dice
        self.noted = []

    def note(self, kind, arguments, ask):
        called = time.monotonic_ns()
        try:
            answer = ask()
        except InsufficientCreditsError as error:
            answer = ("refused", error.available)
        except BillingUnavailableError:
            self.noted.append(Operation(kind, arguments, UNKNOWN, called, NEVER))
            return UNKNOWN
        self.noted.append(Operation(kind, arguments, answer, called, time.monotonic_ns()))
        return answer

    def balance(self):
        def ask():
            found = self.ledger.balance(self.customer, METER)
            return found.limit, found.used, found.held

        self.note("balance", (), ask)

    def grant(self, name, amount):
        def ask():
            self.ledger.run(AddGrant(self.customer, METER, amount, name))
            return "granted"

        self.note("grant", (name, amount), ask)

    def place(self, hold, amount):
        def ask():
            self.ledger.run(Place(hold, self.customer, METER, amount, None))
            return "placed"

        return self.note("place", (hold, amount), ask)

    def settle(self, hold, amount):
        step = Settle(hold, self.customer, METER, amount, f"gen_{hold}", "reported", fingerprint=hold)
        self.note("settle", (hold, amount), lambda: self.ledger.run(step).outcome)

    def release(self, hold):
        step = Release(hold, self.customer, METER, "provider_error", "yes")
        self.note("release", (hold,), lambda: self.ledger.run(step).outcome)

    def go(self, calls):
        for number in range(calls):
            hold, amount = f"{self.name}.{number}", self.dice.randrange(1, 8)
            if self.dice.random() < 0.3:
                self.grant(f"g{self.dice.randrange(3)}", 9)
            if self.place(hold, amount) == "placed":
                ends = [lambda: self.settle(hold, amount + self.dice.choice([-1, 0, 0, 2])), lambda: self.release(hold)]  # noqa: B023
                chosen = self.dice.choices(ends, k=self.dice.choice([1, 1, 2]))
                if len(chosen) == 2:
                    # Two ends of one hold at the same moment.
                    racing = threading.Thread(target=chosen.pop())
                    racing.start()
                    chosen[0]()
                    racing.join()
                else:
                    chosen[0]()
            self.balance()


def act(tell, url, customer, name, seed, threads, calls, start):
    """Some threads of one process; tells what each has noted."""
    ledger = PostgresLedger(url, hold_patience=0.3, settle_patience=0.3)
    callers = [
        Caller(ledger, customer, f"{name}{number}", random.Random(seed + 97 * number)) for number in range(threads)
    ]
    tell("ready")
    start.wait(60)
    running = [threading.Thread(target=caller.go, args=(calls,)) for caller in callers]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for caller in callers:
        for noted in caller.noted:
            tell([noted.kind, noted.arguments, noted.answer, noted.called, noted.returned])
    ledger.close()


def heard(told):
    def tuples(value):
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return [Operation(*tuples(line)) for line in told if line != "ready"]


def record(url, customer, fork, seed, *, processes=2, threads=2, calls=5, meanwhile=lambda: None):
    """The history of one account, asked by several processes with several threads each."""
    import multiprocessing

    start = multiprocessing.get_context("fork").Event()
    children = [
        fork(act, url, customer, f"p{number}_", seed + 1009 * number, threads, calls, start)
        for number in range(processes)
    ]
    for child in children:
        child.hear()
    start.set()
    meanwhile()
    history = []
    for child in children:
        told = child.wait()
        assert 0 == child.status, told[-1:]
        history += heard(told)
    return history


def test_recorded(postgres, fork, say):
    """Holds, settles, releases, grants and balances of several processes on one account could have happened one after the other."""
    seed = random.randrange(1 << 30)
    PostgresLedger(postgres).balance("ada", METER)
    count = refused = 0
    for number in range(HISTORIES):
        history = record(postgres, f"customer_{number}", fork, seed + number)
        count += len(history)
        refused += sum(isinstance(operation.answer, tuple) and operation.kind == "place" for operation in history)
        assert explain(history) is not None, (seed + number, history)

        # The same history with one answer changed cannot have happened.
        at = max(range(len(history)), key=lambda at: (history[at].kind == "balance", history[at].returned))
        limit, used, held = history[at].answer
        history[at] = replace(history[at], answer=(limit, used + 1, held))
        assert explain(history) is None

    say(f"PostgreSQL: {HISTORIES} histories (seed {seed}), {count} operations, {refused} refused; all explained")
    assert refused


@pytest.mark.timeout(3600)
def test_recorded_through_a_stop(own_server, own_url, fork, say, monkeypatch):
    """So it is while the server is stopped at once and started again: what failed was done once, later, or never."""
    # Holds and releases are not synced, so a stop may undo the last of them; a history in which it does has no order to be found.
    monkeypatch.setattr(postgres_ledger, "_DURABLE", postgres_ledger._DURABLE | {Place, Release})
    seed = random.randrange(1 << 30)
    ledger = PostgresLedger(own_url)
    ledger.balance("ada", METER)
    unknown = met = 0
    stops = []

    def stop_and_start():
        time.sleep(0.05)
        began = time.monotonic_ns()
        own_server.stop_at_once()
        own_server.start()
        stops.append((began, time.monotonic_ns()))

    for number in range(HISTORIES // 3):
        customer = f"customer_{number}"
        history = record(own_url, customer, fork, seed + number, calls=8, meanwhile=stop_and_start)
        unknown += sum(operation.answer == UNKNOWN for operation in history)
        began, ended = stops[-1]
        met += sum(operation.called < ended and began < operation.returned for operation in history)
        last = Caller(ledger, customer, "last", random.Random(0))
        last.balance()
        assert explain(history + last.noted) is not None, (seed + number, history)

    say(
        f"PostgreSQL: {HISTORIES // 3} histories through a stop (seed {seed}), {met} operations met one, {unknown} answers unknown; all explained"
    )
    assert met
    assert () == ledger.verify().broken
    ledger.close()
