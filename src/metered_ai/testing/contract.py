"""
`LedgerContract`: what every ledger promises, as tests.

Whoever writes a ledger subclasses it, says how one is made, and lets pytest run it:

```python
class TestMyLedger(LedgerContract):
    def make_ledger(self, tmp_path, clock):
        return MyLedger(tmp_path / "credits", clock=clock)
```

`SharedLedgerContract` adds what holds where a ledger is kept outside the process. Each test's docstring is the promise it keeps,
and after each test the ledger's own `verify` must find nothing broken.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

from ..core.steps import (
    AddGrant,
    Enlarge,
    Place,
    Record,
    Release,
    Released,
    Renew,
    Revoke,
    Settle,
    Settled,
    SetUnlimited,
    Step,
    StepResult,
)
from ..errors import (
    AlreadyBilledError,
    BillingUnavailableError,
    GrantConflictError,
    InsufficientCreditsError,
)
from ..ledger import Ledger
from ..records import MAX_AMOUNT, MAX_TOTAL, Grant, Hold, Usage, UsageEvent

__all__ = ["Clock", "LedgerContract", "SharedLedgerContract"]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Clock:
    """
    A clock that stands still until it is moved, so that a lease runs out without anybody waiting for it.

    Called, it gives `now`: microseconds since 1970, UTC. It starts on 2026-03-01 at noon.
    """

    def __init__(self) -> None:
        self.now = (NOON - EPOCH) // timedelta(microseconds=1)

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += round(seconds * 1_000_000)

    def at(self, seconds: float = 0) -> datetime:
        """The moment so many seconds from now; before now if negative."""
        return EPOCH + timedelta(microseconds=self.now + round(seconds * 1_000_000))


class Numbers(NamedTuple):
    """A limited account in five numbers."""

    limit: int
    used: int = 0
    held: int = 0
    available: int = 0
    debt: int = 0


def numbers(ledger: Ledger, customer: str = "ada", meter: str = "calls") -> Numbers:
    balance = ledger.balance(customer, meter)
    assert balance.limit is not None
    assert balance.available is not None
    return Numbers(balance.limit, balance.used, balance.held, balance.available, balance.debt)


R = TypeVar("R")


def _expect(kind: type[R], result: StepResult) -> R:
    assert isinstance(result, kind), f"{result!r} is no {kind.__name__}"
    return result


def place(ledger: Ledger, hold_id: str, amount: int, **more: Any) -> Hold:
    return _expect(Hold, ledger.run(to_place(hold_id, amount, **more)))


def to_place(hold_id: str, amount: int, **more: Any) -> Place:
    call: dict[str, Any] = {"customer": "ada", "meter": "calls", "owner": "p1"}
    return Place(hold_id=hold_id, amount=amount, **call | more)


def enlarge(ledger: Ledger, hold_id: str, amount: int) -> Hold:
    return _expect(Hold, ledger.run(Enlarge(hold_id, "ada", "calls", amount)))


def settle(ledger: Ledger, hold_id: str, amount: int, transaction_id: str | None = None, **more: Any) -> Settled:
    return _expect(Settled, ledger.run(to_settle(hold_id, amount, transaction_id, **more)))


def to_settle(hold_id: str, amount: int, transaction_id: str | None = None, **more: Any) -> Settle:
    call: dict[str, Any] = {"customer": "ada", "meter": "calls", "basis": "reported"}
    return Settle(hold_id=hold_id, amount=amount, transaction_id=transaction_id or f"gen_{hold_id}", **call | more)


def release(ledger: Ledger, hold_id: str, **more: Any) -> Released:
    return _expect(Released, ledger.run(to_release(hold_id, **more)))


def to_release(hold_id: str, **more: Any) -> Release:
    call: dict[str, Any] = {"customer": "ada", "meter": "calls", "reason": "provider_error", "sent": "yes"}
    return Release(hold_id=hold_id, **call | more)


def renew(ledger: Ledger, owner: str) -> int:
    return _expect(int, ledger.run(Renew(owner, 120.0)))


def record(
    ledger: Ledger, transaction_id: str, amount: int, customer: str = "ada", meter: str = "calls", **more: Any
) -> UsageEvent:
    return _expect(UsageEvent, ledger.run(Record(customer, meter, transaction_id, amount, **more)))


def grant(ledger: Ledger, amount: int, grant_id: str = "g1", **more: Any) -> Grant:
    account: dict[str, Any] = {"customer": "ada", "meter": "calls"}
    return _expect(Grant, ledger.run(AddGrant(id=grant_id, amount=amount, **account | more)))


def revoke(ledger: Ledger, grant_id: str = "g1", customer: str = "ada") -> Grant:
    return _expect(Grant, ledger.run(Revoke(customer, "calls", grant_id)))


def set_unlimited(ledger: Ledger, *, is_unlimited: bool = True) -> None:
    ledger.run(SetUnlimited("ada", "calls", is_unlimited))


def billed(ledger: Ledger, customer: str | None = "ada", meter: str | None = None) -> list[tuple[str, int]]:
    """Transaction ids and amounts of what was billed, oldest first."""
    return [(event.transaction_id, event.amount) for event in ledger.usage_events(customer, meter)]


def hold_of(ledger: Ledger, hold_id: str, customer: str = "ada") -> Hold:
    (hold,) = (hold for hold in ledger.holds(customer) if hold.id == hold_id)
    return hold


def operate(ledger: Ledger, hold_id: str, amount: int = 1, scope: str = "s1", **more: Any) -> Hold:
    """A call of an operation, `req_1` if no other is named."""
    return place(ledger, hold_id, amount, scope=scope, **{"operation": "req_1"} | more)


def operate_often(ledger: Ledger, count: int) -> list[str | None]:
    """Calls `s1-0`, `s1-1` … of one operation that run beside each other; their transaction ids."""
    return [operate(ledger, f"s1-{number}").transaction_id for number in range(count)]


def lose(ledger: Ledger, clock: Clock, how: str) -> None:
    """Bring about hold `h1` of 4 and its end, or, where it never was, the release of it or nothing at all."""
    if how in {"released", "expired"}:
        place(ledger, "h1", 4)
    if how == "expired":
        clock.advance(121)
        ledger.recover()
    elif how != "unknown":
        release(ledger, "h1")


def use_two_days(ledger: Ledger, clock: Clock) -> None:
    """The same calls of two customers on two days, each 100 credits dearer on the second."""
    calls: list[tuple[str, str, str | None, int]] = [
        ("ada", "calls", "gpt-a", 5),
        ("ada", "calls", "gpt-a", 7),
        ("ada", "calls", "gpt-b", 1),
        ("ada", "images", None, 3),
        ("bob", "calls", "gpt-a", 2),
    ]
    for day in range(2):
        for number, (customer, meter, model, amount) in enumerate(calls):
            usage = Usage(model=model, input_tokens=10 * amount, output_tokens=amount) if model else None
            record(ledger, f"rec_{day}_{number}", amount + 100 * day, customer, meter, usage=usage)
        clock.advance(24 * 3600)


def _zone(hours: float) -> timezone:
    return timezone(timedelta(hours=hours))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def at_once(count: int, act: Callable[[int], R]) -> list[R | Exception]:
    """Call `act` from so many threads that start together; each one's result, or what it raised."""
    start = threading.Barrier(count)
    results: list[R | Exception | None] = [None] * count

    def work(number: int) -> None:
        start.wait()
        try:
            results[number] = act(number)
        except Exception as error:  # noqa: BLE001 - Handed to the test, which counts them.
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [result for result in results if result is not None]


def refused(results: Sequence[object]) -> int:
    return sum(isinstance(result, InsufficientCreditsError) for result in results)


BAD_NAMES: list[Any] = [
    "",
    "a" * 257,
    "a\0b",
    "a\ud800",
    " ada",
    "ada ",
    "ada\n",
    "\u2003ada",
    None,
    7,
    b"ada",
    ["ada"],
]
GOOD_NAMES = [
    "a",
    "A",
    "a" * 256,
    "\U0001f600" * 256,
    "caf\u00e9",
    "cafe\u0301",
    "'; DROP TABLE account; --",
    '<script>"&amp;',
    "100%",
    "1000",
    "a b",
    "a\tb",
    "null",
    "\u202eada",
]
BAD_IDS: list[Any] = ["", "x" * 256, "x\0", "x\udfff", " x", "x ", None, 7, b"x"]
BAD_AMOUNTS: list[Any] = [-1, MAX_AMOUNT + 1, True, False, 1.0, float("nan"), float("inf"), Decimal(1), "1", None]


def _steps_for(customer: str, meter: str) -> list[Step]:
    return [
        Place("h1", customer, meter, 1, "p1"),
        Enlarge("h1", customer, meter, 2),
        Settle("h1", customer, meter, 1, "gen_1", "reported"),
        Release("h1", customer, meter, "provider_error", "yes"),
        Record(customer, meter, "rec_1", 1),
        AddGrant(customer, meter, 1, "g1"),
        Revoke(customer, meter, "g1"),
        SetUnlimited(customer, meter, is_unlimited=True),
    ]


def _id_steps(bad: str) -> list[Step]:
    return [
        Place(bad, "ada", "calls", 0, "p1"),
        Place("h1", "ada", "calls", 0, "p1", operation=bad, scope="s1"),
        Enlarge(bad, "ada", "calls", 1),
        Settle(bad, "ada", "calls", 1, "gen_1", "reported"),
        Settle("h1", "ada", "calls", 1, bad, "reported"),
        Release(bad, "ada", "calls", "provider_error", "yes"),
        Record("ada", "calls", bad, 1),
        AddGrant("ada", "calls", 1, bad),
        Revoke("ada", "calls", bad),
    ]


def _amount_steps(bad: int) -> list[Step]:
    return [
        Place("h1", "ada", "calls", bad, "p1"),
        Enlarge("h1", "ada", "calls", bad),
        Settle("h1", "ada", "calls", bad, "gen_1", "reported"),
        Record("ada", "calls", "rec_1", bad),
        AddGrant("ada", "calls", bad, "g1"),
    ]


class _Contract:
    """A ledger and the clock it reads."""

    def make_ledger(self, tmp_path: Path, clock: Clock) -> Ledger:
        """The ledger under test: new and empty where `tmp_path` is, and knowing no other time than `clock`'s."""
        raise NotImplementedError("say in your subclass how the ledger is made")

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def ledger(self, tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
        ledger = self.make_ledger(tmp_path, clock)
        try:
            yield ledger

            assert () == ledger.verify().broken
        finally:
            ledger.close()


class _Inputs(_Contract):
    """What a ledger may be asked, and how it refuses the rest."""

    @pytest.mark.parametrize("bad", BAD_NAMES, ids=lambda bad: ascii(bad)[:12])
    def test_input_bad_names(self, ledger: Ledger, bad: str) -> None:
        """A name that is empty, too long, padded, unstorable or no text is a ValueError that names it, whatever the step."""
        for step in _steps_for(bad, "calls"):
            with pytest.raises(ValueError, match="customer") as caught:
                ledger.run(step)

            assert len(repr(bad)) > 99 or repr(bad) in str(caught.value), step

        for step in _steps_for("ada", bad):
            with pytest.raises(ValueError, match="meter") as caught:
                ledger.run(step)

            assert len(repr(bad)) > 99 or repr(bad) in str(caught.value), step

        assert 0 == ledger.verify().accounts

    @pytest.mark.parametrize("bad", BAD_NAMES, ids=lambda bad: ascii(bad)[:12])
    def test_input_bad_names_of_reports(self, ledger: Ledger, bad: str) -> None:
        """Asking for the balance of a name that cannot be is a ValueError, too: it would always be 0."""
        with pytest.raises(ValueError, match="customer"):
            ledger.balance(bad, "calls")
        with pytest.raises(ValueError, match="meter"):
            ledger.balance("ada", bad)
        with pytest.raises(ValueError, match="customer"):
            ledger.balances(bad)

    @pytest.mark.parametrize("bad", BAD_IDS, ids=lambda bad: ascii(bad)[:12])
    def test_input_bad_ids(self, ledger: Ledger, bad: str) -> None:
        """A hold, transaction or grant id that breaks the rules of names, or is over 255 characters, is a ValueError that names it."""
        for step in _id_steps(bad):
            if isinstance(step, Place) and step.operation is None and step.hold_id == "h1":
                continue  # None is no bad operation, it is none at all.
            with pytest.raises(ValueError, match=r"(?i)id|operation") as caught:
                ledger.run(step)

            assert len(repr(bad)) > 99 or repr(bad) in str(caught.value), step

        assert 0 == ledger.verify().accounts

    @pytest.mark.parametrize("bad", BAD_AMOUNTS, ids=repr)
    def test_input_bad_amounts(self, ledger: Ledger, bad: int) -> None:
        """An amount that is no whole number between 0 and 2^53 − 1 is a ValueError that names it, before anything else is looked at."""
        for step in _amount_steps(bad):
            with pytest.raises(ValueError, match="amount") as caught:
                ledger.run(step)

            assert repr(bad) in str(caught.value), step

        assert 0 == ledger.verify().accounts

    def test_input_grant_of_nothing(self, ledger: Ledger) -> None:
        """A grant gives at least one credit."""
        with pytest.raises(ValueError, match="0"):
            grant(ledger, 0)

        assert 0 == ledger.verify().accounts

    def test_input_bad_input_leaves_the_hold(self, ledger: Ledger) -> None:
        """A settle with bad input leaves the hold as it was, and the corrected one settles it."""
        grant(ledger, 10)
        place(ledger, "h1", 4)

        with pytest.raises(ValueError, match="-1"):
            settle(ledger, "h1", -1)

        assert Numbers(10, held=4, available=6) == numbers(ledger)
        assert "settled" == settle(ledger, "h1", 3).outcome
        assert Numbers(10, used=3, available=7) == numbers(ledger)

    def test_input_names_are_kept_apart(self, ledger: Ledger) -> None:
        """Names are compared byte by byte: upper and lower case, composed and decomposed letters are different customers."""
        for number, name in enumerate(GOOD_NAMES, 1):
            grant(ledger, number, customer=name)
            place(ledger, f"h{number}", number, customer=name, meter="calls")

        assert list(range(1, len(GOOD_NAMES) + 1)) == [ledger.balance(name, "calls").held for name in GOOD_NAMES]

    def test_input_meters_are_kept_apart(self, ledger: Ledger) -> None:
        """What was granted on one meter pays for nothing on another."""
        for number, name in enumerate(GOOD_NAMES, 1):
            grant(ledger, number, meter=name)

        with pytest.raises(InsufficientCreditsError):
            place(ledger, "h1", 2, meter=GOOD_NAMES[0])

        assert list(range(1, len(GOOD_NAMES) + 1)) == [ledger.balance("ada", name).available for name in GOOD_NAMES]
        assert set(GOOD_NAMES) == {balance.meter for balance in ledger.balances("ada")}

    def test_input_longest_ids(self, ledger: Ledger) -> None:
        """Ids of 255 characters work throughout."""
        long = "\U0001f600" * 255
        grant(ledger, 10, long)
        place(ledger, long, 4)
        settle(ledger, long, 3, long)
        revoke(ledger, long)

        assert [(long, 3)] == billed(ledger)

    def test_input_largest_amounts(self, ledger: Ledger) -> None:
        """The largest single amount, 2^53 − 1, can be granted, held, charged and recorded."""
        grant(ledger, MAX_AMOUNT)
        place(ledger, "h1", MAX_AMOUNT)
        settle(ledger, "h1", MAX_AMOUNT)
        record(ledger, "rec_1", MAX_AMOUNT)

        assert Numbers(MAX_AMOUNT, used=2 * MAX_AMOUNT, debt=MAX_AMOUNT) == numbers(ledger)

    def test_input_total_of_grants(self, ledger: Ledger) -> None:
        """An account's grants add up to 2^62 at most; one more is a ValueError and changes nothing."""
        ledger.submit_all([AddGrant("ada", "calls", MAX_AMOUNT, f"g{n}") for n in range(512)]).result()
        grant(ledger, MAX_TOTAL - 512 * MAX_AMOUNT, "last")

        with pytest.raises(ValueError, match="too large"):
            grant(ledger, 1, "one more")

        assert Numbers(MAX_TOTAL, available=MAX_TOTAL) == numbers(ledger)
        assert 513 == len(list(ledger.grants("ada")))

    def test_input_total_of_use(self, ledger: Ledger) -> None:
        """What an account used adds up to 2^62 at most; beyond that a settle is a ValueError, and its hold stays."""
        place(ledger, "h1", 0)
        ledger.submit_all([Record("ada", "calls", f"rec_{n}", MAX_AMOUNT) for n in range(512)]).result()
        record(ledger, "last", MAX_TOTAL - 512 * MAX_AMOUNT)

        with pytest.raises(ValueError, match="too large"):
            record(ledger, "one more", 1)
        with pytest.raises(ValueError, match="too large"):
            settle(ledger, "h1", 1)

        assert MAX_TOTAL == numbers(ledger).used
        assert "open" == hold_of(ledger, "h1").state
        assert "settled" == settle(ledger, "h1", 0).outcome

    def test_input_total_of_unlimited_use(self, ledger: Ledger) -> None:
        """What an unlimited account used adds up to 2^62 at most, too."""
        set_unlimited(ledger)
        ledger.submit_all([Record("ada", "calls", f"rec_{n}", MAX_AMOUNT) for n in range(512)]).result()
        record(ledger, "last", MAX_TOTAL - 512 * MAX_AMOUNT)

        with pytest.raises(ValueError, match="too large"):
            record(ledger, "one more", 1)

        assert MAX_TOTAL == ledger.balance("ada", "calls").unlimited_used

    def test_input_name_of_the_ledger(self, ledger: Ledger) -> None:
        """A ledger has a name to be shown in messages."""
        assert ledger.name
        assert ledger.name.isprintable()


class _Unknown(_Contract):
    """Customers nobody has heard of."""

    def test_unknown_balance(self, ledger: Ledger) -> None:
        """An unknown customer has 0 of everything, and asking writes nothing."""
        assert Numbers(0) == numbers(ledger, "nobody")
        assert [] == ledger.balances("nobody")
        assert 0 == ledger.verify().accounts

    def test_unknown_refusal(self, ledger: Ledger) -> None:
        """An unknown customer is refused like one without credits, and the refusal leaves no trace."""
        with pytest.raises(InsufficientCreditsError) as caught:
            place(ledger, "h1", 1, customer="nobody")

        error = caught.value
        assert ("nobody", "calls", 0, 1, 0) == (
            error.customer,
            error.meter,
            error.available,
            error.required,
            error.held,
        )
        assert not error.is_transient
        assert [] == list(ledger.holds())
        assert 0 == ledger.verify().accounts

    def test_unknown_free_call(self, ledger: Ledger) -> None:
        """A hold of 0 fits an unknown customer, who is known from then on."""
        assert 0 == place(ledger, "h1", 0).amount
        assert ["calls"] == [balance.meter for balance in ledger.balances("ada")]

    def test_unknown_nothing_to_list(self, ledger: Ledger) -> None:
        """Listings of an unknown customer are empty."""
        grant(ledger, 10)
        record(ledger, "rec_1", 1)
        place(ledger, "h1", 1)

        assert [] == list(ledger.usage_events("nobody"))
        assert [] == list(ledger.holds("nobody"))
        assert [] == list(ledger.grants("nobody"))
        assert ledger.usage_event("nobody", "calls", "rec_1") is None


class _Placing(_Contract):
    """Holds: credits that are set aside while a call runs."""

    def test_place_reserves(self, ledger: Ledger) -> None:
        """A hold sets its amount aside: held rises, available falls, nothing is used."""
        grant(ledger, 10)
        place(ledger, "h1", 4)

        assert Numbers(10, held=4, available=6) == numbers(ledger)
        assert [] == billed(ledger)

    def test_place_exactly(self, ledger: Ledger) -> None:
        """The last credit can be held; the one after it cannot."""
        grant(ledger, 10)
        place(ledger, "h1", 10)

        with pytest.raises(InsufficientCreditsError):
            place(ledger, "h2", 1)

        assert Numbers(10, held=10) == numbers(ledger)

    def test_place_refusal_has_numbers(self, ledger: Ledger) -> None:
        """A refusal says what is available, what is required and what calls in flight hold; nothing changes."""
        grant(ledger, 10)
        settle(ledger, place(ledger, "h1", 3).id, 3)
        place(ledger, "h2", 5)
        before = numbers(ledger)

        with pytest.raises(InsufficientCreditsError) as caught:
            place(ledger, "h3", 4)

        error = caught.value
        assert ("ada", "calls") == (error.customer, error.meter)
        assert (2, 4, 5) == (error.available, error.required, error.held)
        assert before == numbers(ledger)
        assert ["h2"] == [hold.id for hold in ledger.holds()]

    @pytest.mark.parametrize(("amount", "is_transient"), [(3, True), (7, True), (8, False)])
    def test_place_transient(self, ledger: Ledger, amount: int, is_transient: bool) -> None:
        """A refusal is transient if the hold would fit once the calls in flight have ended."""
        grant(ledger, 10)
        record(ledger, "rec_1", 3)
        place(ledger, "h1", 5)

        with pytest.raises(InsufficientCreditsError) as caught:
            place(ledger, "h2", amount)

        assert is_transient == caught.value.is_transient

    def test_place_refused_in_debt(self, ledger: Ledger) -> None:
        """In debt nothing is available, and a hold of 1 is refused."""
        grant(ledger, 10)
        record(ledger, "rec_1", 12)

        with pytest.raises(InsufficientCreditsError) as caught:
            place(ledger, "h1", 1)

        assert 0 == caught.value.available
        assert not caught.value.is_transient

    def test_place_nothing_always_fits(self, ledger: Ledger) -> None:
        """A hold of 0 fits even in debt."""
        record(ledger, "rec_1", 12)
        place(ledger, "h1", 0)

        assert Numbers(0, used=12, debt=12) == numbers(ledger)

    def test_place_again(self, ledger: Ledger) -> None:
        """Placing an open hold again gives the same hold and sets nothing more aside, even where another would not fit."""
        grant(ledger, 10)
        first = place(ledger, "h1", 7)
        again = place(ledger, "h1", 7)

        assert first == again
        assert Numbers(10, held=7, available=3) == numbers(ledger)

    def test_place_again_with_another_amount(self, ledger: Ledger) -> None:
        """Placing an open hold again with another amount is a ValueError; the hold stays as it is."""
        grant(ledger, 10)
        place(ledger, "h1", 7)

        with pytest.raises(ValueError, match="h1"):
            place(ledger, "h1", 2)

        assert Numbers(10, held=7, available=3) == numbers(ledger)

    @pytest.mark.parametrize("end", ["settled", "released", "expired", "charged"])
    def test_place_again_after_the_end(self, ledger: Ledger, clock: Clock, end: str) -> None:
        """A hold that has ended cannot be placed again: BillingUnavailableError says how it ended, and nothing is set aside."""
        grant(ledger, 10)
        place(ledger, "h1", 2, on_unknown="charge" if end == "charged" else "release")
        if end == "settled":
            settle(ledger, "h1", 2)
        elif end == "released":
            release(ledger, "h1")
        else:
            clock.advance(121)
            ledger.recover()

        with pytest.raises(BillingUnavailableError, match=f"h1.* has ended .*{end}"):
            place(ledger, "h1", 2)

        assert 0 == numbers(ledger).held

    def test_place_refused_then_granted(self, ledger: Ledger) -> None:
        """A refused hold can be placed under the same id once there are credits."""
        with pytest.raises(InsufficientCreditsError):
            place(ledger, "h1", 2)
        grant(ledger, 2)

        assert "open" == place(ledger, "h1", 2).state

    def test_place_what_a_hold_tells(self, ledger: Ledger, clock: Clock) -> None:
        """A hold remembers what it was placed with, and is listed as it was returned."""
        grant(ledger, 10)
        parent = place(ledger, "h1", 0)
        hold = place(ledger, "h2", 3, endpoint="responses", model="gpt-5-mini", parent=parent.id)

        assert ("h2", "ada", "calls", 3, "open") == (hold.id, hold.customer, hold.meter, hold.amount, hold.state)
        assert ("responses", "gpt-5-mini", "h1") == (hold.endpoint, hold.model, hold.parent)
        assert clock.at() == hold.placed_at
        assert (None, None, None) == (hold.ended_at, hold.reason, hold.sent)
        assert (False, False, False) == (hold.is_unlimited, hold.is_repeat, hold.is_in_doubt)
        assert [parent, hold] == sorted(ledger.holds(), key=lambda hold: hold.id)

    def test_place_too_many_holds(self, ledger: Ledger) -> None:
        """A customer has at most `max_holds` open holds over all meters; the next is BillingUnavailableError until one ends."""
        grant(ledger, 10)
        grant(ledger, 10, meter="images")
        place(ledger, "h1", 1, max_holds=3)
        place(ledger, "h2", 1, meter="images", max_holds=3)
        place(ledger, "h3", 1, max_holds=3)

        with pytest.raises(BillingUnavailableError, match="3"):
            place(ledger, "h4", 1, meter="images", max_holds=3)
        with pytest.raises(BillingUnavailableError, match="3"):
            place(ledger, "h4", 0, max_holds=3)

        assert 1 == numbers(ledger, meter="images").held
        release(ledger, "h1")
        place(ledger, "h4", 1, meter="images", max_holds=3)

    def test_place_too_many_holds_of_another(self, ledger: Ledger) -> None:
        """Other customers' holds do not count."""
        for number in range(3):
            place(ledger, f"h{number}", 0, customer="bob", max_holds=3)

        assert "open" == place(ledger, "h9", 0, max_holds=3).state

    def test_place_too_many_dead_holds(self, ledger: Ledger, clock: Clock) -> None:
        """Holds whose owner died do not count, on whichever meter they are."""
        for number in range(3):
            place(ledger, f"h{number}", 0, meter=f"m{number}", max_holds=3)
        clock.advance(121)

        assert "open" == place(ledger, "h9", 0, owner="p2", max_holds=3).state


class _Enlarging(_Contract):
    """Raising a hold while the call runs."""

    def test_enlarge_holds_the_difference(self, ledger: Ledger) -> None:
        """Raising a hold sets the difference aside, and a settle gives all of it back."""
        grant(ledger, 10)
        place(ledger, "h1", 4)

        assert 7 == enlarge(ledger, "h1", 7).amount
        assert Numbers(10, held=7, available=3) == numbers(ledger)
        settle(ledger, "h1", 5)
        assert Numbers(10, used=5, available=5) == numbers(ledger)

    def test_enlarge_refused(self, ledger: Ledger) -> None:
        """Where the difference does not fit it is refused with the difference as `required`, and the hold stays as it was."""
        grant(ledger, 10)
        place(ledger, "h1", 4)
        place(ledger, "h2", 3)

        with pytest.raises(InsufficientCreditsError) as caught:
            enlarge(ledger, "h1", 8)

        error = caught.value
        assert (3, 4, 7) == (error.available, error.required, error.held)
        assert Numbers(10, held=7, available=3) == numbers(ledger)
        assert 4 == hold_of(ledger, "h1").amount

    @pytest.mark.parametrize("amount", [0, 3, 4])
    def test_enlarge_not_more(self, ledger: Ledger, amount: int) -> None:
        """Raising a hold to what it has already, or less, changes nothing and returns the hold."""
        grant(ledger, 4)
        place(ledger, "h1", 4)

        assert 4 == enlarge(ledger, "h1", amount).amount
        assert Numbers(4, held=4) == numbers(ledger)

    def test_enlarge_again(self, ledger: Ledger) -> None:
        """Raising a hold twice to the same amount is raising it once."""
        grant(ledger, 10)
        place(ledger, "h1", 4)
        enlarge(ledger, "h1", 8)

        assert 8 == enlarge(ledger, "h1", 8).amount
        assert Numbers(10, held=8, available=2) == numbers(ledger)

    @pytest.mark.parametrize("end", ["settled", "released", "expired"])
    def test_enlarge_after_the_end(self, ledger: Ledger, clock: Clock, end: str) -> None:
        """A hold that has ended cannot be raised: BillingUnavailableError says how it ended."""
        grant(ledger, 10)
        place(ledger, "h1", 4)
        if end == "settled":
            settle(ledger, "h1", 4)
        elif end == "released":
            release(ledger, "h1")
        else:
            clock.advance(121)
            ledger.recover()
        before = numbers(ledger)

        with pytest.raises(BillingUnavailableError, match=end):
            enlarge(ledger, "h1", 8)

        assert before == numbers(ledger)

    def test_enlarge_never_placed(self, ledger: Ledger) -> None:
        """A hold that was never placed cannot be raised."""
        grant(ledger, 10)

        with pytest.raises(BillingUnavailableError, match="h1"):
            enlarge(ledger, "h1", 8)

        assert Numbers(10, available=10) == numbers(ledger)

    def test_enlarge_unlimited(self, ledger: Ledger) -> None:
        """The hold of an unlimited account can always be raised."""
        set_unlimited(ledger)
        place(ledger, "h1", 4)

        assert MAX_AMOUNT == enlarge(ledger, "h1", MAX_AMOUNT).amount

    def test_enlarge_dead_holds_give_way(self, ledger: Ledger, clock: Clock) -> None:
        """Credits held by a process that died are given back before raising a hold is refused."""
        grant(ledger, 10)
        place(ledger, "h1", 6, owner="dead")
        clock.advance(100)
        place(ledger, "h2", 4)
        clock.advance(21)

        assert 10 == enlarge(ledger, "h2", 10).amount
        assert Numbers(10, held=10) == numbers(ledger)


class _Settling(_Contract):
    """How a hold becomes a usage event."""

    def test_settle_charges(self, ledger: Ledger) -> None:
        """A settle charges what was used and gives back the rest of the hold."""
        grant(ledger, 10)
        place(ledger, "h1", 6)
        settled = settle(ledger, "h1", 4, "gen_resp_1")

        assert "settled" == settled.outcome
        assert [("gen_resp_1", 4)] == billed(ledger)
        assert Numbers(10, used=4, available=6) == numbers(ledger)
        assert [] == list(ledger.holds())

    def test_settle_what_an_event_tells(self, ledger: Ledger, clock: Clock) -> None:
        """A usage event keeps all that was said about the call, and is listed as it was returned."""
        usage = Usage(
            model="gpt-5-mini",
            endpoint="responses",
            service_tier="default",
            input_tokens=12,
            cached_input_tokens=3,
            cache_write_tokens=0,
            output_tokens=5,
            reasoning_tokens=2,
            seconds=1.5,
        )
        grant(ledger, 10)
        place(ledger, "h0", 0)
        place(ledger, "h1", 6, parent="h0")
        clock.advance(1)
        event = settle(
            ledger,
            "h1",
            4,
            "gen_resp_1",
            basis="estimated",
            usage=usage,
            request_id="req_1",
            attempts=2,
            properties={"team": "blue", "deep": {"list": [1, "\u00e9", None]}},
            price_slug="images-hd",
            parent="h0",
        ).event

        assert (
            UsageEvent(
                customer="ada",
                meter="calls",
                transaction_id="gen_resp_1",
                amount=4,
                created_at=clock.at(),
                basis="estimated",
                kind="call",
                hold_id="h1",
                usage=usage,
                request_id="req_1",
                attempts=2,
                properties={"team": "blue", "deep": {"list": [1, "\u00e9", None]}},
                price_slug="images-hd",
                parent="h0",
            )
            == event
        )
        assert [event] == list(ledger.usage_events())
        assert event == ledger.usage_event("ada", "calls", "gen_resp_1")

    def test_settle_an_event_of_a_charge(self, ledger: Ledger) -> None:
        """What a settle calls itself becomes the event's kind."""
        place(ledger, "h1", 0)

        assert "charge" == settle(ledger, "h1", 0, kind="charge").event.kind

    def test_settle_nothing(self, ledger: Ledger) -> None:
        """A settle of 0 gives the whole hold back and leaves an event of 0."""
        grant(ledger, 10)
        place(ledger, "h1", 6)
        settle(ledger, "h1", 0)

        assert [("gen_h1", 0)] == billed(ledger)
        assert Numbers(10, available=10) == numbers(ledger)

    def test_settle_beyond_the_hold(self, ledger: Ledger) -> None:
        """A settle above its hold records the truth and takes the rest from what is available."""
        grant(ledger, 10)
        place(ledger, "h1", 2)
        settle(ledger, "h1", 5)

        assert Numbers(10, used=5, available=5) == numbers(ledger)

    def test_settle_beyond_the_balance(self, ledger: Ledger) -> None:
        """What is used beyond the balance is debt, and blocks the next hold."""
        grant(ledger, 10)
        place(ledger, "h1", 2)
        settle(ledger, "h1", 13)

        assert Numbers(10, used=13, debt=3) == numbers(ledger)
        with pytest.raises(InsufficientCreditsError):
            place(ledger, "h2", 1)

    def test_settle_debt_counts_holds(self, ledger: Ledger) -> None:
        """Credits that other calls hold are not there to pay an overrun: it is debt at once."""
        grant(ledger, 10)
        place(ledger, "h1", 2)
        place(ledger, "h2", 8)
        settle(ledger, "h1", 5)

        assert Numbers(10, used=5, held=8, debt=3) == numbers(ledger)
        release(ledger, "h2")
        assert Numbers(10, used=5, available=5) == numbers(ledger)

    def test_settle_again(self, ledger: Ledger) -> None:
        """Settling a settled hold again charges nothing and returns the first event, whatever the second settle says."""
        grant(ledger, 10)
        place(ledger, "h1", 6)
        first = settle(ledger, "h1", 4, "gen_resp_1")
        same = settle(ledger, "h1", 4, "gen_resp_1")
        other = settle(ledger, "h1", 6, "gen_resp_2", is_explicit=True, fingerprint="f", is_unlimited=True)

        assert ["settled", "again", "again"] == [first.outcome, same.outcome, other.outcome]
        assert first.event == same.event == other.event
        assert [("gen_resp_1", 4)] == billed(ledger)
        assert Numbers(10, used=4, available=6) == numbers(ledger)

    def test_settle_ids_belong_to_an_account(self, ledger: Ledger) -> None:
        """The same transaction id of another customer, or on another meter, is another event."""
        for number, (customer, meter) in enumerate([("ada", "calls"), ("ada", "images"), ("bob", "calls")]):
            grant(ledger, 10, customer=customer, meter=meter)
            place(ledger, f"h{number}", 1, customer=customer, meter=meter)
            settled = settle(ledger, f"h{number}", 1, "gen_1", customer=customer, meter=meter)

            assert "settled" == settled.outcome
            assert Numbers(10, used=1, available=9) == numbers(ledger, customer, meter)

    def test_settle_unknown_event(self, ledger: Ledger) -> None:
        """Asking for an event that is not there gives None."""
        grant(ledger, 10)

        assert ledger.usage_event("ada", "calls", "gen_1") is None


class _SameAnswer(_Contract):
    """Two holds, one transaction id."""

    def test_same_id_explicit(self, ledger: Ledger) -> None:
        """An explicit id that was billed before is not charged again: the hold is released and the earlier event returned."""
        grant(ledger, 10)
        place(ledger, "h1", 3)
        place(ledger, "h2", 3)
        first = settle(ledger, "h1", 3, "report_9", is_explicit=True)
        second = settle(ledger, "h2", 2, "report_9", is_explicit=True)

        assert ("repeat", first.event) == (second.outcome, second.event)
        assert Numbers(10, used=3, available=7) == numbers(ledger)
        hold = hold_of(ledger, "h2")
        assert ("released", "repeat", "yes") == (hold.state, hold.reason, hold.sent)

    def test_same_id_replay(self, ledger: Ledger) -> None:
        """An answer that a cache gives twice (same id, same fingerprint) is billed once, and the second hold released."""
        grant(ledger, 10)
        place(ledger, "h1", 3)
        place(ledger, "h2", 3)
        first = settle(ledger, "h1", 3, "gen_1", fingerprint="f1")
        second = settle(ledger, "h2", 3, "gen_1", fingerprint="f1")

        assert ("replay", first.event) == (second.outcome, second.event)
        assert Numbers(10, used=3, available=7) == numbers(ledger)
        hold = hold_of(ledger, "h2")
        assert ("released", "repeat", "yes") == (hold.state, hold.reason, hold.sent)

    @pytest.mark.parametrize("is_explicit", [True, False])
    def test_same_id_repeat_again(self, ledger: Ledger, is_explicit: bool) -> None:
        """Settling a hold again that ended as a repeat returns the earlier event and charges nothing."""
        grant(ledger, 10)
        place(ledger, "h1", 3)
        place(ledger, "h2", 3)
        first = settle(ledger, "h1", 3, "gen_1", fingerprint="f1", is_explicit=is_explicit)
        settle(ledger, "h2", 3, "gen_1", fingerprint="f1", is_explicit=is_explicit)
        third = settle(ledger, "h2", 3, "gen_1", fingerprint="f1", is_explicit=is_explicit)

        assert ("repeat", first.event) == (third.outcome, third.event)
        assert Numbers(10, used=3, available=7) == numbers(ledger)

    def test_same_id_another_answer(self, ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
        """
        A server that gives two answers the same id is billed for both: the second id gets a suffix made of its fingerprint.

        A warning names the ids.
        """
        grant(ledger, 10)
        for hold_id, amount, fingerprint in [("h1", 3, "f1"), ("h2", 2, "f2")]:
            place(ledger, hold_id, 3)
            settled = settle(ledger, hold_id, amount, "chatcmpl-424", fingerprint=fingerprint)

            assert "settled" == settled.outcome
        assert [("chatcmpl-424", 3), (f"chatcmpl-424.{digest('f2')}", 2)] == billed(ledger)
        assert Numbers(10, used=5, available=5) == numbers(ledger)
        assert any("chatcmpl-424" in entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING")

    def test_same_id_another_answer_replayed(self, ledger: Ledger) -> None:
        """The second answer of such a server, replayed, is billed once as well."""
        grant(ledger, 10)
        outcomes: list[str] = []
        for hold_id, fingerprint in [("h1", "f1"), ("h2", "f2"), ("h3", "f2"), ("h4", "f1"), ("h5", "f3")]:
            place(ledger, hold_id, 1)
            outcomes.append(settle(ledger, hold_id, 1, "chatcmpl-424", fingerprint=fingerprint).outcome)

        assert ["settled", "settled", "replay", "replay", "settled"] == outcomes
        assert Numbers(10, used=3, available=7) == numbers(ledger)

    @pytest.mark.parametrize(("first", "second"), [(None, None), ("f1", None), (None, "f2")])
    def test_same_id_nothing_to_compare(self, ledger: Ledger, first: str | None, second: str | None) -> None:
        """Answers without a fingerprint are never taken for the same: both are billed."""
        grant(ledger, 10)
        place(ledger, "h1", 3)
        place(ledger, "h2", 3)
        settle(ledger, "h1", 3, "gen_1", fingerprint=first)
        settle(ledger, "h2", 2, "gen_1", fingerprint=second)

        assert [("gen_1", 3), (f"gen_1.{digest(second or 'h2')}", 2)] == billed(ledger)

    def test_same_id_suffix_is_taken(self, ledger: Ledger) -> None:
        """Where the suffixed id is taken, too, the hold's own id makes the suffix."""
        grant(ledger, 10)
        record(ledger, "gen_1", 1)
        record(ledger, f"gen_1.{digest('f1')}", 1)
        place(ledger, "h1", 3)
        settled = settle(ledger, "h1", 2, "gen_1", fingerprint="f1")

        assert (f"gen_1.{digest('h1')}", 2) == (settled.event.transaction_id, settled.event.amount)
        assert Numbers(10, used=4, available=6) == numbers(ledger)

    def test_same_id_against_a_record(self, ledger: Ledger) -> None:
        """What was recorded by hand under a provider's id is another answer; under an explicit id it is the same."""
        grant(ledger, 10)
        recorded = record(ledger, "gen_1", 1)
        place(ledger, "h1", 3)
        place(ledger, "h2", 3)
        call = settle(ledger, "h1", 3, "gen_1", fingerprint="f1")
        explicit = settle(ledger, "h2", 3, "gen_1", is_explicit=True)

        assert ("settled", f"gen_1.{digest('f1')}") == (call.outcome, call.event.transaction_id)
        assert ("repeat", recorded) == (explicit.outcome, explicit.event)
        assert Numbers(10, used=4, available=6) == numbers(ledger)

    def test_same_id_long_ids(self, ledger: Ledger) -> None:
        """A suffix never makes an id longer than 255 characters, and two long ids stay two."""
        grant(ledger, 10)
        ids = ["x" * 255, "x" * 254 + "y", "y" + "x" * 254]
        for number, transaction_id in enumerate(ids):
            for fingerprint in ["f1", "f2"]:
                hold = place(ledger, f"h{number}{fingerprint}", 1)
                settle(ledger, hold.id, 1, transaction_id, fingerprint=fingerprint)

        events = billed(ledger)
        assert 6 == len(events) == len({transaction_id for transaction_id, _ in events})
        assert 255 == max(len(transaction_id) for transaction_id, _ in events)
        place(ledger, "again", 1)
        assert "replay" == settle(ledger, "again", 1, ids[1], fingerprint="f2").outcome


class _Late(_Contract):
    """A settle that comes when the hold has ended or is gone: the truth is recorded all the same."""

    @pytest.mark.parametrize("how", ["released", "expired", "tombstone", "unknown"])
    def test_late_is_recorded(self, ledger: Ledger, clock: Clock, how: str) -> None:
        """A settle after the hold was released, expired or lost is recorded as late, in full."""
        grant(ledger, 10)
        lose(ledger, clock, how)
        settled = settle(ledger, "h1", 3, "gen_1")

        assert "late" == settled.outcome
        assert settled.event.is_late
        assert ("h1", 3) == (settled.event.hold_id, settled.event.amount)
        assert Numbers(10, used=3, available=7) == numbers(ledger)
        assert [] == list(ledger.holds())

    @pytest.mark.parametrize("how", ["released", "expired", "tombstone", "unknown"])
    def test_late_again(self, ledger: Ledger, clock: Clock, how: str) -> None:
        """A second late settle of the same hold charges nothing."""
        grant(ledger, 10)
        lose(ledger, clock, how)
        first = settle(ledger, "h1", 3, "gen_1")
        again = settle(ledger, "h1", 3, "gen_1")

        assert ("again", first.event) == (again.outcome, again.event)
        assert Numbers(10, used=3, available=7) == numbers(ledger)
        with pytest.raises(BillingUnavailableError, match="has ended"):
            place(ledger, "h1", 3)

    @pytest.mark.parametrize("how", ["released", "expired", "tombstone", "unknown"])
    def test_late_may_make_debt(self, ledger: Ledger, clock: Clock, how: str) -> None:
        """Where the credits went to another call meanwhile, a late settle makes debt."""
        grant(ledger, 10)
        lose(ledger, clock, how)
        place(ledger, "h2", 9, owner="p2")
        settle(ledger, "h1", 3, "gen_1")

        assert Numbers(10, used=3, held=9, debt=2) == numbers(ledger)

    @pytest.mark.parametrize("how", ["released", "expired"])
    def test_late_keeps_the_mode(self, ledger: Ledger, clock: Clock, how: str) -> None:
        """A late settle is counted in the mode its hold was placed under."""
        set_unlimited(ledger)
        lose(ledger, clock, how)
        set_unlimited(ledger, is_unlimited=False)
        settle(ledger, "h1", 3)

        assert Numbers(0) == numbers(ledger)
        assert 3 == ledger.balance("ada", "calls").unlimited_used

    @pytest.mark.parametrize("is_unlimited", [True, False])
    def test_late_mode_of_a_lost_hold(self, ledger: Ledger, is_unlimited: bool) -> None:
        """Where the hold is gone, the settle says which mode it was placed under."""
        set_unlimited(ledger, is_unlimited=not is_unlimited)
        event = settle(ledger, "h1", 3, is_unlimited=is_unlimited).event
        set_unlimited(ledger, is_unlimited=False)

        assert is_unlimited == event.is_unlimited
        assert (Numbers(0) if is_unlimited else Numbers(0, used=3, debt=3)) == numbers(ledger)

    def test_late_first_ever(self, ledger: Ledger) -> None:
        """A lost hold is recorded even where the ledger has never heard of the customer."""
        settle(ledger, "h1", 3)

        assert Numbers(0, used=3, debt=3) == numbers(ledger)

    def test_late_two_truths(self, ledger: Ledger, clock: Clock) -> None:
        """A late settle whose explicit id was billed meanwhile is a repeat: one charge."""
        grant(ledger, 10)
        lose(ledger, clock, "expired")
        place(ledger, "h2", 4)
        first = settle(ledger, "h2", 4, "report_9", is_explicit=True)
        late = settle(ledger, "h1", 4, "report_9", is_explicit=True)

        assert ("repeat", first.event) == (late.outcome, late.event)
        assert Numbers(10, used=4, available=6) == numbers(ledger)

    @pytest.mark.parametrize(("truth", "amount", "limit"), [(7, 3, 10), (4, 0, 10), (1, 0, 13), (0, 0, 14)])
    def test_late_after_a_charge(self, ledger: Ledger, clock: Clock, truth: int, amount: int, limit: int) -> None:
        """
        A settle after the orphan was charged puts the truth beside the charge, and changes no event.

        More is a second event with the difference; less is an event of 0 with the usage, and a grant of the difference.
        """
        usage = Usage(model="gpt-5-mini", output_tokens=7)
        grant(ledger, 10)
        place(ledger, "h1", 4, on_unknown="charge")
        clock.advance(121)
        ledger.recover()
        settled = settle(ledger, "h1", truth, usage=usage)

        event = settled.event
        assert "corrected" == settled.outcome
        assert ("hold_h1.c1", amount, "correction", usage) == (
            event.transaction_id,
            event.amount,
            event.kind,
            event.usage,
        )
        assert [("hold_h1", 4), ("hold_h1.c1", amount)] == billed(ledger)
        assert limit - 4 - amount == 10 - truth
        assert Numbers(limit, used=4 + amount, available=10 - truth) == numbers(ledger)
        assert limit - 10 == sum(given.amount for given in ledger.grants() if given.id == "correction_h1")

    @pytest.mark.parametrize("truth", [7, 4, 1])
    def test_late_after_a_charge_again(self, ledger: Ledger, clock: Clock, truth: int) -> None:
        """A charged orphan is corrected once."""
        grant(ledger, 10)
        place(ledger, "h1", 4, on_unknown="charge")
        clock.advance(121)
        ledger.recover()
        first = settle(ledger, "h1", truth)
        before = numbers(ledger)
        again = settle(ledger, "h1", truth)

        assert ("again", first.event) == (again.outcome, again.event)
        assert before == numbers(ledger)
        assert 2 == len(billed(ledger))


class _Releasing(_Contract):
    """Giving a hold back."""

    def test_release_gives_back(self, ledger: Ledger) -> None:
        """A released hold is available again, and nothing was billed."""
        grant(ledger, 10)
        place(ledger, "h1", 6)

        assert "released" == release(ledger, "h1").outcome
        assert Numbers(10, available=10) == numbers(ledger)
        assert [] == billed(ledger)

    def test_release_is_kept(self, ledger: Ledger, clock: Clock) -> None:
        """A released hold stays on record with its reason and whether the provider may have worked: calls that may have cost us."""
        grant(ledger, 10)
        place(ledger, "h1", 6)
        clock.advance(5)
        release(ledger, "h1", reason="stream_failed", sent="unknown")

        hold = hold_of(ledger, "h1")
        assert ("released", 6, "stream_failed", "unknown") == (hold.state, hold.amount, hold.reason, hold.sent)
        assert clock.at() == hold.ended_at
        assert hold.is_in_doubt
        found = ledger.verify()
        assert (1, 6) == (found.in_doubt, found.in_doubt_amount)

    @pytest.mark.parametrize("sent", ["yes", "no"])
    def test_release_not_in_doubt(self, ledger: Ledger, sent: str) -> None:
        """A hold that was released although the provider answered, or was never asked, is not in doubt."""
        grant(ledger, 10)
        place(ledger, "h1", 6)
        release(ledger, "h1", sent=sent)

        assert not hold_of(ledger, "h1").is_in_doubt
        assert 0 == ledger.verify().in_doubt

    def test_release_again(self, ledger: Ledger) -> None:
        """Releasing twice gives back once, and the first reason stands."""
        grant(ledger, 10)
        place(ledger, "h1", 6)
        release(ledger, "h1", reason="cancelled", sent="unknown")

        assert "again" == release(ledger, "h1", reason="not_sent", sent="no").outcome
        assert Numbers(10, available=10) == numbers(ledger)
        assert ("cancelled", "unknown") == (hold_of(ledger, "h1").reason, hold_of(ledger, "h1").sent)

    def test_release_after_a_settle(self, ledger: Ledger) -> None:
        """Releasing a settled hold changes nothing."""
        grant(ledger, 10)
        place(ledger, "h1", 6)
        settle(ledger, "h1", 4)

        assert "again" == release(ledger, "h1").outcome
        assert Numbers(10, used=4, available=6) == numbers(ledger)
        assert "again" == settle(ledger, "h1", 4).outcome

    @pytest.mark.parametrize("on_unknown", ["release", "charge"])
    def test_release_after_the_owner_died(self, ledger: Ledger, clock: Clock, on_unknown: str) -> None:
        """Releasing an orphan that was resolved changes nothing."""
        grant(ledger, 10)
        place(ledger, "h1", 6, on_unknown=on_unknown)
        clock.advance(121)
        ledger.recover()
        before = numbers(ledger)

        assert "again" == release(ledger, "h1").outcome
        assert before == numbers(ledger)

    def test_release_before_the_place(self, ledger: Ledger) -> None:
        """Releasing a hold that is not there yet makes the late place fail and set nothing aside."""
        grant(ledger, 10)

        assert "tombstone" == release(ledger, "h1", reason="cancelled", sent="no").outcome
        with pytest.raises(BillingUnavailableError, match=r"h1.* has ended"):
            place(ledger, "h1", 6)
        assert Numbers(10, available=10) == numbers(ledger)

    def test_release_before_the_place_again(self, ledger: Ledger) -> None:
        """Releasing such a hold twice changes nothing, and it still cannot be placed."""
        grant(ledger, 10)
        release(ledger, "h1")
        release(ledger, "h1")

        with pytest.raises(BillingUnavailableError, match="has ended"):
            place(ledger, "h1", 6)
        assert Numbers(10, available=10) == numbers(ledger)


class _Operations(_Contract):
    """Explicit transaction ids: they name an operation, and a scope may run it several times."""

    def test_operation_numbers(self, ledger: Ledger) -> None:
        """The calls of one operation are numbered: the plain id first, then .2, .3 and so on."""
        grant(ledger, 10)

        assert ["req_1", "req_1.2", "req_1.3"] == operate_often(ledger, 3)

    def test_operation_names_the_event(self, ledger: Ledger) -> None:
        """A hold of an operation is billed under the operation's id, whatever id the answer has."""
        grant(ledger, 10)
        operate_often(ledger, 2)
        second = settle(ledger, "s1-1", 1, "gen_2")
        first = settle(ledger, "s1-0", 1, "gen_1")

        assert ("req_1", "req_1.2") == (first.event.transaction_id, second.event.transaction_id)
        assert ("settled", "settled") == (first.outcome, second.outcome)

    def test_operation_after_a_settle(self, ledger: Ledger) -> None:
        """A number that was billed is taken for ever; the scope's next call has the next one."""
        grant(ledger, 10)
        operate(ledger, "h1")
        settle(ledger, "h1", 1)

        assert "req_1.2" == operate(ledger, "h2").transaction_id

    def test_operation_after_a_release(self, ledger: Ledger) -> None:
        """A release frees the number again: running a failed call once more repeats its id."""
        grant(ledger, 10)
        operate_often(ledger, 3)
        release(ledger, "s1-1")

        assert "req_1.2" == operate(ledger, "h8").transaction_id
        release(ledger, "s1-0")
        assert "req_1" == operate(ledger, "h9").transaction_id

    def test_operation_after_the_owner_died(self, ledger: Ledger, clock: Clock) -> None:
        """A hold whose owner died frees its number as well."""
        grant(ledger, 10)
        operate(ledger, "h1")
        clock.advance(121)
        ledger.recover()

        assert "req_1" == operate(ledger, "h2").transaction_id

    def test_operation_after_a_refusal(self, ledger: Ledger) -> None:
        """A refused call takes no number."""
        grant(ledger, 10)
        with pytest.raises(InsufficientCreditsError):
            operate(ledger, "h1", 11)

        assert "req_1" == operate(ledger, "h2", 10).transaction_id

    def test_operation_again(self, ledger: Ledger) -> None:
        """Placing the same hold again keeps its number."""
        grant(ledger, 10)
        first = operate(ledger, "h1")

        assert first == operate(ledger, "h1")
        assert "req_1.2" == operate(ledger, "h2").transaction_id

    def test_operation_of_another(self, ledger: Ledger) -> None:
        """The same operation of another customer or on another meter is another operation."""
        for number, (customer, meter) in enumerate([("ada", "calls"), ("ada", "images"), ("bob", "calls")]):
            grant(ledger, 10, customer=customer, meter=meter)
            hold = operate(ledger, f"h{number}", customer=customer, meter=meter, scope=f"s{number}")

            assert "req_1" == hold.transaction_id
            assert "settled" == settle(ledger, hold.id, 1, customer=customer, meter=meter).outcome

    def test_operation_too_long(self, ledger: Ledger) -> None:
        """A number that would make the id longer than 255 characters is a ValueError; nothing is held."""
        grant(ledger, 10)
        assert "x" * 254 == operate(ledger, "h1", operation="x" * 254).transaction_id

        with pytest.raises(ValueError, match="255"):
            operate(ledger, "h2", operation="x" * 254)

        assert Numbers(10, held=1, available=9) == numbers(ledger)

    def test_operation_refused_when_billed(self, ledger: Ledger) -> None:
        """An operation that another scope has billed is refused before anything is sent, with the event of the first time."""
        grant(ledger, 10)
        operate(ledger, "h1")
        event = settle(ledger, "h1", 1).event

        with pytest.raises(AlreadyBilledError) as caught:
            operate(ledger, "h2", scope="s2")

        error = caught.value
        assert ("ada", "calls", "req_1", event) == (error.customer, error.meter, error.transaction_id, error.event)
        assert Numbers(10, used=1, available=9) == numbers(ledger)
        assert [] == list(ledger.holds())

    def test_operation_refused_when_held(self, ledger: Ledger) -> None:
        """An operation that another scope holds is refused; there is no event yet."""
        grant(ledger, 10)
        operate(ledger, "h1")

        with pytest.raises(AlreadyBilledError) as caught:
            operate(ledger, "h2", scope="s2")

        assert caught.value.event is None
        assert Numbers(10, held=1, available=9) == numbers(ledger)

    def test_operation_refused_when_recorded(self, ledger: Ledger) -> None:
        """An id that was recorded by hand is billed for every scope."""
        grant(ledger, 10)
        event = record(ledger, "req_1", 1)

        with pytest.raises(AlreadyBilledError) as caught:
            operate(ledger, "h1")

        assert event == caught.value.event

    def test_operation_refused_when_a_charge_was_called_so(self, ledger: Ledger) -> None:
        """An id that was given to a hold late, when it settled, is billed for every scope."""
        grant(ledger, 10)
        place(ledger, "h1", 1)
        event = settle(ledger, "h1", 1, "req_1", is_explicit=True).event

        with pytest.raises(AlreadyBilledError) as caught:
            operate(ledger, "h2")

        assert event == caught.value.event

    def test_operation_free_after_a_release(self, ledger: Ledger) -> None:
        """An operation that another scope tried and released can be run."""
        grant(ledger, 10)
        operate(ledger, "h1")
        release(ledger, "h1")

        assert "req_1" == operate(ledger, "h2", scope="s2").transaction_id

    def test_operation_not_refused_by_the_dead(self, ledger: Ledger, clock: Clock) -> None:
        """An operation that is held by a process that died can be run: its hold is resolved first."""
        grant(ledger, 10)
        operate(ledger, "h1", owner="dead")
        clock.advance(121)

        assert "req_1" == operate(ledger, "h2", scope="s2").transaction_id
        assert Numbers(10, held=1, available=9) == numbers(ledger)

    def test_operation_charged_orphan(self, ledger: Ledger, clock: Clock) -> None:
        """An orphan that is charged is billed under its operation's id, which is then taken."""
        grant(ledger, 10)
        operate(ledger, "h1", 4, on_unknown="charge")
        clock.advance(121)
        ledger.recover()

        assert [("req_1", 4)] == billed(ledger)
        with pytest.raises(AlreadyBilledError) as caught:
            operate(ledger, "h2", scope="s2")
        assert caught.value.event == ledger.usage_event("ada", "calls", "req_1")

    def test_operation_free_when_billed(self, ledger: Ledger) -> None:
        """With on_repeat="free" an operation that another scope has billed is answered again and charged nothing, even in debt."""
        grant(ledger, 10)
        operate(ledger, "h1", 4)
        event = settle(ledger, "h1", 12).event
        hold = operate(ledger, "h2", 4, scope="s2", on_repeat="free")

        assert (True, 0, "req_1") == (hold.is_repeat, hold.amount, hold.transaction_id)
        settled = settle(ledger, "h2", 4, "gen_2")
        assert ("repeat", event) == (settled.outcome, settled.event)
        assert Numbers(10, used=12, debt=2) == numbers(ledger)
        ended = hold_of(ledger, "h2")
        assert ("released", "repeat") == (ended.state, ended.reason)

    def test_operation_free_again(self, ledger: Ledger) -> None:
        """A free repeat settled twice is still free."""
        grant(ledger, 10)
        operate(ledger, "h1")
        event = settle(ledger, "h1", 1).event
        operate(ledger, "h2", scope="s2", on_repeat="free")
        settle(ledger, "h2", 1)
        again = settle(ledger, "h2", 1)

        assert ("repeat", event) == (again.outcome, again.event)
        assert [("req_1", 1)] == billed(ledger)

    def test_operation_free_place_again(self, ledger: Ledger) -> None:
        """Placing a free repeat again gives the same hold, although it holds less than was asked for."""
        grant(ledger, 10)
        operate(ledger, "h1", 4)
        settle(ledger, "h1", 4)
        first = operate(ledger, "h2", 4, scope="s2", on_repeat="free")

        assert first == operate(ledger, "h2", 4, scope="s2", on_repeat="free")

    def test_operation_free_runs_along(self, ledger: Ledger) -> None:
        """The second call of a repeated operation repeats the second call of the first time; the third, which is new, is charged."""
        grant(ledger, 10)
        for hold in [operate(ledger, "a1"), operate(ledger, "a2")]:
            settle(ledger, hold.id, 1)
        repeats: list[tuple[str | None, bool, str]] = []
        for number in range(3):
            hold = operate(ledger, f"b{number}", scope="s2", on_repeat="free")
            repeats.append((hold.transaction_id, hold.is_repeat, settle(ledger, hold.id, 1).outcome))

        assert [("req_1", True, "repeat"), ("req_1.2", True, "repeat"), ("req_1.3", False, "settled")] == repeats
        assert Numbers(10, used=3, available=7) == numbers(ledger)

    def test_operation_free_at_once(self, ledger: Ledger) -> None:
        """A repeat that is still open counts: the scope's next call looks at the next number."""
        grant(ledger, 10)
        operate(ledger, "a1")
        settle(ledger, "a1", 1)
        operate(ledger, "b1", scope="s2", on_repeat="free")
        hold = operate(ledger, "b2", scope="s2", on_repeat="free")

        assert ("req_1.2", False) == (hold.transaction_id, hold.is_repeat)

    def test_operation_free_failed(self, ledger: Ledger) -> None:
        """A free repeat that the provider refused frees its number: the next try is a repeat again."""
        grant(ledger, 10)
        operate(ledger, "a1")
        settle(ledger, "a1", 1)
        operate(ledger, "b1", scope="s2", on_repeat="free")
        release(ledger, "b1")
        hold = operate(ledger, "b2", scope="s2", on_repeat="free")

        assert ("req_1", True) == (hold.transaction_id, hold.is_repeat)

    def test_operation_free_when_held(self, ledger: Ledger) -> None:
        """With on_repeat="free" an operation that is only held is held twice; the first to settle is charged, the other released."""
        grant(ledger, 10)
        operate(ledger, "h1", 4)
        hold = operate(ledger, "h2", 4, scope="s2", on_repeat="free")

        assert (False, 4, "req_1") == (hold.is_repeat, hold.amount, hold.transaction_id)
        assert Numbers(10, held=8, available=2) == numbers(ledger)
        second = settle(ledger, "h2", 3, "gen_2")
        first = settle(ledger, "h1", 4, "gen_1")
        assert ("settled", "repeat", second.event) == (second.outcome, first.outcome, first.event)
        assert [("req_1", 3)] == billed(ledger)
        assert Numbers(10, used=3, available=7) == numbers(ledger)

    def test_operation_free_must_fit(self, ledger: Ledger) -> None:
        """A second hold of an operation must fit like any other."""
        grant(ledger, 6)
        operate(ledger, "h1", 4)

        with pytest.raises(InsufficientCreditsError):
            operate(ledger, "h2", 4, scope="s2", on_repeat="free")

        assert Numbers(6, held=4, available=2) == numbers(ledger)

    def test_operation_number_of_a_repeat_is_kept(self, ledger: Ledger) -> None:
        """A call that lost the race and was released as a repeat keeps its number: the scope's next call has the next one."""
        grant(ledger, 10)
        operate(ledger, "h1")
        operate(ledger, "h2", scope="s2", on_repeat="free")
        settle(ledger, "h2", 1)
        settle(ledger, "h1", 1)

        assert "req_1.2" == operate(ledger, "h3").transaction_id

    def test_operation_number_of_a_late_repeat(self, ledger: Ledger, clock: Clock) -> None:
        """A repeat that was given up for dead and settles late is charged nothing, and keeps its number like any other."""
        grant(ledger, 10)
        operate(ledger, "h1")
        settle(ledger, "h1", 1)
        operate(ledger, "h2", scope="s2", on_repeat="free")
        clock.advance(121)
        ledger.recover()

        assert "repeat" == settle(ledger, "h2", 1).outcome
        assert "req_1.2" == operate(ledger, "h3", scope="s2", on_repeat="free").transaction_id
        assert Numbers(10, used=1, held=1, available=8) == numbers(ledger)

    def test_operation_number_billed_late(self, ledger: Ledger, clock: Clock) -> None:
        """A number that was billed late stays taken, although a later hold that had it is released."""
        grant(ledger, 10)
        operate(ledger, "h1", owner="dead")
        clock.advance(121)
        ledger.recover()
        assert "req_1" == operate(ledger, "h2").transaction_id
        assert "late" == settle(ledger, "h1", 1).outcome
        release(ledger, "h2")

        assert "req_1.2" == operate(ledger, "h3").transaction_id


class _Leases(_Contract):
    """How a hold shows that its owner lives, and what becomes of orphans."""

    def test_lease_alive(self, ledger: Ledger, clock: Clock) -> None:
        """A hold stays while its owner's lease runs."""
        grant(ledger, 10)
        place(ledger, "h1", 4)
        clock.advance(119.999999)

        assert 0 == ledger.sweep().resolved
        assert 0 == ledger.recover().resolved
        assert Numbers(10, held=4, available=6) == numbers(ledger)

    def test_lease_orphan(self, ledger: Ledger, clock: Clock) -> None:
        """Once the lease is out the hold is given back, and stays on record as in doubt."""
        grant(ledger, 10)
        place(ledger, "h1", 1)
        clock.advance(120)
        recovery = ledger.sweep()

        assert (1, 0, 1, 0) == (recovery.released, recovery.charged, recovery.in_doubt, recovery.charged_amount)
        assert Numbers(10, available=10) == numbers(ledger)
        hold = hold_of(ledger, "h1")
        assert ("expired", "unknown", "unknown") == (hold.state, hold.reason, hold.sent)
        assert hold.is_in_doubt
        assert [] == billed(ledger)

    def test_lease_charged_orphan(self, ledger: Ledger, clock: Clock) -> None:
        """With on_unknown="charge" the orphan's hold is charged, under the hold's id."""
        grant(ledger, 10)
        place(ledger, "h1", 4, on_unknown="charge")
        clock.advance(120)
        recovery = ledger.sweep()

        assert (0, 1, 4) == (recovery.released, recovery.charged, recovery.charged_amount)
        assert Numbers(10, used=4, available=6) == numbers(ledger)
        (event,) = ledger.usage_events()
        assert ("hold_h1", 4, "expired", "held") == (event.transaction_id, event.amount, event.kind, event.basis)
        assert "h1" == event.hold_id
        assert "charged" == hold_of(ledger, "h1").state

    def test_lease_charged_orphan_of_an_unlimited_account(self, ledger: Ledger, clock: Clock) -> None:
        """An unlimited hold that is charged is counted as unlimited use."""
        set_unlimited(ledger)
        place(ledger, "h1", 4, on_unknown="charge")
        set_unlimited(ledger, is_unlimited=False)
        clock.advance(120)
        ledger.sweep()

        assert Numbers(0) == numbers(ledger)
        assert 4 == ledger.balance("ada", "calls").unlimited_used

    def test_lease_resolved_once(self, ledger: Ledger, clock: Clock) -> None:
        """An orphan is resolved once."""
        grant(ledger, 10)
        place(ledger, "h1", 4, on_unknown="charge")
        clock.advance(500)
        ledger.sweep()

        assert 0 == ledger.sweep().resolved
        assert 0 == ledger.recover().resolved
        assert [("hold_h1", 4)] == billed(ledger)

    def test_lease_renewed(self, ledger: Ledger, clock: Clock) -> None:
        """One renewal keeps all of its owner's holds, and says how many there are."""
        grant(ledger, 10)
        place(ledger, "h1", 1)
        place(ledger, "h2", 0, customer="bob", meter="images")
        place(ledger, "h3", 1)
        release(ledger, "h3")
        place(ledger, "h4", 1, owner="p2")
        clock.advance(100)

        assert 2 == renew(ledger, "p1")
        clock.advance(119)
        recovery = ledger.sweep()
        assert 1 == recovery.resolved
        assert ["h1", "h2"] == sorted(hold.id for hold in ledger.holds(state="open"))
        clock.advance(1)
        assert 2 == ledger.sweep().resolved

    def test_lease_renewed_before_the_first_place(self, ledger: Ledger) -> None:
        """An owner without holds may renew."""
        assert 0 == renew(ledger, "p9")

    def test_lease_placing_renews(self, ledger: Ledger, clock: Clock) -> None:
        """A process that keeps placing holds keeps its earlier ones: a place renews a lease of which a third is gone."""
        grant(ledger, 10)
        place(ledger, "h1", 1)
        for number in range(2, 8):
            clock.advance(60)
            place(ledger, f"h{number}", 1)
            clock.advance(65)
            assert 0 == ledger.sweep().resolved
            clock.advance(-65)

        clock.advance(119)
        assert 0 == ledger.sweep().resolved
        assert Numbers(10, held=7, available=3) == numbers(ledger)

    def test_lease_longest_call(self, ledger: Ledger, clock: Clock) -> None:
        """No hold is renewed past `max_call`."""
        grant(ledger, 10)
        place(ledger, "h1", 4, max_call=150)
        clock.advance(100)
        renew(ledger, "p1")
        clock.advance(49)
        assert 0 == ledger.sweep().resolved
        clock.advance(1)

        assert 1 == ledger.sweep().resolved

    def test_lease_without_an_owner(self, ledger: Ledger, clock: Clock) -> None:
        """A hold without an owner needs no renewal and lives as long as `max_call` allows."""
        grant(ledger, 10)
        place(ledger, "h1", 4, owner=None)
        clock.advance(7199)
        assert 0 == ledger.sweep().resolved
        clock.advance(1)

        assert 1 == ledger.sweep().resolved

    @pytest.mark.parametrize(("owner", "max_call", "seconds"), [("p1", 7200, 120), ("p1", 60, 60), (None, 600, 600)])
    def test_lease_shown(self, ledger: Ledger, clock: Clock, owner: str | None, max_call: int, seconds: int) -> None:
        """A hold shows until when it lives: its owner's lease or `max_call`, whichever is sooner."""
        grant(ledger, 10)
        hold = place(ledger, "h1", 4, owner=owner, lease=120, max_call=max_call)

        assert clock.at(seconds) == hold.expires_at == hold_of(ledger, "h1").expires_at

    def test_lease_in_portions(self, ledger: Ledger, clock: Clock) -> None:
        """A sweep resolves at most `limit` holds, so that no transaction is long; what is left is left for the next."""
        grant(ledger, 10)
        for number in range(5):
            place(ledger, f"h{number}", 1)
        clock.advance(121)

        assert [2, 2, 1, 0] == [ledger.sweep(limit=2).resolved for _ in range(4)]

    def test_lease_recover(self, ledger: Ledger, clock: Clock) -> None:
        """`recover` resolves all orphans of all customers, and leaves the living alone."""
        for number in range(7):
            grant(ledger, 10, customer=f"c{number}")
            place(ledger, f"h{number}", number, customer=f"c{number}", on_unknown="charge" if number % 2 else "release")
        clock.advance(121)
        grant(ledger, 10)
        place(ledger, "h9", 5, owner="p2")
        recovery = ledger.recover()

        assert (4, 3, 9) == (recovery.released, recovery.charged, recovery.charged_amount)
        assert ["h9"] == [hold.id for hold in ledger.holds(state="open")]
        assert 3 == len(list(ledger.usage_events()))

    def test_lease_dead_holds_give_way(self, ledger: Ledger, clock: Clock) -> None:
        """A customer is never refused because of a process that died: orphans are resolved before the refusal."""
        grant(ledger, 10)
        place(ledger, "h1", 8, owner="dead")
        clock.advance(121)
        place(ledger, "h2", 10)

        assert Numbers(10, held=10) == numbers(ledger)
        assert "expired" == hold_of(ledger, "h1").state

    def test_lease_charged_orphans_do_not_give_way(self, ledger: Ledger, clock: Clock) -> None:
        """With on_unknown="charge" what a dead process held is charged, so the next hold must fit beside it."""
        grant(ledger, 10)
        place(ledger, "h1", 8, owner="dead", on_unknown="charge")
        clock.advance(121)

        with pytest.raises(InsufficientCreditsError):
            place(ledger, "h2", 3)
        assert "open" == place(ledger, "h3", 2).state

    def test_lease_settled_before_the_sweep(self, ledger: Ledger, clock: Clock) -> None:
        """A process that slept past its lease and settles before anybody swept settles as always."""
        grant(ledger, 10)
        place(ledger, "h1", 4)
        clock.advance(500)

        assert "settled" == settle(ledger, "h1", 4).outcome
        assert 0 == ledger.sweep().resolved
        assert Numbers(10, used=4, available=6) == numbers(ledger)

    def test_lease_renewed_before_the_sweep(self, ledger: Ledger, clock: Clock) -> None:
        """A process that slept past its lease and renews before anybody swept keeps its holds."""
        grant(ledger, 10)
        place(ledger, "h1", 4)
        clock.advance(500)

        assert 1 == renew(ledger, "p1")
        assert 0 == ledger.sweep().resolved


class _Grants(_Contract):
    """Giving credits, and taking them back."""

    def test_grant_gives(self, ledger: Ledger, clock: Clock) -> None:
        """A grant raises the limit and is listed as it was returned."""
        until = clock.at(3600)
        first = grant(ledger, 10, "order_42", expires_at=until)

        assert Grant("ada", "calls", "order_42", 10, clock.at(), until) == first
        assert [first] == list(ledger.grants("ada"))
        assert Numbers(10, available=10) == numbers(ledger)

    def test_grant_again(self, ledger: Ledger, clock: Clock) -> None:
        """The same grant again gives nothing and returns the first, even if it asks for another expiry."""
        first = grant(ledger, 10)
        clock.advance(5)

        assert first == grant(ledger, 10, expires_at=clock.at(60))
        assert Numbers(10, available=10) == numbers(ledger)
        assert 1 == len(list(ledger.grants()))

    def test_grant_conflict(self, ledger: Ledger) -> None:
        """Another amount under the same id is a GrantConflictError; the first stands."""
        grant(ledger, 10)

        with pytest.raises(GrantConflictError, match="g1"):
            grant(ledger, 11)

        assert Numbers(10, available=10) == numbers(ledger)

    def test_grant_ids_belong_to_an_account(self, ledger: Ledger) -> None:
        """The same id for another customer, or on another meter, is another grant."""
        grant(ledger, 1)
        grant(ledger, 2, customer="bob")
        grant(ledger, 3, meter="images")

        assert [1, 2, 3] == sorted(given.amount for given in ledger.grants())

    def test_grant_pays_debt(self, ledger: Ledger) -> None:
        """A debt is paid by the next grant first."""
        record(ledger, "rec_1", 12)
        grant(ledger, 10)
        assert Numbers(10, used=12, debt=2) == numbers(ledger)
        grant(ledger, 5, "g2")

        assert Numbers(15, used=12, available=3) == numbers(ledger)

    def test_grant_revoked(self, ledger: Ledger) -> None:
        """Revoking takes back what is unspent; what was spent becomes debt."""
        grant(ledger, 10)
        record(ledger, "rec_1", 4)
        given = revoke(ledger)

        assert (10, 0) == (given.revoked, given.spent)
        assert Numbers(0, used=4, debt=4) == numbers(ledger)
        assert [given] == list(ledger.grants())

    def test_grant_revoked_unspent(self, ledger: Ledger) -> None:
        """Revoking a grant nobody spent leaves the balance as it was before."""
        grant(ledger, 10)
        grant(ledger, 5, "g2")
        revoke(ledger, "g2")

        assert Numbers(10, available=10) == numbers(ledger)

    def test_grant_revoked_twice(self, ledger: Ledger) -> None:
        """Revoking twice takes back once."""
        grant(ledger, 10)
        grant(ledger, 10, "g2")
        first = revoke(ledger)

        assert first == revoke(ledger)
        assert Numbers(10, available=10) == numbers(ledger)

    def test_grant_revoked_is_over(self, ledger: Ledger) -> None:
        """A revoked grant is not given again under its id."""
        grant(ledger, 10)
        revoke(ledger)

        assert 10 == grant(ledger, 10).revoked
        assert Numbers(0) == numbers(ledger)

    def test_grant_revoked_unknown(self, ledger: Ledger) -> None:
        """Revoking a grant that was never given is a ValueError naming it."""
        grant(ledger, 10)

        with pytest.raises(ValueError, match="order_43"):
            revoke(ledger, "order_43")
        with pytest.raises(ValueError, match="g1"):
            revoke(ledger, "g1", customer="bob")

        assert Numbers(10, available=10) == numbers(ledger)

    def test_grant_revoked_while_held(self, ledger: Ledger) -> None:
        """Revoking what a call in flight holds leaves the hold; what it lacks is debt, gone if the hold is released."""
        grant(ledger, 10)
        place(ledger, "h1", 4)
        revoke(ledger)
        assert Numbers(0, held=4, debt=4) == numbers(ledger)

        release(ledger, "h1")
        assert Numbers(0) == numbers(ledger)

    def test_grant_revoked_others_take_over(self, ledger: Ledger, clock: Clock) -> None:
        """What a revoked grant had paid is paid by the others, soonest expiry first."""
        grant(ledger, 10, "soon", expires_at=clock.at(50))
        record(ledger, "rec_1", 6)
        grant(ledger, 10, "later", expires_at=clock.at(100))
        grant(ledger, 10, "never")
        revoke(ledger, "soon")
        assert Numbers(20, used=6, available=14) == numbers(ledger)

        clock.advance(100)
        assert Numbers(16, used=6, available=10) == numbers(ledger)

    def test_grant_revoked_with_a_debt(self, ledger: Ledger) -> None:
        """A debt that a revoked grant leaves is paid by the next grant."""
        grant(ledger, 10)
        record(ledger, "rec_1", 10)
        revoke(ledger)
        grant(ledger, 25, "g2")

        assert Numbers(25, used=10, available=15) == numbers(ledger)


class _Expiry(_Contract):
    """Grants that expire."""

    def test_expiry_naive(self, ledger: Ledger) -> None:
        """An expiry without a time zone is a ValueError."""
        with pytest.raises(ValueError, match=r"expires_at"):
            grant(ledger, 10, expires_at=datetime(2027, 1, 1))  # noqa: DTZ001 - What is refused.

        assert 0 == ledger.verify().accounts

    def test_expiry_zones(self, ledger: Ledger, clock: Clock) -> None:
        """An expiry may come in any time zone; it is the moment that counts."""
        until = clock.at(60).astimezone(_zone(5.5))
        grant(ledger, 10, expires_at=until)
        clock.advance(59.999999)
        assert 10 == numbers(ledger).available
        clock.advance(0.000001)

        assert 0 == numbers(ledger).available

    def test_expiry_expires(self, ledger: Ledger, clock: Clock) -> None:
        """At its expiry a grant is over: the balance shows it at once, without anybody writing."""
        grant(ledger, 10, expires_at=clock.at(60))
        clock.advance(59.999999)
        assert Numbers(10, available=10) == numbers(ledger)
        clock.advance(0.000001)

        assert Numbers(0) == numbers(ledger)
        assert [Numbers(0)] == [
            Numbers(b.limit or 0, b.used, b.held, b.available or 0, b.debt) for b in ledger.balances("ada")
        ]

    def test_expiry_refuses(self, ledger: Ledger, clock: Clock) -> None:
        """Expired credits cannot be held."""
        grant(ledger, 10, expires_at=clock.at(60))
        clock.advance(60)

        with pytest.raises(InsufficientCreditsError) as caught:
            place(ledger, "h1", 1)

        assert (0, False) == (caught.value.available, caught.value.is_transient)
        assert Numbers(0) == numbers(ledger)

    def test_expiry_looking_changes_nothing(self, ledger: Ledger, clock: Clock) -> None:
        """It makes no difference whether anybody looked at the balance or tried a call between the expiry and the next step."""
        for number, customer in enumerate(["ada", "bob"]):
            grant(ledger, 10, customer=customer, expires_at=clock.at(60))
            grant(ledger, 5, "g2", customer=customer)
            place(ledger, f"h{number}", 4, customer=customer)
        clock.advance(61)
        numbers(ledger, "ada")
        place(ledger, "h9", 0, customer="ada")
        release(ledger, "h9", customer="ada")
        for number, customer in enumerate(["ada", "bob"]):
            settle(ledger, f"h{number}", 3, customer=customer)

        assert Numbers(8, used=3, available=5) == numbers(ledger, "ada") == numbers(ledger, "bob")

    def test_expiry_spent_cannot_expire(self, ledger: Ledger, clock: Clock) -> None:
        """What was spent before the expiry is not lost by it."""
        grant(ledger, 10, expires_at=clock.at(60))
        record(ledger, "rec_1", 4)
        clock.advance(60)

        assert Numbers(4, used=4) == numbers(ledger)

    @pytest.mark.parametrize(
        "order", [("soon", "later", "never"), ("never", "later", "soon"), ("later", "never", "soon")]
    )
    def test_expiry_soonest_first(self, ledger: Ledger, clock: Clock, order: tuple[str, ...]) -> None:
        """The grant that expires soonest is spent first, in whatever order they were given; one without an expiry last."""
        expiry = {"soon": clock.at(60), "later": clock.at(120), "never": None}
        for name in order:
            grant(ledger, 10, name, expires_at=expiry[name])
        record(ledger, "rec_1", 14)

        assert Numbers(30, used=14, available=16) == numbers(ledger)
        clock.advance(60)
        assert Numbers(30, used=14, available=16) == numbers(ledger)
        clock.advance(60)
        assert Numbers(24, used=14, available=10) == numbers(ledger)

    def test_expiry_already_spent(self, ledger: Ledger, clock: Clock) -> None:
        """A new grant that expires sooner does not take over what an earlier one has paid."""
        grant(ledger, 10, "never")
        record(ledger, "rec_1", 4)
        grant(ledger, 10, "soon", expires_at=clock.at(60))
        clock.advance(60)

        assert Numbers(10, used=4, available=6) == numbers(ledger)

    def test_expiry_spent_by_the_living(self, ledger: Ledger, clock: Clock) -> None:
        """What is used after an expiry is paid by the grants that are left."""
        grant(ledger, 10, "soon", expires_at=clock.at(60))
        grant(ledger, 10, "never")
        clock.advance(61)
        record(ledger, "rec_1", 4)

        assert Numbers(10, used=4, available=6) == numbers(ledger)

    def test_expiry_in_the_past(self, ledger: Ledger, clock: Clock) -> None:
        """A grant that has expired already pays the debt there is; the rest expires at once."""
        record(ledger, "rec_1", 4)
        grant(ledger, 10, expires_at=clock.at(-60))

        assert Numbers(4, used=4) == numbers(ledger)

    def test_expiry_paid_debt_cannot_expire(self, ledger: Ledger, clock: Clock) -> None:
        """What paid a debt is spent and cannot expire."""
        record(ledger, "rec_1", 4)
        grant(ledger, 10, expires_at=clock.at(60))
        assert Numbers(10, used=4, available=6) == numbers(ledger)
        clock.advance(60)

        assert Numbers(4, used=4) == numbers(ledger)

    def test_expiry_expired_is_listed(self, ledger: Ledger, clock: Clock) -> None:
        """Once applied, an expiry shows on its grant: so much was spent, so much expired."""
        grant(ledger, 10, expires_at=clock.at(60))
        record(ledger, "rec_1", 4)
        clock.advance(60)
        place(ledger, "h1", 0)

        (given,) = ledger.grants()
        assert (10, 4, 6, 0) == (given.amount, given.spent, given.expired, given.revoked)

    def test_expiry_expired_is_over(self, ledger: Ledger, clock: Clock) -> None:
        """An expired grant is not given again under its id."""
        grant(ledger, 10, expires_at=clock.at(60))
        clock.advance(60)
        place(ledger, "h1", 0)

        assert 10 == grant(ledger, 10, expires_at=clock.at(60)).expired
        assert Numbers(0) == numbers(ledger)

    def test_expiry_revoked_after_the_expiry(self, ledger: Ledger, clock: Clock) -> None:
        """Revoking an expired grant takes back what it had paid; what expired is gone already."""
        grant(ledger, 10, expires_at=clock.at(60))
        record(ledger, "rec_1", 4)
        clock.advance(60)
        given = revoke(ledger)

        assert (4, 6, 0) == (given.revoked, given.expired, given.spent)
        assert Numbers(0, used=4, debt=4) == numbers(ledger)

    def test_expiry_serves_earlier_holds(self, ledger: Ledger, clock: Clock) -> None:
        """A hold placed before the expiry keeps its credits; the rest of the grant is gone, and nothing is free for others."""
        grant(ledger, 10, expires_at=clock.at(60))
        place(ledger, "h1", 6)
        clock.advance(60)
        assert Numbers(6, held=6) == numbers(ledger)
        with pytest.raises(InsufficientCreditsError):
            place(ledger, "h2", 1)

        settle(ledger, "h1", 6)
        assert Numbers(6, used=6) == numbers(ledger)

    def test_expiry_what_is_left_of_a_hold_is_gone(self, ledger: Ledger, clock: Clock) -> None:
        """What such a hold does not use is gone with the grant."""
        grant(ledger, 10, expires_at=clock.at(60))
        place(ledger, "h1", 6)
        clock.advance(60)
        settle(ledger, "h1", 4)

        assert Numbers(4, used=4) == numbers(ledger)

    @pytest.mark.parametrize("how", ["release", "orphan"])
    def test_expiry_a_hold_given_back_is_gone(self, ledger: Ledger, clock: Clock, how: str) -> None:
        """A hold given back after its grant expired gives nothing back."""
        grant(ledger, 10, expires_at=clock.at(60))
        place(ledger, "h1", 6)
        clock.advance(60)
        place(ledger, "h2", 0, owner="p2")
        if how == "release":
            release(ledger, "h1")
        else:
            clock.advance(60)
            ledger.recover()

        assert Numbers(0) == numbers(ledger)

    def test_expiry_placed_at_the_expiry(self, ledger: Ledger, clock: Clock) -> None:
        """A hold placed at the very moment of the expiry is not an earlier one."""
        grant(ledger, 10, "soon", expires_at=clock.at(60))
        grant(ledger, 4, "never")
        clock.advance(60)
        place(ledger, "h1", 4)
        assert Numbers(4, held=4) == numbers(ledger)
        settle(ledger, "h1", 3)

        assert Numbers(4, used=3, available=1) == numbers(ledger)

    @pytest.mark.parametrize(("later", "kept"), [(-0.000001, 0), (0, 0), (0.000001, 4), (30, 4)])
    def test_expiry_in_the_past_of_a_hold(self, ledger: Ledger, clock: Clock, later: float, kept: int) -> None:
        """A grant that has expired already serves the open holds placed before its expiry, and no others."""
        grant(ledger, 4)
        place(ledger, "h1", 4)
        moment = clock.at(later)
        clock.advance(60)
        revoke(ledger)
        grant(ledger, 10, "g2", expires_at=moment)

        assert Numbers(kept, held=4, debt=4 - kept) == numbers(ledger)

    @pytest.mark.parametrize(("used", "limit"), [(6, 16), (2, 12), (None, 10)])
    def test_expiry_later_holds_take_nothing_kept(
        self, ledger: Ledger, clock: Clock, used: int | None, limit: int
    ) -> None:
        """What an expired grant keeps for an earlier hold is not spent by a later one."""
        grant(ledger, 10, "soon", expires_at=clock.at(60))
        grant(ledger, 10, "never")
        place(ledger, "h1", 6)
        clock.advance(60)
        place(ledger, "h2", 5, owner="p2")
        assert Numbers(16, held=11, available=5) == numbers(ledger)

        settle(ledger, "h2", 5)
        assert Numbers(16, used=5, held=6, available=5) == numbers(ledger)
        if used is None:
            release(ledger, "h1")
        else:
            settle(ledger, "h1", used)
        assert Numbers(limit, used=5 + (used or 0), available=5) == numbers(ledger)

    @pytest.mark.parametrize("order", [("h1", "h2"), ("h2", "h1")])
    @pytest.mark.parametrize(
        ("first", "second"),
        [(6, 4), (0, 4), (6, 0), (3, 1), (None, 4), (6, None), (8, None), (None, 6), (9, 4), (9, 6)],
    )
    def test_expiry_order_of_ends(
        self, ledger: Ledger, clock: Clock, order: tuple[str, str], first: int | None, second: int | None
    ) -> None:
        """Earlier holds may end in any order: the customer loses only what none of them used, and each takes no more than it held."""
        grant(ledger, 10, "soon", expires_at=clock.at(60))
        grant(ledger, 10, "never")
        place(ledger, "h1", 6)
        place(ledger, "h2", 4)
        clock.advance(60)
        place(ledger, "h3", 0)
        ends = {"h1": first, "h2": second}
        for hold_id in order:
            used = ends[hold_id]
            if used is None:
                release(ledger, hold_id)
            else:
                settle(ledger, hold_id, used)

        used = (first or 0) + (second or 0)
        kept = min(first or 0, 6) + min(second or 0, 4)
        assert Numbers(10 + kept, used=used, available=10 + kept - used) == numbers(ledger)

    @pytest.mark.parametrize("order", [("h1", "h2"), ("h2", "h1")])
    def test_expiry_several_expiries(self, ledger: Ledger, clock: Clock, order: tuple[str, str]) -> None:
        """Each expired grant serves only the holds placed before its own expiry."""
        grant(ledger, 4, "soon", expires_at=clock.at(60))
        grant(ledger, 4, "later", expires_at=clock.at(90))
        place(ledger, "h1", 3)
        clock.advance(61)
        assert Numbers(7, held=3, available=4) == numbers(ledger)
        place(ledger, "h2", 2)
        clock.advance(30)
        assert Numbers(5, held=5) == numbers(ledger)
        for hold_id in order:
            settle(ledger, hold_id, 2)

        assert Numbers(4, used=4) == numbers(ledger)

    def test_expiry_debt_is_paid_by_the_next_grant(self, ledger: Ledger, clock: Clock) -> None:
        """A debt left by expired credits is paid by the next grant."""
        grant(ledger, 10, expires_at=clock.at(60))
        place(ledger, "h1", 6)
        clock.advance(60)
        settle(ledger, "h1", 9)
        grant(ledger, 10, "g2")

        balance = numbers(ledger)
        assert 9 == balance.used
        assert balance.limit - 9 == balance.available
        assert 0 == balance.debt

    def test_expiry_nothing_expires_while_unlimited(self, ledger: Ledger, clock: Clock) -> None:
        """Grants of an unlimited account expire all the same, and use counted as unlimited does not spend them."""
        grant(ledger, 10, expires_at=clock.at(60))
        grant(ledger, 10, "g2")
        set_unlimited(ledger)
        place(ledger, "h1", 4)
        settle(ledger, "h1", 4)
        clock.advance(60)
        set_unlimited(ledger, is_unlimited=False)

        assert Numbers(10, available=10) == numbers(ledger)


class _Unlimited(_Contract):
    """Accounts that are counted and never refused."""

    def test_unlimited_never_refused(self, ledger: Ledger) -> None:
        """An unlimited account is never refused; its limit and available are None."""
        set_unlimited(ledger)
        hold = place(ledger, "h1", MAX_AMOUNT)

        balance = ledger.balance("ada", "calls")
        assert hold.is_unlimited
        assert (None, None, "unlimited") == (balance.limit, balance.available, balance.level)

    def test_unlimited_counted(self, ledger: Ledger) -> None:
        """What it uses has a counter of its own and spends none of its grants."""
        grant(ledger, 10)
        set_unlimited(ledger)
        place(ledger, "h1", 40)
        event = settle(ledger, "h1", 30, is_unlimited=True).event
        recorded = record(ledger, "rec_1", 5)

        assert event.is_unlimited
        assert recorded.is_unlimited
        assert 35 == ledger.balance("ada", "calls").unlimited_used
        set_unlimited(ledger, is_unlimited=False)
        assert Numbers(10, available=10) == numbers(ledger)

    def test_unlimited_holds_keep_their_mode(self, ledger: Ledger) -> None:
        """A hold is settled in the mode it was placed under, whatever the account is by then."""
        grant(ledger, 10)
        place(ledger, "limited", 4)
        set_unlimited(ledger)
        place(ledger, "unlimited", 50)
        settle(ledger, "limited", 3)
        set_unlimited(ledger, is_unlimited=False)
        assert Numbers(10, used=3, available=7) == numbers(ledger)
        settle(ledger, "unlimited", 50, is_unlimited=True)

        assert Numbers(10, used=3, available=7) == numbers(ledger)
        assert 50 == ledger.balance("ada", "calls").unlimited_used

    def test_unlimited_release(self, ledger: Ledger) -> None:
        """Releasing a hold of an unlimited account gives nothing to the limited one."""
        grant(ledger, 10)
        set_unlimited(ledger)
        place(ledger, "h1", 4)
        set_unlimited(ledger, is_unlimited=False)
        release(ledger, "h1")

        assert Numbers(10, available=10) == numbers(ledger)

    def test_unlimited_again(self, ledger: Ledger) -> None:
        """Switching twice is switching once, and other accounts are not switched."""
        set_unlimited(ledger)
        set_unlimited(ledger)

        assert Numbers(0) == numbers(ledger, meter="images")
        assert Numbers(0) == numbers(ledger, customer="bob")
        set_unlimited(ledger, is_unlimited=False)
        set_unlimited(ledger, is_unlimited=False)
        assert Numbers(0) == numbers(ledger)


class _Recording(_Contract):
    """Usage after the fact."""

    def test_record_charges(self, ledger: Ledger, clock: Clock) -> None:
        """A record is charged without a hold."""
        grant(ledger, 10)
        usage = Usage(model="gpt-5-mini", images=2)
        event = record(ledger, "export_9", 4, usage=usage, properties={"rows": 7}, price_slug="exports")

        assert ("ada", "calls", "export_9", 4) == (event.customer, event.meter, event.transaction_id, event.amount)
        assert ("record", None, usage, {"rows": 7}, "exports") == (
            event.kind,
            event.hold_id,
            event.usage,
            event.properties,
            event.price_slug,
        )
        assert clock.at() == event.created_at
        assert Numbers(10, used=4, available=6) == numbers(ledger)
        assert [event] == list(ledger.usage_events())

    def test_record_debt(self, ledger: Ledger) -> None:
        """A record is never refused; what is not there becomes debt."""
        grant(ledger, 10)
        record(ledger, "export_9", 14)

        assert Numbers(10, used=14, debt=4) == numbers(ledger)

    def test_record_again(self, ledger: Ledger) -> None:
        """The same record again charges nothing and returns the first event, whatever amount it says."""
        first = record(ledger, "export_9", 4)

        assert first == record(ledger, "export_9", 4)
        assert first == record(ledger, "export_9", 5)
        assert Numbers(0, used=4, debt=4) == numbers(ledger)

    def test_record_nothing(self, ledger: Ledger) -> None:
        """A record of 0 leaves an event."""
        record(ledger, "export_9", 0)

        assert [("export_9", 0)] == billed(ledger)

    def test_record_billed_as_a_call(self, ledger: Ledger) -> None:
        """An id that a call was billed under is billed: the record returns the call's event."""
        grant(ledger, 10)
        place(ledger, "h1", 3)
        event = settle(ledger, "h1", 3, "gen_1").event

        assert event == record(ledger, "gen_1", 9)
        assert Numbers(10, used=3, available=7) == numbers(ledger)


class _Listing(_Contract):
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
        assert ["rec_1", "rec_2"] == found(times[1].astimezone(_zone(-8)), times[3].astimezone(_zone(5.5)))
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


class _Together(_Contract):
    """Steps handed over, in numbers, and from everywhere at once."""

    def test_together_submit(self, ledger: Ledger) -> None:
        """A step that is handed over is done, and its future has the result."""
        ledger.submit(AddGrant("ada", "calls", 10, "g1")).result()
        future = ledger.submit(to_place("h1", 4))

        assert isinstance(future, Future)
        assert "h1" == _expect(Hold, future.result()).id
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

        assert {"settled"} == {_expect(Settled, future.result()).outcome for future in settles}

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


class _Verifying(_Contract):
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


class _Closing(_Contract):
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
        assert 100 == len([_expect(Hold, future.result()) for future in futures])

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


class LedgerContract(
    _Inputs,
    _Unknown,
    _Placing,
    _Enlarging,
    _Settling,
    _SameAnswer,
    _Late,
    _Releasing,
    _Operations,
    _Leases,
    _Grants,
    _Expiry,
    _Unlimited,
    _Recording,
    _Listing,
    _Together,
    _Verifying,
    _Closing,
):
    """
    What every ledger promises. Subclass it and write `make_ledger`.

    A ledger under test reads the time from the clock it is given, and the clock moves only when a test moves it.
    """


class SharedLedgerContract(LedgerContract):
    """
    What is promised besides by a ledger that is kept outside the process: two that are made in one place are the same books.

    `make_ledger` is called twice with the same folder.
    """

    @pytest.fixture
    def other(self, ledger: Ledger, tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
        """The same books, opened a second time as another process would."""
        ledger.balance("ada", "calls")
        other = self.make_ledger(tmp_path, clock)
        yield other
        other.close()

    def test_shared_survives(self, tmp_path: Path, clock: Clock) -> None:
        """Everything is still there after closing and opening again; open holds stay open."""
        ledger = self.make_ledger(tmp_path, clock)
        grant(ledger, 10, expires_at=clock.at(3600))
        place(ledger, "h1", 2)
        place(ledger, "h2", 3)
        place(ledger, "h3", 1)
        settle(ledger, "h2", 3, usage=Usage(model="gpt-5-mini", output_tokens=5), properties={"team": "blue"})
        release(ledger, "h3")
        record(ledger, "rec_1", 1, customer="bob")

        def books(ledger: Ledger) -> list[object]:
            return [
                [*ledger.balances("ada"), *ledger.balances("bob")],
                list(ledger.usage_events()),
                list(ledger.holds()),
                list(ledger.grants()),
                ledger.verify(),
            ]

        before = books(ledger)
        ledger.close()
        again = self.make_ledger(tmp_path, clock)
        try:
            assert before == books(again)
            assert "settled" == settle(again, "h1", 2).outcome
            assert Numbers(10, used=5, available=5) == numbers(again)
        finally:
            again.close()

    def test_shared_at_once(self, ledger: Ledger, other: Ledger) -> None:
        """What one has done the other sees at once."""
        grant(ledger, 10)
        place(other, "h1", 4)
        assert Numbers(10, held=4, available=6) == numbers(ledger)
        settle(ledger, "h1", 3)

        assert Numbers(10, used=3, available=7) == numbers(other)
        assert "again" == settle(other, "h1", 4).outcome
        with pytest.raises(InsufficientCreditsError):
            place(other, "h2", 8)

    def test_shared_credits(self, ledger: Ledger, other: Ledger) -> None:
        """Two share a customer's 10 credits among 50 threads: exactly 10 get one."""
        grant(ledger, 10)
        results = at_once(
            50, lambda number: place(other if number % 2 else ledger, f"h{number}", 1, owner=f"p{number % 2}")
        )

        assert (10, 40) == (sum(isinstance(result, Hold) for result in results), refused(results))
        assert Numbers(10, held=10) == numbers(other)

    def test_shared_settle(self, ledger: Ledger, other: Ledger) -> None:
        """Two settle the same hold from 20 threads: one event."""
        grant(ledger, 10)
        place(ledger, "h1", 4)
        results = at_once(20, lambda number: settle(other if number % 2 else ledger, "h1", 3))

        assert 1 == sum(isinstance(result, Settled) and result.outcome == "settled" for result in results)
        assert [("gen_h1", 3)] == billed(other)

    def test_shared_operation(self, ledger: Ledger, other: Ledger) -> None:
        """Two run the same operation in 20 scopes at once: one is let through."""
        grant(ledger, 100)
        results = at_once(20, lambda number: operate(other if number % 2 else ledger, f"h{number}", scope=f"s{number}"))

        assert 1 == sum(isinstance(result, Hold) for result in results)
        assert 19 == sum(isinstance(result, AlreadyBilledError) for result in results)

    def test_shared_orphans(self, ledger: Ledger, other: Ledger, clock: Clock) -> None:
        """What one leaves behind when it dies the other resolves, and no orphan is resolved twice."""
        grant(ledger, 100)
        for number in range(20):
            place(ledger, f"h{number}", 1, owner="dead", on_unknown="charge")
        clock.advance(121)
        results = at_once(6, lambda number: (other if number % 2 else ledger).recover().charged)

        assert 20 == sum(result for result in results if isinstance(result, int))
        assert Numbers(100, used=20, available=80) == numbers(other)
