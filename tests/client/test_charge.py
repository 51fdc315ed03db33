"""`billing.charge`: a hold around anything, and one price for all the calls inside."""

from __future__ import annotations

import asyncio
from decimal import Decimal

import pytest

from metered_ai import (
    AlreadyBilledError,
    AsyncMeteredOpenAI,
    BillingUnavailableError,
    ConfigurationError,
    InsufficientCreditsError,
    bill_to,
    per_token,
)
from tests.client.shells import HELLO

RESPONSE = {"model": "m", "input": "Hi"}
CHAT = {"model": "m", "messages": HELLO}


@pytest.fixture
def billing(billing):
    """Beside her generations "ada" has 10 reports, and "bob" has 10 generations."""
    billing.grant("ada", "reports", 10, id="start")
    billing.grant("bob", "generations", 10, id="start")
    return billing


def charge(shell, **given):
    return shell.billing.charge("ada", "reports", **{"amount": 5, **given})


def numbers(shell, customer="ada", meter="reports"):
    """(used, held, available)"""
    balance = shell.billing.balance(customer, meter)
    return balance.used, balance.held, balance.available


def events(shell, customer="ada", meter=None):
    return list(shell.billing.usage_events(customer, meter))


# The block.


def test_settles(shell, ledger):
    """Entering holds, leaving settles: one event, named after the hold."""

    async def scenario():
        async with shell.block(charge(shell)) as entered:
            assert (0, 5, 5) == numbers(shell)
            assert None is entered.event
        return entered

    entered = shell.play(scenario())
    (event,) = events(shell)
    assert ["place", "settle"] == ledger.kinds
    assert (5, 0, 5) == numbers(shell)
    assert event == entered.event
    assert (5, "charge", "reported", f"hold_{event.hold_id}") == (
        event.amount,
        event.kind,
        event.basis,
        event.transaction_id,
    )


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_exception_releases(shell, ledger, error):
    """Whatever is raised inside releases the hold and goes on."""

    async def scenario():
        async with shell.block(charge(shell)):
            raise error

    with pytest.raises(error):
        shell.play(scenario())
    shell.pause()
    assert ["place", "release"] == ledger.kinds
    assert (0, 0, 10) == numbers(shell)
    assert [] == events(shell)


def test_cancelled(billing, ledger):
    """A cancelled task releases, also one that is cancelled while it enters, raises or commits: no hold stays open."""

    async def work(entered):
        async with billing.charge("ada", "reports", amount=5) as charge:
            entered.set()
            await charge.araise_to(6)
            await asyncio.Event().wait()

    async def cancel_after(turns):
        entered = asyncio.Event()
        task = asyncio.create_task(work(entered))
        if turns is None:
            await entered.wait()
        else:
            for _ in range(turns):
                await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def scenario():
        for turns in (None, 0, 1, 2, 3, 4, 5, 6, 8, 12):
            await cancel_after(turns)

    asyncio.run(scenario())
    assert [] == list(billing.holds("ada", state="open"))
    assert [] == list(billing.usage_events("ada", "reports"))
    assert 10 == billing.balance("ada", "reports").available


def test_cancelled_while_settling(billing):
    """Cancelled while it commits, a charge is settled all the same: the work was done."""

    async def work():
        async with billing.charge("ada", "reports", amount=5):
            pass

    async def scenario():
        task = asyncio.create_task(work())
        while not task.done():
            await asyncio.sleep(0)
            if list(billing.ledger.holds("ada", "reports", state="open")):
                break
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(scenario())
    assert [] == list(billing.holds("ada", state="open"))
    balance = billing.balance("ada", "reports")
    assert (balance.used, balance.available) in ((5, 5), (0, 10))


def test_refused(shell, ledger):
    """What does not fit is refused on entering; the block is not run."""
    refused = charge(shell, amount=11)

    async def scenario():
        async with shell.block(refused):
            raise AssertionError("the block was run")

    with pytest.raises(InsufficientCreditsError) as caught:
        shell.play(scenario())
    assert (10, 11) == (caught.value.available, caught.value.required)
    assert ["place"] == ledger.kinds
    assert None is refused.event


def test_nothing(shell):
    """A charge of 0 always fits, also of somebody unknown."""

    async def scenario():
        async with shell.block(shell.billing.charge("nobody", "reports", amount=0)) as entered:
            pass
        return entered.event

    assert 0 == shell.play(scenario()).amount


@pytest.mark.parametrize("bad", [-1, True, 1.0, Decimal(1), "5", None, 2**53])
def test_bad_amounts(shell, bad):
    """An amount that is none is a ValueError that names it, before anything is held."""
    with pytest.raises(ValueError, match="amount"):
        charge(shell, amount=bad)


@pytest.mark.parametrize(("name", "bad"), [("customer", ""), ("customer", " ada"), ("meter", "x" * 257), ("meter", 7)])
def test_bad_names(shell, name, bad):
    """So is a name."""
    with pytest.raises(ValueError, match=name):
        shell.billing.charge(**{"customer": "ada", "meter": "reports", "amount": 1, name: bad})


def test_carries(shell):
    """Properties and the price slug are on the event."""

    async def scenario():
        async with shell.block(charge(shell, properties={"a": 1}, price_slug="slug")) as entered:
            pass
        return entered.event

    event = shell.play(scenario())
    assert ({"a": 1}, "slug") == (event.properties, event.price_slug)


def test_unlimited(shell):
    """An unlimited account is refused nothing and its use is counted."""
    shell.billing.set_unlimited("ada", "reports", True)

    async def scenario():
        async with shell.block(charge(shell, amount=1000)) as entered:
            await shell.ask(entered, "raise_to", 2000)

    shell.play(scenario())
    balance = shell.billing.balance("ada", "reports")
    assert (None, 2000) == (balance.available, balance.unlimited_used)


# More, less, at once.


def test_raise_to(shell, ledger):
    """`raise_to` holds the difference first, then that is charged."""

    async def scenario():
        async with shell.block(charge(shell)) as entered:
            await shell.ask(entered, "raise_to", 8)
            assert (0, 8, 2) == numbers(shell)
            assert 8 == entered.amount

    shell.play(scenario())
    assert ["place", "enlarge", "settle"] == ledger.kinds
    assert (8, 0, 2) == numbers(shell)


def test_raise_too_far(shell, ledger):
    """What does not fit is refused and changes nothing: the charge goes on as it was."""

    async def scenario():
        async with shell.block(charge(shell)) as entered:
            with pytest.raises(InsufficientCreditsError) as caught:
                await shell.ask(entered, "raise_to", 11)
            assert (5, 6) == (caught.value.available, caught.value.required)
            assert (5, (0, 5, 5)) == (entered.amount, numbers(shell))

    shell.play(scenario())
    assert (5, 0, 5) == numbers(shell)


def test_lower(shell, ledger):
    """Lowering needs no ledger; `raise_to` below what is held is lowering, too."""

    async def scenario():
        async with shell.block(charge(shell)) as entered:
            entered.amount = 2
            await shell.ask(entered, "raise_to", 3)
            assert (0, 5, 5) == numbers(shell)

    shell.play(scenario())
    assert ["place", "settle"] == ledger.kinds
    assert (3, 0, 7) == numbers(shell)


def test_amount_above_the_hold(shell):
    """Setting more than is held is a ValueError that says what to do."""

    async def scenario():
        async with shell.block(charge(shell)) as entered:
            with pytest.raises(ValueError, match=r"raise_to\(6\)"):
                entered.amount = 6
            with pytest.raises(ValueError, match="-1"):
                entered.amount = -1

    shell.play(scenario())
    assert (5, 0, 5) == numbers(shell)


def test_commit(shell, ledger):
    """`commit` settles early and gives the event; what happens in the block after it changes nothing."""

    async def scenario():
        async with shell.block(charge(shell)) as entered:
            event = await shell.ask(entered, "commit")
            assert event == entered.event
            assert (5, 0, 5) == numbers(shell)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        shell.play(scenario())
    assert ["place", "settle"] == ledger.kinds
    assert (5, 0, 5) == numbers(shell)


def test_over(shell):
    """What is over cannot be changed, committed again or entered again; what was not entered cannot either."""
    late = charge(shell)
    with pytest.raises(ConfigurationError, match="not been entered"):
        shell.play(shell.ask(late, "commit"))
    with pytest.raises(ConfigurationError, match="not been entered"):
        late.amount = 1

    async def scenario():
        async with shell.block(late):
            pass
        for change in (
            lambda: shell.ask(late, "commit"),
            lambda: shell.ask(late, "raise_to", 6),
            lambda: shell.block(late).__aenter__(),
        ):
            with pytest.raises(ConfigurationError):
                await change()

    shell.play(scenario())
    with pytest.raises(ConfigurationError, match="over"):
        late.amount = 1
    with pytest.raises(ConfigurationError, match="over"):
        late.transaction_id = "x"
    assert (5, 0, 5) == numbers(shell)


# Names.


def test_id_at_once(shell, ledger):
    """An operation that was billed before is refused on entering, with its event."""

    async def once():
        async with shell.block(charge(shell, transaction_id="report_1")) as entered:
            with pytest.raises(ConfigurationError, match="report_1"):
                entered.transaction_id = "report_2"
        return entered.event

    event = shell.play(once())
    with pytest.raises(AlreadyBilledError) as caught:
        shell.play(once())
    assert ("report_1", event) == (event.transaction_id, caught.value.event)
    assert ["place", "settle", "place"] == ledger.kinds
    assert (5, 0, 5) == numbers(shell)


def test_id_at_once_free(shell, make_billing):
    """on_repeat="free": the block runs again and is not charged again; its event is the earlier one."""
    billing = make_billing(on_repeat="free")

    async def once():
        async with shell.block(billing.charge("ada", "reports", amount=5, transaction_id="report_1")) as entered:
            await shell.ask(entered, "raise_to", 7)
        return entered.event

    first = shell.play(once())
    assert first == shell.play(once())
    assert (7, 0, 3) == numbers(shell)
    assert ["repeat"] == [hold.reason for hold in billing.holds("ada", state="released")]


def test_id_while_held(shell):
    """While another attempt at it runs the operation is refused without an event; once that failed, it may run."""

    async def scenario():
        try:
            async with shell.block(charge(shell, transaction_id="report_1")):
                again = charge(shell, transaction_id="report_1")
                with pytest.raises(AlreadyBilledError) as caught:
                    await shell.block(again).__aenter__()
                assert None is caught.value.event
                raise ZeroDivisionError
        except ZeroDivisionError:
            async with shell.block(charge(shell, transaction_id="report_1")):
                pass

    shell.play(scenario())
    assert ["report_1"] == [event.transaction_id for event in events(shell)]


def test_late_id(shell):
    """An id that is known only inside names the event."""

    async def scenario():
        async with shell.block(charge(shell)) as entered:
            assert None is entered.transaction_id
            entered.transaction_id = "report_1"
            entered.transaction_id = "report_2"
        return entered

    assert "report_2" == shell.play(scenario()).event.transaction_id


def test_late_id_billed_before(shell, ledger):
    """If it was billed before, the hold is released and `event` is the earlier one."""
    earlier = shell.billing.record("ada", "reports", transaction_id="report_1", amount=3)

    async def scenario():
        async with shell.block(charge(shell)) as entered:
            entered.transaction_id = "report_1"
        return entered

    assert earlier == shell.play(scenario()).event
    assert (3, 0, 7) == numbers(shell)
    assert ["repeat"] == [hold.reason for hold in shell.billing.holds("ada", state="released")]
    assert ["place", "settle"] == ledger.kinds


@pytest.mark.parametrize("bad", ["", "x" * 256, " x", 7])
def test_bad_ids(shell, bad):
    """An id that can be none is a ValueError, when it is given."""
    with pytest.raises(ValueError, match="transaction_id"):
        charge(shell, transaction_id=bad)

    async def scenario():
        async with shell.block(charge(shell)) as entered:
            with pytest.raises(ValueError, match="transaction_id"):
                entered.transaction_id = bad

    shell.play(scenario())


# Calls that it covers.


@pytest.fixture
def client(shell):
    return shell.client(customer=None)


def test_covers(shell, client):
    """Calls inside, on any meter and at any price, hold and record 0, are linked to the charge, and are on its receipt."""

    async def scenario():
        async with shell.block(charge(shell, covers_calls=True)) as entered:
            await shell.wait(client.responses.create(**RESPONSE))
            await shell.wait(client.with_billing(meter="unheard of", amount=99).chat.completions.create(**CHAT))
            tokens = client.with_billing(
                meter="tokens", pricing=per_token(input=7, output=9), estimate=lambda request: 99
            )
            await shell.wait(tokens.responses.create(**RESPONSE))
            async with shell.block(bill_to("ada", amount=50, properties={"step": 2})):
                await shell.wait(client.images.generate(model="m", prompt="A fox"))
        return entered

    entered = shell.play(scenario())
    covered = [event for event in events(shell) if event.kind == "call"]
    assert [("generations", 0), ("generations", 0), ("tokens", 0), ("unheard of", 0)] == sorted(
        (event.meter, event.amount) for event in covered
    )
    assert {entered.event.hold_id} == {event.parent for event in covered}
    assert all(event.usage is not None for event in covered)
    assert 4 == len(entered.receipt.events)
    assert 0 == sum(entered.receipt.amounts.values())
    assert [{"step": 2}] == [event.properties for event in covered if event.properties]
    assert (5, 0, 5) == numbers(shell)
    assert 1_000_000 == shell.billing.balance("ada", "generations").available


def test_covers_in_debt(shell, client):
    """Covered calls run even where the customer is in debt or has nothing."""
    shell.billing.record("ada", "tokens", transaction_id="x", amount=77)

    async def scenario():
        async with shell.block(charge(shell, amount=10, covers_calls=True)):
            assert (0, 10, 0) == numbers(shell)
            for meter in ("tokens", "reports"):
                await shell.wait(client.with_billing(meter=meter).responses.create(**RESPONSE))

    shell.play(scenario())
    assert 77 == shell.billing.balance("ada", "tokens").debt
    assert (10, 0, 0) == numbers(shell)


def test_covers_one_customer(shell, client):
    """Only that customer's calls are covered: whoever else is named inside pays as ever."""

    async def scenario():
        async with shell.block(charge(shell, covers_calls=True)):
            await shell.wait(client.with_billing(customer="bob").responses.create(**RESPONSE))
            async with shell.block(bill_to("bob", amount=2)):
                await shell.wait(client.responses.create(**RESPONSE))

    shell.play(scenario())
    assert [(1, None), (2, None)] == [(event.amount, event.parent) for event in events(shell, "bob")]


@pytest.mark.parametrize("by", ["leaving", "commit", "exception"])
def test_covers_while_open(shell, client, by):
    """Only calls that start while the charge is open are covered, also in tasks that outlive it."""

    async def scenario():
        try:
            async with shell.block(charge(shell, covers_calls=True)) as entered:
                if by == "commit":
                    await shell.ask(entered, "commit")
                    await shell.wait(client.responses.create(**RESPONSE))
                elif by == "exception":
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        if by != "commit":
            async with shell.block(bill_to("ada")):
                await shell.wait(client.responses.create(**RESPONSE))

    shell.play(scenario())
    (event,) = events(shell, "ada", "generations")
    assert (1, None) == (event.amount, event.parent)


def test_covers_tasks(provider, billing):
    """Tasks started inside are covered while the charge is open, and pay for themselves after it."""

    async def scenario():
        paused, go = asyncio.Event(), asyncio.Event()
        async with AsyncMeteredOpenAI(
            billing=billing, base_url=provider.base_url, api_key="k", max_retries=0
        ) as client:

            async def later():
                await client.responses.create(**RESPONSE)
                paused.set()
                await go.wait()
                await client.responses.create(**RESPONSE)

            async with billing.charge("ada", "reports", amount=5, covers_calls=True):
                task = asyncio.create_task(later())
                await paused.wait()
            go.set()
            await task

    asyncio.run(scenario())
    assert [0, 1] == [event.amount for event in billing.usage_events("ada", "generations")]


def test_covered_stream(shell, client):
    """A stream that starts inside is covered wherever it ends."""

    async def scenario():
        async with shell.block(charge(shell, covers_calls=True)):
            stream = await shell.wait(client.chat.completions.create(**CHAT, stream=True))
        if shell.is_async:
            async for _ in stream:
                pass
        else:
            for _ in stream:
                pass

    shell.play(scenario())
    (event,) = events(shell, "ada", "generations")
    assert 0 == event.amount


def test_covered_calls_still_fail(shell, client, ledger):
    """A covered call that fails is released like any other, and the block decides what that means."""
    shell.provider.answer(status=400)

    async def scenario():
        async with shell.block(charge(shell, covers_calls=True)):
            with pytest.raises(Exception, match="400"):
                await shell.wait(client.responses.create(**RESPONSE))

    shell.play(scenario())
    assert ["place", "place", "release", "settle"] == ledger.kinds
    assert (5, 0, 5) == numbers(shell)


def test_nested_charges(shell, client):
    """The innermost charge of the customer covers."""

    async def scenario():
        async with (
            shell.block(charge(shell, covers_calls=True)),
            shell.block(charge(shell, amount=2, covers_calls=True)) as inner,
        ):
            await shell.wait(client.responses.create(**RESPONSE))
        return inner

    inner = shell.play(scenario())
    (event,) = events(shell, "ada", "generations")
    assert inner.event.hold_id == event.parent


def test_covers_nobody_by_default(shell, client):
    """Without `covers_calls` a charge says nothing about calls."""

    async def scenario():
        async with shell.block(charge(shell)) as entered:
            assert None is entered.receipt
            with pytest.raises(ConfigurationError, match="no customer"):
                await shell.wait(client.responses.create(**RESPONSE))

    shell.play(scenario())


def test_closed_billing(make_billing):
    """On a closed billing a charge cannot be entered."""
    billing = make_billing()
    billing.close()

    with pytest.raises(BillingUnavailableError, match="closed"), billing.charge("ada", "reports", amount=1):
        raise AssertionError
