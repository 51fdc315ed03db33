"""What the chapters of the contract have in common: the clock, a ledger, and short names for its steps."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

from ...core.steps import (
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
from ...errors import InsufficientCreditsError
from ...ledger import Ledger
from ...records import MAX_AMOUNT, Grant, Hold, Usage, UsageEvent

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


def expect(kind: type[R], result: StepResult) -> R:
    assert isinstance(result, kind), f"{result!r} is no {kind.__name__}"
    return result


def place(ledger: Ledger, hold_id: str, amount: int, **more: Any) -> Hold:
    return expect(Hold, ledger.run(to_place(hold_id, amount, **more)))


def to_place(hold_id: str, amount: int, **more: Any) -> Place:
    call: dict[str, Any] = {"customer": "ada", "meter": "calls", "owner": "p1"}
    return Place(hold_id=hold_id, amount=amount, **call | more)


def enlarge(ledger: Ledger, hold_id: str, amount: int) -> Hold:
    return expect(Hold, ledger.run(Enlarge(hold_id, "ada", "calls", amount)))


def settle(ledger: Ledger, hold_id: str, amount: int, transaction_id: str | None = None, **more: Any) -> Settled:
    return expect(Settled, ledger.run(to_settle(hold_id, amount, transaction_id, **more)))


def to_settle(hold_id: str, amount: int, transaction_id: str | None = None, **more: Any) -> Settle:
    call: dict[str, Any] = {"customer": "ada", "meter": "calls", "basis": "reported"}
    return Settle(hold_id=hold_id, amount=amount, transaction_id=transaction_id or f"gen_{hold_id}", **call | more)


def release(ledger: Ledger, hold_id: str, **more: Any) -> Released:
    return expect(Released, ledger.run(to_release(hold_id, **more)))


def to_release(hold_id: str, **more: Any) -> Release:
    call: dict[str, Any] = {"customer": "ada", "meter": "calls", "reason": "provider_error", "sent": "yes"}
    return Release(hold_id=hold_id, **call | more)


def renew(ledger: Ledger, owner: str) -> int:
    return expect(int, ledger.run(Renew(owner, 120.0)))


def record(
    ledger: Ledger, transaction_id: str, amount: int, customer: str = "ada", meter: str = "calls", **more: Any
) -> UsageEvent:
    return expect(UsageEvent, ledger.run(Record(customer, meter, transaction_id, amount, **more)))


def grant(ledger: Ledger, amount: int, grant_id: str = "g1", **more: Any) -> Grant:
    account: dict[str, Any] = {"customer": "ada", "meter": "calls"}
    return expect(Grant, ledger.run(AddGrant(id=grant_id, amount=amount, **account | more)))


def revoke(ledger: Ledger, grant_id: str = "g1", customer: str = "ada") -> Grant:
    return expect(Grant, ledger.run(Revoke(customer, "calls", grant_id)))


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


def zone(hours: float) -> timezone:
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


def steps_for(customer: str, meter: str) -> list[Step]:
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


def id_steps(bad: str) -> list[Step]:
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


def amount_steps(bad: int) -> list[Step]:
    return [
        Place("h1", "ada", "calls", bad, "p1"),
        Enlarge("h1", "ada", "calls", bad),
        Settle("h1", "ada", "calls", bad, "gen_1", "reported"),
        Record("ada", "calls", "rec_1", bad),
        AddGrant("ada", "calls", bad, "g1"),
    ]


class Contract:
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
