"""A process that forks while it uses a ledger, and what its children may do."""

from __future__ import annotations

import ctypes
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from metered_ai.core.steps import AddGrant, Place, Record, Settle
from metered_ai.errors import BillingUnavailableError
from metered_ai.ledger.memory import MemoryLedger
from metered_ai.ledger.sqlite import SqliteLedger


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[SqliteLedger]:
    with closing(SqliteLedger(tmp_path / "credits.db")) as ledger:
        ledger.run(AddGrant("ada", "calls", 10_000, "g1"))
        yield ledger


def in_child(act: Callable[[], object], fork: Callable[[], int] = os.fork) -> Callable[[], str]:
    """Run something in a forked child; the result waits for it and says how it went: "ok" or the error."""
    read, write = os.pipe()
    child = fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            try:
                act()
                text = "ok"
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
            os.write(write, text.encode()[:4000])
            code = 0
        finally:
            os._exit(code)
    os.close(write)

    def wait() -> str:
        with os.fdopen(read, "rb") as pipe:
            text = pipe.read().decode()
        assert (child, 0) == os.waitpid(child, 0)
        return text

    return wait


def use(ledger: SqliteLedger, name: str, turns: int = 5) -> None:
    for turn in range(turns):
        hold_id = f"{name}.{turn}"
        ledger.run(Place(hold_id, "ada", "calls", 1, name))
        assert ledger.balance("ada", "calls").held >= 1
        ledger.submit(Settle(hold_id, "ada", "calls", 1, f"gen_{hold_id}", "reported")).result(30)


def test_child(ledger: SqliteLedger) -> None:
    """A child uses its parent's ledger object, and both go on."""
    child = in_child(lambda: use(ledger, "child"))
    use(ledger, "parent")

    assert "ok" == child()
    use(ledger, "later")
    assert 15 == ledger.balance("ada", "calls").used
    assert ledger.verify().is_sound


def test_inherits_nothing(ledger: SqliteLedger) -> None:
    """A child inherits no open file of the ledger: a copy of a lock is no lock."""

    def look() -> None:
        names = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        assert [] == [name for name in names if "credits.db" in name]

    assert ledger.balance("ada", "calls").used == 0
    assert "ok" == in_child(look)()


def test_grandchild(ledger: SqliteLedger) -> None:
    """So do a child's children."""

    def act() -> None:
        use(ledger, "child")
        assert "ok" == in_child(lambda: use(ledger, "grandchild"))()
        use(ledger, "after")
        ledger.close()

    assert "ok" == in_child(act)()
    assert 15 == ledger.balance("ada", "calls").used


def test_threads_go_on(ledger: SqliteLedger) -> None:
    """Forks at any moment while threads use the ledger: no thread and no child is stuck, nothing is lost."""
    stop = threading.Event()
    counts = [0] * 4

    def work(number: int) -> None:
        while not stop.is_set():
            use(ledger, f"t{number}.{counts[number]}", 1)
            counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    forks = 12
    results = []
    for number in range(forks):
        until = sum(counts) + 3
        while sum(counts) < until:
            time.sleep(0.0005)
        results.append(in_child(lambda number=number: use(ledger, f"c{number}", 2)))
    outcomes = [result() for result in results]
    stop.set()
    for thread in threads:
        thread.join(60)

    assert ["ok"] * forks == outcomes
    assert not any(thread.is_alive() for thread in threads)
    assert sum(counts) + 2 * forks == ledger.balance("ada", "calls").used
    assert ledger.verify().is_sound
    print(f"{forks} forks among {sum(counts)} holds and settles")


def has_open(path: Path) -> bool:
    """Whether this process has a descriptor of the file."""
    file = path.stat()
    for descriptor in range(1024):
        with suppress(OSError):
            if os.path.samestat(file, os.fstat(descriptor)):
                return True
    return False


def test_closed_after_failures(ledger: SqliteLedger) -> None:
    """A statement that failed keeps no file open through a fork: a child would believe to have its locks."""
    ledger._hold_patience = 0.0
    with closing(sqlite3.connect(ledger.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(BillingUnavailableError, match="locked"):
            ledger.run(Place("h1", "ada", "calls", 1, "p1"))

    assert has_open(Path(ledger.path))
    ledger.before_fork()
    try:
        assert not has_open(Path(ledger.path))
    finally:
        ledger.after_fork_in_parent()


def test_parent_gone(tmp_path: Path) -> None:
    """A child that goes on when its parent has gone, as a daemon does, keeps its log though others open and close the file."""
    path = tmp_path / "credits.db"
    go_read, go_write = os.pipe()

    def parent() -> None:
        ledger = SqliteLedger(path)
        ledger.run(AddGrant("ada", "calls", 10_000, "g1"))
        use(ledger, "parent")

        def daemon() -> None:
            use(ledger, "before")
            os.read(go_read, 1)
            use(ledger, "after")

        child = in_child(daemon)
        while ledger.balance("ada", "calls").used < 10:
            time.sleep(0.01)
        ledger.close()
        with closing(sqlite3.connect(path)) as stranger:
            assert 10 == stranger.execute("SELECT used FROM account").fetchone()[0]
        os.write(go_write, b"x")
        assert "ok" == child()

    assert "ok" == in_child(parent)()
    with closing(SqliteLedger(path)) as ledger:
        assert 15 == ledger.balance("ada", "calls").used
        assert ledger.verify().is_sound


def test_waiting_steps_stay(ledger: SqliteLedger) -> None:
    """Steps that wait when the process forks are done by the parent, once."""
    with closing(sqlite3.connect(ledger.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        futures = [ledger.submit(Record("ada", "calls", f"r{number}", 1)) for number in range(50)]
        child = in_child(lambda: None if not ledger._commits._queue else sys.exit("inherited steps"))
        assert "ok" == child()
        other.execute("ROLLBACK")

    assert [1] * 50 == [future.result(30).amount for future in futures]
    assert 50 == ledger.balance("ada", "calls").used


def test_closed_in_child(ledger: SqliteLedger) -> None:
    """A child that closes the ledger, used or not, leaves it open for its parent."""
    assert "ok" == in_child(ledger.close)()
    assert "ok" == in_child(lambda: (use(ledger, "child"), ledger.close()))()

    use(ledger, "parent")
    assert 10 == ledger.balance("ada", "calls").used


def test_memory() -> None:
    """A memory ledger ends at a fork: two processes would spend the same credits. The parent goes on."""
    with closing(MemoryLedger()) as ledger:
        ledger.run(AddGrant("ada", "calls", 10, "g1"))

        for act in (
            lambda: use(ledger, "child"),
            lambda: ledger.balance("ada", "calls"),
            lambda: list(ledger.grants()),
        ):
            assert in_child(act)().startswith("ConfigurationError: a memory ledger ends at a fork")
        assert "ok" == in_child(ledger.close)()
        use(ledger, "parent")
        assert 5 == ledger.balance("ada", "calls").used


def test_unused_memory() -> None:
    """One that was not used before the fork is simply another one."""
    with closing(MemoryLedger()) as ledger:
        assert "ok" == in_child(lambda: ledger.run(AddGrant("ada", "calls", 10, "g1")))()
        assert 0 == ledger.balance("ada", "calls").available


def bare_fork() -> int:
    """A fork that tells nobody, as a server written in C may do it."""
    return int(ctypes.PyDLL(None).fork())


def test_untold_fork(ledger: SqliteLedger) -> None:
    """After a fork that Python was not told of, an open ledger is refused in the child, and unharmed in the parent."""
    refused = "ConfigurationError: the ledger .* was open and in use when this process was forked"

    use(ledger, "before")
    for act in (lambda: use(ledger, "child"), lambda: ledger.balance("ada", "calls")):
        with pytest.raises(AssertionError, match=refused):
            assert "ok" == in_child(act, bare_fork)()
    assert "ok" == in_child(ledger.close, bare_fork)()
    use(ledger, "parent")
    assert 10 == ledger.balance("ada", "calls").used


def test_untold_fork_unused(tmp_path: Path) -> None:
    """A ledger that was not open yet works on both sides of any fork."""
    with closing(SqliteLedger(tmp_path / "credits.db")) as ledger:
        assert "ok" == in_child(lambda: ledger.run(AddGrant("ada", "calls", 10, "g1")), bare_fork)()
        assert 10 == ledger.balance("ada", "calls").available


def test_busy_thread(ledger: SqliteLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a thread does not come out of the database in time, the child is refused instead of harming the file."""
    monkeypatch.setattr("metered_ai.ledger.sqlite.FORK_PATIENCE", 0.1)
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with ledger._reading():
            inside.set()
            assert leave.wait(30)

    thread = threading.Thread(target=stay)
    thread.start()
    assert inside.wait(10)
    outcome = in_child(lambda: use(ledger, "child"))()
    leave.set()
    thread.join(10)

    assert outcome.startswith("ConfigurationError: the ledger")
    use(ledger, "parent")
    assert 5 == ledger.balance("ada", "calls").used
