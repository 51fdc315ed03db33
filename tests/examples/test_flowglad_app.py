"""The Flowglad example, as its users meet it: every status where it belongs, and what Flowglad has in the end."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

EXAMPLE = Path(__file__).parents[2] / "examples" / "flowglad_app.py"
FOX = "The quick brown fox jumps over the lazy dog."


@pytest.fixture
def web(flowglad, provider, tmp_path, monkeypatch):
    """The example under a test client, and its billing."""
    monkeypatch.setenv("METERED_AI_BILLING", f"sqlite:///{tmp_path / 'credits.db'}")
    monkeypatch.setenv("OPENAI_API_KEY", "test")
    monkeypatch.setenv("OPENAI_BASE_URL", provider.base_url)
    spec = importlib.util.spec_from_file_location("flowglad_app", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    # FastAPI looks the annotations of its functions up in their module.
    monkeypatch.setitem(sys.modules, "flowglad_app", example)
    spec.loader.exec_module(example)
    with TestClient(example.app) as client:
        client.billing = example.billing
        yield client


def generate(web, user="ada", request_id="r1"):
    headers = {name: value for name, value in (("x-user", user), ("x-request-id", request_id)) if value is not None}
    return web.post("/generate", params={"question": "Hi"}, headers=headers)


def test_not_logged_in(web, flowglad, provider):
    """401 without a user; nobody is asked and nothing is sent."""
    assert 401 == generate(web, user=None).status_code
    assert ([], []) == (flowglad.requests, provider.requests)


def test_request_id_required(web, flowglad, provider):
    """400 where the request has no id of its own; nobody is asked and nothing is sent."""
    assert [400, 400] == [generate(web, request_id=each).status_code for each in (None, "")]
    assert ([], []) == (flowglad.requests, provider.requests)


def test_no_subscription(web, flowglad, provider):
    """402 for a customer without a plan, known to Flowglad or not, with the way to get one."""
    flowglad.add_customer("ada")
    flowglad.cancel("ada")
    for user in ("ada", "stranger"):
        answer = generate(web, user)

        assert (402, "no_subscription", "/top-up") == (
            answer.status_code,
            answer.json()["error"],
            answer.json()["upgradeUrl"],
        )
    assert [] == provider.requests


def test_recorded_once(web, flowglad, provider):
    """200, and one usage event, however often the request is repeated; another request is another event."""
    flowglad.add_customer("ada", credits={"generations": 5})
    answers = [generate(web, request_id=each) for each in ("r1", "r1", "r1", "r2")]
    web.billing.deliver()

    assert [(200, FOX)] * 4 == [(each.status_code, each.json()["answer"]) for each in answers]
    assert [1, 0, 0, 1] == [each.json()["credits"] for each in answers]
    assert {("req_r1", 1), ("req_r2", 1)} == {(each["transactionId"], each["amount"]) for each in flowglad.recorded()}
    assert 3 == flowglad.balance("ada", "generations")


def test_refused(web, flowglad, provider):
    """402 with the numbers and the way to more credits; a top-up is seen at once."""
    flowglad.add_customer("ada", credits={"generations": 1})
    assert 200 == generate(web).status_code
    answer = generate(web, request_id="r2")

    assert 402 == answer.status_code
    assert {
        "error": "insufficient_credits",
        "message": "Insufficient credits for generations. Available: 0, Required: 1",
        "availableBalance": 0,
        "required": 1,
        "upgradeUrl": "/top-up",
    } == answer.json()
    assert 1 == len(provider.requests)

    flowglad.grant("ada", "generations", 1)
    assert 200 == generate(web, request_id="r2").status_code


def test_failed_call(web, flowglad, provider):
    """A call that the provider refuses is not recorded, and its credits are there for the next."""
    flowglad.add_customer("ada", credits={"generations": 1})
    provider.answer(status=400)
    with pytest.raises(Exception, match="400"):
        generate(web)

    assert 200 == generate(web).status_code
    web.billing.deliver()
    assert 1 == len(flowglad.recorded())


def test_feature(web, flowglad):
    """403 without the feature; a webhook tells of the plan that has it, then 200, charged once for a repeated request."""
    flowglad.add_customer("ada", credits={"generations": 5})
    flowglad.add_plan("pro", credits={"generations": 50}, features=("exports",), unit_price=900)

    def export():
        return web.post("/export", params={"name": "a"}, headers={"x-user": "ada", "x-request-id": "e1"})

    assert 403 == export().status_code
    flowglad.upgrade("ada", "pro")
    body, headers = flowglad.webhook("subscription.created", "ada")
    assert [400, 200] == [
        web.post("/webhooks/flowglad", content=each, headers=headers).status_code for each in (body + b" ", body)
    ]
    assert [200, 200] == [export().status_code for _ in range(2)]
    web.billing.deliver()
    assert [("req_e1", 2)] == [(each["transactionId"], each["amount"]) for each in flowglad.recorded()]


def test_top_up(web, flowglad):
    """The way to more credits leads to Flowglad's checkout for the price."""
    flowglad.add_customer("ada")
    flowglad.add_plan("top_up", kind="single_payment", unit_price=400)
    answer = web.get("/top-up", headers={"x-user": "ada"}, follow_redirects=False)

    assert (303, f"{flowglad.url}/checkout/{flowglad.books.sessions[0]['id']}") == (
        answer.status_code,
        answer.headers["location"],
    )


def test_balance(web, flowglad):
    """The balance is Flowglad's, less what it does not know yet."""
    flowglad.add_plan("free", credits={"generations": 4}, is_default=True)
    flowglad.add_customer("ada")
    with flowglad.down():
        assert 503 == web.get("/balance", headers={"x-user": "ada"}).status_code
    generate(web)

    assert {"available": 3, "percentUsed": 25, "showUpgrade": False} == web.get(
        "/balance", headers={"x-user": "ada"}
    ).json()


def test_unavailable(web, flowglad, provider):
    """503 while Flowglad cannot say what there is, and nothing is sent."""
    flowglad.add_customer("ada", credits={"generations": 5})
    with flowglad.down():
        assert 503 == generate(web).status_code
    assert [] == provider.requests
