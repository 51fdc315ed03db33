"""What a hold and its settle cost when many events are stored already."""

from __future__ import annotations

import re
import secrets
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from metered_ai.core.steps import AddGrant
from metered_ai.ledger.leases import new_hold_id
from metered_ai.ledger.sqlite import SqliteLedger
from metered_ai.ledger.statements import read_statements

from .figures import Figure, at_most
from .ledger import METER, place, settle

CUSTOMERS = 100

SMALL = ("open_hold", "owner")
"""Tables that are as large as the traffic of the moment, whatever is stored: a heartbeat may count what is in them."""


def filled(path: Path, events: int) -> SqliteLedger:
    """A ledger with so many events of random ids, spread over 100 customers, brought in without the ledger's help."""
    ledger = SqliteLedger(path, durability="relaxed")
    for number in range(CUSTOMERS):
        ledger.run(AddGrant(f"customer_{number}", METER, 10**12, "benchmark"))
        hold_id = new_hold_id()
        ledger.run(place(hold_id, f"customer_{number}"))
        ledger.run(settle(hold_id, f"customer_{number}"))
    ledger.close()

    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA cache_size = -500000")
    columns = [row[1] for row in connection.execute("PRAGMA table_info(usage_event)")]
    changed = {
        "no": "no + ?1",
        "created_at": "created_at + ?1",
        "transaction_id": "'gen_chatcmpl-' || lower(hex(randomblob(14)))",
        "hold_id": "?2 || account_no",
    }
    copy = f"INSERT INTO usage_event SELECT {', '.join(changed.get(column, column) for column in columns)} FROM first"
    connection.execute("CREATE TEMP TABLE first AS SELECT * FROM usage_event")
    connection.execute("BEGIN")
    # In the order of time, as they would have come: a round of all customers after the other.
    connection.executemany(copy, ((n, f"h{n:020d}{secrets.token_hex(3)}") for n in range(1, events // CUSTOMERS)))
    connection.execute(
        "UPDATE account SET events = ?1, used = ?1, last_event_at = last_event_at + ?1", (events // CUSTOMERS,)
    )
    connection.execute("COMMIT")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()
    return SqliteLedger(path, durability="relaxed")


def call(ledger: SqliteLedger, number: int) -> None:
    hold_id, customer = new_hold_id(), f"customer_{number % CUSTOMERS}"
    ledger.run(place(hold_id, customer))
    ledger.run(settle(hold_id, customer))


def steps(ledger: SqliteLedger, calls: int = 20) -> float:
    """How many steps SQLite's virtual machine does for a hold and its settle."""
    call(ledger, 0)
    connection = ledger._writer.connection
    assert connection is not None
    seen = 0

    def count() -> int:
        nonlocal seen
        seen += 1
        return 0

    connection.set_progress_handler(count, 1)
    for number in range(calls):
        call(ledger, number)
    connection.set_progress_handler(None, 1)
    return seen / calls


def scans(ledger: SqliteLedger) -> Iterator[tuple[str, str]]:
    """Statements of steps and listings that read a table or an index that grows from end to end: (name, what the plan says)."""
    call(ledger, 0)
    connection = ledger._writer.connection
    assert connection is not None
    for file in ("steps.sql", "reads.sql"):
        for name, statement in read_statements(file).items():
            # Statements number their parameters, or leave that to SQLite.
            count = max((int(number) for number in re.findall(r"\?(\d+)", statement)), default=statement.count("?"))
            for *_, plan in connection.execute(f"EXPLAIN QUERY PLAN {statement}", [None] * count):
                if plan.startswith("SCAN") and plan != "SCAN CONSTANT ROW" and plan.split()[1] not in SMALL:
                    yield name, plan


def measure(folder: Path, events: int, rounds: int, calls: int = 500) -> list[Figure]:
    few, many = filled(folder / "few.db", 10_000), filled(folder / "many.db", events)
    stored = f"hold + settle, {events:,} events against 10,000, random ids"
    ratio = steps(many) / steps(few)
    figures = [at_most(f"{stored}: VM steps", 2, ratio, note=f"{steps(many):.0f} steps")]
    if rounds:
        ratios: list[float] = []
        costs: list[float] = []
        for _ in range(rounds + 1):
            took = []
            for ledger in (few, many):
                began = time.process_time()
                for number in range(calls):
                    call(ledger, number)
                took.append(time.process_time() - began)
            ratios.append(took[1] / took[0])
            costs.append(took[0] / calls * 1e6)
        note = f"{median(costs[1:]):.0f} us with 10,000"
        figures.append(at_most("the same: CPU", 2.5, median(ratios[1:]), note=note))
    found = sorted({name for name, _ in scans(few)})
    figures.append(Figure("every query an index search", "no scan", ", ".join(found) or "no scan", not found))
    for ledger in (few, many):
        ledger.close()
    return figures
