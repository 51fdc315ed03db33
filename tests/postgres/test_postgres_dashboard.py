"""The queries that the page on PostgreSQL offers for a dashboard run, and say what is so."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest

from metered_ai import connect

PAGE = (Path(__file__).parents[2] / "docs" / "postgresql.md").read_text("utf-8")
SCRIPT = next(
    found[1] for found in re.finditer(r"```sql\n(.*?)```", PAGE.partition("## Queries for a dashboard")[2], re.DOTALL)
)
QUERIES = [query.strip() for query in SCRIPT.split(";\n") if query.strip()]


@pytest.fixture
def ask(postgres, spool):
    """A ledger with a debt, a hold and usage; ask it the query whose comment begins so."""
    server, _, schema = postgres.rpartition("schema=")
    with connect(postgres, spool=spool) as billing, psycopg.connect(server.rstrip("?&"), autocommit=True) as connection:
        billing.grant("ada", "generations", 10, id="order")
        billing.record("ada", "generations", transaction_id="one", amount=9)
        billing.record("bob", "generations", transaction_id="one", amount=7)

        def ask(begins):
            (query,) = [query for query in QUERIES if query.startswith(f"-- {begins}")]
            text = query.replace("metered_ai.", f"{schema}.").replace("'metered_ai'", f"'{schema}'")
            return connection.execute(text).fetchall()

        with billing.charge("ada", "generations", amount=1):
            yield ask


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.partition("\n")[0].removeprefix("-- "))
def test_runs(ask, query):
    """Each of them runs."""
    assert isinstance(ask(query.partition("\n")[0].removeprefix("-- ")), list)


def test_says(ask):
    """What they say is what was done."""
    assert [("ada", "generations", 0, 10)] == ask("Customers who")
    assert [("generations", 1, 7)] == ask("Debt")
    ((holds, held, oldest),) = ask("Calls in flight")
    assert (1, 1, True) == (holds, held, oldest is not None)
    assert [(0,)] == ask("Holds whose owner")
    assert [] == ask("Calls that may")
    assert [(1,)] == ask("Processes that")
    assert [(None, 1, 9, None, None)] == ask("What one customer")
    assert [("ada", "generations", 1, 9), ("bob", "generations", 1, 7)] == sorted(ask("The busiest"))
    assert "account" in {row[0] for row in ask("Is the hot")}
