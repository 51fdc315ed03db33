"""Webhooks: what is signed is taken, whatever else is refused, and what was known of the customer is forgotten."""

from __future__ import annotations

import base64
import json
import time

import pytest

from metered_ai import ConfigurationError
from metered_ai.services.flowglad import Flowglad
from metered_ai.services.svix import check_signature

SECRET = "whsec_" + base64.b64encode(b"a secret of our own").decode()


@pytest.fixture
def signed(fake):
    return fake.webhook("subscription.created", "ada", SECRET)


def test_example():
    """The example in Svix's documentation is taken: https://docs.svix.com/receiving/verifying-payloads/how-manual"""
    headers = {
        "svix-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "svix-timestamp": "1614265330",
        "svix-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    check_signature(b'{"test": 2432232314}', headers, "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", 1614265330.0)


def test_good(service, signed):
    """The event comes back, from bytes or text, whatever the case of the headers' names."""
    body, headers = signed

    assert json.loads(body) == service.verify_webhook(body, headers, SECRET)
    assert json.loads(body) == service.verify_webhook(body.decode(), {k.title(): v for k, v in headers.items()}, SECRET)


def test_secret_of_the_environment(service, signed, monkeypatch):
    """The secret may come from FLOWGLAD_WEBHOOK_SECRET; none at all, or one that is none, is a mistake in the wiring, and not shown."""
    for secret in (None, "", "whsec_", "whsec_not base64"):
        with pytest.raises(ConfigurationError) as refused:
            service.verify_webhook(*signed, secret)
        assert "not base64" not in str(refused.value)
    monkeypatch.setenv("FLOWGLAD_WEBHOOK_SECRET", SECRET)

    assert "subscription.created" == service.verify_webhook(*signed)["type"]


def test_several_signatures(service, signed):
    """While a secret is being replaced there are several signatures: one good one is enough, of the version that is known."""
    body, headers = signed
    good = headers["svix-signature"]
    for signatures, is_good in (
        (f"v1,AAAA {good}", True),
        (f"{good} v1,AAAA", True),
        (f"v2,AAAA {good} v1a,BBBB", True),
        ("v1,AAAA v1,BBBB", False),
        (good.replace("v1,", "v2,"), False),
        (good.removeprefix("v1,"), False),
        ("v1,ä", False),
    ):
        given = {**headers, "svix-signature": signatures}
        if is_good:
            service.verify_webhook(body, given, SECRET)
            continue
        with pytest.raises(ValueError, match="not ours"):
            service.verify_webhook(body, given, SECRET)


@pytest.mark.parametrize("name", ["svix-id", "svix-timestamp", "svix-signature"])
def test_missing(service, signed, name):
    """Without id, time or signature it is no signed webhook."""
    body, headers = signed
    for value in (None, ""):
        given = {key: value for key, value in {**headers, name: value}.items() if value is not None}
        with pytest.raises(ValueError, match="missing"):
            service.verify_webhook(body, given, SECRET)


def test_altered(service, signed):
    """Another body, id or time than was signed, or another secret, is refused."""
    body, headers = signed
    other = "whsec_" + base64.b64encode(b"another").decode()
    now = str(int(headers["svix-timestamp"]) - 1)
    for given in (
        (body + b" ", headers, SECRET),
        (body, {**headers, "svix-id": "msg_x"}, SECRET),
        (body, {**headers, "svix-timestamp": now}, SECRET),
        (body, headers, other),
    ):
        with pytest.raises(ValueError, match="not ours"):
            service.verify_webhook(*given)


@pytest.mark.parametrize(("age", "is_good"), [(298, True), (305, False), (-55, True), (-65, False)])
def test_age(service, fake, age, is_good):
    """A message is good for 300 s, and up to 60 s ahead of our clock."""
    signed = fake.webhook("subscription.created", "ada", SECRET, at=time.time() - age)
    if is_good:
        service.verify_webhook(*signed, SECRET)
        return
    with pytest.raises(ValueError, match="too far from now"):
        service.verify_webhook(*signed, SECRET)


@pytest.mark.parametrize("sent", ["soon", "-5", "1e9", "٣", "9" * 40])
def test_no_time(service, signed, sent):
    """A time that is none is refused."""
    body, headers = signed
    with pytest.raises(ValueError, match="svix-timestamp"):
        service.verify_webhook(body, {**headers, "svix-timestamp": sent}, SECRET)


@pytest.mark.parametrize("body", [b"no json", b"[1]", b"\xff"])
def test_signed_nonsense(service, body):
    """What is signed and no event is refused as well."""
    with FakeSigner(body) as (content, headers), pytest.raises(ValueError, match="signed, but no JSON"):
        service.verify_webhook(content, headers, SECRET)


class FakeSigner:
    """Signs any body at all."""

    def __init__(self, body):
        self.body = body

    def __enter__(self):
        import hashlib
        import hmac

        sent = str(int(time.time()))
        signature = hmac.new(b"a secret of our own", f"msg_1.{sent}.".encode() + self.body, hashlib.sha256).digest()
        value = f"v1,{base64.b64encode(signature).decode()}"
        return self.body, {"svix-id": "msg_1", "svix-timestamp": sent, "svix-signature": value}

    def __exit__(self, *_):
        return None


def asked(fake, customer):
    return sum(each.path == f"/customers/{customer}/billing" for each in fake.requests)


def test_forgets(service, fake):
    """A good webhook drops what was known of its customer's plans, and of nobody else's; a bad one drops nothing."""
    fake.add_customer("bob")
    fake.add_plan("pro", features=("fast",), unit_price=100)
    assert not service.has_feature("ada", "fast")
    assert not service.has_feature("bob", "fast")
    fake.subscribe("ada", "pro")
    body, headers = fake.webhook("subscription.updated", "ada", SECRET)
    with pytest.raises(ValueError, match="not ours"):
        service.verify_webhook(body + b" ", headers, SECRET)
    assert not service.has_feature("ada", "fast")
    service.verify_webhook(body, headers, SECRET)

    assert service.has_feature("ada", "fast")
    assert not service.has_feature("bob", "fast")
    assert (2, 1) == (asked(fake, "ada"), asked(fake, "bob"))


@pytest.mark.parametrize(
    ("event", "forgotten"),
    [
        ({"customer": {"externalId": "ada"}}, ["ada"]),
        ({"object": "customer", "externalId": "ada"}, ["ada"]),
        ({"payload": {"customer": {"externalId": "ada"}}}, ["ada"]),
        ({"data": {"customer": {"externalId": "ada"}}}, ["ada"]),
        ({"customer": {"externalId": "nobody"}}, []),
        ({"customer": "cust_x"}, ["ada", "bob"]),
        ({}, ["ada", "bob"]),
    ],
    ids=str,
)
def test_whose(service, fake, event, forgotten):
    """The customer is found wherever the event keeps them; where they are not named, everybody's plans are asked for anew."""
    fake.add_customer("bob")
    for customer in ("ada", "bob"):
        service.has_feature(customer, "fast")
    with FakeSigner(json.dumps(event).encode()) as (body, headers):
        service.verify_webhook(body, headers, SECRET)
    for customer in ("ada", "bob"):
        service.has_feature(customer, "fast")

    assert forgotten == [customer for customer in ("ada", "bob") if asked(fake, customer) == 2]


def test_needs_no_key_check():
    """Checking a webhook asks nobody: it works wherever Flowglad is."""
    service = Flowglad("sk_test_x", "http://127.0.0.1:9")
    with FakeSigner(b'{"customer": {"externalId": "ada"}}') as (body, headers):
        assert {"customer": {"externalId": "ada"}} == service.verify_webhook(body, headers, SECRET)
