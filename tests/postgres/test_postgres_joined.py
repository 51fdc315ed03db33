"""Grants and records inside a transaction of the application's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from metered_ai import Billing, ConfigurationError, GrantConflictError, connect
from metered_ai.core.steps import Place, Settle
from metered_ai.errors import BillingUnavailableError


def server_of(url: str) -> str:
    return url.rpartition("schema=")[0].rstrip("?&")


def schema_of(url: str) -> str:
    return url.rpartition("schema=")[2]


@pytest.fixture
def billing(postgres: str, tmp_path: Any) -> Iterator[Billing]:
    with connect(postgres, spool=str(tmp_path)) as billing:
        billing.grant("bob", "calls", 10, id="g1")
        yield billing
        assert () == billing.verify().broken


@pytest.fixture
def shop(postgres: str, billing: Billing) -> Iterator[psycopg.Connection[Any]]:
    """The application's own connection, and its table of orders."""
    with psycopg.connect(server_of(postgres)) as connection:
        connection.execute(f'CREATE TABLE "{schema_of(postgres)}".orders (id text PRIMARY KEY)')
        connection.commit()
        yield connection
        connection.rollback()


def pay(shop: psycopg.Connection[Any], postgres: str, billing: Billing, order: str = "order_1") -> None:
    shop.execute(f'INSERT INTO "{schema_of(postgres)}".orders VALUES (%s)', (order,))
    with billing.in_transaction(shop) as books:
        assert 100 == books.grant("ada", "calls", 100, id=order).amount
        assert "setup_1" == books.record("ada", "exports", transaction_id="setup_1", amount=3).transaction_id


def test_committed_together(shop, postgres, billing):
    """An order, its grant and a record show when the application commits, and not before."""
    pay(shop, postgres, billing)

    assert 0 == billing.balance("ada", "calls").available
    shop.commit()
    assert 100 == billing.balance("ada", "calls").available
    assert ["setup_1"] == [event.transaction_id for event in billing.usage_events("ada", "exports")]


def test_rolled_back_together(shop, postgres, billing):
    """What the application takes back was never given, and the same order can come again."""
    pay(shop, postgres, billing)
    shop.rollback()

    assert [] == billing.balances("ada")
    pay(shop, postgres, billing)
    shop.commit()
    assert 100 == billing.balance("ada", "calls").available


def test_goes_on_after_a_refusal(shop, postgres, billing):
    """A grant that is refused takes nothing of the transaction with it."""
    pay(shop, postgres, billing)
    with billing.in_transaction(shop) as books:
        with pytest.raises(GrantConflictError):
            books.grant("ada", "calls", 7, id="order_1")
        with pytest.raises(ValueError, match="does not exist"):
            books.revoke("ada", "calls", "nothing")
        with pytest.raises(ValueError, match="amount"):
            books.grant("ada", "calls", -1, id="g2")
        books.set_unlimited("ada", "images", True)
    shop.commit()

    assert 100 == billing.balance("ada", "calls").available
    assert billing.balance("ada", "images").available is None


def test_slow_transaction(shop, postgres, billing):
    """While the application takes its time after a grant, the customer's hold waits for it and everybody else goes on."""
    ledger = billing.ledger
    billing.grant("ada", "calls", 1, id="g0")
    pay(shop, postgres, billing)

    stuck = ledger.submit_all([Place("h1", "ada", "calls", 50, "p1"), Place("h2", "bob", "calls", 1, "p1")])
    for number in range(5):
        ledger.run(Place(f"b{number}", "bob", "calls", 1, "p1"))
        ledger.run(Settle(f"b{number}", "bob", "calls", 1, f"gen_{number}", "reported"))
    assert not stuck.done()
    shop.commit()

    # It is decided on the balance with the new grant.
    assert ["h1", "h2"] == [hold.id for hold in stuck.result(10)]
    assert 51 == billing.balance("ada", "calls").available


def test_same_order_twice_at_once(shop, postgres, billing):
    """Two webhooks of one order give one grant, whichever commits first."""
    import threading

    with psycopg.connect(server_of(postgres)) as second:
        with billing.in_transaction(shop) as books:
            books.grant("ada", "calls", 100, id="order_1")
        results: list[Any] = []

        def again() -> None:
            with billing.in_transaction(second) as books:
                results.append(books.grant("ada", "calls", 100, id="order_1"))
            second.commit()

        thread = threading.Thread(target=again)
        thread.start()
        thread.join(0.2)
        assert [] == results
        shop.commit()
        thread.join(10)

    assert [100] == [given.amount for given in results]
    assert 100 == billing.balance("ada", "calls").available


def test_needs_a_transaction(postgres, billing):
    """A connection that commits each statement is refused, unless a transaction was begun on it."""
    with psycopg.connect(server_of(postgres), autocommit=True) as connection:
        with billing.in_transaction(connection) as books, pytest.raises(ConfigurationError, match="autocommit"):
            books.grant("ada", "calls", 1, id="g1")
        with connection.transaction(), billing.in_transaction(connection) as books:
            books.grant("ada", "calls", 2, id="g2")

    assert 2 == billing.balance("ada", "calls").available


def test_refused(shop, billing, tmp_path):
    """Another ledger, no psycopg connection, and a block that is over are refused."""
    with (
        connect(f"sqlite:///{tmp_path / 'credits.db'}") as other,
        pytest.raises(ConfigurationError, match="only a PostgreSQL"),
    ):
        other.in_transaction(shop)
    with (
        pytest.raises(ConfigurationError, match=r"takes a psycopg\.Connection"),
        billing.in_transaction("no connection"),
    ):
        pass
    with billing.in_transaction(shop) as books:
        pass
    with pytest.raises(BillingUnavailableError, match="over"):
        books.grant("ada", "calls", 1, id="g1")
