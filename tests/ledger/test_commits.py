"""How steps of many callers share transactions, and how none of them suffers for it."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from metered_ai.core.steps import AddGrant, Place, Record, Renew, Settle, Settled
from metered_ai.errors import BillingUnavailableError, InsufficientCreditsError, LedgerCorruptError
from metered_ai.ledger.commits import Commits, Job, Locked
from metered_ai.ledger.sqlite import SqliteLedger
from metered_ai.records import UsageEvent


class Counted(SqliteLedger):
    """Counts commits, knows which thread ran each, and can hold one up."""

    def __init__(self, path: Path, **more: Any) -> None:
        super().__init__(path, **more)
        self.commits: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.is_waiting = threading.Event()

    def _execute(self, statement: str, parameters: Any = ()) -> sqlite3.Cursor:
        if statement == "COMMIT":
            self.commits.append(threading.get_ident())
            self.is_waiting.set()
            assert self.gate.wait(30)
        return super()._execute(statement, parameters)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Counted]:
    with closing(Counted(tmp_path / "credits.db")) as ledger:
        ledger.run(AddGrant("ada", "calls", 1_000_000, "g1"))
        ledger.commits.clear()
        ledger.is_waiting.clear()
        yield ledger


def record(number: int, customer: str = "ada", **more: Any) -> Record:
    return Record(customer, "calls", f"r{number}", 1, **more)


def refuse_middle(ledger: Counted, event: str) -> None:
    """Let the database refuse to count an event that a step has just written."""
    ledger._writer.connection.execute(
        f"CREATE TRIGGER bad BEFORE UPDATE ON account WHEN EXISTS (SELECT 1 FROM usage_event WHERE {event}) "
        "BEGIN SELECT RAISE(ABORT, 'no'); END"
    )


def test_alone(ledger: Counted) -> None:
    """A lone caller's step runs in its own thread, one commit for each, and no other thread is started."""
    before = threading.active_count()
    for number in range(5):
        ledger.run(record(number))

    assert [threading.get_ident()] * 5 == ledger.commits
    assert before == threading.active_count()


def test_waiting_together(ledger: Counted) -> None:
    """What comes while a commit runs shares the next one, whether handed over or waited for."""
    ledger.gate.clear()
    first = threading.Thread(target=ledger.run, args=(record(0),))
    first.start()
    assert ledger.is_waiting.wait(10)
    futures = [ledger.submit(record(number)) for number in range(1, 50)]
    threads = [threading.Thread(target=ledger.run, args=(record(number),)) for number in range(50, 60)]
    for thread in threads:
        thread.start()
    while len(ledger._commits._queue) < 59:
        time.sleep(0.001)
    ledger.gate.set()
    events = [future.result(10) for future in futures]
    for thread in [first, *threads]:
        thread.join(10)

    assert 2 == len(ledger.commits)
    assert [f"r{number}" for number in range(1, 50)] == [
        event.transaction_id for event in events if isinstance(event, UsageEvent)
    ]
    assert 60 == ledger.balance("ada", "calls").used


def test_tasks(tmp_path: Path) -> None:
    """64 tasks at once: at least ten transactions for each sync of the disk."""

    async def call(number: int) -> None:
        for turn in range(8):
            hold_id = f"h{number}.{turn}"
            await asyncio.wrap_future(ledger.submit(Place(hold_id, f"c{number}", "calls", 1, "p1")))
            settle = Settle(hold_id, f"c{number}", "calls", 1, f"gen_{hold_id}", "reported")
            assert isinstance(await asyncio.wrap_future(ledger.submit(settle)), Settled)

    async def all_calls() -> None:
        await asyncio.gather(*[call(number) for number in range(64)])

    with closing(Counted(tmp_path / "credits.db")) as ledger:
        ledger.submit_all([AddGrant(f"c{number}", "calls", 8, "g1") for number in range(64)]).result(30)
        ledger.commits.clear()
        began = time.perf_counter()
        asyncio.run(all_calls())
        took = time.perf_counter() - began

        steps = 2 * 8 * 64
        print(
            f"{steps / len(ledger.commits):.0f} transactions for each commit, {steps / 2 / took:.0f} holds and settles a second"
        )
        assert steps / len(ledger.commits) >= 10
        assert 512 == sum(event.amount for event in ledger.usage_events())
        assert ledger.verify().is_sound


def test_bad_neighbour(ledger: Counted) -> None:
    """A step that the database refuses in its middle fails alone; its neighbours in the same commit are done, once."""
    refuse_middle(ledger, "request_id = 'bad'")
    holds = [Place(f"h{number}", "ada", "calls", 2, "p1") for number in range(9)]
    ledger.submit_all(holds).result(10)
    settles = [
        Settle(
            f"h{number}",
            "ada",
            "calls",
            1,
            f"gen_{number}",
            "reported",
            request_id="bad" if number % 4 == 2 else "good",
        )
        for number in range(9)
    ]

    outcomes = ledger.submit_all([*settles, record(1), Place("x", "bob", "calls", 1, "p1")]).result(10)
    kinds = [type(outcome) for outcome in outcomes]
    assert [Settled, Settled, LedgerCorruptError, Settled] * 2 + [
        Settled,
        UsageEvent,
        InsufficientCreditsError,
    ] == kinds
    assert {"settled"} == {outcome.outcome for outcome in outcomes if isinstance(outcome, Settled)}
    assert (8, 4) == (ledger.balance("ada", "calls").used, ledger.balance("ada", "calls").held)
    with pytest.raises(LedgerCorruptError, match="no"):
        ledger.run(settles[2])
    assert ledger.verify().is_sound


def test_owner_beside_bad_neighbour(ledger: Counted) -> None:
    """A lease that was begun in a commit that had to be done again is begun again."""
    ledger.run(Place("h0", "ada", "calls", 1, "p1"))
    refuse_middle(ledger, "transaction_id = 'r1'")

    outcomes = ledger.submit_all(
        [Place("h1", "ada", "calls", 1, "p2"), record(1), Place("h2", "ada", "calls", 1, "p2")]
    ).result(10)
    assert ["Hold", "LedgerCorruptError", "Hold"] == [type(outcome).__name__ for outcome in outcomes]
    assert 0 == ledger.sweep().resolved
    assert 2 == ledger.run(Renew("p2", 120))


def test_refused_neighbours(ledger: Counted) -> None:
    """Refusals among what is done share its commit."""
    steps = [Place(f"h{number}", "bob" if number % 2 else "ada", "calls", 1, "p1") for number in range(20)]

    outcomes = ledger.submit_all(steps).result(10)
    assert [InsufficientCreditsError if number % 2 else "open" for number in range(20)] == [
        type(outcome) if isinstance(outcome, Exception) else outcome.state for outcome in outcomes
    ]
    assert 1 == len(ledger.commits)
    assert [] == ledger.balances("bob")


def test_nothing_to_do(ledger: Counted) -> None:
    """An empty list is done at once."""
    assert [] == ledger.submit_all([]).result(1)


def test_bad_input_handed_over(ledger: Counted) -> None:
    """Bad input comes back as the step's error, not as one of the caller's, and does not reach the file."""
    future = ledger.submit(record(1, customer=" ada"))
    outcomes = ledger.submit_all([record(1), record(2, customer="")]).result(10)

    assert isinstance(future.exception(1), ValueError)
    assert [UsageEvent, ValueError] == [type(outcome) for outcome in outcomes]
    assert 1 == ledger.balance("ada", "calls").used


def test_not_taken_back(ledger: Counted) -> None:
    """A step that was handed over is done even if its future is cancelled or forgotten."""
    ledger.gate.clear()
    first = threading.Thread(target=ledger.run, args=(record(0),))
    first.start()
    assert ledger.is_waiting.wait(10)
    future = ledger.submit(record(1))
    assert not future.cancel()
    ledger.submit(record(2))
    ledger.gate.set()
    first.join(10)

    assert 1 == future.result(10).amount
    ledger.close()
    with closing(SqliteLedger(ledger.path)) as again:
        assert 3 == again.balance("ada", "calls").used


def test_closed_meanwhile(ledger: Counted) -> None:
    """Closing waits for what was handed over behind a step that is still being committed."""
    ledger.gate.clear()
    first = threading.Thread(target=ledger.run, args=(record(0),))
    first.start()
    assert ledger.is_waiting.wait(10)
    futures = [ledger.submit(record(number)) for number in range(1, 4)]
    last = threading.Thread(target=ledger.close)
    last.start()
    while not ledger._is_closed:
        time.sleep(0.001)
    ledger.gate.set()
    first.join(10)
    last.join(10)

    assert [1, 1, 1] == [future.result(10).amount for future in futures]


def test_cancelled_task(ledger: Counted) -> None:
    """Cancelling a task that waits for its step does not cancel the step."""

    async def leave() -> None:
        ledger.gate.clear()
        task = asyncio.ensure_future(asyncio.wrap_future(ledger.submit(record(1))))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        ledger.gate.set()

    asyncio.run(leave())
    ledger.run(record(2))

    assert 2 == ledger.balance("ada", "calls").used


def test_step_in_callback(ledger: Counted) -> None:
    """A callback may come with a step of its own; it runs in the ledger's thread, and nothing waits for itself."""
    results: list[Any] = []
    done = threading.Event()

    def follow(future: Future[Any]) -> None:
        results.append(ledger.run(record(2)))
        results.append(ledger.submit_all([record(3), record(4)]))
        done.set()

    noise = [
        threading.Thread(target=lambda: [ledger.run(record(number)) for number in range(100, 140)]) for _ in range(4)
    ]
    for thread in noise:
        thread.start()
    ledger.submit(record(1)).add_done_callback(follow)
    assert done.wait(30)
    for thread in noise:
        thread.join(30)

    assert [1, 1] == [outcome.amount for outcome in results[1].result(10)]
    assert 44 == ledger.balance("ada", "calls").used


def test_order(ledger: Counted) -> None:
    """Steps handed over by one thread are done in its order."""
    futures: list[Future[Any]] = []
    for number in range(100):
        futures.append(ledger.submit(record(number)))
        if number % 10 == 0:
            futures.append(ledger.submit(Place(f"h{number}", "ada", "calls", 1, "p1")))
    for future in futures:
        future.result(10)

    assert [f"r{number}" for number in range(100)] == [event.transaction_id for event in ledger.usage_events("ada")]


def test_locked_in_the_middle(ledger: Counted) -> None:
    """Where each step must be done by itself and another process takes the lock in between, the rest is done afterwards, once."""
    refuse_middle(ledger, "transaction_id = 'r1'")
    with closing(sqlite3.connect(ledger.path, isolation_level=None, check_same_thread=False)) as other:
        real = ledger._transact
        calls = []

        def transact(jobs: Any) -> bool:
            calls.append(len(jobs))
            if len(calls) == 3:
                other.execute("BEGIN IMMEDIATE")
                threading.Timer(0.2, lambda: other.execute("ROLLBACK")).start()
            return real(jobs)

        ledger._transact = transact  # type: ignore[method-assign]  # The lock must come at one moment.
        outcomes = ledger.submit_all([record(0), record(1), record(2), record(3)]).result(10)

    assert [UsageEvent, LedgerCorruptError, UsageEvent, UsageEvent] == [type(outcome) for outcome in outcomes]
    assert [4, 1, 1] == calls[:3]
    assert 3 == ledger.balance("ada", "calls").used


def test_own_errors(ledger: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that fail together have an error each, so that tracebacks do not mix."""
    # Looked for at each step, and not only after some time.
    monkeypatch.setattr("metered_ai.ledger.sqlite._RECHECK_AFTER", 0)
    ledger.run(record(0))
    aside = Path(ledger.path + ".aside")
    Path(ledger.path).rename(aside)
    outcomes = ledger.submit_all([record(1), record(2)]).result(10)
    aside.rename(ledger.path)

    assert [BillingUnavailableError] * 2 == [type(outcome) for outcome in outcomes]
    assert outcomes[0] is not outcomes[1]
    assert str(outcomes[0]) == str(outcomes[1])


def test_callback_without_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be started a step is done where it is handed over, and its callback may hand over one of its own."""
    results: list[Future[Any]] = []

    class Eager(SqliteLedger):
        def _work(self, jobs: Any) -> Any:
            left = super()._work(jobs)
            for job in jobs:
                if isinstance(job.step, Record) and job.step.transaction_id == "r1":
                    job.future.add_done_callback(lambda _: results.append(self.submit(Record("ada", "calls", "r2", 1))))
            return left

    with closing(Eager(tmp_path / "credits.db")) as ledger:
        ledger.run(AddGrant("ada", "calls", 10, "g1"))
        monkeypatch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("no thread")))
        first = ledger.submit(Record("ada", "calls", "r1", 1))
        monkeypatch.undo()

        assert [True, True] == [first.done(), results[0].done()]


def test_after_the_end() -> None:
    """Who finds the ledger locked while it is being closed waits for no thread that has ended, and starts none."""
    done: list[object] = []

    def alone(step: object) -> object:
        raise Locked

    def work(jobs: list[Job]) -> list[Job]:
        done.extend(job.step for job in jobs)
        return []

    commits = Commits(alone, work, lambda _: AssertionError("it is not locked for ever"), "test", shares=False)
    commits.run("first", 1.0)
    waits = Job("second", 1.0)
    waits.lock = threading.Lock()
    waits.lock.acquire()
    commits._queue.append(waits)
    commits.stop()
    assert ["first", "second"] == done
    commits.run("third", 1.0)

    assert ["first", "second", "third"] == done
    assert waits.lock.acquire(timeout=0)
    assert "test writer" not in {thread.name for thread in threading.enumerate()}
