"""`Flowglad` as a place to send usage events to: what goes out, what the answers mean, one by one and in bulk."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metered_ai.services import Delivery
from metered_ai.services.bounded import Answer
from metered_ai.services.flowglad import MAX_EVENT_AMOUNT, MAX_PARTS, Flowglad
from metered_ai.services.flowglad_answers import classify, reason_of, retry_after
from metered_ai.testing import FakeFlowglad
from tests.services.conftest import NOW, usage_event

RECORDED = ("recorded", "already_there")


@pytest.fixture
def event(fake):
    """A usage event of one credit that ada was admitted to."""
    return usage_event(reference=fake.subscription_id("ada"))


def sent(fake):
    """The bodies of the usage events that were posted one by one."""
    return [each.body["usageEvent"] for each in fake.asked("/usage-events") if "usageEvent" in each.body]


def had(fake, customer="ada"):
    """What Flowglad has, as a set."""
    return {(each["transactionId"], each["amount"]) for each in fake.recorded(customer)}


# What goes out.


def test_sent(service, fake, event):
    """By the meter: its slug, amount, subscription, transaction id, and the event's own time in milliseconds. Nothing else."""
    delivery = service.write_usage_event(replace(event, amount=3, properties={"feature": "invoices"}))

    assert [
        {
            "usageMeterSlug": "generations",
            "amount": 3,
            "subscriptionId": fake.subscription_id("ada"),
            "transactionId": "gen_1",
            "usageDate": int(NOW.timestamp() * 1000),
            "properties": {"feature": "invoices"},
        }
    ] == sent(fake)
    [recorded] = fake.recorded("ada")
    assert 97 == fake.balance("ada", "generations")
    assert (
        Delivery(
            "recorded",
            details={
                "event_id": recorded["id"],
                "price_id": recorded["priceId"],
                "subscription_id": recorded["subscriptionId"],
            },
        )
        == delivery
    )


def test_identifiers(fake, event):
    """By meter or by the event's price, by slug or by id: exactly one of the four goes out, and the price it came to comes back."""
    price = fake.add_usage_price("generation_usage", "generations", 5, is_default=True)
    free = next(
        each["id"] for each in fake.books.meter("generations")["prices"] if each["slug"] == "generations_no_charge"
    )
    meter = fake.books.meter("generations")["id"]
    by_id = {"meters_by": "id", "prices_by": "id"}
    cases = [
        ({}, {}, {"usageMeterSlug": "generations"}, price),
        ({}, {"price_slug": "generations_no_charge"}, {"priceSlug": "generations_no_charge"}, free),
        (by_id, {"meter": meter}, {"usageMeterId": meter}, price),
        (by_id, {"meter": meter, "price_slug": free}, {"priceId": free}, free),
    ]
    for at, (options, fields, identifier, resolved) in enumerate(cases):
        service = Flowglad(fake.key, fake.url, **options)
        delivery = service.write_usage_event(replace(event, transaction_id=f"gen_{at}", **fields))

        assert ("recorded", resolved) == (delivery.outcome, delivery.details["price_id"])
        named = {"usageMeterSlug", "usageMeterId", "priceSlug", "priceId"} & sent(fake)[-1].keys()
        assert identifier == {name: sent(fake)[-1][name] for name in named}
    assert 96 == fake.balance("ada", "generations")


def test_nothing_to_send(service, fake, event):
    """An event of 0 credits, which Flowglad would refuse, is not sent."""
    assert "already_there" == service.write_usage_event(replace(event, amount=0)).outcome
    assert ["already_there"] == [each.outcome for each in service.write_usage_events([replace(event, amount=0)])]

    assert [] == fake.requests


def test_empty_transaction_id(service, fake, event):
    """An empty transaction id, which would be answered with a stranger's event and lost, is never sent."""
    assert "dead" == service.write_usage_event(replace(event, transaction_id="")).outcome
    assert "alone" == service.write_usage_events([replace(event, transaction_id="")])[0].outcome

    assert [] == fake.requests


def test_split(service, fake, event):
    """An amount above 2^31-1 goes out in parts, whose ids are the same each time; all of it is recorded, once."""
    big = replace(event, amount=2 * MAX_EVENT_AMOUNT + 7)
    first, second = service.write_usage_event(big), service.write_usage_event(big)

    parts = {("gen_1.part1of3", MAX_EVENT_AMOUNT), ("gen_1.part2of3", MAX_EVENT_AMOUNT), ("gen_1.part3of3", 7)}
    assert parts == had(fake)
    assert 3 == len(fake.recorded("ada"))
    assert ("recorded", first) == (first.outcome, second)
    assert [each["id"] for each in fake.recorded("ada")] == first.details["event_id"].split()


def test_largest_whole(service, fake, event):
    """2^31-1 is one event, under its own id."""
    service.write_usage_event(replace(event, amount=MAX_EVENT_AMOUNT))

    assert {("gen_1", MAX_EVENT_AMOUNT)} == had(fake)


def test_split_taken(service, fake, event):
    """If a later part is another customer's the event is put aside: of the first part Flowglad would have two under another id."""
    fake.add_customer("bob")
    bobs = replace(event, customer="bob", reference=fake.subscription_id("bob"))
    big = replace(event, amount=MAX_EVENT_AMOUNT + 1)
    service.write_usage_event(replace(bobs, transaction_id="gen_1.part2of2"))
    assert ("aside", "conflict") == ((said := service.write_usage_event(big)).outcome, said.details["cause"])

    service.write_usage_event(replace(bobs, transaction_id="gen_2.part1of2"))
    assert "taken" == service.write_usage_event(replace(big, transaction_id="gen_2")).outcome


def test_split_broken_off(service, fake, event):
    """If a part fails, the whole is sent again, and what was there already is not there twice."""
    big = replace(event, amount=MAX_EVENT_AMOUNT + 1)
    fake.fault()  # The first part goes well.
    fake.fault(status=503)
    outcomes = [service.write_usage_event(big).outcome for _ in range(2)]

    assert ["again", "recorded"] == outcomes
    assert {("gen_1.part1of2", MAX_EVENT_AMOUNT), ("gen_1.part2of2", 1)} == had(fake)


def test_too_many_parts(service, fake, event):
    """An amount that no sensible number of events can carry is a dead letter, and none of it is sent."""
    delivery = service.write_usage_event(replace(event, amount=MAX_PARTS * MAX_EVENT_AMOUNT + 1))

    assert ("dead", []) == (delivery.outcome, fake.requests)
    assert "recorded" == service.write_usage_event(replace(event, amount=MAX_PARTS * MAX_EVENT_AMOUNT)).outcome


def test_no_json(service, fake, event):
    """Properties that are no JSON make a dead letter."""
    assert "dead" == service.write_usage_event(replace(event, properties={"x": float("nan")})).outcome

    assert [] == fake.requests


# The subscription.


def test_subscription_found(service, fake):
    """An event that was recorded without asking for a balance is charged to the current subscription."""
    delivery = service.write_usage_event(usage_event())

    assert fake.subscription_id("ada") == delivery.details["subscription_id"]
    assert 99 == fake.balance("ada", "generations")


def test_subscription_kept(service, fake):
    """After an upgrade a repeat goes to the subscription of the first try: a fresh one would make a conflict of it."""
    fake.add_plan("pro", credits={"generations": 1000}, unit_price=100)
    fake.fault(reset=True, is_done=True, path="/usage-events")
    assert "again" == service.write_usage_event(usage_event()).outcome
    fake.upgrade("ada", "pro")

    assert "recorded" == service.write_usage_event(usage_event()).outcome
    assert (1, 1000) == (len(fake.recorded("ada")), fake.balance("ada", "generations"))


def test_subscription_of_the_event(service, fake, event):
    """An event goes to the subscription that its call was checked against, also when that is not the current one any more."""
    fake.add_plan("pro", credits={"generations": 1000}, unit_price=100)
    fake.upgrade("ada", "pro")

    assert "recorded" == service.write_usage_event(event).outcome
    assert [event.reference] == [each["subscriptionId"] for each in fake.recorded("ada")]
    assert 1000 == fake.balance("ada", "generations")


def test_no_subscription(service, fake):
    """Usage of a customer without a plan is a dead letter that says so; it can be sent when they have one."""
    delivery = service.write_usage_event(usage_event(customer="bob"))
    assert ("dead", "no_subscription") == (delivery.outcome, delivery.details["cause"])
    fake.add_customer("bob")

    assert "recorded" == service.write_usage_event(usage_event(customer="bob")).outcome


def test_no_subscription_known(fake):
    """Where the subscription cannot be asked for, the outcome is as for the event itself: stop on a wrong key, else again."""
    assert "stop" == Flowglad("sk_test_wrong", fake.url).write_usage_event(usage_event()).outcome
    fake.fault(reset=True, times=3)
    assert "again" == Flowglad(fake.key, fake.url).write_usage_event(usage_event()).outcome

    assert [] == fake.recorded()


# Repeats.


def test_twice(service, fake, event):
    """The same event again is there once, and is not told apart from the first time."""
    assert service.write_usage_event(event) == service.write_usage_event(event)

    assert {("gen_1", 1)} == had(fake)
    assert 99 == fake.balance("ada", "generations")


def test_other_amount(service, fake, event):
    """A transaction id that is there with another amount is answered 200 with that one: put aside, and the reason says which."""
    service.write_usage_event(event)
    delivery = service.write_usage_event(replace(event, amount=50))

    assert ("aside", "mismatch") == (delivery.outcome, delivery.details["cause"])
    assert "amount 1 instead of 50" in delivery.reason


def test_already_there(service, fake, event):
    """A transaction id that somebody else has sent for the same subscription, with the same amount, is there already."""
    service.write_usage_event(replace(event, created_at=NOW.replace(year=2025)))

    assert "already_there" == service.write_usage_event(event).outcome


def test_conflict(service, fake, event):
    """A transaction id of another customer's is taken, although Flowglad calls that its own error."""
    fake.add_customer("bob")
    service.write_usage_event(replace(event, customer="bob", reference=fake.subscription_id("bob")))
    delivery = service.write_usage_event(event)

    assert ("taken", "conflict") == (delivery.outcome, delivery.details["cause"])
    assert [] == fake.recorded("ada")


@pytest.mark.parametrize(
    "had", [{"transactionId": "gen_x"}, {"amount": 2}, {"subscriptionId": "sub_x"}, {"transactionId": ""}], ids=str
)
def test_stranger(service, fake, event, had):
    """An event whose 200 came with another one is put aside: nobody knows what became of it."""
    service.write_usage_event(event)
    [recorded] = fake.recorded("ada")
    fake.fault(status=200, body={"usageEvent": {**recorded, **had}})
    delivery = service.write_usage_event(event)

    assert ("aside", recorded["id"]) == (delivery.outcome, delivery.details["event_id"])


def test_price_of_another_meter(service, fake, event):
    """A price of another meter leaves this one's balance as it was: put aside, not taken for recorded."""
    fake.add_meter("images")
    service.read_balance("ada", "generations")
    delivery = service.write_usage_event(replace(event, price_slug="images_no_charge"))

    assert ("aside", "mismatch") == (delivery.outcome, delivery.details["cause"])


def test_twins(fake, event):
    """The same event from two senders in the same moment: one is told so, the other again; it is there once."""
    fake.pause = 0.2
    services = [Flowglad(fake.key, fake.url) for _ in range(2)]
    outcomes = []
    threads = [threading.Thread(target=lambda s=each: outcomes.append(s.write_usage_event(event))) for each in services]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {"recorded", "again"} == {each.outcome for each in outcomes}
    assert "recorded" == services[0].write_usage_event(event).outcome
    assert 1 == len(fake.recorded("ada"))


def test_lost_answer(service, fake, event):
    """An answer that gets lost is no failure: again, and it is there once."""
    for fault in ({"reset": True}, {"cut": True}, {"garbage": True}, {"status": 502}):
        fake.fault(**fault, is_done=True)
        assert "again" == service.write_usage_event(event).outcome

    assert "recorded" == service.write_usage_event(event).outcome
    assert 1 == len(fake.recorded("ada"))


# What fails.


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"status": 401, "body": "API key invalid."}, "stop"),
        ({"status": 403, "body": "no"}, "stop"),
        ({"status": 404, "body": "Not Found"}, "stop"),
        ({"status": 301, "body": ""}, "stop"),
        ({"status": 308, "body": ""}, "stop"),
        ({"status": 400}, "dead"),
        ({"status": 404}, "dead"),
        ({"status": 422}, "dead"),
        ({"status": 408}, "again"),
        ({"status": 425}, "again"),
        ({"status": 429}, "again"),
        ({"status": 500}, "again"),
        ({"status": 501}, "again"),
        ({"status": 502, "body": "<html>"}, "again"),
        ({"status": 503}, "again"),
        ({"status": 504, "body": ""}, "again"),
        ({"status": 400, "body": "<html>a proxy"}, "again"),
        ({"status": 201}, "again"),
        ({"garbage": True}, "again"),
        ({"status": 200, "body": "null"}, "again"),
        ({"status": 200, "body": {"data": {}}}, "again"),
        ({"reset": True}, "again"),
        ({"cut": True}, "again"),
    ],
    ids=str,
)
def test_outcomes(service, fake, event, fault, expected):
    """Every bad answer has its outcome; one attempt is made; nothing is raised; the next attempt records it."""
    fake.fault(**fault)
    delivery = service.write_usage_event(event)

    assert expected == delivery.outcome
    assert delivery.reason
    assert 1 == len(fake.requests)
    assert "recorded" == service.write_usage_event(event).outcome


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"meter": "nope"}, "UsageMeter not found: with slug nope"),
        ({"price_slug": "nope"}, "Price not found: with slug nope"),
        ({"price_slug": "free"}, "does not have a usage meter"),
        ({"reference": "sub_nope"}, "No subscriptions found with id: sub_nope"),
    ],
    ids=str,
)
def test_mistakes(service, event, fields, said):
    """A mistake that Flowglad calls its own error, 500, is known by its text: a dead letter that says so."""
    delivery = service.write_usage_event(replace(event, **fields))

    assert "dead" == delivery.outcome
    assert said in delivery.reason


def test_archived(service, fake, event):
    """An event for an archived customer is a dead letter."""
    fake.archive("ada")

    assert "dead" == service.write_usage_event(event).outcome


def test_blocked(service, fake, event):
    """A blocked meter parks the event with its cause; another customer's go through; once it is free so does this one."""
    fake.add_customer("bob")
    fake.block_meter("ada", "generations")
    delivery = service.write_usage_event(event)
    other = service.write_usage_event(
        replace(event, customer="bob", reference=fake.subscription_id("bob"), transaction_id="b")
    )
    fake.unblock_meter("ada", "generations")

    assert ("park", "blocked") == (delivery.outcome, delivery.details["cause"])
    assert ["recorded"] * 2 == [other.outcome, service.write_usage_event(event).outcome]


def test_retry_after(service, fake, event):
    """How long to wait is handed on, as a number or a date, and is never more than 300 s."""
    for seconds, expected in ((7, 7.0), (0.5, 0.5), (4000, 300.0)):
        fake.fault(status=429, retry_after=seconds)
        assert expected == service.write_usage_event(event).retry_after

    def answer(value):
        return Answer(429, {"retry-after": value}, b"")

    assert 20.0 == retry_after(answer("Mon, 23 Nov 2026 12:00:20 GMT"), 1795435200.0)
    assert 0.0 == retry_after(answer("Mon, 23 Nov 2026 11:00:20 GMT"), 1795435200.0)
    assert [None] * 4 == [retry_after(answer(value), 0.0) for value in ("", "soon", "-1", "1.2.3")]


def test_slow_drip(fake, event):
    """An answer that comes byte by byte ends with the deadline."""
    service = Flowglad(fake.key, fake.url, timeout=0.3)
    fake.fault(drip=0.02)

    assert Delivery("again", "no answer in time") == service.write_usage_event(event)


def test_down(service, fake, event):
    """While Flowglad is down everything is to be sent again, and nothing is raised."""
    with fake.down():
        assert ["again"] * 3 == [service.write_usage_event(event).outcome for _ in range(3)]
        assert ["again"] == [each.outcome for each in service.write_usage_events([event])]

    assert "recorded" == service.write_usage_event(event).outcome


def test_closed(service, event):
    """A closed service sends nothing, and raises nothing."""
    service.close()

    assert "again" == service.write_usage_event(event).outcome
    assert ["again"] == [each.outcome for each in service.write_usage_events([event])]


def test_reasons_keep_secrets(fake, event):
    """A reason has neither the key, where the server repeats it, nor the values of a query, and is at most 500 characters long."""
    key = fake.key
    service = Flowglad(key, fake.url)
    query = f"Failed query: insert into x\nparams: {key}, secret of a customer"
    for said in (f"bad key {key}!", f"{'x' * 495}{key}", f"Bearer {key[:-2]}", query):
        for body in (said, {"error": said, "code": "X"}, {"error": [{"path": ["a"], "message": said}]}):
            fake.fault(status=500, body=body)
            reason = service.write_usage_event(event).reason

            assert not {"sk_test_", "secret of"} & {word for word in ("sk_test_", "secret of") if word in reason}
            assert len(reason) <= 500


def test_odd_key_is_scrubbed():
    """Nor is a key shown that looks like none."""
    key = 'sk_test_a"b'
    answer = Answer(500, {"content-type": "application/json"}, json.dumps({"error": f"{key} is bad"}).encode())

    assert "HTTP 500: *** is bad" == reason_of(answer, key)


@given(st.integers(200, 599), st.binary(max_size=300), st.sampled_from(["application/json", "text/html", ""]))
def test_any_answer(status, body, kind):
    """Whatever comes is one of the outcomes, and only a usage event is ever taken for recorded."""
    delivery = classify(Answer(status, {"content-type": kind}, body), 0.0, "sk_test_k")

    assert delivery.outcome in ("again", "taken", "park", "dead", "stop")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda each: st.lists(each) | st.dictionaries(st.text(), each),
    )
)
def test_any_body(said):
    """A reason can be read out of any JSON."""
    body = json.dumps({"error": said}).encode()

    assert reason_of(Answer(500, {"content-type": "application/json"}, body)).startswith("HTTP 500")


# In bulk.


def events(fake, *ids, amount=1):
    return [usage_event(each, amount, reference=fake.subscription_id("ada")) for each in ids]


def test_bulk(service, fake):
    """Many events go in one request, and each gets the answer that is its own, in order, although Flowglad's have none."""
    wanted = [replace(event, amount=at) for at, event in enumerate(events(fake, "a", "b", "c"), 1)]
    answers = service.write_usage_events(wanted)
    by_id = {each["transactionId"]: each["id"] for each in fake.recorded("ada")}

    assert ["recorded"] * 3 == [each.outcome for each in answers]
    assert [by_id[each.transaction_id] for each in wanted] == [each.details["event_id"] for each in answers]
    assert (1, 94) == (len(fake.requests), fake.balance("ada", "generations"))


def test_bulk_silence(service, fake):
    """What Flowglad leaves out, because it was there or is somebody else's, is to be sent alone, and then gets its answer."""
    fake.add_customer("bob")
    service.write_usage_event(usage_event("theirs", reference=fake.subscription_id("bob"), customer="bob"))
    wanted = events(fake, "there", "theirs", "new", "new")
    service.write_usage_event(wanted[0])
    answers = service.write_usage_events(wanted)

    assert ["alone", "alone", "recorded", "alone"] == [each.outcome for each in answers]
    alone = [service.write_usage_event(each).outcome for each in wanted]
    assert ["recorded", "taken", "recorded", "recorded"] == alone
    assert {("there", 1), ("new", 1)} == had(fake)


def test_bulk_one_bad(service, fake):
    """One bad event makes Flowglad keep none: all are to be sent alone, where only the bad one is a dead letter."""
    wanted = [*events(fake, "a", "b"), usage_event("c", meter="nope", reference=fake.subscription_id("ada"))]

    assert ["alone"] * 3 == [each.outcome for each in service.write_usage_events(wanted)]
    assert [] == fake.recorded()
    assert ["recorded", "recorded", "dead"] == [service.write_usage_event(each).outcome for each in wanted]


def test_bulk_left_out(service, fake):
    """What cannot safely go in bulk is not in it: without a subscription, too large, or twice; of nothing there is no request."""
    wanted = [usage_event("a"), *events(fake, "b", amount=2**31), *events(fake, "c"), *events(fake, "c")]

    assert ["alone", "alone", "recorded", "alone"] == [each.outcome for each in service.write_usage_events(wanted)]
    assert [] == service.write_usage_events([])
    assert ["alone"] == [each.outcome for each in service.write_usage_events(wanted[:1])]
    assert 1 == len(fake.requests)


def test_bulk_limit(service, fake):
    """A request has at most 500 events; the rest is for the next one."""
    answers = service.write_usage_events(events(fake, *map(str, range(501))))

    assert ["recorded"] * 500 + ["alone"] == [each.outcome for each in answers]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"status": 401, "body": "no"}, "stop"),
        ({"status": 429, "retry_after": 3}, "again"),
        ({"status": 503}, "again"),
        ({"status": 400}, "alone"),
        ({"reset": True}, "again"),
        ({"garbage": True}, "again"),
    ],
    ids=str,
)
def test_bulk_outcomes(service, fake, fault, expected):
    """Where the whole request fails every event has the same outcome, but for those that were decided without it."""
    wanted = [*events(fake, "a", "b"), *events(fake, "nothing", amount=0)]
    fake.fault(**fault)
    answers = service.write_usage_events(wanted)

    assert [expected, expected, "already_there"] == [each.outcome for each in answers]
    assert fault.get("retry_after") == answers[0].retry_after


def test_bulk_blocked(service, fake):
    """A blocked meter parks all of them: they are of one account."""
    fake.block_meter("ada", "generations")

    assert ["park"] * 2 == [each.outcome for each in service.write_usage_events(events(fake, "a", "b"))]


def test_bulk_stranger(service, fake):
    """An event that comes back with another amount is put aside."""
    service.write_usage_event(events(fake, "a")[0])
    [recorded] = fake.recorded()
    fake.fault(status=200, body={"usageEvents": [{**recorded, "amount": 9}, {**recorded, "transactionId": "stranger"}]})

    assert ["aside", "alone"] == [each.outcome for each in service.write_usage_events(events(fake, "a", "b"))]


def test_own_client_after_fork(fake, event):
    """With a client of the caller's nothing is sent after a fork: everything stops, visibly, and nothing is raised."""
    import os

    with httpx.Client() as client:
        service = Flowglad(fake.key, fake.url, http_client=client)
        child = os.fork()
        if child == 0:
            try:
                outcomes = {
                    service.write_usage_event(event).outcome,
                    *(each.outcome for each in service.write_usage_events([event])),
                }
            except BaseException:
                outcomes = set()
            os._exit(0 if outcomes == {"stop"} else 1)
        assert 0 == os.waitpid(child, 0)[1]


def test_race_blocks():
    """The fake's own wrinkle: two events at once on the last credit block the meter, one after the other go through into debt."""
    with FakeFlowglad(pause=0.05) as fake:
        fake.add_meter("generations")
        fake.add_customer("ada", credits={"generations": 1})
        fake.add_customer("bob", credits={"generations": 1})
        service = Flowglad(fake.key, fake.url)
        for at in range(2):
            one = usage_event(f"b{at}", customer="bob", reference=fake.subscription_id("bob"))
            assert "recorded" == service.write_usage_event(one).outcome
        outcomes = []
        threads = [
            threading.Thread(target=lambda one=one: outcomes.append(service.write_usage_event(one).outcome))
            for one in events(fake, "a", "b")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert ["park", "recorded"] == sorted(outcomes)
        assert (True, False) == (fake.is_blocked("ada", "generations"), fake.is_blocked("bob", "generations"))
        assert -1 == fake.balance("bob", "generations")
