"""The `metered` fixture, as a user's own test run meets it: in another pytest, which finds the plugin by its entry point."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import metered_ai

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
SOURCE = Path(metered_ai.__file__).parents[1]

SUMMARY = """
    import openai
    from metered_ai import InsufficientCreditsError, MeteredOpenAI, bill_to

    def summarize(client, text, *, customer):
        with bill_to(customer, meter="summaries"):
            answer = client.responses.create(model="gpt-5-mini", input=text)
        return answer.output_text
"""


@pytest.fixture
def project(pytester, monkeypatch):
    """A user's project, in an environment in which the library is installed with the entry point that pyproject.toml names."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    info = pytester.mkdir("installed") / "metered_ai-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: metered-ai\nVersion: 0\n")
    (info / "entry_points.txt").write_text("\n".join(["[pytest11]", *(f"{a} = {b}" for a, b in points.items())]))
    monkeypatch.setenv("PYTHONPATH", f"{SOURCE}:{info.parent}")
    # Not of our run: what the user's run has to say for itself.
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makepyfile(summary=SUMMARY)
    return pytester


def run(project, test, *options):
    """Run this test file in a pytest of its own, in which any warning is an error."""
    project.makepyfile(test_user=test)
    return project.runpytest_subprocess("-W", "error", "-p", "no:cacheprovider", *options)


def test_billing(project):
    """An application proves what a call costs, whom, and on which meter; each test begins with an empty ledger."""
    result = run(
        project,
        """
        import pytest
        from metered_ai import InsufficientCreditsError
        from summary import summarize

        @pytest.mark.parametrize("attempt", [1, 2])
        def test_a_summary_costs_one_credit(metered, attempt):
            metered.grant("ada", 5, "summaries")
            assert "fox" in summarize(metered.client(), "Hi", customer="ada")

            assert [("ada", "summaries", 1)] == [(e.customer, e.meter, e.amount) for e in metered.events()]
            assert 4 == metered.balance("ada", "summaries").available
            assert ["Hi"] == [request.body["input"] for request in metered.provider.requests]

        def test_no_credits_no_request(metered):
            with pytest.raises(InsufficientCreditsError) as refused:
                summarize(metered.client(), "Hi", customer="bob")

            assert (0, 1) == (refused.value.available, refused.value.required)
            assert [] == metered.provider.requests
            assert [] == metered.holds()

        def test_grants_add_up(metered):
            metered.grant("ada", 5)
            metered.grant("ada", 5)
            metered.grant("ada", 5, id="order_1")
            metered.grant("ada", 5, id="order_1")

            assert 15 == metered.balance("ada").limit
        """,
    )

    result.assert_outcomes(passed=4)


def test_scripted_failure(project):
    """A test scripts what the provider does, and sees that a failed call costs nothing and that a stream is billed."""
    result = run(
        project,
        """
        import openai
        import pytest
        from metered_ai import per_token
        from summary import summarize

        def test_a_failure_costs_nothing(metered):
            metered.grant("ada", 1, "summaries")
            metered.provider.answer(status=500)
            with pytest.raises(openai.InternalServerError):
                summarize(metered.client(), "Hi", customer="ada")

            assert [] == metered.events("ada")
            assert ["provider_error"] == [hold.reason for hold in metered.holds("ada")]
            assert 1 == metered.balance("ada", "summaries").available

            summarize(metered.client(), "Hi", customer="ada")
            assert 0 == metered.balance("ada", "summaries").available

        def test_tokens(metered):
            metered.grant("ada", 10_000)
            metered.provider.answer(input_tokens=7, output_tokens=5)
            client = metered.client(customer="ada", pricing=per_token(input=1, output=10))
            hello = [{"role": "user", "content": "Hi"}]
            list(client.chat.completions.create(model="m", messages=hello, max_tokens=9, stream=True))

            assert [57] == [event.amount for event in metered.events("ada")]

        def test_broken_stream(metered):
            metered.grant("ada", 10_000)
            metered.provider.answer(cut_after=2)
            with pytest.raises(Exception), metered.client(customer="ada") as client:
                list(client.responses.create(model="m", input="Hi", stream=True))

            assert [] == metered.events("ada")
        """,
    )

    result.assert_outcomes(passed=3)


def test_async(project):
    """Async clients share the ledger and the provider of the sync ones."""
    result = run(
        project,
        """
        import asyncio

        def test_async_calls(metered):
            async def calls():
                async with metered.async_client(customer="ada") as client:
                    await asyncio.gather(*(client.responses.create(model="m", input="Hi") for _ in range(5)))

            metered.grant("ada", 6)
            asyncio.run(calls())
            metered.client(customer="ada").responses.create(model="m", input="Hi")

            assert 6 == len(metered.events("ada"))
            assert 0 == metered.balance("ada").available
        """,
    )

    result.assert_outcomes(passed=1)


def test_own_clients(project):
    """Clients that the application builds itself reach the provider through the environment; the bare SDK's too."""
    result = run(
        project,
        """
        import openai
        from metered_ai import MeteredOpenAI

        def test_built_by_the_application(metered):
            metered.grant("ada", 1)
            with MeteredOpenAI(billing=metered.billing, customer="ada") as client:
                client.responses.create(model="m", input="Hi")
            with openai.OpenAI() as bare:
                bare.responses.create(model="m", input="Hi")

            assert (2, 1) == (len(metered.provider.requests), len(metered.events()))
        """,
    )

    result.assert_outcomes(passed=1)


def test_fastapi(project):
    """A FastAPI application proves its billing through its own test client: who pays, the 402, and what a failure costs."""
    project.makepyfile(
        service="""
        from typing import Annotated

        import openai
        from fastapi import Depends, FastAPI, Header, Request
        from fastapi.responses import JSONResponse
        from metered_ai import AsyncMeteredOpenAI, InsufficientCreditsError, bill_to

        app = FastAPI()

        def make_client() -> AsyncMeteredOpenAI:
            return AsyncMeteredOpenAI()

        @app.exception_handler(InsufficientCreditsError)
        async def refused(_: Request, error: InsufficientCreditsError) -> JSONResponse:
            return JSONResponse(error.to_dict(), status_code=error.http_status)

        @app.exception_handler(openai.APIError)
        async def failed(_: Request, error: openai.APIError) -> JSONResponse:
            return JSONResponse({"error": "try again"}, status_code=502)

        @app.post("/answer")
        async def answer(
            x_user: Annotated[str, Header()], client: Annotated[AsyncMeteredOpenAI, Depends(make_client)]
        ) -> dict[str, object]:
            async with bill_to(x_user) as bill:
                await client.responses.create(model="m", input="Hi")
            return {"credits": bill.amount}
        """
    )
    result = run(
        project,
        """
        import pytest
        from fastapi.testclient import TestClient
        from service import app, make_client

        @pytest.fixture
        def web(metered):
            client = metered.async_client()
            app.dependency_overrides[make_client] = lambda: client
            with TestClient(app) as web:
                yield web

        def test_answer(web, metered):
            metered.grant("ada", 2)
            metered.provider.answer()
            metered.provider.answer(status=503)
            answers = [web.post("/answer", headers={"x-user": user}) for user in ("ada", "ada", "ada", "ada", "bob")]

            assert [200, 502, 200, 402, 402] == [answer.status_code for answer in answers]
            assert {"credits": 1} == answers[0].json()
            assert (0, 1) == (answers[3].json()["availableBalance"], answers[3].json()["required"])
            assert ["ada", "ada"] == [event.customer for event in metered.events()]
            assert 3 == len(metered.provider.requests)
        """,
    )

    result.assert_outcomes(passed=1)


def test_after_the_test(project):
    """When a test is over its provider is gone and the environment is as it was."""
    result = run(
        project,
        """
        import os, threading

        seen = []

        def test_first(metered):
            seen.append(metered.provider.base_url)
            assert os.environ["OPENAI_BASE_URL"] == metered.provider.base_url

        def test_second():
            assert seen
            assert "OPENAI_BASE_URL" not in os.environ
            assert not [thread for thread in threading.enumerate() if thread.name == "fake-provider"]
        """,
    )

    result.assert_outcomes(passed=2)


def test_cheap(project):
    """A run that meters nothing imports neither the library nor the SDK for the plugin, so that it is quick and coverage is whole."""
    result = run(
        project,
        """
        import sys

        def test_nothing(request):
            assert request.config.pluginmanager.has_plugin("metered_ai")
            assert {"_metered_ai_pytest"} == {
                name for name in sys.modules if name.lstrip("_").partition(".")[0].startswith(("metered_ai", "openai"))
            }
        """,
    )

    result.assert_outcomes(passed=1)


def test_left_out(project):
    """`-p no:metered_ai` leaves the plugin out: not even its module is imported, and the fixture's name is free."""
    result = run(
        project,
        """
        import sys

        def test_nothing():
            assert "_metered_ai_pytest" not in sys.modules

        def test_fixture(metered):
            pass
        """,
        "-p",
        "no:metered_ai",
    )

    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*fixture 'metered' not found*"])


def test_described(project):
    """`pytest --fixtures` says what the fixture is."""
    result = run(project, "", "--fixtures")

    result.stdout.fnmatch_lines(["metered -- *", "    An empty ledger in memory and a scripted provider*"])
