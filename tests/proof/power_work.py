"""
What runs while the power is lost: calls and charges on a new ledger, each acknowledged in a file. Run by test_power_loss.py.

    python power_work.py FOLDER BASE_URL DURABILITY CALLS
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from pathlib import Path
from typing import Any

import metered_ai.ledger.sqlite as sqlite_ledger
from metered_ai import AsyncMeteredOpenAI, Billing, BillingUnavailableError, MeteredOpenAI
from metered_ai.core.steps import Settle
from metered_ai.ledger.sqlite import SqliteLedger
from tests.proof.children import HELLO, http_clients

# Many checkpoints in a short life.
sqlite_ledger._CHECKPOINT_EVERY = 25


class Faulty(SqliteLedger):
    """A ledger that takes no settle for as long as it is told so, as when its disk is full."""

    is_faulty = False

    def run(self, step: Any, /) -> Any:
        if self.is_faulty and isinstance(step, Settle):
            raise BillingUnavailableError("it is told to fail")
        return super().run(step)


def work(folder: Path, base_url: str, durability: Any, calls: int, life: int) -> None:
    acks = os.open(folder / "acks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def acknowledge(name: str) -> None:
        os.write(acks, name.encode() + b"\n")

    ledger = Faulty(folder / "credits.db", durability=durability)
    billing = Billing(ledger, spool=folder)
    http, async_http = http_clients()
    options: Any = {"billing": billing, "customer": "ada", "base_url": base_url, "api_key": "k", "max_retries": 0}
    client = MeteredOpenAI(http_client=http, **options)

    billing.grant("ada", "generations", 100_000, id=f"life_{life}")
    acknowledge(f"life_{life}")

    def call(name: int) -> None:
        for number in range(calls):
            if number % 3 == 0:
                with billing.charge("ada", "generations", amount=2, transaction_id=f"charge_{life}_{name}_{number}"):
                    pass
                acknowledge(f"charge_{life}_{name}_{number}")
            elif number % 3 == 1:
                stream = client.chat.completions.create(model="m", messages=HELLO, stream=True)
                acknowledge("gen_" + {chunk.id for chunk in stream}.pop())
            else:
                acknowledge("gen_" + client.chat.completions.create(model="m", messages=HELLO).id)

    async def acall(client: AsyncMeteredOpenAI) -> None:
        for _ in range(calls):
            acknowledge("gen_" + (await client.chat.completions.create(model="m", messages=HELLO)).id)

    async def acalls() -> None:
        async with AsyncMeteredOpenAI(http_client=async_http, **options) as client:
            await asyncio.gather(*(acall(client) for _ in range(3)))

    call(0)
    threads = [threading.Thread(target=call, args=(name,)) for name in (1, 2)]
    for thread in threads:
        thread.start()
    asyncio.run(acalls())
    for thread in threads:
        thread.join()

    for _ in range(2):
        ledger.is_faulty = True
        acknowledge("spooled gen_" + client.chat.completions.create(model="m", messages=HELLO).id)
        ledger.is_faulty = False
        while billing.readiness():
            threading.Event().wait(0.005)
        acknowledge("gen_" + client.chat.completions.create(model="m", messages=HELLO).id)
    billing.close()
    # The last connection takes the log away; the next life makes it anew.
    ledger.close()
    os.close(acks)


if __name__ == "__main__":
    for life in range(2):
        work(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), life)
