"""What one of several processes on one ledger does. Started by `test_races.py`; all begin at the same barrier."""

from __future__ import annotations

from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any, Literal

from metered_ai.core.steps import Place, Settle, Settled
from metered_ai.errors import AlreadyBilledError, InsufficientCreditsError
from metered_ai.ledger.sqlite import SqliteLedger


def run(
    task: str,
    name: str,
    path: str,
    durability: Literal["full", "relaxed"],
    start: Barrier,
    told: Connection,
) -> None:
    """Open the ledger, wait for the others, do the task, tell how it went."""
    ledger = SqliteLedger(path, durability=durability)
    ledger.balance("ada", "calls")
    start.wait(60)
    told.send(TASKS[task](ledger, name, told))
    ledger.close()


def place(ledger: SqliteLedger, name: str, told: Connection) -> int:
    """Thirteen holds of 1; how many fitted."""
    placed = 0
    for number in range(13):
        try:
            ledger.run(Place(f"{name}-{number}", "ada", "calls", 1, name))
        except InsufficientCreditsError:
            continue
        placed += 1
    return placed


def spend(ledger: SqliteLedger, name: str, told: Connection) -> int:
    """Calls of 2 until one is refused; what was spent."""
    spent = 0
    while True:
        hold_id = f"{name}-{spent}"
        try:
            ledger.run(Place(hold_id, "ada", "calls", 2, name))
        except InsufficientCreditsError as error:
            if error.is_transient:
                continue
            return spent
        ledger.run(Settle(hold_id, "ada", "calls", 2, f"gen_{hold_id}", "reported"))
        spent += 2


def settle(ledger: SqliteLedger, name: str, told: Connection) -> str:
    """Settle the hold that all settle; the outcome."""
    result = ledger.run(Settle("h1", "ada", "calls", 3, f"gen_{name}", "reported"))
    assert isinstance(result, Settled)
    return result.outcome


def operate(ledger: SqliteLedger, name: str, told: Connection) -> int:
    """Begin the operation that all begin; 1 if it was let through."""
    try:
        ledger.run(Place(f"h{name}", "ada", "calls", 1, name, operation="req_1", scope=name))
    except AlreadyBilledError:
        return 0
    return 1


def live(ledger: SqliteLedger, name: str, told: Connection) -> None:
    """Place and settle until killed, and tell each id once it is settled."""
    number = 0
    while True:
        number += 1
        hold_id = f"{name}-{number}"
        ledger.run(Place(hold_id, "ada", "calls", 2, name))
        ledger.run(Settle(hold_id, "ada", "calls", 1, f"gen_{hold_id}", "reported"))
        told.send(f"gen_{hold_id}")


TASKS: dict[str, Any] = {"place": place, "spend": spend, "settle": settle, "operate": operate, "live": live}
