"""Killed at each statement and at any moment: what is on the disk is whole, and what was acknowledged is there."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from metered_ai.core.steps import AddGrant, Enlarge, Place, Record, Release, Renew, Revoke, Settle, SetUnlimited, Step
from metered_ai.errors import MeteringError
from metered_ai.ledger.sqlite import SqliteLedger
from metered_ai.testing import Clock

LIVES = """
import sys
from metered_ai.core.steps import AddGrant, Place, Release, Settle
from metered_ai.ledger.sqlite import SqliteLedger

ledger = SqliteLedger(sys.argv[1], durability=sys.argv[2])
ledger.run(AddGrant("ada", "calls", 10**9, "g1"))
number = 0
while True:
    number += 1
    hold_id = f"h{sys.argv[3]}.{number}"
    ledger.run(Place(hold_id, "ada", "calls", 2, "p1"))
    if number % 5 == 0:
        ledger.run(Release(hold_id, "ada", "calls", "cancelled", "no"))
        continue
    if number % 3 == 0:
        ledger.submit(Settle(hold_id, "ada", "calls", 1, f"gen_{hold_id}", "reported")).result()
    else:
        ledger.run(Settle(hold_id, "ada", "calls", 1, f"gen_{hold_id}", "reported"))
    print(f"gen_{hold_id}", flush=True)
"""


@pytest.mark.parametrize("durability", ["full", "relaxed"])
def test_killed(tmp_path: Path, durability: str) -> None:
    """Killed at random moments, again and again: each settle that was acknowledged is there once, and the sums hold."""
    path = tmp_path / "credits.db"
    acknowledged: list[str] = []
    randomly = random.Random(7)
    for life in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", LIVES, str(path), durability, str(life)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        acknowledged.append(child.stdout.readline().strip())
        time.sleep(randomly.uniform(0, 0.15))
        child.send_signal(signal.SIGKILL)
        acknowledged += [line.strip() for line in child.stdout if line.endswith("\n")]
        child.wait()
        child.stdout.close()

    with closing(SqliteLedger(path)) as ledger:
        found = [event.transaction_id for event in ledger.usage_events()]
        assert len(found) == len(set(found))
        assert set(acknowledged) <= set(found)
        assert len(found) <= len(acknowledged) + 6
        assert ledger.verify().is_sound
        print(f"{len(acknowledged)} settles acknowledged in 6 lives, {len(found)} found")


class Dying(SqliteLedger):
    """Dies in front of its n-th statement, as a process does: nothing is rolled back, nothing is closed."""

    def __init__(self, path: Path, dies_at: int, **more: Any) -> None:
        super().__init__(path, **more)
        self.left = dies_at
        self.armed = False

    def _execute(self, statement: str, parameters: Any = ()) -> sqlite3.Cursor:
        if self.armed:
            self.left -= 1
            if self.left < 0:
                os._exit(9)
        return super()._execute(statement, parameters)


def at(clock: Clock, seconds: float) -> datetime:
    return clock.at(seconds)


def history(clock: Clock) -> Iterator[tuple[float, Step]]:
    """Seconds that pass, and a step; so that every way through the ledger is taken."""
    yield 0, AddGrant("ada", "calls", 10, "g1", at(clock, 100))
    yield 0, AddGrant("ada", "calls", 10, "g2")
    yield 1, Place("h1", "ada", "calls", 4, "p1")
    yield 1, Place("h2", "ada", "calls", 3, "dead", lease=30)
    yield 1, Place("h3", "ada", "calls", 3, "dead", lease=30, on_unknown="charge", operation="op")
    yield 1, Place("h4", "ada", "calls", 1, "p1", operation="op", scope="s1", on_repeat="free")
    yield 0, Settle("h4", "ada", "calls", 1, "gen_4", "reported")
    yield 0, Enlarge("h1", "ada", "calls", 6)
    yield 0, Release("h9", "ada", "calls", "cancelled", "no")
    yield 50, Renew("p1", 500)
    # Refused, but the orphans in its way have been resolved.
    yield 1, Place("h5", "ada", "calls", 50, "p1")
    yield 0, Settle("h3", "ada", "calls", 1, "gen_3", "reported")
    yield 60, Place("h6", "ada", "calls", 2, "p1")
    yield 0, Settle("h1", "ada", "calls", 5, "gen_1", "reported", fingerprint="a")
    yield 0, Settle("h6", "ada", "calls", 5, "gen_1", "reported", fingerprint="b")
    yield 0, Record("ada", "calls", "r1", 9)
    yield 0, Place("h7", "ada", "calls", 0, "p1")
    yield 0, Release("h7", "ada", "calls", "provider_error", "yes")
    yield 0, Settle("h7", "ada", "calls", 2, "gen_7", "reported")
    yield 0, Revoke("ada", "calls", "g2")
    yield 0, SetUnlimited("ada", "calls", True)
    yield 0, Place("h8", "ada", "calls", 5, "p1")
    yield 0, Settle("h8", "ada", "calls", 7, "gen_8", "reported")


def state_of(path: Path, clock: Clock) -> tuple[Any, ...]:
    with closing(SqliteLedger(path, clock=clock)) as ledger:
        assert () == ledger.verify().broken
        return (
            ledger.balances("ada"),
            {(event.transaction_id, event.amount, event.kind, event.is_late) for event in ledger.usage_events()},
            {(hold.id, hold.state, hold.amount, hold.reason) for hold in ledger.holds()},
            {(grant.id, grant.spent, grant.expired, grant.revoked) for grant in ledger.grants()},
        )


def run(ledger: SqliteLedger, step: Step) -> None:
    try:
        ledger.run(step)
    except MeteringError:
        # Some of them are refused, which is a result like another.
        return


def test_killed_at_each_statement(tmp_path: Path) -> None:
    """Killed in front of each statement of each step, and done again: all or nothing, and in the end as if never killed."""
    clock = Clock()
    path = tmp_path / "whole.db"
    steps = list(history(clock))
    states = []
    for seconds, step in steps:
        clock.advance(seconds)
        with closing(SqliteLedger(path, clock=clock)) as ledger:
            run(ledger, step)
        states.append(state_of(path, clock))

    deaths = 0
    dying = tmp_path / "dying.db"
    clock = Clock()
    before: Any = None
    for (seconds, step), after in zip(steps, states, strict=True):
        clock.advance(seconds)
        if before is not None:
            before = state_of(dying, clock)
        for statement in range(1000):
            child = os.fork()
            if child == 0:
                ledger = Dying(dying, statement, clock=clock, durability="relaxed")
                ledger.balance("ada", "calls")
                ledger.armed = True
                run(ledger, step)
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code == 0:
                break
            assert 9 == code
            deaths += 1
            assert before is None or before == state_of(dying, clock)
        assert after == state_of(dying, clock), step
        before = after

    print(f"killed {deaths} times in {len(steps)} steps")
    assert deaths > 150


def test_killed_while_created(tmp_path: Path) -> None:
    """Killed at each statement of the creation: the next one finds a ledger or makes one."""

    class Unborn(Dying):
        def __init__(self, path: Path, dies_at: int) -> None:
            super().__init__(path, dies_at)
            self.armed = True

    for statement in range(1000):
        path = tmp_path / f"{statement}.db"
        child = os.fork()
        if child == 0:
            Unborn(path, statement).balance("ada", "calls")
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with closing(SqliteLedger(path)) as ledger:
            ledger.run(AddGrant("ada", "calls", 1, "g1"))
            assert ledger.verify().is_sound
        if code == 0:
            break
        assert 9 == code
    assert statement > 15
