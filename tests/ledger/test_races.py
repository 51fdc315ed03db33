"""Threads, tasks and processes that want the same credits at the same moment. Each test prints its figure."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from metered_ai.core.steps import AddGrant, Enlarge, Place, Record, Release, Released, Renew, Settle, Settled, Step
from metered_ai.errors import AlreadyBilledError, InsufficientCreditsError
from metered_ai.ledger import Ledger
from metered_ai.ledger.memory import MemoryLedger
from metered_ai.ledger.sqlite import SqliteLedger
from metered_ai.records import Hold
from metered_ai.testing import Clock
from tests.ledger import racer

LEDGERS = ["full", "relaxed", "memory"]


def made(kind: str, path: Path, clock: Clock | None = None) -> Ledger:
    if kind == "memory":
        return MemoryLedger(clock=clock)
    return SqliteLedger(path, durability="full" if kind == "full" else "relaxed", clock=clock)


@pytest.fixture(params=LEDGERS)
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    ledger = made(request.param, tmp_path / "credits.db")
    yield ledger

    assert () == ledger.verify().broken
    ledger.close()


@pytest.fixture(params=["full", "relaxed"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqliteLedger]:
    ledger = SqliteLedger(tmp_path / f"{request.param}.db", durability=request.param)
    yield ledger

    assert () == ledger.verify().broken
    ledger.close()


def at_once(acts: list[Callable[[], object]], gun: Callable[[], object] | None = None) -> list[object]:
    """Let each act begin at the same moment, when `gun` has returned, in a thread of its own; what each gave or raised."""
    start = threading.Barrier(len(acts), gun)
    results: list[object] = [None] * len(acts)

    def work(number: int) -> None:
        start.wait()
        try:
            results[number] = acts[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def run_at_once(ledger: Ledger, steps: list[Step], gun: Callable[[], object] | None = None) -> list[object]:
    return at_once([lambda step=step: ledger.run(step) for step in steps], gun)


def kinds(results: list[object]) -> Counter[str]:
    """How often each outcome, or kind of result, came."""
    return Counter(r.outcome if isinstance(r, Settled | Released) else type(r).__name__ for r in results)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServerContext]:
    """Where processes come from: one that has imported all and does nothing but fork, as starting Python each time is slow."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        context.set_forkserver_preload(["tests.ledger.racer"])
        yield context


class Racers:
    """Processes on a ledger's file. They open it, and begin together with whoever else waits at `start`."""

    def __init__(self, server: ForkServerContext, ledger: SqliteLedger, task: str, count: int, others: int = 0) -> None:
        self.start = server.Barrier(count + others)
        self.processes = []
        self.told = []
        for number in range(count):
            mine, theirs = server.Pipe(duplex=False)
            path = Path(ledger.path)
            arguments = (task, f"p{number}", str(path), path.stem, self.start, theirs)
            process = server.Process(target=racer.run, args=arguments)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.told.append(mine)

    def results(self) -> list[Any]:
        results = [told.recv() for told in self.told]
        for process in self.processes:
            process.join(60)

        assert [0] * len(results) == [process.exitcode for process in self.processes]
        return results

    def kill(self, number: int) -> list[Any]:
        """Kill one where it stands; what it had still told."""
        self.processes[number].kill()
        self.processes[number].join(60)
        rest = []
        with suppress(EOFError):
            while True:
                rest.append(self.told[number].recv())
        return rest


# Credits for 10


def test_threads(ledger: Ledger) -> None:
    """Credits for 10 let exactly 10 of 50 threads through."""
    ledger.run(AddGrant("ada", "calls", 10, "g1"))
    results = run_at_once(ledger, [Place(f"h{n}", "ada", "calls", 1, "p1") for n in range(50)])

    print(f"threads: {kinds(results)['Hold']} of 50 passed")
    assert {"Hold": 10, "InsufficientCreditsError": 40} == kinds(results)
    assert 10 == ledger.balance("ada", "calls").held


def test_tasks(ledger: Ledger) -> None:
    """Credits for 10 let exactly 10 of 50 tasks through, spread over two event loops in two threads."""
    ledger.run(AddGrant("ada", "calls", 10, "g1"))

    async def loop(name: str) -> list[object]:
        futures = [ledger.submit(Place(f"{name}-{n}", "ada", "calls", 1, "p1")) for n in range(25)]
        return await asyncio.gather(*(asyncio.wrap_future(future) for future in futures), return_exceptions=True)

    loops = at_once([lambda: asyncio.run(loop("a")), lambda: asyncio.run(loop("b"))])
    results = [result for results in loops if isinstance(results, list) for result in results]

    print(f"tasks: {kinds(results)['Hold']} of 50 passed")
    assert {"Hold": 10, "InsufficientCreditsError": 40} == kinds(results)
    assert 10 == ledger.balance("ada", "calls").held


def test_processes(shared: SqliteLedger, server: ForkServerContext) -> None:
    """Credits for 10 let exactly 10 calls of 4 processes through."""
    shared.run(AddGrant("ada", "calls", 10, "g1"))
    passed = Racers(server, shared, "place", 4).results()

    print(f"processes: {sum(passed)} of 52 passed, {passed} each")
    assert 10 == sum(passed)
    assert 10 == shared.balance("ada", "calls").held


def test_threads_and_processes(shared: SqliteLedger, server: ForkServerContext) -> None:
    """Credits for 10 let exactly 10 through where threads and processes ask for the same ones."""
    shared.run(AddGrant("ada", "calls", 10, "g1"))
    racers = Racers(server, shared, "place", 4, others=1)
    steps: list[Step] = [Place(f"h{n}", "ada", "calls", 1, "p0") for n in range(20)]
    mine = kinds(run_at_once(shared, steps, gun=racers.start.wait))["Hold"]
    theirs = sum(racers.results())

    print(f"threads and processes: {mine} of 20 and {theirs} of 52 passed")
    assert 10 == mine + theirs == shared.balance("ada", "calls").held


def test_whole_calls_of_processes(shared: SqliteLedger, server: ForkServerContext) -> None:
    """4 processes that place and settle until they are refused spend exactly what was granted."""
    shared.run(AddGrant("ada", "calls", 200, "g1"))
    spent = Racers(server, shared, "spend", 4).results()

    balance = shared.balance("ada", "calls")
    print(f"whole calls of processes: {sum(spent)} of 200 spent, {spent} each")
    assert 200 == sum(spent) == balance.used
    assert (0, 0, 0) == (balance.held, balance.available, balance.debt)


def test_whole_calls(ledger: Ledger) -> None:
    """Of 16 threads that place and settle until they are refused, nobody spends a credit that was not granted."""
    ledger.run(AddGrant("ada", "calls", 200, "g1"))

    def work(name: int) -> int:
        dice, spent = random.Random(name), 0
        for turn in range(10_000):
            held = dice.randint(1, 5)
            try:
                ledger.run(Place(f"h{name}-{turn}", "ada", "calls", held, "p1"))
            except InsufficientCreditsError:
                break
            amount = dice.randint(1, held)
            ledger.run(Settle(f"h{name}-{turn}", "ada", "calls", amount, f"gen_{name}-{turn}", "reported"))
            spent += amount
        return spent

    spent = sum(result for result in at_once([lambda n=n: work(n) for n in range(16)]) if isinstance(result, int))

    balance = ledger.balance("ada", "calls")
    print(f"whole calls: {spent} of 200 spent, in {len(list(ledger.usage_events()))} events")
    assert spent == balance.used <= 200
    assert (0, 0) == (balance.held, balance.debt)


def test_raising(ledger: Ledger) -> None:
    """10 holds of 1 that raise themselves to 3 out of 20 credits: exactly 5 can."""
    ledger.run(AddGrant("ada", "calls", 20, "g1"))
    for number in range(10):
        ledger.run(Place(f"h{number}", "ada", "calls", 1, "p1"))
    results = run_at_once(ledger, [Enlarge(f"h{n}", "ada", "calls", 3) for n in range(10)])

    print(f"raised: {kinds(results)['Hold']} of 10")
    assert {"Hold": 5, "InsufficientCreditsError": 5} == kinds(results)
    assert 20 == ledger.balance("ada", "calls").held


def test_most_holds(ledger: Ledger) -> None:
    """A customer who may have 10 open holds gets exactly 10 of 50, over two meters."""
    steps: list[Step] = [Place(f"h{n}", "ada", f"m{n % 2}", 0, "p1", max_holds=10) for n in range(50)]
    results = run_at_once(ledger, steps)

    print(f"open holds: {kinds(results)['Hold']} of 50")
    assert {"Hold": 10, "BillingUnavailableError": 40} == kinds(results)


# Once


def test_settle_from_threads(ledger: Ledger) -> None:
    """The same hold settled from 20 threads is billed once."""
    ledger.run(AddGrant("ada", "calls", 10, "g1"))
    ledger.run(Place("h1", "ada", "calls", 4, "p1"))
    results = run_at_once(ledger, [Settle("h1", "ada", "calls", 3, f"gen_{n}", "reported") for n in range(20)])

    print(f"settled from 20 threads: {len(list(ledger.usage_events()))} event, {dict(kinds(results))}")
    assert {"settled": 1, "again": 19} == kinds(results)
    assert 3 == ledger.balance("ada", "calls").used


def test_settle_from_processes(shared: SqliteLedger, server: ForkServerContext) -> None:
    """The same hold settled from 4 processes is billed once."""
    shared.run(AddGrant("ada", "calls", 10, "g1"))
    shared.run(Place("h1", "ada", "calls", 4, "p1"))
    outcomes = Racers(server, shared, "settle", 4).results()

    print(f"settled from 4 processes: {len(list(shared.usage_events()))} event, {outcomes}")
    assert ["again", "again", "again", "settled"] == sorted(outcomes)
    assert 3 == shared.balance("ada", "calls").used


def test_one_answer_many_holds(ledger: Ledger) -> None:
    """20 calls that a cache gives the same answer are billed once, and 19 holds given back."""
    ledger.run(AddGrant("ada", "calls", 100, "g1"))
    for number in range(20):
        ledger.run(Place(f"h{number}", "ada", "calls", 4, "p1"))
    results = run_at_once(
        ledger, [Settle(f"h{n}", "ada", "calls", 3, "gen_1", "reported", fingerprint="f1") for n in range(20)]
    )

    print(f"one answer, 20 holds: {dict(kinds(results))}")
    assert {"settled": 1, "replay": 19} == kinds(results)
    balance = ledger.balance("ada", "calls")
    assert (3, 0) == (balance.used, balance.held)


def test_record_from_threads(ledger: Ledger) -> None:
    """The same record from 20 threads is billed once, and all get the same event."""
    results = run_at_once(ledger, [Record("ada", "calls", "export_9", 7) for _ in range(20)])

    print(f"recorded from 20 threads: {ledger.balance('ada', 'calls').used} of 140 charged")
    assert 7 == ledger.balance("ada", "calls").used
    assert [results[0]] * 20 == results


def test_grant_from_threads(ledger: Ledger) -> None:
    """The same grant from 20 threads gives once."""
    run_at_once(ledger, [AddGrant("ada", "calls", 5, "order_42") for _ in range(20)])

    print(f"granted from 20 threads: {ledger.balance('ada', 'calls').limit} of 100")
    assert 5 == ledger.balance("ada", "calls").limit


def test_place_from_threads(ledger: Ledger) -> None:
    """The same hold placed from 20 threads holds once."""
    ledger.run(AddGrant("ada", "calls", 100, "g1"))
    results = run_at_once(ledger, [Place("h1", "ada", "calls", 5, "p1") for _ in range(20)])

    print(f"placed from 20 threads: {ledger.balance('ada', 'calls').held} of 100 held")
    assert {"Hold": 20} == kinds(results)
    assert 5 == ledger.balance("ada", "calls").held


def test_operation_in_many_scopes(ledger: Ledger) -> None:
    """An operation that 20 scopes begin at once is let through once."""
    ledger.run(AddGrant("ada", "calls", 100, "g1"))
    steps: list[Step] = [Place(f"h{n}", "ada", "calls", 1, "p1", operation="req_1", scope=f"s{n}") for n in range(20)]
    results = run_at_once(ledger, steps)

    print(f"one operation, 20 scopes: {kinds(results)['Hold']} passed")
    assert {"Hold": 1, "AlreadyBilledError": 19} == kinds(results)
    assert all(error.event is None for error in results if isinstance(error, AlreadyBilledError))


def test_operation_in_many_processes(shared: SqliteLedger, server: ForkServerContext) -> None:
    """An operation that 4 processes begin at once is let through once."""
    shared.run(AddGrant("ada", "calls", 100, "g1"))
    passed = Racers(server, shared, "operate", 4).results()

    print(f"one operation, 4 processes: {sum(passed)} passed")
    assert [0, 0, 0, 1] == sorted(passed)


def test_operation_in_one_scope(ledger: Ledger) -> None:
    """20 calls of one operation in one scope get 20 numbers, without a gap."""
    ledger.run(AddGrant("ada", "calls", 100, "g1"))
    steps: list[Step] = [Place(f"h{n}", "ada", "calls", 1, "p1", operation="req_1", scope="s1") for n in range(20)]
    results = run_at_once(ledger, steps)

    numbers = {result.transaction_id for result in results if isinstance(result, Hold)}
    print(f"one operation, one scope: {len(numbers)} numbers")
    assert {"req_1", *(f"req_1.{n}" for n in range(2, 21))} == numbers


# One against the other


def test_settle_against_release(ledger: Ledger) -> None:
    """Whether a settle or a release of the same hold comes first, the answer is billed, once."""
    ledger.run(AddGrant("ada", "calls", 1000, "g1"))
    outcomes: Counter[str] = Counter()
    for number in range(30):
        ledger.run(Place(f"h{number}", "ada", "calls", 4, "p1"))
        settle = Settle(f"h{number}", "ada", "calls", 3, f"gen_{number}", "reported")
        release = Release(f"h{number}", "ada", "calls", "cancelled", "unknown")
        # The thread that comes last to the start is the first to run.
        outcomes += kinds(run_at_once(ledger, [settle, release] if number % 2 else [release, settle]))

    balance = ledger.balance("ada", "calls")
    print(f"settle against release: {dict(outcomes)}")
    assert (90, 0) == (balance.used, balance.held)
    assert 30 == outcomes["settled"] + outcomes["late"] == outcomes["released"] + outcomes["again"]
    assert outcomes["late"] == outcomes["released"]


def test_place_against_release(ledger: Ledger) -> None:
    """Whether a place or the release of a cancelled call comes first, nothing stays held."""
    ledger.run(AddGrant("ada", "calls", 1000, "g1"))
    outcomes: Counter[str] = Counter()
    for number in range(30):
        place = Place(f"h{number}", "ada", "calls", 4, "p1")
        release = Release(f"h{number}", "ada", "calls", "cancelled", "no")
        outcomes += kinds(run_at_once(ledger, [place, release] if number % 2 else [release, place]))

    print(f"place against release: {dict(outcomes)}")
    assert 0 == ledger.balance("ada", "calls").held
    assert 30 == outcomes["released"] + outcomes["tombstone"]
    assert (outcomes["released"], outcomes["tombstone"]) == (outcomes["Hold"], outcomes["BillingUnavailableError"])


@pytest.mark.parametrize("kind", LEDGERS)
def test_settle_against_sweep(kind: str, tmp_path: Path) -> None:
    """Whether an orphan's settle or the sweep that charges it comes first, the customer has paid what the call cost."""
    clock = Clock()
    ledger = made(kind, tmp_path / "credits.db", clock)
    ledger.run(AddGrant("ada", "calls", 1000, "g1"))
    outcomes: Counter[str] = Counter()
    for number in range(15):
        ledger.run(Place(f"h{number}", "ada", "calls", 4, f"p{number}", on_unknown="charge"))
        clock.advance(121)
        settle = Settle(f"h{number}", "ada", "calls", number % 8, f"gen_{number}", "reported")
        acts = [lambda settle=settle: ledger.run(settle), ledger.sweep, ledger.sweep, ledger.recover]
        results = at_once(acts if number % 2 else acts[::-1])
        outcomes += Counter(result.outcome for result in results if isinstance(result, Settled))

    balance = ledger.balance("ada", "calls")
    print(f"settle against sweep: {dict(outcomes)}")
    assert {"settled", "corrected"} >= set(outcomes)
    assert 1000 - sum(number % 8 for number in range(15)) == balance.available
    assert () == ledger.verify().broken
    ledger.close()


@pytest.mark.parametrize("kind", LEDGERS)
def test_renew_against_sweep(kind: str, tmp_path: Path) -> None:
    """Whether an owner that slept renews first or a sweep finds its hold first, both know the same: it is open, or it is over."""
    clock = Clock()
    ledger = made(kind, tmp_path / "credits.db", clock)
    renewed = 0
    for number in range(30):
        ledger.run(Place(f"h{number}", "ada", "calls", 0, f"p{number}"))
        clock.advance(121)
        acts: list[Callable[[], object]] = [
            lambda number=number: ledger.run(Renew(f"p{number}", 120)),
            ledger.sweep,
            ledger.sweep,
        ]
        is_open = at_once(acts if number % 2 else acts[::-1])[0 if number % 2 else 2]
        renewed += int(is_open == 1)

        assert [f"h{number}"] * int(is_open == 1) == [hold.id for hold in ledger.holds(state="open")]
        ledger.run(Release(f"h{number}", "ada", "calls", "not_sent", "no"))

    print(f"renew against sweep: {renewed} of 30 renewed in time")
    ledger.close()


def test_cancelled_tasks(ledger: Ledger) -> None:
    """Steps whose tasks are cancelled while they wait are done all the same."""
    ledger.run(AddGrant("ada", "calls", 1000, "g1"))

    async def call(number: int) -> None:
        future = ledger.submit(Place(f"h{number}", "ada", "calls", 1, "p1"))
        await asyncio.shield(asyncio.wrap_future(future))

    async def cancel_all() -> None:
        tasks = [asyncio.create_task(call(number)) for number in range(50)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    asyncio.run(cancel_all())
    ledger.submit(Renew("p1", 120)).result()

    print(f"cancelled: {ledger.balance('ada', 'calls').held} of 50 done")
    assert 50 == ledger.balance("ada", "calls").held


# Everything at once


def test_storm(ledger: Ledger) -> None:
    """While 12 threads do all kinds of steps for 3 customers, every balance that is read adds up, and so do the books at the end."""
    customers = ["ada", "bob", "eve"]
    for customer in customers:
        ledger.run(AddGrant(customer, "calls", 100, "g1"))
    is_over = threading.Event()
    done: Counter[str] = Counter()

    def call(dice: random.Random, customer: str, hold_id: str) -> int:
        """One call with all that may happen to it; what it cost."""
        held = dice.randint(0, 6)
        try:
            ledger.run(Place(hold_id, customer, "calls", held, "p1"))
        except InsufficientCreditsError:
            done["refused"] += 1
            return 0
        if dice.random() < 0.3:
            try:
                ledger.run(Enlarge(hold_id, customer, "calls", held + 3))
                held += 3
            except InsufficientCreditsError:
                done["not raised"] += 1
        if dice.random() < 0.2:
            ledger.run(AddGrant(customer, "calls", 1, f"g_{hold_id}"))
        if dice.random() < 0.2:
            ledger.run(Record(customer, "images", f"rec_{hold_id}", 1))

        release = Release(hold_id, customer, "calls", "provider_error", "yes")
        if dice.random() < 0.3:
            done["released"] += 1
            ledger.submit_all([release, release]).result()
            return 0
        amount = dice.randint(0, held)
        settle = Settle(hold_id, customer, "calls", amount, f"gen_{hold_id}", "reported")
        if dice.random() < 0.5:
            ledger.run(settle)
        ledger.submit_all([settle, release, settle]).result()
        done["settled"] += 1
        return amount

    def work(name: int) -> dict[str, int]:
        dice, spent = random.Random(name), dict.fromkeys(customers, 0)
        for turn in range(30):
            customer = dice.choice(customers)
            spent[customer] += call(dice, customer, f"h{name}-{turn}")
        return spent

    def watch() -> int:
        seen = 0
        while not is_over.is_set():
            for customer in customers:
                balance = ledger.balance(customer, "calls")
                assert balance.limit is not None
                assert balance.limit - balance.used - balance.held == balance.available
                assert 0 == balance.debt
                seen += 1
        return seen

    watched: list[object] = []
    watcher = threading.Thread(target=lambda: watched.extend(at_once([watch])))
    watcher.start()
    results = at_once([lambda n=n: work(n) for n in range(12)])
    is_over.set()
    watcher.join()

    print(f"storm: {dict(done)}, {watched[0]} balances read")
    assert ["dict"] * 12 == [type(result).__name__ for result in results], results
    assert isinstance(watched[0], int), watched
    for customer in customers:
        balance = ledger.balance(customer, "calls")
        assert (sum(spent[customer] for spent in results), 0) == (balance.used, balance.held)


def test_killed(shared: SqliteLedger, server: ForkServerContext) -> None:
    """What a process was told is settled is there after it was killed, and so is what it held."""
    shared.run(AddGrant("ada", "calls", 1_000_000, "g1"))
    racers = Racers(server, shared, "live", 4)
    told: list[Any] = []
    for number in range(4):
        told += [racers.told[number].recv() for _ in range(5 * number + 1)]
        told += racers.kill(number)

    billed = {event.transaction_id for event in shared.usage_events()}
    balance = shared.balance("ada", "calls")
    print(f"4 killed: {len(told)} told, {len(billed)} billed, {balance.held} held by the dead")
    assert set(told) <= billed
    assert len(billed) <= len(told) + 4
    assert len(billed) == balance.used
    assert balance.held in {0, 2, 4, 6, 8}
