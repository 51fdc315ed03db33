"""Django, under WSGI and ASGI: who asks pays, and a refusal is answered with its status."""

from __future__ import annotations

import asyncio

import pytest
from django.test import AsyncClient, Client, RequestFactory

from metered_ai.testing.provider import Answer
from tests.integrations import django_shop

FOX = Answer().text


async def _aget(path, headers):
    answer = await AsyncClient(raise_request_exception=False).get(path, headers=headers)
    if answer.streaming:
        answer.text_read = b"".join([piece async for piece in answer.streaming_content]).decode()
    else:
        answer.text_read = answer.content.decode()
    return answer


def _get(path, headers):
    answer = Client(raise_request_exception=False).get(path, headers=headers)
    answer.text_read = answer.getvalue().decode() if answer.streaming else answer.content.decode()
    return answer


def get_through(way):
    """A request to the project, over one of Django's two ways in."""

    def get(path, user=None, **headers):
        head = {**headers, **({"x-user": user} if user else {})}
        return _get(path, head) if way == "wsgi" else asyncio.run(_aget(path, head))

    return get


@pytest.fixture(params=["wsgi", "asgi"])
def get(request):
    return get_through(request.param)


# Django warns when it is to stream an async iterator under WSGI, or a sync one under ASGI: it reads them whole first.
STREAMED = [("wsgi", "/sync-stream"), ("asgi", "/async-stream")]
PLAIN = [(way, path) for way in ("wsgi", "asgi") for path in ("/sync", "/async")]


@pytest.fixture(autouse=True)
def project(client, shop):
    django_shop.serve(client, shop.async_client, billing=client.billing)


@pytest.mark.parametrize(("way", "path"), PLAIN + STREAMED)
def test_who_asks_pays(way, path, shop):
    """The middleware's customer pays in sync views, async views and streamed answers, each request for itself."""
    get, calls = get_through(way), 2 if "stream" in path else 1
    shop.grant("ada", 2)
    shop.grant("bob", 2)

    answers = [get(path, user) for user in ("ada", "bob")]

    assert [(200, FOX * calls)] * 2 == [(answer.status_code, answer.text_read) for answer in answers]
    assert ["ada"] * calls + ["bob"] * calls == [event.customer for event in shop.events()]


@pytest.mark.parametrize(("way", "path"), [*PLAIN, *STREAMED, ("asgi", "/sync-stream")])
def test_refused(way, path, shop):
    """Without credits the answer is a 402 with the seed's body, for a streamed answer as well; nothing is sent to the provider."""
    answer = get_through(way)(path, "ada")

    assert (402, "0") == (answer.status_code, answer.headers["x-credits-remaining"])
    assert ("insufficient_credits", 0) == (answer.json()["error"], answer.json()["availableBalance"])
    assert [] == shop.provider.requests


def test_request_id(get, shop, client):
    """The request's id is the transaction id of its calls: 400 without one, 409 once it was billed."""
    django_shop.serve(client, shop.async_client, requires_request_id=lambda request: request.path != "/file")
    shop.grant("ada", 9)

    answers = [get("/async", "ada"), *(get("/async", "ada", **{"x-request-id": "42"}) for _ in range(2))]

    assert [400, 200, 409] == [answer.status_code for answer in answers]
    assert ["req_42"] == [event.transaction_id for event in shop.events()]


def test_rest(get, shop):
    """The receipt is on the request; nobody is billed for nobody's request; every answer tells what is left."""
    shop.grant("ada", 5)

    receipt = get("/receipt", "ada")

    assert ({"credits": 1}, "4") == (receipt.json(), receipt.headers["x-credits-remaining"])
    assert (500, None) == ((nobody := get("/sync")).status_code, nobody.headers.get("x-credits-remaining"))


def test_file(shop):
    """A file is left to Django, which may have the server send it."""
    # Without the test client, which wraps what it is given.
    answer = django_shop.middleware(django_shop.file)(RequestFactory().get("/file", headers={"x-user": "ada"}))

    assert answer.file_to_stream is not None
    answer.close()


def test_left_early(shop, client):
    """A streamed answer whose reader goes away is settled when the server closes it."""
    shop.grant("ada", 1)
    answer = Client().get("/sync-stream", headers={"x-user": "ada"})

    assert b"The" in next(iter(answer.streaming_content))
    answer.close()
    assert [("ada", 1)] == [(event.customer, event.amount) for event in shop.events()]
    assert [] == list(shop.billing.holds(state="open"))
