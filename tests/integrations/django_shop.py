"""A Django project in one module: its settings, its middleware and its views. `serve` tells it which clients to use."""

from __future__ import annotations

import asyncio

import django
from django.conf import settings
from django.http import FileResponse, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path

from metered_ai.integrations.django import BillingMiddleware

ASK = {"model": "gpt-5-mini", "input": "Hi"}

settings.configure(
    SECRET_KEY="test",
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    MIDDLEWARE=[f"{__name__}.middleware"],
    USE_TZ=True,
)
django.setup()

clients = {}


def serve(client, make_async, **options):
    """Use these clients from now on (an async one belongs to the loop of its request), and these options of the middleware."""
    clients.update(sync=client, a=make_async)
    vars(middleware).update(vars(BillingMiddleware(customer=user_of, **options)))


def user_of(request):
    return request.headers.get("x-user")


middleware = BillingMiddleware(customer=user_of)


def sync_view(request):
    return HttpResponse(clients["sync"].responses.create(**ASK).output_text)


async def async_view(request):
    await asyncio.sleep(0)
    async with clients["a"]() as aclient:
        return HttpResponse((await aclient.responses.create(**ASK)).output_text)


def sync_stream(request):
    def words():
        # Two calls, so that the second is made where the server reads.
        with clients["sync"].responses.create(**ASK, stream=True) as stream:
            for event in stream:
                if event.type == "response.output_text.delta":
                    yield event.delta
        yield clients["sync"].responses.create(**ASK).output_text

    return StreamingHttpResponse(words())


async def async_stream(request):
    async def words():
        async with clients["a"]() as aclient:
            async for event in await aclient.responses.create(**ASK, stream=True):
                if event.type == "response.output_text.delta":
                    yield event.delta
            yield (await aclient.responses.create(**ASK)).output_text

    return StreamingHttpResponse(words())


def receipt(request):
    clients["sync"].responses.create(**ASK)
    return JsonResponse({"credits": request.bill.amount})


def file(request):
    return FileResponse(open(__file__, "rb"))


urlpatterns = [
    path("sync", sync_view),
    path("async", async_view),
    path("sync-stream", sync_stream),
    path("async-stream", async_stream),
    path("receipt", receipt),
    path("file", file),
]
