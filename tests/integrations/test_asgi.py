"""Starlette, FastAPI and bare ASGI: who asks pays, and a refusal is answered with its status."""

import json
import threading
from collections.abc import AsyncIterator
from typing import Annotated

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from starlette.middleware.base import BaseHTTPMiddleware

from metered_ai import AsyncMeteredOpenAI, MeteredOpenAI, Receipt, connect
from metered_ai.integrations import asgi
from metered_ai.integrations.fastapi import BillingMiddleware, add_refusals, billed, billed_client
from metered_ai.testing.provider import Answer

FOX = Answer().text
ASK = {"model": "gpt-5-mini", "input": "Hi"}


def user_of(connection):
    return connection.headers.get("x-user")


def make_app(client, aclient):
    """One endpoint for each way in which a request may reach the provider."""
    app = FastAPI()

    @app.get("/async")
    async def async_endpoint():
        return (await aclient.responses.create(**ASK)).output_text

    @app.get("/sync")
    def sync_endpoint():
        return client.responses.create(**ASK).output_text

    @app.get("/stream")
    async def stream():
        async def words():
            async for event in await aclient.responses.create(**ASK, stream=True):
                if event.type == "response.output_text.delta":
                    yield event.delta

        return StreamingResponse(words(), media_type="text/plain")

    @app.get("/sync-stream")
    def sync_stream():
        def words():
            for event in client.responses.create(**ASK, stream=True):
                if event.type == "response.output_text.delta":
                    yield event.delta

        return StreamingResponse(words(), media_type="text/plain")

    @app.get("/background")
    async def background(tasks: BackgroundTasks):
        tasks.add_task(client.responses.create, **ASK)
        return FOX

    @app.get("/twice")
    async def twice():
        return [(await aclient.responses.create(**ASK)).output_text for _ in range(2)]

    return app


WAYS = ["/async", "/sync", "/stream", "/sync-stream", "/background"]


@pytest.fixture
def app(client, aclient):
    app = make_app(client, aclient)
    app.add_middleware(BillingMiddleware, customer=user_of, billing=client.billing)
    return app


@pytest.fixture
def web(app):
    with TestClient(app) as web:
        yield web


@pytest.mark.parametrize("path", WAYS)
def test_who_asks_pays(path, web, shop):
    """The middleware's customer pays in async and sync endpoints, streamed answers and background tasks, each request for itself."""
    shop.grant("ada", 1)
    shop.grant("bob", 1)

    answers = [web.get(path, headers={"x-user": user}) for user in ("ada", "bob")]

    assert [200, 200] == [answer.status_code for answer in answers]
    assert FOX in answers[0].text
    assert [("ada", 1), ("bob", 1)] == [(event.customer, event.amount) for event in shop.events()]


@pytest.mark.parametrize("path", ["/async", "/sync", "/stream", "/sync-stream"])
@pytest.mark.parametrize("has_handler", [False, True])
def test_refused(path, has_handler, app, shop):
    """Without credits the answer is a 402 with the seed's body, for a streamed answer as well; nothing is sent to the provider."""
    if has_handler:
        add_refusals(app)
    with TestClient(app) as web:
        answer = web.get(path, headers={"x-user": "ada"})

    assert (402, "application/json", "0") == (
        answer.status_code,
        answer.headers["content-type"],
        answer.headers["x-credits-remaining"],
    )
    assert ("insufficient_credits", 0, 1) == (
        answer.json()["error"],
        answer.json()["availableBalance"],
        answer.json()["required"],
    )
    assert [] == shop.provider.requests


def test_nobody(web, shop):
    """A request of nobody lands on nobody's bill: its call is refused, and what needs no call is served without a word of credits."""
    assert 500 == web.get("/async").status_code
    assert [200, None] == [(answer := web.get("/docs")).status_code, answer.headers.get("x-credits-remaining")]
    assert [] == shop.provider.requests


def test_credits_remaining(web, shop):
    """Every answer tells what is left when it begins; an unlimited customer is told no number."""
    shop.grant("ada", 3)
    shop.billing.set_unlimited("vip", "generations", True)

    def left(path, user):
        return web.get(path, headers={"x-user": user}).headers.get("x-credits-remaining")

    assert ["2", "1", "1"] == [left("/async", "ada"), left("/stream", "ada"), left("/docs", "ada")]
    assert None is left("/async", "vip")


def test_ledger_away(web, shop):
    """A ledger that does not answer is a 503 and no crash of the header beside it."""
    shop.grant("ada", 3)
    shop.billing.close()

    answer = web.get("/async", headers={"x-user": "ada"})

    assert (503, "billing_unavailable", "5") == (
        answer.status_code,
        answer.json()["error"],
        answer.headers["retry-after"],
    )


def once(client, aclient, paths=("/async", "/sync", "/stream", "/twice")):
    app = make_app(client, aclient)
    app.add_middleware(
        BillingMiddleware, customer=user_of, requires_request_id=lambda connection: connection.url.path in paths
    )
    return app


@pytest.mark.parametrize("path", ["/async", "/sync", "/stream", "/twice"])
def test_request_id(path, client, aclient, shop):
    """The request's id is the transaction id of its calls: 400 without one, 409 once it was billed, before anything is sent."""
    shop.grant("ada", 9)
    with TestClient(once(client, aclient)) as web:
        missing = web.get(path, headers={"x-user": "ada"})
        answers = [web.get(path, headers={"x-user": "ada", "x-request-id": "42"}) for _ in range(2)]

    assert (400, "request_id_required") == (missing.status_code, missing.json()["error"])
    assert [200, 409] == [answer.status_code for answer in answers]
    assert ("already_billed", "req_42") == (answers[1].json()["error"], answers[1].json()["transactionId"])
    billed_as = ["req_42", "req_42.2"] if path == "/twice" else ["req_42"]
    assert billed_as == [event.transaction_id for event in shop.events()]
    assert len(billed_as) == len(shop.provider.requests)


def test_request_id_elsewhere(client, aclient, shop):
    """Where no id is required none is asked for; another customer's id is another request."""
    shop.grant("ada", 1)
    shop.grant("bob", 1)
    with TestClient(once(client, aclient)) as web:
        answers = [
            web.get("/docs"),
            *(web.get("/async", headers={"x-user": user, "x-request-id": "42"}) for user in ("ada", "bob")),
        ]

    assert [200, 200, 200] == [answer.status_code for answer in answers]


def test_refused_later(web, shop, client):
    """A stream that is refused after its first byte breaks, and what was answered stays billed."""
    shop.grant("ada", 1)

    async def words():
        for _ in range(2):
            yield client.responses.create(**ASK).output_text

    @web.app.get("/words")
    async def endpoint():
        return StreamingResponse(words())

    with pytest.raises(Exception, match="needs 1"):
        web.get("/words", headers={"x-user": "ada"})
    assert [1] == [event.amount for event in shop.events()]


def test_under_another_middleware(app, shop):
    """A middleware of Starlette's older kind, which runs the application in a task of its own, changes nothing."""

    class Other(BaseHTTPMiddleware):
        async def dispatch(self, request, call_next):
            return await call_next(request)

    app.add_middleware(Other)
    shop.grant("ada", 1)
    with TestClient(app) as web:
        answers = [web.get("/stream", headers={"x-user": "ada"}) for _ in range(2)]

    assert [200, 402] == [answer.status_code for answer in answers]


def test_above_another_middleware(client, aclient, shop):
    """Nor does one inside."""

    class Other(BaseHTTPMiddleware):
        async def dispatch(self, request, call_next):
            return await call_next(request)

    app = make_app(client, aclient)
    app.add_middleware(Other)
    app.add_middleware(BillingMiddleware, customer=user_of)
    shop.grant("ada", 1)
    with TestClient(app) as web:
        answers = [web.get("/stream", headers={"x-user": "ada"}) for _ in range(2)]

    assert [200, 402] == [answer.status_code for answer in answers]


def test_receipt(app, shop, aclient):
    """The receipt of a request is in its state."""
    shop.grant("ada", 2)

    @app.get("/receipt")
    async def endpoint(request: Request):
        await aclient.responses.create(**ASK)
        return request.state.bill.amount

    with TestClient(app) as web:
        assert 1 == web.get("/receipt", headers={"x-user": "ada"}).json()


def test_websocket(app, shop, aclient):
    """A websocket's calls are billed to who opened it."""
    shop.grant("ada", 1)

    @app.websocket("/chat")
    async def chat(socket: WebSocket):
        await socket.accept()
        await socket.send_text((await aclient.responses.create(**ASK)).output_text)
        await socket.close()

    with TestClient(app) as web, web.websocket_connect("/chat", headers={"x-user": "ada"}) as socket:
        assert FOX == socket.receive_text()
    assert ["ada"] == [event.customer for event in shop.events()]


# Dependencies.


def current_user(request: Request) -> str:
    return request.headers["x-user"]


@pytest.fixture
def by_dependency(client, aclient):
    app = FastAPI()
    add_refusals(app)

    @app.get("/client")
    async def with_client(mine: Annotated[AsyncMeteredOpenAI, Depends(billed_client(aclient, current_user))]):
        return (await mine.responses.create(**ASK)).output_text

    @app.get("/sync-client")
    def with_sync_client(mine: Annotated[MeteredOpenAI, Depends(billed_client(client, current_user))]):
        return mine.responses.create(**ASK).output_text

    once = Annotated[AsyncMeteredOpenAI, Depends(billed_client(aclient, current_user, requires_request_id=True))]

    @app.get("/once")
    async def with_id(mine: once):
        return (await mine.responses.create(**ASK)).output_text

    its_bill = Annotated[Receipt, Depends(billed(current_user))]

    @app.get("/billed")
    async def all_billed(bill: its_bill):
        await aclient.responses.create(**ASK)
        return bill.amount

    @app.get("/sync-billed")
    def all_billed_sync(bill: its_bill):
        client.responses.create(**ASK)
        return bill.amount

    @app.get("/stream-billed")
    async def all_billed_stream(bill: its_bill):
        async def words() -> AsyncIterator[str]:
            async for event in await aclient.responses.create(**ASK, stream=True):
                if event.type == "response.output_text.delta":
                    yield event.delta

        return StreamingResponse(words())

    @app.get("/background-billed")
    async def all_billed_background(bill: its_bill, tasks: BackgroundTasks):
        tasks.add_task(aclient.responses.create, **ASK)
        return 1

    @app.get("/billed-once")
    async def all_billed_once(bill: Annotated[Receipt, Depends(billed(current_user, requires_request_id=True))]):
        await aclient.responses.create(**ASK)
        return bill.amount

    with TestClient(app) as web:
        yield web


DEPENDENCIES = ["/client", "/sync-client", "/billed", "/sync-billed", "/stream-billed", "/background-billed"]


@pytest.mark.parametrize("path", DEPENDENCIES)
def test_dependency(path, by_dependency, shop):
    """A dependency bills the user that another dependency names, and a refusal is a 402."""
    shop.grant("ada", 1)

    answered = by_dependency.get(path, headers={"x-user": "ada"})

    assert (200, ["ada"]) == (answered.status_code, [event.customer for event in shop.events()])
    if path != "/background-billed":
        refused = by_dependency.get(path, headers={"x-user": "ada"})

        assert (402, "insufficient_credits") == (refused.status_code, refused.json()["error"])
    assert 1 == len(shop.provider.requests)


@pytest.mark.parametrize("path", ["/once", "/billed-once"])
def test_dependency_once(path, by_dependency, shop):
    """With a required request id: 400 without it, 409 once it was billed."""
    shop.grant("ada", 9)
    headers = {"x-user": "ada", "x-request-id": "42"}

    answers = [by_dependency.get(path, headers=head) for head in ({"x-user": "ada"}, headers, headers)]

    assert [400, 200, 409] == [answer.status_code for answer in answers]
    assert ["req_42"] == [event.transaction_id for event in shop.events()]


# Bare ASGI, on a real server.


def test_bare(shop, aclient):
    """Any ASGI application is billed, by a function of the scope that may be async; other messages pass."""

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            assert "lifespan.startup" == (await receive())["type"]
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        text = (await aclient.responses.create(**ASK)).output_text
        await send({"type": "http.response.body", "body": text.encode()})

    async def who(scope):
        return dict(scope["headers"])[b"x-user"].decode()

    shop.grant("ada", 1)
    with TestClient(asgi.BillingMiddleware(app, customer=who)) as web:
        answers = [web.get("/", headers={"x-user": "ada"}) for _ in range(2)]

    assert [(200, FOX)] == [(answer.status_code, answer.text) for answer in answers[:1]]
    assert 402 == answers[1].status_code


def test_real_server(tmp_path, provider):
    """Behind a real server, on a SQLite ledger: 12 streamed requests at once on credits for 5 are five 200s and seven 402s."""
    import socket

    import httpx
    import uvicorn

    with connect(f"sqlite:///{tmp_path}/credits.db") as billing:
        billing.grant("ada", "generations", 5, id="order_1")
        options = {"billing": billing, "base_url": provider.base_url, "api_key": "test", "max_retries": 0}
        app = make_app(MeteredOpenAI(**options), AsyncMeteredOpenAI(**options))
        app.add_middleware(BillingMiddleware, customer=user_of)
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        serving = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        serving.start()
        codes = []
        lock = threading.Lock()

        def ask():
            answer = httpx.get(
                f"http://127.0.0.1:{listener.getsockname()[1]}/stream", headers={"x-user": "ada"}, timeout=30
            )
            body = FOX if answer.status_code == 200 else json.loads(answer.text)["error"]
            with lock:
                codes.append((answer.status_code, body))
            assert body in (FOX, "insufficient_credits")

        askers = [threading.Thread(target=ask) for _ in range(12)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        server.should_exit = True
        serving.join()

        assert {(200, FOX): 5, (402, "insufficient_credits"): 7} == {code: codes.count(code) for code in codes}
        assert 5 == billing.balance("ada", "generations").used
        assert () == billing.verify().broken
