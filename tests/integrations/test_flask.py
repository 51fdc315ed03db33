"""Flask: who asks pays, and a refusal is answered with its status."""

from __future__ import annotations

import threading

import httpx
import pytest
from flask import Flask, Response, g, request
from werkzeug.serving import make_server

from metered_ai.integrations.flask import add_billing
from metered_ai.testing.provider import Answer

FOX = Answer().text
ASK = {"model": "gpt-5-mini", "input": "Hi"}


def make_app(client, make_async, **options):
    app = Flask("shop")
    add_billing(app, customer=lambda: request.headers.get("x-user"), billing=client.billing, **options)

    @app.get("/sync")
    def sync_view():
        return client.responses.create(**ASK).output_text

    @app.get("/async")
    async def async_view():
        async with make_async() as aclient:
            return (await aclient.responses.create(**ASK)).output_text

    @app.get("/stream")
    def stream():
        def words():
            with client.responses.create(**ASK, stream=True) as stream:
                for event in stream:
                    if event.type == "response.output_text.delta":
                        yield event.delta
            yield client.responses.create(**ASK).output_text

        return Response(words())

    @app.get("/receipt")
    def receipt():
        client.responses.create(**ASK)
        return {"credits": g.bill.amount}

    @app.get("/nothing")
    def nothing():
        return Response(iter(()))

    return app


@pytest.fixture
def web(client, shop):
    return make_app(client, shop.async_client).test_client()


@pytest.mark.parametrize(("path", "calls"), [("/sync", 1), ("/async", 1), ("/stream", 2)])
def test_who_asks_pays(path, calls, web, shop):
    """Who asks pays in sync views, async views and streamed answers, each request for itself."""
    shop.grant("ada", 2)
    shop.grant("bob", 2)

    answers = [web.get(path, headers={"x-user": user}) for user in ("ada", "bob")]

    assert [(200, FOX * calls)] * 2 == [(answer.status_code, answer.text) for answer in answers]
    assert ["ada"] * calls + ["bob"] * calls == [event.customer for event in shop.events()]


@pytest.mark.parametrize("path", ["/sync", "/async", "/stream"])
def test_refused(path, web, shop):
    """Without credits the answer is a 402 with the seed's body, for a streamed answer as well; nothing is sent to the provider."""
    answer = web.get(path, headers={"x-user": "ada"})

    assert (402, "0") == (answer.status_code, answer.headers["x-credits-remaining"])
    assert ("insufficient_credits", 0) == (answer.json["error"], answer.json["availableBalance"])
    assert [] == shop.provider.requests


def test_request_id(client, shop):
    """The request's id is the transaction id of its calls: 400 without one, 409 once it was billed."""
    web = make_app(client, shop.async_client, requires_request_id=lambda: request.path == "/sync").test_client()
    shop.grant("ada", 9)
    headers = {"x-user": "ada", "x-request-id": "42"}

    answers = [web.get("/sync", headers=head) for head in ({"x-user": "ada"}, headers, headers)]

    assert [400, 200, 409] == [answer.status_code for answer in answers]
    assert ["req_42"] == [event.transaction_id for event in shop.events()]
    assert 200 == web.get("/nothing", headers={"x-user": "ada"}).status_code


def test_rest(web, shop):
    """The receipt is in `g`; nobody is billed for nobody's request; every answer tells what is left."""
    shop.grant("ada", 5)

    receipt = web.get("/receipt", headers={"x-user": "ada"})

    assert ({"credits": 1}, "4") == (receipt.json, receipt.headers["x-credits-remaining"])
    assert (500, None) == ((nobody := web.get("/sync")).status_code, nobody.headers.get("x-credits-remaining"))


def test_real_server(shop, client):
    """On a server with threads, a streamed answer whose reader goes away is settled, and the next request of the thread is its own."""
    shop.grant("ada", 1)
    server = make_server("127.0.0.1", 0, make_app(client, shop.async_client), threaded=True)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        url = f"http://127.0.0.1:{server.port}"
        shop.provider.answer(text="word " * 2000)
        with httpx.stream("GET", f"{url}/stream", headers={"x-user": "ada"}) as answer:
            assert "word" in next(answer.iter_text())
        codes = [httpx.get(f"{url}/sync", headers=head).status_code for head in ({"x-user": "ada"}, {})]
    finally:
        server.shutdown()
        serving.join()
        server.server_close()

    assert [402, 500] == codes
    assert [("ada", 1)] == [(event.customer, event.amount) for event in shop.events()]
    assert [] == list(shop.billing.holds(state="open"))
