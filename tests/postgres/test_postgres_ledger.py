"""What the PostgreSQL ledger promises beyond the contract: round trips, batches, locks of others, lost answers, connections."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from typing import Any

import psycopg
import pytest

from metered_ai.core.steps import AddGrant, Place, Record, Release, Released, Renew, Settle, Settled
from metered_ai.errors import BillingUnavailableError, InsufficientCreditsError
from metered_ai.ledger.postgres import PostgresLedger
from metered_ai.ledger.postgres import ledger as module
from metered_ai.records import Hold, Usage
from tests.postgres.proxy import Proxy

GRANT = AddGrant("ada", "calls", 1000, "g1")


def hold(number: int = 1, amount: int = 1, customer: str = "ada", **more: Any) -> Place:
    return Place(f"h{number:06}", customer, "calls", amount, "p1", **more)


def settling(number: int = 1, amount: int = 1, customer: str = "ada", **more: Any) -> Settle:
    return Settle(f"h{number:06}", customer, "calls", amount, f"gen_{number:06}", "reported", **more)


def releasing(number: int = 1) -> Release:
    return Release(f"h{number:06}", "ada", "calls", "provider_error", "yes")


def server_of(url: str) -> str:
    return url.rpartition("schema=")[0].rstrip("?&")


def schema_of(url: str) -> str:
    return url.rpartition("schema=")[2]


@pytest.fixture
def ledger(postgres: str) -> Iterator[PostgresLedger]:
    """A ledger with 1000 credits for ada, whose process is known."""
    with closing(PostgresLedger(postgres, hold_patience=2)) as ledger:
        ledger.run(GRANT)
        ledger.run(Renew("p1", 120.0))
        yield ledger

        assert () == ledger.verify().broken


@pytest.fixture
def proxy(postgres: str) -> Iterator[Proxy]:
    with closing(Proxy(server_of(postgres))) as proxy:
        yield proxy


@pytest.fixture
def distant(postgres: str, proxy: Proxy) -> Iterator[PostgresLedger]:
    """The same kind of ledger, over the relay."""
    with closing(
        PostgresLedger(f"{proxy.url}?schema={schema_of(postgres)}", hold_patience=2, settle_patience=5)
    ) as ledger:
        ledger.run(GRANT)
        ledger.run(Renew("p1", 120.0))
        yield ledger
        proxy.up()

        assert () == ledger.verify().broken


@contextmanager
def locked(url: str, customer: str = "ada") -> Iterator[psycopg.Connection[Any]]:
    """A transaction of somebody else's that has a customer's account locked and takes its time."""
    with psycopg.connect(server_of(url)) as other:
        other.execute(f'SELECT no FROM "{schema_of(url)}".account WHERE customer = %s FOR UPDATE', (customer,))
        yield other
        other.rollback()


def singly(ledger: PostgresLedger, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The steps that are done one by one from now on."""
    steps: list[Any] = []
    inner = ledger._singly
    monkeypatch.setattr(ledger, "_singly", lambda connection, step: (steps.append(step), inner(connection, step))[1])
    return steps


class TestRoundTrips:
    def test_one_each(self, postgres: str, proxy: Proxy) -> None:
        """A hold is one round trip, and so are a settle and a release, whether their statements are prepared yet or not."""
        counts = []
        # Patient: on a disk that stands still for two seconds a step would be tried again.
        with closing(PostgresLedger(f"{proxy.url}?schema={schema_of(postgres)}", hold_patience=60)) as distant:
            distant.run(GRANT)
            distant.run(Renew("p1", 120.0))
            distant.run(hold(1))
            distant.run(settling(1))
            for number in range(2, 12):
                before = proxy.round_trips
                distant.run(hold(number))
                after_hold = proxy.round_trips
                distant.run(settling(number) if number % 2 else releasing(number))
                counts.append((after_hold - before, proxy.round_trips - after_hold))

        assert [(1, 1)] * 10 == counts

    def test_many_in_one(self, distant: PostgresLedger, proxy: Proxy) -> None:
        """A hundred holds that are handed over together take a few round trips, not a hundred."""
        distant.run(hold(0))
        before = proxy.round_trips
        outcomes = distant.submit_all([hold(number) for number in range(1, 101)]).result(20)

        assert {Hold} == set(map(type, outcomes))
        assert proxy.round_trips - before <= 4


class TestBatches:
    def test_usual(self, ledger: PostgresLedger, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is usual is never done one by one: holds, settles with usage and all, releases, of limited and unlimited accounts."""
        ledger.run(AddGrant("bob", "calls", 10, "g1"))
        steps = singly(ledger, monkeypatch)
        usage = Usage(model="gpt-5-mini", input_tokens=5, output_tokens=7, seconds=1.5)
        places = ledger.submit_all(
            [hold(1, 5), hold(2, 6, "bob", properties={"a": [1]}), Place("h3", "ada", "calls", 7, None)]
        ).result(10)
        ends = ledger.submit_all(
            [
                settling(1, 4, usage=usage, properties={"team": "blue"}, request_id="r", attempts=2),
                settling(2, 6, "bob"),
            ]
        ).result(10)

        assert [Hold, Hold, Hold, Settled, Settled] == [type(outcome) for outcome in [*places, *ends]]
        assert Released("released") == ledger.run(Release("h3", "ada", "calls", "provider_error", "yes"))
        assert [] == steps
        assert [ends[0].event] == list(ledger.usage_events("ada"))
        assert usage == ends[0].event.usage

    def test_the_rest_is_told_why(self, ledger: PostgresLedger) -> None:
        """In one batch of three times 400 on 1000 credits two fit, and the third is refused with its numbers."""
        outcomes = ledger.submit_all([hold(number, 400) for number in range(3)]).result(10)

        assert [Hold, Hold, InsufficientCreditsError] == [type(outcome) for outcome in outcomes]
        assert (200, 400, 800) == (outcomes[2].available, outcomes[2].required, outcomes[2].held)

    def test_what_fits_behind(self, ledger: PostgresLedger) -> None:
        """A small hold behind one that does not fit is placed all the same."""
        outcomes = ledger.submit_all([hold(1, 900), hold(2, 200), hold(3, 100)]).result(10)

        assert [Hold, InsufficientCreditsError, Hold] == [type(outcome) for outcome in outcomes]

    def test_odd_texts(self, ledger: PostgresLedger, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever a text consists of, quotes, commas, braces or the word NULL, a batch stores it as it is, beside others."""
        texts = ['a","b', '"', "\\", "{}", "NULL", "null", "a,b", "\n", "ü’", '\\"', "'; DROP", "", "plain"]
        steps = singly(ledger, monkeypatch)
        for chosen in (texts, texts[3:8], [texts[0]], [texts[-1], texts[-1]]):
            numbers = [hash((len(chosen), index)) % 10**9 for index in range(len(chosen))]
            ledger.submit_all([hold(n, 1, model=text) for n, text in zip(numbers, chosen, strict=True)]).result(10)
            ends = ledger.submit_all(
                [settling(n, 1, request_id=text) for n, text in zip(numbers, chosen, strict=True)]
            ).result(10)
            stored = {event.hold_id: event.request_id for event in ledger.usage_events()}

            assert chosen == [stored[end.event.hold_id] for end in ends]
        assert [] == steps

    def test_bad_neighbour(self, ledger: PostgresLedger) -> None:
        """A row that cannot be stored fails alone, and a NUL in what describes a call costs nobody a settle."""
        outcomes = ledger.submit_all(
            [
                hold(1, model="m\ud800"),
                hold(2),
                hold(3, properties={"a": {1, 2}}),
                hold(4, model="m\0n"),
            ]
        ).result(10)
        settled = ledger.submit_all([settling(2, usage=Usage(model="x\0y")), settling(4)]).result(10)

        assert [ValueError, Hold, ValueError, Hold] == [type(outcome) for outcome in outcomes]
        assert [Settled, Settled] == [type(outcome) for outcome in settled]
        assert "x\ufffdy" == next(ledger.usage_events("ada", "calls")).usage.model

    def test_same_name(self, ledger: PostgresLedger) -> None:
        """Two answers under one provider's id, settled in one batch, are two events unless they are one answer."""
        ledger.submit_all([hold(number) for number in range(3)]).result(10)
        outcomes = ledger.submit_all(
            [
                Settle(f"h{number:06}", "ada", "calls", 1, "gen_same", "reported", fingerprint=fingerprint)
                for number, fingerprint in enumerate(["f1", "f2", "f1"])
            ]
        ).result(10)

        assert ["settled", "settled", "replay"] == [outcome.outcome for outcome in outcomes]
        assert 2 == len({outcome.event.transaction_id for outcome in outcomes})

    def test_max_holds(self, ledger: PostgresLedger) -> None:
        """In one batch, and over all meters, a customer gets as many holds as `max_holds` says."""
        ledger.run(AddGrant("ada", "images", 1000, "g1"))
        steps = [Place(f"h{n}", "ada", meter, 1, "p1", max_holds=5) for n, meter in enumerate(["calls", "images"] * 5)]
        outcomes = ledger.submit_all(steps).result(10)

        assert (5, 5) == (
            sum(isinstance(outcome, Hold) for outcome in outcomes),
            sum(isinstance(outcome, BillingUnavailableError) for outcome in outcomes),
        )


class TestOrder:
    def test_callback(self, ledger: PostgresLedger) -> None:
        """A callback of a future may ask for a step of the same account, and gets it."""
        results: list[Any] = []
        futures = [ledger.submit(step) for step in (hold(1), settling(1), hold(2))]
        futures[1].add_done_callback(lambda future: results.append(ledger.run(Record("ada", "calls", "r1", 1))))
        for future in futures:
            future.result(10)
        ledger.run(Record("ada", "calls", "r2", 1))

        assert ["r1"] == [event.transaction_id for event in results]

    def test_settles_pass_holds(self, postgres: str) -> None:
        """Where every connection for holds is taken, a settle comes through all the same."""
        with closing(PostgresLedger(postgres, connections=2, hold_patience=20)) as ledger:
            ledger.run(GRANT)
            ledger.run(hold(1))
            with ledger._sessions.use(1):
                stuck = ledger.submit(hold(2))
                settled = ledger.submit(settling(1)).result(10)

                assert not stuck.done()
            assert "settled" == settled.outcome
            assert isinstance(stuck.result(10), Hold)

    def test_all_busy(self, postgres: str) -> None:
        """Twenty-four threads share two connections, and never open a third."""
        with closing(PostgresLedger(postgres, connections=2)) as ledger:
            ledger.run(AddGrant("ada", "calls", 240, "g1"))
            ids: set[int] = set()
            inner = ledger._sessions._open
            ledger._sessions._open = lambda patience: (connection := inner(patience), ids.add(id(connection)))[0]  # type: ignore[method-assign]
            start = threading.Barrier(24)
            failed: list[Exception] = []

            def work(thread: int) -> None:
                start.wait()
                for turn in range(10):
                    try:
                        ledger.run(hold(thread * 100 + turn))
                        ledger.run(settling(thread * 100 + turn))
                    except Exception as error:
                        failed.append(error)

            threads = [threading.Thread(target=work, args=(number,)) for number in range(24)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

            assert [] == failed
            assert 240 == ledger.balance("ada", "calls").used
            assert len(ids) <= 2
            assert () == ledger.verify().broken


class TestRaces:
    @pytest.fixture(autouse=True)
    def _patient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Locks are waited for in the batch, so that its statements meet what was committed meanwhile."""
        monkeypatch.setattr(module, "_LOCK_WAIT", 10.0)

    def wait_for_waiters(self, url: str, count: int = 1) -> None:
        with psycopg.connect(server_of(url), autocommit=True) as watcher:
            for _ in range(500):
                waiting = watcher.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()
                if waiting is not None and waiting[0] >= count:
                    return
                time.sleep(0.01)
        raise AssertionError("nobody waits for a lock")

    def test_tombstone(self, postgres: str, ledger: PostgresLedger) -> None:
        """A place that waits while the release of the same hold is committed reserves nothing."""
        outcome: Future[Any]
        with locked(postgres) as other:
            outcome = ledger.submit(hold(1))
            self.wait_for_waiters(postgres)
            other.execute(
                f'INSERT INTO "{schema_of(postgres)}".ended_hold (account_no, hold_id, state, amount, is_unlimited, is_repeat, placed_at, '
                "ended_at, reason, sent) VALUES (1, 'h000001', 'tombstone', 0, 0, 0, 0, 9000000000000000, 'cancelled', 'no')"
            )
            other.commit()

        with pytest.raises(BillingUnavailableError, match="has ended"):
            outcome.result(10)
        assert 0 == ledger.balance("ada", "calls").held

    def test_placed_twice(self, postgres: str, ledger: PostgresLedger) -> None:
        """The same place from two processes at once is one hold, and both are told of it."""
        with closing(PostgresLedger(postgres)) as second, locked(postgres) as other:
            outcomes = [ledger.submit(hold(1, 5)), second.submit(hold(1, 5))]
            self.wait_for_waiters(postgres, 2)
            other.rollback()

            assert ["h000001", "h000001"] == [outcome.result(10).id for outcome in outcomes]
        assert 5 == ledger.balance("ada", "calls").held

    def test_settled_twice(self, postgres: str, ledger: PostgresLedger) -> None:
        """The same settle from two processes at once is one event, and so is a settle beside a release."""
        ledger.submit_all([hold(1, 5), hold(2, 5)]).result(10)
        with closing(PostgresLedger(postgres)) as second, locked(postgres) as other:
            outcomes = [ledger.submit(settling(1, 3)), second.submit(settling(1, 3))]
            self.wait_for_waiters(postgres, 2)
            other.rollback()

            assert ["again", "settled"] == sorted(outcome.result(10).outcome for outcome in outcomes)
        with closing(PostgresLedger(postgres)) as second, locked(postgres) as other:
            ended = [ledger.submit(settling(2, 3)), second.submit(releasing(2))]
            self.wait_for_waiters(postgres, 2)
            other.rollback()
            kinds = {ended[0].result(10).outcome, ended[1].result(10).outcome}

        # Whichever came first: the truth is recorded once.
        assert kinds in ({"settled", "again"}, {"late", "released"})
        assert (6, 0) == (ledger.balance("ada", "calls").used, ledger.balance("ada", "calls").held)

    def test_first_ever(self, postgres: str) -> None:
        """Eight processes that give a customer's first grant at the same moment make one account and one grant."""
        ledgers = [PostgresLedger(postgres) for _ in range(8)]
        start = threading.Barrier(8)
        results: list[Any] = []

        def give(ledger: PostgresLedger) -> None:
            start.wait()
            try:
                results.append(ledger.run(GRANT))
            except Exception as error:
                results.append(error)

        threads = [threading.Thread(target=give, args=(ledger,)) for ledger in ledgers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert {1000} == {getattr(result, "amount", result) for result in results}
        assert 1000 == ledgers[0].balance("ada", "calls").available
        for ledger in ledgers:
            ledger.close()


class TestLocks:
    """Somebody else's transaction has an account locked and takes its time."""

    def test_others_go_on(self, postgres: str, ledger: PostgresLedger) -> None:
        """It holds up nobody but its own customer: others in the same batch, and later ones, are served."""
        for number in range(20):
            ledger.run(AddGrant(f"c{number}", "calls", 10, "g1"))
        with locked(postgres):
            stuck = ledger.submit_all([hold(900), hold(901)])
            together = ledger.submit_all([hold(number, customer=f"c{number}") for number in range(20)]).result(10)
            settled = ledger.submit_all([settling(number, customer=f"c{number}") for number in range(20)]).result(10)

            assert not stuck.done()
        assert {Hold} == set(map(type, together))
        assert {Settled} == set(map(type, settled))
        assert {Hold} == set(map(type, stuck.result(10)))

    def test_waited_for(self, postgres: str, ledger: PostgresLedger) -> None:
        """Its customer's hold is refused when patience is over, its settle waits longer, and nothing is lost."""
        ledger.run(hold(1, 5))
        with locked(postgres):
            settled = ledger.submit(settling(1, 3))
            with pytest.raises(BillingUnavailableError, match="waited 2 s"):
                ledger.run(hold(2))

            assert not settled.done()
        assert "settled" == settled.result(10).outcome
        assert 1 == len(list(ledger.usage_events("ada")))

    def test_order_is_kept(self, postgres: str, ledger: PostgresLedger) -> None:
        """What waited comes in the order it was handed over."""
        with locked(postgres):
            futures = [ledger.submit(Record("ada", "calls", f"r{number}", 1)) for number in range(5)]
        for future in futures:
            future.result(10)

        assert [f"r{number}" for number in range(5)] == [event.transaction_id for event in ledger.usage_events("ada")]


class TestDoubt:
    """The connection is lost between sending and answer: the server has done it, and nobody was told."""

    def test_place(self, distant: PostgresLedger, proxy: Proxy) -> None:
        """A hold whose answer was lost is placed once, and the caller gets it."""
        distant.run(hold(1))
        proxy.lose_answers(1)
        placed = distant.run(hold(2, 5))

        assert 1 == proxy.lost
        assert ("h000002", 5, "open") == (placed.id, placed.amount, placed.state)
        assert 6 == distant.balance("ada", "calls").held

    def test_settle(self, distant: PostgresLedger, proxy: Proxy) -> None:
        """A settle whose answer was lost is recorded once, and the caller gets its event."""
        distant.submit_all([hold(1, 5), hold(2, 5)]).result(10)
        distant.run(settling(1, 3))
        proxy.lose_answers(1)
        settled = distant.run(settling(2, 3))

        assert 1 == proxy.lost
        assert ("gen_000002", 3) == (settled.event.transaction_id, settled.event.amount)
        assert 6 == distant.balance("ada", "calls").used

    def test_one_by_one(self, distant: PostgresLedger, proxy: Proxy) -> None:
        """A grant whose answer was lost is given once."""
        distant.run(AddGrant("ada", "calls", 1, "g2"))
        proxy.lose_answers(1)
        distant.run(AddGrant("ada", "calls", 7, "g3"))

        assert 1 == proxy.lost
        assert 1008 == distant.balance("ada", "calls").available

    def test_batch(self, distant: PostgresLedger, proxy: Proxy) -> None:
        """A whole batch whose answer was lost is done once."""
        distant.run(hold(1))
        proxy.lose_answers(1)
        outcomes = distant.submit_all([hold(number) for number in range(2, 52)]).result(20)

        assert {Hold} == set(map(type, outcomes))
        assert 51 == distant.balance("ada", "calls").held

    def test_away(self, distant: PostgresLedger, proxy: Proxy) -> None:
        """While the server is away holds are refused when patience is over; a settle waits, and is recorded when it is back."""
        distant.run(hold(1, 5))
        proxy.down()
        settled = distant.submit(settling(1, 3))
        with pytest.raises(BillingUnavailableError, match="waited 2 s"):
            distant.run(hold(2))
        proxy.up()

        assert "settled" == settled.result(10).outcome
        assert (3, 0) == (distant.balance("ada", "calls").used, distant.balance("ada", "calls").held)

    def test_settle_is_given_up(self, postgres: str, proxy: Proxy) -> None:
        """A settle that finds no server within its patience is a BillingUnavailableError, for which the spool waits."""
        url = f"{proxy.url}?schema={schema_of(postgres)}"
        with closing(PostgresLedger(url, hold_patience=0.2, settle_patience=0.4)) as ledger:
            ledger.run(GRANT)
            ledger.run(hold(1))
            proxy.down()

            with pytest.raises(BillingUnavailableError, match=r"waited 0\.4 s"):
                ledger.run(settling(1))
            proxy.up()
            assert "settled" == ledger.run(settling(1)).outcome
