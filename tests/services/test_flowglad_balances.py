"""`Flowglad` as a place to ask: settings, balances, plans, features, checkouts, customers."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import httpx
import pytest

from metered_ai import BillingUnavailableError, ConfigurationError, FeatureRequiredError, NoSubscriptionError
from metered_ai.services import BulkBillingService, ServiceBalance
from metered_ai.services.flowglad import MAX_EVENT_AMOUNT, Flowglad
from metered_ai.services.flowglad_answers import BalanceRow, Billing, Subscription, charged_row

KEY = "sk_test_verySecretIndeed"


def wide(fake):
    """How often the wide answer was asked for."""
    return sum(each.path.endswith("/billing") for each in fake.requests)


# Settings.


@pytest.mark.parametrize("key", ["", "pk_test_abc", "sk_prod_abc", "sk_test_with space", "sk_test_line\n", "sk_test_ü"])
def test_bad_key(key):
    """A key that is none is refused at construction, and not shown."""
    with pytest.raises(ConfigurationError) as refused:
        Flowglad(key)

    assert not key or key not in str(refused.value)


def test_environment(monkeypatch):
    """Key and address come from the environment; without a key nothing is built; the hosted service is the default."""
    with pytest.raises(ConfigurationError, match="FLOWGLAD_SECRET_KEY"):
        Flowglad()
    monkeypatch.setenv("FLOWGLAD_SECRET_KEY", "sk_live_abc")

    assert "flowglad app.flowglad.com live" == Flowglad().name
    monkeypatch.setenv("FLOWGLAD_BASE_URL", "https://billing.example.com:8443/")
    assert "flowglad billing.example.com:8443 live" == Flowglad().name


@pytest.mark.parametrize(
    ("base_url", "name"),
    [
        ("https://Example.com", "flowglad example.com test"),
        ("https://example.com/api/v1", "flowglad example.com test"),
        ("https://example.com/api/v1/", "flowglad example.com test"),
        ("http://127.0.0.1:3000/flowglad", "flowglad 127.0.0.1:3000/flowglad test"),
    ],
)
def test_name(base_url, name):
    """The name tells the host and the mode, so that test and live data do not get mixed; the same address has one name."""
    service = Flowglad(KEY, base_url)

    assert name == service.name
    assert f"<Flowglad {name.removeprefix('flowglad ')}>" == repr(service)
    assert service.is_test


@pytest.mark.parametrize(
    "base_url",
    [
        "example.com",
        "ftp://example.com",
        "https://",
        "https://u:pw@example.com",
        "https://e.com?a=b",
        "https://e.com:x",
    ],
)
def test_bad_base_url(base_url):
    """An address that is none is refused, and a password in it is not shown."""
    with pytest.raises(ConfigurationError) as refused:
        Flowglad(KEY, base_url)

    assert "pw" not in str(refused.value)


@pytest.mark.parametrize(
    "options",
    [
        {"on_missing_meter": "maybe"},
        {"meters_by": "name"},
        {"prices_by": "name"},
        {"timeout": 0},
        {"timeout": True},
        {"timeout": "5"},
        {"timeout": float("nan")},
        {"plan_age": -1},
        {"unlimited_feature": 3},
    ],
)
def test_bad_settings(options):
    """A setting that cannot be is refused by its name."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Flowglad(KEY, **options)


def test_protocol(service):
    """It is a billing service that takes usage events in bulk, too."""
    assert isinstance(service, BulkBillingService)


@pytest.mark.parametrize("customer", ["a/b", "/", ".", ".."])
def test_check_customer(service, fake, customer):
    """A customer id that the server stores and never finds again is refused with the reason, before anything is sent."""
    for ask in (
        lambda: service.check(customer, "generations", 1),
        lambda: service.read_balance(customer, "generations"),
        lambda: service.has_feature(customer, "fast"),
        lambda: service.ensure_customer(customer, name="A", email="a@example.com"),
        lambda: service.checkout_url(customer, price_slug="pro", success_url="http://e.com", cancel_url="http://e.com"),
    ):
        with pytest.raises(ValueError, match="never find it again"):
            ask()

    assert [] == fake.requests


def test_check_amount(service):
    """A hold above 2^31-1 is refused by its number, one of that is not."""
    service.check("ada", "generations", MAX_EVENT_AMOUNT)
    with pytest.raises(ValueError, match="2147483648"):
        service.check("ada", "generations", MAX_EVENT_AMOUNT + 1)


# Balances.


def test_balance(service, fake):
    """Credits, the subscription they are on, and what the plan gave."""
    subscription = fake.subscription_id("ada")

    assert ServiceBalance(100, subscription, 100) == service.read_balance("ada", "generations")
    fake.grant("ada", "generations", -30)
    assert ServiceBalance(70, subscription, 100) == service.read_balance("ada", "generations")


def test_debt(service, fake):
    """A debt is below zero, so that later grants are known to be eaten by it."""
    fake.grant("ada", "generations", -109)

    assert -9 == service.read_balance("ada", "generations").available


def test_top_up(service, fake):
    """A top-up is seen at once, and never makes the limit less than what is available."""
    service.read_balance("ada", "generations")
    fake.grant("ada", "generations", 50)

    assert ServiceBalance(150, fake.subscription_id("ada"), 150) == service.read_balance("ada", "generations")


@pytest.mark.parametrize("customer", ["a b", "100%", "a?b", "a#b", "ä@b.example", "a%2Fb", "...", "a+b", "😀"])
def test_customer_ids(service, fake, customer):
    """Customers are found whatever characters are in their ids."""
    assert service.ensure_customer(customer, name="A", email="a@example.com")

    assert ServiceBalance(100, fake.subscription_id(customer), 100) == service.read_balance(customer, "generations")


def test_unknown_customer(service):
    """A customer that Flowglad does not know has no plan: 402, and the message says what to do."""
    with pytest.raises(NoSubscriptionError, match="ensure_customer") as refused:
        service.read_balance("bob", "generations")

    assert (402, "bob", "generations", 0) == (
        refused.value.http_status,
        refused.value.customer,
        refused.value.meter,
        refused.value.available,
    )


def test_no_subscription(service, fake):
    """A customer without a current subscription has no plan."""
    fake.cancel("ada")

    with pytest.raises(NoSubscriptionError, match="no current subscription"):
        service.read_balance("ada", "generations")


def test_archived(service, fake):
    """An archived customer is unknown."""
    fake.archive("ada")

    with pytest.raises(NoSubscriptionError):
        service.read_balance("ada", "generations")


def test_missing_meter_refused(service, fake):
    """A meter never granted and never used has nothing available; many questions about it ask for the plans once."""
    fake.add_meter("images")

    assert [ServiceBalance(0, fake.subscription_id("ada"), 0)] * 3 == [
        service.read_balance("ada", "images") for _ in range(3)
    ]
    assert 1 == wide(fake)


def test_missing_meter_allowed(fake):
    """With on_missing_meter="allow" it refuses nothing, and is charged to the plan of now, never to one that was known."""
    fake.add_meter("images")
    fake.add_plan("pro")
    service = Flowglad(fake.key, fake.url, on_missing_meter="allow")
    first = fake.subscription_id("ada")

    assert ServiceBalance(None, first) == service.read_balance("ada", "images")
    second = fake.upgrade("ada", "pro")
    assert first != second
    assert ServiceBalance(None, second) == service.read_balance("ada", "images")


def test_meters_by_id(fake):
    """With meters_by="id" meters go by Flowglad's own ids."""
    service = Flowglad(fake.key, fake.url, meters_by="id")

    assert 100 == service.read_balance("ada", fake.books.meter("generations")["id"]).available
    assert 0 == service.read_balance("ada", "generations").available


def test_unlimited(fake):
    """A named toggle feature makes a meter unlimited: every meter, or those of a mapping."""
    fake.add_meter("images")
    fake.add_plan("pro", credits={"generations": 5}, features=("unlimited_images",))
    pro = fake.upgrade("ada", "pro")
    fake.add_customer("bob")
    for feature, expected in (
        ("unlimited_images", [None, None]),
        ({"images": "unlimited_images"}, [5, None]),
        ({"generations": "unlimited_images"}, [None, 0]),
        ("another", [5, 0]),
    ):
        service = Flowglad(fake.key, fake.url, unlimited_feature=feature)
        balances = [service.read_balance("ada", meter) for meter in ("generations", "images")]

        assert expected == [balance.available for balance in balances]
        assert {pro} == {balance.reference for balance in balances}
        assert 100 == service.read_balance("bob", "generations").available


@pytest.mark.parametrize("name", ["expiredAt", "detachedAt"])
def test_toggle_over(fake, name):
    """A toggle that expired or was taken off makes nothing unlimited."""
    fake.add_plan("pro", credits={"generations": 5}, features=("all_you_can_eat",))
    fake.upgrade("ada", "pro")
    for item in fake.books.customers["ada"].current[0].features:
        item[name] = int(time.time() * 1000) - 1000
    service = Flowglad(fake.key, fake.url, unlimited_feature="all_you_can_eat")

    assert 5 == service.read_balance("ada", "generations").available
    assert not service.has_feature("ada", "all_you_can_eat")


def test_several_subscriptions(service, fake):
    """With several subscriptions the newest is checked and charged, in whatever order they come."""
    fake.add_plan("basic", credits={"generations": 7}, unit_price=100)
    fake.add_plan("extra", credits={"generations": 3}, unit_price=100)
    fake.upgrade("ada", "basic")
    newest = fake.subscribe("ada", "extra")
    fake.books.customers["ada"].current[-1].wire["createdAt"] += 1000
    for _ in range(2):
        assert ServiceBalance(3, newest, 3) == service.read_balance("ada", "generations")
        fake.books.customers["ada"].subscriptions.reverse()

    assert 1 == wide(fake)


def test_only_older_has_meter(service, fake):
    """If only another current subscription has the meter, that one is checked and charged."""
    fake.add_plan("extra", unit_price=100)
    fake.add_plan("basic", credits={"generations": 7}, unit_price=100)
    older = fake.upgrade("ada", "basic")
    fake.subscribe("ada", "extra")

    assert older == service.read_balance("ada", "generations").reference


def test_newest_of_the_others():
    """If the newest subscription does not have the meter, the next newest that does is charged, in whatever order they come."""

    def made(id, at):
        return Subscription(id=id, created_at=at)

    def row(id):
        return BalanceRow(id="m", slug="generations", available=1, subscription_id=id)

    for others in permutations([made("a", 1), made("b", 3), made("c", 2), made("d", 4)]):
        billing = Billing(current=made("d", 4), all_current=list(others))
        assert "b" == charged_row([row("a"), row("b"), row("c")], billing).subscription_id
    assert None is charged_row([row("x"), row("y")], Billing())
    assert "x" == charged_row([row("x")], None).subscription_id


def test_upgrade(service, fake):
    """An upgrade, which makes a new subscription, is seen at once: id, credits and limit are the new one's."""
    fake.add_plan("pro", credits={"generations": 1000}, unit_price=2000)
    service.read_balance("ada", "generations")
    forget_recent(service)
    pro = fake.upgrade("ada", "pro")

    assert ServiceBalance(1000, pro, 1000) == service.read_balance("ada", "generations")


def forget_recent(service):
    """As if what is known had been asked a quarter of an hour ago."""
    for customer, plans in list(service._plans.items()):
        service._plans[customer] = type(plans)(plans.billing, plans.asked_at - 900)


def test_wide_answer_is_rare(service, fake):
    """The wide answer is asked for once in `plan_age`, and not at all where nobody needs it."""
    for _ in range(5):
        service.read_balance("ada", "generations")
        forget_recent(service)
    assert 2 == wide(fake)  # 5 quarters of an hour

    thrifty = Flowglad(fake.key, fake.url, estimate_limits=False)
    assert ServiceBalance(100, fake.subscription_id("ada")) == thrifty.read_balance("ada", "generations")
    eager = Flowglad(fake.key, fake.url, plan_age=0)
    eager.read_balance("ada", "generations")
    eager.read_balance("ada", "generations")
    assert 4 == wide(fake)


def test_limit_is_a_luxury(service, fake):
    """If only the limit wants the wide answer and it does not come, the balance is told without it, and it is not asked for again at once."""
    fake.fault(status=503, times=3, path="/customers/ada/billing")

    assert ServiceBalance(100, fake.subscription_id("ada")) == service.read_balance("ada", "generations")
    assert None is service.read_balance("ada", "generations").limit
    assert 3 == wide(fake)


def test_feature_is_no_luxury(fake):
    """If the wide answer decides and it does not come, nothing is said."""
    service = Flowglad(fake.key, fake.url, unlimited_feature="fast")
    fake.fault(status=503, times=3, path="/customers/ada/billing")

    with pytest.raises(BillingUnavailableError, match="503"):
        service.read_balance("ada", "generations")


# No answer.


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500},
        {"status": 502},
        {"status": 429},
        {"status": 408},
        {"status": 429, "retry_after": 0.01},
        {"reset": True},
        {"cut": True},
    ],
    ids=str,
)
def test_repeated(service, fake, fault):
    """A question that got no answer is asked again, up to three times in all."""
    fake.fault(**fault, times=2)
    assert 100 == service.read_balance("ada", "generations").available

    before = len(fake.requests)
    fake.fault(**fault, times=5, path="/customers/ada/usage-balances")
    with pytest.raises(BillingUnavailableError) as failed:
        service.read_balance("ada", "generations")
    assert (3, 503) == (len(fake.requests) - before, failed.value.http_status)


@pytest.mark.parametrize("status", [400, 401, 403, 302, 307, 418])
def test_refused(service, fake, status):
    """A refusal is not repeated, nor a redirect followed."""
    fake.fault(status=status, body="no")

    with pytest.raises(BillingUnavailableError, match=str(status)):
        service.read_balance("ada", "generations")
    assert 1 == len(fake.requests)


def test_wrong_address(fake):
    """An address under which there is no Flowglad is no answer; it does not make every customer an unknown one."""
    with pytest.raises(BillingUnavailableError, match="404"):
        Flowglad(fake.key, f"{fake.url}/elsewhere").read_balance("ada", "generations")
    fake.requests.clear()


def test_wrong_key(fake):
    """A wrong key is said in Flowglad's words, and not shown."""
    with pytest.raises(BillingUnavailableError, match="API key invalid") as refused:
        Flowglad(KEY, fake.url).read_balance("ada", "generations")

    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    "body",
    ["<html>", "null", "[]", "{", '{"usageMeterBalances": 3}', '{"usageMeterBalances": [{"slug": "generations"}]}'],
)
def test_garbage(service, fake, body):
    """A 200 that is no balance is no answer, and is not shown."""
    fake.fault(status=200, body=body)

    with pytest.raises(BillingUnavailableError, match="something else than Balances"):
        service.read_balance("ada", "generations")


def test_balance_is_a_whole_number(service, fake):
    """A balance that is no whole number is no balance: nothing is rounded, nothing taken for one."""
    for value in (1.5, "100", None, True):
        row = {"id": "m", "slug": "generations", "availableBalance": value, "subscriptionId": "sub_1"}
        fake.fault(status=200, body={"usageMeterBalances": [row]})
        with pytest.raises(BillingUnavailableError):
            service.read_balance("ada", "generations")


@pytest.mark.parametrize("at", ["headers", "body"])
def test_slow_drip(fake, at):
    """An answer that comes byte by byte ends with the deadline, not with its last byte, whether in its headers or in its body."""
    service = Flowglad(fake.key, fake.url, timeout=0.4)
    start = time.monotonic()
    fake.fault(drip=0.01 if at == "body" else 0.15)
    with pytest.raises(BillingUnavailableError, match="in time"):
        service.read_balance("ada", "generations")

    # Each byte comes well within any time-out of its own; all of them take ten seconds and more.
    assert time.monotonic() - start < 5


def test_silence():
    """A server that takes the connection and says nothing is left at the deadline."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        service = Flowglad(KEY, f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.2)
        with pytest.raises(BillingUnavailableError, match="in time"):
            service.read_balance("ada", "generations")


def test_silent_handshake():
    """A server that takes the connection and never finishes the TLS handshake is left at the deadline."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        service = Flowglad(KEY, f"https://127.0.0.1:{listener.getsockname()[1]}", timeout=0.2)
        with pytest.raises(BillingUnavailableError, match="in time"):
            service.read_balance("ada", "generations")


def test_nobody_there():
    """Where nobody listens there is no connection, and the error says so."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    with pytest.raises(BillingUnavailableError, match="no connection"):
        Flowglad(KEY, f"http://127.0.0.1:{port}", timeout=1).read_balance("ada", "generations")


def test_endless(service, fake):
    """An answer without end is not read to its end."""
    fake.fault(status=200, body={"usageMeterBalances": ["x" * (1 << 20)]}, times=3)

    with pytest.raises(BillingUnavailableError, match="longer than 1048576"):
        service.read_balance("ada", "generations")


def test_long_retry_after(service, fake):
    """Who is told to wait longer than a question may take gives up at once."""
    fake.fault(status=429, retry_after=60)
    start = time.monotonic()
    with pytest.raises(BillingUnavailableError):
        service.read_balance("ada", "generations")

    assert 1 == len(fake.requests)
    assert time.monotonic() - start < 5


def test_scrubbed(fake, caplog):
    """The key is in no error, repr or log line, even where the server repeats it; what is said is cut at 500 characters."""
    service = Flowglad(fake.key, fake.url)
    caplog.set_level(logging.DEBUG)
    said = []
    for body in (
        f"key {fake.key}",
        {"error": f"{fake.key} {'x' * 900}"},
        f"Bearer {fake.key[:-3]}",
        f"{'y' * 490}{fake.key}",
    ):
        fake.fault(status=401, body=body)
        with pytest.raises(BillingUnavailableError) as refused:
            service.read_balance("ada", "generations")
        said += [str(refused.value), repr(refused.value), repr(service), str(vars(service.__class__))]
    service.read_balance("ada", "generations")

    assert "sk_test_" not in "".join(said[:3]) + caplog.text
    assert max(map(len, said[:3])) < 600


# Connections.


def test_fork(service, fake):
    """After a fork parent and child both go on, each with connections of its own."""
    service.read_balance("ada", "generations")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            available = service.read_balance("ada", "generations").available
            os.write(writer, str(available).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as said:
        assert "100" == said.read()
    assert 0 == os.waitpid(child, 0)[1]
    assert 100 == service.read_balance("ada", "generations").available


def test_fork_with_taken_lock(service, fake):
    """A lock that another thread had at the fork does not stop the child."""
    service.read_balance("ada", "generations")
    with service._http._own.lock:
        child = os.fork()
        if child == 0:
            status = 1
            signal.alarm(20)  # A child that waits for ever is a failure, not a hang.
            try:
                status = 0 if service.read_balance("ada", "generations").available == 100 else 2
            finally:
                os._exit(status)
    assert 0 == os.waitpid(child, 0)[1]


def test_own_client(fake):
    """A client of the caller's is used and left open; in a forked child it is refused, as nobody else can replace it."""
    with httpx.Client(headers={"x-mine": "yes"}) as client:
        service = Flowglad(fake.key, fake.url, http_client=client)
        assert 100 == service.read_balance("ada", "generations").available
        service.close()
        assert not client.is_closed

        service = Flowglad(fake.key, fake.url, http_client=client)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                service.read_balance("ada", "generations")
            except ConfigurationError:
                status = 0
            finally:
                os._exit(status)
        assert 0 == os.waitpid(child, 0)[1]


def test_close(service):
    """Closing twice changes nothing; afterwards there is no answer."""
    service.read_balance("ada", "generations")
    service.close()
    service.close()

    with pytest.raises(BillingUnavailableError, match="closed"):
        service.read_balance("ada", "generations")


def test_threads(service):
    """Many threads ask at once and each gets its answer."""
    with ThreadPoolExecutor(16) as pool:
        balances = list(pool.map(lambda _: service.read_balance("ada", "generations").available, range(64)))

    assert [100] * 64 == balances


# What an application asks.


def test_ensure_customer(service, fake):
    """A new customer is made once, with the default plan's credits; the second time nothing happens."""
    assert [True, False] == [service.ensure_customer("bob", name="Bob", email="bob@example.com") for _ in range(2)]
    assert 100 == fake.balance("bob", "generations")
    assert 1 == sum(each.method == "POST" for each in fake.requests)


def test_ensure_customer_at_once(service, fake):
    """If somebody else makes the customer in the same moment, that is as good."""
    unknown = {"error": "Customer with externalId ada not found", "code": "NOT_FOUND"}
    fake.fault(status=404, body=unknown, path="/customers/ada")

    assert not service.ensure_customer("ada", name="Ada", email="ada@example.com")
    assert [404, 409, 200] == [each.status for each in fake.requests]


def test_ensure_customer_taken(service, fake):
    """A name that is taken and cannot be found is said to be so."""
    unknown = {"error": "Customer with externalId ada not found", "code": "NOT_FOUND"}
    fake.fault(status=404, body=unknown, path="/customers/ada", times=2)

    with pytest.raises(ConfigurationError, match="neither made nor found"):
        service.ensure_customer("ada", name="Ada", email="ada@example.com")


def test_ensure_customer_refused(service, fake):
    """What the server finds wrong with a customer is a ValueError in its words; no answer is none."""
    unknown = {"error": "Customer with externalId bob not found", "code": "NOT_FOUND"}
    issue = {"path": ["customer", "email"], "message": "Invalid email"}
    fake.fault(status=404, body=unknown)
    fake.fault(status=400, body={"error": [issue], "code": "BAD_REQUEST"})
    with pytest.raises(ValueError, match=r"customer.email: Invalid email"):
        service.ensure_customer("bob", name="Bob", email="bob")

    for status in (503, 401):
        fake.fault(status=404, body=unknown)
        fake.fault(status=status)
        with pytest.raises(BillingUnavailableError, match=str(status)):
            service.ensure_customer("bob", name="Bob", email="bob@example.com")


def test_new_customer_is_seen(service):
    """A customer who was refused for being unknown is let in as soon as they are made."""
    with pytest.raises(NoSubscriptionError):
        service.read_balance("bob", "images")
    assert not service.has_feature("bob", "fast")
    service.ensure_customer("bob", name="Bob", email="bob@example.com")

    assert 100 == service.read_balance("bob", "generations").available


def test_checkout_url(service, fake):
    """The address of a checkout for a price, by slug or id."""
    price = fake.books.product("free")["prices"][0]["id"]
    urls = [
        service.checkout_url(
            "ada", **by, success_url="https://e.com/ok", cancel_url="https://e.com/no", quantity=quantity
        )
        for by, quantity in (({"price_slug": "free"}, None), ({"price_id": price}, 2))
    ]

    assert [f"{fake.url}/checkout/{each['id']}" for each in fake.books.sessions] == urls
    assert [1, 2] == [each["quantity"] for each in fake.books.sessions]
    assert {price} == {each["priceId"] for each in fake.books.sessions}


@pytest.mark.parametrize("prices", [{}, {"price_slug": "a", "price_id": "b"}])
def test_checkout_needs_one_price(service, fake, prices):
    """A checkout is for one price."""
    with pytest.raises(ValueError, match="exactly one"):
        service.checkout_url("ada", **prices, success_url="https://e.com", cancel_url="https://e.com")

    assert [] == fake.requests


@pytest.mark.parametrize(
    ("customer", "price", "said"), [("ada", "nope", 'slug "nope" not found'), ("bob", "free", "Invalid customer")]
)
def test_checkout_mistakes(service, customer, price, said):
    """An unknown price or customer is a mistake in the wiring, said in Flowglad's words, though Flowglad calls it its own."""
    with pytest.raises(ConfigurationError, match=said):
        service.checkout_url(customer, price_slug=price, success_url="https://e.com", cancel_url="https://e.com")


@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"status": 401}, {"reset": True}, {"garbage": True}, {"status": 500}], ids=str
)
def test_checkout_without_answer(service, fake, fault):
    """No answer is BillingUnavailableError, and the checkout is not asked for twice."""
    fake.fault(**fault)

    with pytest.raises(BillingUnavailableError):
        service.checkout_url("ada", price_slug="free", success_url="https://e.com", cancel_url="https://e.com")
    assert 1 == len(fake.requests)


def test_checkout_leads_to_a_page(service, fake):
    """What is no address of a page is not handed to a browser."""
    fake.fault(status=200, body={"url": "javascript:alert(1)"})

    with pytest.raises(BillingUnavailableError):
        service.checkout_url("ada", price_slug="free", success_url="https://e.com", cancel_url="https://e.com")


def test_features(service, fake):
    """A toggle of any current subscription counts; the answer is believed for `plan_age`, and asked anew on wish."""
    fake.add_plan("pro", features=("fast",), unit_price=100)

    assert [False, False] == [service.has_feature("ada", "fast"), service.has_feature("nobody", "fast")]
    fake.subscribe("ada", "pro")
    assert [False, True, True] == [service.has_feature("ada", "fast", refresh=each) for each in (False, True, False)]
    assert 3 == wide(fake)


def test_require_feature(service, fake):
    """Without the feature FeatureRequiredError, a 403 with both names; a feature just bought is not refused for what was known before."""
    with pytest.raises(FeatureRequiredError, match="'fast'") as refused:
        service.require_feature("ada", "fast")
    copy = pickle.loads(pickle.dumps(refused.value))
    assert (403, "ada", "fast") == (copy.http_status, copy.customer, copy.feature)

    fake.add_plan("pro", features=("fast",), unit_price=100)
    fake.subscribe("ada", "pro")
    forget_recent(service)
    service.require_feature("ada", "fast")


def test_refusals_are_cheap(service, fake):
    """Who lacks a feature and asks on does not have the wide answer read each time."""
    for _ in range(5):
        with pytest.raises(FeatureRequiredError):
            service.require_feature("ada", "fast")

    assert 1 == wide(fake)


def test_async(service, fake):
    """Each question has an async form that leaves the loop alone: it says the same."""
    fake.add_plan("pro", features=("fast",))
    gate = threading.Event()

    async def ask():
        fake.fault(gate=gate)
        asked = asyncio.create_task(service.aensure_customer("bob", name="Bob", email="b@example.com"))
        # Goes on only because the loop does.
        await asyncio.sleep(0.01)
        gate.set()
        made = await asked
        url = await service.acheckout_url(
            "bob", price_slug="pro", success_url="https://e.com", cancel_url="https://e.com"
        )
        has = await service.ahas_feature("bob", "fast"), await service.ahas_feature("bob", "fast", refresh=True)
        with pytest.raises(FeatureRequiredError):
            await service.arequire_feature("bob", "fast")
        return made, url, has

    assert (True, f"{fake.url}/checkout/{{}}", (False, False)) == _with_id(asyncio.run(ask()), fake)


def _with_id(result, fake):
    made, url, has = result
    return made, url.replace(fake.books.sessions[0]["id"], "{}"), has
