"""The SQLite ledger alone: 64 async callers share its fsyncs."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from sqlite3 import Cursor
from statistics import median
from typing import Any

from metered_ai.core.steps import AddGrant, Place, Settle
from metered_ai.ledger.leases import new_hold_id
from metered_ai.ledger.sqlite import SqliteLedger
from metered_ai.records import Usage

from .figures import Figure, at_least

CALLERS = 64
METER = "generations"
USAGE = Usage(model="gpt-5-mini", endpoint="chat.completions", input_tokens=212, output_tokens=131)


class Counting(SqliteLedger):
    """Counts the commits that were synced."""

    syncs = 0

    def _execute(self, statement: str, parameters: Sequence[Any] = ()) -> Cursor:
        if statement == "COMMIT" and self._is_full:
            self.syncs += 1
        return super()._execute(statement, parameters)


def place(hold_id: str, customer: str) -> Place:
    return Place(hold_id, customer, METER, 1, "o0123456789abcdef0123", endpoint="chat.completions", model="gpt-5-mini")


def settle(hold_id: str, customer: str) -> Settle:
    """With a random id: a provider's ids need not grow with time."""
    name = f"gen_chatcmpl-{secrets.token_hex(14)}"
    return Settle(
        *(hold_id, customer, METER, 1, name, "reported"), fingerprint=name, usage=USAGE, request_id=name[4:], attempts=1
    )


def syncs_a_second(folder: Path, seconds: float = 0.5) -> float:
    """What the disk does: 4 KiB appended and synced, over and over."""
    descriptor = os.open(folder / "syncs", os.O_CREAT | os.O_WRONLY)
    try:
        count, ends = 0, time.perf_counter() + seconds
        while time.perf_counter() < ends:
            os.write(descriptor, bytes(4096))
            os.fdatasync(descriptor)
            count += 1
        return count / seconds
    finally:
        os.close(descriptor)


async def _calls(ledger: SqliteLedger, count: int) -> None:
    left = iter(range(count))

    async def work(customer: str) -> None:
        for _ in left:
            hold_id = new_hold_id()
            await asyncio.wrap_future(ledger.submit(place(hold_id, customer)))
            await asyncio.wrap_future(ledger.submit(settle(hold_id, customer)))

    await asyncio.gather(*(work(f"customer_{number}") for number in range(CALLERS)))


def measure(folder: Path, rounds: int) -> list[Figure]:
    ledger = Counting(folder / "alone.db")
    for number in range(CALLERS):
        ledger.run(AddGrant(f"customer_{number}", METER, 10**12, "benchmark"))
    asyncio.run(_calls(ledger, 1000))

    rates, shares, disk = [], [], []
    for _ in range(rounds):
        disk.append(syncs_a_second(folder))
        ledger.syncs, began = 0, time.perf_counter()
        asyncio.run(_calls(ledger, 2000))
        rates.append(2000 / (time.perf_counter() - began))
        shares.append(4000 / ledger.syncs)
    ledger.close()
    syncs = median(disk)
    return [
        at_least("ledger alone, full, 64 async: transactions per fsync", 10, median(shares)),
        at_least(
            "the same: holds + settles a second",
            # Stated for a disk that syncs 200 times a second.
            round(2000 * min(1, syncs / 200)),
            median(rates),
            note=f"the disk syncs {syncs:.0f} times a second",
        ),
    ]
