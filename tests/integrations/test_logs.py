"""Structured logs: one record for every step, with its numbers as fields, and nothing that a customer or a provider has said."""

from __future__ import annotations

import asyncio
import logging

import openai
import pytest

from metered_ai import InsufficientCreditsError
from metered_ai.integrations.logs import log_steps

PROMPT, ANSWER, KEY, NOTE = "the prompt is a secret", "the answer is a secret", "sk-the-key", "a note of the user's"
MESSAGES = [{"role": "user", "content": PROMPT}]


@pytest.fixture
def records(shop, caplog):
    """What was logged, as (message, fields), from the lowest level on."""
    caplog.set_level(logging.DEBUG, "metered_ai.steps")
    log_steps(shop.billing)
    plain = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

    def records():
        return [
            (record.levelname, record.getMessage(), {k: v for k, v in vars(record).items() if k not in plain})
            for record in caplog.records
            if record.name == "metered_ai.steps"
        ]

    return records


def test_steps(records, shop):
    """A grant, a hold, a settle, a release, a doubt and a refusal are each one record with its numbers."""
    shop.grant("ada", 1, id="order_1")
    client = shop.client(customer="ada")
    shop.provider.answer(status=500)
    with pytest.raises(openai.InternalServerError):
        client.responses.create(model="gpt-5-mini", input=PROMPT)
    shop.provider.answer(reset=True)
    with pytest.raises(openai.APIConnectionError):
        client.responses.create(model="gpt-5-mini", input=PROMPT)
    client.responses.create(model="gpt-5-mini", input=PROMPT)
    with pytest.raises(InsufficientCreditsError):
        client.responses.create(model="gpt-5-mini", input=PROMPT)
    event = shop.events()[0]

    assert [
        ("INFO", "granted"),
        ("DEBUG", "placed"),
        ("INFO", "released"),
        ("DEBUG", "placed"),
        ("WARNING", "in doubt"),
        ("DEBUG", "placed"),
        ("INFO", "settled"),
        ("WARNING", "refused"),
    ] == [record[:2] for record in records()]
    settled, refused = (fields for _, message, fields in records() if message in ("settled", "refused"))
    assert settled.pop("seconds") >= 0
    assert {
        "customer": "ada",
        "meter": "generations",
        "hold_id": event.hold_id,
        "amount": 1,
        "basis": "reported",
        "is_unlimited": False,
        "model": "gpt-5-mini",
        "endpoint": "responses",
        "input_tokens": 10,
        "output_tokens": event.usage.output_tokens,
        "request_id": event.request_id,
        "transaction_id": event.transaction_id,
        "outcome": "settled",
    } == settled
    assert ("InsufficientCreditsError", 0, 1) == (refused["error"], refused["available"], refused["required"])


def test_async(records, shop):
    """Steps of async calls, which reach the ledger together, are told one by one."""
    shop.grant("ada", 5)

    async def main():
        async with shop.async_client(customer="ada") as client:
            await asyncio.gather(
                *(client.responses.create(model="gpt-5-mini", input=PROMPT) for _ in range(6)), return_exceptions=True
            )

    asyncio.run(main())
    messages = [message for _, message, _ in records()]

    assert {"granted": 1, "placed": 5, "settled": 5, "refused": 1} == {
        message: messages.count(message) for message in messages
    }


def test_no_secrets(records, shop, caplog):
    """Nothing that is logged, by us at any level, has a word of a prompt, an answer, a key or the user's properties."""
    caplog.set_level(logging.DEBUG, "metered_ai")
    shop.grant("ada", 9)
    client = shop.client(customer="ada", api_key=KEY).with_billing(properties={"note": NOTE})
    for answer in ({"text": ANSWER}, {"status": 400, "body": {"error": {"message": PROMPT}}}, {"cut_bytes": 30}):
        shop.provider.answer(**answer)
        try:
            client.chat.completions.create(model="gpt-5-mini", messages=MESSAGES)
        except openai.OpenAIError:
            continue
    shop.billing.flush()
    told = "".join(repr(vars(record)) for record in caplog.records if record.name.startswith("metered_ai"))

    assert "hold_id" in told
    assert [] == [secret for secret in (PROMPT, ANSWER, KEY, NOTE) if secret in told]


def test_level(records, shop, caplog):
    """A level that is off costs no record."""
    caplog.set_level(logging.WARNING, "metered_ai.steps")
    shop.grant("ada", 1)
    shop.client(customer="ada").responses.create(model="gpt-5-mini", input=PROMPT)

    assert [] == records()
