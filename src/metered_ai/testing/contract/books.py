"""What a ledger shows, how it adds up, and many callers at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ...core.steps import AddGrant, Enlarge, Record, Released, Renew, Revoke, Settled, Step, StepResult
from ...errors import AlreadyBilledError, BillingUnavailableError, GrantConflictError, InsufficientCreditsError
from ...ledger import Ledger
from ...records import Grant, Hold
from .common import (
    Clock,
    Contract,
    Numbers,
    at_once,
    billed,
    expect,
    grant,
    numbers,
    place,
    record,
    refused,
    release,
    revoke,
    set_unlimited,
    settle,
    to_place,
    to_release,
    to_settle,
    use_two_days,
    zone,
)

__all__ = ["Closing", "Listing", "Together", "Verifying"]


class Listing(Contract):
    """Reading what happened."""

    def test_list_filters(self, ledger: Ledger) -> None:
        """Events are found by customer, by meter, by both or by neither."""
        for customer in ["ada", "bob"]:
            for meter in ["calls", "images"]:
                record(ledger, f"{customer}-{meter}", 1, customer, meter)

        def found(customer: str | None = None, meter: str | None = None) -> set[str]:
            return {event.transaction_id for event in ledger.usage_events(customer, meter)}

        assert {"ada-calls", "ada-images", "bob-calls", "bob-images"} == found()
        assert {"ada-calls", "ada-images"} == found(customer="ada")
        assert {"ada-images", "bob-images"} == found(meter="images")
        assert {"bob-calls"} == found(customer="bob", meter="calls")

    def test_list_accounts(self, ledger: Ledger) -> None:
        """Every account there is is listed with its balance, one that was only made unlimited as well; one meter's can be asked for."""
        set_unlimited(ledger)
        grant(ledger, 3, customer="bob")
        record(ledger, "rec", 1, "ada", "images")

        assert [ledger.balance(each.customer, each.meter) for each in ledger.accounts()] == list(ledger.accounts())
        assert [("ada", "calls"), ("bob", "calls"), ("ada", "images")] == [
            (each.customer, each.meter) for each in ledger.accounts()
        ]
        assert ["ada"] == [each.customer for each in ledger.accounts("images")]
        assert [] == list(ledger.accounts("reports"))

    def test_list_times(self, ledger: Ledger, clock: Clock) -> None:
        """`since` is inclusive, `until` exclusive, to the microsecond and in any time zone."""
        times: list[datetime] = []
        for number in range(4):
            times.append(record(ledger, f"rec_{number}", 1).created_at)
            clock.advance(60)

        def found(since: datetime | None = None, until: datetime | None = None) -> list[str]:
            return [event.transaction_id for event in ledger.usage_events("ada", "calls", since, until)]

        moment = timedelta(microseconds=1)
        assert ["rec_1", "rec_2", "rec_3"] == found(since=times[1])
        assert ["rec_2", "rec_3"] == found(since=times[1] + moment)
        assert ["rec_0"] == found(until=times[1])
        assert ["rec_0", "rec_1"] == found(until=times[1] + moment)
        assert ["rec_1", "rec_2"] == found(times[1], times[3])
        assert ["rec_1", "rec_2"] == found(times[1].astimezone(zone(-8)), times[3].astimezone(zone(5.5)))
        assert [] == found(times[3], times[1])

    def test_list_naive_times(self, ledger: Ledger) -> None:
        """A time without a time zone is a ValueError."""
        naive = datetime(2026, 3, 1)  # noqa: DTZ001 - What is refused.

        with pytest.raises(ValueError, match="since"):
            list(ledger.usage_events(since=naive))
        with pytest.raises(ValueError, match="until"):
            list(ledger.usage_events(until=naive))
        with pytest.raises(ValueError, match="since"):
            list(ledger.usage(since=naive))
        with pytest.raises(ValueError, match="until"):
            list(ledger.usage(until=naive))

    def test_list_order(self, ledger: Ledger) -> None:
        """An account's events come oldest first, each later than the one before, even if no time passed between them."""
        for number in range(20):
            record(ledger, f"rec_{number}", 1)

        events = list(ledger.usage_events("ada", "calls"))
        assert [f"rec_{number}" for number in range(20)] == [event.transaction_id for event in events]
        times = [event.created_at for event in events]
        assert sorted(set(times)) == times

    def test_list_many(self, ledger: Ledger) -> None:
        """A long listing comes in pages, misses nothing and repeats nothing, also while others write."""
        ledger.submit_all([Record("ada", "calls", f"rec_{n:04}", 1) for n in range(2500)]).result()
        ledger.submit_all([Record("bob", "calls", f"rec_{n:04}", 1) for n in range(500)]).result()

        listing = ledger.usage_events("ada")
        seen = [next(listing).transaction_id]
        place(ledger, "h1", 0)
        settle(ledger, "h1", 0)
        seen += [event.transaction_id for event in listing if event.kind == "record"]
        assert [f"rec_{n:04}" for n in range(2500)] == seen
        assert 3001 == sum(1 for _ in ledger.usage_events())

    def test_list_left_early(self, ledger: Ledger) -> None:
        """A listing may be left in the middle; nothing stays locked."""
        for number in range(3):
            record(ledger, f"rec_{number}", 1)
        next(ledger.usage_events())

        record(ledger, "rec_9", 1)
        assert 4 == len(billed(ledger))

    def test_list_sums(self, ledger: Ledger, clock: Clock) -> None:
        """Usage is added up by day, meter and model: amounts, calls and tokens."""
        use_two_days(ledger, clock)

        sums = [
            (s.day, s.meter, s.model, s.amount, s.calls, s.input_tokens, s.output_tokens) for s in ledger.usage("ada")
        ]
        assert {
            ("2026-03-01", "calls", "gpt-a", 12, 2, 120, 12),
            ("2026-03-01", "calls", "gpt-b", 1, 1, 10, 1),
            ("2026-03-01", "images", None, 3, 1, 0, 0),
            ("2026-03-02", "calls", "gpt-a", 212, 2, 120, 12),
            ("2026-03-02", "calls", "gpt-b", 101, 1, 10, 1),
            ("2026-03-02", "images", None, 103, 1, 0, 0),
        } == set(sums)
        assert 6 == len(sums)

    @pytest.mark.parametrize(
        ("by", "expected"),
        [
            (("customer", "meter"), {("ada", None, None, 326, 6), ("bob", None, None, 104, 2)}),
            (("day", "meter"), {(None, "2026-03-01", None, 15, 4), (None, "2026-03-02", None, 415, 4)}),
            (("model", "meter"), {(None, None, "gpt-a", 328, 6), (None, None, "gpt-b", 102, 2)}),
        ],
        ids=["customer", "day", "model"],
    )
    def test_list_sums_by(self, ledger: Ledger, clock: Clock, by: tuple[str, ...], expected: set[Any]) -> None:
        """What is not asked to be told apart is None, and added up over all."""
        use_two_days(ledger, clock)

        sums = list(ledger.usage(meter="calls", by=by))
        assert expected == {(s.customer, s.day, s.model, s.amount, s.calls) for s in sums}
        assert {"calls"} == {s.meter for s in sums}

    def test_list_sums_of_a_time(self, ledger: Ledger, clock: Clock) -> None:
        """Sums can be asked for a stretch of time; a day is a day in UTC."""
        midnight = datetime(2026, 3, 2, tzinfo=UTC)
        clock.advance((midnight - clock.at()).total_seconds() - 0.000001)
        record(ledger, "before", 1)
        clock.advance(1)
        record(ledger, "after", 10)

        assert [("2026-03-01", 1), ("2026-03-02", 10)] == sorted((str(s.day), s.amount) for s in ledger.usage("ada"))
        assert [10] == [s.amount for s in ledger.usage("ada", since=midnight)]
        assert [1] == [s.amount for s in ledger.usage("ada", until=midnight)]

    def test_list_sums_by_something_else(self, ledger: Ledger) -> None:
        """Telling usage apart by something unknown is a ValueError naming it."""
        with pytest.raises(ValueError, match="colour"):
            list(ledger.usage(by=("day", "colour")))

    def test_list_holds(self, ledger: Ledger, clock: Clock) -> None:
        """Holds are listed while open and after they ended without being settled; `state` chooses."""
        for customer in ["ada", "bob"]:
            for meter in ["calls", "images"]:
                grant(ledger, 100, customer=customer, meter=meter)
                for state in ["charged", "expired"]:
                    policy = "charge" if state == "charged" else "release"
                    place(
                        ledger,
                        f"{customer}-{meter}-{state}",
                        1,
                        customer=customer,
                        meter=meter,
                        owner="dead",
                        on_unknown=policy,
                    )
        clock.advance(121)
        ledger.recover()
        for customer in ["ada", "bob"]:
            for meter in ["calls", "images"]:
                for state in ["open", "released", "settled"]:
                    place(ledger, f"{customer}-{meter}-{state}", 1, customer=customer, meter=meter)
                release(ledger, f"{customer}-{meter}-released", customer=customer, meter=meter)
                settle(ledger, f"{customer}-{meter}-settled", 1, customer=customer, meter=meter)

        def found(customer: str | None = None, meter: str | None = None, state: str | None = None) -> list[str]:
            return sorted(hold.id for hold in ledger.holds(customer, meter, state=state))

        states = ["charged", "expired", "open", "released"]
        accounts = ["ada-calls", "ada-images", "bob-calls", "bob-images"]
        assert [f"{account}-{state}" for account in accounts for state in states] == found()
        assert [f"ada-{meter}-{state}" for meter in ["calls", "images"] for state in states] == found("ada")
        assert [f"{customer}-images-{state}" for customer in ["ada", "bob"] for state in states] == found(
            meter="images"
        )
        assert [f"bob-calls-{state}" for state in states] == found("bob", "calls")
        for state in states:
            assert [f"{account}-{state}" for account in accounts] == found(state=state)
            assert [f"bob-calls-{state}"] == found("bob", "calls", state)

    def test_list_grants(self, ledger: Ledger, clock: Clock) -> None:
        """Grants are listed by customer and meter, oldest first."""
        for customer in ["ada", "bob"]:
            for meter in ["calls", "images"]:
                for number in [3, 1, 2]:
                    grant(ledger, number, f"g{number}", customer=customer, meter=meter)
                    clock.advance(1)

        assert [3, 1, 2] == [given.amount for given in ledger.grants("ada", "images")]
        assert 6 == len(list(ledger.grants("ada")))
        assert 6 == len(list(ledger.grants(meter="calls")))
        assert 12 == len(list(ledger.grants()))

    def test_list_balances(self, ledger: Ledger) -> None:
        """A customer's balances come by meter, and are what each meter's balance is."""
        for meter in ["images", "calls", "reports"]:
            grant(ledger, 10, meter=meter)
        grant(ledger, 10, customer="bob")

        assert ["calls", "images", "reports"] == [balance.meter for balance in ledger.balances("ada")]
        assert [ledger.balance("ada", meter) for meter in ["calls", "images", "reports"]] == ledger.balances("ada")


class Together(Contract):
    """Steps handed over, in numbers, and from everywhere at once."""

    def test_together_submit(self, ledger: Ledger) -> None:
        """A step that is handed over is done, and its future has the result."""
        ledger.submit(AddGrant("ada", "calls", 10, "g1")).result()
        future = ledger.submit(to_place("h1", 4))

        assert isinstance(future, Future)
        assert "h1" == expect(Hold, future.result()).id
        assert Numbers(10, held=4, available=6) == numbers(ledger)

    def test_together_submit_refused(self, ledger: Ledger) -> None:
        """What a step raises is raised by its future, not where it is handed over."""
        assert isinstance(ledger.submit(to_place("h1", 4)).exception(), InsufficientCreditsError)
        assert isinstance(ledger.submit(to_place("h1", -4)).exception(), ValueError)
        with pytest.raises(InsufficientCreditsError):
            ledger.submit(to_place("h1", 4)).result()

    def test_together_submit_unwatched(self, ledger: Ledger) -> None:
        """A step that is handed over is done even if nobody waits for it, or its future is cancelled."""
        grant(ledger, 100)
        for number in range(20):
            ledger.submit(to_place(f"h{number}", 1)).cancel()
        ledger.submit(to_place("last", 1)).result()

        assert 21 == numbers(ledger).held

    def test_together_submit_all(self, ledger: Ledger) -> None:
        """Several steps are done in order: what comes first can be built upon."""
        steps: list[Step] = [
            AddGrant("ada", "calls", 10, "g1"),
            to_place("h1", 4),
            Enlarge("h1", "ada", "calls", 6),
            to_settle("h1", 5),
            to_place("h2", 2),
            to_release("h2"),
            Renew("p1", 120),
        ]
        kinds = [type(outcome) for outcome in ledger.submit_all(steps).result()]

        assert [Grant, Hold, Hold, Settled, Hold, Released, int] == kinds
        assert Numbers(10, used=5, available=5) == numbers(ledger)

    def test_together_bad_neighbours(self, ledger: Ledger) -> None:
        """One step's failure never fails its neighbours: each has its own result or exception."""
        grant(ledger, 10)
        grant(ledger, 10, customer="bob")
        place(ledger, "h0", 0)
        record(ledger, "rec_0", 1, customer="bob")
        steps: list[Step] = [
            to_place("h1", 4),
            to_place("h2", 7),
            to_place("h3", True),
            to_place("h4", 1, customer=""),
            AddGrant("ada", "calls", 11, "g1"),
            Revoke("ada", "calls", "nothing"),
            to_place("h5", 2, customer="bob", operation="rec_0", scope="s1"),
            Enlarge("h9", "ada", "calls", 1),
            to_settle("h0", 2),
        ]
        outcomes = ledger.submit_all(steps).result()

        assert [
            Hold,
            InsufficientCreditsError,
            ValueError,
            ValueError,
            GrantConflictError,
            ValueError,
            AlreadyBilledError,
            BillingUnavailableError,
            Settled,
        ] == [type(outcome) for outcome in outcomes]
        assert Numbers(10, used=2, held=4, available=4) == numbers(ledger)
        assert Numbers(10, used=1, available=9) == numbers(ledger, "bob")

    def test_together_nothing_to_do(self, ledger: Ledger) -> None:
        """Handing over no steps is done at once."""
        assert [] == ledger.submit_all([]).result()

    def test_together_in_order(self, ledger: Ledger) -> None:
        """What one thread hands over is done in the order it was handed over."""
        ledger.submit(AddGrant("ada", "calls", 1, "g1"))
        settles = []
        for number in range(100):
            ledger.submit(to_place(f"h{number}", 1))
            settles.append(ledger.submit(to_settle(f"h{number}", 0)))

        assert {"settled"} == {expect(Settled, future.result()).outcome for future in settles}

    def test_together_threads(self, ledger: Ledger) -> None:
        """50 threads ask for one credit each of a customer who has 10: exactly 10 get one."""
        grant(ledger, 10)
        results = at_once(50, lambda number: place(ledger, f"h{number}", 1))

        assert (10, 40) == (sum(isinstance(result, Hold) for result in results), refused(results))
        assert Numbers(10, held=10) == numbers(ledger)

    def test_together_tasks(self, ledger: Ledger) -> None:
        """50 tasks of an event loop ask for one credit each of a customer who has 10: exactly 10 get one."""
        grant(ledger, 10)

        async def one(number: int) -> StepResult:
            return await asyncio.wrap_future(ledger.submit(to_place(f"h{number}", 1)))

        async def all_at_once() -> list[StepResult | BaseException]:
            return await asyncio.gather(*(one(number) for number in range(50)), return_exceptions=True)

        results = asyncio.run(all_at_once())

        assert (10, 40) == (sum(isinstance(result, Hold) for result in results), refused(results))
        assert Numbers(10, held=10) == numbers(ledger)

    def test_together_threads_settle_once(self, ledger: Ledger) -> None:
        """20 threads settle the same hold: one event, and all are told of it."""
        grant(ledger, 10)
        place(ledger, "h1", 4)
        results = at_once(20, lambda number: settle(ledger, "h1", 3, f"gen_{number}"))
        settled = [result for result in results if isinstance(result, Settled)]

        assert {"settled": 1, "again": 19} == {
            outcome: sum(result.outcome == outcome for result in settled) for outcome in ["settled", "again"]
        }
        assert 1 == len({result.event.transaction_id for result in settled})
        assert Numbers(10, used=3, available=7) == numbers(ledger)

    def test_together_threads_hand_over_and_run(self, ledger: Ledger) -> None:
        """Steps that are run and steps that are handed over may be mixed from any thread; none is lost, none done twice."""
        grant(ledger, 1000)

        def work(number: int) -> None:
            for turn in range(5):
                hold_id = f"h{number}-{turn}"
                if (number + turn) % 2:
                    place(ledger, hold_id, 2)
                    ledger.submit(to_settle(hold_id, 1)).result()
                else:
                    ledger.submit(to_place(hold_id, 2)).result()
                    settle(ledger, hold_id, 1)

        results = at_once(8, work)

        assert [] == [result for result in results if isinstance(result, Exception)]
        assert Numbers(1000, used=40, available=960) == numbers(ledger)
        assert 40 == len(billed(ledger))

    def test_together_others_are_left_alone(self, ledger: Ledger, clock: Clock) -> None:
        """Whatever is done for one customer changes nothing of another's."""
        for customer in ["bob", "ada"]:
            grant(ledger, 10, customer=customer, expires_at=clock.at(3600))
            place(ledger, f"{customer}1", 2, customer=customer, owner=None)
            place(ledger, f"{customer}2", 2, customer=customer, owner=None, operation="req_1", scope="s1")
            record(ledger, "rec_1", 1, customer=customer)

        def bob() -> list[object]:
            return [
                ledger.balances("bob"),
                list(ledger.usage_events("bob")),
                list(ledger.grants("bob")),
                sorted(ledger.holds("bob"), key=lambda hold: hold.id),
            ]

        before = bob()
        settle(ledger, "ada1", 9)
        release(ledger, "ada2")
        record(ledger, "rec_2", 1)
        grant(ledger, 5, "g2")
        place(ledger, "ada3", 0, operation="req_1", scope="s2")
        set_unlimited(ledger)
        revoke(ledger)
        clock.advance(3599)
        ledger.recover()
        assert before == bob()


class Verifying(Contract):
    """Checking the books."""

    def test_verify_empty(self, ledger: Ledger) -> None:
        """An empty ledger is sound."""
        found = ledger.verify()

        assert found.is_sound
        assert (0, 0, 0, 0) == (found.accounts, found.events, found.grants, found.open_holds)

    def test_verify_counts(self, ledger: Ledger, clock: Clock) -> None:
        """`verify` says what it looked at: accounts, events, grants, open holds, what is in doubt, and the debt."""
        grant(ledger, 10)
        grant(ledger, 10, "g2")
        place(ledger, "h1", 3, owner="dead")
        place(ledger, "h2", 2, owner="dead")
        clock.advance(121)
        ledger.recover()
        place(ledger, "h3", 1)
        place(ledger, "h4", 1)
        release(ledger, "h4")
        record(ledger, "rec_1", 25)
        record(ledger, "rec_2", 7, customer="bob")

        found = ledger.verify()
        assert found.is_sound
        assert (2, 2, 2, 1) == (found.accounts, found.events, found.grants, found.open_holds)
        assert (2, 5) == (found.in_doubt, found.in_doubt_amount)
        assert 6 + 7 == found.debt


class Closing(Contract):
    """The end."""

    @pytest.fixture
    def brief(self, tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
        """A ledger that the test closes itself."""
        folder = tmp_path / "brief"
        folder.mkdir()
        ledger = self.make_ledger(folder, clock)
        yield ledger
        ledger.close()

    def test_close_finishes(self, brief: Ledger) -> None:
        """Closing waits for what was handed over."""
        brief.submit(AddGrant("ada", "calls", 1000, "g1"))
        futures = [brief.submit(to_place(f"h{number}", 1)) for number in range(100)]
        brief.close()

        assert all(future.done() for future in futures)
        assert 100 == len([expect(Hold, future.result()) for future in futures])

    def test_close_twice(self, brief: Ledger) -> None:
        """Closing twice changes nothing."""
        grant(brief, 10)
        brief.close()
        brief.close()

    def test_close_unopened(self, brief: Ledger) -> None:
        """A ledger that was never used can be closed."""
        brief.close()

    def test_close_closed(self, brief: Ledger) -> None:
        """A closed ledger answers BillingUnavailableError."""
        grant(brief, 10)
        brief.close()

        with pytest.raises(BillingUnavailableError, match="closed"):
            place(brief, "h1", 1)
        with pytest.raises(BillingUnavailableError, match="closed"):
            brief.submit(to_place("h1", 1)).result()
        with pytest.raises(BillingUnavailableError, match="closed"):
            brief.balance("ada", "calls")
