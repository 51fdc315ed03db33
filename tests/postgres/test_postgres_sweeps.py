"""Sweeps of orphans beside others: whoever has an account locked holds up nobody else's orphans, and each is resolved once."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg
import pytest

from metered_ai import connect
from metered_ai.core.steps import AddGrant, Place, Release, Renew, Settle
from metered_ai.ledger.book import TOMBSTONE_KEPT
from metered_ai.ledger.postgres import PostgresLedger
from metered_ai.ledger.postgres import ledger as module

CUSTOMERS = [f"c{number}" for number in range(5)]
LOCKED = "c2"


def server_of(url: str) -> str:
    return url.rpartition("schema=")[0].rstrip("?&")


def schema_of(url: str) -> str:
    return url.rpartition("schema=")[2]


def place_orphans(url: str, customers: list[str], each: int, on_unknown: Any = "release") -> None:
    """Holds of a process whose lease is out at once."""
    with closing(PostgresLedger(url)) as ledger:
        ledger.run(Renew("dead", 60.0))
        steps: list[Any] = [AddGrant(customer, "calls", each, "g1") for customer in customers]
        steps += [
            Place(f"{customer}.{number}", customer, "calls", 1, "dead", lease=60.0, on_unknown=on_unknown)
            for number in range(each)
            for customer in customers
        ]
        assert [] == [outcome for outcome in ledger.submit_all(steps).result(60) if isinstance(outcome, Exception)]
        ledger.run(Renew("dead", 0.001))
        time.sleep(0.01)


def held(ledger: Any, customers: list[str]) -> dict[str, int]:
    return {customer: ledger.balance(customer, "calls").held for customer in customers}


@contextmanager
def locked(url: str, customer: str = LOCKED) -> Iterator[None]:
    """Another session is in the middle of something with this customer's account."""
    with psycopg.connect(server_of(url)) as other:
        other.execute(f'SELECT no FROM "{schema_of(url)}".account WHERE customer = %s FOR UPDATE', (customer,))
        yield
        other.rollback()


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


class TestLocked:
    """Somebody else's transaction has the row of one account with orphans."""

    def test_recover(self, postgres: str) -> None:
        """The others' orphans are resolved without waiting, and its own once it is free."""
        place_orphans(postgres, CUSTOMERS, 3)
        with closing(PostgresLedger(postgres, settle_patience=1)) as ledger:
            with locked(postgres):
                assert 12 == ledger.recover().resolved
                assert {customer: 3 * (customer == LOCKED) for customer in CUSTOMERS} == held(ledger, CUSTOMERS)
                assert 0 == ledger.recover().resolved
            assert 3 == ledger.recover().resolved
            assert {0} == set(held(ledger, CUSTOMERS).values())
            assert () == ledger.verify().broken

    def test_limit(self, postgres: str) -> None:
        """Also where it has more orphans than one sweep may resolve; what a sweep passes over does not count for its limit."""
        place_orphans(postgres, CUSTOMERS, 3)
        with closing(PostgresLedger(postgres, settle_patience=1)) as ledger:
            with locked(postgres, CUSTOMERS[0]):
                assert [2] * 6 == [ledger.sweep(2).resolved for _ in range(6)]
                assert 0 == ledger.sweep(2).resolved
            assert [2, 1, 0] == [ledger.sweep(2).resolved for _ in range(3)]
            assert () == ledger.verify().broken

    def test_background(self, postgres: str, tmp_path: Any) -> None:
        """The sweeps that a process does by itself pass it over, and come back to it."""
        place_orphans(postgres, CUSTOMERS, 3)
        with connect(postgres, spool=str(tmp_path), lease=1.5, heartbeat=0.5, settle_patience=60) as billing:
            others = [customer for customer in CUSTOMERS if customer != LOCKED]
            with locked(postgres):
                # Leases are renewed, and sweeps done, by a process that has called.
                with billing.charge(others[0], "calls", amount=0):
                    until(lambda: {0} == set(held(billing, others).values()), "the others' orphans are resolved")
                assert {LOCKED: 3} == held(billing, [LOCKED])
            until(lambda: {LOCKED: 0} == held(billing, [LOCKED]), "its own are resolved when it is free")
            assert () == billing.verify().broken


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What the server says of every transaction that fails from now on."""
    seen: list[str | None] = []
    inner = PostgresLedger._transact

    def transact(self: PostgresLedger, connection: Any, step: Any) -> object:
        try:
            return inner(self, connection, step)
        except Exception as error:
            seen.append(module.failures.state_of(error))
            raise

    monkeypatch.setattr(PostgresLedger, "_transact", transact)
    return seen


def test_side_by_side(postgres: str, states: list[str | None]) -> None:
    """Sweeps of several processes resolve every orphan once, and never wait for each other: no deadlock, and nothing is tried again."""
    customers, each = [f"c{number}" for number in range(40)], 20
    place_orphans(postgres, customers, each, on_unknown="charge")
    ledgers = [PostgresLedger(postgres) for _ in range(3)]
    for ledger in ledgers:
        ledger.balance("ada", "calls")
    barrier = threading.Barrier(len(ledgers))
    resolved: Counter[int] = Counter()
    errors: list[Exception] = []

    def sweep(number: int) -> None:
        barrier.wait(60)
        try:
            while {0} != set(held(ledgers[number], customers).values()):
                resolved[number] += ledgers[number].sweep(50).resolved
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=sweep, args=(number,)) for number in range(len(ledgers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [] == errors
    assert [] == states
    assert len(customers) * each == resolved.total()
    billed = Counter(event.hold_id for event in ledgers[0].usage_events())
    assert {f"{customer}.{number}": 1 for customer in customers for number in range(each)} == billed
    assert () == ledgers[0].verify().broken
    for ledger in ledgers:
        ledger.close()


class TestTombstones:
    """What is thrown away when it is old is nobody's to wait for either."""

    @pytest.fixture
    def old(self, postgres: str) -> None:
        with closing(PostgresLedger(postgres)) as ledger:
            ledger.run(AddGrant("ada", "calls", 5, "g1"))
            for number in range(3):
                ledger.run(Release(f"t{number}", "ada", "calls", "cancelled", "no"))

    @pytest.fixture
    def ledger(self, postgres: str) -> Iterator[PostgresLedger]:
        """A ledger for which those tombstones are old."""
        late = time.time_ns() // 1000 + 2 * TOMBSTONE_KEPT
        with closing(PostgresLedger(postgres, clock=lambda: late, settle_patience=1)) as ledger:
            yield ledger

            assert () == ledger.verify().broken

    @pytest.mark.usefixtures("old")
    def test_locked(self, postgres: str, ledger: PostgresLedger, states: list[str | None]) -> None:
        """One that somebody is at is left to the next sweep, as it is then: a late settle of it is not forgotten."""
        schema = schema_of(postgres)
        with psycopg.connect(server_of(postgres)) as other:
            other.execute(f"UPDATE \"{schema}\".ended_hold SET state = 'settled' WHERE hold_id = 't1'")
            ledger.recover()
            assert [("t1",)] == other.execute(f'SELECT hold_id FROM "{schema}".ended_hold').fetchall()
            other.rollback()
        assert [] == states
        ledger.run(Settle("t1", "ada", "calls", 1, "gen_1", "reported"))
        ledger.recover()

        assert ["gen_1"] == [event.transaction_id for event in ledger.usage_events()]
