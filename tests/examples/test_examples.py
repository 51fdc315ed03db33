"""Every file in examples/ runs as it stands and says what it promises."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import metered_ai
from metered_ai import connect

EXAMPLES = Path(__file__).parents[2] / "examples"
FOX = "The quick brown fox jumps over the lazy dog."

PROGRAMS = {
    "drop_in": f"""
        {FOX}
        {FOX}
        refused: 0 available, 1 required
        billed: 1 credit, transaction gen_{{0}}
        billed: 1 credit, transaction gen_{{1}}
        balance: 2 of 2 used
    """,
    "streaming": f"""
        {FOX}
        to the end: 1 credit
        left early: 1 credit
        still held: 0
    """,
    "async_calls": """
        ada: 5 answered, 5 refused
        bob: 3 answered, 0 refused
        ada: 0 left
        bob: 2 left
    """,
    "per_call_override": """
        generations 1
        generations 1 invoice_7 {{'feature': 'invoices'}}
        images 4
    """,
    "custom_pricing": """
        by token: 1 (10 in, 9 out)
        by model: 5
        not sent: no price for 'gpt-2'
    """,
    "charge_operation": """
        report_7: 8 credits
        report_7: 8 credits (the same report: charged once)
        failed, nothing charged: the printer is out of paper
        left: 12
    """,
    "agent_run": """
        ada: 10 credits for 3 calls, which cost 0
        ada: refused before the first call, 5 of 10 credits
    """,
}
CALLS = {
    "drop_in": 2,
    "streaming": 2,
    "async_calls": 8,
    "per_call_override": 3,
    "custom_pricing": 2,
    "charge_operation": 0,
    "agent_run": 3,
}


def lines(text):
    return [line.strip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name, provider, tmp_path):
    """An example that is a program runs from any folder, prints what it says, sends no refused call and leaves a sound ledger."""
    url = f"sqlite:///{tmp_path / 'credits.db'}"
    ran = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(metered_ai.__file__).parents[1]),
            "METERED_AI_BILLING": url,
            "OPENAI_API_KEY": "test",
            "OPENAI_BASE_URL": provider.base_url,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ("", 0) == (ran.stderr, ran.returncode)
    assert lines(PROGRAMS[name].format(*(issued.id for issued in provider.issued))) == lines(ran.stdout)
    assert CALLS[name] == len(provider.requests)
    with connect(url) as billing:
        assert () == billing.verify().broken
        assert 0 == sum(1 for _ in billing.holds(state="open"))


def test_all_tested():
    """No example is left out."""
    assert {*PROGRAMS, "web_request", "payment_webhook"} == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.fixture
def web(provider, tmp_path, monkeypatch):
    """The web example under a test client, and its billing."""
    from fastapi.testclient import TestClient

    monkeypatch.setenv("METERED_AI_BILLING", f"sqlite:///{tmp_path / 'credits.db'}")
    monkeypatch.setenv("OPENAI_API_KEY", "test")
    monkeypatch.setenv("OPENAI_BASE_URL", provider.base_url)
    spec = importlib.util.spec_from_file_location("web_request", EXAMPLES / "web_request.py")
    example = importlib.util.module_from_spec(spec)
    # FastAPI looks the annotations of its functions up in their module.
    monkeypatch.setitem(sys.modules, "web_request", example)
    spec.loader.exec_module(example)
    with TestClient(example.app) as client, example.client.billing as billing:
        yield client, billing


def test_web_request(web, provider):
    """Who is logged in pays; the answer tells the credits; without credits the request is a 402 with its numbers, and nothing is sent."""
    client, billing = web
    billing.grant("ada", "generations", 1, id="order_1")

    def post():
        return client.post("/answer", params={"question": "Hi"}, headers={"x-user": "ada"})

    answered, refused = post(), post()

    assert (200, {"answer": FOX, "credits": 1}) == (answered.status_code, answered.json())
    assert (402, 0, 1) == (refused.status_code, refused.json()["availableBalance"], refused.json()["required"])
    assert ["ada"] == [event.customer for event in billing.usage_events()]
    assert 1 == len(provider.requests)


def test_web_stream(web, provider):
    """A streamed answer is billed to who asked, and its refusal is a 402 before the first byte, not a broken 200."""
    client, billing = web
    billing.grant("ada", "generations", 1, id="order_1")

    def post(user):
        return client.post("/stream", params={"question": "Hi"}, headers={"x-user": user})

    answered, refused, stranger = post("ada"), post("ada"), post("bob")

    assert (200, FOX) == (answered.status_code, answered.text)
    assert [402, 402] == [refused.status_code, stranger.status_code]
    assert "insufficient_credits" == refused.json()["error"]
    assert [("ada", 1)] == [(event.customer, event.amount) for event in billing.usage_events()]
    assert 1 == len(provider.requests)
