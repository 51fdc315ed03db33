"""`FakeFlowglad` beyond what was observed case by case: faults on demand, the operator's side, other processes, the fixture."""

from __future__ import annotations

import threading
import time

import httpx
import pytest

from metered_ai.services.flowglad import Flowglad
from metered_ai.testing import FakeFlowglad
from metered_ai.testing.flowglad import Fault, FlowgladProcess
from tests.services.conftest import usage_event
from tests.testing.test_plugin import project, run  # noqa: F401  a fixture

pytest_plugins = ["pytester"]


@pytest.fixture
def fake():
    with FakeFlowglad() as fake:
        fake.add_meter("generations")
        fake.add_customer("ada", credits={"generations": 10})
        yield fake


@pytest.fixture
def client(fake):
    with httpx.Client(base_url=f"{fake.url}/api/v1", headers={"authorization": fake.key}) as client:
        yield client


def post(client, fake, transaction_id="t1", amount=1, customer="ada", **fields):
    event = {"amount": amount, "subscriptionId": fake.subscription_id(customer), "transactionId": transaction_id}
    return client.post("/usage-events", json={"usageEvent": {"usageMeterSlug": "generations", **event, **fields}})


def test_faults(client, fake):
    """Faults are taken in turn, so often as was said, by the path that was said; then answers are good again."""
    fake.fault(status=429, retry_after=3, times=2, path="/usage-events")
    fake.fault(status=500, body={"error": "no"})
    answers = [client.get("/customers/ada"), post(client, fake), post(client, fake), post(client, fake)]

    assert [500, 429, 429, 200] == [each.status_code for each in answers]
    assert ("3", {"error": "no"}) == (answers[1].headers["retry-after"], answers[0].json())
    assert [500, 429, 429, 200] == [each.status for each in fake.requests]
    with pytest.raises(TypeError):
        fake.fault(statsu=500)


@pytest.mark.parametrize("is_done", [False, True])
def test_reset(client, fake, is_done):
    """A reset comes instead of an answer, whether it was done or not."""
    fake.fault(reset=True, is_done=is_done)
    with pytest.raises(httpx.ReadError):
        post(client, fake)

    assert is_done == bool(fake.recorded("ada"))


def test_cut(client, fake):
    """An answer that is cut off was done, and is no whole one."""
    fake.fault(cut=True)
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        post(client, fake)

    assert 1 == len(fake.recorded())


def test_garbage(client, fake):
    """Garbage is a page with 200, and nothing is done."""
    fake.fault(garbage=True)
    answer = post(client, fake)

    assert (200, "text/html", []) == (answer.status_code, answer.headers["content-type"], fake.recorded())


def test_drip(client, fake):
    """A drip is the whole answer, byte by byte."""
    fake.fault(drip=0.0001)

    assert "t1" == post(client, fake).json()["usageEvent"]["transactionId"]


def test_twice(client, fake):
    """A request that arrives twice is answered as the second one is, and recorded once."""
    fake.fault(times_done=2)

    assert 200 == post(client, fake).status_code
    assert (1, 9) == (len(fake.recorded()), fake.balance("ada", "generations"))
    fake.fault(times_done=2)
    body = {"customer": {"externalId": "bob", "name": "Bob", "email": "b@example.com"}}
    assert 409 == client.post("/customers", json=body).status_code


def test_gate(client, fake):
    """A gate holds a request back before it is done, or its answer after."""
    for is_done in (False, True):
        gate = threading.Event()
        fake.fault(Fault(gate=gate, is_done=is_done))
        before, count = len(fake.recorded()), len(fake.requests)
        asked = threading.Thread(target=post, args=(client, fake, f"t{is_done}"))
        asked.start()
        if is_done:
            fake.wait_for_requests(count + 1)
        assert before + is_done == len(fake.recorded())
        gate.set()
        asked.join()

    assert {"tFalse", "tTrue"} == {each["transactionId"] for each in fake.recorded()}


def test_down(client, fake):
    """While it is down every connection is reset, those that were open, too."""
    post(client, fake)
    with fake.down():
        for _ in range(3):
            with pytest.raises(httpx.TransportError):
                post(client, fake, "t2")

    assert 200 == post(client, fake, "t2").status_code


def test_storm(fake):
    """In a storm the same seed makes the same faults; whatever goes wrong, repeated events are each there once."""
    fake.be_faulty(0.5, seed=3)
    service = Flowglad(fake.key, fake.url, timeout=2)
    seen = set()
    for at in range(30):
        event = usage_event(f"t{at}", reference=fake.subscription_id("ada"))
        for _ in range(50):
            delivery = service.write_usage_event(event)
            seen.add(delivery.outcome)
            if delivery.outcome == "recorded":
                break

    assert {"again", "recorded"} == seen
    assert {f"t{at}" for at in range(30)} == {each["transactionId"] for each in fake.recorded()}
    assert (30, -20) == (len(fake.recorded()), fake.balance("ada", "generations"))
    assert len(fake.requests) > 40


def test_wait(fake):
    """Waiting for requests that do not come is a TimeoutError."""
    with pytest.raises(TimeoutError, match="1 requests did not come"):
        fake.wait_for_requests(1, timeout=0.05)


def test_close(fake):
    """When it is closed its threads are gone and nobody listens; closing twice changes nothing."""
    service = Flowglad(fake.key, fake.url)
    assert 10 == service.read_balance("ada", "generations").available
    fake.close()
    fake.close()
    deadline = time.monotonic() + 5
    while any("fake-flowglad" in each.name or "process_request" in each.name for each in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(httpx.ConnectError):
        httpx.get(fake.url)


def test_empty_transaction_id(client, fake):
    """An empty transaction id is answered with a stranger's event, and recorded for nobody."""
    fake.add_customer("bob")
    post(client, fake, "b1", 3, "bob")
    answer = post(client, fake, "")

    assert ("b1", 3) == (answer.json()["usageEvent"]["transactionId"], answer.json()["usageEvent"]["amount"])
    assert [] == fake.recorded("ada")


def test_ended_subscription(client, fake):
    """An event for a subscription that was replaced is answered 200, outside any billing period, and leaves the new balance alone."""
    fake.add_plan("pro", credits={"generations": 5}, unit_price=100)
    old = fake.subscription_id("ada")
    new = fake.upgrade("ada", "pro")
    answer = post(client, fake, subscriptionId=old)

    assert (200, None) == (answer.status_code, answer.json()["usageEvent"]["billingPeriodId"])
    assert (new, 5) == (fake.subscription_id("ada"), fake.balance("ada", "generations"))


def test_distinct(client, fake):
    """On a meter that counts distinct properties an equal second event is recorded and moves no balance; without properties it is a 500."""
    fake.add_meter("users", aggregation="count_distinct_properties")
    for at, properties in enumerate([{"user": 1}, {"user": 1}, {"user": 2}]):
        assert 200 == post(client, fake, f"t{at}", usageMeterSlug="users", properties=properties).status_code
    bare = post(client, fake, "t9", usageMeterSlug="users")

    assert (-2, 500) == (fake.balance("ada", "users"), bare.status_code)
    assert "Invalid properties" in bare.json()["error"]


def test_slash(client, fake):
    """A customer id with a slash can be made, and is never found again."""
    body = {"customer": {"externalId": "a/b", "name": "A", "email": "a@example.com"}}

    assert [200, 404, 404] == [
        client.post("/customers", json=body).status_code,
        client.get("/customers/a%2Fb/usage-balances").status_code,
        client.get("/customers/a/b/usage-balances").status_code,
    ]


def test_keys(client, fake):
    """The bare key is as good as with Bearer; bearer is a 500; another key or none is a 401 in plain text."""
    for given, status in (
        (fake.key, 200),
        (f"Bearer {fake.key}", 200),
        (f"bearer {fake.key}", 500),
        ("x", 401),
        ("", 401),
    ):
        answer = client.get("/usage-meters", headers={"authorization": given})
        assert status == answer.status_code
        assert status != 401 or "text/plain" in answer.headers["content-type"]


def test_pages(client, fake):
    """Lists come in pages, oldest first; the cursor leads on, and nonsense is refused."""
    for at in range(5):
        post(client, fake, f"t{at}")
    seen, cursor = [], None
    while True:
        page = client.get("/usage-events", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        seen += [each["transactionId"] for each in page["data"]]
        cursor = page["nextCursor"]
        if not page["hasMore"]:
            break

    assert [f"t{at}" for at in range(5)] == seen
    assert (None, 400) == (cursor, client.get("/usage-events", params={"cursor": "x"}).status_code)


def test_unknown_names(fake):
    """The operator's mistakes are errors that name them."""
    for mistake in (
        lambda: fake.grant("ada", "nope", 1),
        lambda: fake.upgrade("ada", "nope"),
        lambda: fake.balance("nobody", "generations"),
    ):
        with pytest.raises(LookupError, match=r"nope|nobody"):
            mistake()


def test_process():
    """A Flowglad in a process of its own has the customers that were asked for, and its storm."""
    with FlowgladProcess({"ada": 7, "bob=1": 3}, faults=0.3, seed=1) as server:
        service = Flowglad(server.key, server.base_url)
        balances = [service.read_balance(name, "generations").available for name in ("ada", "bob=1")]

    assert [7, 3] == balances


def test_fixture(project):  # noqa: F811  as above
    """The `flowglad` fixture is a fresh one for each test, which whatever the application builds finds in the environment."""
    result = run(
        project,
        """
        import os
        import pytest
        from metered_ai.services.flowglad import Flowglad

        @pytest.mark.parametrize("attempt", [1, 2])
        def test_ada(flowglad, attempt):
            flowglad.add_customer("ada", credits={"generations": 5})
            service = Flowglad()
            service.verify_webhook(*flowglad.webhook("customer.created", "ada"))

            assert 5 == service.read_balance("ada", "generations").available
            assert 2 == len(flowglad.requests)
            service.close()

        def test_after():
            assert not [name for name in os.environ if name.startswith("FLOWGLAD_")]
        """,
    )

    result.assert_outcomes(passed=3)


def test_described(project):  # noqa: F811  as above
    """`pytest --fixtures` says what it is."""
    run(project, "", "--fixtures").stdout.fnmatch_lines(["flowglad -- *", "    A Flowglad on loopback that answers*"])
